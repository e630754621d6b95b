"""Who survives: the only code that decides which weights a pattern keeps.

Shapes: O rows, I columns, T tiles of V rows, P kept columns of a tile, m columns of a group. Ties go to the lower
column, on every device: sorts are stable.
"""

import torch
from torch import Tensor

from lightning_hinm.layout import HiNMLayout
from lightning_hinm.pattern import HiNMPattern

BLOCK = 1 << 24  # elements that one step gathers at most: memory stays linear in the matrix with a small constant
FEW = 8  # entries: more are sorted


def keep_top(saliency: Tensor, k: int, *, dim: int = -1) -> Tensor:
    """Exactly ``k`` entries along ``dim`` are True, the largest ones; ties keep the lower position. No entry is NaN.

    >>> keep_top(torch.tensor([5.0, 5.0, 5.0, 0.1]), 2).tolist()
    [True, True, False, False]
    """
    if saliency.shape[dim] <= FEW:
        return _keep_top_of_few(saliency, k, dim)
    best = saliency.sort(dim=dim, descending=True, stable=True).indices.narrow(dim, 0, k)
    return torch.zeros_like(saliency, dtype=torch.bool).scatter_(dim, best, True)


def _keep_top_of_few(saliency: Tensor, k: int, dim: int) -> Tensor:
    """Each entry is compared with each, many times as fast as a sort: kept are those that fewer than k stand before."""
    parts = saliency.unbind(dim)
    # Of an entry's last - i comparisons with later ones all count as lost at first, and each that it wins is taken off.
    ahead = [torch.full_like(part, len(parts) - 1 - i, dtype=torch.int8) for i, part in enumerate(parts)]
    for j, later in enumerate(parts):
        for i, earlier in enumerate(parts[:j]):
            won = (earlier >= later).to(torch.int8)  # a tie too
            ahead[i] -= won
            ahead[j] += won
    return torch.stack([before < k for before in ahead], dim=dim)


def tile_rows(matrix: Tensor, output_order: Tensor, vector_size: int) -> Tensor:
    """Rows in ``output_order``, cut into tiles, with zero rows at the end of the last: ``[O, I]`` -> ``[T, V, I]``."""
    rows = matrix[output_order]
    missing = -rows.shape[0] % vector_size
    if missing:  # padding copies, even by nothing
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    return rows.unflatten(0, (-1, vector_size))


def choose_vectors(
    saliency: Tensor, pattern: HiNMPattern, output_order: Tensor, *, within: Tensor | None = None
) -> Tensor:
    """The columns with the largest sums in each tile, run by run, in ascending order: int64 ``[T, P]``.

    Args:
        saliency: non-negative, ``[O, I]``.
        pattern: says how many each run keeps.
        output_order: int64 ``[O]``.
        within: bool ``[O, I]``, a mask of the same ``output_order``: only columns that a tile still keeps are chosen.
    """
    v = pattern.vector_size
    sums = tile_rows(saliency, output_order, v).sum(dim=1, dtype=torch.float64)  # [T, I]
    if within is not None:
        sums = sums.masked_fill(~tile_rows(within, output_order, v).any(dim=1), -1.0)
    return choose_columns(sums, pattern)


def choose_columns(scores: Tensor, pattern: HiNMPattern) -> Tensor:
    """The columns with the largest scores, run by run, ascending: ``[T, I]`` -> int64 ``[T, P]``.

    Virtual columns come last, and only where the real ones do not fill the last group.
    """
    in_features = scores.shape[1]
    chosen = []
    for first, last in pattern.runs(in_features):
        kept = pattern.kept_of_run(last - first)
        real = min(kept, last - first)
        mask = keep_top(scores[:, first:last], real, dim=1)
        columns = mask.nonzero()[:, 1].unflatten(0, (scores.shape[0], real)) + first
        virtual = torch.arange(last, last + kept - real, device=scores.device).expand(scores.shape[0], -1)
        chosen.append(torch.cat((columns, virtual), dim=1))
    return torch.cat(chosen, dim=1)


