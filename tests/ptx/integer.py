"""Integer and bitwise instructions, comparisons and selections: exact, modulo the width of the type."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .operands import Builder, Step, opcode
from .values import S32, S64, STORAGE, U8, U32, U64, Array, type_dtype

if TYPE_CHECKING:
    from .group import Group

Function = Callable[..., Any]


def map_operands(b: Builder, function: Function, *dtypes: Any) -> Step:
    """``d = function(a, b, ...)``, each source read as its type (default: the instruction's)."""
    count = len(b.operands) - 1
    kinds = [*dtypes, *[None] * (count - len(dtypes))]
    reads = [b.read(at + 1, kind) for at, kind in enumerate(kinds)]
    write = b.write(0)
    if count == 1:
        (first,) = reads
        return lambda group: write(group, function(first(group)))
    if count == 2:
        first, second = reads
        return lambda group: write(group, function(first(group), second(group)))
    return lambda group: write(group, function(*[read(group) for read in reads]))


def bits_of(kind: str) -> int:
    """Bits of an integer type."""
    return int(kind[1:])


def double(kind: str) -> Any:
    """The type of twice the width."""
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits_of(kind) // 4}")


def multiply_high(a: Array, b: Array, kind: str) -> Array:
    """The upper half of the product."""
    if bits_of(kind) < 64:
        wide = double(kind)
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits_of(kind))).astype(type_dtype(kind))
    half, low = U64(32), U64(0xFFFFFFFF)
    x, y = np.asarray(a).view(U64), np.asarray(b).view(U64)
    cross = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    middle = (x & low) * (y >> half) + (cross & low)
    high = (x >> half) * (y >> half) + (cross >> half) + (middle >> half)
    if kind[0] == "s":
        high = high - np.where(x >> U64(63), y, U64(0)) - np.where(y >> U64(63), x, U64(0))
    return high.view(type_dtype(kind))


@opcode("add", "sub", domain="int")
def _add(b: Builder) -> Step:
    function = np.add if b.parts[0] == "add" else np.subtract
    if b.mods & {"cc"}:
        raise b.ins.unsupported("carries, which this interpreter does not")
    if "sat" in b.mods:
        return map_operands(
            b, lambda x, y: np.clip(function(x.astype(S64), y.astype(S64)), -(2**31), 2**31 - 1).astype(S32)
        )
    return map_operands(b, function)


@opcode("mul", "mad", domain="int")
def _mul(b: Builder) -> Step:
    kind = b.kind
    if b.mods & {"cc", "sat"}:
        raise b.ins.unsupported()
    if "wide" in b.mods:
        wide = double(kind)
        first, second = b.read(1), b.read(2)
        third = b.read(3, wide) if b.parts[0] == "mad" else None
        write = b.write(0)

        def step(group: "Group") -> None:
            product = first(group).astype(wide) * second(group).astype(wide)
            write(group, product if third is None else product + third(group))

        return step
    if "hi" in b.mods:
        if b.parts[0] == "mul":
            return map_operands(b, lambda x, y: multiply_high(x, y, kind))
        return map_operands(b, lambda x, y, z: multiply_high(x, y, kind) + z)
    return map_operands(b, np.multiply if b.parts[0] == "mul" else lambda x, y, z: x * y + z)


