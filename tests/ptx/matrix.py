"""Matrix instructions of a warp: mma, mma.sp, ldmatrix, stmatrix and movmatrix, by the layouts of the PTX manual.

Legend: g = lane >> 2 and t = lane & 3; a register over lanes is ``[warps, g, t]``, and a word holds two halves h. A
fragment becomes a matrix by one transpose of its axes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .counters import shared_wavefronts
from .group import LANES
from .operands import Builder, Read, Step, Write, opcode
from .parse import Instruction
from .values import F32, U16, U32, U64, Array, decode_bf16, decode_f16

if TYPE_CHECKING:
    from .group import Group

Decode = Callable[[Array], Array]
CACHED = 32


def names_of(text: str) -> list[str]:
    """Registers of a vector operand."""
    return [name.strip() for name in text.strip("{}").split(",")]


def active_rows(group: "Group", ins: Instruction, values: list[Array]) -> tuple[list[Array], Array | None]:
    """Values as ``[warps, 32]`` for the active warps only, with the rows that those are."""
    rows = group.warp_rows(ins)
    cut = [np.broadcast_to(value, group.lanes).reshape(-1, LANES) for value in values]
    return (cut, None) if rows is None else ([value[rows] for value in cut], rows)


def scatter_rows(group: "Group", write: Write, rows: Array | None, value: Array) -> None:
    """Write ``[warps, 32]`` to the rows that it belongs to."""
    if rows is None:
        write(group, value.reshape(-1))
        return
    whole = np.zeros((group.rows, LANES), dtype=value.dtype)
    whole[rows] = value
    write(group, whole.reshape(-1))


def remembered(group: "Group", key: Any, arrays: list[Array], make: Callable[[], Any]) -> Any:
    """The result of ``make`` for these very arrays, kept while they may be used again.

    A register's array is never changed in place, so the same array has the same values.
    """
    memo: dict[Any, Any] = group.cache.setdefault("matrix", {})
    name = (key, group.mask is None, *map(id, arrays))
    found = memo.get(name)
    if found is None:
        if len(memo) >= CACHED:
            del memo[next(iter(memo))]
        # the arrays are kept with the result, so that no other takes their ids; nor may the mask change under it
        found = memo[name] = (make(), arrays)
        return found[0]
    return found[0]


def fragment(registers: list[Array]) -> Array:
    """Halves ``[warps, register, g, t, h]``."""
    return np.stack(registers, axis=1).view(U16).reshape(-1, len(registers), 8, 4, 2)


def a_matrix(registers: list[Array], decode: Decode) -> Array:
    """A, 16x16, or the kept values of a sparse A: ``[warps, 16, 16]``."""
    halves = fragment(registers)
    warps = len(halves)
    halves = halves.reshape(warps, 2, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4, 5)  # [warps, row 8s, g, column 8s, t, h]
    return decode(np.ascontiguousarray(halves)).reshape(warps, 16, 16)


def b_matrix(registers: list[Array], decode: Decode) -> Array:
    """B ``[warps, k, 8]``: eight rows of it for each register."""
    halves = fragment(registers).transpose(0, 1, 3, 4, 2)  # [warps, register, t, h, g]
    return decode(np.ascontiguousarray(halves)).reshape(len(halves), -1, 8)


def kept_columns(group: "Group", ins: Instruction, words: Array, rows: Array | None, selector: int) -> Array:
    """Columns in the group of four of the kept pairs, ``[warps, 16, 8, 2]``; an illegal pair is a fault."""
    supplied = words.reshape(-1, 8, 4)[:, :, 2 * selector : 2 * selector + 2]
    halves = np.ascontiguousarray(supplied).view(U16).reshape(-1, 8, 2, 2).transpose(0, 3, 1, 2)  # [warps, 8s, g, k16]
    nibbles = (halves[..., None] >> np.array([0, 4, 8, 12], dtype=U16)) & U16(15)
    nibbles = nibbles.reshape(-1, 16, 8)
    pair = np.stack([nibbles & 3, nibbles >> 2], axis=-1).astype(np.int64)
    wrong = pair[..., 0] >= pair[..., 1]
    if wrong.any():
        warp, row, place = (int(found) for found in np.argwhere(wrong)[0])
        lane = 4 * (row % 8) + 2 * selector + place // 4
        whole = warp if rows is None else int(rows[warp])
        raise ins.fault(
            f"{group.describe(whole * LANES + lane)}: metadata {int(words[warp, lane]):#010x}, nibble "
            f"{int(nibbles[warp, row, place]):#06b} of row {row}, columns {4 * place} to {4 * place + 3}: "
            "its first index must be below its second"
        )
    return pair


def expand(values: Array, pair: Array) -> Array:
    """A with zeros where nothing is kept, ``[warps, 16, 32]``."""
    warps = len(values)
    columns = 4 * np.arange(8)[:, None] + pair  # [warps, 16, 8, 2]
    start = 32 * np.arange(warps * 16)[:, None]
    dense = np.zeros(warps * 512, dtype=F32)
    dense[start + columns.reshape(-1, 16)] = values.reshape(-1, 16)
    return dense.reshape(warps, 16, 32)


def gathered(values: Array, pair: Array, b: Array) -> Array:
    """The product over kept values alone: a dropped weight does not meet an infinity of B."""
    columns = (4 * np.arange(8)[:, None] + pair).reshape(len(values), 16, 16)
    met = np.take_along_axis(b[:, None], columns[..., None], axis=2)  # [warps, 16, 16, 8]
    return (values[..., None] * met).sum(axis=2, dtype=F32)


@opcode("mma")
def _mma(b: Builder) -> Step:
    sparse = b.parts[1].split("::")[0] == "sp"
    shape = next((part for part in b.parts if part.startswith("m16n8")), "")
    types, parts = b.types, b.parts
    floats = types in (["f32", "f16", "f16", "f32"], ["f32", "bf16", "bf16", "f32"])
    if not floats or shape != ("m16n8k32" if sparse else "m16n8k16") or parts[parts.index(shape) + 1] != "row":
        raise b.ins.unsupported("is a shape or type of mma that this interpreter does not know")
    decode = decode_f16 if types[1] == "f16" else decode_bf16
    targets = [b.write(name) for name in names_of(b.operands[0])]
    a, k, c = (
        [b.read(name, dtype) for name in names_of(b.operands[at])] for at, dtype in ((1, U32), (2, U32), (3, F32))
    )
    if (len(targets), len(a), len(k), len(c)) != (4, 4, 4 if sparse else 2, 4):
        raise ValueError("fragment")
    if sparse:
        return _sparse(b, decode, targets, a, k, c)
    ins = b.ins

    def step(group: "Group") -> None:
        (a0, a1, a2, a3, *rest), rows = active_rows(group, ins, [read(group) for read in (*a, *k, *c)])
        group.report.mma += len(a0)
        product = a_matrix([a0, a1, a2, a3], decode) @ b_matrix(rest[:2], decode)
        deliver(group, targets, rest[2:], product, rows)

    return step


def deliver(group: "Group", targets: list[Write], c: list[Array], product: Array, rows: Array | None) -> None:
    """D = C + product, ``[warps, 16, 8]`` back to four registers."""
    parts = product.reshape(-1, 2, 8, 4, 2)  # [warps, row 8s, g, t, h]
    for at, write in enumerate(targets):
        scatter_rows(group, write, rows, parts[:, at >> 1, :, :, at & 1].reshape(-1, LANES) + c[at])


def _sparse(b: Builder, decode: Decode, targets: list[Write], a: list[Read], k: list[Read], c: list[Read]) -> Step:
    metadata, ins = b.read(4, U32), b.ins
    selector = int(b.operands[5], 0)
    if selector not in (0, 1):
        raise b.ins.unsupported("has a selector other than 0 and 1")

    def step(group: "Group") -> None:
        a_raw, k_raw = [read(group) for read in a], [read(group) for read in k]
        word = metadata(group)
        rows = group.warp_rows(ins)

        def left() -> tuple[Array, Array, Array]:
            cut, _ = active_rows(group, ins, [*a_raw, word])
            values = a_matrix(cut[:4], decode)
            pair = kept_columns(group, ins, cut[4], rows, selector)
            return expand(values, pair), values, pair

        def right() -> Array:
            return b_matrix(active_rows(group, ins, k_raw)[0], decode)

        if rows is None:
            dense, values, pair = remembered(group, ("a", selector, decode), [*a_raw, word], left)
            other = remembered(group, ("b", decode), k_raw, right)
        else:
            (dense, values, pair), other = left(), right()
        group.report.mma += len(dense)
        product = dense @ other
        if not np.isfinite(product).all():
            product = gathered(values, pair, other)
        deliver(group, targets, active_rows(group, ins, [read(group) for read in c])[0], product, rows)

    return step


def tiles(b: Builder) -> int:
    """Number of 8x8 matrices."""
    found = [part for part in b.parts if part in ("x1", "x2", "x4")]
    if "m8n8" not in b.parts or b.kind != "b16" or not found:
        raise b.ins.unsupported("is a shape or type that this interpreter does not know")
    return int(found[0][1:])


def row_addresses(group: "Group", ins: Instruction, read: Read, count: int) -> tuple[Array, Array, Array | None]:
    """Addresses of the matrices' rows ``[warps * count * 8]``, the lanes that gave them, and the active warps."""
    rows = group.warp_rows(ins)
    every = np.arange(group.rows) if rows is None else rows
    lanes = (every[:, None] * LANES + np.arange(8 * count)).reshape(-1)
    return np.broadcast_to(read(group), group.lanes)[lanes] & U64(0xFFFFFFFF), lanes, rows


