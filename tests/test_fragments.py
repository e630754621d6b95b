"""A packed weight in the order of the mma.sp fragments, read back by the rules of the PTX ISA."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_hinm import HiNMLayout, HiNMPattern, hinm_mask, pack, unpack
from lightning_hinm.format import HiNMWeight
from lightning_hinm.mask import choose_vectors
from lightning_hinm.ops import fragments
from lightning_hinm.ops.fragments import Fragments, arrange, kept_of_runs, refusal, tile_rows

PATTERNS = [
    HiNMPattern(vector_size=32, vector_sparsity=0.5),
    HiNMPattern(vector_size=64, vector_sparsity=0.0, window=None),
    HiNMPattern(vector_size=96, vector_sparsity=0.75, window=20),
    HiNMPattern(vector_size=128, vector_sparsity=0.25, window=32),
    HiNMPattern(vector_size=256, vector_sparsity=0.8, window=36),
    HiNMPattern(vector_size=192, vector_sparsity=0.5),
]


def pack_random(rows: int, columns: int, pattern: HiNMPattern, dtype: torch.dtype = torch.float16) -> HiNMWeight:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0.0  # groups with fewer than two values
    order = torch.randperm(rows, generator=generator)
    layout = HiNMLayout(pattern, order, choose_vectors(weight.abs(), pattern, order))
    return pack((weight * hinm_mask(weight.abs(), layout)).to(dtype), layout)


def read_back(found: Fragments, shape: tuple[int, int]) -> Tensor:
    """The dense weight, by the ISA's words: which row and column of A each lane's numbers are."""
    tiles, steps, blocks, _, _ = found.values.shape
    words = found.metadata.numpy().view(np.uint32).astype(np.int64)
    dense = torch.zeros(shape, dtype=found.values.dtype)
    lane, i = np.meshgrid(np.arange(32), np.arange(8), indexing="ij")
    g, t = lane // 4, lane % 4
    row = g + 8 * (i >> 1 & 1)
    kept = 2 * t + (i & 1) + 8 * (i >> 2)  # of the 16 in a row
    group = kept // 2  # of the 8 in a row: 0-3 stand in the word of t & 1 = 0
    for tile in range(tiles):
        for step in range(steps):
            for block in range(blocks):
                supplier = 4 * g + 2 * (block % 2) + group // 4
                nibble = words[tile, step, block // 2, supplier] >> (16 * (i >> 1 & 1) + 4 * (group % 4)) & 15
                first, second = nibble & 3, nibble >> 2
                assert (first < second).all(), "metadata that the hardware does not define"
                column = found.vector_index[tile].to(torch.int64)[
                    step * 32 + group * 4 + np.where(i & 1, second, first)
                ]
                output = found.rows[(tile * blocks + block) * 16 + row].to(torch.int64)
                values = found.values[tile, step, block]
                assert not values[output < 0].any(), "a virtual row has a value"
                real = (output >= 0) & (values != 0)
                dense[output[real], column[real]] = values[real]
    return dense


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (70, 150), (300, 37)], ids=str)
def test_fragments_hold_the_weight(pattern: HiNMPattern, shape: tuple[int, int]) -> None:
    packed = pack_random(*shape, pattern)
    found = arrange(packed)
    dense = unpack(packed)
    assert torch.equal(read_back(found, shape), dense)
    assert found.values.count_nonzero() == dense.count_nonzero()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_runs_are_padded_to_steps_within_their_own_columns(pattern: HiNMPattern) -> None:
    columns = 150
    found = arrange(pack_random(200, columns, pattern))
    runs, kept = pattern.runs(columns), kept_of_runs(pattern, columns)
    assert all(count % fragments.STEP == 0 for count in kept)
    assert found.vector_index.shape[1] % (fragments.STEP * fragments.STEPS) == 0
    start = 0
    for (first, last), count in zip(runs, kept, strict=True):
        own = found.vector_index[:, start : start + count].to(torch.int64)
        assert ((own >= first) & (own < last)).all()
        start += count
    assert 0 <= found.vector_index.shape[1] - start < fragments.STEP * fragments.STEPS


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_run_has_the_columns_of_the_packed_weight_in_their_order(pattern: HiNMPattern) -> None:
    packed, parts = pack_random(200, 150, pattern), pattern.vector_size // tile_rows(pattern)
    columns = packed.vector_index.to(torch.int64).clamp(max=149)  # what is beyond the weight is its last column
    found, start, place = arrange(packed).vector_index.to(torch.int64)[::parts], 0, 0
    for (first, last), padded in zip(pattern.runs(150), kept_of_runs(pattern, 150), strict=True):
        count = pattern.kept_of_run(last - first)
        assert torch.equal(found[:, place : place + count], columns[:, start : start + count])
        assert (found[:, place + count : place + padded] == first).all()
        start, place = start + count, place + padded
    assert start == columns.shape[1]
    assert (found[:, place:] == pattern.runs(150)[-1][0]).all(), "of the last run, which alone a block may hold"


def test_a_high_tile_is_cut_into_tiles_with_the_same_columns() -> None:
    found = arrange(pack_random(256, 100, PATTERNS[4]))
    assert tile_rows(PATTERNS[4]) == 128
    assert found.values.shape[:3] == (2, 2, 8)
    assert torch.equal(found.vector_index[0].to(torch.int64), found.vector_index[1].to(torch.int64))


def test_tensors_are_as_the_kernels_read_them() -> None:
    found = arrange(pack_random(70, 150, PATTERNS[0]))
    assert [tensor.dtype for tensor in found] == [torch.float16, torch.int32, torch.uint16, torch.int32]
    assert all(tensor.is_contiguous() for tensor in found)
    assert found.rows.tolist().count(-1) == 96 - 70
    assert sorted(found.rows.tolist())[26:] == list(range(70))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (70, 150), (300, 37)], ids=str)
def test_their_sizes_are_known_without_them(pattern: HiNMPattern, shape: tuple[int, int]) -> None:
    found = arrange(pack_random(*shape, pattern))
    assert tuple(tensor.shape for tensor in found) == fragments.sizes(pattern, *shape)


@pytest.mark.parametrize(
    ("field", "place", "index", "why"),
    [
        ("vector_index", (0, 3), 148, "vector_index has columns outside 0..147"),
        ("vector_index", (0, 8), 60000, "vector_index has columns outside 0..147"),
        ("vector_index", (0, 0), 147, "vector_index positions 0..3 leave their run of columns 0..19"),
        ("output_order", (5,), 70, "output_order is not a permutation of 0..69"),
        ("output_order", (5,), 255, "output_order is not a permutation of 0..69"),
    ],
)
def test_an_index_that_a_kernel_would_follow_astray_is_refused(
    field: str, place: tuple[int, ...], index: int, why: str
) -> None:
    packed = pack_random(70, 148, PATTERNS[2])
    damaged = packed.tensors[field].to(torch.int64)
    damaged[place] = index
    damaged = damaged.to(torch.uint16)
    with pytest.raises(ValueError, match=f"packed weight: {why}"):
        arrange(replace(packed, **{field: damaged}))  # type: ignore[arg-type]


@settings(max_examples=25)
@given(st.integers(1, 140), st.integers(4, 120), st.sampled_from(PATTERNS))
def test_any_shape_comes_back(rows: int, columns: int, pattern: HiNMPattern) -> None:
    packed = pack_random(rows, columns, pattern, torch.bfloat16)
    assert torch.equal(read_back(arrange(packed), (rows, columns)), unpack(packed))


@pytest.mark.parametrize(
    ("pattern", "columns", "dtype", "why"),
    [
        (HiNMPattern(n=1, m=4), 64, torch.float16, "1:4 is not the 2:4 of sparse tensor cores"),
        (HiNMPattern(n=4, m=8), 64, torch.float16, "4:8 is not"),
        (HiNMPattern(vector_size=48), 64, torch.float16, "vector_size=48 is not a multiple of 32"),
        (HiNMPattern(), 64, torch.float32, "torch.float32 is neither float16 nor bfloat16"),
        (HiNMPattern(), 65537, torch.float16, "in_features=65537 is more than a 16-bit index reaches"),
    ],
)
def test_what_no_kernel_runs_is_refused_with_its_reason(
    pattern: HiNMPattern, columns: int, dtype: torch.dtype, why: str
) -> None:
    assert why in str(refusal(pattern, columns, dtype))


def test_what_a_kernel_runs_is_not_refused() -> None:
    assert refusal(HiNMPattern(), 65536, torch.bfloat16) is None
