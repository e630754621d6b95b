"""The ops on the product that is compiled for the CPU, against torch's functions on the unpacked weight."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_hinm import HiNMPattern, unpack
from lightning_hinm.format import HiNMWeight, random_weight
from lightning_hinm.kernels import host
from lightning_hinm.ops import expand_all, form_of, hinm_conv2d, hinm_linear, product

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
N_M = [(2, 4), (1, 2), (1, 4), (2, 8), (4, 8), (3, 4), (3, 6), (5, 10), (16, 32), (40, 80), (3, 256)]


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fewer than there is work for, and more than there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(shape: tuple[int, ...], pattern: HiNMPattern, dtype: torch.dtype, **options: Any) -> HiNMWeight:
    """A random packed one, for the compiled product."""
    packed = random_weight(shape, pattern, dtype, torch.Generator().manual_seed(sum(shape)), **options)
    assert form_of(packed) == "positions"
    return packed


def arguments(packed: HiNMWeight, bias: Tensor | None, *sizes: int, groups: int = 1) -> tuple[Any, ...]:
    return (*packed.tensors.values(), bias, *expand_all(packed, groups=groups).values(), *sizes, *packed.pattern.fields)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """``expected`` is of float64, and of numbers of size 1: where it is less, larger ones have cancelled out."""
    assert found.shape == expected.shape
    size = max(float(expected.norm()), expected.numel() ** 0.5)
    assert (found.double() - expected).norm() <= TOLERANCE[found.dtype] * size


def storages(x: Tensor) -> list[Tensor]:
    """The same numbers in rows, feature-major, cut out of wider rows, and neither."""
    wider = torch.cat([x, x], dim=1)
    return [x, x.t().contiguous().t(), wider[:, : x.shape[1]], wider.t().contiguous().t()[:, : x.shape[1]],
            x.repeat_interleave(2, dim=1)[:, ::2]]  # fmt: skip


def check_linear(packed: HiNMWeight, x: Tensor, bias: Tensor | None, feature_major: bool) -> None:
    expected = F.linear(x.double(), unpack(packed).double(), None if bias is None else bias.double())
    for stored in storages(x):
        found = hinm_linear(stored, *arguments(packed, bias, x.shape[1]), "none", feature_major)
        assert (found.t() if feature_major else found).is_contiguous()
        assert_close(found, expected)


def check_conv2d(packed: HiNMWeight, x: Tensor, bias: Tensor | None, geometry: tuple[int, ...], groups: int) -> None:
    expected = F.conv2d(
        x.double(), unpack(packed).double(), None if bias is None else bias.double(),
        geometry[:2], geometry[2:4], geometry[4:], groups,
    )  # fmt: skip
    sizes = (x.shape[1], *packed.shape[2:], *geometry, groups)
    for stored in (x, x.to(memory_format=torch.channels_last)):
        assert_close(hinm_conv2d(stored, *arguments(packed, bias, *sizes, groups=groups)), expected)


def check_many() -> None:
    """A little of everything, for a compiler with other flags."""
    for count, (n, m), dtype in itertools.product((1, 2, 5, 8, 9, 40, 300), N_M[:5], TOLERANCE):
        packed = weight((37, 90), HiNMPattern(16, 0.5, n, m), dtype)
        check_linear(packed, numbers(count, 90, dtype=dtype), numbers(37, dtype=dtype), count % 2 == 0)
    for kernel, padding, size in itertools.product((1, 3), (0, 1), (3, 9, 20)):
        packed = weight((24, 10, kernel, kernel), HiNMPattern(8), torch.float32)
        check_conv2d(packed, numbers(2, 10, size, size), numbers(24), (1, 1, padding, padding, 1, 1), 1)


@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 300),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130]),
    n_m=st.sampled_from(N_M),
    vector_size=st.sampled_from([1, 3, 4, 7, 16, 64]),
    vector_sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.875]),
    window=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    restored=st.booleans(),
    feature_major=st.booleans(),
)
def test_linear_equals_the_dense_function(
    rows: int, columns: int, tokens: int, n_m: tuple[int, int], vector_size: int, vector_sparsity: float,
    window: bool, dtype: torch.dtype, bias: bool, restored: bool, feature_major: bool,
) -> None:  # fmt: skip
    n, m = n_m
    pattern = HiNMPattern(vector_size, vector_sparsity, n, m, 4 * m if window else None)
    packed = weight((rows, columns), pattern, dtype, restored=restored)
    given_bias = numbers(rows, dtype=dtype, seed=1) if bias else None
    check_linear(packed, numbers(tokens, columns, dtype=dtype, seed=2), given_bias, feature_major)


@given(
    channels=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(5, 24), st.integers(5, 24)),
    geometry=st.tuples(*[st.integers(1, 2)] * 2, *[st.integers(0, 2)] * 2, *[st.integers(1, 2)] * 2),
    images=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
)
def test_conv2d_equals_the_dense_function(
    channels: int, kernel: tuple[int, int], size: tuple[int, int], geometry: tuple[int, ...], images: int,
    groups: int, dtype: torch.dtype, bias: bool,
) -> None:  # fmt: skip
    pattern = HiNMPattern(vector_size=8)
    packed = weight((16 * groups, channels, *kernel), pattern, dtype, groups=groups)
    x = numbers(images, channels * groups, *size, dtype=dtype, seed=2)
    check_conv2d(packed, x, numbers(16 * groups, dtype=dtype, seed=1) if bias else None, geometry, groups)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (3, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("padding", [0, 1])
def test_an_image_of_few_pixels_has_each_at_its_place(size: tuple[int, int], padding: int) -> None:
    packed = weight((16, 12, 1, 1), HiNMPattern(vector_size=8), torch.float32)
    check_conv2d(packed, numbers(1, 12, *size), numbers(16), (1, 1, padding, padding, 1, 1), 1)


@pytest.mark.parametrize("tokens", [1, 7, 200])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_numbers_that_are_not_finite_come_through(tokens: int, dtype: torch.dtype) -> None:
    packed = weight((16, 16), HiNMPattern(vector_size=8, vector_sparsity=0.0), dtype)
    x = numbers(tokens, 16, dtype=dtype)
    x[0, 3], x[-1, 5] = torch.inf, torch.nan
    found = hinm_linear(x, *arguments(packed, None, 16))
    reached = (unpack(packed) != 0)[:, [3, 5]]
    assert torch.equal(found[0].isfinite(), ~reached[:, 0] if tokens > 1 else ~reached.any(dim=1))
    assert torch.equal(found[-1].isnan(), reached[:, 1]) or tokens == 1
    assert found[1:-1].isfinite().all()


@pytest.mark.parametrize("tokens", [3, 40])
def test_bfloat16_is_rounded_as_torch_rounds_it(tokens: int) -> None:
    packed = weight((64, 4), HiNMPattern(vector_size=4, vector_sparsity=0.0), torch.bfloat16)
    packed.values.fill_(1.0)
    x = (numbers(tokens, 4) * 2).exp2().to(torch.bfloat16)
    x[::2] = torch.tensor([1.0, 2**-8, 1 + 2**-7, 3 * 2**-8])  # two of which make ties, to either side
    sums = F.linear(x.float(), unpack(packed).float())  # of two numbers, so that no order of adding counts
    assert torch.equal(hinm_linear(x, *arguments(packed, None, 4)), sums.to(torch.bfloat16))


def test_threads_gather_each_for_itself() -> None:
    packed = weight((1024, 256), HiNMPattern(vector_size=8), torch.float32)
    for tokens in (4, 40):
        x = numbers(tokens, 256)
        expected = F.linear(x.double(), unpack(packed).double())
        for _ in range(20):
            assert_close(hinm_linear(x, *arguments(packed, None, 256)), expected)


def test_the_product_by_torch_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "linear", None)
    monkeypatch.setattr(product, "conv2d", None)
    check_linear(weight((16, 32), HiNMPattern(8), torch.float32), numbers(4, 32), None, False)
    check_conv2d(weight((16, 4, 3, 3), HiNMPattern(8), torch.float32), numbers(1, 4, 6, 6), None, (1,) * 6, 1)


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        (HiNMPattern(8, 0.5, 4, 4), torch.float32),
        (HiNMPattern(8, 0.5, 1, 257, None), torch.float32),
        (HiNMPattern(8), torch.float64),
        (HiNMPattern(8), torch.float16),
    ],
    ids=str,
)
def test_what_it_does_not_take_runs_by_torch(pattern: HiNMPattern, dtype: torch.dtype) -> None:
    packed = random_weight((16, 300), pattern, dtype, torch.Generator().manual_seed(0))
    assert form_of(packed) == "tiles"
    x = numbers(3, 300, dtype=dtype)
    found, exact = hinm_linear(x, *arguments(packed, None, 300)), F.linear(x.double(), unpack(packed).double())
    assert (found.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("tokens", [1, 6, 50])
@pytest.mark.parametrize("conv", [False, True])
def test_a_number_out_of_range_is_an_error_that_names_what_is_damaged(tokens: int, conv: bool) -> None:
    shape = (16, 4, 2, 2) if conv else (16, 16)
    packed, op = weight(shape, HiNMPattern(8), torch.float32), hinm_conv2d if conv else hinm_linear
    x = numbers(1, 4, 2, tokens + 1) if conv else numbers(tokens, 16)
    sizes = (4, 2, 2, 1, 1, 0, 0, 1, 1, 1) if conv else (16,)
    good = list(arguments(packed, None, *sizes))
    columns, restore = 7, 8
    wrong = [(columns, good[columns] + 16, "index" if conv else "vector_index")]  # torch meets those of a convolution
    wrong += [] if conv else [(columns, good[columns] - 16, "vector_index")]
    wrong += [(restore, good[restore] + by, "output_order") for by in (1, -1)]
    for place, bad, name in wrong:
        with pytest.raises(IndexError, match=name):
            op(x, *good[:place], bad, *good[place + 1 :])
    positions = good[5]
    assert positions.dtype == torch.uint8
    op(x, *good[:5], positions + 200, *good[6:])  # nobody's numbers, and no crash


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, lambda values: torch.cat([values, values])),
        (0, lambda values: values[:, :-1]),
        (3, lambda order: order[:8]),
        (5, lambda positions: positions[:8]),
        (7, lambda columns: columns[:-1]),
        (7, lambda columns: columns.int()),
        (8, lambda restore: restore[:-1]),
        (8, lambda restore: restore.int()),
    ],
)
def test_operands_of_several_layers_are_refused_before_anything_is_read(place: int, change: Any) -> None:
    packed = weight((16, 16), HiNMPattern(8), torch.float32)
    operands = list(arguments(packed, None, 16))
    operands[place] = change(operands[place])
    with pytest.raises(ValueError, match="operands are not of one packed layer"):
        hinm_linear(numbers(4, 16), *operands)


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_a_number_that_is_not_finite_reaches_no_row_without_a_weight_for_it(tokens: int) -> None:
    packed = weight((4, 4), HiNMPattern(4, 0.0, window=None), torch.float32)
    packed.metadata.fill_(0b1001)  # the columns 1 and 2 of four
    packed.vector_index.copy_(torch.arange(4))
    x = torch.ones(tokens, 4)
    x[:, 0] = torch.inf
    assert hinm_linear(x, *arguments(packed, None, 4)).isfinite().all()


def test_a_layer_takes_as_many_bytes_as_its_numbers() -> None:
    packed = weight((128, 256), HiNMPattern(32), torch.float32)
    expanded = expand_all(packed)
    assert expanded["expansion"].nbytes == packed.values.numel()  # type: ignore[union-attr]
    assert int(expanded["expansion"].max()) < host.held(4)  # type: ignore[union-attr]
