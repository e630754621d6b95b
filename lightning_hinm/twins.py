"""Packed twins: what graphs run in the place of tensors, made anew whenever one of those has changed."""

import logging
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_hinm.format import HiNMWeight
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.modules import HiNMLayer, Packing

log = logging.getLogger(__name__)

# The packed weight, and the bias if there is one, of some tensors.
Maker = Callable[..., tuple[HiNMWeight, Tensor | None]]


class PackedTwin:
    """A packed layer that is made of other tensors, and the state of those when it was made.

    All graphs that run it share one twin. They hold its buffers, so a repack in place reaches them all, and the CUDA
    graphs that are captured of them.

    Args:
        name: of the layer, for messages.
        sources: what it is made of: the layer's weight, dense or packed, and whatever is folded into it.
        make: makes it of ``sources``.
        kind: of the layer.
        groups: of the layer.
        norm: the BatchNorm that is folded into it. In training it writes its statistics past autograd, which counts no
            version then, but counts its batches in ``num_batches_tracked``.

    Raises:
        ValueError: if ``make`` refuses ``sources``.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Tensor],
        make: Maker,
        *,
        kind: str,
        groups: int = 1,
        norm: nn.Module | None = None,
    ) -> None:
        self.name, self.make = name, make
        self._norm = None if norm is None else weakref.ref(norm)  # a graph must not keep alive what it is guarded by
        with torch.inference_mode(False), torch.no_grad():
            packed, bias = make(*sources)
            own_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            self.layer = HiNMLayer(packed, own_bias, kind=kind, groups=groups)
        self._stamps = [_stamp(tensor) for tensor in self._watched(sources)]

    @property
    def sources(self) -> list[Tensor | None]:
        """What it was made of; None for what is gone."""
        stamps = self._stamps if self._norm is None else self._stamps[:-1]
        return [reference() for reference, *_ in stamps]

    def fits(self, weight: Tensor) -> bool:
        """Whether ``weight`` can take the place of the first source."""
        return (weight.dtype, weight.device) == (self.layer.values.dtype, self.layer.values.device)

    def is_fresh(self, sources: Sequence[Tensor]) -> bool:
        """Whether it was made of ``sources`` as they are. Writes through ``.data`` cannot be seen."""
        for tensor, (reference, version, pointer) in zip(self._watched(sources), self._stamps, strict=True):
            if reference() is not tensor or tensor.data_ptr() != pointer:
                return False
            if tensor.is_inference():  # counts no versions; a weight is known by where it lies
                if self._norm is not None:
                    return False
            elif tensor._version != version:
                return False
        return True

    def repack(self, sources: Sequence[Tensor]) -> None:
        """Makes it of ``sources``, of the shapes that they had, in place.

        Raises:
            ValueError: if they cannot be packed.
        """
        with torch.inference_mode(False), torch.no_grad():
            packed, bias = self.make(*sources)
            self.layer.take(packed)  # unchecked, because a forward waits for it, and the maker obeys the rules
            if bias is not None:
                self.layer.bias.copy_(bias)  # type: ignore[operator]
        self._stamps = [_stamp(tensor) for tensor in self._watched(sources)]
        log.info("hinm: repacked %s", self.name)

    def _watched(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._norm is None:
            return sources
        norm = self._norm()
        assert norm is not None, "the guard of a graph fails with its norm"  # noqa: S101
        return [*sources, norm._buffers["num_batches_tracked"]]  # type: ignore[list-item]


# By the layer's layout or packing, and gone with it. A twin lives as long as a graph that runs it.
_twins: "weakref.WeakKeyDictionary[HiNMLayout | Packing, weakref.WeakValueDictionary[Hashable, PackedTwin]]"
_twins = weakref.WeakKeyDictionary()


def twin_of(
    owner: HiNMLayout | Packing, key: Hashable, sources: Sequence[Tensor], create: Callable[[], PackedTwin]
) -> PackedTwin:
    """The twin that graphs share, made of ``sources`` as they are.

    Args:
        owner: the layout or packing of the layer.
        key: tells the twins of one layer apart.
        sources: what the twin is made of.
        create: makes the twin where there is none that fits.

    Raises:
        ValueError: if ``sources`` cannot be packed.
    """
    known = _twins.setdefault(owner, weakref.WeakValueDictionary())
    twin = known.get(key)
    if twin is None or not twin.fits(sources[0]):
        twin = known[key] = create()
    elif not twin.is_fresh(sources):
        twin.repack(sources)
    return twin


def twins_of(owner: HiNMLayout | Packing | None) -> list[PackedTwin]:
    """All twins of a layer that graphs run."""
    return [] if owner is None else list(_twins.get(owner, {}).values())


def repack_all(stale: Iterable[tuple[PackedTwin, Sequence[Tensor]]]) -> None:
    """Makes twins anew of their sources.

    Raises:
        ValueError: if any cannot be packed; all offenders in one message.
    """
    wrong = []
    for twin, sources in stale:
        try:
            twin.repack(sources)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("Weights changed, and cannot be packed any more:\n  " + "\n  ".join(wrong))


def _stamp(tensor: Tensor) -> tuple["weakref.ref[Tensor]", int, int]:
    # Inference tensors count no versions.
    return weakref.ref(tensor), -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()
