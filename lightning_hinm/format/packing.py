"""Packed weights: dense masked weight <-> ``HiNMWeight``, an exact inverse pair.

Shapes: O rows, I columns, T tiles of V rows, P kept columns of a tile, G = P / m groups of a tile, K = G * n values of
a row. Rows are packed in ``output_order``; the positions of a group are counted in the order of ``vector_index``.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hinm.layout import HiNMLayout, check_layout
from lightning_hinm.mask import BLOCK
from lightning_hinm.pattern import HiNMPattern

VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class HiNMWeight:
    """A packed weight: what a file holds, and what kernels derive their own order from at load.

    Args:
        values: ``[O, K]``, the kept weights of each row, rows in ``output_order``.
        metadata: uint8 ``[O, ceil(K * bits / 8)]``: position inside its group of each value, ``ceil(log2 m)`` bits
            each, little-endian, every row padded with zeros to a byte. 2:4 makes one nibble a group. Empty for n = m.
        vector_index: ``[T, P]``, as in a layout, in the smallest unsigned type that fits its columns.
        output_order: ``[O]``, as in a layout, in the smallest unsigned type that fits the rows.
        shape: of the dense weight, ``[O, I]`` or ``[O, C, kh, kw]``.
        pattern: the pattern it obeys.
        retained: as in a layout.

    The index tensors may be uint16 or uint32, for which torch has few operators: take them from ``layout``.
    """

    values: Tensor
    metadata: Tensor
    vector_index: Tensor
    output_order: Tensor
    shape: tuple[int, ...]
    pattern: HiNMPattern
    retained: float | None = None

    @property
    def layout(self) -> HiNMLayout:
        """The layout by which it was packed, int64."""
        order, index = self.output_order.to(torch.int64), self.vector_index.to(torch.int64)
        return HiNMLayout(self.pattern, order, index, self.retained)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by name."""
        return {field: getattr(self, field) for field in ("values", "metadata", "vector_index", "output_order")}

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> "HiNMWeight":
        """The same packed weight on ``device``."""
        return replace(self, **{field: tensor.to(device) for field, tensor in self.tensors.items()})  # type: ignore


def pack(weight: Tensor, layout: HiNMLayout, *, groups: int = 1, name: str = "weight") -> HiNMWeight:
    """The non-zeros of ``weight`` in the layout's order; ``unpack`` is the exact inverse.

    Takes no mask. Where a row has fewer than ``n`` non-zeros in a group, zeros at the lowest free positions fill it up.

    Args:
        weight: ``[O, I]``, or a convolution's ``[O, C, kh, kw]``; a Hugging Face ``Conv1D`` passes its transpose.
        layout: how to pack it.
        groups: channel groups of a convolution.
        name: the layer's name, for messages.

    Raises:
        ValueError: if the layout does not fit, or anything outside the pattern is not zero: nothing is ever cut.

    >>> pattern = HiNMPattern(vector_size=2, vector_sparsity=0.5)
    >>> layout = HiNMLayout(pattern, torch.tensor([1, 0]), torch.tensor([[6, 1, 4, 3]]))
    >>> weight = torch.zeros(2, 8)
    >>> weight[1, 3] = 5.0
    >>> packed = pack(weight, layout)
    >>> packed.values.tolist(), packed.metadata.tolist()
    ([[0.0, 5.0], [0.0, 0.0]], [[12], [4]])
    >>> torch.equal(unpack(packed), weight)
    True
    """
    if weight.dtype not in VALUE_DTYPES or weight.dim() < 2 or weight.numel() == 0 or weight.is_meta:
        raise ValueError(
            f"{name}: got {weight.dtype} {list(weight.shape)} on {weight.device}, but only non-empty float16, "
            "bfloat16, float32 and float64 matrices and convolution weights can be packed. Convert or load it first."
        )
    matrix = weight.detach().flatten(1)
    rows, in_features = matrix.shape
    check_layout(layout, rows, in_features, groups=groups, name=name)
    layout, pattern = layout.to(matrix.device), layout.pattern
    n, m, v, virtual = pattern.n, pattern.m, pattern.vector_size, pattern.padded(in_features) - in_features
    place = torch.arange(1, m + 1, device=matrix.device, dtype=torch.int32)
    values, metadata = [], []
    for tiles in blocks(layout, in_features + virtual):
        block_rows = layout.output_order[tiles.start * v : tiles.stop * v]
        columns = layout.vector_index[tiles].unsqueeze(1).expand(-1, v, -1)  # [t, V, P]
        wide = torch.nn.functional.pad(matrix[block_rows], (0, virtual, 0, -len(block_rows) % v))
        kept = wide.unflatten(0, (-1, v)).gather(2, columns)
        kept = kept.flatten(0, 1)[: len(block_rows)].unflatten(1, (-1, m))  # [rows of the block, G, m]
        if n == m:
            values.append(kept.flatten(1))
            continue
        filled = kept != 0
        seen = filled.cumsum(dim=2, dtype=torch.int32)
        # Exactly n a group, whatever it holds: the first n non-zeros, then the lowest free positions.
        taken = torch.where(filled, seen <= n, place - seen <= n - seen[..., -1:])
        where = taken.flatten().nonzero().flatten()
        values.append(kept.flatten()[where].unflatten(0, (len(block_rows), -1)))
        metadata.append(pack_positions((where % m).unflatten(0, (len(block_rows), -1)), m))
    packed = HiNMWeight(
        torch.cat(values),
        torch.cat(metadata) if metadata else torch.empty(rows, 0, dtype=torch.uint8, device=matrix.device),
        layout.vector_index.to(index_dtype(in_features + virtual)),
        layout.output_order.to(index_dtype(rows)),
        tuple(weight.shape),
        pattern,
        layout.retained,
    )
    if outside := int(matrix.count_nonzero() - packed.values.count_nonzero()):
        raise ValueError(
            f"{name}: {outside} of {matrix.numel()} weights are not zero outside the pattern, but a packed weight "
            f"keeps only {n} of {m} in the kept columns of each tile of {v} rows. Apply the mask to the weight, or "
            "take the layout that belongs to it."
        )
    return packed


