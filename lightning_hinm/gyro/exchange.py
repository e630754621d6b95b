"""Our search: rows to tiles by annealing on a cheap stand-in, then rows and vectors in turn by exact assignments.

Shapes: as in ``problem``.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lightning_hinm.gyro.problem import Problem, assign, assign_vectors, row_values
from lightning_hinm.mask import choose_vectors
from lightning_hinm.pattern import HiNMPattern

# Annealing: rounds, those of them that are noisy, and the noise of the first and the last noisy one, in standard
# deviations of what a row is worth in a tile.
ROUNDS, NOISY, HOT, COLD = 150, 0.8, 1.0, 0.1
# Multiply-adds that all rounds may cost together: fewer rounds for a larger matrix, but never fewer than this.
WORK, FEWEST = 1 << 40, 24
# Tiles among which a round moves rows: larger matrices are dealt out anew in every round, so that a round's cost grows
# like the matrix.
TILES = 64
# Steps that find the tiles' prices in a round; each begins with the prices of the round before.
PRICE_STEPS, PRICE_RATE = 3, 0.2
# Rows that one exact transport problem takes: its cost is cubic.
ROWS = 512
# After the annealing: vectors (so many draws) and rows in turn, and vectors once more until a draw gains too little.
TURNS, DRAWS, LEAST = 2, 12, 5e-5
# Up to a draw that gains so little, assignments of fewer groups gain more in the same time.
QUICK, QUICK_LEAST = 96, 2e-4
# The annealing's share of a time budget.
SHARE = 0.35


def gyro_exchange(problems: Sequence[Problem], order: Tensor, indices: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Rows to tiles first, then vectors to groups, then both in turn, and vectors last: one order, an index of each."""
    first = problems[0]
    if first.output_order is None and indices[0].shape[0] > 1:
        # Where all vectors are kept, all tiles keep the same columns, and no row prefers one.
        if any(problem.pattern.vector_sparsity > 0 for problem in problems):
            order = _anneal_rows(problems, first.shuffled(order.numel()))
            indices = [choose_vectors(problem.saliency, problem.pattern, order) for problem in problems]
        for _ in range(TURNS):
            indices = _assign_all(problems, order, indices, draws=DRAWS, most=QUICK)
            if first.clock.expired():
                break
            order = _move_rows(problems, order, indices)
    indices = _assign_all(problems, order, indices, least=QUICK_LEAST, most=QUICK)
    return order, _assign_all(problems, order, indices, least=LEAST)


def _assign_all(problems: Sequence[Problem], order: Tensor, indices: list[Tensor], **options: Any) -> list[Tensor]:
    """``assign_vectors`` for each problem, each with its share of the time that is left."""
    assigned = []
    for i, (problem, index) in enumerate(zip(problems, indices, strict=True)):
        own = replace(problem, clock=problem.clock.share(len(problems) - i))
        assigned.append(assign_vectors(own, order, index, pruned=True, **options))
        problem.clock.ended |= own.clock.ended
    return assigned