def hinm_mask(saliency: Tensor, layout: HiNMLayout, *, within: Tensor | None = None) -> Tensor:
    """True for the weights that HiNM keeps, in the weight's original order.

    Every row keeps exactly ``n`` real columns of each full group of its tile, ``min(n, real columns)`` of a group that
    virtual columns complete. Ties go to the lower column.

    Args:
        saliency: non-negative, ``[O, I]``.
        layout: which columns each tile keeps, and how they are grouped.
        within: bool ``[O, I]``, the mask before this one: the new mask is a subset of it, if it keeps at least ``n``
            in every group of every row.

    Returns:
        bool ``[O, I]`` on the device of ``saliency``.

    Raises:
        ValueError: if ``saliency`` is not a finite, non-negative matrix with the layout's rows.
    """
    check_saliency(saliency)
    pattern, layout = layout.pattern, layout.to(saliency.device)
    rows, in_features = saliency.shape
    if layout.output_order.numel() != rows:
        raise ValueError(f"hinm_mask: saliency has {rows} rows, but output_order has {layout.output_order.numel()}.")
    # Ascending columns inside each group: a tie then goes to the lower column, whatever the order of the layout.
    index = layout.vector_index.unflatten(1, (-1, pattern.m)).sort(dim=2).values.flatten(1)
    # Virtual columns score -1, so that a real zero is kept before them; they fall off at the end.
    if within is not None:
        saliency = saliency.masked_fill(~within, -0.5)
    wide = torch.nn.functional.pad(saliency, (0, pattern.padded(in_features) - in_features), value=-1.0)
    order, v = layout.output_order, pattern.vector_size
    mask = torch.zeros_like(wide, dtype=torch.bool)
    step = max(BLOCK // (v * wide.shape[1]), 1)
    for first in range(0, index.shape[0], step):
        part = index[first : first + step]
        block_rows = order[first * v : (first + step) * v]
        tiles = tile_rows(wide, block_rows, v)  # [t, V, padded I]
        columns = part.unsqueeze(1).expand(-1, v, -1)  # [t, V, P]
        groups = tiles.gather(2, columns).unflatten(2, (-1, pattern.m))
        kept = keep_top(groups, pattern.n, dim=3).flatten(2)
        tiles_mask = torch.zeros_like(tiles, dtype=torch.bool).scatter_(2, columns, kept)
        mask[block_rows] = tiles_mask.flatten(0, 1)[: len(block_rows)]
    return mask[:, :in_features]


def retained(saliency: Tensor, mask: Tensor) -> float:
    """Kept saliency, which is finite, over total saliency, in ``[0, 1]``; 1.0 where the total is 0. In float64."""
    total = saliency.sum(dtype=torch.float64).item()
    # Two sums may be taken in two orders, and differ by a rounding.
    return min((saliency * mask).sum(dtype=torch.float64).item() / total, 1.0) if total else 1.0


def check_saliency(saliency: Tensor, name: str = "saliency") -> None:
    """Refuses a saliency that no mask can be chosen by.

    Raises:
        ValueError: if it is not a dense 2-D tensor of at least 16-bit floating-point numbers, or negative or not
            finite anywhere, or if its sum is not finite in float64.
    """
    dense = saliency.layout == torch.strided
    wide = saliency.is_floating_point() and saliency.element_size() > 1
    if not (dense and wide and saliency.dim() == 2 and saliency.numel()):
        raise ValueError(
            f"{name}: got {saliency.dtype} {list(saliency.shape)}, {saliency.layout}, but a saliency is a dense, "
            "non-empty floating-point [O, I] matrix of 16 bits or more. Pass e.g. weight.flatten(1).abs()."
        )
    low, high = (end.item() for end in saliency.aminmax())
    if not (low >= 0 and high < float("inf")):
        bad = (~(saliency >= 0) | saliency.isinf()).sum().item()
        raise ValueError(
            f"{name}: {bad} of {saliency.numel()} values are negative, NaN or infinite, but a saliency is finite and "
            "non-negative. Check the weights and gradients it comes from."
        )
    if high * saliency.numel() == float("inf"):
        raise ValueError(f"{name}: values up to {high:.3g} add up to more than float64 holds. Divide by their maximum.")