@opcode("div", "rem", domain="int")
def _divide(b: Builder) -> Step:
    first, second, write = b.read(1), b.read(2), b.write(0)
    remainder, ins = b.parts[0] == "rem", b.ins

    def step(group: "Group") -> None:
        x, y = first(group), second(group)
        zero = np.broadcast_to(y == 0, group.lanes)
        if zero.any() and group.pick(zero).any():
            lane = int(group.index[int(group.pick(zero).argmax())])
            raise ins.fault(f"{group.describe(lane)}: division by zero")
        rest = np.fmod(x, np.where(zero, y.dtype.type(1), y))
        write(group, rest if remainder else (x - rest) // np.where(zero, y.dtype.type(1), y))

    return step


@opcode("min", "max", domain="int")
def _extreme(b: Builder) -> Step:
    return map_operands(b, np.minimum if b.parts[0] == "min" else np.maximum)


@opcode("abs", "neg", domain="int")
def _sign(b: Builder) -> Step:
    return map_operands(b, np.abs if b.parts[0] == "abs" else np.negative)


@opcode("and", "or", "xor")
def _bitwise(b: Builder) -> Step:
    return map_operands(b, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[b.parts[0]])


@opcode("not")
def _not(b: Builder) -> Step:
    return map_operands(b, np.invert)


@opcode("cnot")
def _cnot(b: Builder) -> Step:
    return map_operands(b, lambda x: (x == 0).astype(x.dtype))


@opcode("mov")
def _mov(b: Builder) -> Step:
    dtype = type_dtype(b.kind)
    return map_operands(b, lambda x: x, STORAGE[1] if b.kind == "pred" else STORAGE[8 * dtype.itemsize])


@opcode("shl", "shr")
def _shift(b: Builder) -> Step:
    bits = bits_of(b.kind)
    left, signed = b.parts[0] == "shl", b.kind[0] == "s"
    dtype = type_dtype(b.kind)

    def shift(value: Array, amount: Array) -> Array:
        small = np.minimum(amount, U32(bits - 1)).astype(dtype)
        moved = value << small if left else value >> small
        return moved if signed and not left else np.where(amount >= U32(bits), dtype.type(0), moved)

    try:
        fixed = int(b.operands[2], 0)
    except ValueError:
        return map_operands(b, shift, dtype, U32)
    first, write = b.read(1), b.write(0)
    if not 0 <= fixed < bits:
        return map_operands(b, shift, dtype, U32)
    by = dtype.type(fixed)
    if left:
        return lambda group: write(group, first(group) << by)
    return lambda group: write(group, first(group) >> by)


@opcode("shf")
def _funnel(b: Builder) -> Step:
    left, clamp = "l" in b.mods, "clamp" in b.mods

    def shift(low: Array, high: Array, amount: Array) -> Array:
        by = (np.minimum(amount, U32(32)) if clamp else amount & U32(31)).astype(U64)
        whole = (high.astype(U64) << U64(32)) | low.astype(U64)
        return ((whole << by) >> U64(32) if left else whole >> by).astype(U32)

    return map_operands(b, shift, U32, U32, U32)


@opcode("lop3")
def _lop3(b: Builder) -> Step:
    if len(b.parts) > 2:
        raise b.ins.unsupported()
    table = int(b.operands[4], 0)
    reads, write = [b.read(at, U32) for at in (1, 2, 3)], b.write(0)
    if table == 0x96:
        return map_operands_three(write, reads, lambda x, y, z: x ^ y ^ z)
    if table == 0x80:
        return map_operands_three(write, reads, lambda x, y, z: x & y & z)
    if table == 0xFE:
        return map_operands_three(write, reads, lambda x, y, z: x | y | z)

    def combine(x: Array, y: Array, z: Array) -> Array:
        result = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), dtype=U32)
        for row in range(8):
            if table >> row & 1:
                result |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        return result

    return map_operands_three(write, reads, combine)


def map_operands_three(write: Any, reads: list[Any], function: Function) -> Step:
    """`map_operands` for readers that are made already."""
    return lambda group: write(group, function(*[read(group) for read in reads]))


@opcode("prmt")
def _prmt(b: Builder) -> Step:
    modes = {
        "f4e": lambda at, pick: at + pick,
        "b4e": lambda at, pick: (pick - at) & 7,
        "rc8": lambda at, pick: pick,
        "ecl": lambda at, pick: np.maximum(at, pick),
        "ecr": lambda at, pick: np.minimum(at, pick),
        "rc16": lambda at, pick: (pick & 1) * 2 + (at & 1),
    }
    mode = next((modes[part] for part in b.parts if part in modes), None)

    def permute(x: Array, y: Array, control: Array) -> Array:
        source = (y.astype(U64) << U64(32)) | x.astype(U64)
        result: Any = U32(0)
        for at in range(4):
            nibble = control >> U32(4 * at) & U32(15) if mode is None else mode(at, control.astype(S64) & 3).astype(U32)
            byte = (source >> (nibble & U32(7)).astype(U64) * U64(8)).astype(U8)
            spread = np.where(nibble & U32(8), np.where(byte & U8(128), U8(255), U8(0)), byte)
            result = result | (spread.astype(U32) << U32(8 * at))
        return result

    return map_operands(b, permute, U32, U32, U32)


@opcode("bfe")
def _extract(b: Builder) -> Step:
    bits, signed = bits_of(b.kind), b.kind[0] == "s"
    wide = STORAGE[bits]

    def extract(value: Array, start: Array, length: Array) -> Array:
        start = np.minimum(start & U32(255), U32(bits)).astype(S64)
        length = np.minimum(length & U32(255), U32(bits)).astype(S64)
        raw = value.view(wide).astype(U64)
        shifted = np.where(start >= 64, U64(0), raw >> np.minimum(start, 63).astype(U64))
        kept = np.where(length >= 64, U64(2**64 - 1), (U64(1) << np.minimum(length, 63).astype(U64)) - U64(1))
        result = shifted & kept
        if signed:
            sign = raw >> np.minimum(start + length - 1, bits - 1).clip(0).astype(U64) & U64(1)
            # above the word the field is filled with the sign, too
            known = np.minimum(length, np.maximum(bits - start, 0))
            above = np.where(known >= 64, U64(0), ~((U64(1) << np.minimum(known, 63).astype(U64)) - U64(1)))
            result = np.where((sign != 0) & (length > 0), result | above, result)
        return result.astype(wide)

    return map_operands(b, extract, type_dtype(b.kind), U32, U32)


