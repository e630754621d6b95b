"""Our search: rows to tiles by annealing on a cheap stand-in, then rows and vectors in turn by exact assignments.

Shapes: as in ``problem``.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hinm.gyro.problem import Array, Problem, assign, assign_vectors, row_values
from lightning_hinm.mask import choose_vectors
from lightning_hinm.pattern import HiNMPattern

# Annealing: all rounds; the share of them that is for short annealings, their rounds, how many there are at most, and
# how many of these are annealed further at most.
ROUNDS, STARTING, QUICK_ROUNDS, STARTS, FINISHED = 250, 0.4, 20, 16, 4
# The noise of the first round, that with which the best are annealed further, and that of the last noisy round, in
# standard deviations of what a row is worth in a tile; the rounds that are noisy.
HOT, WARM, COLD, NOISY = 2.0, 0.5, 0.1, 0.8
# Multiply-adds that all rounds may cost together: fewer rounds for a larger matrix, but never fewer than this; and that
# a round may cost in all annealings that go on side by side: of a small matrix, several take little longer than one.
WORK, FEWEST, SIDE_BY_SIDE = 1 << 38, 24, 1 << 20
# Multiply-adds of the products that add up the columns of small tiles sooner than additions do.
PRODUCTS = 1 << 22
# Tiles among which a round moves rows: larger matrices are dealt out anew in every round, so that a round's cost grows
# like the matrix.
TILES = 64
# How far a tile's price moves in a round, in spreads of what rows are worth, where it has twice the rows it takes.
PRICE_RATE = 0.15
# Rows that one exact transport problem takes: its cost is cubic.
ROWS = 256
# After the annealing: vectors (so many draws) and rows in turn, and vectors once more (``assign_vectors``).
TURNS, DRAWS = 6, 8
LAST = {"least": 4e-5, "failed": 512}
# Up to a draw that gains so little, assignments of fewer groups gain more in the same time.
QUICK, QUICK_LEAST = 96, 1.6e-4
# The last vectors where rows are free but have nothing to choose but groups, of a single tile or of tiles that keep all
# columns: most of what there is to gain is in these, and with less the paper's loop would gain more of it now and then.
THOROUGH = {"least": 1e-6, "retries": 10, "failed": 2048}
# The annealing's share of a time budget.
SHARE = 0.4


def gyro_exchange(problems: Sequence[Problem], order: Tensor, indices: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Rows to tiles first, then vectors to groups, then both in turn, and vectors last: one order, an index of each."""
    first, free = problems[0], problems[0].output_order is None
    several = indices[0].shape[0] > 1
    if free and several:  # rows can go elsewhere
        order = _anneal_rows(problems)
        indices = [choose_vectors(problem.saliency, problem.pattern, order) for problem in problems]
        for _ in range(TURNS):
            indices = _assign_all(problems, order, indices, draws=DRAWS, most=QUICK)
            if first.clock.expired():
                break
            order = _move_rows(problems, order, indices)
    indices = _assign_all(problems, order, indices, least=QUICK_LEAST, most=QUICK)
    pruned = any(_prunes_vectors(problem.pattern, problem.saliency.shape[1]) for problem in problems)
    return order, _assign_all(problems, order, indices, **(LAST if not free or (several and pruned) else THOROUGH))


def _assign_all(problems: Sequence[Problem], order: Tensor, indices: list[Tensor], **options: Any) -> list[Tensor]:
    """``assign_vectors`` for each problem, each with its share of the time that is left."""
    assigned = []
    for i, (problem, index) in enumerate(zip(problems, indices, strict=True)):
        own = replace(problem, clock=problem.clock.share(len(problems) - i))
        assigned.append(assign_vectors(own, order, index, pruned=True, **options))
        problem.clock.ended |= own.clock.ended
    return assigned


