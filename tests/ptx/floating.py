"""Floating-point instructions and conversions: correctly rounded, the approximate ones too.

Legend: 16-bit formats are computed in float32 or float64 and rounded once; a fused multiply-add is summed in float64
rounded to odd, so that its last rounding is the only one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .integer import compare_step
from .operands import Builder, Step, opcode
from .values import (
    F32,
    F64,
    STORAGE,
    U32,
    Array,
    decoder,
    encoder,
    exact_sum,
    flush,
    type_dtype,
)

if TYPE_CHECKING:
    from .group import Group

Function = Callable[..., Any]
ROUNDINGS = ("rn", "rz", "rm", "rp")
TO_INTEGER: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def rounding(b: Builder) -> str:
    """Rounding mode of an instruction, to nearest by default."""
    return next((part for part in b.parts[1:] if part in ROUNDINGS), "rn")


def map_floats(b: Builder, function: Function) -> Step:
    """``d = function(a, b, ...)`` over decoded values, then saturated, clipped and rounded as the opcode asks."""
    kind, ftz = b.kind, "ftz" in b.mods
    decode, encode = decoder(kind, ftz), encoder(kind, rounding(b), ftz)
    dtype = type_dtype(kind)
    reads, write = [b.read(at, dtype) for at in range(1, len(b.operands))], b.write(0)
    limit = limiter(b)
    if kind == "f32" and not ftz and limit is None and rounding(b) == "rn" and len(reads) == 2:
        first, second = reads

        def plain(group: "Group") -> None:
            value = function(first(group), second(group))
            write(group, value if value.dtype == F32 else value.astype(F32))

        return plain

    def step(group: "Group") -> None:
        value = function(*[decode(read(group)) for read in reads])
        write(group, encode(value if limit is None else limit(value)))

    return step


def limiter(b: Builder) -> Function | None:
    """What ``.sat`` and ``.relu`` do to a result: NaN becomes 0 and stays NaN."""
    if "sat" in b.mods:
        return lambda value: np.where(np.isnan(value), value.dtype.type(0), np.clip(value, 0, 1))
    if "relu" in b.mods:
        return lambda value: np.where(value < 0, value.dtype.type(0), value)
    return None


def wide(value: Array) -> Array:
    """float32 as float64."""
    return value.astype(F64)


def fused(x: Array, y: Array, z: Array) -> Array:
    """``x * y + z`` with one rounding to come."""
    return exact_sum(np.asarray(wide(x) * wide(y)), np.asarray(wide(z)))


@opcode("add", "sub", "mul", domain="float")
def _arithmetic(b: Builder) -> Step:
    if b.kind == "f32" and rounding(b) != "rn":
        exact: dict[str, Function] = {
            "add": lambda x, y: exact_sum(np.asarray(wide(x)), np.asarray(wide(y))),
            "sub": lambda x, y: exact_sum(np.asarray(wide(x)), np.asarray(-wide(y))),
            "mul": lambda x, y: wide(x) * wide(y),
        }
        return map_floats(b, exact[b.parts[0]])
    return map_floats(b, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[b.parts[0]])


@opcode("fma", "mad", domain="float")
def _fma(b: Builder) -> Step:
    return map_floats(b, fused)


@opcode("div", domain="float")
def _div(b: Builder) -> Step:
    if rounding(b) != "rn":
        raise b.ins.unsupported("has a rounding that is not supported")
    return map_floats(b, np.divide)


UNARY: dict[str, Function] = {
    "rcp": lambda x: 1 / wide(x),
    "sqrt": lambda x: np.sqrt(wide(x)),
    "rsqrt": lambda x: 1 / np.sqrt(wide(x)),
    "ex2": lambda x: np.exp2(wide(x)),
    "lg2": lambda x: np.log2(wide(x)),
    "tanh": lambda x: np.tanh(wide(x)),
    "sin": lambda x: np.sin(wide(x)),
    "cos": lambda x: np.cos(wide(x)),
}


@opcode(*UNARY, domain="float")
def _unary(b: Builder) -> Step:
    return map_floats(b, UNARY[b.parts[0]])


@opcode("min", "max", domain="float")
def _extreme(b: Builder) -> Step:
    keeps_nan, least = "NaN" in b.mods, b.parts[0] == "min"
    if "xorsign" in b.mods:
        raise b.ins.unsupported()

    def extreme(x: Array, y: Array) -> Array:
        first = (x < y) | ((x == y) & np.signbit(x)) if least else (x > y) | ((x == y) & ~np.signbit(x))
        found = np.where(first, x, y)
        if keeps_nan:
            return np.where(np.isnan(x) | np.isnan(y), x.dtype.type(np.nan), found)
        return np.where(np.isnan(y), x, np.where(np.isnan(x), y, found))

    return map_floats(b, extreme)


SIGNS = {"f32": 0x80000000, "f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000}


@opcode("abs", "neg", domain="float")
def _sign(b: Builder) -> Step:
    dtype = STORAGE[8 * type_dtype(b.kind).itemsize]
    sign = dtype.type(SIGNS[b.kind])
    first, write = b.read(1, dtype), b.write(0)
    negate, ftz = b.parts[0] == "neg", "ftz" in b.mods and b.kind == "f32"

    def step(group: "Group") -> None:
        value = first(group)
        value = flush(value.view(F32)).view(U32) if ftz else value
        write(group, value ^ sign if negate else value & ~sign)

    return step


@opcode("copysign", domain="float")
def _copysign(b: Builder) -> Step:
    sign = U32(1 << 31)
    first, second, write = b.read(1, U32), b.read(2, U32), b.write(0)
    return lambda group: write(group, (first(group) & sign) | (second(group) & ~sign))


@opcode("testp", domain="float")
def _testp(b: Builder) -> Step:
    tiny = np.float32(2.0**-126)
    tests: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }
    test, first, write = tests[b.parts[1]], b.read(1), b.write(0)
    return lambda group: write(group, np.asarray(test(first(group))))


def unordered(function: Function) -> Function:
    """The comparison that is also true where a side is NaN."""
    return lambda x, y: function(x, y) | np.isnan(x) | np.isnan(y)


_ORDERED: dict[str, Function] = {
    "eq": np.equal,
    "ne": lambda x, y: (x < y) | (x > y),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE: dict[str, Function] = {
    **_ORDERED,
    **{f"{name}u": unordered(function) for name, function in _ORDERED.items()},
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}


@opcode("setp", domain="float")
def _setp(b: Builder) -> Step:
    function, decode = COMPARE[b.parts[1]], decoder(b.kind, "ftz" in b.mods)
    left, right = b.read(1), b.read(2)
    if not b.kind.endswith("x2"):
        return compare_step(b, lambda group: np.asarray(function(decode(left(group)), decode(right(group)))))
    if any(part in ("and", "or", "xor") for part in b.parts):
        raise b.ins.unsupported()
    low, high = b.pair(0)

    def step(group: "Group") -> None:
        found = function(decode(left(group)), decode(right(group)))
        low(group, np.ascontiguousarray(found[:, 0]))
        if high is not None:
            high(group, np.ascontiguousarray(found[:, 1]))

    return step


@opcode("cvt")
def _cvt(b: Builder) -> Step:
    target, source = b.types
    if target in ("f16x2", "bf16x2"):
        return _pack(b, target)
    first, write = b.read(1, type_dtype(source)), b.write(0)
    convert = converter(b, target, source)
    return lambda group: write(group, convert(first(group)))


def _pack(b: Builder, target: str) -> Step:
    """``cvt.rn.bf16x2.f32 d, a, b``: the first source is the upper half."""
    encode, limit = encoder(target[:-2], rounding(b)), limiter(b)
    upper, lower, write = b.read(1, F32), b.read(2, F32), b.write(0)

    def half(value: Array) -> Array:
        return encode(value if limit is None else limit(value)).astype(U32)

    return lambda group: write(group, half(lower(group)) | half(upper(group)) << U32(16))


def converter(b: Builder, target: str, source: str) -> Function:
    """Function from values of one type to values of another."""
    floats = ("f16", "bf16", "f32")
    into, out_of = target in floats, source in floats
    ftz, sat, mode = "ftz" in b.mods, "sat" in b.mods, rounding(b)
    dtype = None if into else type_dtype(target)
    if (target not in floats and target[0] == "f") or (source not in floats and source[0] == "f"):
        raise b.ins.unsupported("is a type that this interpreter does not convert")
    if not into and not out_of:
        return lambda value: integer_to_integer(value, dtype, sat)
    whole = next((TO_INTEGER[part] for part in b.parts if part in TO_INTEGER), None)
    if not into:
        decode = decoder(source, ftz)
        round_off = whole or np.trunc
        return lambda value: float_to_integer(round_off(wide(decode(np.asarray(value)))), dtype)
    if not out_of:
        encode = encoder(target, mode, False)
        return lambda value: encode(integer_to_float(np.asarray(value), target, mode))
    decode, encode, limit = decoder(source, ftz), encoder(target, mode, ftz), limiter(b)

    def convert(value: Array) -> Array:
        result = decode(np.asarray(value))
        result = result if whole is None else whole(result)
        return encode(result if limit is None else limit(result))

    return convert


def integer_to_integer(value: Array, dtype: Any, sat: bool) -> Array:
    """Low bits, or with ``sat`` the nearest value that the type has."""
    if sat:
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        low, high = np.iinfo(value.dtype).min, np.iinfo(value.dtype).max
        value = np.clip(value, value.dtype.type(max(least, low)), value.dtype.type(min(most, high)))
    return value.astype(dtype)


def float_to_integer(value: Array, dtype: Any) -> Array:
    """A whole number, clamped to the type; NaN is 0, in 64 bits the highest bit."""
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    high = value >= float(most)
    low = value <= float(least)
    inside = np.where(high | low | np.isnan(value), 0.0, value)
    found = inside.astype(dtype)
    found = np.where(high, dtype.type(most), np.where(low, dtype.type(least), found))
    if dtype.itemsize == 8:
        return np.where(np.isnan(value), np.array(1 << 63, dtype=np.uint64).view(dtype), found)
    return found


def integer_to_float(value: Array, target: str, mode: str) -> Array:
    """An integer as a float that the encoder of ``target`` rounds once."""
    if mode == "rn" and target == "f32":
        return value.astype(F32)
    if value.dtype.itemsize == 8:
        # through float64 rounded to odd, so that the last rounding is the only one
        rough = value.astype(F64)
        exact = np.array([int(number) for number in value.reshape(-1).tolist()], dtype=object)
        error = np.array([float(number - int(part)) for number, part in zip(exact, rough.reshape(-1), strict=True)])
        return exact_sum(rough, error.reshape(rough.shape))
    return value.astype(F64)
