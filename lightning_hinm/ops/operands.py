"""What the two ops are called with after ``x``, in the order of their schemas, and what follows from it.

Shapes: O rows, I columns (of one group in a grouped convolution), T tiles of V rows, P kept columns of a tile.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from lightning_hinm import kernels
from lightning_hinm.format import HiNMWeight, expand, unpack_positions
from lightning_hinm.kernels import host
from lightning_hinm.layout import inverse, is_in_order
from lightning_hinm.ops.fragments import arrange, padded_kept, refusal, tile_rows
from lightning_hinm.pattern import HiNMPattern

TENSORS = 9  # of an op's operands, all but ``x``; its numbers follow
EXPANDED = ("expansion", "expansion_metadata", "columns", "restore")
# What an op can do to its result, in place. A kernel knows them by their place here.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_.default, approximate="tanh"),
    "silu": torch.ops.aten.silu_.default,
}


class LinearOperands(NamedTuple):
    """Of ``hinm::linear``; from ``expansion`` to ``restore`` the others decoded for a device (``expand_all``).

    ``feature_major`` asks for a result whose rows lie one after another, ``[O, N]``; its shape is the same.
    """

    values: Tensor
    metadata: Tensor
    vector_index: Tensor
    output_order: Tensor
    bias: Tensor | None
    expansion: Tensor | None
    expansion_metadata: Tensor | None
    columns: Tensor | None
    restore: Tensor | None
    in_features: int
    vector_size: int
    vector_sparsity: float
    n: int
    m: int
    window: int | None
    activation: str = "none"
    feature_major: bool = False

    @property
    def packed(self) -> HiNMWeight:
        """The packed weight."""
        return HiNMWeight(*self[:4], shape=(self.values.shape[0], self.in_features), pattern=pattern_of(self))

    def check(self, x: Tensor) -> None:
        """Refuses an ``x`` that does not fit."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"hinm::linear: x has shape {list(x.shape)}, but its last dimension must be "
                f"in_features={self.in_features}. Check the layer before this one."
            )
        _check_kind("linear", x, self)


