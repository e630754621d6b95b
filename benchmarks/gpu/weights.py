"""Random packed weights as the kernels read them, and as operands of the ops."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_hinm import HiNMPattern, HiNMWeight, kernels
from lightning_hinm.format import random_weight
from lightning_hinm.ops.fragments import Fragments, arrange, refusal
from lightning_hinm.ops.operands import Conv2dOperands, LinearOperands


def random_fragments(
    rows: int, columns: int, pattern: HiNMPattern, dtype: torch.dtype, generator: torch.Generator
) -> Fragments:
    """A random weight in the kernels' order, on the generator's device."""
    return arrange(random_weight((rows, columns), pattern, dtype, generator))


def linear_operands(
    packed: HiNMWeight, bias: Tensor | None = None, activation: str = "none", *, device: torch.device | None = None
) -> LinearOperands:
    """What ``hinm::linear`` takes after ``x``, the weight in the kernels' order.

    Args:
        packed: the weight; it is brought into that order where it is.
        bias: on the device.
        activation: of the result.
        device: where the kernels run, if not where the weight is.

    Raises:
        RuntimeError: where no kernel takes the weight: a fallback is not what is measured here.
    """
    columns, fields = math.prod(packed.shape[1:]), packed.pattern.fields
    stored, arranged = _tensors(packed, device or packed.values.device)
    arguments: tuple[Any, ...] = (*stored, bias, *arranged, columns, *fields, activation)
    return LinearOperands(*arguments)


def conv2d_operands(
    packed: HiNMWeight,
    bias: Tensor | None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    device: torch.device | None = None,
) -> Conv2dOperands:
    """What ``hinm::conv2d`` takes after ``x``; as ``linear_operands``."""
    spatial = packed.shape[1] * groups, *packed.shape[2:], *stride, *padding, *dilation, groups
    stored, arranged = _tensors(packed, device or packed.values.device)
    arguments: tuple[Any, ...] = (*stored, bias, *arranged, *spatial, *packed.pattern.fields, activation)
    return Conv2dOperands(*arguments)


def fragments_of(operands: LinearOperands | Conv2dOperands) -> tuple[Tensor, ...]:
    """The four tensors that the kernels read."""
    tensors = operands.expansion, operands.expansion_metadata, operands.columns, operands.restore
    return tuple(tensor for tensor in tensors if tensor is not None)


def _tensors(packed: HiNMWeight, device: torch.device) -> tuple[list[Any], list[Any]]:
    """The packed weight as it is stored, and as the kernels read it."""
    reason = kernels.refusal(device) or refusal(packed.pattern, math.prod(packed.shape[1:]), packed.values.dtype)
    if reason:
        raise RuntimeError(f"{packed.pattern}: no kernel takes it: {reason}.")
    stored, arranged = packed.tensors.values(), arrange(packed)
    return [tensor.to(device) for tensor in stored], [tensor.to(device) for tensor in arranged]
