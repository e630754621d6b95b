"""hinm::linear and hinm::conv2d against the dense functions on the unpacked weight."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lightning_hinm import HiNMLayout, HiNMPattern, hinm_mask, pack, unpack
from lightning_hinm.format import HiNMWeight, random_weight
from lightning_hinm.kernels import host
from lightning_hinm.mask import choose_vectors
from lightning_hinm.ops import expand_all
from lightning_hinm.ops.operands import warm_up


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the product that is compiled for the CPU, and without it."""
    if request.param == "torch":
        monkeypatch.setenv(host.SWITCH, "off")


PATTERNS = [
    HiNMPattern(vector_size=8),
    HiNMPattern(vector_size=5, vector_sparsity=0.25, n=1, m=4),
    HiNMPattern(vector_size=16, vector_sparsity=0.75, n=4, m=8, window=8),
    HiNMPattern(vector_size=7, vector_sparsity=0.0, n=2, m=3, window=None),
    HiNMPattern(vector_size=4, vector_sparsity=0.75, n=4, m=4),
]


def masked(
    *shape: int, pattern: HiNMPattern, groups: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, HiNMWeight]:
    """A random masked weight with a random order of its rows, and its packing."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator)
    rows = shape[0] // groups
    order = torch.cat([torch.randperm(rows, generator=generator) + group * rows for group in range(groups)])
    saliency = weight.flatten(1).abs()
    layout = HiNMLayout(pattern, order, choose_vectors(saliency, pattern, order))
    weight = (weight.flatten(1) * hinm_mask(saliency, layout)).reshape(shape).to(dtype)
    return weight, pack(weight, layout, groups=groups)


def arguments(x: Tensor, packed: HiNMWeight, bias: Tensor | None, *numbers: int, decode: bool = False) -> tuple:
    pattern = packed.pattern
    groups = numbers[-1] if len(numbers) > 1 else 1
    expanded = (None,) * 4 if decode else expand_all(packed, groups=groups).values()
    return (x, *packed.tensors.values(), bias, *expanded, *numbers, *pattern.fields)


def linear_case(rows: int, columns: int, pattern: HiNMPattern, *size: int, **kwargs: Any) -> tuple[Tensor, tuple]:
    """The dense result, and the arguments of the op."""
    weight, packed = masked(rows, columns, pattern=pattern)
    x, bias = torch.randn(*size, columns), torch.randn(rows)
    return F.linear(x, weight, bias), arguments(x, packed, bias, columns, **kwargs)


CONVOLUTIONS = [
    # in_channels, out_channels, kernel, stride, padding, dilation, groups
    (8, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (6, 16, (3, 2), (2, 1), (0, 2), (1, 2), 1),
    (12, 32, (3, 3), (1, 2), (1, 1), (2, 1), 2),
    (16, 24, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (16, 32, (1, 1), (2, 3), (1, 0), (1, 1), 4),
    (1, 8, (4, 4), (4, 4), (0, 0), (1, 1), 1),
]


def conv_case(case: tuple, *batch: int, decode: bool = False, size: tuple[int, int] = (9, 10)) -> tuple[Tensor, tuple]:
    channels, rows, kernel, stride, padding, dilation, groups = case
    weight, packed = masked(rows, channels // groups, *kernel, pattern=HiNMPattern(vector_size=8), groups=groups)
    x, bias = torch.randn(*batch, channels, *size), torch.randn(rows)
    dense = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    numbers = (channels, *kernel, *stride, *padding, *dilation, groups)
    return dense, arguments(x, packed, bias, *numbers, decode=decode)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (37, 50), (16, 43), (3, 5)], ids=str)
@pytest.mark.parametrize("decode", [False, True])
def test_linear_equals_the_dense_function(pattern: HiNMPattern, shape: tuple[int, int], decode: bool) -> None:
    dense, args = linear_case(*shape, pattern, 3, 5, decode=decode)
    torch.testing.assert_close(torch.ops.hinm.linear(*args), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 130])
@pytest.mark.parametrize("rows", [32, 37])
@pytest.mark.parametrize("bias", [None, torch.arange(37.0)], ids=["no bias", "bias"])
def test_rows_that_are_packed_in_order_are_not_restored(rows: int, tokens: int, bias: Tensor | None) -> None:
    packed = random_weight((rows, 50), PATTERNS[0], torch.float32, torch.Generator(), restored=False)
    expanded = expand_all(packed)
    assert expanded["restore"].numel() == 0  # type: ignore[union-attr]
    x, bias = torch.randn(tokens, 50), None if bias is None else bias[:rows]
    found = torch.ops.hinm.linear(x, *packed.tensors.values(), bias, *expanded.values(), 50, *PATTERNS[0].fields)
    torch.testing.assert_close(found, F.linear(x, unpack(packed), bias), rtol=1e-5, atol=1e-5)
    packed = random_weight((rows, 6, 3, 3), PATTERNS[0], torch.float32, torch.Generator(), restored=False)
    geometry, image = (6, 3, 3, 1, 1, 1, 1, 1, 1, 1), torch.randn(2, 6, 7, 8)
    args = (*packed.tensors.values(), bias, *expand_all(packed).values(), *geometry, *PATTERNS[0].fields)
    expected = F.conv2d(image, unpack(packed), bias, padding=1)
    torch.testing.assert_close(torch.ops.hinm.conv2d(image, *args), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(), (0,), (1,), (8,), (9,), (65,), (2, 0, 3), (2, 3, 4), (70, 200)], ids=str)
def test_linear_takes_any_number_of_tokens_in_any_shape(size: tuple[int, ...]) -> None:
    dense, args = linear_case(40, 24, PATTERNS[0], *size)
    out = torch.ops.hinm.linear(*args)
    assert out.shape == dense.shape
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def test_linear_takes_an_input_that_is_not_contiguous_and_returns_one_that_is() -> None:
    weight, packed = masked(32, 16, pattern=PATTERNS[0])
    x = torch.randn(16, 7).t()
    out = torch.ops.hinm.linear(*arguments(x, packed, None, 16))
    assert out.is_contiguous()
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float64, 1e-12)], ids=str
)
def test_every_floating_dtype_is_taken(dtype: torch.dtype, tolerance: float) -> None:
    weight, packed = masked(32, 40, pattern=PATTERNS[0], dtype=dtype)
    x, bias = torch.randn(6, 40, dtype=dtype), torch.randn(32, dtype=dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    out = torch.ops.hinm.linear(*arguments(x, packed, bias, 40))
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= tolerance * exact.norm()
    image, kernel = torch.randn(2, 10, 4, 4, dtype=dtype), weight.reshape(32, 10, 2, 2)
    exact = F.conv2d(image.double(), kernel.double())
    out = torch.ops.hinm.conv2d(*arguments(image, packed, None, 10, 2, 2, 1, 1, 0, 0, 1, 1, 1))
    assert (out.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("batch", [(3,), ()], ids=str)
@pytest.mark.parametrize("decode", [False, True])
def test_conv2d_equals_the_dense_function(case: tuple, batch: tuple[int, ...], decode: bool) -> None:
    dense, args = conv_case(case, *batch, decode=decode)
    torch.testing.assert_close(torch.ops.hinm.conv2d(*args), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*CONVOLUTIONS, (4, 16, (3, 2), (2, 5), (3, 1), (3, 2), 2)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 50, 250])
def test_conv2d_takes_images_in_parts(case: tuple, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hinm.ops.product._tokens_at_once", lambda expansion, n: tokens)
    monkeypatch.setattr("lightning_hinm.ops.product.GATHER_NUMBERS", 64)
    dense, args = conv_case(case, 3)
    torch.testing.assert_close(torch.ops.hinm.conv2d(*args), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1, 13, 70])
def test_conv2d_takes_any_number_of_images_of_one_pixel(batch: int) -> None:
    dense, args = conv_case(CONVOLUTIONS[3], batch, size=(1, 1))
    torch.testing.assert_close(torch.ops.hinm.conv2d(*args), dense, rtol=1e-5, atol=1e-5)


def images(x: Tensor) -> list[Tensor]:
    """The same numbers in every storage that images come in."""
    last = x.to(memory_format=torch.channels_last)
    wider = torch.cat([last, last], dim=1).to(memory_format=torch.channels_last)
    return [x, last, wider[:, : x.shape[1]], x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)]


@pytest.mark.parametrize("size", [(9, 10), (9, 9), (7, 1), (1, 7), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        (8, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1),
        (8, 16, (1, 1), (2, 3), (0, 0), (1, 1), 1),
        (8, 16, (1, 1), (1, 1), (0, 0), (1, 1), 2),
        (8, 16, (1, 1), (1, 1), (1, 0), (1, 1), 1),
        (8, 16, (3, 2), (2, 1), (1, 1), (1, 1), 1),
    ],
    ids=str,
)
def test_conv2d_takes_any_storage_and_writes_that_of_the_dense_function(case: tuple, size: tuple[int, int]) -> None:
    dense, (x, *rest) = conv_case(case, 2, size=size)
    channels, rows, kernel, *geometry, groups = case
    weight = torch.randn(rows, channels // groups, *kernel)
    for stored in images(x):
        out = torch.ops.hinm.conv2d(stored, *rest)
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
        assert out.stride() == F.conv2d(stored, weight, None, *geometry, groups).stride()
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in (stored, *rest)]
            assert torch.ops.hinm.conv2d(*fakes).stride() == out.stride()


def storages(x: Tensor) -> list[Tensor]:
    """The same numbers in rows, feature-major, and neither."""
    return [x, x.movedim(-1, 0).contiguous().movedim(0, -1), x.repeat_interleave(2, dim=-1)[..., ::2]]


@pytest.mark.parametrize("feature_major", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("size", [(1,), (2, 3), (300,), (2, 257)], ids=str)
def test_linear_reads_any_storage_and_writes_either(
    size: tuple[int, ...], pattern: HiNMPattern, feature_major: bool
) -> None:
    dense, (x, *rest) = linear_case(19, 18, pattern, *size)
    for stored in storages(x):
        out = torch.ops.hinm.linear(stored, *rest, "none", feature_major)
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
        assert (out.movedim(-1, 0) if feature_major else out).is_contiguous()


@pytest.mark.parametrize("times", [0, 100])
@pytest.mark.parametrize("few", [0, 100])
def test_linear_writes_either_storage_of_rows_that_nothing_restores(
    times: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after an absorbed order, in blocks of a few tokens and tiles, whichever way they are gathered.
    monkeypatch.setattr("lightning_hinm.ops.product._tokens_at_once", lambda expansion, tokens: 4)
    limits = {"GATHER_NUMBERS": 64, "PARALLEL_NUMBERS": 64, "TIMES": times, "FEW": few}
    for name, value in limits.items():
        monkeypatch.setattr(f"lightning_hinm.ops.product.{name}", value)
    weight, packed = masked(24, 18, pattern=PATTERNS[0])
    order = packed.output_order.to(torch.int64)
    x, bias = torch.randn(11, 18), torch.randn(24)
    operands = arguments(x, packed, bias, 18)[1:]
    *tensors, restore = operands[:9]
    tensors[3], tensors[4] = torch.arange(24), bias[order]
    for stored in storages(x):
        for feature_major in (False, True):
            numbers = (*operands[9:], "none", feature_major)
            out = torch.ops.hinm.linear(stored, *tensors, restore.new_empty(0), *numbers)
            torch.testing.assert_close(out, F.linear(x, weight, bias)[:, order], rtol=1e-5, atol=1e-5)


# The default checks, less none: schema, autograd registration, fake tensors, and AOTAutograd with dynamic shapes.
@pytest.mark.parametrize(
    ("decode", "gradient"),
    [(False, True), (True, False), *(pytest.param(x, x, marks=pytest.mark.slow) for x in (False, True))],
)
def test_linear_passes_opcheck(decode: bool, gradient: bool) -> None:
    _, (x, *packed) = linear_case(20, 19, PATTERNS[0], 3, 5, decode=decode)
    packed[4].requires_grad_(gradient)
    for feature_major in (False, True):
        torch.library.opcheck(
            torch.ops.hinm.linear.default, (x.requires_grad_(gradient), *packed, "none", feature_major)
        )


@pytest.mark.parametrize("case", [CONVOLUTIONS[1], pytest.param(CONVOLUTIONS[4], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("gradient", [pytest.param(False, marks=pytest.mark.slow), True])
def test_conv2d_passes_opcheck(case: tuple, gradient: bool) -> None:
    _, (x, *packed) = conv_case(case, 2)
    packed[4].requires_grad_(gradient)
    torch.library.opcheck(torch.ops.hinm.conv2d.default, (x.requires_grad_(gradient), *packed))


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("size", [(), (6,), (2, 3)], ids=str)
def test_linear_is_differentiable_in_x_and_bias(size: tuple[int, ...], decode: bool) -> None:
    _, (x, *packed) = linear_case(37, 19, PATTERNS[1], *size, decode=decode)
    weight, _ = masked(37, 19, pattern=PATTERNS[1])
    leaves = x.requires_grad_(), packed[4].requires_grad_()
    sparse = torch.autograd.grad(torch.ops.hinm.linear(x, *packed).square().sum(), leaves)
    dense = torch.autograd.grad(F.linear(x, weight, packed[4]).square().sum(), leaves)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("batch", [(2,), ()], ids=str)
def test_conv2d_is_differentiable_in_x_and_bias(case: tuple, batch: tuple[int, ...]) -> None:
    channels, rows, kernel, stride, padding, dilation, groups = case
    _, (x, *packed) = conv_case(case, *batch)
    weight, _ = masked(rows, channels // groups, *kernel, pattern=HiNMPattern(vector_size=8), groups=groups)
    leaves = x.requires_grad_(), packed[4].requires_grad_()
    sparse = torch.autograd.grad(torch.ops.hinm.conv2d(x, *packed).square().sum(), leaves)
    out = F.conv2d(x, weight, packed[4], stride, padding, dilation, groups)
    dense = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decode", [False, True])
def test_autocast_lowers_the_ops_as_it_lowers_the_dense_functions(decode: bool) -> None:
    weight, packed = masked(32, 40, pattern=PATTERNS[0])
    x, bias = torch.randn(6, 40), torch.randn(32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = F.linear(x, weight, bias)
        sparse = torch.ops.hinm.linear(*arguments(x, packed, bias, 40, decode=decode))
        assert torch.ops.hinm.linear(*arguments(x.bfloat16(), packed, bias, 40)).dtype == torch.bfloat16
    assert sparse.dtype == dense.dtype == torch.bfloat16
    assert (sparse - dense).norm() <= 1e-2 * dense.norm()


def test_autocast_lets_gradients_through() -> None:
    _, (x, *rest) = linear_case(20, 19, PATTERNS[0], 4)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.ops.hinm.linear(x, *rest)
    (grad,) = torch.autograd.grad(out.float().sum(), x)
    assert grad.dtype == torch.float32
    assert grad.abs().sum() > 0


def test_no_output_shares_memory_with_an_input() -> None:
    weight, packed = masked(16, 16, pattern=HiNMPattern(vector_size=8, vector_sparsity=0.0, n=4, m=4))
    x = torch.randn(1, 16)
    out = torch.ops.hinm.linear(*arguments(x, packed, None, 16))
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_wrong_inputs_are_refused_by_value_rule_and_remedy() -> None:
    _, (x, *rest) = linear_case(20, 19, PATTERNS[0], 3)
    with pytest.raises(ValueError, match=r"x has shape \[3, 18\], but its last dimension must be in_features=19"):
        torch.ops.hinm.linear(x[:, :18], *rest)
    with pytest.raises(ValueError, match=r"x has shape \[\]"):
        torch.ops.hinm.linear(torch.tensor(1.0), *rest)
    with pytest.raises(TypeError, match=r"x is torch.float64, but the packed weight is torch.float32. Cast x"):
        torch.ops.hinm.linear(x.double(), *rest)
    with pytest.raises(ValueError, match="x is on meta, but the packed weight is on cpu"):
        torch.ops.hinm.linear(x.to("meta"), *rest)
    _, (x, *rest) = conv_case(CONVOLUTIONS[0], 2)
    with pytest.raises(ValueError, match=r"C = in_channels=8"):
        torch.ops.hinm.conv2d(x[:, :7], *rest)
    with pytest.raises(ValueError, match=r"\[C, H, W\] or \[B, C, H, W\]"):
        torch.ops.hinm.conv2d(x[0, 0], *rest)
    with pytest.raises(TypeError, match=r"x is torch.float16, but the packed weight is torch.float32"):
        torch.ops.hinm.conv2d(x.half(), *rest)
    _, args = conv_case(CONVOLUTIONS[1], 2, size=(3, 3))
    with pytest.raises(ValueError, match=r"x is 2 x 7 with its padding, but the kernel with its dilation is 3 x 3"):
        torch.ops.hinm.conv2d(args[0][:, :, :2], *args[1:])


@pytest.mark.parametrize("bias", [torch.zeros(20, dtype=torch.float64), torch.zeros(19), torch.zeros(1, 20)], ids=str)
def test_a_bias_that_does_not_fit_is_refused(bias: Tensor) -> None:
    _, (x, *args) = linear_case(20, 19, PATTERNS[0], 3)
    args[4] = bias
    with pytest.raises(ValueError, match=r"hinm::linear: bias is .* but must be torch.float32 \[20\] on cpu, as x is"):
        torch.ops.hinm.linear(x, *args)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_an_activation_is_that_of_torch(activation: str) -> None:
    dense, args = linear_case(20, 19, PATTERNS[0], 3)
    found = torch.ops.hinm.linear(*args, activation)
    name, approximate = activation.removesuffix("_tanh"), {"approximate": "tanh"} if "tanh" in activation else {}
    torch.testing.assert_close(found, getattr(F, name)(dense, **approximate), rtol=1e-5, atol=1e-5)
    dense, args = conv_case(CONVOLUTIONS[0], 2)
    torch.testing.assert_close(
        torch.ops.hinm.conv2d(*args, activation), getattr(F, name)(dense, **approximate), rtol=1e-5, atol=1e-5
    )


def test_an_unknown_activation_is_refused_by_name() -> None:
    _, args = linear_case(20, 19, PATTERNS[0], 3)
    with pytest.raises(ValueError, match="activation='swish' must be one of none, relu, gelu, gelu_tanh, silu"):
        torch.ops.hinm.linear(*args, "swish")


@pytest.mark.parametrize("tokens", [3, 40])
def test_an_index_out_of_range_is_an_error_not_a_read(tokens: int) -> None:
    _, (x, values, metadata, index, order, *rest) = linear_case(20, 19, PATTERNS[0], tokens, decode=True)
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.hinm.linear(x, values, metadata, index.to(torch.int64) - 40, order, *rest)
    _, (*packed, columns, restore, i, v, sparsity, n, m, window) = linear_case(20, 19, PATTERNS[0], tokens)
    for bad in ((columns + 19, restore), (columns, restore + 20)):
        with pytest.raises((IndexError, RuntimeError)):
            torch.ops.hinm.linear(*packed, *bad, i, v, sparsity, n, m, window)


def test_what_a_dense_product_sets_up_at_its_first_call_is_set_up_with_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    for module, name in ((torch, "addmm"), (F, "conv2d")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=function: called.append(f(*args)))
    warm_up.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert [out.shape for out in called] == [(8, 8), (1, 1, 1, 1)]
    assert not any(out.is_inference() or out.requires_grad for out in called)