class Conv2dOperands(NamedTuple):
    """Of ``hinm::conv2d``."""

    values: Tensor
    metadata: Tensor
    vector_index: Tensor
    output_order: Tensor
    bias: Tensor | None
    expansion: Tensor | None
    expansion_metadata: Tensor | None
    columns: Tensor | None
    restore: Tensor | None
    in_channels: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    padding_height: int
    padding_width: int
    dilation_height: int
    dilation_width: int
    groups: int
    vector_size: int
    vector_sparsity: float
    n: int
    m: int
    window: int | None
    activation: str = "none"

    @property
    def packed(self) -> HiNMWeight:
        """The packed weight."""
        kernel = (self.in_channels // self.groups, self.kernel_height, self.kernel_width)
        return HiNMWeight(*self[:4], shape=(self.values.shape[0], *kernel), pattern=pattern_of(self))

    @property
    def unfolding(self) -> dict[str, tuple[int, int]]:
        """As ``F.unfold`` and ``F.fold`` take it."""
        return {
            "kernel_size": (self.kernel_height, self.kernel_width),
            "dilation": (self.dilation_height, self.dilation_width),
            "padding": (self.padding_height, self.padding_width),
            "stride": (self.stride_height, self.stride_width),
        }

    def check(self, x: Tensor) -> tuple[int, int]:
        """The output's height and width; refuses an ``x`` that does not fit."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"hinm::conv2d: x has shape {list(x.shape)}, but it must be [C, H, W] or [B, C, H, W] with "
                f"C = in_channels={self.in_channels}. Check the layer before this one."
            )
        _check_kind("conv2d", x, self)
        height, width = x.shape[-2] + 2 * self.padding_height, x.shape[-1] + 2 * self.padding_width
        reach = self.dilation_height * (self.kernel_height - 1) + 1, self.dilation_width * (self.kernel_width - 1) + 1
        if height < reach[0] or width < reach[1]:
            raise ValueError(
                f"hinm::conv2d: x is {height} x {width} with its padding, but the kernel with its dilation is "
                f"{reach[0]} x {reach[1]}. Pass a larger image."
            )
        return (height - reach[0]) // self.stride_height + 1, (width - reach[1]) // self.stride_width + 1

    def as_linear(self, x: Tensor) -> tuple[Tensor, LinearOperands] | None:
        """The same of rows of channels, ``[B, OH, OW, C]``, if ``x`` lies so and each weight meets one pixel."""
        pixel = (self.kernel_height, self.kernel_width, self.padding_height, self.padding_width) == (1, 1, 0, 0)
        if not pixel or self.groups != 1 or not is_channels_last(x):
            return None
        pixels = x[:, :, :: self.stride_height, :: self.stride_width].permute(0, 2, 3, 1)
        shared = {name: getattr(self, name) for name in LinearOperands._fields if hasattr(self, name)}
        return pixels, LinearOperands(in_features=self.in_channels, **shared)


Operands = LinearOperands | Conv2dOperands


def is_channels_last(x: Tensor) -> bool:
    """Whether ``F.conv2d`` takes images for channels last."""
    return x.dim() == 4 and suggest_memory_format(x) == torch.channels_last


def new_images(x: Tensor, rows: int, height: int, width: int) -> Tensor:
    """Not filled; stored as ``F.conv2d`` stores its result, of which whoever reads it may take views: as ``x`` is."""
    if is_channels_last(x):
        return x.new_empty(x.shape[0], height, width, rows).permute(0, 3, 1, 2)
    return x.new_empty(*x.shape[:-3], rows, height, width)


def pattern_of(operands: Operands) -> HiNMPattern:
    """The pattern of the weight."""
    return _pattern(operands.vector_size, operands.vector_sparsity, operands.n, operands.m, operands.window)


_pattern = functools.lru_cache(maxsize=64)(HiNMPattern)


def activate_(out: Tensor, activation: str) -> Tensor:
    """``out`` through the function of that name, in place: it was computed for this alone."""
    function = ACTIVATIONS[activation]
    return out if function is None else function(out)


def groups_of(operands: Operands) -> int:
    """Channel groups of a convolution; 1 for a matrix."""
    return operands.groups if isinstance(operands, Conv2dOperands) else 1


def tiles(operands: Operands) -> Tensor:
    """The dense expansion that was passed, else decoded now. ``[T, V, P]``."""
    expansion = operands.expansion
    if expansion is None or holds_positions(expansion):
        return expand(operands.packed)
    if operands.expansion_metadata is None:
        return expansion
    return expand(operands.packed).to(expansion.dtype)  # which autocast may cast


def holds_positions(expansion: Tensor) -> bool:
    """Whether an expansion is what the compiled product of a CPU reads beside the values, not the values themselves."""
    return expansion.dtype == torch.uint8


def columns_of_x(operands: Operands) -> Tensor:
    """The column of ``x`` that each kept vector multiplies, decoded now if it was not passed: int64 ``[T * P]``."""
    if operands.columns is not None and operands.expansion_metadata is None:
        return operands.columns
    packed = operands.packed
    return decode_columns(packed.vector_index, math.prod(packed.shape[1:]), operands.m, groups_of(operands))


def restored_rows(operands: Operands) -> Tensor:
    """The row of the product that each output channel is, decoded now if it was not passed: ``[O]``."""
    if operands.restore is not None and operands.expansion_metadata is None:
        return operands.restore
    return inverse(operands.output_order.to(torch.int64))


def no_kernel(packed: HiNMWeight) -> str | None:
    """Why no kernel runs that weight where it is; None if one does."""
    device, in_features = packed.values.device, math.prod(packed.shape[1:])
    return kernels.refusal(device) or refusal(packed.pattern, in_features, packed.values.dtype)


def form_of(packed: HiNMWeight) -> str:
    """What ``expand_all`` makes of a packed weight; where the best is not to be had, a warning says so once.

    ``"fragments"`` for GPU kernels, ``"positions"`` for the product that is compiled for the CPU, else ``"tiles"``.
    """
    values, pattern = packed.values, packed.pattern
    if values.is_meta:
        return "tiles"
    reason = no_kernel(packed)
    if reason is None:
        return "fragments"
    if values.device.type == "cuda":
        warn_once(f"hinm: no kernel for a packed layer: {reason}. It gathers and calls a dense product instead.")
    taken = values.dtype in host.ENTRIES and pattern.n < pattern.m and host.held(pattern.m) > 0
    if values.device.type != "cpu" or not taken:
        return "tiles"
    reason = host.refusal()
    if reason is not None and not host.is_off():
        warn_once(
            f"hinm: sparse layers run slowly on this CPU: {reason}. Install a C++ compiler with OpenMP, or set "
            f"{host.SWITCH}=off to say that this is meant."
        )
    return "positions" if reason is None else "tiles"


def expand_all(packed: HiNMWeight, *, groups: int = 1, form: str | None = None) -> dict[str, Tensor | None]:
    """What the ops need of a packed weight, decoded for its device: cached by the layers, and passed as operands.

    Where the GPU kernels run, these are the fragments (``fragments.Fragments``), and ``expansion_metadata`` is not
    None. Everywhere else it is None, and the others are as below.

    Args:
        packed: the weight.
        groups: channel groups of a convolution.
        form: as ``form_of`` names it, which is asked if it is None.

    Returns:
        ``expansion``, ``[T, V, P]``, or where the product is compiled for the CPU uint8 ``[O, K]``, the place of each
        value among the kept vectors that are gathered with its own (``kernels.host.held``); ``columns``, int64
        ``[T * P]``, the column of ``x`` that each kept vector multiplies; ``restore``, int64 ``[O]``, the row of the
        product that each output channel is, or empty where the rows are packed in the order of the channels.
    """
    in_features, values, form = math.prod(packed.shape[1:]), packed.values, form or form_of(packed)
    if form == "fragments":
        if values.device.type == "cuda":
            kernels.prepare(values.device)  # now: while a CUDA graph is captured, nothing can be loaded
            warm_up(values.device, values.dtype)
        return dict(zip(EXPANDED, arrange(packed), strict=True))
    columns = decode_columns(packed.vector_index, in_features, packed.pattern.m, groups)
    order = packed.output_order.to(torch.int64)
    restore = order.new_empty(0) if is_in_order(packed.output_order) else inverse(order)
    expansion = decode_positions(packed) if form == "positions" else expand(packed)
    return dict(zip(EXPANDED, (expansion, None, columns, restore), strict=True))


@functools.cache
def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """A dense product of each kind: what a BLAS sets up at its first call cannot be set up in a capture either."""
    with torch.inference_mode(False), torch.no_grad():
        one = torch.ones(8, 8, dtype=dtype, device=device)
        torch.addmm(one[0], one, one)
        F.conv2d(one[None, None], one[None, None])


def decode_positions(packed: HiNMWeight) -> Tensor:
    """The place of each value among the kept vectors that a tile gathers at a time: uint8 ``[O, K]``."""
    m = packed.pattern.m
    groups = packed.vector_index.shape[1] // m
    first = torch.arange(groups, device=packed.metadata.device) % (host.held(m) // m) * m
    return (unpack_positions(packed) + first.to(torch.uint8).unsqueeze(1)).flatten(1)


@functools.cache
def warn_once(message: str) -> None:
    """A warning that is given once in a process."""
    warnings.warn(message, stacklevel=2)


def expanded_bytes(packed: HiNMWeight) -> int:
    """Bytes of what ``expand_all`` makes of a matrix or of a convolution's weight, without making it."""
    pattern, in_features, values = packed.pattern, math.prod(packed.shape[1:]), packed.values
    rows = packed.vector_index.shape[0] * pattern.vector_size
    form = form_of(packed)
    if form == "fragments":
        kept = padded_kept(pattern, in_features)
        return rows * kept * 9 // 8 + rows // tile_rows(pattern) * kept * 2 + rows * 4
    restore = 0 if is_in_order(packed.output_order) else packed.shape[0] * 8
    numbers = values.numel() if form == "positions" else rows * packed.vector_index.shape[1] * values.element_size()
    return numbers + packed.vector_index.numel() * 8 + restore


def decode_columns(vector_index: Tensor, in_features: int, m: int, groups: int = 1) -> Tensor:
    """The column of ``x`` that each kept vector multiplies: int64 ``[T * P]``.

    The values of virtual columns are zero, so any real column may stand for them.
    """
    columns = vector_index.to(torch.int64)
    if in_features % m:
        columns = columns.clamp(max=in_features - 1)
    if groups > 1:
        group = torch.arange(groups, device=columns.device).repeat_interleave(columns.shape[0] // groups)
        columns = columns + in_features * group.unsqueeze(1)
    return columns.flatten()


def cast(operands: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """``operands`` with the floating-point tensors that an op computes with in ``dtype``, as autocast has it."""
    values, metadata, vector_index, output_order, bias, expansion, *rest = operands

    def lower(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

    if expansion is None or holds_positions(expansion):
        values = lower(values)
    else:
        expansion = lower(expansion)
    return values, metadata, vector_index, output_order, lower(bias), expansion, *rest


def _check_kind(op: str, x: Tensor, operands: Operands) -> None:
    if operands.activation not in ACTIVATIONS:
        raise ValueError(f"hinm::{op}: activation={operands.activation!r} must be one of {', '.join(ACTIVATIONS)}.")
    decoded = operands.expansion
    weight = operands.values if decoded is None or holds_positions(decoded) else decoded
    if x.dtype != weight.dtype:
        raise TypeError(
            f"hinm::{op}: x is {x.dtype}, but the packed weight is {weight.dtype}. Cast x, or convert the layer with "
            f".to({x.dtype})."
        )
    if x.device != weight.device:
        raise ValueError(
            f"hinm::{op}: x is on {x.device}, but the packed weight is on {weight.device}. Move one of them with .to()."
        )
    bias, rows = operands.bias, operands.output_order.shape[0]
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device or bias.shape != (rows,)):
        raise ValueError(
            f"hinm::{op}: bias is {bias.dtype} {list(bias.shape)} on {bias.device}, but must be {x.dtype} [{rows}] on "
            f"{x.device}, as x is. Convert the layer with .to()."
        )
