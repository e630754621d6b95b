"""Our search: rows to tiles by annealed exact transport, vectors by exact exchanges.

Shapes: as in ``problem``.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_hinm.gyro.problem import (
    Problem,
    assign,
    assign_vectors,
    replacement_parts,
    replacement_values,
    row_values,
)
from lightning_hinm.layout import inverse
from lightning_hinm.mask import choose_vectors

# Rows that one transport problem takes: the assignment is cubic, so that larger weights move rows between random
# blocks of tiles, small ones while the noise is on.
HOT_ROWS, COLD_ROWS = 512, 2048
# Rounds of annealed row moves; fewer where a round is expensive.
ROUNDS, FULL_ROUNDS_BELOW = 60, 1 << 20
# Rows and vectors in turn, after the annealing; most searches end earlier.
ALTERNATIONS = 10


def exchange(problem: Problem, order: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to tiles by annealed transport first, then vectors by exchanges, then both in turn while rows gain."""
    if problem.output_order is not None or index.shape[0] == 1:
        return order, _exchange_vectors(problem, order, index)
    order = problem.shuffled(order.numel())
    index = choose_vectors(problem.saliency, problem.pattern, order)
    rounds = max(min(ROUNDS * FULL_ROUNDS_BELOW // problem.saliency.numel(), ROUNDS), 8)
    for i in range(rounds):
        if problem.clock.expired():
            break
        # While rows still wander, vectors follow by their sums alone: exchanges would be undone by the next move.
        order = _move_rows(problem, order, index, max(1 - (i + 1) / (0.8 * rounds), 0.0))
        index = choose_vectors(problem.saliency, problem.pattern, order)
    index = _exchange_vectors(problem, order, index)
    v = problem.pattern.vector_size
    for _ in range(ALTERNATIONS):
        moved = _move_rows(problem, order, index, 0.0)
        same = torch.equal(inverse(moved) // v, inverse(order) // v)  # every row in the tile where it was
        if same or problem.clock.expired():
            break
        order, index = moved, _exchange_vectors(problem, moved, index, steps=3)
    index = _exchange_vectors(problem, order, index)
    # Where no pair gains, longer cycles still do: one vector of every group at once, assigned exactly.
    return order, assign_vectors(problem, order, index, pruned=True)


def _move_rows(problem: Problem, order: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Rows to tiles by exact transport, capacity V a tile, inside random blocks of tiles; noise while hot."""
    v, moved = problem.pattern.vector_size, order.clone()
    for block in problem.shuffled(index.shape[0]).split(max((HOT_ROWS if temperature else COLD_ROWS) // v, 2)):
        places = (block.unsqueeze(1) * v + torch.arange(v, device=order.device)).flatten()  # positions in the order
        owner = torch.arange(block.numel(), device=order.device).repeat_interleave(v)[places < order.numel()]
        places = places[places < order.numel()]  # the last tile may be short
        values = row_values(problem, order[places], index[block])  # [rows, tiles of the block]
        noise = temperature * values.std() * problem.noise(*values.shape)
        moved[places[assign((values + noise)[:, owner])]] = order[places]
    return moved


def _exchange_vectors(problem: Problem, order: Tensor, index: Tensor, steps: int | None = None) -> Tensor:
    """Exact exchanges between slots, and between slots and pruned columns, until none gains (or ``steps`` are done)."""
    columns, allowed, index = problem.tiles(order), problem.allowed(order), index.clone()
    for tiles, run, slots in problem.blocks(columns, index):
        local = index[tiles, slots] - run.start
        local = _exchange_blocks(problem, columns[tiles, run], allowed[tiles, run], local, steps)
        index[tiles, slots] = local + run.start
    return index


def _exchange_blocks(problem: Problem, columns: Tensor, allowed: Tensor, slots: Tensor, steps: int | None) -> Tensor:
    """Exchanges in a batch of blocks; after each step only the groups that changed are valued anew.

    Args:
        problem: gives n, m and the time left.
        columns: ``[B, W, V]``.
        allowed: bool ``[B, W]``, columns that may be chosen.
        slots: int64 ``[B, K]``, the column that each slot holds; W and up are virtual, and stay.
        steps: at most so many; None for as many as gain.
    """
    pattern, m = problem.pattern, problem.pattern.m
    padded = pad(columns, (0, 0, 0, m))  # virtual columns are zero
    batch = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
    value, others, nth = replacement_parts(padded[batch, slots], pattern)
    worth = replacement_values(others, nth, columns)  # [B, K, W]
    while steps is None or steps > 0:
        new = _exchange_slots(worth, value, slots, allowed, m)
        changed = (new != slots).unflatten(1, (-1, m)).any(dim=2)  # [B, G]
        most = int(changed.sum(dim=1).max())
        slots, steps = new, None if steps is None else steps - 1
        if not most or steps == 0 or problem.clock.expired():
            break
        # as many groups in every block: the changed ones, and unchanged ones to fill up
        picked = changed.int().topk(most, dim=1).indices  # [B, most]
        at = (picked.unsqueeze(2) * m + torch.arange(m, device=slots.device)).flatten(1)
        part, others, nth = replacement_parts(padded[batch, slots.gather(1, at)], pattern)
        value = value.scatter(1, at, part)
        worth[batch, at] = replacement_values(others, nth, columns)
    return slots


def _exchange_slots(worth: Tensor, value: Tensor, slots: Tensor, allowed: Tensor, m: int) -> Tensor:
    """The slots after the best moves that touch neither the same group nor the same column twice.

    The gain of putting pruned column j into slot i is ``worth[i, j] - value[i]``, that of exchanging slots i and k of
    different groups ``worth[i, c_k] + worth[k, c_i] - value[i] - value[k]``. Moves in different groups add up exactly.

    Args:
        worth: ``[B, K, W]``, what the group of slot i is worth with column j in that slot.
        value: ``[B, K]``, what it is worth now.
        slots: int64 ``[B, K]``, the column that each slot holds; W and up are virtual, and stay.
        allowed: bool ``[B, W]``, columns that may be chosen.
        m: slots of a group.
    """
    (blocks, count, width), device = worth.shape, slots.device
    groups, virtual = count // m, slots >= width
    free = torch.ones(blocks, width + m, dtype=torch.bool, device=device).scatter_(1, slots, False)
    pruned = free[:, :width].nonzero()[:, 1].unflatten(0, (blocks, -1))  # [B, W - kept]: all blocks keep as many

    # The best gain of every group with every other group, [B, G, G], and with every pruned column, [B, G, W - kept]
    swap = worth.gather(2, slots.clamp(max=width - 1).unsqueeze(1).expand(-1, count, -1)) - value.unsqueeze(2)
    swap = swap + swap.transpose(1, 2)
    take = worth.gather(2, pruned.unsqueeze(1).expand(-1, count, -1)) - value.unsqueeze(2)
    take.masked_fill_(virtual.unsqueeze(2) | ~allowed.gather(1, pruned).unsqueeze(1), float("-inf"))
    if bool(virtual.any()):
        swap.masked_fill_(virtual.unsqueeze(1) | virtual.unsqueeze(2), float("-inf"))
    swap, other_slot = swap.unflatten(2, (groups, m)).max(dim=3)  # [B, K, G]
    swap, own_slot = swap.unflatten(1, (groups, m)).max(dim=2)  # [B, G, G]
    swap.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    take, take_slot = take.unflatten(1, (groups, m)).max(dim=2)
    gain = torch.cat((swap, take), dim=2)
    least = 1e-6 * value.mean(dim=1, keepdim=True)

    new = slots.clone()
    while bool(((best := gain.max(dim=2)).values > least).any()):
        # Every proposal claims its own group and what it wants, a group or a pruned column; the highest claim wins.
        target = best.indices  # [B, G]
        rank = torch.where(best.values > least, best.values.argsort(dim=1).argsort(dim=1), -1)
        claims = torch.full((blocks, gain.shape[2]), -1, dtype=torch.int64, device=device)
        claims[:, :groups] = rank
        claims.scatter_reduce_(1, target, rank, "amax")
        b, g = ((rank >= 0) & (claims[:, :groups] == rank) & (claims.gather(1, target) == rank)).nonzero(as_tuple=True)
        t = target[b, g]
        swaps = t < groups
        sb, sg, sh = b[swaps], g[swaps], t[swaps]
        i = sg * m + own_slot[sb, sg, sh]
        k = sh * m + other_slot[sb, i, sh]
        new[sb, i], new[sb, k] = slots[sb, k], slots[sb, i]
        tb, tg, tj = b[~swaps], g[~swaps], t[~swaps] - groups
        new[tb, tg * m + take_slot[tb, tg, tj]] = pruned[tb, tj]
        # What was touched is out for this step: its gains are no longer exact.
        closed = torch.zeros(blocks, gain.shape[2], dtype=torch.bool, device=device)
        closed[b, g] = True
        closed[b, t] = True
        gain.masked_fill_(closed.unsqueeze(1) | closed[:, :groups].unsqueeze(2), float("-inf"))
    return new
