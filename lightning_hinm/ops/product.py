"""The ops on any device, by torch alone: gather the kept columns, one batched product, rows back in their order.

Shapes: O rows, I columns (of one group in a grouped convolution), T tiles of V rows, P kept columns of a tile, N
tokens; B images of L output pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hinm.ops.operands import (
    Conv2dOperands,
    LinearOperands,
    activate_,
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
    return activate_(out.reshape(*x.shape[:-1], rows), operands.activation)


def linear_grad(grad: Tensor, operands: LinearOperands) -> Tensor:
    """The gradient of ``x``: ``[..., O]`` -> ``[..., I]``."""
    rows = grad.reshape(-1, grad.shape[-1]).t()  # [O, N]
    gathered = _transposed_product(tiles(operands), rows.unsqueeze(0), operands.output_order)[0]  # [T * P, N]
    grad_x = grad.new_zeros(operands.in_features, rows.shape[1]).index_add(0, columns_of_x(operands), gathered)
    return grad_x.t().reshape(*grad.shape[:-1], operands.in_features)


def conv2d(x: Tensor, operands: Conv2dOperands, size: tuple[int, int]) -> Tensor:
    """``activation(F.conv2d(x, unpack(packed), ...))``: ``[B, C, H, W]`` -> ``[B, O, *size]``, or both without B."""
    height, width = size
    expansion, restore, rows = tiles(operands), restored_rows(operands), operands.output_order.shape[0]
    bias = None if operands.bias is None else operands.bias[:, None, None]
    new = new_images(x, rows, height, width)
    out = new if x.dim() == 4 else new.unsqueeze(0)
    planes, starts, pitch = planes_of(x.reshape(-1, *x.shape[-3:]), operands)
    step = _tokens_at_once(expansion, out.shape[0] * height * pitch)
    images_step, rows_step = max(step // (height * pitch), 1), min(max(step // pitch, 1), height)
    for first in range(0, out.shape[0], images_step):
        some = planes[first : first + images_step]
        own = (starts.unsqueeze(1) + planes.shape[1] * torch.arange(len(some), device=x.device)).flatten()
        for top in range(0, height, rows_step):
            part = out[first : first + images_step, :, top : top + rows_step]  # [b, O, h, w]
            run = (part.shape[2] - 1) * pitch + width
            place = some.storage_offset() + top * pitch
            runs = some.as_strided((some.numel() - top * pitch - run + 1, run), (1, 1), place)  # one from every entry
            product = _product_of_runs(expansion, runs, own)  # [T * V, b * run]
            product = product.index_select(0, restore) if restore.numel() else product[:rows]
            strides = (run, len(some) * run, pitch, 1)
            _write(product.as_strided(part.shape, strides, product.storage_offset()), bias, part)
    return activate_(new, operands.activation)


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
        return _product_of_runs(expansion, tokens.t(), columns)
    if n > FEW and columns.numel() > TIMES * tokens.shape[1]:
        return _product_of_runs(expansion, tokens.t().contiguous(), columns)
    small = n * columns.numel() < PARALLEL_NUMBERS
    gathered = tokens.index_select(1, columns) if small else tokens.gather(1, columns.expand(n, -1))
    gathered = gathered.view(n, count, p)
    if n <= FEW:
        return torch.bmm(gathered.transpose(0, 1), expansion.mT).mT.reshape(-1, n)
    return torch.bmm(expansion, gathered.permute(1, 2, 0)).flatten(0, 1)


def _product_of_runs(expansion: Tensor, runs: Tensor, starts: Tensor) -> Tensor:
    """``[., l]`` -> ``[T * V, n]``, likewise: ``starts`` has the runs of each column of each tile, of ``n`` numbers."""
    count, height, p = expansion.shape
    own = starts.numel() // count
    n = own // p * runs.shape[1]
    step = max(GATHER_NUMBERS // max(p * n, 1), 1) if runs.device.type == "cpu" else count
    if step >= count:
        return torch.bmm(expansion, runs.index_select(0, starts).view(count, p, n)).flatten(0, 1)
    out = runs.new_empty(count, height, n)
    for first in range(0, count, step):
        gathered = runs.index_select(0, starts[first * own : (first + step) * own]).view(-1, p, n)
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


def planes_of(images: Tensor, operands: Conv2dOperands) -> tuple[Tensor, Tensor, int]:
    """``[B, C, H, W]`` -> ``[B, .]``, of which each column of the unfolded images is a run, so that none is unfolded.

    A channel is a plane of its pixels; with a stride, one for each phase of it that the kernel meets. Also returned are
    int64 ``[T * P]``, where the run of each kept column starts, and how far apart rows of the output are in a run: what
    lies between them there is of no use.
    """
    columns, size = columns_of_x(operands), images.shape[2:]
    if set(operands.unfolding.values()) == {(1, 1), (0, 0)}:  # nothing but padding is 0: each channel is its own run
        return images.contiguous().flatten(1), columns * size.numel(), size[1]
    axes = zip(size, *operands.unfolding.values(), strict=True)
    down, across = (_meet(images.device, *axis) for axis in axes)
    if any((down.before, down.after, across.before, across.after)):
        images = F.pad(images, (across.before, across.after, down.before, down.after))
    split = images.unflatten(3, (across.pixels, -1)).unflatten(2, (down.pixels, -1))  # [B, C, H', sh, W', sw]
    planes = split.permute(0, 1, 3, 5, 2, 4)[:, :, : down.phases, : across.phases].contiguous()
    plane = down.phase[:, None] * across.phases + across.phase  # [kh, kw]
    entry = (plane * down.pixels + down.place[:, None]) * across.pixels + across.place
    channel = torch.arange(images.shape[1], device=images.device) * planes.shape[2:].numel()
    starts = (channel[:, None] + entry.flatten()).flatten()[columns]
    return planes.flatten(1), starts, across.pixels


class Meeting(NamedTuple):
    """Which pixels the entries of a kernel meet along one axis, those of each phase of the stride by themselves.

    Args:
        pixels: of a phase, padding counted.
        before: padding there.
        after: likewise, so that all phases have as many.
        phases: that the kernel meets.
        phase: int64 ``[k]``, that of each entry.
        place: int64 ``[k]``, in it, of the pixel that gives the first one of the output.
    """

    pixels: int
    before: int
    after: int
    phases: int
    phase: Tensor
    place: Tensor


def _meet(device: torch.device, size: int, kernel: int, dilation: int, padding: int, stride: int) -> Meeting:
    """Of ``size`` pixels along an axis; the others as for ``F.unfold``."""
    pixels = -(-(size + 2 * padding) // stride)
    reach = torch.arange(0, kernel * dilation, dilation, device=device)
    phases = min(stride, (kernel - 1) * dilation + 1)
    return Meeting(pixels, padding, pixels * stride - size - padding, phases, reach % stride, reach // stride)
