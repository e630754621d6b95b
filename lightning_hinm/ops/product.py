"""The kernels, for any device: gather the kept columns of each tile, one batched product, rows back in their order.

Shapes: O rows, I columns (of one group in a grouped convolution), T tiles of V rows, P kept columns of a tile, N
tokens; B images of L output pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hinm.ops.operands import Conv2dOperands, LinearOperands, activate, columns_of_x, restored_rows, tiles

# Numbers that the CPU gathers at a time. From rows, 16 MiB in float32: for more the allocator asks for fresh pages at
# each call. From columns, 2 MiB: they stay in the caches until the product reads them.
ROW_NUMBERS, COLUMN_NUMBERS = 1 << 22, 1 << 19
# Below so many numbers, one thread gathers sooner than several are started.
PARALLEL_NUMBERS = 1 << 18
# The CPU transposes so many tokens or more, where each of their columns is gathered more often than so on average:
# what is gathered are then runs of memory, and not single numbers.
TRANSPOSE_TOKENS, TRANSPOSE_GATHERS = 16, 8
# A product of columns whose number is not a multiple of this one takes up to twice as long on the CPU.
WIDTH = 8


def linear(x: Tensor, operands: LinearOperands) -> Tensor:
    """``activation(F.linear(x, unpack(packed), bias))``: ``[..., I]`` -> ``[..., O]``."""
    expansion, columns, restore = tiles(operands), columns_of_x(operands), restored_rows(operands)
    tokens = x.reshape(-1, operands.in_features)  # [N, I]
    out = x.new_empty(tokens.shape[0], operands.output_order.shape[0])  # [N, O]
    few = tokens.shape[0] < TRANSPOSE_TOKENS or columns.shape[0] < TRANSPOSE_GATHERS * operands.in_features
    rows = few or x.device.type != "cpu"
    step = _tokens_at_once(expansion, tokens.shape[0], ROW_NUMBERS if rows else COLUMN_NUMBERS)
    for first in range(0, tokens.shape[0], step):
        block, part = tokens[first : first + step], out[first : first + step]
        if rows:
            _write_rows(_product_of_rows(expansion, block, columns), restore, operands.bias, part)
        else:
            padded = F.pad(block, (0, 0, 0, -len(block) % WIDTH)) if len(block) % WIDTH else block
            product = _product_of_columns(expansion, padded.t().contiguous(), columns)
            product = product.index_select(0, restore) if restore.numel() else product[: out.shape[1]]
            _write(product[:, : len(block)].t(), operands.bias, part)
    return activate(out.reshape(*x.shape[:-1], out.shape[1]), operands.activation)


def linear_grad(grad: Tensor, operands: LinearOperands) -> Tensor:
    """The gradient of ``x``: ``[..., O]`` -> ``[..., I]``."""
    rows = grad.reshape(-1, grad.shape[-1]).t()  # [O, N]
    gathered = _transposed_product(tiles(operands), rows.unsqueeze(0), operands.output_order)[0]  # [T * P, N]
    grad_x = grad.new_zeros(operands.in_features, rows.shape[1]).index_add(0, columns_of_x(operands), gathered)
    return grad_x.t().reshape(*grad.shape[:-1], operands.in_features)


def conv2d(x: Tensor, operands: Conv2dOperands, size: tuple[int, int]) -> Tensor:
    """``activation(F.conv2d(x, unpack(packed), ...))``: ``[B, C, H, W]`` -> ``[B, O, *size]``, or both without B."""
    height, width = size
    expansion, columns, restore = tiles(operands), columns_of_x(operands), restored_rows(operands)
    bias = None if operands.bias is None else operands.bias[:, None]
    images, pixels = x.reshape(-1, *x.shape[-3:]), height * width
    rows = operands.output_order.shape[0]
    out = x.new_empty(images.shape[0], rows, pixels)  # [B, O, L]
    step = _tokens_at_once(expansion, images.shape[0] * pixels, COLUMN_NUMBERS)
    images_step, pixels_step = max(step // pixels, 1), min(step, pixels)
    for first in range(0, images.shape[0], images_step):
        image = _unfold(images[first : first + images_step], operands)  # [b, G * I, L]
        for start in range(0, pixels, pixels_step):
            block = image[:, :, start : start + pixels_step]
            product = _product_of_columns(expansion, block.transpose(0, 1).flatten(1), columns)
            product = product.index_select(0, restore) if restore.numel() else product[:rows]
            product = product.unflatten(1, (-1, block.shape[2])).transpose(0, 1)  # [b, O, l]
            _write(product, bias, out[first : first + images_step, :, start : start + pixels_step])
    return activate(out.reshape(*x.shape[:-3], rows, height, width), operands.activation)


def conv2d_grad(grad: Tensor, operands: Conv2dOperands, x_shape: torch.Size) -> Tensor:
    """The gradient of ``x``: ``[B, O, OH, OW]`` -> ``[B, C, H, W]``, or both without B."""
    images = grad.reshape(-1, grad.shape[-3], grad.shape[-2] * grad.shape[-1])  # [B, O, L]
    gathered = _transposed_product(tiles(operands), images, operands.output_order)  # [B, T * P, L]
    rows = operands.in_channels * operands.kernel_height * operands.kernel_width
    unfolded = grad.new_zeros(images.shape[0], rows, images.shape[2]).index_add(1, columns_of_x(operands), gathered)
    return F.fold(unfolded, x_shape[-2:], **operands.unfolding).reshape(x_shape)


def _tokens_at_once(expansion: Tensor, tokens: int, numbers: int) -> int:
    if expansion.device.type != "cpu":
        return max(tokens, 1)
    # At least V, since a product of [V, P] and [P, N] has to lay out [V, P] first; 128 against the calls.
    return max(numbers // (expansion.shape[0] * expansion.shape[2]), expansion.shape[1], 128)


def _product_of_rows(expansion: Tensor, tokens: Tensor, columns: Tensor) -> Tensor:
    """``[N, I]`` -> ``[N, T, V]``: each tile times the columns that it keeps."""
    count, _, p = expansion.shape
    n = tokens.shape[0]
    if n * columns.shape[0] < PARALLEL_NUMBERS:
        gathered = tokens.index_select(1, columns)
    else:
        gathered = tokens.gather(1, columns.expand(n, -1))
    gathered = gathered.view(n, count, p).transpose(0, 1)  # [T, N, P]
    return torch.bmm(gathered, expansion.transpose(1, 2)).transpose(0, 1)


def _product_of_columns(expansion: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """``[I, N]`` -> ``[T * V, N]``, likewise."""
    count, _, p = expansion.shape
    gathered = x.index_select(0, columns).view(count, p, -1)
    return torch.bmm(expansion, gathered).flatten(0, 1)


def _write_rows(product: Tensor, restore: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``[N, T, V]`` -> ``out``, ``[N, O]``: in one pass where nothing is restored, and no row is virtual."""
    if restore.numel():
        torch.index_select(product.flatten(1), 1, restore, out=out)
        if bias is not None:
            out.add_(bias)
    elif out.shape[1] == product.shape[1] * product.shape[2]:
        size = product.shape[1:]
        _write(product, None if bias is None else bias.view(size), out.unflatten(1, size))
    else:
        _write(product.flatten(1)[:, : out.shape[1]], bias, out)


def _write(product: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        out.copy_(product)
    else:
        torch.add(product, bias, out=out)


def _transposed_product(expansion: Tensor, grad: Tensor, output_order: Tensor) -> Tensor:
    """The gradient of what was gathered: ``[B, O, L]`` -> ``[B, T * P, L]``."""
    rows = grad.index_select(1, output_order.to(torch.int64))
    rows = F.pad(rows, (0, 0, 0, -rows.shape[1] % expansion.shape[1])).unflatten(1, expansion.shape[:2])  # [B, T, V, L]
    return torch.matmul(expansion.transpose(1, 2), rows).flatten(1, 2)


def _unfold(x: Tensor, operands: Conv2dOperands) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, C * kh * kw, L]``; a 1 x 1 kernel needs no copy."""
    if (operands.kernel_height, operands.kernel_width) != (1, 1):
        return F.unfold(x, **operands.unfolding)
    high, wide = operands.padding_height, operands.padding_width
    if (high, wide) != (0, 0):
        x = F.pad(x, (wide, wide, high, high))
    return x[:, :, :: operands.stride_height, :: operands.stride_width].flatten(2)
