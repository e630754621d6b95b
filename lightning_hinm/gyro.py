"""The permutation search: the order of rows and vectors in which the pattern keeps the most saliency.

``"gyro"`` is the paper's loop (arXiv 2407.20496, section 4): sample, cluster, assign. ``"exchange"`` is ours: rows move
between tiles by exact transport, vectors by exact pairwise exchanges.

Shapes: O rows, I columns, T tiles of V rows, P kept columns of a tile, G = P / m groups; B blocks (one tile's share of
one run of columns) of W columns and K slots, each slot holding one kept column.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_hinm.layout import HiNMLayout, inverse
from lightning_hinm.mask import check_saliency, choose_vectors, hinm_mask, retained, tile_rows
from lightning_hinm.pattern import HiNMPattern

METHODS = ("identity", "gyro", "exchange")

# Rows sampled from every tile, one entry a phase: coarse moves first, fine ones last, like a learning rate (the paper).
SAMPLES = (8, 1, 4, 1, 2, 1, 1)
# A draw that gains nothing says little about the next one: a phase ends after this many in a row.
RETRIES = 4
# Rows that one transport problem takes: the assignment is cubic, so that larger weights move rows between random
# blocks of tiles, small ones while the noise is on.
HOT_ROWS, COLD_ROWS = 512, 2048
# Rounds of annealed row moves; fewer where a round is expensive.
ROUNDS, FULL_ROUNDS_BELOW = 60, 1 << 20
# Rows and vectors in turn, after the annealing; most searches end earlier.
ALTERNATIONS = 10
# Elements of the largest temporary: blocks are searched in batches of this size.
BATCH = 1 << 25
# Below this size the default also runs the paper's loop and keeps the better of both.
SMALL = 1 << 14


@dataclass(frozen=True)
class SearchResult:
    """A layout, what it retains, and what it took to find it."""

    layout: HiNMLayout
    retained: float
    seconds: float
    ended_by_budget: bool


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


def gyro_permute(
    saliency: Tensor,
    pattern: HiNMPattern,
    *,
    method: str = "exchange",
    generator: torch.Generator | None = None,
    time_budget: float | None = None,
) -> HiNMLayout:
    """The layout that retains the most saliency that ``method`` finds, never less than ``"identity"``.

    Args:
        saliency: non-negative, ``[O, I]``, on any device.
        pattern: the pattern to search for.
        method: ``"identity"`` keeps the rows where they are and the columns with the largest sums in each tile;
            ``"gyro"`` is the loop of arXiv 2407.20496; ``"exchange"`` moves rows by exact transport and vectors by
            exact exchanges, and is the best.
        generator: randomness, on the CPU; None seeds one with 0. Same generator state, same machine: same layout.
        time_budget: seconds after which the best layout so far is returned; 0 gives identity, None no limit.

    Returns:
        The layout, on the CPU.

    Raises:
        ValueError: if the saliency is negative, not finite or no matrix, or the method unknown.
    """
    return search(saliency, pattern, method=method, generator=generator, time_budget=time_budget).layout


def search(
    saliency: Tensor,
    pattern: HiNMPattern,
    *,
    groups: int = 1,
    method: str = "exchange",
    generator: torch.Generator | None = None,
    time_budget: float | None = None,
    output_order: Tensor | None = None,
    within: Tensor | None = None,
) -> SearchResult:
    """``gyro_permute`` for one layer, with what training needs.

    Args:
        saliency: non-negative, ``[O, I]``.
        pattern: the pattern to search for.
        groups: groups of a convolution; each is a matrix of its own, and no row leaves it.
        method: as in ``gyro_permute``.
        generator: as in ``gyro_permute``.
        time_budget: as in ``gyro_permute``.
        output_order: int64 ``[O]``; given, rows stay as it says and only the vectors are searched.
        within: bool ``[O, I]``, the mask in force with that ``output_order``: only columns that a tile still keeps.

    Raises:
        ValueError: as in ``gyro_permute``.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: the permutation search knows {', '.join(map(repr, METHODS))}.")
    if time_budget is not None and not time_budget >= 0:
        raise ValueError(f"time_budget={time_budget}: a budget is at least 0 seconds, or None for no limit.")
    check_saliency(saliency)
    clock = Clock(time_budget)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    rows = saliency.shape[0] // groups
    orders, indices = [], []
    for group in range(groups):
        part = slice(group * rows, (group + 1) * rows)
        fixed = None if output_order is None else output_order[part] - group * rows
        if group and clock.budget is not None:
            # what is left, shared by the groups to come
            own = Clock((clock.budget - clock.seconds) / (groups - group))
        else:
            own = Clock(None if clock.budget is None else clock.budget / groups)
        order, index = _search_matrix(
            saliency[part], pattern, method, generator, own, fixed, None if within is None else within[part]
        )
        clock.ended |= own.ended
        orders.append(order + group * rows)
        indices.append(index)
    layout = HiNMLayout(pattern, torch.cat(orders).cpu(), torch.cat(indices).cpu())
    return SearchResult(layout, retained(saliency, hinm_mask(saliency, layout)), clock.seconds, clock.ended)


