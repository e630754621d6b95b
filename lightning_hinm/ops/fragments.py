"""A packed weight in the order in which the GPU kernels read it; derived at load, never saved.

Shapes: O rows, I columns, T tiles of V rows, P kept columns of a tile; K: P with each run padded to whole steps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hinm.format import HiNMWeight, blocks, unpack_positions
from lightning_hinm.layout import check_layout
from lightning_hinm.pattern import HiNMPattern

DTYPES = (torch.float16, torch.bfloat16)
STEP = 32  # kept vectors that one mma.sp.m16n8k32 multiplies
STEPS = 2  # steps that the gather kernel takes at a time
TILE_ROWS = (128, 64, 32)  # heights of a tile that the kernels know
MOST_COLUMNS = 1 << 16


class Fragments(NamedTuple):
    """The order of the ``mma.sp.m16n8k32`` fragments (PTX ISA, section "Warp-level matrix instructions"), lane by lane.

    A tile that is higher than the kernels know is cut into several with the same columns, so V is ``tile_rows`` here.

    Args:
        values: ``[T, K / 32, V / 16, 32, 8]``: of each lane, its eight values of A.
        metadata: int32 ``[T, K / 32, V / 32, 32]``: of lanes 4 g and 4 g + 1 the metadata word of the even block of 16
            rows (sparsity selector 0), of lanes 4 g + 2 and 4 g + 3 that of the odd one (selector 1).
        vector_index: uint16 ``[T, K]``: the column of the input that each kept vector multiplies. What pads a run has
            zero values and points at the first column of that run.
        rows: int32 ``[T * V]``: the output row of each packed row, -1 for virtual ones.
    """

    values: Tensor
    metadata: Tensor
    vector_index: Tensor
    rows: Tensor

    @property
    def tile_rows(self) -> int:
        """V, as the kernels see it."""
        return self.values.shape[2] * 16

    @property
    def kept(self) -> int:
        """K."""
        return self.vector_index.shape[1]


def refusal(pattern: HiNMPattern, in_features: int, dtype: torch.dtype) -> str | None:
    """Why no kernel can run such a weight; None if one can."""
    wrong = []
    if (pattern.n, pattern.m) != (2, 4):
        wrong.append(f"{pattern.n}:{pattern.m} is not the 2:4 of sparse tensor cores")
    if pattern.vector_size % TILE_ROWS[-1]:
        wrong.append(f"vector_size={pattern.vector_size} is not a multiple of {TILE_ROWS[-1]}")
    if dtype not in DTYPES:
        wrong.append(f"{dtype} is neither float16 nor bfloat16")
    if pattern.padded(in_features) > MOST_COLUMNS:
        wrong.append(f"in_features={in_features} is more than a 16-bit index reaches ({MOST_COLUMNS})")
    return "; ".join(wrong) or None


def tile_rows(pattern: HiNMPattern) -> int:
    """The height of the tiles that the kernels see."""
    return next(rows for rows in TILE_ROWS if pattern.vector_size % rows == 0)


def kept_of_runs(pattern: HiNMPattern, in_features: int) -> list[int]:
    """Kept vectors of each run, padded to whole steps."""
    runs = pattern.runs(in_features)
    return [-(-pattern.kept_of_run(last - first) // STEP) * STEP for first, last in runs]


def padded_kept(pattern: HiNMPattern, in_features: int) -> int:
    """K: the kept vectors of a tile as the kernels see them."""
    return -(-sum(kept_of_runs(pattern, in_features)) // (STEP * STEPS)) * STEP * STEPS


def sizes(pattern: HiNMPattern, rows: int, in_features: int) -> tuple[tuple[int, ...], ...]:
    """The shape of each of the fragments of such a weight."""
    height, kept = tile_rows(pattern), padded_kept(pattern, in_features)
    packed_rows = -(-rows // pattern.vector_size) * pattern.vector_size
    tiles, steps = packed_rows // height, kept // STEP
    return (tiles, steps, height // 16, 32, 8), (tiles, steps, height // 32, 32), (tiles, kept), (packed_rows,)


def arrange(packed: HiNMWeight) -> Fragments:
    """The fragments of a packed weight that ``refusal`` does not refuse.

    Raises:
        ValueError: if an index is out of range or outside its run: a kernel reads and writes wherever it points.
    """
    pattern, in_features, device = packed.pattern, math.prod(packed.shape[1:]), packed.values.device
    check_layout(packed.layout, packed.shape[0], in_features, name="packed weight")
    v, height = pattern.vector_size, tile_rows(pattern)
    kept = kept_of_runs(pattern, in_features)
    width = padded_kept(pattern, in_features)  # K
    tiles = len(packed.vector_index)

    # Where each kept vector goes, and where what pads its run points.
    places, index = [], torch.zeros(tiles, width, dtype=torch.int32, device=device)
    start = 0
    for (first, last), padded in zip(pattern.runs(in_features), kept, strict=True):
        places.append(torch.arange(start, start + pattern.kept_of_run(last - first), device=device))
        index[:, start : start + padded] = first
        start += padded
    index[:, start:] = pattern.runs(in_features)[-1][0]
    place = torch.cat(places)  # [P]
    # The values of virtual columns are zero, so any real column may stand for them.
    index[:, place] = packed.vector_index.to(torch.int32).clamp(max=in_features - 1)
    group = place.view(-1, 4)[:, 0] // 4  # [P / 4]: a group stays together

    values = packed.values.new_empty(tiles, width // STEP, v // 16, 32, 8)
    metadata = torch.empty(tiles, width // STEP, v // 32, 32, dtype=torch.int32, device=device)
    for block in blocks(packed, width):
        rows = slice(block.start * v, block.stop * v)
        count, real = (block.stop - block.start) * v, packed.values[rows].shape[0]
        kept_values = packed.values.new_zeros(count, width // 4, 2)
        # With +0 for -0: what stands for nothing is +0, by which the unpack kernel knows it.
        kept_values[:real, group] = (packed.values[rows] + 0.0).unflatten(1, (-1, 2))
        # 4 = 0 | 1 << 2 is the nibble of the first two columns, a legal one for groups without a value.
        nibbles = torch.full((count, width // 4), 4, dtype=torch.int64, device=device)
        positions = unpack_positions(packed, rows).to(torch.int64)
        nibbles[:real, group] = positions[..., 0] | positions[..., 1] << 2
        # [tile, block of 16, half, g, step, i >> 2, t, i & 1]: a_i is row g + 8 * (half = i >> 1 & 1)
        ordered = kept_values.view(-1, v // 16, 2, 8, width // STEP, 2, 4, 2)
        values[block] = ordered.permute(0, 4, 1, 3, 6, 5, 2, 7).flatten(5, 7).flatten(3, 4)
        # [tile, block of 32, parity, half, g, step, t & 1, group of four]: four nibbles of row g, then of row g + 8
        words = nibbles.view(-1, v // 32, 2, 2, 8, width // STEP, 2, 4)
        shift = 16 * torch.arange(2, device=device).view(2, 1, 1, 1, 1) + 4 * torch.arange(4, device=device)
        words = (words << shift).sum(dim=(3, 7))  # [tile, block of 32, parity, g, step, t & 1]
        words = words.permute(0, 4, 1, 3, 2, 5).flatten(3)
        metadata[block] = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    if height < v:
        values = _cut(values, v // height, height // 16)
        metadata = _cut(metadata, v // height, height // 32)
        index = index.repeat_interleave(v // height, dim=0)
    rows_of_tiles = torch.full((tiles * v,), -1, dtype=torch.int32, device=device)
    rows_of_tiles[: packed.shape[0]] = packed.output_order.to(torch.int32)
    return Fragments(values.contiguous(), metadata.contiguous(), index.to(torch.uint16), rows_of_tiles)


def _cut(ordered: Tensor, parts: int, blocks_of_part: int) -> Tensor:
    """``[T, steps, blocks, ...]`` -> ``[T * parts, steps, blocks_of_part, ...]``."""
    return ordered.unflatten(2, (parts, blocks_of_part)).transpose(1, 2).flatten(0, 1)