def _anneal_rows(problems: Sequence[Problem], order: Tensor) -> Tensor:
    """Each tile keeps its best columns, each row goes where these suit it best, with ever less noise.

    Groups do not exist yet, so the sums are those of a stand-in for what survives n:m.
    """
    problem, v = problems[0], problems[0].pattern.vector_size  # the first has the randomness and the clock of all
    saliencies = [_likely(problem.saliency, problem.pattern) for problem in problems]
    rows, tiles = order.numel(), -(-order.numel() // v)
    weights = sum(saliency.numel() for saliency in saliencies)
    rounds = max(min(ROUNDS, WORK // (weights * min(tiles, TILES))), FEWEST)
    prices = torch.zeros(tiles, device=order.device)
    tile = torch.empty_like(order)  # of each row
    tile[order] = torch.arange(rows, device=order.device) // v
    size = torch.bincount(tile, minlength=tiles)  # the last may be short
    every = torch.arange(tiles, device=order.device)
    for i in range(rounds):
        if problem.clock.expired():
            break
        done, used = (i + 1) / rounds, problem.clock.used / SHARE
        if used > done:  # cool faster: there is no time for all rounds
            problem.clock.ended, done = True, used
        if done > 1:
            break
        noise = HOT * (COLD / HOT) ** (done / NOISY) if done < NOISY else 0.0
        for block in problem.shuffled(tiles).split(TILES) if tiles > TILES else [every]:
            inside: Any = slice(None)
            parts, own = saliencies, tile
            if tiles > TILES:
                place = torch.full_like(size, -1).index_copy_(0, block, every[: len(block)])[tile]
                inside = (place >= 0).nonzero()[:, 0]  # the rows of the block
                parts, own = [saliency[inside] for saliency in saliencies], place[inside]
            kept = (_kept(_sums(part, own, len(block)), one.pattern) for part, one in zip(parts, problems, strict=True))
            # Transposed, because a product of few rows is faster than one of few columns.
            worth = (of_tiles @ part.t() for part, of_tiles in zip(parts, kept, strict=True))
            values = reduce(torch.add, worth).t().contiguous()
            values -= values.mean(dim=1, keepdim=True)  # what a row is worth everywhere decides nothing
            spread = values.double().std(correction=0).to(values.dtype)
            values += noise * spread * problem.noise(*values.shape)
            moved = block[_balance(values, size[block], prices, block, PRICE_RATE * spread)]
            tile[inside] = moved
        if problem.due:
            problem.tell(tile.argsort(stable=True))
    return tile.argsort(stable=True)


def _sums(saliency: Tensor, own: Tensor, count: int) -> Tensor:
    """The column sums of each tile, ``[count, I]``, of which ``own`` says whose each row is."""
    if saliency.device.type == "cpu":  # many times as fast; a GPU would add in any order
        return saliency.new_zeros(count, saliency.shape[1]).index_add_(0, own, saliency)
    return (torch.arange(count, device=own.device).unsqueeze(1) == own).to(saliency.dtype) @ saliency


def _likely(saliency: Tensor, pattern: HiNMPattern) -> Tensor:
    """``saliency`` times a guess at the chance that a weight survives n:m in a group yet unknown.

    The guess is a power of the share of weights that are smaller, if those of the row were exponentially distributed.
    With ``m - 1`` it would be the chance of being the largest of a random group; one that falls with the density was
    the best of those tried for 2:4, 1:4, 4:8 and 2:8. The true share, from a sort, is no better. Where nothing is
    pruned, n = m, it is the saliency itself.
    """
    if pattern.n == pattern.m:
        return saliency
    mean = saliency.mean(dim=1, keepdim=True).clamp_(min=torch.finfo(saliency.dtype).tiny)
    likely = (saliency / -mean).expm1_().neg_().pow_(1.5 * pattern.m / pattern.n)
    return likely.mul_(saliency)


def _kept(sums: Tensor, pattern: HiNMPattern) -> Tensor:
    """1.0 for the columns with the largest sums in each tile, run by run, else 0.0: ``[T, I]``."""
    kept = torch.zeros_like(sums)
    for first, columns, count in pattern.equal_runs(sums.shape[1]):
        of_runs, marked = (
            each[:, first : first + columns * count].unflatten(1, (count, columns)) for each in (sums, kept)
        )
        best = of_runs.topk(min(pattern.kept_of_run(columns), columns), dim=2, sorted=False).indices
        marked.scatter_(2, best, 1.0)
    return kept


def _balance(values: Tensor, size: Tensor, prices: Tensor, block: Tensor, rate: Tensor) -> Tensor:
    """A tile for each row that nearly maximises the sum of ``values`` ``[rows, tiles]``, ``size`` rows in each tile.

    Every row takes the tile with the largest value less the tile's price; prices of crowded tiles rise. The few rows
    that a tile then has too many are assigned to the places left over.

    Args:
        values: of each row in each tile of the block.
        size: int64, rows that each tile takes.
        prices: of all tiles; those of the block are moved in place.
        block: the tiles.
        rate: how far a price moves at first.
    """
    price, count = prices[block], len(block)
    for step in range(PRICE_STEPS):
        crowd = torch.bincount((values - price).argmax(dim=1), minlength=count) / size - 1
        price = price + rate * crowd.clamp(max=1) * (1 - step / PRICE_STEPS)
    prices[block] = price
    worth = values - price
    best, tile = worth.max(dim=1)
    margin = best - worth.scatter(1, tile.unsqueeze(1), float("-inf")).max(dim=1).values
    taken = torch.bincount(tile, minlength=count)
    attached = margin / (2 * margin.max()).clamp(min=torch.finfo(margin.dtype).tiny)  # at most a half
    by_tile = (tile - attached).argsort(stable=True)  # the rows of each tile, the most attached first
    owner = tile[by_tile]
    place = torch.arange(len(tile), device=tile.device) - (taken.cumsum(0) - taken)[owner]
    over = by_tile[place >= size[owner]]
    left = torch.arange(count, device=tile.device).repeat_interleave((size - taken).clamp(min=0))
    # So many have no preference worth an assignment: all values are alike.
    tile[over] = left if over.numel() > ROWS else left[assign([worth[over][:, left]])[0]]
    return tile


def _move_rows(problems: Sequence[Problem], order: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Rows to tiles by exact transport, given what each tile keeps, inside random blocks of tiles."""
    v, moved = problems[0].pattern.vector_size, order.clone()
    places, values = [], []
    for block in problems[0].shuffled(indices[0].shape[0]).split(max(ROWS // v, 2)):
        at = (block.unsqueeze(1) * v + torch.arange(v, device=order.device)).flatten()
        owner = torch.arange(block.numel(), device=order.device).repeat_interleave(v)[at < order.numel()]
        at = at[at < order.numel()]
        places.append(at)
        worth = (row_values(one, order[at], index[block]) for one, index in zip(problems, indices, strict=True))
        values.append(reduce(torch.add, worth)[:, owner])
    for at, choice in zip(places, assign(values), strict=True):
        # The rows were numbered as their places are: row i goes to place choice[i].
        moved[at[choice]] = order[at]
    return moved