@opcode("bfi")
def _insert(b: Builder) -> Step:
    bits = bits_of(b.kind)
    wide = STORAGE[bits]

    def insert(field: Array, into: Array, start: Array, length: Array) -> Array:
        start = np.minimum(start & U32(255), U32(bits)).astype(S64)
        length = np.minimum(length & U32(255), U32(bits)).astype(S64)
        kept = np.where(length >= 64, U64(2**64 - 1), (U64(1) << np.minimum(length, 63).astype(U64)) - U64(1))
        by = np.minimum(start, 63).astype(U64)
        mask = np.where(start >= 64, U64(0), kept << by)
        return ((into.astype(U64) & ~mask) | (field.astype(U64) << by & mask)).astype(wide)

    return map_operands(b, insert, wide, wide, U32, U32)


def bit_length(value: Array) -> Array:
    """Position of the highest one bit, plus one; zero for zero."""
    wide = value.astype(U64)
    high = (wide >> U64(32)).astype(np.float64)
    low = (wide & U64(0xFFFFFFFF)).astype(np.float64)
    return np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1]).astype(S64)


@opcode("popc")
def _popc(b: Builder) -> Step:
    return map_operands(b, lambda x: np.bitwise_count(x).astype(U32))


@opcode("clz")
def _clz(b: Builder) -> Step:
    bits = bits_of(b.kind)
    return map_operands(b, lambda x: (bits - bit_length(x)).astype(U32))


@opcode("bfind")
def _bfind(b: Builder) -> Step:
    bits, signed, amount = bits_of(b.kind), b.kind[0] == "s", "shiftamt" in b.mods

    def find(value: Array) -> Array:
        raw = value.view(STORAGE[bits])
        place = bit_length(np.where(value < 0, ~raw, raw) if signed else raw) - 1
        return np.where(place < 0, -1, bits - 1 - place if amount else place).astype(S32)

    return map_operands(b, find)


@opcode("brev")
def _brev(b: Builder) -> Step:
    bits = bits_of(b.kind)

    def reverse(value: Array) -> Array:
        octets = np.ascontiguousarray(value).reshape(-1).view(U8).reshape(-1, bits // 8)
        ones = np.unpackbits(octets, axis=1, bitorder="little")
        return np.packbits(ones[:, ::-1], axis=1, bitorder="little").view(STORAGE[bits]).reshape(value.shape)

    return map_operands(b, reverse)


COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def compare_step(b: Builder, compare: Callable[["Group"], Array]) -> Step:
    """``p|q = compare BoolOp c``, and of its inverse for ``q``."""
    first, second = b.pair(0)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    boolean = next((combine[part] for part in b.parts[1:] if part in combine), None)
    third = b.read(3, STORAGE[1]) if boolean is not None else None

    def step(group: "Group") -> None:
        found = compare(group)
        inverse = ~found
        if boolean is not None and third is not None:
            other = third(group)
            found, inverse = boolean(found, other), boolean(inverse, other)
        first(group, found)
        if second is not None:
            second(group, inverse)

    return step


@opcode("setp", domain="int")
def _setp(b: Builder) -> Step:
    function = COMPARE[b.parts[1]]
    unsigned = b.parts[1] in ("lo", "ls", "hi", "hs")
    dtype = STORAGE[bits_of(b.kind)] if unsigned else type_dtype(b.kind)
    left, right = b.read(1, dtype), b.read(2, dtype)
    return compare_step(b, lambda group: np.asarray(function(left(group), right(group))))


@opcode("selp")
def _selp(b: Builder) -> Step:
    storage = STORAGE[8 * type_dtype(b.kind).itemsize]
    yes, no, choice, write = b.read(1, storage), b.read(2, storage), b.read(3, STORAGE[1]), b.write(0)
    return lambda group: write(group, np.where(choice(group), yes(group), no(group)))


@opcode("slct")
def _slct(b: Builder) -> Step:
    storage = STORAGE[8 * type_dtype(b.types[0]).itemsize]
    yes, no, choice, write = b.read(1, storage), b.read(2, storage), b.read(3, type_dtype(b.types[1])), b.write(0)
    return lambda group: write(group, np.where(choice(group) >= 0, yes(group), no(group)))