def _anneal_rows(problems: Sequence[Problem]) -> Tensor:
    """An order of rows, by annealing: several short ones from random orders first, and from the best of them long ones.

    Which large kinds of rows share a tile is settled while it is hot, by luck as much as by merit, and stays so.
    """
    rows = _Rows(problems)
    cost = rows.weights * min(len(rows.size), TILES)
    rounds, side_by_side = max(min(ROUNDS, WORK // cost), FEWEST), max(SIDE_BY_SIDE // cost, 1)
    turns = int(rounds * STARTING) // QUICK_ROUNDS  # of short annealings, as many side by side
    rows.deal(max(min(turns * side_by_side, STARTS), 1))
    if turns:
        rows.cool(QUICK_ROUNDS, HOT, WARM, STARTING)
        rows.keep_best(min(side_by_side, FINISHED))
    rows.cool(rounds - turns * QUICK_ROUNDS, WARM if turns else HOT, COLD, 1.0)
    rows.keep_best(1)
    return rows.order()


class _Rows:
    """The tile of each row, and what a place in each tile costs, in each of K annealings that go on side by side.

    Groups do not exist yet, so tiles keep columns by a stand-in for what survives n:m: ``_likely`` of the columns that
    the pattern keeps, or, where it keeps all, ``n`` of ``m`` columns whole. What rows are worth in tiles is brought to
    the CPU: so small a matrix is dealt with there in a fraction of the time.
    """

    tile: Array  # [K, O]
    price: Array  # [K, T]

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problem = problems[0]  # the first has the randomness and the clock of all
        self.saliencies = [_likely(problem.saliency, problem.pattern) for problem in problems]
        self.runs = [_pruned_runs(problem.pattern, problem.saliency.shape[1]) for problem in problems]
        self.weights = sum(saliency.numel() for saliency in self.saliencies)
        self.owner = np.arange(len(problems[0].saliency)) // problems[0].pattern.vector_size  # of each place
        self.size = np.bincount(self.owner)  # the last may be short

    def deal(self, count: int) -> None:
        """Begins so many annealings, each with the rows in tiles at random."""
        self.tile = np.stack([self.owner[self.problem.shuffled(self.owner.size)] for _ in range(count)])
        self.price = np.zeros((count, self.size.size), np.float32)

    def keep_best(self, count: int) -> None:
        """At most so many annealings, those whose tiles keep most."""
        if len(self.tile) > count:
            best = (-self.worth()).argsort(kind="stable")[:count]
            self.tile, self.price = self.tile[best], self.price[best]

    def order(self) -> Tensor:
        """That of the first annealing."""
        return torch.from_numpy(self.tile[0].argsort(kind="stable")).to(self.problem.saliency.device)

    def worth(self) -> Array:
        """What all tiles keep, ``[K]``."""
        kept, count = np.zeros(len(self.tile)), self.size.size
        # The sums of many tiny tiles are as large as the matrix: those of one annealing at a time, then.
        parts = np.split(np.arange(len(kept)), 1 if count <= TILES else len(kept))
        for (saliency, runs), part in product(zip(self.saliencies, self.runs, strict=True), parts):
            sums = _sums(saliency, self.tile[part], count)
            kept[part] += (sums * _kept(sums, runs)).unflatten(0, (-1, count)).sum(dim=(1, 2)).cpu().numpy()
        return kept

    def cool(self, rounds: int, first: float, last: float, share: float) -> None:
        """Moves rows with ever less noise, from ``first`` to ``last`` and then none; faster if there is no time.

        Args:
            rounds: so many, if the budget allows.
            first: noise, in spreads of what a row is worth in a tile.
            last: the least noise.
            share: of the annealing's time, when it ends.
        """
        clock = self.problem.clock
        begun = clock.used / SHARE
        for i in range(rounds):
            done, used = (i + 1) / rounds, (clock.used / SHARE - begun) / max(share - begun, 1e-9)
            if used > done:
                clock.ended, done = True, used
            if done > 1:
                break
            self.move(first * (last / first) ** (done / NOISY) if done < NOISY else 0.0)

    def move(self, noise: float) -> None:
        """Each tile keeps its best columns, each row goes where these suit it best, inside blocks of tiles."""
        (count, tiles), every = self.price.shape, np.arange(len(self.price))[:, None]
        self.tile, self.price = self.tile.copy(), self.price.copy()
        blocks = [np.arange(tiles)]
        if tiles > TILES:
            order = self.problem.shuffled(tiles)
            blocks = [order[first : first + TILES] for first in range(0, tiles, TILES)]
        for block in blocks:
            if len(blocks) == 1:
                inside, values = np.arange(self.owner.size)[None], self.values(self.saliencies, self.tile, tiles)
            else:
                place = np.full(tiles, -1)
                place[block] = np.arange(block.size)
                inside = np.flatnonzero(place[self.tile] >= 0).reshape(count, -1) % self.owner.size
                parts = []  # one annealing at a time: each has other rows in the block
                for rows, tile in zip(inside, self.tile, strict=True):
                    index = torch.from_numpy(rows).to(self.saliencies[0].device)
                    own = [saliency[index] for saliency in self.saliencies]
                    parts.append(self.values(own, place[tile[rows]][None], block.size))
                values = np.concatenate(parts)
            # What a row is worth everywhere decides nothing.
            values -= np.add.reduce(values, axis=2, keepdims=True) / np.float32(block.size)
            spread = float(np.vdot(values, values) / values.size) ** 0.5
            if noise:  # uniform; its mean, which all tiles get, decides nothing either
                random = torch.rand(values.shape, generator=self.problem.generator)
                torch.from_numpy(values).add_(random, alpha=noise * spread * 12**0.5)
            price = self.price[:, block]
            self.tile[every, inside] = block[_balance(values, self.size[block], price, PRICE_RATE * spread)]
            self.price[:, block] = price
        if self.problem.due:
            self.problem.tell(self.order())

    def values(self, saliencies: Sequence[Tensor], tile: Array, count: int) -> Array:
        """What each row of the saliencies is worth in each of ``count`` tiles: ``[K, rows, count]``."""
        worth = []
        for saliency, runs in zip(saliencies, self.runs, strict=True):
            # Transposed, because a product of few rows is faster than one of few columns.
            worth.append(_kept(_sums(saliency, tile, count), runs) @ saliency.t())
        values: Array = reduce(torch.add, worth).unflatten(0, (-1, count)).transpose(1, 2).contiguous().cpu().numpy()
        return values


def _sums(saliency: Tensor, tile: Array, count: int) -> Tensor:
    """The column sums of each tile, ``[K * count, I]``; ``tile``, ``[K, rows]``, says whose each row is."""
    own = torch.from_numpy(tile).to(saliency.device)
    # On a CPU many times as fast, but for small matrices side by side; a GPU would add in any order.
    if saliency.device.type == "cpu" and (len(own) == 1 or own.numel() * count * saliency.shape[1] > PRODUCTS):
        sums = saliency.new_zeros(len(own), count, saliency.shape[1])
        for of_tiles, rows in zip(sums, own, strict=True):
            of_tiles.index_add_(0, rows, saliency)
        return sums.flatten(0, 1)
    owns = torch.arange(count, device=own.device).unsqueeze(1) == own.unsqueeze(1)  # [K, count, rows]
    return owns.flatten(0, 1).to(saliency.dtype) @ saliency


def _likely(saliency: Tensor, pattern: HiNMPattern) -> Tensor:
    """``saliency`` times a guess at the chance that a weight survives n:m in a group yet unknown.

    The guess is a power of the share of weights that are smaller, if those of the row were exponentially distributed.
    With ``m - 1`` it would be the chance of being the largest of a random group; one that falls with the density was
    the best of those tried for 2:4, 1:4, 4:8 and 2:8. The true share, from a sort, is no better. Where nothing is
    pruned in groups, n = m, or whole columns stand in for them, it is the saliency itself.
    """
    if pattern.n == pattern.m or not _prunes_vectors(pattern, saliency.shape[1]):
        return saliency
    mean = saliency.mean(dim=1, keepdim=True).clamp_(min=torch.finfo(saliency.dtype).tiny)
    likely = (saliency / -mean).expm1_().neg_().pow_(1.5 * pattern.m / pattern.n)
    return likely.mul_(saliency)


def _prunes_vectors(pattern: HiNMPattern, in_features: int) -> bool:
    return pattern.kept(in_features) < in_features


def _pruned_runs(pattern: HiNMPattern, in_features: int) -> list[tuple[int, int, int, int]]:
    """``HiNMPattern.equal_runs``, each with the columns that the stand-in prunes."""
    runs = pattern.equal_runs(in_features)
    if _prunes_vectors(pattern, in_features):
        return [(*run, max(run[1] - pattern.kept_of_run(run[1]), 0)) for run in runs]
    return [(*run, run[1] - max(run[1] * pattern.n // pattern.m, 1)) for run in runs]


def _kept(sums: Tensor, runs: list[tuple[int, int, int, int]]) -> Tensor:
    """1.0 for the columns with the largest sums in each tile, run by run, and for what equals the last, else 0.0."""
    if len(runs) == 1 and runs[0][2] == 1:  # the views take longer than the rest
        return torch.ge(sums, _smallest(sums, runs[0][3])).to(sums.dtype)
    kept = torch.empty_like(sums)
    for first, columns, count, pruned in runs:
        of_runs, marked = (
            each[:, first : first + columns * count].unflatten(1, (count, columns)) for each in (sums, kept)
        )
        torch.ge(of_runs, _smallest(of_runs, pruned), out=marked)
    return kept


def _smallest(values: Tensor, rank: int) -> Tensor:
    """Along the last dimension the value with ``rank`` values below it, ``[..., 1]``."""
    if values.device.type == "cpu":  # several times as fast
        return torch.from_numpy(np.partition(values.numpy(), rank, axis=-1)[..., rank, None])
    return values.topk(values.shape[-1] - rank, sorted=False).values.amin(dim=-1, keepdim=True)


def _balance(values: Array, size: Array, price: Array, rate: float) -> Array:
    """Tiles for the rows that nearly maximise the sum of ``values``, ``size`` rows in each tile: ``[K, rows]``.

    Every row takes the tile with the largest value less the tile's price; prices of crowded tiles rise. The few rows
    that a tile then has too many are assigned to the places left over.

    Args:
        values: of each row in each tile, ``[K, rows, T]``: K problems of their own.
        size: rows that each tile takes, ``[T]``.
        price: of each tile, ``[K, T]``, moved in place; two tiles need none.
        rate: how far a price moves at most.
    """
    if size.size == 2:  # exact, and sooner: the first takes those that it suits better than the second by the most
        first = (values[:, :, 1] - values[:, :, 0]).argpartition(size[0] - 1, axis=1)[:, : size[0]]
        tile = np.ones(values.shape[:2], np.int64)
        np.put_along_axis(tile, first, 0, axis=1)
        return tile
    (problems, rows, count), worth = values.shape, values - price[:, None]
    tile = (worth.argmax(axis=2) + np.arange(0, problems * count, count)[:, None]).ravel()  # numbered through
    worth, sizes = worth.reshape(-1, count), size if problems == 1 else np.tile(size, problems)
    taken = np.bincount(tile, minlength=sizes.size)
    price += (rate * np.minimum(taken / sizes - 1, 1)).astype(np.float32).reshape(price.shape)
    crowded = np.flatnonzero((taken > sizes)[tile])  # rows
    if crowded.size:
        owner, others, every = tile[crowded], worth[crowded], np.arange(crowded.size)
        best = others[every, owner % count]
        others[every, owner % count] = -np.inf
        attached = best - np.maximum.reduce(others, axis=1)
        by_tile = np.lexsort((-attached, owner))  # the rows of each crowded tile, the most attached first
        owner = owner[by_tile]
        first = np.concatenate(([0], np.flatnonzero(owner[1:] != owner[:-1]) + 1))
        place = every - first.repeat(taken[owner[first]])
        over = crowded[by_tile[place >= sizes[owner]]]
        left = np.arange(sizes.size).repeat((sizes - taken).clip(min=0))
        # Both are in the order of the problems, and of each problem there are as many of both.
        ends = np.searchsorted(over // rows, np.arange(problems + 1)).tolist()
        parts = [slice(i, min(i + ROWS, b)) for a, b in pairwise(ends) for i in range(a, b, ROWS)]
        solved = assign([worth[over[part]][:, left[part] % count] for part in parts])
        for part, choice in zip(parts, solved, strict=True):
            tile[over[part]] = left[part][choice]
    return tile.reshape(problems, rows) % count


def _move_rows(problems: Sequence[Problem], order: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Rows to tiles by exact transport, given what each tile keeps, inside random blocks of tiles."""
    v, rows, device = problems[0].pattern.vector_size, order.cpu().numpy(), order.device
    tiles = problems[0].shuffled(len(indices[0]))
    places, values = [], []
    for first in range(0, tiles.size, max(ROWS // v, 2)):
        block = tiles[first : first + max(ROWS // v, 2)]
        at = (block[:, None] * v + np.arange(v)).ravel()
        owner = np.arange(block.size).repeat(v)[at < rows.size]  # the last tile may be short
        at = at[at < rows.size]
        places.append(at)
        some, within = torch.from_numpy(rows[at]).to(device), torch.from_numpy(block).to(device)
        worth = (row_values(one, some, index[within]) for one, index in zip(problems, indices, strict=True))
        values.append(reduce(torch.add, worth).cpu().numpy()[:, owner])
    moved = np.empty_like(rows)
    for at, choice in zip(places, assign(values), strict=True):
        # The rows were numbered as their places are: row i goes to place choice[i].
        moved[at[choice]] = rows[at]
    return torch.from_numpy(moved).to(device)
