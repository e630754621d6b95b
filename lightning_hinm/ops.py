"""``torch.ops.hinm.linear`` and ``torch.ops.hinm.conv2d``: one schema, a fake, a kernel and a derivative each.

The kernel below is the specification, for any device: gather the kept columns of each tile, one batched product with
the expanded tiles, rows back in their original order.

Shapes: O rows, I columns (of one group in a grouped convolution), T tiles of V rows, P kept columns of a tile, N
tokens; B images of L output pixels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hinm.format import HiNMWeight, expand
from lightning_hinm.layout import inverse
from lightning_hinm.pattern import HiNMPattern

# Numbers that the CPU gathers at a time, 2 MiB in float32: they stay in the caches, and the allocator keeps the memory.
BLOCK_NUMBERS = 1 << 19
# A number that is transposed, or a run that is gathered, is taken to cost as much as five numbers gathered one at a
# time: a rough figure, which only decides between two ways that are close to each other where it is wrong.
GATHERS = 5

_LIBRARY = torch.library.Library("hinm", "DEF")
_PACKED = (
    "Tensor values, Tensor metadata, Tensor vector_index, Tensor output_order, Tensor? bias, Tensor? expansion, "
    "Tensor? columns, Tensor? restore"
)
_PATTERN = "int vector_size, int n, int m"
# Both kernels take an input of any strides and return a contiguous tensor of its own.
_LIBRARY.define(f"linear(Tensor x, {_PACKED}, int in_features, {_PATTERN}) -> Tensor")
_LIBRARY.define(
    f"conv2d(Tensor x, {_PACKED}, int in_channels, int kernel_height, int kernel_width, int stride_height, "
    "int stride_width, int padding_height, int padding_width, int dilation_height, int dilation_width, int groups, "
    f"{_PATTERN}) -> Tensor"
)


def _linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    vector_index: Tensor,
    output_order: Tensor,
    bias: Tensor | None,
    expansion: Tensor | None,
    columns: Tensor | None,
    restore: Tensor | None,
    in_features: int,
    vector_size: int,
    n: int,
    m: int,
) -> Tensor:
    """``F.linear(x, unpack(packed), bias)``: ``[..., I]`` -> ``[..., O]``."""
    _check_linear(x, values, expansion, in_features)
    tiles = _expansion(values, metadata, vector_index, output_order, expansion, vector_size, n, m)
    columns = _columns_of_x(vector_index, in_features, m) if columns is None else columns
    restore = _restore(output_order) if restore is None else restore
    tokens = x.reshape(-1, in_features)  # [N, I]
    out = x.new_empty(tokens.shape[0], restore.shape[0])  # [N, O]
    if x.device.type == "cpu" and tokens.shape[0] * columns.numel() <= GATHERS * (tokens.numel() + columns.numel()):
        _write(_product_of_few(tiles, tokens, columns, restore), bias, out)
        return out.reshape(*x.shape[:-1], restore.shape[0])
    step = _tokens_at_once(tiles, tokens.shape[0])
    scratch = _Scratch(x, reused=tokens.shape[0] > step)
    for first in range(0, tokens.shape[0], step):
        block = _transpose(tokens[first : first + step], scratch)
        _write(_product(tiles, block, columns, restore, scratch).t(), bias, out[first : first + step])
    return out.reshape(*x.shape[:-1], restore.shape[0])


def _linear_fake(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    vector_index: Tensor,
    output_order: Tensor,
    bias: Tensor | None,
    expansion: Tensor | None,
    columns: Tensor | None,
    restore: Tensor | None,
    in_features: int,
    vector_size: int,
    n: int,
    m: int,
) -> Tensor:
    _check_linear(x, values, expansion, in_features)
    return x.new_empty(*x.shape[:-1], output_order.shape[0])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of ``x`` and ``bias``; a packed weight takes no gradient."""
    values, metadata, vector_index, output_order, expansion = ctx.saved_tensors
    in_features, vector_size, n, m = ctx.geometry
    grad_x = grad_bias = None
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)  # [N, O]
    if ctx.needs_input_grad[0]:
        tiles = _expansion(values, metadata, vector_index, output_order, expansion, vector_size, n, m)
        gathered = _transposed_product(tiles, rows.t().unsqueeze(0), output_order)  # [1, T * P, N]
        columns = _columns_of_x(vector_index, in_features, m)
        grad_x = grad.new_zeros(in_features, rows.shape[0]).index_add(0, columns, gathered[0]).t()
        grad_x = grad_x.reshape(*grad.shape[:-1], in_features)
    if ctx.needs_input_grad[5]:
        grad_bias = rows.sum(dim=0)
    return grad_x, *[None] * 4, grad_bias, *[None] * 7


