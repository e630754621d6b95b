"""The ops from fragments: which kernel runs, or BLAS, on what storage, with which arguments.

A kernel trusts the numbers in its index tensors. They are checked once, when the fragments are made: what is written
into them afterwards could only be seen by waiting for the GPU at each call, and is an access out of bounds.

Shapes: O rows, I columns, N tokens; B images of C channels; K kept vectors of a tile, padded.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hinm import kernels
from lightning_hinm.ops import cost
from lightning_hinm.ops.cost import ALIGNED, MOST_BLOCKS, MOST_NUMBERS, Call, Choice
from lightning_hinm.ops.fragments import DTYPES, Fragments, kept_of_runs, refusal, sizes
from lightning_hinm.ops.operands import (
    ACTIVATIONS,
    EXPANDED,
    Conv2dOperands,
    LinearOperands,
    Operands,
    activate_,
    groups_of,
    is_channels_last,
    new_images,
    pattern_of,
)
from lightning_hinm.pattern import HiNMPattern

SHORT = {torch.float16: "f16", torch.bfloat16: "bf16"}
EXPANSION = slice(LinearOperands._fields.index(EXPANDED[0]), LinearOperands._fields.index(EXPANDED[-1]) + 1)
ACTIVATION = {name: number for number, name in enumerate(ACTIVATIONS)}
MOST_TOKENS = MOST_BLOCKS * 64  # 64 is what the least of blocks takes
PLANES_BYTES = 1 << 28  # of shifted planes at a time


def linear(x: Tensor, operands: LinearOperands) -> Tensor:
    """``hinm::linear`` from fragments: ``[..., I]`` -> ``[..., O]``."""
    tokens, rows = x.reshape(-1, operands.in_features), operands.output_order.shape[0]
    n, turned = len(tokens), operands.feature_major
    out = x.new_empty(rows, n).t() if turned else x.new_empty(n, rows)
    if not out.numel():
        return out.reshape(*x.shape[:-1], rows)
    sizes = (rows, operands.in_features, n, _is_feature_major(tokens), turned)
    choice = choose(x.device, _pattern_fields(operands), sizes, operands.activation != "none")
    run_linear(tokens, out, operands, choice)
    return out.reshape(*x.shape[:-1], rows)


@functools.lru_cache(maxsize=4096)  # on what is cheap to hash: it stands before every launch
def choose(device: torch.device, fields: tuple[Any, ...], sizes: tuple[Any, ...], activated: bool) -> Choice:
    """The kernel for a call of a linear layer, given the fields of its pattern and of the call."""
    _expected(DTYPES[0], fields, *sizes[:2])  # refuses a pattern that no kernel runs
    call = Call(HiNMPattern(*fields), *sizes, activated=activated)
    return cost.choose_kernel(call, kernels.shared_limit(device), cost.gpu_of(device))


@functools.lru_cache(maxsize=4096)
def choose_for_images(device: torch.device, fields: tuple[Any, ...], sizes: tuple[Any, ...], activated: bool) -> Choice:
    """The same for a call of a convolution."""
    _expected(DTYPES[0], fields, *sizes[:2])
    call = cost.convolution_call(HiNMPattern(*fields), *sizes, activated=activated)
    return cost.choose_kernel(call, kernels.shared_limit(device), cost.gpu_of(device))


def run_linear(tokens: Tensor, out: Tensor, operands: LinearOperands, choice: Choice) -> None:
    """One call on the kernel that was chosen: ``[N, I]`` -> ``out``, ``[N, O]``, in rows or feature-major."""
    if choice.kernel == "unpack":
        _multiply_unpacked(tokens, out, operands)
        return
    gathers = choice.kernel == "gather"
    for first in range(0, len(tokens), MOST_TOKENS):
        part = out[first : first + MOST_TOKENS]
        if gathers:
            _gather(tokens[first : first + MOST_TOKENS], part, operands)
            continue
        in_rows = part if part.stride(1) == 1 else part.new_empty(part.shape)
        _decode(tokens[first : first + MOST_TOKENS], in_rows, operands, choice)
        if in_rows is not part:
            _turn(in_rows, part.t())


def _multiply_unpacked(tokens: Tensor, out: Tensor, operands: LinearOperands) -> None:
    weight, bias = _unpack(operands), operands.bias
    x, w, out_ = (tokens, weight.t(), out) if out.stride(1) == 1 else (weight, tokens.t(), out.t())
    if bias is None:
        torch.mm(x, w, out=out_)
    else:
        torch.addmm(bias if out_ is out else bias[:, None], x, w, out=out_)
    activate_(out, operands.activation)


def _unpack(operands: Operands) -> Tensor:
    """The dense weight, ``[O, I]``, its rows aligned to copies of 16 bytes."""
    weight, in_features = _fragments(operands), _in_features(operands)
    pitch = -(-in_features // ALIGNED) * ALIGNED
    dense = weight.values.new_empty(operands.output_order.shape[0], pitch)
    kernels.launch("unpack", *weight, dense, len(weight.rows), weight.tile_rows, weight.kept, pitch)
    return dense[:, :in_features]


def _decode(tokens: Tensor, out: Tensor, operands: LinearOperands, choice: Choice) -> None:
    tokens, weight, pattern = _aligned_rows(tokens), _fragments(operands), pattern_of(operands)
    n, columns = tokens.shape
    kept = kept_of_runs(pattern, operands.in_features)
    window = columns if len(kept) == 1 else pattern.window or columns
    pitch = cost.decode_pitch(columns if choice.kernel == "decode" else -(-len(kept) // cost.CLUSTER) * window)
    held = pitch * min(n, choice.tokens)
    numbers = (n, len(weight.rows), columns, tokens.stride(0), pitch, held, out.stride(0))
    tail = (weight.tile_rows, weight.kept, window, kept[0], ACTIVATION[operands.activation])
    rows = 32 if choice.kernel == "decode" else min(weight.tile_rows, 64)
    entry = f"{choice.kernel}_{SHORT[out.dtype]}_{rows}_{choice.tokens}"
    kernels.launch(entry, tokens, *weight, _bias(operands), out, *numbers, *tail)


def _gather(tokens: Tensor, out: Tensor, operands: LinearOperands) -> None:
    """Through feature-major storage: turned on the way in and on the way out, unless it lies or shall lie so."""
    i, o = operands.in_features, out.shape[1]
    step = (MOST_NUMBERS - 1) // max(i, o) // cost.GATHER_TOKENS * cost.GATHER_TOKENS
    for first in range(0, len(tokens), step):
        part, out_part = tokens[first : first + step], out[first : first + step]
        columns, pitch = part.t(), -(-len(part) // ALIGNED) * ALIGNED
        if not (_is_feature_major(part) and columns.stride(0) * i < MOST_NUMBERS):
            columns = _turn(part, part.new_empty(i, pitch))
        image = Image(len(part), columns.stride(0), i)
        if _is_feature_major(out_part):
            _launch_gather(columns, out_part.t(), operands, image)
            continue
        rows = out.new_empty(o, pitch)
        _launch_gather(columns, rows, operands, image)
        if out_part.stride(1) == 1:
            _turn(rows[:, : len(part)], out_part)
        else:  # rows that do not start at whole copies
            out_part.t().copy_(rows[:, : len(part)])


def conv2d(x: Tensor, operands: Conv2dOperands, size: tuple[int, int]) -> Tensor:
    """``hinm::conv2d`` from fragments: ``[B, C, H, W]`` -> ``[B, O, *size]``, or both without B."""
    images = x.reshape(-1, *x.shape[-3:])
    rows, (high, wide) = operands.output_order.shape[0], size
    if not len(images):
        return new_images(x, rows, high, wide)
    spatial = _spatial(operands)
    sizes = (rows, _in_features(operands), tuple(images.shape), size, *spatial)
    choice = choose_for_images(x.device, _pattern_fields(operands), sizes, operands.activation != "none")
    return run_conv2d(x, operands, size, choice)


def run_conv2d(x: Tensor, operands: Conv2dOperands, size: tuple[int, int], choice: Choice) -> Tensor:
    """One call on the kernel that was chosen, on at least one image."""
    images, rows, (high, wide) = x.reshape(-1, *x.shape[-3:]), operands.output_order.shape[0], size
    spatial = _spatial(operands)
    kernel, stride, padding, dilation = spatial
    if choice.kernel == "unpack":
        dense = _unpack(operands).reshape(rows, -1, *kernel)
        found = F.conv2d(x, dense, operands.bias, stride, padding, dilation, operands.groups)
        lies = torch.channels_last if is_channels_last(x) else torch.contiguous_format  # nearly always as found
        return activate_(found.contiguous(memory_format=lies), operands.activation)
    out = images.new_empty(len(images), rows, high, wide)
    phases, plane_height, pitch = cost.planes_size(images.shape[2], wide, *spatial)
    plane = plane_height * pitch
    numbers = kernel[1] * phases * operands.in_channels * plane
    direct = cost.is_read_as_it_lies(kernel, stride, padding, high * wide)
    step = MOST_BLOCKS if direct else min(max(PLANES_BYTES // (2 * numbers), 1), MOST_BLOCKS)
    for first in range(0, len(out), step):
        part, out_part = images[first : first + step].contiguous(), out[first : first + step].flatten(2)
        if direct and part.data_ptr() % 16 == 0:
            matrix = part.flatten(2)
            _launch_gather(matrix, out_part, operands, Image(high * wide, high * wide, part.shape[1]))
            continue
        shifted = x.new_empty(len(part), numbers)
        image = (numbers // 8, *part.shape, phases, plane_height, pitch)
        kernels.launch("planes", part, shifted, *image, *stride, *padding, dilation[1])
        down = (*kernel, stride[0], dilation[0])
        image_of_planes = Image(high * pitch, plane, part.shape[1], pitch, wide, down)
        _launch_gather(shifted, out_part, operands, image_of_planes)
    out = out.reshape(*x.shape[:-3], *out.shape[1:])
    return new_images(x, *out.shape[-3:]).copy_(out) if is_channels_last(x) else out


class Image(NamedTuple):
    """How the gather kernel finds its input (gather.cu); a matrix of columns and tokens is an image of one long row."""

    tokens: int
    plane: int
    channels: int
    pitch: int = ALIGNED
    width: int = ALIGNED
    kernel: tuple[int, int, int, int] = (1, 1, 1, 1)  # height, width, stride and dilation of its height


def _launch_gather(x: Tensor, out: Tensor, operands: Operands, image: Image) -> None:
    """``x``: ``[I, N]`` or a batch of images; ``out``: ``[O, N]`` or ``[B, O, pixels]``."""
    batch, x_batch, out_batch = (len(out), x.stride(0), out.stride(0)) if out.dim() == 3 else (1, 0, 0)
    weight = _fragments(operands)
    tiles = len(weight.values)
    numbers = (image.tokens, tiles, batch, weight.kept, x_batch, out_batch, out.stride(-2))
    place = (image.plane, image.pitch, image.width, image.channels, tiles // groups_of(operands), *image.kernel)
    entry = f"gather_{SHORT[out.dtype]}_{weight.tile_rows}"
    kernels.launch(entry, x, *weight, _bias(operands), out, *numbers, *place, ACTIVATION[operands.activation])


def _turn(x: Tensor, out: Tensor) -> Tensor:
    """``out[:, :N] = x^T`` for ``x`` of shape ``[N, M]``, rows of both without gaps inside; returns that part."""
    x = x if x.stride(1) == 1 else x.contiguous()
    kernels.launch("transpose", x, out, *x.shape, x.stride(0), out.stride(0))
    return out[:, : len(x)]


def _aligned_rows(tokens: Tensor) -> Tensor:
    """``tokens`` itself where its rows are whole aligned copies of 16 bytes, else one of which that is true."""
    if tokens.shape[1] % ALIGNED:
        return F.pad(tokens, (0, -tokens.shape[1] % ALIGNED))
    if not _lies_aligned(tokens):
        return tokens.clone(memory_format=torch.contiguous_format)
    return tokens


def _lies_aligned(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 and matrix.stride(0) % ALIGNED == 0 and matrix.data_ptr() % 16 == 0


def _is_feature_major(tokens: Tensor) -> bool:
    """Whether each feature is a row of whole aligned copies, and no token is."""
    return tokens.stride(1) != 1 and _lies_aligned(tokens.t())


def _bias(operands: Operands) -> Tensor | None:
    return None if operands.bias is None else operands.bias.contiguous()


def _spatial(operands: Conv2dOperands) -> tuple[tuple[int, int], ...]:
    """Kernel, stride, padding and dilation, each of height and width."""
    return tuple(
        (getattr(operands, f"{name}_height"), getattr(operands, f"{name}_width"))
        for name in ("kernel", "stride", "padding", "dilation")
    )


def _pattern_fields(operands: Operands) -> tuple[Any, ...]:
    return operands.vector_size, operands.vector_sparsity, operands.n, operands.m, operands.window


def _in_features(operands: Operands) -> int:
    """I: columns of the weight, of one group."""
    if isinstance(operands, LinearOperands):
        return operands.in_features
    return operands.in_channels // operands.groups * operands.kernel_height * operands.kernel_width


def _fragments(operands: Operands) -> Fragments:
    """They are passed as the weight's expansion, and whole. A kernel trusts their sizes, so these are checked."""
    weight: Any = operands[EXPANSION]
    values, metadata, index, rows = weight
    fields = _pattern_fields(operands)
    dtype = operands.values.dtype if values is None else values.dtype  # which autocast may have cast
    expected = _expected(dtype, fields, operands.output_order.shape[0], _in_features(operands))
    # In one expression, because it stands before every launch, which in turn checks that all are on one device.
    if (
        values is None
        or index is None
        or rows is None
        or (values.shape, metadata.shape, index.shape, rows.shape) != expected.shapes
        or (values.dtype, metadata.dtype, index.dtype, rows.dtype) != expected.dtypes
        or not (values.is_contiguous() and metadata.is_contiguous() and index.is_contiguous() and rows.is_contiguous())
    ):
        raise ValueError(_describe_wrong(weight, expected))
    return Fragments(values, metadata, index, rows)


class _Expected(NamedTuple):
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


@functools.lru_cache(maxsize=4096)
def _expected(dtype: torch.dtype, fields: tuple[Any, ...], rows: int, in_features: int) -> _Expected:
    """What the fragments of such a weight must be."""
    pattern = HiNMPattern(*fields)
    if reason := refusal(pattern, in_features, dtype):
        raise ValueError(f"hinm: got fragments, but no kernel runs such a weight: {reason}. Call expand_all anew.")
    return _Expected(sizes(pattern, rows, in_features), (dtype, torch.int32, torch.uint16, torch.int32))


def _describe_wrong(weight: tuple[Tensor | None, ...], expected: _Expected) -> str:
    wrong = []
    for name, tensor, shape, dtype in zip(EXPANDED, weight, *expected, strict=True):
        got = "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
        if tensor is None or tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            wrong.append(f"{name} is {got}, but must be {dtype} {list(shape)}, contiguous")
    return f"hinm: {'; '.join(wrong)}. The operands are not of one packed layer."