def count_rows(group: "Group", kind: str, addresses: Array, rows: Array | None, count: int) -> None:
    """Count the wavefronts of matrices: each is one phase; CTAs alike are looked at once."""
    warps, ctas, _ = group.layout
    matrices, times = addresses.view(np.int64).reshape(-1, 8), 1
    if rows is None and ctas > 1:
        cube = matrices.reshape(warps, ctas, count * 8)
        if (cube == cube[:, :1]).all():
            matrices, times = np.ascontiguousarray(cube[:, 0]).reshape(-1, 8), ctas
    waves, ideal = shared_wavefronts(matrices, None, 16)
    group.report.wavefronts[kind] += waves * times
    group.report.wavefronts_ideal[kind] += ideal * times


def transposed(matrices: Array) -> Array:
    """Rows and columns of ``[n, 8, 4]`` words exchanged as halves."""
    halves = matrices.view(U16).reshape(-1, 8, 8).transpose(0, 2, 1)
    return np.ascontiguousarray(halves).view(U32)


@opcode("ldmatrix")
def _ldmatrix(b: Builder) -> Step:
    count, turn, ins = tiles(b), "trans" in b.mods, b.ins
    writes = [b.write(name) for name in names_of(b.operands[0])]
    read = b.address(1)
    if len(writes) != count:
        raise ValueError("registers")

    def step(group: "Group") -> None:
        address, lanes, rows = row_addresses(group, ins, read, count)
        count_rows(group, "ldmatrix", address, rows, count)
        raw = group.shared.load(group, ins, address, 16, lanes).view(U32).reshape(-1, 8, 4)
        found = (transposed(raw) if turn else raw).reshape(-1, count, LANES)
        for at, write in enumerate(writes):
            scatter_rows(group, write, rows, np.ascontiguousarray(found[:, at]))

    return step


@opcode("stmatrix")
def _stmatrix(b: Builder) -> Step:
    count, turn, ins = tiles(b), "trans" in b.mods, b.ins
    reads = [b.read(name, U32) for name in names_of(b.operands[1])]
    read = b.address(0)

    def step(group: "Group") -> None:
        address, lanes, rows = row_addresses(group, ins, read, count)
        count_rows(group, "stmatrix", address, rows, count)
        cut, _ = active_rows(group, ins, [value(group) for value in reads])
        matrices = np.stack(cut, axis=1).reshape(-1, 8, 4)
        raw = np.ascontiguousarray(transposed(matrices) if turn else matrices)
        group.shared.store(group, ins, address, raw.view(np.complex128).reshape(-1), lanes)

    return step


@opcode("movmatrix")
def _movmatrix(b: Builder) -> Step:
    read, write, ins = b.read(1, U32), b.write(0), b.ins

    def step(group: "Group") -> None:
        (value,), rows = active_rows(group, ins, [read(group)])
        scatter_rows(group, write, rows, transposed(np.ascontiguousarray(value).reshape(-1, 8, 4)).reshape(-1, LANES))

    return step