def unpack(packed: HiNMWeight) -> Tensor:
    """The dense weight in its original order, shape and dtype: the exact inverse of ``pack``."""
    pattern, layout = packed.pattern, packed.layout
    rows, in_features, v = packed.shape[0], math.prod(packed.shape[1:]), pattern.vector_size
    dense = packed.values.new_empty(rows, in_features)
    for tiles in blocks(layout, pattern.padded(in_features)):
        kept = _expand_tiles(packed, tiles)  # [t, V, P]
        columns = layout.vector_index[tiles].unsqueeze(1).expand(-1, v, -1)
        wide = kept.new_zeros(len(kept), v, pattern.padded(in_features)).scatter_(2, columns, kept)
        order = layout.output_order[tiles.start * v : tiles.stop * v]
        dense[order] = wide.flatten(0, 1)[: len(order), :in_features]
    return dense.reshape(packed.shape)


def expand(packed: HiNMWeight) -> Tensor:
    """The kept vectors, dense inside each tile: ``[T, V, P]``, columns as in ``vector_index``, virtual ones zero."""
    out = packed.values.new_empty(len(packed.vector_index), packed.pattern.vector_size, packed.vector_index.shape[1])
    for tiles in blocks(packed, packed.vector_index.shape[1]):
        out[tiles] = _expand_tiles(packed, tiles)
    return out


def _expand_tiles(packed: HiNMWeight, tiles: slice) -> Tensor:
    """``expand`` for some tiles: ``[t, V, P]``."""
    n, m, v = packed.pattern.n, packed.pattern.m, packed.pattern.vector_size
    values = packed.values[tiles.start * v : tiles.stop * v]
    kept = values.new_zeros(tiles.stop - tiles.start, v, packed.vector_index.shape[1])
    rows = kept.view(-1, kept.shape[2])[: len(values)]
    if n == m:
        rows.copy_(values)
    else:
        positions = unpack_positions(packed, slice(tiles.start * v, tiles.stop * v)).to(torch.int64)
        rows.unflatten(1, (-1, m)).scatter_(2, positions, values.unflatten(1, (-1, n)))
    return kept


