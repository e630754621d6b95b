"""What both searches work on: the problem, its exact values, and the moves that assign one vector of every group.

Shapes: O rows, I columns, T tiles of V rows, P kept columns of a tile, G = P / m groups; B blocks (one tile's share of
one run of columns) of W columns and K slots, each slot holding one kept column.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_hinm.mask import tile_rows
from lightning_hinm.pattern import HiNMPattern

# A draw that gains nothing says little about the next one: a search of draws ends after this many failures in a row.
RETRIES = 4
# Elements of the largest temporary: blocks are searched in batches of this size.
BATCH = 1 << 25


@dataclass
class Clock:
    """A time budget: ``expired()`` remembers that it was ever true."""

    budget: float | None
    start: float = field(default_factory=time.monotonic)
    ended: bool = False

    def expired(self) -> bool:
        self.ended = self.ended or (self.budget is not None and self.seconds >= self.budget)
        return self.ended

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


@dataclass(frozen=True)
class Problem:
    """What both methods work on: a scaled float32 saliency and what may change."""

    saliency: Tensor
    pattern: HiNMPattern
    generator: torch.Generator
    clock: Clock
    output_order: Tensor | None
    within: Tensor | None

    def tiles(self, order: Tensor) -> Tensor:
        """``[T, I, V]``: the columns of each tile as points, what every distance is taken between."""
        return tile_rows(self.saliency, order, self.pattern.vector_size).transpose(1, 2).contiguous()

    def allowed(self, order: Tensor) -> Tensor:
        """bool ``[T, I]``: the columns that a tile may choose from."""
        if self.within is None:
            tiles = -(-self.saliency.shape[0] // self.pattern.vector_size)
            return torch.ones(tiles, self.saliency.shape[1], dtype=torch.bool, device=self.saliency.device)
        return tile_rows(self.within, order, self.pattern.vector_size).any(dim=1)

    def noise(self, *shape: int) -> Tensor:
        """Normal noise, drawn on the CPU so that every device sees the same."""
        return torch.randn(shape, generator=self.generator).to(self.saliency.device)

    def shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator).to(self.saliency.device)

    def blocks(self, tiles: Tensor, index: Tensor) -> Iterator[tuple[slice, slice, slice]]:
        """Slices (tiles, columns, slots) of batches of blocks whose exchange matrices fit into ``BATCH``."""
        start = 0
        for first, last in self.pattern.runs(tiles.shape[1]):
            stop = start + self.pattern.kept_of_run(last - first)
            step = max(BATCH // ((stop - start) * (last - first)), 1)
            for t in range(0, tiles.shape[0], step):
                yield slice(t, t + step), slice(first, last), slice(start, stop)
            start = stop


def top_sum(parts: list[Tensor], n: int) -> Tensor:
    """Elementwise sum of the ``n`` largest of the ``m`` tensors: a partial bubble sort of max and min, no top-k."""
    rest, total = list(parts), torch.zeros_like(parts[0])
    if n > len(parts) // 2:  # fewer passes from the other end
        return torch.stack(parts).sum(dim=0) + top_sum([-part for part in parts], len(parts) - n)
    for _ in range(n):
        for i in range(len(rest) - 1):
            rest[i], rest[i + 1] = torch.minimum(rest[i], rest[i + 1]), torch.maximum(rest[i], rest[i + 1])
        total = total + rest.pop()
    return total


def row_values(problem: Problem, rows: Tensor, index: Tensor) -> Tensor:
    """What each of the rows would retain in each tile, given what the tile keeps: ``[rows, T]``."""
    pattern = problem.pattern
    in_features = problem.saliency.shape[1]
    padded = pad(problem.saliency[rows], (0, pattern.padded(in_features) - in_features)).t().contiguous()
    values = []
    for columns in index:  # one tile at a time: [m, G, rows] at most
        slots = padded[columns.unflatten(0, (-1, pattern.m)).t()]  # [m, G, rows]
        values.append(top_sum(list(slots), pattern.n).sum(dim=0))
    return torch.stack(values, dim=1)


def replacement_parts(slots: Tensor, pattern: HiNMPattern) -> tuple[Tensor, Tensor, Tensor]:
    """What a group is worth, and what is left of it without each of its slots.

    With the top ``n`` of a row's ``m`` values, ``u`` the n-th and ``l`` the next (0 where n = m): without value ``x``
    the best n-1 of the others sum to ``top - max(x, u)``, and the n-th best of the others is ``l if x >= u else u``.

    Args:
        slots: ``[B, K, V]``, the columns that the slots hold.

    Returns:
        value of each slot's group ``[B, K]``, sum over the rows of the best n-1 others ``[B, K]``, and the n-th best
        other ``[B, K, V]``.
    """
    n, m = pattern.n, pattern.m
    x = slots.unflatten(1, (-1, m))  # [B, G, m, V]
    ranked = x.sort(dim=2, descending=True).values
    top, u = ranked[:, :, :n].sum(dim=2, keepdim=True), ranked[:, :, n - 1 : n]
    low = ranked[:, :, n : n + 1] if n < m else torch.zeros_like(u)
    value = top.sum(dim=3).expand(-1, -1, m).flatten(1)
    others = (top - torch.maximum(x, u)).sum(dim=3).flatten(1)
    nth = torch.where(x >= u, low, u).flatten(1, 2)
    return value, others, nth


def replacement_values(others: Tensor, nth: Tensor, columns: Tensor) -> Tensor:
    """What the group of slot i is worth with column j in that slot, for all i and j: ``[B, K, W]``.

    ``sum(max(nth, e)) = (sum nth + sum e + |nth - e|_1) / 2``: one L1 distance matrix, exact.
    """
    distance = torch.cdist(nth, columns, p=1.0)
    return others.unsqueeze(2) + (nth.sum(dim=2).unsqueeze(2) + columns.sum(dim=2).unsqueeze(1) + distance) / 2


def assign(values: Tensor) -> Tensor:
    """The column of each row in the assignment with the largest sum: ``[N, M >= N]`` -> int64 ``[N]``."""
    from scipy.optimize import linear_sum_assignment  # here: importing the package stays light

    _, columns = linear_sum_assignment(values.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(values.device)


def assign_vectors(problem: Problem, order: Tensor, index: Tensor, *, pruned: bool) -> Tensor:
    """Sample one vector of every group of a tile and assign them to the groups anew; keep the gains of each tile.

    With ``pruned``, the columns that the tile prunes stand for election too: the exchange method's own addition.
    """
    pattern, index = problem.pattern, index.clone()
    tiles, allowed = problem.tiles(order), problem.allowed(order)
    start = 0
    for first, last in pattern.runs(tiles.shape[1]):
        stop = start + pattern.kept_of_run(last - first)
        # a group that virtual columns complete stays as it is
        groups = min(stop - start, last - first) // pattern.m
        for tile in range(len(tiles)):
            slots = index[tile, start : start + groups * pattern.m]
            free = allowed[tile].clone() if pruned else torch.zeros_like(allowed[tile])
            free[:first], free[last:] = False, False
            free[index[tile, start : start + min(stop - start, last - first)]] = False
            if groups > 1 and (pattern.n < pattern.m or pruned):
                # the likeliest are enough: as many as there are groups, by their sums
                likely = tiles[tile].sum(dim=1).masked_fill(~free, -1.0).topk(min(groups, int(free.sum()))).indices
                slots.copy_(_assign_tile(problem, tiles[tile], slots, likely))
        start = stop
    return index


def _assign_tile(problem: Problem, columns: Tensor, slots: Tensor, pruned: Tensor) -> Tensor:
    """One tile's share of one run: ``columns`` ``[I, V]`` as points, ``slots`` and ``pruned`` their numbers."""
    m = problem.pattern.m
    base = torch.arange(0, slots.numel(), m, device=slots.device)
    failures = 0
    while failures < RETRIES and not problem.clock.expired():
        at = base + torch.randint(m, base.shape, generator=problem.generator).to(slots.device)  # a slot of each group
        value, others, nth = replacement_parts(columns[slots].unsqueeze(0), problem.pattern)
        candidates = torch.cat((slots[at], pruned))
        values = replacement_values(others[:, at], nth[:, at], columns[candidates].unsqueeze(0))[0]
        choice = assign(values)  # [G] into the candidates
        before = value[0, at].sum()
        if values.gather(1, choice.unsqueeze(1)).sum() > before * (1 + 1e-6):
            slots = slots.index_copy(0, at, candidates[choice])
            left = torch.ones_like(candidates, dtype=torch.bool).index_fill(0, choice, False)
            pruned, failures = candidates[left], 0
        else:
            failures += 1
    return slots
