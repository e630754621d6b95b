"""Random packed weights, made where they are used: a random legal layout costs a kernel what a searched one does.

Shapes: O rows, I columns (of one group in a grouped convolution), T tiles of V rows, P kept columns of a tile.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_hinm import HiNMPattern, HiNMWeight, kernels
from lightning_hinm.format.packing import index_dtype
from lightning_hinm.ops.fragments import Fragments, arrange, refusal
from lightning_hinm.ops.operands import Conv2dOperands, LinearOperands

NIBBLES = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)  # of 2:4: first position | second << 2, first < second


def random_weight(
    shape: tuple[int, ...],
    pattern: HiNMPattern,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    groups: int = 1,
    permuted: bool = True,
    restored: bool = True,
) -> HiNMWeight:
    """A packed weight that obeys a 2:4 pattern, on the generator's device; nothing is searched, no mask is made.

    The same generator state gives the same values and the same kept columns, whatever the two flags say.

    Args:
        shape: of the dense weight, ``[O, I]`` or ``[O, C, kh, kw]``.
        pattern: what it obeys.
        dtype: of the values.
        generator: where all numbers come from.
        groups: channel groups of a convolution, whole tiles each.
        permuted: kept columns in a random order inside their run, else ascending.
        restored: rows packed in a random order, so that a kernel restores theirs; else as they are.

    >>> weight = random_weight((6, 8), HiNMPattern(4), torch.float16, torch.Generator(), restored=False)
    >>> weight.values.shape, weight.output_order.tolist()
    (torch.Size([6, 2]), [0, 1, 2, 3, 4, 5])
    """
    rows, in_features, device, v = shape[0], math.prod(shape[1:]), generator.device, pattern.vector_size
    tiles = -(-rows // v)
    index = torch.cat(
        [
            _choose_columns(tiles, first, last, pattern.kept_of_run(last - first), generator, permuted)
            for first, last in pattern.runs(in_features)
        ],
        dim=1,
    )  # [T, P]
    count = index.shape[1] // 4  # groups of a row
    values = torch.randn(rows, count, 2, generator=generator, device=device, dtype=dtype)
    table = torch.tensor(NIBBLES, dtype=torch.uint8, device=device)
    nibbles = table[torch.randint(len(NIBBLES), (rows, count), generator=generator, device=device)]
    if in_features % 4:
        virtual = (index >= in_features).unflatten(1, (-1, 4)).repeat_interleave(v, dim=0)[:rows]  # [O, groups, 4]
        positions = torch.stack([nibbles & 3, nibbles >> 2], dim=2).to(torch.int64)
        values.masked_fill_(virtual.gather(2, positions), 0)
    bytes_ = torch.nn.functional.pad(nibbles, (0, count % 2)).unflatten(1, (-1, 2))
    order = torch.rand(groups, rows // groups, generator=generator, device=device).argsort(dim=1)
    order = order + rows // groups * torch.arange(groups, device=device).unsqueeze(1)
    return HiNMWeight(
        values.flatten(1),
        bytes_[..., 0] | bytes_[..., 1] << 4,
        index.to(index_dtype(pattern.padded(in_features))),
        (order.flatten() if restored else torch.arange(rows, device=device)).to(index_dtype(rows)),
        shape,
        pattern,
    )


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


def _choose_columns(tiles: int, first: int, last: int, kept: int, generator: torch.Generator, permuted: bool) -> Tensor:
    """Of one run, other columns for each tile; those that no real column is left for are virtual, and come last."""
    real = min(kept, last - first)
    order = torch.rand(tiles, last - first, generator=generator, device=generator.device).argsort(dim=1)[:, :real]
    order = order if permuted else order.sort(dim=1).values
    virtual = torch.arange(last - first, last - first + kept - real, device=generator.device)
    return torch.cat([order, virtual.expand(tiles, -1)], dim=1) + first