def blocks(layout: HiNMLayout | HiNMWeight, width: int) -> list[slice]:
    """Runs of tiles whose ``[t, V, width]`` stays small, so that memory is linear in the weight."""
    count = len(layout.vector_index)
    step = max(BLOCK // (layout.pattern.vector_size * width), 1)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def index_dtype(count: int) -> torch.dtype:
    """The smallest unsigned type that holds ``0 .. count - 1``."""
    return torch.uint8 if count <= 1 << 8 else torch.uint16 if count <= 1 << 16 else torch.uint32


def position_bits(pattern: HiNMPattern) -> int:
    """Bits of metadata for each value: ``ceil(log2 m)``, none where ``n = m``."""
    return 0 if pattern.n == pattern.m else (pattern.m - 1).bit_length()


def pack_positions(positions: Tensor, m: int) -> Tensor:
    """``[rows, K]`` numbers below ``m`` -> uint8 ``[rows, bytes]``."""
    shifts = torch.arange((m - 1).bit_length(), device=positions.device)
    return pack_bits((positions.unsqueeze(2) >> shifts & 1).bool().flatten(1))


def unpack_positions(packed: HiNMWeight, rows: slice = slice(None)) -> Tensor:
    """The metadata as numbers, ``[rows, G, n]``; uint8 where ``m`` allows it, else int32. Not for n = m."""
    n, bits = packed.pattern.n, position_bits(packed.pattern)
    flags = unpack_bits(packed.metadata[rows], packed.values.shape[1] * bits).unflatten(1, (-1, n, bits))
    number = torch.uint8 if bits <= 8 else torch.int32
    positions = torch.zeros(flags.shape[:3], dtype=number, device=flags.device)
    for bit in range(bits):
        positions |= flags[..., bit].to(number) << bit
    return positions


def pack_bits(flags: Tensor) -> Tensor:
    """Eight flags a byte along the last dimension, the first one lowest; the last byte is padded with zeros.

    >>> pack_bits(torch.tensor([True, False, True])).tolist()
    [5]
    """
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    packed = padded[..., 0].clone()
    for bit in range(1, 8):
        packed |= padded[..., bit] << bit
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` flags of each row of bytes: the inverse of ``pack_bits``. bool ``[..., count]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).bool().flatten(-2)[..., :count]


def check_packed(packed: HiNMWeight, name: str = "packed weight", *, groups: int = 1) -> None:
    """Refuses whatever a kernel could not run safely: it trusts every number that it reads.

    Args:
        packed: from a file or a caller.
        name: the layer's name, for messages.
        groups: channel groups of a convolution.

    Raises:
        ValueError: naming every rule that is broken.
    """
    pattern, shape, wrong = packed.pattern, packed.shape, []
    if len(shape) < 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"{name}: shape={list(shape)}, but a weight has at least two dimensions, all positive.")
    rows, in_features, bits = shape[0], math.prod(shape[1:]), position_bits(pattern)
    # Each run keeps a group at least: bounds the runs that a shape can claim before they are listed.
    if pattern.window and in_features > max(packed.vector_index.numel(), 4) * pattern.window:
        raise ValueError(f"{name}: shape={list(shape)}, but vector_index has too few columns for it.")
    kept = pattern.kept(in_features)
    count = kept // pattern.m * pattern.n
    expected = {
        "values": (packed.values.dtype, (rows, count)),
        "metadata": (torch.uint8, (rows, -(-count * bits // 8))),
        "vector_index": (index_dtype(pattern.padded(in_features)), (-(-rows // pattern.vector_size), kept)),
        "output_order": (index_dtype(rows), (rows,)),
    }
    if packed.values.dtype not in VALUE_DTYPES:
        wrong.append(f"values are {packed.values.dtype}, but must be float16, bfloat16, float32 or float64")
    for field, (dtype, size) in expected.items():
        tensor = packed.tensors[field]
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            wrong.append(f"{field} is {tensor.dtype} {list(tensor.shape)}, but must be {dtype} {list(size)}")
    if wrong:  # the numbers can only be read once the shapes are right
        raise ValueError(f"{name}: " + "; ".join(wrong) + ". The weight is damaged.")
    layout = packed.layout
    check_layout(layout, rows, in_features, groups=groups, name=name)
    step = max(BLOCK // max(count, 1), 1)
    for first in range(0, rows if bits else 0, step):
        positions = unpack_positions(packed, slice(first, first + step))
        if bool((positions >= pattern.m).any()) or bool((positions[..., 1:] <= positions[..., :-1]).any()):
            wrong.append(f"metadata does not rise inside each group, or reaches m={pattern.m}")
            break
    unused = -count * bits % 8
    if unused and bool((packed.metadata[:, -1] >> (8 - unused)).any()):
        wrong.append("metadata has bits set in the padding of a row")
    if not wrong and _any_virtual_value(packed, layout, in_features):
        wrong.append(f"values are not zero in virtual columns (from {in_features} up)")
    if wrong:
        raise ValueError(f"{name}: " + "; ".join(wrong) + ". The weight is damaged.")


def _any_virtual_value(packed: HiNMWeight, layout: HiNMLayout, in_features: int) -> bool:
    """Whether a value that is not zero stands in a virtual column."""
    n, m, v = packed.pattern.n, packed.pattern.m, packed.pattern.vector_size
    virtual = (layout.vector_index >= in_features).unflatten(1, (-1, m))  # [T, G, m]
    concerned = virtual.any(dim=2).any(dim=0).nonzero()
    if not concerned.numel():
        return False
    last = slice(int(concerned[0]), None)  # virtual columns stand only in a tile's last groups
    rows = torch.arange(packed.shape[0], device=virtual.device) // v
    virtual = virtual[:, last][rows]  # [O, g, m]
    if n < m:
        virtual = virtual.gather(2, unpack_positions(packed)[:, last].to(torch.int64))  # [O, g, n]
    return bool((packed.values.unflatten(1, (-1, n))[:, last] != 0).logical_and(virtual).any())
