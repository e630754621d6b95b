"""The ops on the product that is compiled for the CPU: what it is called with.

Shapes: O rows, I columns, N tokens; B images of C channels.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_hinm.kernels import host
from lightning_hinm.ops.operands import (
    Conv2dOperands,
    LinearOperands,
    Operands,
    activate_,
    columns_of_x,
    new_images,
    restored_rows,
)
from lightning_hinm.ops.product import planes_of


def refusal(x: Tensor) -> str | None:
    """Why the compiled product does not take an input of a weight that was decoded for it, without a full stop."""
    if x.device.type != "cpu" or x.dtype not in host.ENTRIES:
        return f"they were decoded for a CPU, and x is {x.dtype} on {x.device}"
    return host.refusal()


def linear(x: Tensor, operands: LinearOperands) -> Tensor:
    """``hinm::linear``: ``[..., I]`` -> ``[..., O]``."""
    tokens, rows = x.reshape(-1, operands.in_features), operands.output_order.shape[0]
    n = tokens.shape[0]
    out = x.new_empty(rows, n).t() if operands.feature_major else x.new_empty(n, rows)
    if out.numel():
        if n == 1:  # is gathered as it lies, whatever its strides
            token, column = 1, tokens.stride(1)
        else:
            tokens = tokens if 1 in tokens.stride() else tokens.contiguous()
            token, column = tokens.stride()
        # Features that lie one after another are gathered from there, unless most would be more than once.
        columns = columns_of_x(operands)
        turns = n > 1 and (token != 1 or columns.numel() > operands.in_features)
        sizes = (operands.in_features, 1, n, 0, token, column, 0, out.stride(0), out.stride(1), n, n, turns)
        _launch(tokens, columns, out, operands, sizes)
    return activate_(out.reshape(*x.shape[:-1], rows), operands.activation)


def conv2d(x: Tensor, operands: Conv2dOperands, size: tuple[int, int]) -> Tensor:
    """``hinm::conv2d``: ``[B, C, H, W]`` -> ``[B, O, *size]``, or both without B."""
    height, width = size
    new = new_images(x, operands.output_order.shape[0], height, width)
    if new.numel():
        out = new if x.dim() == 4 else new.unsqueeze(0)
        planes, starts, pitch = planes_of(x.reshape(-1, *x.shape[-3:]), operands)
        run = (height - 1) * pitch + width
        strides = (planes.shape[1], 1, 1, out.stride(0), out.stride(3), out.stride(1))
        _launch(
            planes, starts, out, operands, (planes.shape[1] - run + 1, len(out), run, *strides, pitch, width, False)
        )
    return activate_(new, operands.activation)


def _launch(x: Tensor, columns: Tensor, out: Tensor, operands: Operands, sizes: tuple[Any, ...]) -> None:
    values, bias, restore = operands.values, operands.bias, restored_rows(operands)
    positions: Any = operands.expansion
    n, m, (rows, taken) = operands.n, operands.m, values.shape
    held, kept = host.held(m), taken // n * m
    expected = {  # the kernel trusts these sizes
        "values": (values, values.dtype, operands.output_order.shape[0] * (kept // m * n)),
        "expansion": (positions, torch.uint8, rows * taken),
        "columns": (columns, torch.int64, -(-rows // operands.vector_size) * kept),
        "restore": (restore, torch.int64, rows if restore.numel() else 0),
    }
    wrong = [
        f"{name} is {tensor.dtype} with {tensor.numel()} numbers, but must be {dtype} with {count}"
        for name, (tensor, dtype, count) in expected.items()
        if tensor.dtype != dtype or tensor.numel() != count
    ]
    if wrong or not held:
        raise ValueError(
            f"hinm: {'; '.join(wrong) or f'm={m} is too large'}. The operands are not of one packed layer."
        )
    host.launch(
        x,
        values.contiguous(),
        positions.contiguous(),
        columns.contiguous(),
        restore.contiguous() if restore.numel() else None,
        None if bias is None else bias.contiguous(),
        out,
        *(rows, operands.vector_size, kept, taken, n, held, held // m * n),
        *sizes,
    )
