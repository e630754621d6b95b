"""Floating-point arithmetic and conversions, against exact rationals, NumPy and torch."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.ptx.snippets import compute

SPECIALS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    2.0**-149,
    -(2.0**-130),
    2.0**-126,
    3.4e38,
    -3.4e38,
    math.inf,
    -math.inf,
    math.nan,
    1e-3,
]


def float_columns(count: int) -> list[Any]:
    """Columns in which each special value meets each, and random ones."""
    rng = np.random.default_rng(count)
    specials = np.array(SPECIALS, dtype=np.float32)
    columns = [
        np.tile(specials, len(specials)),
        np.repeat(specials, len(specials)),
        np.tile(specials, len(specials))[::-1],
    ]
    noise = rng.standard_normal((3, 512)).astype(np.float32) * np.float32(2.0) ** rng.integers(-20, 20, (3, 512))
    return [np.concatenate([column, part.astype(np.float32)]) for column, part in zip(columns, noise, strict=True)][
        :count
    ]


def rounded(value: Fraction, mode: str) -> np.float32:
    """A rational rounded to float32, within the range of normal numbers."""
    if value == 0:
        return np.float32(0)
    exponent = max(math.frexp(float(abs(value)))[1] - 24, -149)
    scaled = value / Fraction(2) ** exponent
    modes: dict[str, Callable[..., int]] = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}
    return np.float32(math.ldexp(modes[mode](scaled), exponent))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["fma", "add", "mul"])
def test_float_arithmetic_rounds_once_and_in_its_direction(name: str, mode: str) -> None:
    x, y, z = (column[-512:] for column in float_columns(3))
    z = (z * np.float32(2.0**-12)).astype(np.float32)
    line, function = {
        "fma": (f"fma.{mode}.f32 d, x, y, z;", lambda a, b, c: a * b + c),
        "add": (f"add.{mode}.f32 d, x, y;", lambda a, b, c: a + b),
        "mul": (f"mul.{mode}.f32 d, x, y;", lambda a, b, c: a * b),
    }[name]
    found = compute(line, "f4", x, y, z)
    exact = [function(*(Fraction(float(value)) for value in row)) for row in zip(x, y, z, strict=True)]
    assert found.tolist() == [rounded(value, mode) for value in exact]


def same(found: Any, expected: Any) -> bool:
    """Bit-equal, with one NaN as good as another."""
    return bool(
        ((found == expected) & (np.signbit(found) == np.signbit(expected)) | np.isnan(found) & np.isnan(expected)).all()
    )


FLOATS: list[tuple[str, int, Callable[..., Any]]] = [
    ("add.f32 d, x, y;", 2, np.add),
    ("sub.f32 d, x, y;", 2, np.subtract),
    ("mul.f32 d, x, y;", 2, np.multiply),
    ("div.rn.f32 d, x, y;", 2, np.divide),
    ("rcp.rn.f32 d, x;", 1, lambda x: np.float32(1) / x),
    ("sqrt.rn.f32 d, x;", 1, np.sqrt),
    ("min.f32 d, x, y;", 2, lambda x, y: np.where(x == y, np.where(np.signbit(x), x, y), np.fmin(x, y))),
    ("max.f32 d, x, y;", 2, lambda x, y: np.where(x == y, np.where(np.signbit(x), y, x), np.fmax(x, y))),
    ("max.NaN.f32 d, x, y;", 2, lambda x, y: np.where(x == y, np.where(np.signbit(x), y, x), np.maximum(x, y))),
    ("abs.f32 d, x;", 1, np.abs),
    ("neg.f32 d, x;", 1, np.negative),
    ("copysign.f32 d, x, y;", 2, lambda x, y: np.copysign(y, x)),
    ("cvt.rni.f32.f32 d, x;", 1, np.rint),
    ("cvt.rzi.f32.f32 d, x;", 1, np.trunc),
    ("cvt.sat.f32.f32 d, x;", 1, lambda x: np.where(np.isnan(x), 0, np.clip(x, 0, 1)) + np.float32(0)),
    ("ex2.approx.f32 d, x;", 1, lambda x: np.exp2(x.astype(np.float64)).astype(np.float32)),
    ("tanh.approx.f32 d, x;", 1, lambda x: np.tanh(x.astype(np.float64)).astype(np.float32)),
]


@pytest.mark.parametrize(
    ("line", "sources", "oracle"), FLOATS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_float_instructions_agree_with_numpy_special_values_included(
    line: str, sources: int, oracle: Callable[..., Any]
) -> None:
    columns = float_columns(sources)
    found = compute(line, "f4", *columns)
    with np.errstate(all="ignore"):
        expected = oracle(*columns)
    if "sat" in line:
        found = found + np.float32(0)
    assert same(found, expected)


def test_ftz_flushes_subnormal_sources_and_results_and_keeps_the_sign() -> None:
    tiny = np.array([2.0**-130, -(2.0**-130), 2.0**-126, -(2.0**-126)], dtype=np.float32)
    half = np.full(4, 0.5, dtype=np.float32)
    assert same(compute("mul.ftz.f32 d, x, y;", "f4", tiny, half), np.array([0.0, -0.0, 0.0, -0.0], dtype=np.float32))
    assert same(compute("add.ftz.f32 d, x, x;", "f4", tiny), np.array([0, -0.0, 2.0**-125, -(2.0**-125)], np.float32))
    assert same(compute("add.f32 d, x, x;", "f4", tiny), tiny + tiny)


@pytest.mark.parametrize("name", ["lt", "eq", "ne", "ge", "ltu", "equ", "neu", "geu", "num", "nan"])
def test_float_comparisons_are_false_with_nan_unless_unordered(name: str) -> None:
    x, y = float_columns(2)
    plain = {"lt": x < y, "eq": x == y, "ne": (x < y) | (x > y), "ge": x >= y, "num": x == x, "nan": x != x}
    nan = np.isnan(x) | np.isnan(y)
    expected = {"num": ~nan, "nan": nan}.get(name, plain[name[:2]] | nan if name.endswith("u") else plain.get(name))
    found = compute(f"setp.{name}.f32 %p1, x, y; selp.b32 d, 1, 0, %p1;", "u4", x, y)
    assert found.astype(bool).tolist() == np.asarray(expected).tolist()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversions_to_16_bits_agree_with_torch(kind: str) -> None:
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    x, y = float_columns(2)
    low, high = (torch.from_numpy(column).to(dtype) for column in (x, y))
    found = torch.from_numpy(compute(f"cvt.rn.{kind}x2.f32 d, y, x;", "i4", x, y)).view(dtype).view(-1, 2)
    single = torch.from_numpy(compute(f"cvt.rn.{kind}.f32 d, x;", "i2", x)).view(dtype)
    for result, expected in ((found[:, 0], low), (found[:, 1], high), (single, low)):
        nan = expected.isnan()
        assert torch.equal(result[~nan].view(torch.int16), expected[~nan].view(torch.int16))
        assert (result[nan].view(torch.int16) == 0x7FFF).all()


def test_conversions_towards_zero_cut_off_what_does_not_fit() -> None:
    x = np.array([1.0 + 2.0**-8 - 2.0**-20, -(1.0 + 2.0**-8), 65519.0, 65535.9, 2.0**-24 * 1.9], dtype=np.float32)
    found = compute("cvt.rz.bf16.f32 d, x;", "u2", x)
    assert found.tolist() == (x.view(np.uint32) >> 16).tolist()
    found = compute("cvt.rz.f16.f32 d, x;", "f2", x)
    assert found.tolist() == [1.0029296875, -1.00390625, 65504.0, 65504.0, 2.0**-24]


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_floats_become_integers_clamped_and_nan_zero(mode: str) -> None:
    x = np.array([2.5, -2.5, 3.4e38, -3.4e38, math.nan, math.inf, 2147483520.0, -0.4], dtype=np.float32)
    modes: dict[str, Callable[..., int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    whole = modes[mode]
    clamp = {"s32": (-(1 << 31), (1 << 31) - 1), "u32": (0, (1 << 32) - 1)}
    for kind, (least, most) in clamp.items():
        expected = [
            0 if math.isnan(v) else most if v > most else least if v < least else min(max(whole(v), least), most)
            for v in map(float, x)
        ]
        assert compute(f"cvt.{mode}.{kind}.f32 d, x;", "i4" if kind == "s32" else "u4", x).tolist() == expected


def test_integers_become_floats_rounded_to_nearest() -> None:
    x = np.array([0, 1, -1, (1 << 24) + 1, (1 << 31) - 1, -(1 << 31)], dtype=np.int32)
    assert compute("cvt.rn.f32.s32 d, x;", "f4", x).tolist() == x.astype(np.float32).tolist()
    assert compute("cvt.rz.f32.s32 d, x;", "f4", x)[3:5].tolist() == [float(1 << 24), float((1 << 31) - 128)]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("packed", [False, True])
def test_16_bit_arithmetic_rounds_the_exact_result_once(kind: str, packed: bool) -> None:
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    generator = torch.Generator().manual_seed(7)
    x, y, z = (torch.randn(512, generator=generator).to(dtype) for _ in range(3))
    exact = {"fma.rn": x.double() * y.double() + z.double()}
    if kind == "f16":
        exact |= {"add": x.double() + y.double(), "mul": x.double() * y.double()}
    columns = [column.view(torch.int16).numpy().view(np.int32 if packed else np.int16) for column in (x, y, z)]
    for name, expected in exact.items():
        line = f"{name}.{kind}{'x2' if packed else ''} d, x, y{', z' if 'fma' in name else ''};"
        found = compute(line, "i4" if packed else "i2", *columns[: 3 if "fma" in name else 2]).view(np.int16)
        # torch rounds float64 to 16 bits directly for float16; for bfloat16 through float32, exact for these values
        assert torch.equal(torch.from_numpy(found).view(dtype), expected.to(dtype))


def test_testp_tells_classes_of_numbers_apart() -> None:
    x = np.array([0.0, 1.0, 2.0**-130, math.inf, math.nan], dtype=np.float32)
    for name, expected in (
        ("finite", [1, 1, 1, 0, 0]),
        ("infinite", [0, 0, 0, 1, 0]),
        ("number", [1, 1, 1, 1, 0]),
        ("notanumber", [0, 0, 0, 0, 1]),
        ("normal", [0, 1, 0, 0, 0]),
        ("subnormal", [0, 0, 1, 0, 0]),
    ):
        assert compute(f"testp.{name}.f32 %p1, x; selp.b32 d, 1, 0, %p1;", "u4", x).tolist() == expected
