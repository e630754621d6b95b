"""What both searches work on: the problem, its exact values, and the moves that assign one vector of every group.

Shapes: O rows, I columns, T tiles of V rows, P kept columns of a tile, G = P / m groups; B blocks (one tile's share of
one run of columns) of W columns and K slots, each slot holding one kept column.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_hinm.mask import choose_vectors, tile_rows
from lightning_hinm.pattern import HiNMPattern

# A draw that gains nothing says little about the next one: a search of draws ends after so many failures in a row.
RETRIES = 4
# Elements of the largest temporary: blocks are searched in batches of this size.
BATCH = 1 << 25
# Groups that one assignment takes at most, unless it shall be quick.
GROUPS = 512
# Numbers of the matrices that several threads solve sooner than one.
PARALLEL = 1 << 18
# What each later arrival puts a column off being drawn, beside noise of 1: twice in a row it could only go back.
AGE = 1.0
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

    def share(self, parts: int) -> "Clock":
        """A new clock for the first of so many parts that are still to come: an equal share of the time left."""
        return Clock(None if self.budget is None else max(self.budget - self.seconds, 0.0) / parts)

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

    def noise(self, *shape: int) -> Tensor:
        """Normal noise, drawn on the CPU so that every device sees the same."""
        return torch.randn(shape, generator=self.generator).to(self.saliency.device)

    def shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator).to(self.saliency.device)


def ranked(parts: list[Tensor], n: int) -> list[Tensor]:
    """Elementwise the ``n`` largest of the tensors, in descending order: a partial bubble sort of max and min."""
    rest, best = list(parts), []
    for _ in range(n):
        for i in range(len(rest) - 1):
            rest[i], rest[i + 1] = torch.minimum(rest[i], rest[i + 1]), torch.maximum(rest[i], rest[i + 1])
        best.append(rest.pop())
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


def joined_values(rest: Tensor, columns: Tensor, n: int) -> Tensor:
    """What each group is worth with each of the columns as its last member: ``[B, G, C]``.

    Of a row's ``m`` values, the best ``n`` after value ``e`` joins sum to ``(best n-1 of the others) + max(nth, e)``,
    with ``nth`` the n-th best of the others (0 where n = m), and ``sum(max(nth, e)) = (sum nth + sum e + |nth - e|_1)
    / 2``: one L1 distance matrix, exact.

    Args:
        rest: ``[B, G, m - 1, V]``, the other columns of each group.
        columns: ``[B, C, V]``, the columns that may join.
        n: kept of the ``m``.
    """
    best = ranked(list(rest.unbind(2)), min(n, rest.shape[2]))
    nth = best.pop() if n <= rest.shape[2] else rest.new_zeros(*rest.shape[:2], rest.shape[3])
    others = sum((part.sum(dim=2) for part in best), nth.sum(dim=2) / 2)
    return others.unsqueeze(2) + (columns.sum(dim=2).unsqueeze(1) + torch.cdist(nth, columns, p=1.0)) / 2


def assign(values: list[Tensor]) -> list[Tensor]:
    """The column of each row in the assignment with the largest sum, of each ``[N, M >= N]``: int64 ``[N]``."""
    from scipy.optimize import linear_sum_assignment  # here: importing the package stays light

    matrices = [matrix.cpu().double().numpy() for matrix in values]
    solve = partial(linear_sum_assignment, maximize=True)
    if len(matrices) > 1 and sum(matrix.size for matrix in matrices) > PARALLEL:  # the solver lets other threads run
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            solved = list(threads.map(solve, matrices))
    else:
        solved = [solve(matrix) for matrix in matrices]
    return [torch.from_numpy(columns).to(matrix.device) for matrix, (_, columns) in zip(values, solved, strict=True)]


def assign_vectors(
    problem: Problem,
    order: Tensor,
    index: Tensor,
    *,
    pruned: bool,
    draws: int | None = None,
    least: float = 1e-6,
    most: int = GROUPS,
    failed: int = 0,
) -> Tensor:
    """Draw one vector of every group of a tile and assign them to the groups anew, as long as that gains.

    Args:
        problem: gives the pattern, the randomness and the time left.
        order: int64 ``[O]``.
        index: int64 ``[T, P]``.
        pruned: some of the columns that a tile prunes stand for election too: the exchange method's own addition.
        draws: at most so many; None for as many as it takes until ``RETRIES`` in a row are no gain.
        least: what counts as a gain, as a fraction of what the tile retains.
        most: groups that one assignment takes: the cost of a draw grows with its square, the gain far less.
        failed: draws of a single group that may fail in a row, if these are more: few groups are soon drawn often.

    Returns:
        The new index, ``[T, P]``.
    """
    pattern, index = problem.pattern, index.clone()
    if problem.clock.expired():
        return index
    if pattern.n == pattern.m:  # all groups are worth their sums: the largest sums are best
        return choose_vectors(problem.saliency, pattern, order, within=problem.within) if pruned else index
    v, m, tiles = pattern.vector_size, pattern.m, index.shape[0]
    start = 0
    for first, columns, count in pattern.equal_runs(problem.saliency.shape[1]):
        kept = pattern.kept_of_run(columns)
        held = min(kept, columns)  # of the slots, those that hold real columns
        groups = held // m  # a group that virtual columns complete stays as it is
        own_slots = index[:, start : start + count * kept].unflatten(1, (count, kept))  # a view
        slots = own_slots[:, :, :held]  # [T, runs, held]
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
            offset = torch.arange(begin, end, columns, device=index.device).unsqueeze(1)
            local = (own - offset).flatten(0, 1)  # [B, held]
            free = torch.ones(points.shape[:2], dtype=torch.bool, device=index.device)
            if problem.within is not None:
                free = _blocks(problem.within[:, begin:end], part, v, columns).any(dim=1)
            free.scatter_(1, local, False)
            members = local[:, : groups * m].unflatten(1, (groups, m))
            blocks = Blocks(points, members, free if elect else None, most, aged=pruned)
            blocks.assign(problem, draws, least, failed)
            own[:, :, : groups * m] = blocks.slots.flatten(1).unflatten(0, own.shape[:2]) + offset
            problem.tell(order, index)
    return index


def _blocks(matrix: Tensor, order: Tensor, vector_size: int, columns: int) -> Tensor:
    """``[O, runs * W]`` -> ``[B, V, W]``, the runs of each tile one after another."""
    return tile_rows(matrix, order, vector_size).unflatten(2, (-1, columns)).transpose(1, 2).flatten(0, 1)


class Blocks:
    """Some tiles' share of one run of columns, and the groups that their kept columns form.

    Args:
        points: ``[B, W, V]``, the columns.
        slots: int64 ``[B, G, m]``, the columns that each group holds.
        free: bool ``[B, W]``, pruned columns that may be chosen; None if none may.
        most: groups that one assignment takes.
        aged: vectors are drawn by age.
    """

    def __init__(self, points: Tensor, slots: Tensor, free: Tensor | None, most: int, *, aged: bool) -> None:
        self.points, self.slots, self.free, self.most = points, slots.clone(), free, most
        self.sums = points.sum(dim=2)  # [B, W]
        self.spread = self.sums.double().std(correction=0).to(self.sums.dtype)
        # A group holds its columns in the order in which they came: mostly the one that came long ago is drawn.
        self.age = AGE * torch.arange(slots.shape[2], device=slots.device) if aged else 0.0
        # As many are free at any time: whether that is enough for every draw.
        self.scarce = free is not None and bool(free.sum(dim=1).min() < self.elected(*self.deals))

    @property
    def deals(self) -> tuple[int, int]:
        """Groups of an assignment, and the assignments that the groups of a block are dealt out to."""
        deals = -(-self.slots.shape[1] // self.most)
        return self.slots.shape[1] // deals, deals

    def elected(self, size: int, deals: int) -> int:
        """Pruned columns that stand for election in all assignments of a block."""
        return min(-(-size // 4), self.points.shape[1] // deals) * deals

    def assign(self, problem: Problem, draws: int | None, least: float, failed: int = 0) -> None:
        """Draws until each block has had ``draws`` or fails, as ``assign_vectors`` says; changes ``slots``."""
        retries = max(RETRIES, failed // self.slots.shape[1])
        failures = torch.zeros(len(self.slots), dtype=torch.int64, device=self.slots.device)
        while draws is None or draws > 0:
            active = (failures < retries).nonzero()[:, 0]
            if not active.numel() or problem.clock.expired():
                return
            gain, worth = self.draw(problem, active)
            failures[active] = torch.where(gain > least * worth, 0, failures[active] + 1)
            draws = None if draws is None else draws - 1

    def draw(self, problem: Problem, active: Tensor) -> tuple[Tensor, Tensor]:
        """Assigns one vector of every group of the ``active`` blocks anew: ``(gain, what the groups were worth)``.

        Many groups are dealt out to several assignments, D of S groups each. A gain is exact, because no group gives
        more than one vector.
        """
        (_, groups, m), (size, deals) = self.slots.shape, self.deals
        dealt = problem.noise(len(active), groups).argsort(dim=1)[:, : deals * size]
        first = (problem.noise(len(active), deals * size, m) + self.age).argmin(dim=2, keepdim=True)
        others = torch.arange(m - 1, device=first.device)
        others = others + (others >= first)  # [A, D * S, m - 1]
        slots = self.slots[active.unsqueeze(1), dealt]  # [A, D * S, m]
        drawn, rest = slots.gather(2, first).view(-1, size), slots.gather(2, others)
        extra = self.candidates(problem, active, size, deals).flatten(0, 1)  # [A * D, C]
        candidates = torch.cat((drawn, extra), dim=1)
        b = (active.repeat_interleave(deals) if deals > 1 else active).view(-1, 1)
        rest_points = self.columns(b.unsqueeze(2), rest.unflatten(1, (deals, size)).flatten(0, 1))
        values = joined_values(rest_points, self.columns(b, candidates), problem.pattern.n)  # [A * D, S, S + C]
        if self.free is not None and self.scarce:
            values[:, :, size:].masked_fill_(~self.free[b, extra].unsqueeze(1), BARRED)
        quick = values if size < FEW else _priced(values)
        choice = torch.stack(assign(list(quick)))[:, :size]  # [A * D, S]
        before = values.diagonal(dim1=1, dim2=2).sum(dim=1)
        gain = values.gather(2, choice.unsqueeze(2)).sum(dim=(1, 2)) - before
        gain = torch.where(gain > 1e-6 * before, gain, 0)  # less is rounding
        chosen = torch.where(gain.unsqueeze(1) > 0, candidates.gather(1, choice), drawn)
        new = torch.cat((rest, chosen.view(len(active), -1, 1)), dim=2)
        self.slots[active.unsqueeze(1), dealt] = new
        if self.free is not None:
            self.free[b, drawn] = True
            self.free[b, chosen] = False
        return gain.view(-1, deals).sum(dim=1), before.view(-1, deals).sum(dim=1)

    def columns(self, block: Tensor, column: Tensor) -> Tensor:
        """Each ``column`` of its ``block``, ``[..., V]``: whole rows of the points, copied one by one."""
        at = block * self.points.shape[1] + column
        return self.points.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)

    def candidates(self, problem: Problem, active: Tensor, size: int, deals: int) -> Tensor:
        """Pruned columns for each assignment, a quarter as many as it has groups, large sums first: ``[A, D, C]``.

        One that is not free fills up where too few are.
        """
        if self.free is None:
            return self.slots.new_empty(len(active), deals, 0)
        score = self.sums[active] + problem.noise(len(active), self.sums.shape[1]) * (self.spread / 2)
        score.masked_fill_(~self.free[active], float("-inf"))
        best = score.topk(self.elected(size, deals), dim=1).indices
        return best.unflatten(1, (-1, deals)).transpose(1, 2)


def _priced(values: Tensor) -> Tensor:
    """The same assignment problems, ``[B, S, S + C]``, as square ones that are solved in a fraction of the time.

    Off each column goes what it is worth on average, and most of what the row that wants it most would give beside, so
    that rows compete less: allowed where every column is assigned, hence the rows of zeros, which take the columns that
    are left over.
    """
    extra = values.shape[2] - values.shape[1]
    price = values.mean(dim=1, keepdim=True)
    price = price + PRICED * (values - price - values.mean(dim=2, keepdim=True)).amax(dim=1, keepdim=True)
    if extra:
        price = (price - price.sort(dim=2).values[:, :, extra : extra + 1]).clamp(min=0)
    return pad(values, (0, 0, 0, extra)) - price
