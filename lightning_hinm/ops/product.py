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

# The CPU takes as many blocks of tokens at a time as gather 2 MiB, in float32, or give 4 MiB, which then stay in the
# caches; one at least. From features it gathers at most 1.5 MiB at a time; from rows all that it can, since there every
# call reads each row anew, up to 16 MiB, beyond which the allocator asks for fresh pages at each call.
BLOCK, BLOCK_NUMBERS, FEATURE_NUMBERS, ROW_NUMBERS = 128, 1 << 19, 3 << 17, 1 << 22
# Below so many numbers, one thread gathers sooner than several are started.
PARALLEL_NUMBERS = 1 << 18


def linear(x: Tensor, operands: LinearOperands) -> Tensor:
    """``activation(F.linear(x, unpack(packed), bias))``: ``[..., I]`` -> ``[..., O]``.

    Nothing is transposed on the way: the product takes its columns from either storage and writes either.
    """
    expansion, columns, restore, bias = tiles(operands), columns_of_x(operands), restored_rows(operands), operands.bias
    tokens, rows = x.reshape(-1, operands.in_features), operands.output_order.shape[0]
    n, packed_rows = tokens.shape[0], expansion.shape[0] * expansion.shape[1]
    out = x.new_empty(rows, n).t() if operands.feature_major else x.new_empty(n, rows)  # [N, O]
    step = _tokens_at_once(expansion, n)
    for first in range(0, n, step):
        block, part = (tokens, out) if n <= step else (tokens[first : first + step], out[first : first + step])
        if rows == packed_rows and not restore.numel():
            _write_product(expansion, block, columns, bias, part)
            continue
        size = (packed_rows, len(block))
        product = x.new_empty(size).t() if operands.feature_major else x.new_empty(size[::-1])  # [n, T * V]
        _write_product(expansion, block, columns, None, product)
        _write(_take_columns(product, restore) if restore.numel() else product[:, :rows], bias, part)
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
    return BLOCK * max(BLOCK_NUMBERS // (BLOCK * count * max(p, height // 2)), 1)


def _write_product(expansion: Tensor, tokens: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``[n, I]`` -> ``out``, ``[n, T * V]``: each tile times the columns that it keeps; both in either storage."""
    count, height, p = expansion.shape
    n = tokens.shape[0]
    most = ROW_NUMBERS if tokens.stride(1) == 1 else FEATURE_NUMBERS
    step = max(most // (p * n), 1) if tokens.device.type == "cpu" else count
    for first in range(0, count, step):
        some, own_columns, own_bias, part = expansion, columns, bias, out
        if step < count:
            some, own_columns = expansion[first : first + step], columns[first * p : (first + step) * p]
            rows = slice(first * height, (first + step) * height)
            own_bias, part = None if bias is None else bias[rows], out[:, rows]
        gathered = _take_columns(tokens, own_columns)  # [n, t * P]
        in_rows = gathered.stride(1) == 1
        gathered = gathered.view(n, -1, p).transpose(0, 1) if in_rows else gathered.t().view(-1, p, n)
        # The product reads either storage as it lies; it is asked for in that of the result.
        if out.stride(1) == 1:
            gathered = gathered if in_rows else gathered.transpose(1, 2)  # [t, n, P]
            product = torch.bmm(gathered, some.transpose(1, 2)).transpose(0, 1)  # [n, t, V]
            _write(product, None if own_bias is None else own_bias.view(-1, height), part.view(n, -1, height))
        else:
            gathered = gathered.transpose(1, 2) if in_rows else gathered  # [t, P, n]
            own_bias = None if own_bias is None else own_bias.view(-1, height, 1)
            _write(torch.bmm(some, gathered), own_bias, part.t().view(-1, height, n))


def _take_columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix[:, columns]``, stored as ``matrix`` is: ``[n, c]``."""
    n = matrix.shape[0]
    if matrix.stride(1) != 1:
        return matrix.t().index_select(0, columns).t()
    if n * columns.shape[0] < PARALLEL_NUMBERS:
        return matrix.index_select(1, columns)
    return matrix.gather(1, columns.expand(n, -1))


def _product_of_columns(expansion: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """``[I, N]`` -> ``[T * V, N]``, likewise."""
    count, _, p = expansion.shape
    gathered = x.index_select(0, columns).view(count, p, -1)
    return torch.bmm(expansion, gathered).flatten(0, 1)


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
