"""The kernels, for any device: gather the kept columns of each tile, one batched product, rows back in their order.

Shapes: O rows, I columns (of one group in a grouped convolution), T tiles of V rows, P kept columns of a tile, N
tokens; B images of L output pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hinm.ops.operands import (
    Conv2dOperands,
    LinearOperands,
    activate,
    columns_of_x,
    new_images,
    restored_rows,
    tiles,
)

# The CPU takes at least a block of tokens at a time, and more of a small layer, so that what comes out of the product
# stays in the caches until it is turned. It gathers at most 1.5 MiB at a time, in float32.
BLOCK, BLOCK_NUMBERS, GATHER_NUMBERS = 128, 1 << 18, 3 << 17
# Rows are turned first, so that whole runs are gathered, unless the tokens are few, or what is gathered is at most so
# many times as much as the rows: then numbers are gathered one by one. The product of few tokens is in rows too.
TIMES, FEW = 2, 8
# Below so many numbers, one thread gathers sooner than several are started.
PARALLEL_NUMBERS = 1 << 18


def linear(x: Tensor, operands: LinearOperands) -> Tensor:
    """``activation(F.linear(x, unpack(packed), bias))``: ``[..., I]`` -> ``[..., O]``."""
    expansion, columns, restore = tiles(operands), columns_of_x(operands), restored_rows(operands)
    bias = None if operands.bias is None else operands.bias[:, None]
    tokens, rows = x.reshape(-1, operands.in_features), operands.output_order.shape[0]
    n = tokens.shape[0]
    out = x.new_empty(rows, n).t() if operands.feature_major else x.new_empty(n, rows)  # [N, O]
    step = _tokens_at_once(expansion, n)
    for first in range(0, n, step):
        product = _product_of_rows(expansion, tokens[first : first + step], columns)  # [T * V, n]
        product = product.index_select(0, restore) if restore.numel() else product[:rows]
        _write(product, bias, out[first : first + step].t())
    return activate(out.reshape(*x.shape[:-1], rows), operands.activation)


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
    new = new_images(x, rows, height, width)
    out = new.reshape(images.shape[0], rows, height, width).flatten(2)
    step = _tokens_at_once(expansion, images.shape[0] * pixels)
    images_step, pixels_step = max(step // pixels, 1), min(step, pixels)
    for first in range(0, images.shape[0], images_step):
        image = _unfold(images[first : first + images_step], operands)  # [b, G * I, L]
        for start in range(0, pixels, pixels_step):
            block = image[:, :, start : start + pixels_step]
            product = _product_of_columns(expansion, block.transpose(0, 1).flatten(1), columns)
            product = product.index_select(0, restore) if restore.numel() else product[:rows]
            product = product.unflatten(1, (-1, block.shape[2])).transpose(0, 1)  # [b, O, l]
            _write(product, bias, out[first : first + images_step, :, start : start + pixels_step])
    return activate(new, operands.activation)


def conv2d_grad(grad: Tensor, operands: Conv2dOperands, x_shape: torch.Size) -> Tensor:
    """The gradient of ``x``: ``[B, O, OH, OW]`` -> ``[B, C, H, W]``, or both without B."""
    images = grad.reshape(-1, grad.shape[-3], grad.shape[-2] * grad.shape[-1])  # [B, O, L]
    gathered = _transposed_product(tiles(operands), images, operands.output_order)  # [B, T * P, L]
    rows = operands.in_channels * operands.kernel_height * operands.kernel_width
    unfolded = grad.new_zeros(images.shape[0], rows, images.shape[2]).index_add(1, columns_of_x(operands), gathered)
    return F.fold(unfolded, x_shape[-2:], **operands.unfolding).reshape(x_shape)


def _tokens_at_once(expansion: Tensor, tokens: int) -> int:
    if expansion.device.type != "cpu":
        return max(tokens, 1)
    count, height, p = expansion.shape
    step = BLOCK_NUMBERS // (count * max(p, height // 2))
    return max(step // 32 * 32 + 16, BLOCK)  # not whole kilobytes, which meet in few places of a cache when turned


def _product_of_rows(expansion: Tensor, tokens: Tensor, columns: Tensor) -> Tensor:
    """``[n, I]`` -> ``[T * V, n]``: each tile times the columns that it keeps."""
    count, _, p = expansion.shape
    n = tokens.shape[0]
    if n > FEW and tokens.stride(0) == 1:
        return _product_of_columns(expansion, tokens.t(), columns)
    if n > FEW and columns.numel() > TIMES * tokens.shape[1]:
        return _product_of_columns(expansion, tokens.t().contiguous(), columns)
    small = n * columns.numel() < PARALLEL_NUMBERS
    gathered = tokens.index_select(1, columns) if small else tokens.gather(1, columns.expand(n, -1))
    gathered = gathered.view(n, count, p)
    if n <= FEW:
        return torch.bmm(gathered.transpose(0, 1), expansion.mT).mT.reshape(-1, n)
    return torch.bmm(expansion, gathered.permute(1, 2, 0)).flatten(0, 1)


def _product_of_columns(expansion: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """``[I, n]`` -> ``[T * V, n]``, likewise."""
    count, height, p = expansion.shape
    n = x.shape[1]
    step = max(GATHER_NUMBERS // (p * n), 1) if x.device.type == "cpu" and n else count
    if step >= count:
        return torch.bmm(expansion, x.index_select(0, columns).view(count, p, n)).flatten(0, 1)
    out = x.new_empty(count, height, n)
    for first in range(0, count, step):
        gathered = x.index_select(0, columns[first * p : (first + step) * p]).view(-1, p, n)
        torch.bmm(expansion[first : first + step], gathered, out=out[first : first + step])
    return out.flatten(0, 1)


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