def _conv2d(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    vector_index: Tensor,
    output_order: Tensor,
    bias: Tensor | None,
    expansion: Tensor | None,
    columns: Tensor | None,
    restore: Tensor | None,
    in_channels: int,
    kernel_height: int,
    kernel_width: int,
    stride_height: int,
    stride_width: int,
    padding_height: int,
    padding_width: int,
    dilation_height: int,
    dilation_width: int,
    groups: int,
    vector_size: int,
    n: int,
    m: int,
) -> Tensor:
    """``F.conv2d(x, unpack(packed), bias, ...)``: ``[B, C, H, W]`` -> ``[B, O, OH, OW]``, or both without B."""
    kernel, stride = (kernel_height, kernel_width), (stride_height, stride_width)
    padding, dilation = (padding_height, padding_width), (dilation_height, dilation_width)
    height, width = _check_conv2d(x, values, expansion, in_channels, kernel, stride, padding, dilation)
    tiles = _expansion(values, metadata, vector_index, output_order, expansion, vector_size, n, m)
    if columns is None:
        columns = _columns_of_x(vector_index, in_channels // groups * kernel_height * kernel_width, m, groups)
    restore = _restore(output_order) if restore is None else restore
    images = x.reshape(-1, *x.shape[-3:])
    pixels = height * width
    out = x.new_empty(images.shape[0], restore.shape[0], pixels)  # [B, O, L]
    bias = None if bias is None else bias[:, None]
    step = _tokens_at_once(tiles, images.shape[0] * pixels)
    scratch = _Scratch(x, reused=images.shape[0] * pixels > step)
    images_step, pixels_step = max(step // pixels, 1), min(step, pixels)
    for first in range(0, images.shape[0], images_step):
        image = _unfold(images[first : first + images_step], kernel, stride, padding, dilation)  # [b, G * I, L]
        for start in range(0, pixels, pixels_step):
            block = image[:, :, start : start + pixels_step]
            product = _product(tiles, block.transpose(0, 1).flatten(1), columns, restore, scratch)
            product = product.unflatten(1, (-1, block.shape[2])).transpose(0, 1)  # [b, O, l]
            _write(product, bias, out[first : first + images_step, :, start : start + pixels_step])
    return out.reshape(*x.shape[:-3], restore.shape[0], height, width)


def _conv2d_fake(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    vector_index: Tensor,
    output_order: Tensor,
    bias: Tensor | None,
    expansion: Tensor | None,
    columns: Tensor | None,
    restore: Tensor | None,
    in_channels: int,
    kernel_height: int,
    kernel_width: int,
    stride_height: int,
    stride_width: int,
    padding_height: int,
    padding_width: int,
    dilation_height: int,
    dilation_width: int,
    groups: int,
    vector_size: int,
    n: int,
    m: int,
) -> Tensor:
    kernel, stride = (kernel_height, kernel_width), (stride_height, stride_width)
    padding, dilation = (padding_height, padding_width), (dilation_height, dilation_width)
    height, width = _check_conv2d(x, values, expansion, in_channels, kernel, stride, padding, dilation)
    return x.new_empty(*x.shape[:-3], output_order.shape[0], height, width)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of ``x`` and ``bias``; a packed weight takes no gradient."""
    values, metadata, vector_index, output_order, expansion = ctx.saved_tensors
    in_channels, kh, kw, sh, sw, ph, pw, dh, dw, groups, vector_size, n, m = ctx.geometry
    grad_x = grad_bias = None
    images = grad.flatten(-2) if grad.dim() == 4 else grad.flatten(-2).unsqueeze(0)  # [B, O, L]
    if ctx.needs_input_grad[0]:
        tiles = _expansion(values, metadata, vector_index, output_order, expansion, vector_size, n, m)
        gathered = _transposed_product(tiles, images, output_order)  # [B, T * P, L]
        columns = _columns_of_x(vector_index, in_channels // groups * kh * kw, m, groups)
        unfolded = grad.new_zeros(images.shape[0], in_channels * kh * kw, images.shape[2])
        unfolded = unfolded.index_add(1, columns, gathered)
        size = ctx.x_shape[-2:]
        grad_x = F.fold(unfolded, size, (kh, kw), (dh, dw), (ph, pw), (sh, sw)).reshape(ctx.x_shape)
    if ctx.needs_input_grad[5]:
        grad_bias = images.sum(dim=(0, 2))
    return grad_x, None, None, None, None, grad_bias, *[None] * 16


class _Scratch:
    """Memory for the intermediate results of one call, used again by each block: fresh pages cost as much as work."""

    def __init__(self, like: Tensor, *, reused: bool) -> None:
        self._like, self._reused = like, reused
        self._flat: dict[str, Tensor] = {}

    def empty(self, name: str, *shape: int) -> Tensor | None:
        """For ``out=``; None, which lets the callee allocate, where there is but one block."""
        if not self._reused:
            return None
        count = math.prod(shape)
        if name not in self._flat:  # the first block is the largest
            self._flat[name] = self._like.new_empty(count)
        return self._flat[name][:count].view(shape)


def _tokens_at_once(tiles: Tensor, tokens: int) -> int:
    """Columns of the product that are computed together."""
    if tiles.device.type != "cpu":
        return max(tokens, 1)
    # At least V, since a product of [V, P] and [P, N] has to lay out [V, P] first; 128 against the calls.
    return max(BLOCK_NUMBERS // (tiles.shape[0] * tiles.shape[2]), tiles.shape[1], 128)


def _transpose(tokens: Tensor, scratch: _Scratch) -> Tensor:
    """``[N, I]`` -> ``[I, N]``: a column becomes one run of memory."""
    out = scratch.empty("block", tokens.shape[1], tokens.shape[0])
    return tokens.t().contiguous() if out is None else out.copy_(tokens.t())


def _product(tiles: Tensor, columns: Tensor, kept: Tensor, restore: Tensor, scratch: _Scratch) -> Tensor:
    """``[T, V, P]`` times the kept rows of ``[I, N]``, in the original order: ``[O, N]``; virtual rows drop out."""
    (count, v, p), n = tiles.shape, columns.shape[1]
    gathered = torch.index_select(columns, 0, kept, out=scratch.empty("gathered", count * p, n))
    product = torch.bmm(tiles, gathered.view(count, p, n), out=scratch.empty("product", count, v, n))
    return torch.index_select(product.flatten(0, 1), 0, restore, out=scratch.empty("ordered", restore.shape[0], n))


def _product_of_few(tiles: Tensor, tokens: Tensor, kept: Tensor, restore: Tensor) -> Tensor:
    """The same from ``[N, I]`` to ``[N, O]``: no transpose, and a product that reads the tiles as they lie."""
    gathered = tokens.index_select(1, kept).unflatten(1, (tiles.shape[0], tiles.shape[2])).transpose(0, 1)  # [T, N, P]
    product = torch.bmm(gathered, tiles.transpose(1, 2))  # [T, N, V]
    return product.transpose(0, 1).flatten(1).index_select(1, restore)


def _transposed_product(tiles: Tensor, grad: Tensor, output_order: Tensor) -> Tensor:
    """The gradient of what ``_product`` gathered: ``[B, O, L]`` -> ``[B, T * P, L]``."""
    rows = grad.index_select(1, output_order.to(torch.int64))
    rows = F.pad(rows, (0, 0, 0, -rows.shape[1] % tiles.shape[1])).unflatten(1, tiles.shape[:2])  # [B, T, V, L]
    return torch.matmul(tiles.transpose(1, 2), rows).flatten(1, 2)


def _write(product: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        out.copy_(product)
    else:
        torch.add(product, bias, out=out)


def expand_all(packed: HiNMWeight, *, groups: int = 1) -> dict[str, Tensor]:
    """What the ops need of a packed weight, decoded: cached by the layers, and passed as arguments.

    Returns:
        ``expansion``, ``[T, V, P]``; ``columns``, int32 ``[T * P]``, the column of ``x`` that each kept vector
        multiplies; ``restore``, int32 ``[O]``, the row of the product that each output channel is.
    """
    in_features = math.prod(packed.shape[1:])
    columns = _columns_of_x(packed.vector_index, in_features, packed.pattern.m, groups)
    restore = _restore(packed.output_order)
    return {"expansion": expand(packed), "columns": columns.to(torch.int32), "restore": restore.to(torch.int32)}


def _restore(output_order: Tensor) -> Tensor:
    """The row of the product that each output channel is: int64 ``[O]``."""
    return inverse(output_order.to(torch.int64))


def _columns_of_x(vector_index: Tensor, in_features: int, m: int, groups: int = 1) -> Tensor:
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


def _expansion(
    values: Tensor,
    metadata: Tensor,
    vector_index: Tensor,
    output_order: Tensor,
    expansion: Tensor | None,
    vector_size: int,
    n: int,
    m: int,
) -> Tensor:
    """The expansion that was passed, else decoded now. ``[T, V, P]``."""
    if expansion is not None:
        return expansion
    pattern = HiNMPattern(vector_size, 0.0, n, m, None)  # decoding asks only for V, n and m
    shape = (values.shape[0], vector_index.shape[1])
    return expand(HiNMWeight(values, metadata, vector_index, output_order, shape, pattern))


def _unfold(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, C * kh * kw, L]``; a 1 x 1 kernel needs no copy."""
    if kernel != (1, 1):
        return F.unfold(x, kernel, dilation, padding, stride)
    if padding != (0, 0):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    return x[:, :, :: stride[0], :: stride[1]].flatten(2)


def _check_linear(x: Tensor, values: Tensor, expansion: Tensor | None, in_features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"hinm::linear: x has shape {list(x.shape)}, but its last dimension must be in_features={in_features}. "
            "Check the layer before this one."
        )
    _check_kind("linear", x, values if expansion is None else expansion)


def _check_conv2d(
    x: Tensor,
    values: Tensor,
    expansion: Tensor | None,
    in_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """The output's height and width."""
    if x.dim() not in (3, 4) or x.shape[-3] != in_channels:
        raise ValueError(
            f"hinm::conv2d: x has shape {list(x.shape)}, but it must be [C, H, W] or [B, C, H, W] with "
            f"C = in_channels={in_channels}. Check the layer before this one."
        )
    _check_kind("conv2d", x, values if expansion is None else expansion)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padded = [size + 2 * p for size, p in zip(x.shape[-2:], padding, strict=True)]
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ValueError(
            f"hinm::conv2d: x is {padded[0]} x {padded[1]} with its padding, but the kernel with its dilation is "
            f"{reach[0]} x {reach[1]}. Pass a larger image."
        )
    return (padded[0] - reach[0]) // stride[0] + 1, (padded[1] - reach[1]) // stride[1] + 1


def _check_kind(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dtype != weight.dtype:
        raise TypeError(
            f"hinm::{op}: x is {x.dtype}, but the packed weight is {weight.dtype}. Cast x, or convert the layer with "
            f".to({x.dtype})."
        )
    if x.device != weight.device:
        raise ValueError(
            f"hinm::{op}: x is on {x.device}, but the packed weight is on {weight.device}. Move one of them with .to()."
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, metadata, vector_index, output_order, _, expansion, _, _, *geometry = inputs
    ctx.save_for_backward(values, metadata, vector_index, output_order, expansion)
    ctx.geometry, ctx.x_shape = geometry, x.shape


def _autocast(op: Any, device: str) -> Any:
    """Under autocast ``x``, weight and bias take its dtype, as those of ``F.linear`` and ``F.conv2d`` do."""

    def cast_and_call(
        x: Tensor,
        values: Tensor,
        metadata: Tensor,
        vector_index: Tensor,
        output_order: Tensor,
        bias: Tensor | None,
        expansion: Tensor | None,
        *indices_and_geometry: Any,
    ) -> Tensor:
        lower = torch.get_autocast_dtype(device)

        def cast(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(lower)

        with torch.autocast(device, enabled=False):
            return op(
                cast(x),
                values if expansion is not None else cast(values),
                metadata,
                vector_index,
                output_order,
                cast(bias),
                cast(expansion),
                *indices_and_geometry,
            )

    return cast_and_call


for _name, _kernel, _fake, _backward in (
    ("linear", _linear, _linear_fake, _linear_backward),
    ("conv2d", _conv2d, _conv2d_fake, _conv2d_backward),
):
    for _device in ("cpu", "cuda"):
        _LIBRARY.impl(_name, _kernel, _device.upper())
        _autocast_kernel = _autocast(getattr(torch.ops.hinm, _name).default, _device)
        _LIBRARY.impl(_name, _autocast_kernel, f"Autocast{_device.upper()}")
    torch.library.register_fake(f"hinm::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"hinm::{_name}", _backward, setup_context=_setup_context, lib=_LIBRARY)

# The overloads themselves: a call through ``torch.ops.hinm.linear`` resolves them anew.
hinm_linear = torch.ops.hinm.linear.default
hinm_conv2d = torch.ops.hinm.conv2d.default
