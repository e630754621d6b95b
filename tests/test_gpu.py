"""The ops on the shipped kernels: in an interpreter of PTX, and on a GPU where there is one."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_hinm import HiNMLayout, HiNMPattern, explain, hinm_mask, kernels, pack, prune, to_hinm, unpack
from lightning_hinm.format import HiNMWeight, random_weight
from lightning_hinm.mask import choose_vectors
from lightning_hinm.ops import cost, expand_all, gpu
from lightning_hinm.ops.cost import Call, Choice
from lightning_hinm.ops.operands import ACTIVATIONS, activate_
from lightning_hinm.passes import fold_norm
from lightning_hinm.plan import predict
from lightning_hinm.workload import Workload, measure, measuring_anew
from tests.ptx import Fault
from tests.ptx.device import Emulator, emulated, relative_error
from tests.ptx.mutate import CLUSTERED, MISTAKES, entry_text, mutants

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def packed_layer(
    *shape: int, pattern: HiNMPattern, dtype: torch.dtype, groups: int = 1, tile_order: bool = False
) -> HiNMWeight:
    """A random weight of that pattern, its rows in a random order, or in tile order as if that had been absorbed."""
    generator, device = torch.Generator().manual_seed(sum(shape)), torch.get_default_device()
    weight = torch.randn(shape, generator=generator, device="cpu").to(device) / shape[1] ** 0.5
    rows = shape[0] // groups
    orders = [torch.randperm(rows, generator=generator, device="cpu") + group * rows for group in range(groups)]
    order = torch.cat(orders).to(device)
    order = torch.arange(shape[0]) if tile_order else order
    saliency = weight.flatten(1).abs()
    layout = HiNMLayout(pattern, order, choose_vectors(saliency, pattern, order))
    masked = (weight.flatten(1) * hinm_mask(saliency, layout)).reshape(shape)
    return pack(masked.to(dtype), layout, groups=groups)


def numbers(*size: int, dtype: torch.dtype) -> Tensor:
    found = torch.randn(size, generator=torch.Generator().manual_seed(sum(size) + 1), device="cpu")
    return found.to(torch.get_default_device(), dtype)


@contextmanager
def only(kernel: str, tokens: int | None = None) -> Iterator[None]:
    """The planner offers one kernel; a name that ends in _features is that of a storage beside."""
    offered = cost.list_kernels

    def list_kernels(call: Call, shared_limit: int, gpu: cost.Gpu) -> list[Choice]:
        found = [choice for choice in offered(call, shared_limit, gpu) if choice.kernel == family_of(kernel)]
        return [choice for choice in found if tokens in (None, choice.tokens)]

    with chosen_anew(), mock.patch.object(cost, "list_kernels", list_kernels):
        yield


@contextmanager
def chosen_anew() -> Iterator[None]:
    """What was chosen before does not count inside, nor what is chosen there afterwards."""
    for cached in (gpu.choose, gpu.choose_for_images):
        cached.cache_clear()
    yield
    for cached in (gpu.choose, gpu.choose_for_images):
        cached.cache_clear()


def family_of(kernel: str) -> str:
    return kernel.removesuffix("_features")


def run_linear(
    packed: HiNMWeight, x: Tensor, bias: Tensor | None, activation: str = "none", feature_major: bool = False
) -> tuple[Tensor, Tensor]:
    """What the op finds on its kernels, and what float64 says."""
    pattern, columns = packed.pattern, packed.shape[1]
    expanded = expand_all(packed)
    assert expanded["expansion_metadata"] is not None, "the layer holds fragments"
    found = torch.ops.hinm.linear(
        x, *packed.tensors.values(), bias, *expanded.values(), columns, *pattern.fields, activation, feature_major
    )
    double_bias = None if bias is None else bias.to(torch.float64)
    expected = F.linear(x.to(torch.float64), unpack(packed).to(torch.float64), double_bias)
    assert found.shape == expected.shape
    assert (found.movedim(-1, 0) if feature_major else found).is_contiguous()
    return found, activate_(expected, activation)


def tokens_for(kernel: str, tokens: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random tokens in the storage that the kernel takes as it lies."""
    x = numbers(tokens, columns, dtype=dtype).to(device)
    if not kernel.endswith("_features"):
        return x
    rows = torch.full((columns, -(-tokens // 8) * 8), float("nan"), dtype=dtype, device=device)  # aligned by a margin
    rows[:, :tokens] = x.t()
    return rows[:, :tokens].t()


def check_linear(packed: HiNMWeight, x: Tensor, bias: Tensor | None, activation: str = "none") -> None:
    found, expected = run_linear(packed, x, bias, activation)
    assert relative_error(found, expected) < TOLERANCE[x.dtype]


KERNELS = ["decode", "decode_cluster", "gather", "unpack"]

# kernel, its tokens of a block, rows, columns, tokens, pattern: every entry, with tails in every direction
PLAIN = HiNMPattern(window=None)
SHARED = HiNMPattern(window=8)  # of 64 columns, two runs for each block of a cluster
ENTRIES = [
    ("decode", 8, 70, 136, 5, HiNMPattern(32, 0.5)),
    ("decode", 16, 200, 50, 29, HiNMPattern(128, 0.75)),
    # Three blocks of rows, tokens to spare; five runs for four blocks, the last one short.
    ("decode_cluster", 8, 70, 136, 5, HiNMPattern(32, 0.5, window=32)),
    ("decode_cluster", 16, 150, 300, 29, HiNMPattern(64, 0.5, window=72)),
    ("decode_cluster", 8, 130, 170, 3, HiNMPattern(128, 0.5, window=40)),
    ("decode_cluster", 16, 70, 300, 9, HiNMPattern(32, 0.75, window=64)),
    ("gather", 128, 70, 150, 9, HiNMPattern(32, 0.5, window=20)),
    ("gather", 128, 100, 90, 133, HiNMPattern(64, 0.25, window=None)),
    ("gather", 128, 250, 200, 8, HiNMPattern(128, 0.75, window=None)),
]


# Four blocks run where another kernel needs one: there one dtype and one order will do.
COMPUTED = [
    pytest.param(*each, marks=pytest.mark.slow if "cluster" in each[0][0] and at % 4 != at // 4 % 2 * 3 else ())
    for at, each in enumerate(itertools.product(ENTRIES, DTYPES, (False, True)))
]


@pytest.mark.parametrize(("case", "dtype", "tile_order"), COMPUTED, ids=str)
def test_every_entry_computes_the_layer(case: tuple[Any, ...], dtype: torch.dtype, tile_order: bool) -> None:
    kernel, block, rows, columns, tokens, pattern = case
    packed = packed_layer(rows, columns, pattern=pattern, dtype=dtype, tile_order=tile_order)
    with emulated() as emulator, only(kernel, block):
        check_linear(packed, tokens_for(kernel, tokens, columns, dtype), numbers(rows, dtype=dtype))
    short = "bf16" if dtype == torch.bfloat16 else "f16"
    assert len([name for name in emulator.launched if name.startswith(f"{family_of(kernel)}_{short}")]) == 1


@pytest.mark.parametrize("kernel", ["decode", "gather", "gather_features", "unpack"])
@pytest.mark.parametrize("tokens", [1, 13, 24])
def test_every_kernel_writes_feature_major_where_that_is_asked_for(kernel: str, tokens: int) -> None:
    packed = packed_layer(70, 96, pattern=HiNMPattern(32, 0.5), dtype=torch.float16)
    x, bias = tokens_for(kernel, tokens, 96, torch.float16), numbers(70, dtype=torch.float16)
    with emulated() as emulator, only(kernel):
        found, expected = run_linear(packed, x, bias, "relu", feature_major=True)
    assert relative_error(found, expected) < TOLERANCE[torch.float16]
    if tokens > 1:  # one token is its own transpose
        turned = any(name.startswith("transpose") for name in emulator.launched)
        assert turned == (kernel not in ("gather_features", "unpack")), "which read and write rows of features"


@pytest.mark.parametrize("case", [case for case in ENTRIES if "cluster" not in case[0]][::4], ids=str)
@pytest.mark.parametrize("schedule", ["lockstep", "warps"])
def test_the_texts_for_newer_gpus_compute_the_same(case: tuple[Any, ...], schedule: str) -> None:
    kernel, block, rows, columns, tokens, pattern = case
    packed = packed_layer(rows, columns, pattern=pattern, dtype=torch.float16)
    x = tokens_for(kernel, tokens, columns, torch.float16)
    outputs = []
    for ordered in (False, True):
        with emulated(ordered=ordered, schedule=schedule, seed=3), only(kernel, block):
            outputs.append(run_linear(packed, x, None)[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_is_that_of_torch(kernel: str, activation: str, dtype: torch.dtype) -> None:
    packed = packed_layer(64, 64, pattern=SHARED, dtype=dtype)
    x = numbers(9, 64, dtype=dtype) * 3
    x[0] = 40.0 * torch.sign(x[0])  # where exponentials leave the range of float16
    with emulated(), only(kernel):
        check_linear(packed, x, numbers(64, dtype=dtype), activation)


@pytest.mark.parametrize("kernel", KERNELS)
def test_not_a_number_stays_one(kernel: str) -> None:
    packed = packed_layer(64, 64, pattern=HiNMPattern(vector_sparsity=0.0, window=8), dtype=torch.float16)
    x = numbers(9, 64, dtype=torch.float16)
    x[4] = float("nan")
    for activation in ACTIVATIONS:
        with emulated(), only(kernel):
            found, _ = run_linear(packed, x, None, activation)
        assert found[4].isnan().all()
        assert not found[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize("vector_size", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_height_of_a_tile_runs(vector_size: int, kernel: str) -> None:
    pattern = HiNMPattern(vector_size, 0.5, window=16)
    packed = packed_layer(2 * vector_size + 5, 72, pattern=pattern, dtype=torch.float16)
    with emulated(), only(kernel):
        check_linear(packed, numbers(10, 72, dtype=torch.float16), None)


RANDOM: dict[str, Any] = {
    "rows": st.integers(1, 300),
    "columns": st.integers(4, 300),
    "tokens": st.integers(1, 140),
    "kernel": st.sampled_from(["decode", "gather", "gather_features"]),
    "vector_size": st.sampled_from([32, 64, 128]),
    "vector_sparsity": st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]),
    "window": st.sampled_from([None, 16, 40, 256]),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 9),
}


def check_random(
    rows: int, columns: int, tokens: int, kernel: str, seed: int, dtype: torch.dtype, **fields: Any
) -> None:
    packed = packed_layer(rows, columns, pattern=HiNMPattern(**fields), dtype=dtype)
    tokens = min(tokens, cost.DECODE_TOKENS) if kernel.startswith("decode") else tokens
    with emulated(schedule="warps" if seed % 2 else "lockstep", seed=seed), only(kernel):
        check_linear(packed, tokens_for(kernel, tokens, columns, dtype), numbers(rows, dtype=dtype))


@settings(max_examples=30, derandomize=True)
@given(**RANDOM)
def test_random_shapes_agree(**drawn: Any) -> None:
    check_random(**drawn)


@settings(max_examples=20, derandomize=True)
@given(**{**RANDOM, "kernel": st.just("decode_cluster"), "window": st.sampled_from([8, 16, 40])})
def test_random_shapes_agree_where_blocks_share_their_work(columns: int, window: int, **drawn: Any) -> None:
    assume(columns > 3 * window)  # four runs
    check_random(columns=columns, window=window, **drawn)


UNPACKED: list[tuple[tuple[int, ...], int, HiNMPattern]] = [
    ((70, 150), 1, HiNMPattern(32, 0.5)),
    ((130, 1605), 1, HiNMPattern(64, 0.9, window=None)),  # two blocks of columns
    ((33, 61), 1, HiNMPattern(96, 0.0)),
    ((300, 600), 1, HiNMPattern(256, 0.75, window=104)),
    ((64, 9, 3, 3), 2, HiNMPattern(32, 0.5)),
]


@pytest.mark.parametrize("tile_order", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups", "pattern"), UNPACKED, ids=str)
def test_the_dense_weight_is_unpacked_to_the_bit(
    shape: tuple[int, ...], groups: int, pattern: HiNMPattern, dtype: torch.dtype, tile_order: bool
) -> None:
    packed = packed_layer(*shape, pattern=pattern, dtype=dtype, groups=groups, tile_order=tile_order)
    for schedule in ("lockstep", "warps"):
        with emulated(schedule=schedule) as emulator:
            assert unpacks(emulator, packed, groups)


@pytest.mark.parametrize("columns", [61, 257])
def test_a_weight_that_a_norm_turned_around_is_unpacked_to_the_bit(columns: int) -> None:
    """Virtual columns hold -0 then, and stand for a real one."""
    pattern = HiNMPattern(32, 0.0, window=256)
    packed, one = packed_layer(64, columns, pattern=pattern, dtype=torch.float16), torch.ones(64)
    folded, _ = fold_norm(packed, 0 * one, one, weight=-one, eps=0.0)
    assert (folded.values.view(torch.int16) == -0x8000).any()
    for schedule in ("lockstep", "warps"):
        with emulated(schedule=schedule) as emulator:
            assert unpacks(emulator, folded)


def unpacks(emulator: Emulator, packed: HiNMWeight, groups: int = 1) -> bool:
    """Whether the kernel writes the dense weight over what was there, and zeros behind its rows."""
    fragments: Any = expand_all(packed, groups=groups)
    expected = unpack(packed).flatten(1)
    expected = F.pad(expected, (0, -expected.shape[1] % 8))
    found = torch.full_like(expected, float("nan"))
    sizes = (len(fragments["restore"]), fragments["expansion"].shape[2] * 16, fragments["columns"].shape[1])
    emulator.launch("unpack", *fragments.values(), found, *sizes, found.shape[1])
    return torch.equal(found, expected)


CONVOLUTIONS = [
    # batch, in_channels, out_channels, size, kernel, stride, padding, dilation, groups
    (2, 16, 64, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 16, 70, (15, 13), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (2, 16, 64, (15, 13), (3, 2), (3, 2), (0, 2), (2, 2), 2),
    (3, 40, 64, (8, 8), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (3, 40, 64, (7, 7), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 40, 64, (8, 9), (1, 1), (2, 2), (1, 0), (1, 1), 1),
    (1, 40, 64, (8, 8), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (1, 40, 64, (6, 6), (1, 1), (1, 1), (1, 1), (1, 1), 1),
    (1, 16, 64, (6, 10), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (1, 4, 64, (20, 21), (7, 7), (2, 2), (3, 3), (1, 1), 1),
    (2, 8, 64, (9, 9), (2, 2), (3, 3), (0, 0), (1, 1), 1),
    (2, 8, 64, (1, 30), (1, 5), (1, 2), (0, 2), (1, 1), 1),
    (1, 8, 32, (5, 5), (3, 3), (4, 1), (2, 2), (3, 1), 1),
]


def check_conv2d(
    case: tuple[Any, ...],
    dtype: torch.dtype,
    batched: bool = True,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    batch, channels, rows, size, kernel, stride, padding, dilation, groups = case
    pattern = HiNMPattern(32, 0.5)
    packed = packed_layer(rows, channels // groups, *kernel, pattern=pattern, dtype=dtype, groups=groups)
    x = numbers(batch, channels, *size, dtype=dtype)
    x, bias = x.to(memory_format=memory_format) if batched else x[0], numbers(rows, dtype=dtype)
    expanded = expand_all(packed, groups=groups)
    geometry = (channels, *kernel, *stride, *padding, *dilation, groups)
    found = torch.ops.hinm.conv2d(
        x, *packed.tensors.values(), bias, *expanded.values(), *geometry, *pattern.fields, "relu"
    )
    double = [tensor.to(torch.float64) for tensor in (x, unpack(packed), bias)]
    expected = F.relu(F.conv2d(*double, stride, padding, dilation, groups))
    assert found.shape == expected.shape
    assert not batched or found.is_contiguous(memory_format=memory_format)
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_agree(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    with emulated() as emulator:
        check_conv2d(case, dtype)
    direct = case[4:7] == ((1, 1), (1, 1), (0, 0)) and case[3][0] * case[3][1] % 8 == 0
    assert ("planes" in emulator.launched) != direct


@pytest.mark.parametrize("form", ["contiguous", "channels last", "no batch"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_by_the_unpacked_weight_agree(case: tuple[Any, ...], form: str) -> None:
    memory_format = torch.channels_last if form == "channels last" else torch.contiguous_format
    with emulated() as emulator, only("unpack"):
        check_conv2d(case, torch.float16, form != "no batch", memory_format)
    assert emulator.launched == ["unpack"]


def test_images_come_as_torch_stores_them_whatever_the_dense_product_makes_of_them() -> None:
    def conv2d(*args: Any) -> Tensor:
        return torch.conv2d(*args).contiguous(memory_format=torch.channels_last)

    with emulated(), only("unpack"), mock.patch.object(gpu.F, "conv2d", conv2d):
        packed = packed_layer(64, 8, 3, 3, pattern=PLAIN, dtype=torch.float16)
        x, operands = numbers(2, 8, 6, 6, dtype=torch.float16), (*packed.tensors.values(), None)
        geometry = (8, 3, 3, *[1] * 7)
        found = torch.ops.hinm.conv2d(x, *operands, *expand_all(packed).values(), *geometry, *PLAIN.fields, "relu")
    assert found.is_contiguous()
    assert relative_error(found, F.relu(F.conv2d(x.double(), unpack(packed).double(), None, 1, 1))) < 2e-3


@pytest.mark.parametrize("kernel", ["gather", "unpack"])
def test_no_images_give_an_empty_result_without_a_launch(kernel: str) -> None:
    packed = packed_layer(64, 8, 3, 3, pattern=HiNMPattern(32, 0.5), dtype=torch.float16)
    with emulated() as emulator, only(kernel):
        operands: Any = (*packed.tensors.values(), None, *expand_all(packed).values(), 8, 3, 3, *[1] * 7)
        x = torch.empty(0, 8, 6, 6, dtype=torch.float16)
        found = torch.ops.hinm.conv2d(x, *operands, *HiNMPattern(32, 0.5).fields, "relu")
    assert found.shape == (0, 64, 6, 6)
    assert emulator.launched == []


def test_the_planner_is_told_how_tokens_lie_and_what_follows() -> None:
    packed, told = packed_layer(64, 72, pattern=PLAIN, dtype=torch.float16), []

    def choose(call: Call, *figures: Any) -> Choice:
        told.append(call)
        return cost.list_kernels(call, *figures)[0]

    cases = list(itertools.product(("", "_features"), (False, True), ("none", "relu")))
    with emulated(), chosen_anew(), mock.patch.object(cost, "choose_kernel", choose):
        for storage, feature_major, activation in cases:
            run_linear(packed, tokens_for(storage, 16, 72, torch.float16), None, activation, feature_major)
    expected = [Call(PLAIN, 64, 72, 16, storage != "", out, activated=name != "none") for storage, out, name in cases]
    assert told == expected


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_a_plan_predicts_the_call_that_the_op_decides_on(case: tuple[Any, ...], channels_last: bool) -> None:
    batch, channels, rows, size, kernel, stride, padding, dilation, groups = case
    told = []

    def choose(call: Call, *figures: Any) -> Choice:
        told.append(call)
        return cost.list_kernels(call, *figures)[0]

    images = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shape, x = (rows, channels // groups, *kernel), (batch, channels, *size)
    workload = Workload(
        shape, HiNMPattern(32, 0.5), x, torch.float16, torch.device("cpu"), **images, channels_last=channels_last
    )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    with emulated(), chosen_anew(), mock.patch.object(cost, "choose_kernel", choose):
        check_conv2d(case, torch.float16, memory_format=memory_format)
        predict(replace(workload, activation="relu"))
    assert told[0] == told[1]
    assert told[0].activated


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
def test_a_weight_that_meets_one_pixel_takes_images_channels_last_as_a_linear_layer(stride: tuple[int, int]) -> None:
    with emulated() as emulator:
        check_conv2d(
            (3, 40, 64, (7, 7), (1, 1), stride, (0, 0), (1, 1), 1), torch.float16, memory_format=torch.channels_last
        )
    assert not {"planes", "transpose"} & set(emulator.launched)
    assert emulator.launched


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
def test_it_is_predicted_as_that_linear_layer(stride: tuple[int, int]) -> None:
    pattern, tokens = HiNMPattern(64, 0.75), 30 * -(-17 // stride[0]) * -(-17 // stride[1])
    image = {"stride": stride, "padding": (0, 0), "dilation": (1, 1)}
    conv = Workload((4096, 4096, 1, 1), pattern, (30, 4096, 17, 17), torch.float16, torch.device("cpu"), **image)
    linear = Workload((4096, 4096), pattern, (tokens, 4096), torch.float16, torch.device("cpu"))
    with emulated():
        assert predict(replace(conv, channels_last=True)) == predict(linear) != {}
        assert predict(conv) != predict(linear)


@pytest.mark.parametrize("case", [CONVOLUTIONS[2], CONVOLUTIONS[5]], ids=str)
def test_other_convolutions_write_channels_last_what_they_read_so(case: tuple[Any, ...]) -> None:
    with emulated() as emulator:
        check_conv2d(case, torch.float16, memory_format=torch.channels_last)
    assert "planes" in emulator.launched


def test_a_convolution_of_one_image_without_a_batch_agrees() -> None:
    with emulated():
        check_conv2d(CONVOLUTIONS[0], torch.float16, batched=False)


def test_parts_of_a_batch_may_start_anywhere() -> None:
    odd = (4, 16, 35, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1)
    with emulated() as emulator, mock.patch("lightning_hinm.ops.gpu.PLANES_BYTES", 1):
        check_conv2d(odd, torch.float16)
    assert emulator.launched == ["planes", "gather_f16_32"] * 4


@pytest.mark.parametrize("limit", ["MOST_BLOCKS", "MOST_NUMBERS"])
def test_an_image_that_is_too_large_for_the_gather_kernel_is_for_a_dense_product(limit: str) -> None:
    with emulated() as emulator, chosen_anew(), mock.patch.object(cost, limit, 1):
        check_conv2d(CONVOLUTIONS[0], torch.float16)
    assert emulator.launched == ["unpack"]


def test_images_are_taken_in_parts_that_bound_the_memory_of_their_planes() -> None:
    with emulated() as emulator, mock.patch("lightning_hinm.ops.gpu.PLANES_BYTES", 1):
        check_conv2d(CONVOLUTIONS[0], torch.float16)
    assert emulator.launched == ["planes", "gather_f16_32"] * 2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("columns", [64, 61])
def test_any_strides_and_any_alignment_are_taken(kernel: str, columns: int) -> None:
    packed = packed_layer(64, columns, pattern=SHARED, dtype=torch.float16)
    flat = numbers(40 * columns + 1, dtype=torch.float16)
    inputs = [
        flat[1:].reshape(40, columns)[:10],  # not on a boundary of 16 bytes
        flat[:-1].reshape(40, columns)[::4],  # tokens apart
        flat[:-1].reshape(columns, 40).t()[:10],  # feature-major
        flat[: 10 * columns].reshape(10, columns)[:, torch.arange(columns)][None].expand(2, -1, -1)[:, :5],
        numbers(10, 2 * columns, dtype=torch.float16)[:, ::2],  # columns apart
        numbers(1, columns, dtype=torch.float16).expand(10, -1),
    ]
    for x in inputs:
        with emulated(), only(kernel):
            check_linear(packed, x, None)


def test_feature_major_input_is_gathered_as_it_lies() -> None:
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    with emulated() as emulator, only("gather"):
        check_linear(packed, numbers(64, 48, dtype=torch.float16).t(), None)
    assert emulator.launched == ["gather_f16_64", "transpose"]


@pytest.mark.parametrize("size", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens_give_an_empty_result_without_a_launch(size: tuple[int, ...]) -> None:
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    with emulated() as emulator:
        found, _ = run_linear(packed, torch.empty(*size, 64, dtype=torch.float16), None)
    assert found.shape == (*size, 64)
    assert emulator.launched == []


def test_a_single_token_without_a_batch_is_taken() -> None:
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    with emulated():
        check_linear(packed, numbers(64, dtype=torch.float16), None)


def test_another_dtype_is_refused_by_name() -> None:
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    with emulated(), pytest.raises(TypeError, match=r"x is torch.float32, but the packed weight is torch.float16"):
        run_linear(packed, numbers(2, 64, dtype=torch.float32), None)


def padded_by_one(tensor: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    return F.pad(tensor.to(torch.int32), (0, 1)).to(tensor.dtype)[..., :-1]


@pytest.mark.parametrize(
    ("name", "damage", "fact"),
    [
        (
            "columns",
            lambda tensor: tensor.to(torch.int64),
            r"columns is torch.int64 \[3, 64\]",
        ),
        ("columns", padded_by_one, r"with strides \[65, 1\], but must be torch.uint16 \[3, 64\], contiguous"),
        ("columns", lambda tensor: tensor[:, :32].contiguous(), r"columns is torch.uint16 \[3, 32\]"),
        ("columns", lambda tensor: None, "columns is None"),
        ("restore", lambda tensor: tensor.to(torch.int64), "restore is torch.int64"),
        ("restore", lambda tensor: tensor[:-1], r"restore is torch.int32 \[95\]"),
        ("restore", lambda tensor: None, "restore is None"),
        ("expansion", lambda tensor: tensor[:2], r"expansion is torch.float16 \[2, 2, 2, 32, 8\]"),
        ("expansion", lambda tensor: None, "expansion is None"),
        ("expansion_metadata", lambda tensor: tensor.flatten(), r"expansion_metadata is torch.int32 \[192\]"),
        ("expansion_metadata", lambda tensor: tensor.to(torch.int64), "expansion_metadata is torch.int64"),
    ],
)
@pytest.mark.parametrize("kernel", ["decode", "gather", "unpack", "conv2d", "unpacked conv2d"])
def test_fragments_that_a_kernel_would_misread_are_refused(kernel: str, name: str, damage: Any, fact: str) -> None:
    pattern = HiNMPattern(32, 0.5)
    convolution, own = "conv2d" in kernel, {"conv2d": "gather", "unpacked conv2d": "unpack"}.get(kernel, kernel)
    size = (8, 3, 4) if convolution else (96,)
    packed = packed_layer(96, *size, pattern=pattern, dtype=torch.float16)
    with emulated() as emulator, only(own):
        expanded: dict[str, Any] = expand_all(packed)
        expanded[name] = damage(expanded[name])
        operands: tuple[Any, ...] = (*packed.tensors.values(), None, *expanded.values())
        if convolution:
            op, x = torch.ops.hinm.conv2d, numbers(1, 8, 6, 6, dtype=torch.float16)
            operands += (8, 3, 4, 1, 1, 0, 0, 1, 1, 1)
        else:
            op, x = torch.ops.hinm.linear, numbers(4, 96, dtype=torch.float16)
            operands += (96,)
        with pytest.raises(ValueError, match=f"{fact}.*The operands are not of one packed layer"):
            op(x, *operands, *pattern.fields)
    assert not {name for name in emulator.launched if name not in ("transpose", "planes")}


@pytest.mark.parametrize("shape", [(160, 224), (64, 224), (96, 300), (96, 96)], ids=str)
def test_fragments_of_another_layer_are_refused(shape: tuple[int, int]) -> None:
    pattern = HiNMPattern(32, 0.5)
    packed, other = (packed_layer(*size, pattern=pattern, dtype=torch.float16) for size in ((96, 224), shape))
    with emulated():
        operands = (*packed.tensors.values(), None, *expand_all(other).values(), 224, *pattern.fields)
        with pytest.raises(ValueError, match=r"expansion is .*, but must be torch.float16 "):
            torch.ops.hinm.linear(numbers(4, 224, dtype=torch.float16), *operands)


def test_fragments_of_a_pattern_that_no_kernel_runs_are_refused() -> None:
    pattern = HiNMPattern(32, 0.5)
    packed = packed_layer(64, 4, 4, 4, pattern=pattern, dtype=torch.float16)
    with emulated():
        operands = (*packed.tensors.values(), None, *expand_all(packed).values())
        geometry = (4, 4, 4, 1, 1, 0, 0, 1, 1, 1, *replace(pattern, m=8).fields)
        with pytest.raises(ValueError, match="2:8 is not the 2:4 of sparse tensor cores"):
            torch.ops.hinm.conv2d(numbers(1, 4, 6, 6, dtype=torch.float16), *operands, *geometry)


def test_more_tokens_than_the_gather_kernel_counts_are_taken_in_parts() -> None:
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    with emulated() as emulator, only("gather"), mock.patch("lightning_hinm.ops.gpu.MOST_NUMBERS", 64 * 128 + 1):
        check_linear(packed, numbers(300, 64, dtype=torch.float16), None)
    assert emulator.launched.count("gather_f16_64") == 3


@pytest.mark.parametrize("kernel", ["gather", "gather_features"])
def test_more_tokens_than_a_grid_has_blocks_for_are_taken_in_parts(kernel: str) -> None:
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    with emulated() as emulator, only(kernel), mock.patch("lightning_hinm.ops.gpu.MOST_TOKENS", 128):
        check_linear(packed, tokens_for(kernel, 300, 64, torch.float16), None)
    assert emulator.launched.count("gather_f16_64") == 3


def test_part_of_a_wide_feature_major_input_is_turned_where_its_rows_lie_too_far_apart() -> None:
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    x = numbers(64, 304, dtype=torch.float16).t()
    with emulated() as emulator, only("gather"), mock.patch("lightning_hinm.ops.gpu.MOST_NUMBERS", 64 * 256 + 1):
        check_linear(packed, x, None)
    assert emulator.launched == ["transpose", "gather_f16_64", "transpose"] * 2


def test_what_no_kernel_has_the_shared_memory_for_is_for_a_dense_product() -> None:
    packed = packed_layer(64, 512, pattern=PLAIN, dtype=torch.float16)
    with emulated() as emulator, chosen_anew(), mock.patch.object(kernels, "shared_limit", return_value=49 << 10):
        check_linear(packed, numbers(7, 512, dtype=torch.float16), None)
        check_linear(packed, numbers(70, 512, dtype=torch.float16), None)
    assert emulator.launched == ["decode_f16_32_8", "unpack"]


def test_a_layer_that_no_kernel_runs_holds_its_dense_expansion() -> None:
    for pattern, dtype in ((HiNMPattern(48), torch.float16), (PLAIN, torch.float32), (HiNMPattern(n=1), torch.float16)):
        weight = torch.zeros(96, 64, dtype=dtype)
        layout = HiNMLayout(pattern, torch.arange(96), choose_vectors(weight, pattern, torch.arange(96)))
        with emulated():
            assert expand_all(pack(weight, layout))["expansion_metadata"] is None


def test_gradients_come_from_the_packed_weight() -> None:
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    x = numbers(3, 64, dtype=torch.float16).requires_grad_()
    with emulated():
        found, _ = run_linear(packed, x, None)
        found.sum().backward()
    torch.testing.assert_close(x.grad, unpack(packed).sum(dim=0).expand(3, -1), rtol=1e-2, atol=1e-2)


def test_a_fused_activation_has_no_gradient_and_says_so() -> None:
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    x = numbers(3, 64, dtype=torch.float16).requires_grad_()
    with emulated(), pytest.raises(NotImplementedError, match="activation='relu' is fused for inference only"):
        run_linear(packed, x, None, "relu")


# ---------------------------------------------------------------- whole models


def pruned_model(channels: int = 64) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(4, channels, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.Linear(64, 96), nn.Linear(96, 64)
    )
    prune(model, HiNMPattern(32, 0.5), method="identity")
    return model.to(torch.float16).eval()


def test_a_converted_model_runs_on_the_kernels() -> None:
    model, x = pruned_model(32), numbers(1, 4, 8, 8, dtype=torch.float16)
    with emulated() as emulator, torch.inference_mode():
        found = to_hinm(model)(x)
    # So small a convolution is two launches either way, and the planes have to be written and read.
    assert emulator.launched == ["unpack", *["decode_f16_32_8"] * 2]
    with torch.inference_mode():
        assert relative_error(found, model.double()(x.double())) < 2e-3


def test_a_compiled_model_runs_on_the_kernels() -> None:
    model, x = pruned_model(32), numbers(1, 4, 8, 8, dtype=torch.float16)
    with emulated() as emulator, torch.inference_mode():
        compiled = torch.compile(model, backend="hinm", fullgraph=True, options={"plan": "sparse", "inner": "eager"})
        found = compiled(x)
    assert emulator.launched == [
        "planes", "gather_f16_32", *["decode_f16_32_8"] * 2
    ], "with its activation, the dense convolution would be a launch more"  # fmt: skip
    with torch.inference_mode():
        assert relative_error(found, model.double()(x.double())) < 2e-3


def test_a_layer_decodes_its_weight_anew_for_another_dtype() -> None:
    with emulated():
        layer = to_hinm(pruned_model())[3]  # type: ignore[index]
        assert layer.expansion_metadata is not None
        before = layer.expansion
        assert layer.cpu().expansion is before, "nothing changed"
        assert layer.float().expansion_metadata is None
        assert layer.expansion.dtype == torch.uint8, "for the product that is compiled for the CPU"
        assert layer.half().expansion_metadata is not None
        assert torch.equal(layer.expansion, before)
        assert layer.bfloat16().expansion.dtype == torch.bfloat16
    assert not any("expansion" in name for name in layer.state_dict())


def test_a_state_dict_and_a_copy_bring_their_fragments() -> None:
    with emulated():
        one, other = to_hinm(pruned_model()), to_hinm(pruned_model())
        other.load_state_dict(one.state_dict())
        assert torch.equal(other[3].expansion, one[3].expansion)  # type: ignore[index,union-attr]
        assert torch.equal(copy.deepcopy(one)[3].columns, one[3].columns)  # type: ignore[index,union-attr]


def test_memory_format_and_an_idle_move_leave_fragments_alone() -> None:
    with emulated():
        model = to_hinm(pruned_model())
        before = [tensor.data_ptr() for tensor in model[0].expanded.values()]  # type: ignore[index,operator,union-attr]
        model.to(memory_format=torch.channels_last)
        assert [tensor.data_ptr() for tensor in model[0].expanded.values()] == before  # type: ignore[index,operator,union-attr]


def test_a_model_that_is_unpickled_where_no_kernel_runs_decodes_its_weights_anew(tmp_path: Path) -> None:
    x = numbers(2, 4, 8, 8, dtype=torch.float16)
    with emulated():
        model = to_hinm(pruned_model())
        torch.save(model, tmp_path / "model.pt")
        with torch.inference_mode():
            expected = model(x)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded[3].expansion_metadata is None
    with torch.inference_mode():
        assert relative_error(loaded(x), expected) < 2e-3
    torch.save(loaded, tmp_path / "model.pt")
    with emulated():
        assert torch.load(tmp_path / "model.pt", weights_only=False)[3].expansion_metadata is not None


def test_fragments_that_came_to_a_device_without_kernels_are_decoded_at_each_call() -> None:
    packed, x = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16), numbers(5, 64, dtype=torch.float16)
    with emulated():
        expanded = expand_all(packed)
    found = torch.ops.hinm.linear(x, *packed.tensors.values(), None, *expanded.values(), 64, *PLAIN.fields)
    assert relative_error(found, F.linear(x.double(), unpack(packed).double())) < 2e-3


def test_autocast_to_another_dtype_reaches_every_path() -> None:
    packed, x = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16), numbers(5, 64, dtype=torch.float32)
    x.requires_grad_()
    with emulated() as emulator, torch.autocast("cpu", torch.bfloat16):
        args = (*packed.tensors.values(), None, *expand_all(packed).values(), 64, *PLAIN.fields)
        found = torch.ops.hinm.linear(x, *args)
        found.sum().backward()
        with only("unpack"):
            dense = torch.ops.hinm.linear(x.detach(), *args)
    assert emulator.launched == ["decode_bf16_32_8", "unpack"]
    expected = F.linear(x.double(), unpack(packed).double())
    assert max(relative_error(each.detach(), expected.detach()) for each in (found, dense)) < 1e-2
    torch.testing.assert_close(x.grad, unpack(packed).float().sum(dim=0).expand(5, -1), rtol=2e-2, atol=2e-2)


def test_explain_names_the_kernel_and_the_roof_that_binds() -> None:
    model, x = pruned_model(32), numbers(1, 4, 8, 8, dtype=torch.float16)
    with emulated(), mock.patch("lightning_hinm.plan.measure", return_value=(2.0, 1.0)):
        plan = explain(to_hinm(model), x)
        dense = explain(model)
        compiled = explain(model, x)
    conv, linear, _ = plan.layers
    assert (conv.kernel, linear.kernel) == ("unpack (launch)", "decode (launch)")
    assert compiled.layers[0].kernel == "gather (launch)", "as compiled: with its activation, a launch less"
    assert conv.predicted_seconds == pytest.approx(2 * linear.predicted_seconds, rel=0.05)  # type: ignore[operator]
    assert linear.measured_seconds is not None
    assert "decode (launch)" in str(plan)
    for layer, packed in zip(dense.layers, plan.layers, strict=True):
        assert layer.path == "sparse"
        assert layer.bytes == packed.bytes, "predicted without packing"


def test_explain_predicts_the_dense_path_where_that_is_chosen() -> None:
    with emulated(), mock.patch("lightning_hinm.plan.measure", return_value=(1.0, 1.0)):
        layer = explain(pruned_model()).layers[1]
    assert (layer.path, layer.kernel) == ("dense", "BLAS (launch)")


def test_layers_are_timed_on_their_kernels() -> None:
    workload = Workload((64, 64), HiNMPattern(32, 0.5), (3, 64), torch.float16, torch.device("cpu"))
    with emulated() as emulator, measuring_anew():
        assert all(seconds > 0 for seconds in measure(workload))
    assert set(emulator.launched) == {"decode_f16_32_8"}


# ---------------------------------------------------------------- the checks can fail

MUTATED = {
    "decode": (16, 70, 1480, 11, HiNMPattern(64, 0.25, window=None)),
    "decode_cluster": (16, 72, 1536, 11, HiNMPattern(32, 0.0, window=64)),  # more steps of a warp than are on their way
    "gather": (128, 70, 300, 70, HiNMPattern(64, 0.0, window=None)),
}
BOUNDS = {
    "decode": ["tokens", "columns"],
    "decode_cluster": ["tokens", "packed_rows", "columns"],
    "gather": ["tokens", "kept", "plane"],
}
# What moves numbers and computes nothing: the text, and the mistakes that it has a place for.
MOVES = {
    "transpose": ["a barrier removed", "a half that stays where it is"],
    "planes": ["a half that stays where it is"],
    "unpack": ["a barrier removed"],
}
BOUNDS_OF_MOVES = {"transpose": ["height", "width"], "planes": ["chunks", "height", "width"], "unpack": ["kept"]}
SAMPLE = 6  # mutants of one kind that are run, spread over the text


def is_caught(kernel: str, text: str) -> bool:
    """Whether the interpreter faults on the text, or its result is wrong."""
    block, rows, columns, tokens, pattern = MUTATED[kernel]
    packed = packed_layer(rows, columns, pattern=pattern, dtype=torch.float16)
    x = tokens_for(kernel, tokens, columns, torch.float16)
    with emulated(texts={f"{family_of(kernel)}.ptx": text}), only(kernel, block):
        try:
            found, expected = run_linear(packed, x, None)
        except Fault:
            return True
    return not relative_error(found, expected) < TOLERANCE[torch.float16]


def is_move_caught(kernel: str, text: str) -> bool:
    """The same of a text that moves numbers: by whole copies, and number by number."""
    with emulated(texts={f"{kernel}.ptx": text}) as emulator:
        try:
            if kernel == "unpack":
                pattern = HiNMPattern(32, 0.25, window=None)
                return not unpacks(emulator, packed_layer(40, 1700, pattern=pattern, dtype=torch.float16))
            if kernel == "transpose":
                return not all(turns(emulator, pitch, out_pitch) for pitch, out_pitch in ((96, 72), (91, 71)))
            return not writes_planes(emulator)
        except Fault:
            return True


def turns(emulator: Emulator, pitch: int, out_pitch: int) -> bool:
    x, out = numbers(70, pitch, dtype=torch.float16), torch.zeros(90, out_pitch, dtype=torch.float16)
    emulator.launch("transpose", x, out, 70, 90, pitch, out_pitch)
    return torch.equal(out[:, :70], x[:, :90].t()) and not out[:, 70:].any()


def writes_planes(emulator: Emulator) -> bool:
    """By the definition in planes.cu: three columns of a kernel, two phases."""
    x, plane_height, pitch = numbers(2, 3, 9, 21, dtype=torch.float16), 6, 16
    out = torch.full((2, 3, 2, 3, plane_height, pitch), float("nan"), dtype=torch.float16)
    emulator.launch("planes", x, out, out[0].numel() // 8, *x.shape, 2, plane_height, pitch, 2, 1, 1, 2, 2)
    padded = F.pad(x, (2, 20, 1, 9))
    expected = [[padded[:, :, phase::2, 2 * s :][:, :, :plane_height, :pitch] for phase in range(2)] for s in range(3)]
    return torch.equal(out, torch.stack([torch.stack(phases, dim=1) for phases in expected], dim=1))


def mutated_text(kernel: str) -> str:
    if kernel in MOVES:
        return (kernels.FOLDER / f"{kernel}.ptx").read_text()
    own = {"decode": "32_16", "decode_cluster": "32_16", "gather": "64"}[kernel]
    return entry_text((kernels.FOLDER / f"{kernel}.ptx").read_text(), f"{kernel}_f16_{own}")


@pytest.mark.parametrize("kernel", list(MUTATED))
def test_the_text_without_a_mistake_passes(kernel: str) -> None:
    assert not is_caught(kernel, mutated_text(kernel))


@pytest.mark.parametrize("kernel", list(MOVES))
def test_the_text_of_a_move_without_a_mistake_passes(kernel: str) -> None:
    assert not is_move_caught(kernel, mutated_text(kernel))


@pytest.mark.parametrize(("kernel", "mistake"), [(kernel, each) for kernel in MOVES for each in MOVES[kernel]])
def test_a_mistake_in_the_text_of_a_move_is_caught(kernel: str, mistake: str) -> None:
    found = list(mutants(mutated_text(kernel), mistake))
    assert found
    missed = [line for line, text in found if not is_move_caught(kernel, text)]
    assert not missed, f"nothing noticed {mistake} in lines {missed}"


@pytest.mark.parametrize(("kernel", "bound"), [(name, bound) for name in MOVES for bound in BOUNDS_OF_MOVES[name]])
def test_a_bound_of_a_move_that_is_loosened_is_caught(kernel: str, bound: str) -> None:
    place = [parameter.name for parameter in kernels.entries()[kernel].parameters].index(bound)
    found = list(mutants(mutated_text(kernel), "a bound that is loosened", place))
    assert found
    assert all(is_move_caught(kernel, text) for _, text in found)


# Of the kernel whose blocks share their work, only what it has besides: the other one of its source is mutated, too.
MUTANTS = [
    (kernel, each)
    for kernel in MUTATED
    for each in (["a barrier removed", *CLUSTERED] if "cluster" in kernel else MISTAKES)
    if "bound" not in each and "half" not in each and ("cluster" in kernel or each not in CLUSTERED)
]


@pytest.mark.parametrize(("kernel", "mistake"), MUTANTS)
def test_a_mistake_in_the_text_is_caught(kernel: str, mistake: str) -> None:
    found = list(mutants(mutated_text(kernel), mistake))
    if kernel == "decode" and ("transposed" in mistake or "swizzle" in mistake):
        assert not found, "the decode kernel has no ldmatrix, and nothing to swizzle"
        return
    assert found
    if "barrier" not in mistake and mistake not in CLUSTERED:  # every one of them
        found = found[:: -(-len(found) // SAMPLE)]
    missed = [line for line, text in found if not is_caught(kernel, text)]
    assert not missed, f"nothing noticed {mistake} in lines {missed}"


@pytest.mark.parametrize(("kernel", "bound"), [(kernel, bound) for kernel in BOUNDS for bound in BOUNDS[kernel]])
def test_a_bound_that_is_loosened_is_caught(kernel: str, bound: str) -> None:
    entry = next(entry for name, entry in kernels.entries().items() if name.startswith(f"{kernel}_f16_"))
    place = [parameter.name for parameter in entry.parameters].index(bound)
    found = list(mutants(mutated_text(kernel), "a bound that is loosened", place))
    assert found
    assert all(is_caught(kernel, text) for _, text in found)


def test_an_index_that_is_changed_after_its_check_faults_in_the_interpreter() -> None:
    """On a GPU nothing would see it without a synchronisation (``ops/gpu.py``)."""
    packed = packed_layer(64, 64, pattern=PLAIN, dtype=torch.float16)
    for kernel in ("decode", "gather"):
        with emulated(), only(kernel):
            expanded = expand_all(packed)
            bad = expanded["columns"].to(torch.int32) + 64  # type: ignore[union-attr]
            expanded["columns"] = bad.to(torch.uint16)
            args = (*packed.tensors.values(), None, *expanded.values(), 64, *PLAIN.fields)
            with pytest.raises(Fault):
                torch.ops.hinm.linear(numbers(4, 64, dtype=torch.float16), *args)


# ---------------------------------------------------------------- figures of merit


def count(kernel: str, block: int, tokens: int, pattern: HiNMPattern) -> Emulator:
    packed = random_weight((256, 512), pattern, torch.float16, torch.Generator(), restored=False)
    with emulated() as emulator, only(kernel, block):
        run_linear(packed, numbers(tokens, 512, dtype=torch.float16), None)
    return emulator


@pytest.mark.parametrize("vector_size", [32, 64, 128])
def test_the_gather_kernel_has_no_bank_conflicts(vector_size: int) -> None:
    emulator = count("gather", 128, 128, HiNMPattern(vector_size, 0.5, window=None))
    report = emulator.reports[emulator.launched.index(f"gather_f16_{vector_size}")]
    for kind in ("ldmatrix", "ld.shared", "cp.async"):
        assert report.wavefronts[kind] == report.wavefronts_ideal[kind], kind
    assert report.wavefronts["st.shared"] < 1.1 * report.wavefronts_ideal["st.shared"]  # nvcc splits one store in two
    assert report.global_sectors == report.global_sectors_ideal


def test_the_decode_kernel_streams_its_weights() -> None:
    (report,) = count("decode", 8, 8, HiNMPattern(64, 0.5, window=None)).reports
    assert report.wavefronts["st.shared"] == report.wavefronts_ideal["st.shared"]
    assert report.wavefronts["ld.shared"] < 2.4 * report.wavefronts_ideal["ld.shared"]  # 2-byte loads of random columns
    assert report.global_sectors["load"] < 1.1 * report.global_sectors_ideal["load"]


def test_a_cluster_of_decode_reads_its_input_once_and_gathers_for_64_rows_at_once() -> None:
    pattern = HiNMPattern(64, 0.0, window=64)  # 256 rows of 512 columns: 8 blocks, 2 clusters; 8 runs
    (alone,), (shared,) = (count(kernel, 8, 8, pattern).reports for kernel in ("decode", "decode_cluster"))
    input_of_block, index = 8 * 512 * 2 // 32, 512 * 2 // 32  # in sectors; the index for 64 rows, where it was for 32
    read = alone.global_sectors["load"] - shared.global_sectors["load"]
    assert read == (8 - 2) * input_of_block + (8 - 4) * index
    assert shared.mma == alone.mma
    assert shared.wavefronts["ld.shared"] < alone.wavefronts["ld.shared"]


def test_the_transpose_kernel_moves_whole_sectors_and_conflicts_only_where_it_reads_two_bytes() -> None:
    with emulated() as emulator:
        x, out = numbers(128, 192, dtype=torch.float16), torch.empty(192, 128, dtype=torch.float16)
        emulator.launch("transpose", x, out, *x.shape, 192, 128)
    (report,) = emulator.reports
    assert report.wavefronts["st.shared"] == report.wavefronts_ideal["st.shared"]
    assert report.wavefronts["ld.shared"] == 2 * report.wavefronts_ideal["ld.shared"]
    assert report.global_sectors == report.global_sectors_ideal


def test_the_planes_kernel_writes_whole_sectors() -> None:
    with emulated() as emulator:
        check_conv2d(CONVOLUTIONS[0], torch.float16)
    report = emulator.reports[emulator.launched.index("planes")]
    assert report.global_sectors["store"] == report.global_sectors_ideal["store"]
    # Each lane reads eight neighbours one by one, so that a warp meets each sector in eight requests.
    assert report.global_sectors["load"] < 8 * report.global_sectors_ideal["load"]


def test_the_unpack_kernel_moves_whole_sectors_and_conflicts_little_where_it_puts_numbers_down() -> None:
    packed = random_weight((64, 512), HiNMPattern(64, 0.5, window=None), torch.float16, torch.Generator())
    with emulated() as emulator:
        assert unpacks(emulator, packed)
    (report,) = emulator.reports
    assert report.global_sectors["store"] == report.global_sectors_ideal["store"]
    assert report.global_sectors["load"] < 1.1 * report.global_sectors_ideal["load"]
    assert report.wavefronts["st.shared"] < 1.4 * report.wavefronts_ideal["st.shared"]
    assert report.wavefronts["ld.shared"] == report.wavefronts_ideal["ld.shared"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ENTRIES, ids=str)
def test_every_entry_computes_the_layer_on_a_gpu(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    kernel, block, rows, columns, tokens, pattern = case
    if "cluster" in kernel and not cost.gpu_of(torch.device("cuda")).gpc:
        pytest.skip("needs a GPU of compute capability 9, whose blocks can share their input")
    packed = packed_layer(rows, columns, pattern=pattern, dtype=dtype).to("cuda")
    with only(kernel, block):
        check_linear(packed, tokens_for(kernel, tokens, columns, dtype, "cuda"), numbers(rows, dtype=dtype).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 200])
def test_a_call_on_the_unpacked_weight_can_be_captured(tokens: int) -> None:
    packed, x = packed_layer(70, 96, pattern=PLAIN, dtype=torch.float16), numbers(tokens, 96, dtype=torch.float16)
    with only("unpack"), torch.inference_mode():
        packed, x, graph = packed.to("cuda"), x.cuda(), torch.cuda.CUDAGraph()
        args = (*packed.tensors.values(), None, *expand_all(packed).values(), 96, *PLAIN.fields, "gelu")
        with torch.cuda.graph(graph):
            found = torch.ops.hinm.linear(x, *args)
        graph.replay()
        assert torch.equal(found, torch.ops.hinm.linear(x, *args))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_agree_on_a_gpu(case: tuple[Any, ...], memory_format: torch.memory_format) -> None:
    with torch.device("cuda"):
        check_conv2d(case, torch.float16, memory_format=memory_format)
