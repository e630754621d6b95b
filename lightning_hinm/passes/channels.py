"""Streams: channels that may stand in any order, as long as it is the same one wherever they stand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx


@dataclass(eq=False)
class Stream:
    """Channels that stand in one order wherever they are.

    Args:
        size: how many.
        orders: the order in which each of its writers packs them; None where it is not known yet.
        became: the streams that it was joined to or cut into.
    """

    size: int
    orders: list[Tensor | None] = field(default_factory=list)
    became: "tuple[Stream, ...]" = ()

    def now(self) -> "tuple[Stream, ...]":
        """What it became in the end."""
        if self.became:
            self.became = tuple(part for stream in self.became for part in stream.now())
        return self.became or (self,)

    def join(self, other: "Stream") -> None:
        """From now on both stand in one order. Neither has become anything else."""
        if other is not self:
            self.orders += other.orders
            other.became = (self,)

    def cut(self, place: int) -> bool:
        """From now on what comes before ``place`` and the rest have orders of their own.

        Refused where no writer has an order that keeps the two apart: then none would be left to absorb.
        """
        apart = [order for order in self.orders if order is not None and bool((order[:place] < place).all())]
        if self.orders and not apart:
            return False
        left, right = [order[:place] for order in apart], [order[place:] - place for order in apart]
        self.became = Stream(place, list(left)), Stream(self.size - place, list(right))
        return True


class Channels(NamedTuple):
    """The channels of a value, along ``axis``, which is negative. Channels of several streams stand one after another.

    Args:
        axis: where they are.
        segments: streams, and how many entries each of their channels has: pixels, where those were flattened.
    """

    axis: int
    segments: tuple[tuple[Stream, int], ...]

    @property
    def parts(self) -> list[tuple[Stream, int]]:
        """The segments, of the streams that theirs became."""
        return [(part, spread) for stream, spread in self.segments for part in stream.now()]

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Those of the parts, each once."""
        return tuple(dict.fromkeys(stream for stream, _ in self.parts))

    @property
    def size(self) -> int:
        """Entries along the axis."""
        return sum(stream.size * spread for stream, spread in self.segments)

    def moved(self, axis: int) -> "Channels":
        """The same along another axis."""
        return Channels(axis, self.segments)

    def cut(self, place: int) -> "tuple[Channels, Channels] | None":
        """Those before ``place`` and the rest; None where there is none, or it would part what has to stay together."""
        if not 0 <= place <= self.size:
            return None
        left: list[tuple[Stream, int]] = []
        right, missing = self.parts, place
        while missing:
            stream, spread = right.pop(0)
            if stream.size * spread > missing:
                if missing % spread or not stream.cut(missing // spread):
                    return None
                return self.cut(place)
            left.append((stream, spread))
            missing -= stream.size * spread
        return Channels(self.axis, tuple(left)), Channels(self.axis, tuple(right))

    def join(self, other: "Channels") -> bool:
        """Whether both can have one order; from now on they do."""
        if self.size != other.size:
            return False
        while unequal := next(
            (pair for pair in zip(self.parts, other.parts, strict=False) if pair[0] != pair[1]), None
        ):
            (one, spread), (two, other_spread) = unequal
            if spread != other_spread:
                return False
            if one.size == two.size:
                one.join(two)
            elif not max(one, two, key=lambda stream: stream.size).cut(min(one.size, two.size)):
                return False
        return True

    def order(self, orders: Mapping[Stream, Tensor]) -> Tensor | None:
        """Position -> entry along the axis, ``[size]``, given the orders of the streams; None where nothing moves."""
        if not any(stream in orders for stream, _ in self.parts):
            return None
        pieces, start = [], 0
        for stream, spread in self.parts:
            order = orders[stream] if stream in orders else torch.arange(stream.size)
            pieces.append(start + (order.unsqueeze(1) * spread + torch.arange(spread)).flatten())
            start += stream.size * spread
        return torch.cat(pieces)


class Heads(NamedTuple):
    """The channels of a value that has an axis of heads.

    No ``index_select`` puts such a value in another order. So where heads meet what does not pass them on, all is taken
    back: what ``begun`` made is then read in the original order.

    Args:
        axis: of the heads, negative.
        each: of every head its channels, all along one axis.
        begun: the nodes that cut channels into these heads.
    """

    axis: int
    each: tuple[Channels, ...]
    begun: frozenset[fx.Node]

    @property
    def inner(self) -> int:
        """The axis of the channels of each head."""
        return self.each[0].axis

    def moved(self, axis: int, inner: int) -> "Heads":
        """The same along other axes, the second one that of the channels."""
        return self._replace(axis=axis, each=tuple(channels.moved(inner) for channels in self.each))

    def repeated(self, times: int) -> "Heads":
        """Each head so many times, one copy after another."""
        return self._replace(each=tuple(channels for channels in self.each for _ in range(times)))