def _search_matrix(
    saliency: Tensor,
    pattern: HiNMPattern,
    method: str,
    generator: torch.Generator,
    clock: Clock,
    output_order: Tensor | None,
    within: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(output_order, vector_index)`` of one matrix: the best of identity and what the method finds."""
    peak = saliency.max()
    scaled = (saliency / peak if peak > 0 else saliency).float()
    fixed = None if output_order is None else output_order.to(saliency.device)
    first = torch.arange(saliency.shape[0], device=saliency.device) if fixed is None else fixed
    candidates = [(first, choose_vectors(saliency, pattern, first, within=within))]
    if method != "identity" and not clock.expired():
        problem = _Problem(scaled, pattern, generator, clock, fixed, within)
        if method == "gyro" or (saliency.numel() <= SMALL and fixed is None):
            candidates.append(_gyro(problem, *candidates[0]))
        if method == "exchange" and not clock.expired():
            candidates.append(_exchange(problem, *candidates[0]))
    layouts = [(order, _ascending_groups(index, pattern)) for order, index in candidates]
    values = [retained(saliency, hinm_mask(saliency, HiNMLayout(pattern, *layout))) for layout in layouts]
    return layouts[values.index(max(values))]


def _ascending_groups(index: Tensor, pattern: HiNMPattern) -> Tensor:
    """Columns ascending inside each group: the mask is the same, and metadata then follows the column order."""
    return index.unflatten(1, (-1, pattern.m)).sort(dim=2).values.flatten(1)


@dataclass(frozen=True)
class _Problem:
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


# --- exact values -----------------------------------------------------------------------------------------------------


def _top_sum(parts: list[Tensor], n: int) -> Tensor:
    """Elementwise sum of the ``n`` largest of the ``m`` tensors: a partial bubble sort of max and min, no top-k."""
    rest, total = list(parts), torch.zeros_like(parts[0])
    if n > len(parts) // 2:  # fewer passes from the other end
        return torch.stack(parts).sum(dim=0) + _top_sum([-part for part in parts], len(parts) - n)
    for _ in range(n):
        for i in range(len(rest) - 1):
            rest[i], rest[i + 1] = torch.minimum(rest[i], rest[i + 1]), torch.maximum(rest[i], rest[i + 1])
        total = total + rest.pop()
    return total


def _row_values(problem: _Problem, rows: Tensor, index: Tensor) -> Tensor:
    """What each of the rows would retain in each tile, given what the tile keeps: ``[rows, T]``."""
    pattern = problem.pattern
    padded = (
        torch.nn.functional.pad(
            problem.saliency[rows], (0, pattern.padded(problem.saliency.shape[1]) - problem.saliency.shape[1])
        )
        .t()
        .contiguous()
    )
    values = []
    for columns in index:  # one tile at a time: [m, G, rows] at most
        slots = padded[columns.unflatten(0, (-1, pattern.m)).t()]  # [m, G, rows]
        values.append(_top_sum(list(slots), pattern.n).sum(dim=0))
    return torch.stack(values, dim=1)


def _replacement_parts(slots: Tensor, pattern: HiNMPattern) -> tuple[Tensor, Tensor, Tensor]:
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


def _replacement_values(others: Tensor, nth: Tensor, columns: Tensor) -> Tensor:
    """What the group of slot i is worth with column j in that slot, for all i and j: ``[B, K, W]``.

    ``sum(max(nth, e)) = (sum nth + sum e + |nth - e|_1) / 2``: one L1 distance matrix, exact.
    """
    distance = torch.cdist(nth, columns, p=1.0)
    return others.unsqueeze(2) + (nth.sum(dim=2).unsqueeze(2) + columns.sum(dim=2).unsqueeze(1) + distance) / 2


# --- the paper's loop -------------------------------------------------------------------------------------------------


def _gyro(problem: _Problem, order: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gyro-permutation: output channels for vector pruning first, then the kept vectors of each tile for N:M."""
    if problem.output_order is None:
        order = _gyro_rows(problem, order)
        index = choose_vectors(problem.saliency, problem.pattern, order)
    return order, _assign_vectors(problem, order, index, pruned=False)


def _gyro_rows(problem: _Problem, order: Tensor) -> Tensor:
    """Sample rows from every full tile, cluster them into equal groups, assign the groups to the tiles; keep gains."""
    v = problem.pattern.vector_size
    full = order.numel() // v
    if full < 2:
        return order
    tail = order[full * v :]  # an incomplete tile has no room to exchange equal clusters with
    tiles = order[: full * v].unflatten(0, (full, v))  # [T, V] row numbers
    best = _vector_values(problem, problem.saliency[tiles].sum(dim=1)).sum()
    for samples in (count for count in SAMPLES if count < v):
        failures = 0
        while failures < RETRIES and not problem.clock.expired():
            picks = problem.noise(full, v).argsort(dim=1)
            taken, left = tiles.gather(1, picks[:, :samples]), tiles.gather(1, picks[:, samples:])
            clusters = taken.flatten()[_balanced_clusters(problem, problem.saliency[taken.flatten()], full)]
            base = problem.saliency[left].sum(dim=1)  # [T, I]
            joined = problem.saliency[clusters].sum(dim=1)  # [T, I]
            values = torch.stack([_vector_values(problem, part + joined) for part in base])  # [tile, cluster]
            choice = _assign(values)
            moved = torch.cat((left, clusters[choice]), dim=1)
            value = values.gather(1, choice.unsqueeze(1)).sum()
            if value > best * (1 + 1e-6):
                tiles, best, failures = moved, value, 0
            else:
                failures += 1
    return torch.cat((tiles.flatten(), tail))


def _vector_values(problem: _Problem, sums: Tensor) -> Tensor:
    """Saliency of the vectors that tiles with these column sums keep, all that is not pruned: ``[T, I]`` -> ``[T]``."""
    total = torch.zeros(sums.shape[0], device=sums.device)
    for first, last in problem.pattern.runs(sums.shape[1]):
        kept = min(problem.pattern.kept_of_run(last - first), last - first)
        total = total + sums[:, first:last].topk(kept, dim=1).values.sum(dim=1)
    return total


def _balanced_clusters(problem: _Problem, points: Tensor, count: int, steps: int = 5) -> Tensor:
    """Balanced k-means: ``count`` clusters of equal size, int64 ``[count, points / count]``, by assignment."""
    size = points.shape[0] // count
    members = problem.shuffled(points.shape[0]).unflatten(0, (count, size))
    if size == 1:
        return members
    for _ in range(steps):
        centres = points[members].mean(dim=1)
        nearest = _assign(-torch.cdist(points, centres).repeat_interleave(size, dim=1)) // size
        regrouped = nearest.argsort(stable=True).unflatten(0, (count, size))
        if torch.equal(regrouped, members):
            break
        members = regrouped
    return members


def _assign_vectors(problem: _Problem, order: Tensor, index: Tensor, *, pruned: bool) -> Tensor:
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
                slots.copy_(_assign_tile(problem, tiles[tile], slots, free.nonzero().squeeze(1)))
        start = stop
    return index


def _assign_tile(problem: _Problem, columns: Tensor, slots: Tensor, pruned: Tensor) -> Tensor:
    """One tile's share of one run: ``columns`` ``[I, V]`` as points, ``slots`` and ``pruned`` their numbers."""
    m = problem.pattern.m
    base = torch.arange(0, slots.numel(), m, device=slots.device)
    failures = 0
    while failures < RETRIES and not problem.clock.expired():
        at = base + torch.randint(m, base.shape, generator=problem.generator).to(slots.device)  # a slot of each group
        value, others, nth = _replacement_parts(columns[slots].unsqueeze(0), problem.pattern)
        candidates = torch.cat((slots[at], pruned))
        values = _replacement_values(others[:, at], nth[:, at], columns[candidates].unsqueeze(0))[0]
        choice = _assign(values)  # [G] into the candidates
        before = value[0, at].sum()
        if values.gather(1, choice.unsqueeze(1)).sum() > before * (1 + 1e-6):
            slots = slots.index_copy(0, at, candidates[choice])
            left = torch.ones_like(candidates, dtype=torch.bool).index_fill(0, choice, False)
            pruned, failures = candidates[left], 0
        else:
            failures += 1
    return slots


def _assign(values: Tensor) -> Tensor:
    """The column of each row in the assignment with the largest sum: ``[N, M >= N]`` -> int64 ``[N]``."""
    from scipy.optimize import linear_sum_assignment  # here: importing the package stays light

    _, columns = linear_sum_assignment(values.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(values.device)


# --- exchange ---------------------------------------------------------------------------------------------------------


def _exchange(problem: _Problem, order: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
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
    return order, _assign_vectors(problem, order, index, pruned=True)


def _move_rows(problem: _Problem, order: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Rows to tiles by exact transport, capacity V a tile, inside random blocks of tiles; noise while hot."""
    v, moved = problem.pattern.vector_size, order.clone()
    for block in problem.shuffled(index.shape[0]).split(max((HOT_ROWS if temperature else COLD_ROWS) // v, 2)):
        places = (block.unsqueeze(1) * v + torch.arange(v, device=order.device)).flatten()  # positions in the order
        owner = torch.arange(block.numel(), device=order.device).repeat_interleave(v)[places < order.numel()]
        places = places[places < order.numel()]  # the last tile may be short
        values = _row_values(problem, order[places], index[block])  # [rows, tiles of the block]
        noise = temperature * values.std() * problem.noise(*values.shape)
        moved[places[_assign((values + noise)[:, owner])]] = order[places]
    return moved


def _exchange_vectors(problem: _Problem, order: Tensor, index: Tensor, steps: int | None = None) -> Tensor:
    """Exact exchanges between slots, and between slots and pruned columns, until none gains (or ``steps`` are done)."""
    columns, allowed, index = problem.tiles(order), problem.allowed(order), index.clone()
    for tiles, run, slots in problem.blocks(columns, index):
        local = index[tiles, slots] - run.start
        local = _exchange_blocks(problem, columns[tiles, run], allowed[tiles, run], local, steps)
        index[tiles, slots] = local + run.start
    return index


def _exchange_blocks(problem: _Problem, columns: Tensor, allowed: Tensor, slots: Tensor, steps: int | None) -> Tensor:
    """Exchanges in a batch of blocks; after each step only the groups that changed are valued anew.

    Args:
        problem: gives n, m and the time left.
        columns: ``[B, W, V]``.
        allowed: bool ``[B, W]``, columns that may be chosen.
        slots: int64 ``[B, K]``, the column that each slot holds; W and up are virtual, and stay.
        steps: at most so many; None for as many as gain.
    """
    pattern, m = problem.pattern, problem.pattern.m
    padded = torch.nn.functional.pad(columns, (0, 0, 0, m))  # virtual columns are zero
    batch = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
    value, others, nth = _replacement_parts(padded[batch, slots], pattern)
    worth = _replacement_values(others, nth, columns)  # [B, K, W]
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
        part, others, nth = _replacement_parts(padded[batch, slots.gather(1, at)], pattern)
        value = value.scatter(1, at, part)
        worth[batch, at] = _replacement_values(others, nth, columns)
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
