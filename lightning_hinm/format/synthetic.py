"""Random packed weights, made where they are used: a random legal layout costs a kernel what a searched one does.

Shapes: O rows, I columns (of one group in a grouped convolution), T tiles of V rows, P kept columns of a tile.
"""

import math

import torch
from torch import Tensor

from lightning_hinm.format.packing import HiNMWeight, index_dtype, pack_positions
from lightning_hinm.pattern import HiNMPattern


def random_weight(
    shape: tuple[int, ...],
    pattern: HiNMPattern,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    groups: int = 1,
    permuted: bool = True,
    restored: bool = True,
) -> HiNMWeight:
    """A packed weight that obeys a pattern, on the generator's device; nothing is searched, no mask is made.

    The same generator state gives the same values and the same kept columns, whatever the two flags say.

    Args:
        shape: of the dense weight, ``[O, I]`` or ``[O, C, kh, kw]``.
        pattern: what it obeys.
        dtype: of the values.
        generator: where all numbers come from.
        groups: channel groups of a convolution, whole tiles each.
        permuted: kept columns in a random order inside their run, else ascending.
        restored: rows packed in a random order, so that a kernel restores theirs; else as they are.

    >>> weight = random_weight((6, 8), HiNMPattern(4), torch.float16, torch.Generator(), restored=False)
    >>> weight.values.shape, weight.output_order.tolist()
    (torch.Size([6, 2]), [0, 1, 2, 3, 4, 5])
    """
    rows, in_features, device, v = shape[0], math.prod(shape[1:]), generator.device, pattern.vector_size
    n, m, tiles = pattern.n, pattern.m, -(-rows // v)
    index = torch.cat(
        [
            _choose_columns(tiles, first, last, pattern.kept_of_run(last - first), generator, permuted)
            for first, last in pattern.runs(in_features)
        ],
        dim=1,
    )  # [T, P]
    count = index.shape[1] // m  # groups of a row
    values = torch.randn(rows, count, n, generator=generator, device=device).to(dtype)
    places = torch.rand(rows, count, m, generator=generator, device=device).argsort(dim=2)
    positions = places[..., :n].sort(dim=2).values  # rising, as metadata does
    if in_features % m:
        virtual = (index >= in_features).unflatten(1, (-1, m)).repeat_interleave(v, dim=0)[:rows]  # [O, groups, m]
        values.masked_fill_(virtual.gather(2, positions), 0)
    order = torch.rand(groups, rows // groups, generator=generator, device=device).argsort(dim=1)
    order = order + rows // groups * torch.arange(groups, device=device).unsqueeze(1)
    empty = torch.empty(rows, 0, dtype=torch.uint8, device=device)
    return HiNMWeight(
        values.flatten(1),
        empty if n == m else pack_positions(positions.flatten(1), m),
        index.to(index_dtype(pattern.padded(in_features))),
        (order.flatten() if restored else torch.arange(rows, device=device)).to(index_dtype(rows)),
        shape,
        pattern,
    )


def _choose_columns(tiles: int, first: int, last: int, kept: int, generator: torch.Generator, permuted: bool) -> Tensor:
    """Of one run, other columns for each tile; those that no real column is left for are virtual, and come last."""
    real = min(kept, last - first)
    order = torch.rand(tiles, last - first, generator=generator, device=generator.device).argsort(dim=1)[:, :real]
    order = order if permuted else order.sort(dim=1).values
    virtual = torch.arange(last - first, last - first + kept - real, device=generator.device)
    return torch.cat([order, virtual.expand(tiles, -1)], dim=1) + first
