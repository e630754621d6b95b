"""Registers as bit patterns: which NumPy type holds what, and the formats that NumPy lacks."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S32, S64, F16, F32, F64 = np.int32, np.int64, np.float16, np.float32, np.float64

# what a register of so many bits is held as
STORAGE: dict[int, Any] = {
    1: np.dtype(np.bool_),
    8: np.dtype(U8),
    16: np.dtype(U16),
    32: np.dtype(U32),
    64: np.dtype(U64),
}
# 16 bytes move as one element: NumPy copies a complex number's bits, NaN or not
RAW: dict[int, Any] = {
    1: np.dtype(U8),
    2: np.dtype(U16),
    4: np.dtype(U32),
    8: np.dtype(U64),
    16: np.dtype(np.complex128),
}

FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32")


def type_dtype(name: str) -> Any:
    """NumPy type of a PTX type; 16-bit floats and pairs are bit patterns, for `decoder` to read."""
    if name == "pred":
        return STORAGE[1]
    if name == "f32":
        return np.dtype(F32)
    if name == "f64":
        return np.dtype(F64)
    if name in ("f16x2", "bf16x2"):
        return np.dtype(U32)
    if name in ("f16", "bf16"):
        return np.dtype(U16)
    kind = {"b": "u", "u": "u", "s": "i"}.get(name[0])
    if kind is None or name[1:] not in ("8", "16", "32", "64"):
        raise ValueError(name)
    return np.dtype(f"{kind}{int(name[1:]) // 8}")


def constant(value: int, dtype: Any) -> Any:
    """The scalar of that type whose bits are the low bits of ``value``."""
    if dtype == STORAGE[1]:
        return np.bool_(value != 0)
    bits = 8 * dtype.itemsize
    return np.array(value & ((1 << bits) - 1), dtype=STORAGE[bits]).view(dtype)[()]


def flush(value: Array) -> Array:
    """Subnormal float32 to zero of the same sign, as ``.ftz`` asks."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def narrow_odd(total: Array, error: Array) -> Array:
    """``total + error`` in float64, rounded to odd, so that a later rounding to fewer bits is exact."""
    total = np.asarray(total)
    bits = total.view(S64)
    away = (error > 0) == (total > 0)
    fixed = (bits + np.where(away, 1, -1)).view(F64)
    return np.where((np.abs(error) > 0) & ((bits & 1) == 0) & np.isfinite(total), fixed, total)


def exact_sum(a: Array, b: Array) -> Array:
    """``a + b`` of two float64, rounded to odd."""
    total = a + b
    part = total - a
    return narrow_odd(total, (a - (total - part)) + (b - part))


def to_f32(value: Array, mode: str = "rn") -> Array:
    """float64 rounded to float32: ``rn`` to nearest, ``rz`` to zero, ``rm`` down, ``rp`` up."""
    nearest = value.astype(F32)
    if mode == "rn":
        return nearest
    back = nearest.astype(F64)
    if mode == "rz":
        wrong, goal = np.abs(back) > np.abs(value), np.float32(0)
    elif mode == "rm":
        wrong, goal = back > value, np.float32(-np.inf)
    else:
        wrong, goal = back < value, np.float32(np.inf)
    return np.where(wrong, np.nextafter(nearest, goal), nearest)


def decode_bf16(bits: Array) -> Array:
    """bfloat16 patterns as float32."""
    return (bits.astype(U32) << U32(16)).view(F32)


def encode_bf16(value: Array, mode: str = "rn") -> Array:
    """float32 or float64 as bfloat16 patterns; NaN becomes 0x7FFF, as the hardware writes it."""
    value = np.asarray(value)
    if value.dtype == F64:
        single = value.astype(F32)
        value = single_odd(value, single)
    bits = value.view(U32)
    kept = bits >> U32(16)
    if mode == "rn":
        kept = (bits + U32(0x7FFF) + (kept & U32(1))) >> U32(16)
    return np.where(np.isnan(value), U16(0x7FFF), kept.astype(U16))


def single_odd(value: Array, single: Array) -> Array:
    """float64 to float32, rounded to odd; ``single`` is the value rounded to nearest."""
    error = value - single.astype(F64)
    bits = single.view(S32)
    fixed = (bits + np.where((error > 0) == (single > 0), 1, -1).astype(S32)).view(F32)
    return np.where((np.abs(error) > 0) & ((bits & 1) == 0) & np.isfinite(single), fixed, single)


def decode_f16(bits: Array) -> Array:
    """float16 patterns as float32."""
    return bits.view(F16).astype(F32)


def encode_f16(value: Array, mode: str = "rn") -> Array:
    """float32 or float64 as float16 patterns; NaN becomes 0x7FFF, as the hardware writes it."""
    value = np.asarray(value)
    nearest = value.astype(F16)
    bits = nearest.view(U16)
    if mode == "rz":
        bits = bits - (np.abs(nearest.astype(F64)) > np.abs(value)).astype(U16)
    return np.where(np.isnan(value), U16(0x7FFF), bits)


def pairs(bits: Array) -> Array:
    """32-bit words as rows of two 16-bit patterns, low half first."""
    return np.ascontiguousarray(bits).reshape(-1).view(U16).reshape(-1, 2)


def words(halves: Array) -> Array:
    """The inverse of `pairs`."""
    return np.ascontiguousarray(halves).view(U32).reshape(-1)


def decoder(kind: str, ftz: bool = False) -> Callable[[Array], Array]:
    """Bit patterns of a float type to float32; pairs get a second dimension."""
    if kind == "f32":
        return flush if ftz else lambda value: value
    if kind == "f16":
        return lambda bits: decode_f16(np.asarray(bits))
    if kind == "bf16":
        return lambda bits: decode_bf16(np.asarray(bits))
    if kind == "f16x2":
        return lambda bits: decode_f16(pairs(bits))
    if kind == "bf16x2":
        return lambda bits: decode_bf16(pairs(bits))
    raise ValueError(kind)


def encoder(kind: str, mode: str = "rn", ftz: bool = False) -> Callable[[Array], Array]:
    """float32 or float64 results to bit patterns of a float type, the inverse of `decoder`."""
    if kind == "f32":

        def encode(value: Array) -> Array:
            single = to_f32(value, mode) if value.dtype == F64 else value
            return flush(single) if ftz else single

        return encode
    if kind == "f16":
        return lambda value: encode_f16(value, mode)
    if kind == "bf16":
        return lambda value: encode_bf16(value, mode)
    if kind == "f16x2":
        return lambda value: words(encode_f16(value, mode))
    if kind == "bf16x2":
        return lambda value: words(encode_bf16(value, mode))
    raise ValueError(kind)
