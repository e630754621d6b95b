"""What both searches work on: the problem, its exact values, and the moves that assign one vector of every group.

Shapes: O rows, I columns, T tiles of V rows, P kept columns of a tile, G = P / m groups; B blocks (one tile's share of
one run of columns) of W columns and K slots, each slot holding one kept column.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_hinm.mask import choose_vectors, tile_rows
from lightning_hinm.pattern import HiNMPattern

Array = np.ndarray[Any, Any]

# A draw that gains nothing says little about the next one: a search of draws ends after so many failures in a row.
RETRIES = 4
# After a draw that gains less, as a fraction of what all blocks retain, several are tried at once, of so many groups in
# all: they take little longer than one, and few of them gain.
SLOW, TRIED = 1e-3, 128
# Elements of the largest temporary: blocks are searched in batches of this size.
BATCH = 1 << 25
# Groups that one assignment takes at most, unless it shall be quick.
GROUPS = 512
# A thread is woken for matrices of at least so many numbers: fewer are solved sooner than it wakes.
PER_THREAD = 1 << 15
# What each later arrival puts a column off being drawn, beside noise of 1: twice in a row it could only go back.
AGE = 1.0
# Pruned columns that stand for election: as many as there are groups, so many, or a quarter as many if that is more.
ELECTED = 16
# How much of the most that a row would give beside the average a column costs.
PRICED = 0.75
# Groups of an assignment that is solved sooner than it is priced.
FEW = 24
# Value of a choice that is not allowed: less than any that is.
BARRED = -1e6

# Between two reports of a long search; and how much longer than a report the search goes on, at least.
SECONDS_BETWEEN_REPORTS, SEARCH_PER_REPORT = 5.0, 20


@dataclass
class Clock:
    """A time budget; ``ended`` says whether it cut anything short."""

    budget: float | None
    start: float = field(default_factory=time.monotonic)
    ended: bool = False
    next_report: float = field(default_factory=lambda: SECONDS_BETWEEN_REPORTS)

    def expired(self) -> bool:
        expired = self.budget is not None and self.seconds >= self.budget
        self.ended |= expired
        return expired

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def share(self, parts: int, reserve: float = 0.0) -> "Clock":
        """A new clock for the first of so many parts that are still to come: an equal share of the time left.

        So many seconds of that are held in ``reserve``.
        """
        return Clock(None if self.budget is None else max(self.budget - self.seconds - reserve, 0.0) / parts)

    @property
    def used(self) -> float:
        """The fraction of the budget that is used up; 0 without one."""
        return self.seconds / self.budget if self.budget else 0.0


@dataclass(frozen=True)
class Problem:
    """What both methods work on: a scaled float32 saliency and what may change.

    Matrices that share one order of rows are a problem each, with one generator and one clock; their saliencies are
    scaled so that the sum over them is what to maximise.
    """

    saliency: Tensor
    pattern: HiNMPattern
    generator: torch.Generator
    clock: Clock
    output_order: Tensor | None
    within: Tensor | None
    report: Callable[[Tensor, Tensor], None] | None = None

    @property
    def due(self) -> bool:
        """Whether there is someone to report to, and it is time."""
        return self.report is not None and self.clock.seconds >= self.clock.next_report

    def tell(self, order: Tensor, index: Tensor | None = None) -> None:
        """Reports the layout so far, every few seconds; without an index, with the columns of the largest sums."""
        start = self.clock.seconds
        if self.report is None or not self.due:
            return
        self.report(order, choose_vectors(self.saliency, self.pattern, order) if index is None else index)
        end = self.clock.seconds
        self.clock.next_report = end + max(SECONDS_BETWEEN_REPORTS, SEARCH_PER_REPORT * (end - start))

    def noise(self, *shape: int) -> Array:
        """Normal noise, drawn on the CPU so that every device sees the same."""
        return torch.randn(shape, generator=self.generator).numpy()

    def shuffled(self, count: int) -> Array:
        """The numbers below ``count`` in random order: int64 ``[count]``, drawn as noise is."""
        return torch.randperm(count, generator=self.generator).numpy()


def ranked(parts: Sequence[Tensor], n: int) -> list[Tensor]:
    """Elementwise the ``n`` largest of the tensors, in descending order: a partial bubble sort of max and min."""
    rest, best = list(parts), []
    for left in reversed(range(n)):
        largest, *rest = rest
        for i, part in enumerate(rest):
            largest, rest[i] = torch.maximum(largest, part), torch.minimum(largest, part) if left else part
        best.append(largest)
    return best


def top_sum(parts: list[Tensor], n: int) -> Tensor:
    """Elementwise sum of the ``n`` largest of the ``m`` tensors."""
    if n > len(parts) // 2:  # fewer passes from the other end
        smallest = ranked([-part for part in parts], len(parts) - n)
        return sum(smallest, torch.stack(parts).sum(dim=0))
    return sum(ranked(parts, n), torch.zeros_like(parts[0]))


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


def joined_values(rest: Sequence[Tensor], columns: Tensor, sums: Tensor, n: int) -> Tensor:
    """Twice what each group is worth with each of the columns as its last member, less a number for each group.

    Of a row's ``m`` values, the best ``n`` after value ``e`` joins sum to ``(best n-1 of the others) + max(nth, e)``,
    with ``nth`` the n-th best of the others, and ``2 * sum(max(nth, e)) = sum nth + sum e + |nth - e|_1``: one L1
    distance matrix, exact. What all columns of a group have in common is left out.

    Args:
        rest: ``m - 1`` tensors ``[B, G, V]``, the other columns of each group; at least ``n``.
        columns: ``[B, C, V]``, the columns that may join.
        sums: ``[B, C]``, of these.
        n: kept of the ``m``, fewer than all.

    Returns:
        ``[B, G, C]``.
    """
    return torch.cdist(ranked(rest, n)[-1], columns, p=1.0).add_(sums.unsqueeze(1))


def assign(values: Sequence[Array]) -> list[Array]:
    """The column of each row in the assignment with the largest sum, of each ``[N, M >= N]``: int64 ``[N]``."""
    from scipy.optimize import linear_sum_assignment  # here: importing the package stays light

    def solve(matrices: Sequence[Array]) -> list[Array]:
        return [linear_sum_assignment(matrix, maximize=True)[1] for matrix in matrices]

    threads = min(torch.get_num_threads(), len(values), sum(matrix.size for matrix in values) // PER_THREAD)
    if threads < 2:
        return solve(values)
    ends = [len(values) * i // threads for i in range(threads + 1)]
    parts = [values[first:last] for first, last in pairwise(ends)]
    others = [_threads(os.getpid()).submit(solve, part) for part in parts[1:]]  # the solver lets other threads run
    return solve(parts[0]) + [choice for other in others for choice in other.result()]


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Kept, because to begin them takes longer than most assignments; a fork has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), f"assignments of {process}")


def assign_vectors(
    problem: Problem,
    order: Tensor,
    index: Tensor,
    *,
    pruned: bool,
    draws: int | None = None,
    least: float = 1e-6,
    most: int = GROUPS,
    retries: int = RETRIES,
    failed: int = 0,
) -> Tensor:
    """Draw one vector of every group of a tile and assign them to the groups anew, as long as that gains.

    Args:
        problem: gives the pattern, the randomness and the time left.
        order: int64 ``[O]``.
        index: int64 ``[T, P]``.
        pruned: some of the columns that a tile prunes stand for election too: the exchange method's own addition.
        draws: at most so many; None for as many as it takes until ``retries`` in a row are no gain.
        least: what counts as a gain, as a fraction of what the tile retains at first.
        most: groups that one assignment takes: the cost of a draw grows with its square, the gain far less.
        retries: draws without a gain in a row that end the search.
        failed: draws of a single group that may fail in a row, if these are more: few groups are soon drawn often.

    Returns:
        The new index, ``[T, P]``.
    """
    pattern = problem.pattern
    if problem.clock.expired():
        return index
    if pattern.n == pattern.m:  # all groups are worth their sums: the largest sums are best
        return choose_vectors(problem.saliency, pattern, order, within=problem.within) if pruned else index
    v, m, tiles = pattern.vector_size, pattern.m, index.shape[0]
    chosen = index.cpu().numpy().copy()
    start = 0
    for first, columns, count in pattern.equal_runs(problem.saliency.shape[1]):
        kept = pattern.kept_of_run(columns)
        held = min(kept, columns)  # of the slots, those that hold real columns
        groups = held // m  # a group that virtual columns complete stays as it is
        slots = chosen[:, start : start + count * kept].reshape(tiles, count, kept)[:, :, :held]  # a view
        start += count * kept
        elect = pruned and held < columns
        if not groups or (groups == 1 and not elect):
            continue
        size = min(groups, most)
        at_once = max(BATCH // (groups * (2 * size + m * v) + columns * v), 1)  # blocks
        runs = min(count, at_once)
        for r, t in product(range(0, count, runs), range(0, tiles, at_once // runs)):
            part = order[t * v : (t + at_once // runs) * v]
            own = slots[t : t + at_once // runs, r : r + runs]
            begin, end = first + r * columns, first + min(r + runs, count) * columns
            points = _blocks(problem.saliency[:, begin:end], part, v, columns).transpose(1, 2).contiguous()  # [B, W, V]
            offset = np.arange(begin, end, columns)[:, None]
            local = (own - offset).reshape(len(points), held)
            free = np.ones(points.shape[:2], bool)
            if problem.within is not None:
                free = _blocks(problem.within[:, begin:end], part, v, columns).any(dim=1).cpu().numpy()
            free[np.arange(len(points))[:, None], local] = False
            members = local[:, : groups * m].reshape(-1, groups, m)
            elected = free if elect and free.any() else None
            blocks = Blocks(points, members, pattern.n, elected, most, aged=pruned)
            blocks.assign(problem, draws, least, retries, failed)
            own[:, :, : groups * m] = blocks.slots.reshape(*own.shape[:2], -1) + offset
            if problem.due:
                problem.tell(order, torch.from_numpy(chosen).to(index.device))
    return torch.from_numpy(chosen).to(index.device)


def _blocks(matrix: Tensor, order: Tensor, vector_size: int, columns: int) -> Tensor:
    """``[O, runs * W]`` -> ``[B, V, W]``, the runs of each tile one after another."""
    return tile_rows(matrix, order, vector_size).unflatten(2, (-1, columns)).transpose(1, 2).flatten(0, 1)


class Blocks:
    """Some tiles' share of one run of columns, and the groups that their kept columns form.

    The columns lie where the saliency does. What is known of each, and which group holds it, is small: it is kept on
    the CPU, where assignments are solved.

    Args:
        points: ``[B, W, V]``, the columns.
        slots: int64 ``[B, G, m]``, the columns that each group holds.
        n: kept of the ``m``.
        free: bool ``[B, W]``, pruned columns that may be chosen; None if none may.
        most: groups that one assignment takes.
        aged: vectors are drawn by age.
    """

    def __init__(self, points: Tensor, slots: Array, n: int, free: Array | None, most: int, *, aged: bool) -> None:
        self.points, self.slots, self.n, self.free, self.most = points, slots.copy(), n, free, most
        self.sums = points.sum(dim=2).cpu().numpy()  # [B, W]
        members = self.columns(np.arange(len(slots))[:, None], slots.transpose(2, 0, 1))  # [m, B, G, V]
        self.worth = top_sum(list(members), n).sum(dim=(1, 2)).cpu().numpy()  # [B], what the groups retain at first
        self.spread = self.sums.std(dtype=np.float64).astype(self.sums.dtype)
        # A group holds its columns in the order in which they came: mostly the one that came long ago is drawn.
        self.age = np.arange(slots.shape[2], dtype=np.float32) * (AGE if aged else 0)
        self.tried = TRIED if aged else 0
        # As many are free at any time: whether that is enough for every draw.
        self.scarce = free is not None and free.sum(axis=1).min() < self.elected(*self.deals)

    @property
    def deals(self) -> tuple[int, int]:
        """Groups of an assignment, and the assignments that the groups of a block are dealt out to."""
        deals = -(-self.slots.shape[1] // self.most)
        return self.slots.shape[1] // deals, deals

    def elected(self, size: int, deals: int) -> int:
        """Pruned columns that stand for election in all assignments of a block."""
        return min(max(-(-size // 4), min(size, ELECTED)), self.points.shape[1] // deals) * deals

    def assign(self, problem: Problem, draws: int | None, least: float, retries: int, failed: int) -> None:
        """Draws until each block has had ``draws`` or fails, as ``assign_vectors`` says; changes ``slots``.

        Of ``draws``, all that are tried at once are one.
        """
        retries = max(retries, failed // self.slots.shape[1])
        failures, tries = np.zeros(len(self.slots), np.int64), 1
        while draws is None or draws > 0:
            active = np.flatnonzero(failures < retries)
            if not active.size or problem.clock.expired():
                return
            gain, worth = self.draw(problem, active, tries), self.worth[active]
            failures[active] = np.where(gain > least * worth, 0, failures[active] + tries)
            if gain.sum() < SLOW * worth.sum():
                tries = max(self.tried // (active.size * self.slots.shape[1]), 1)
            draws = None if draws is None else draws - 1

    def draw(self, problem: Problem, active: Array, tries: int) -> Array:
        """Assigns one vector of every group of the ``active`` blocks anew: what each of them gains.

        Many groups are dealt out to several assignments, D of S groups each. A gain is exact, because no group gives
        more than one vector. Of several ``tries`` for each block, all of them from where it stands, the best counts.
        """
        active = active.repeat(tries)
        (_, groups, m), (size, deals) = self.slots.shape, self.deals
        blocks, dealt = active[:, None], np.arange(groups)[None]
        if deals > 1:
            dealt = problem.noise(len(active), groups).argsort(axis=1)[:, : deals * size]
        slots = self.slots[blocks, dealt]  # [A, D * S, m]
        first = (problem.noise(*slots.shape) + self.age).argmin(axis=2)
        gives = np.arange(m) == first[:, :, None]
        drawn, rest = slots[gives].reshape(-1, size), slots[~gives].reshape(-1, size, m - 1)  # of each assignment
        extra = self.candidates(problem, active, size, deals)  # [A * D, C]
        candidates = np.concatenate((drawn, extra), axis=1)
        block = active.repeat(deals)[:, None]
        others = self.columns(block, rest.transpose(2, 0, 1)).unbind()
        sums = torch.from_numpy(self.sums[block, candidates]).to(self.points.device)
        values = joined_values(others, self.columns(block, candidates), sums, self.n).cpu()
        if self.scarce and self.free is not None:
            values[:, :, size:].masked_fill_(~torch.from_numpy(self.free[block, extra]).unsqueeze(1), BARRED)
        worth = values.numpy()  # [A * D, S, S + C]
        choice = np.stack(assign(list(worth if size < FEW else _priced(values))))[:, :size]
        at, group = np.arange(len(worth))[:, None], np.arange(size)
        before = worth[at, group, group].sum(axis=1, dtype=np.float64)
        gain = worth[at, group, choice].sum(axis=1, dtype=np.float64) - before
        gain[gain <= 1e-6 * before] = 0  # rounding
        chosen = np.where(gain[:, None] > 0, candidates[at, choice], drawn)
        new = np.concatenate((rest, chosen[:, :, None]), axis=2).reshape(slots.shape)
        drawn, chosen, gain = drawn.reshape(len(active), -1), chosen.reshape(len(active), -1), gain.reshape(-1, deals)
        gain = gain.sum(axis=1) / 2  # [A]
        if tries > 1:
            best = gain.reshape(-1, tries).argmax(axis=1) + np.arange(0, gain.size, tries)
            dealt = dealt if deals == 1 else dealt[best]
            blocks, new, drawn, chosen, gain = (each[best] for each in (blocks, new, drawn, chosen, gain))
        self.slots[blocks, dealt] = new
        if self.free is not None:
            self.free[blocks, drawn] = True
            self.free[blocks, chosen] = False
        return gain

    def columns(self, block: Array, column: Array) -> Tensor:
        """Each ``column`` of its ``block``, ``[..., V]``: whole rows of the points, copied one by one."""
        at = torch.from_numpy((block * self.points.shape[1] + column).ravel()).to(self.points.device)
        return self.points.flatten(0, 1).index_select(0, at).unflatten(0, column.shape)

    def candidates(self, problem: Problem, active: Array, size: int, deals: int) -> Array:
        """Pruned columns for each assignment, mostly those with large sums: ``[A * D, C]``.

        One that is not free fills up where too few are.
        """
        if self.free is None:
            return np.empty((len(active) * deals, 0), np.int64)
        count = self.elected(size, deals)
        score = self.sums[active] + problem.noise(len(active), self.sums.shape[1]) * (self.spread / 2)
        score[~self.free[active]] = -np.inf
        best = score.argpartition(-count, axis=1)[:, -count:]
        return best.reshape(-1, count // deals, deals).transpose(0, 2, 1).reshape(-1, count // deals)


def _priced(values: Tensor) -> Array:
    """The same assignment problems, ``[B, S, S + C]``, as square ones that are solved in a fraction of the time.

    Off each column goes what it is worth on average, and most of what the row that wants it most would give beside, so
    that rows compete less: allowed where every column is assigned, hence the rows of zeros, which take the columns that
    are left over.
    """
    blocks, rows, columns = values.shape
    # What a row is worth everywhere decides nothing; columns that are barred are none of the first.
    values = values - values[:, :, :rows].mean(dim=2, keepdim=True)
    price = values.mean(dim=1, keepdim=True).lerp_(values.amax(dim=1, keepdim=True), PRICED)
    if columns > rows:
        price = (price - price.kthvalue(columns - rows + 1, dim=2, keepdim=True).values).clamp_(min=0)
    priced = values.new_zeros(blocks, columns, columns, dtype=torch.float64)
    torch.sub(values, price, out=priced[:, :rows])
    priced[:, rows:] -= price
    return priced.numpy()
