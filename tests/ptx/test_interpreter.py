"""Integers, control flow and the instructions across a warp, on snippets whose results are known."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ptx import Fault, Program
from tests.ptx.snippets import LINES, compute, program, run

Ints = Callable[..., int]


def signed(value: int, bits: int) -> int:
    """The value that the low bits mean in two's complement."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def truncated(x: int, y: int) -> int:
    """Quotient rounded to zero."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def reversed_bits(x: int, bits: int) -> int:
    """The bits of x from the other end."""
    return int(f"{x:0{bits}b}"[::-1], 2)


def permuted(x: int, y: int, control: int) -> int:
    """prmt of the default mode."""
    octets = (x | y << 32).to_bytes(8, "little")
    result = 0
    for at in range(4):
        nibble = control >> 4 * at & 15
        byte = octets[nibble & 7]
        result |= (0xFF if byte & 0x80 else 0) << 8 * at if nibble & 8 else byte << 8 * at
    return result


def field(x: int, start: int, length: int, bits: int, is_signed: bool) -> int:
    """bfe by the manual's pseudo-code."""
    start, length = start & 255, length & 255
    sign = x >> min(start + length - 1, bits - 1) & 1 if is_signed and length else 0
    return sum((x >> (start + at) & 1 if at < length and start + at < bits else sign) << at for at in range(bits))


def inserted(x: int, y: int, start: int, length: int) -> int:
    """bfi.b32 by the manual's pseudo-code."""
    start, length = start & 255, length & 255
    for at in range(length):
        if start + at < 32:
            y = y & ~(1 << start + at) | (x >> at & 1) << start + at
    return y


# line; bits of the destination; bits of the sources; the destination from the sources, all unsigned
INTEGER: list[tuple[str, int, tuple[int, ...], Ints]] = [
    ("add.s32 d, x, y;", 32, (32, 32), lambda x, y: x + y),
    ("add.s64 d, x, y;", 64, (64, 64), lambda x, y: x + y),
    ("add.s16 d, x, y;", 16, (16, 16), lambda x, y: x + y),
    ("sub.u32 d, x, y;", 32, (32, 32), lambda x, y: x - y),
    (
        "add.sat.s32 d, x, y;",
        32,
        (32, 32),
        lambda x, y: max(-(1 << 31), min((1 << 31) - 1, signed(x, 32) + signed(y, 32))),
    ),
    ("mul.lo.s32 d, x, y;", 32, (32, 32), lambda x, y: x * y),
    ("mul.lo.s64 d, x, y;", 64, (64, 64), lambda x, y: x * y),
    ("mul.hi.u32 d, x, y;", 32, (32, 32), lambda x, y: x * y >> 32),
    ("mul.hi.s32 d, x, y;", 32, (32, 32), lambda x, y: signed(x, 32) * signed(y, 32) >> 32),
    ("mul.hi.u64 d, x, y;", 64, (64, 64), lambda x, y: x * y >> 64),
    ("mul.hi.s64 d, x, y;", 64, (64, 64), lambda x, y: signed(x, 64) * signed(y, 64) >> 64),
    ("mul.wide.u32 d, x, y;", 64, (32, 32), lambda x, y: x * y),
    ("mul.wide.s32 d, x, y;", 64, (32, 32), lambda x, y: signed(x, 32) * signed(y, 32)),
    ("mul.wide.u16 d, x, y;", 32, (16, 16), lambda x, y: x * y),
    ("mul.wide.s32 d, x, -24;", 64, (32,), lambda x: signed(x, 32) * -24),
    ("mad.lo.s32 d, x, y, z;", 32, (32, 32, 32), lambda x, y, z: x * y + z),
    ("mad.hi.s32 d, x, y, z;", 32, (32, 32, 32), lambda x, y, z: (signed(x, 32) * signed(y, 32) >> 32) + z),
    ("mad.wide.s32 d, x, y, z;", 64, (32, 32, 64), lambda x, y, z: signed(x, 32) * signed(y, 32) + z),
    ("div.u32 d, x, y;", 32, (32, 32), lambda x, y: x // y),
    ("rem.u32 d, x, y;", 32, (32, 32), lambda x, y: x % y),
    ("div.s32 d, x, y;", 32, (32, 32), lambda x, y: truncated(signed(x, 32), signed(y, 32))),
    (
        "rem.s32 d, x, y;",
        32,
        (32, 32),
        lambda x, y: signed(x, 32) - truncated(signed(x, 32), signed(y, 32)) * signed(y, 32),
    ),
    ("div.s64 d, x, y;", 64, (64, 64), lambda x, y: truncated(signed(x, 64), signed(y, 64))),
    ("div.s32 d, x, 7;", 32, (32,), lambda x: truncated(signed(x, 32), 7)),
    ("min.s32 d, x, y;", 32, (32, 32), lambda x, y: min(signed(x, 32), signed(y, 32))),
    ("max.u32 d, x, y;", 32, (32, 32), max),
    ("abs.s32 d, x;", 32, (32,), lambda x: abs(signed(x, 32))),
    ("neg.s32 d, x;", 32, (32,), lambda x: -x),
    ("not.b32 d, x;", 32, (32,), lambda x: ~x),
    ("and.b32 d, x, y;", 32, (32, 32), lambda x, y: x & y),
    ("or.b64 d, x, y;", 64, (64, 64), lambda x, y: x | y),
    ("xor.b16 d, x, y;", 16, (16, 16), lambda x, y: x ^ y),
    ("shl.b32 d, x, y;", 32, (32, 32), lambda x, y: x << y if y < 32 else 0),
    ("shl.b64 d, x, 3;", 64, (64,), lambda x: x << 3),
    ("shr.u32 d, x, y;", 32, (32, 32), lambda x, y: x >> y if y < 32 else 0),
    ("shr.s32 d, x, y;", 32, (32, 32), lambda x, y: signed(x, 32) >> min(y, 31)),
    ("shr.s64 d, x, 40;", 64, (64,), lambda x: signed(x, 64) >> 40),
    ("shr.u16 d, x, y;", 16, (16, 32), lambda x, y: x >> y if y < 16 else 0),
    ("shf.l.wrap.b32 d, x, y, z;", 32, (32, 32, 32), lambda x, y, z: (y << 32 | x) << (z & 31) >> 32),
    ("shf.r.wrap.b32 d, x, y, z;", 32, (32, 32, 32), lambda x, y, z: (y << 32 | x) >> (z & 31)),
    ("shf.r.clamp.b32 d, x, y, z;", 32, (32, 32, 32), lambda x, y, z: (y << 32 | x) >> min(z, 32)),
    ("lop3.b32 d, x, y, z, 0x96;", 32, (32, 32, 32), lambda x, y, z: x ^ y ^ z),
    ("lop3.b32 d, x, y, z, 0xEA;", 32, (32, 32, 32), lambda x, y, z: x & y | z),
    ("lop3.b32 d, x, y, z, 0xCA;", 32, (32, 32, 32), lambda x, y, z: x & y | ~x & z),
    ("prmt.b32 d, x, y, z;", 32, (32, 32, 32), permuted),
    ("prmt.b32 d, x, y, 0x5410;", 32, (32, 32), lambda x, y: x & 0xFFFF | (y & 0xFFFF) << 16),
    ("prmt.b32 d, x, y, 0x7632;", 32, (32, 32), lambda x, y: x >> 16 | y & 0xFFFF0000),
    ("prmt.b32.rc16 d, x, y, 1;", 32, (32, 32), lambda x, y: x >> 16 | x & 0xFFFF0000),
    ("bfe.u32 d, x, y, z;", 32, (32, 32, 32), lambda x, y, z: field(x, y, z, 32, False)),
    ("bfe.s32 d, x, y, z;", 32, (32, 32, 32), lambda x, y, z: field(x, y, z, 32, True)),
    ("bfe.u64 d, x, 12, 9;", 64, (64,), lambda x: field(x, 12, 9, 64, False)),
    ("bfi.b32 d, x, y, z, 11;", 32, (32, 32, 32), lambda x, y, z: inserted(x, y, z, 11)),
    ("bfind.u32 d, x;", 32, (32,), lambda x: x.bit_length() - 1),
    ("bfind.s32 d, x;", 32, (32,), lambda x: max(signed(x, 32), ~signed(x, 32)).bit_length() - 1),
    ("popc.b32 d, x;", 32, (32,), lambda x: x.bit_count()),
    ("popc.b64 d, x;", 32, (64,), lambda x: x.bit_count()),
    ("clz.b32 d, x;", 32, (32,), lambda x: 32 - x.bit_length()),
    ("clz.b64 d, x;", 32, (64,), lambda x: 64 - x.bit_length()),
    ("brev.b32 d, x;", 32, (32,), lambda x: reversed_bits(x, 32)),
    ("brev.b64 d, x;", 64, (64,), lambda x: reversed_bits(x, 64)),
    ("cvt.s64.s32 d, x;", 64, (32,), lambda x: signed(x, 32)),
    ("cvt.u64.u32 d, x;", 64, (32,), lambda x: x),
    ("cvt.u32.u64 d, x;", 32, (64,), lambda x: x),
    ("cvt.u32.u16 d, x;", 32, (16,), lambda x: x),
    ("cvt.s32.s8 d, x;", 32, (32,), lambda x: signed(x, 8)),
    ("cvt.u16.u32 d, x;", 16, (32,), lambda x: x),
    ("cvt.sat.u8.s32 d, x;", 32, (32,), lambda x: max(0, min(255, signed(x, 32)))),
    ("mov.b32 {%rs1, %rs2}, x; mov.b32 d, {%rs2, %rs1};", 32, (32,), lambda x: x >> 16 | x << 16),
    ("mov.b64 d, {x, y};", 64, (32, 32), lambda x, y: x | y << 32),
    ("{ .reg .b32 low; mov.b64 {low, _}, x; mov.b32 d, low; }", 32, (64,), lambda x: x),
    ("setp.lt.s32 %p1, x, y; selp.b32 d, 1, 0, %p1;", 32, (32, 32), lambda x, y: int(signed(x, 32) < signed(y, 32))),
    ("setp.hs.u32 %p1, x, y; selp.b32 d, 1, 0, %p1;", 32, (32, 32), lambda x, y: int(x >= y)),
    ("setp.ne.s64 %p1, x, y; selp.b32 d, 1, 0, %p1;", 32, (64, 64), lambda x, y: int(x != y)),
    ("setp.gt.u16 %p1, x, y; selp.b32 d, 1, 0, %p1;", 32, (16, 16), lambda x, y: int(x > y)),
    ("slct.u32.s32 d, x, y, z;", 32, (32, 32, 32), lambda x, y, z: x if signed(z, 32) >= 0 else y),
    (
        "setp.eq.u32 %p3, z, 0; setp.gt.u32.and %p1|%p2, x, y, !%p3; selp.b32 d, 1, 0, %p1; @%p2 add.u32 d, d, 2;",
        32,
        (32, 32, 32),
        lambda x, y, z: (x > y and z != 0) + 2 * (x <= y and z != 0),
    ),
]
DIVISIONS = ("div", "rem")


def edge_values(bits: int) -> st.SearchStrategy[int]:
    """Unsigned words, often small, or near a power of two."""
    powers = st.integers(0, bits).flatmap(lambda power: st.integers(-1, 1).map(lambda by: (1 << power) + by))
    anything = st.integers(0, (1 << bits) - 1)
    return st.one_of(st.integers(0, 40), powers, anything).map(lambda value: value % (1 << bits))


@pytest.mark.parametrize(
    ("line", "out", "bits", "oracle"), INTEGER, ids=lambda value: value if isinstance(value, str) else ""
)
@settings(max_examples=8)
@given(data=st.data())
def test_integer_instructions_agree_with_python(
    line: str, out: int, bits: tuple[int, ...], oracle: Ints, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.tuples(*[edge_values(width) for width in bits]), min_size=8, max_size=8))
    if line.startswith(DIVISIONS) and len(bits) > 1:
        rows = [(x, y or 1) for x, y in rows]
    columns = [
        np.array(column, dtype=f"u{width // 8}") for column, width in zip(zip(*rows, strict=True), bits, strict=True)
    ]
    found = compute(line, f"u{out // 8}", *columns)
    assert found.tolist() == [oracle(*row) % (1 << out) for row in rows]


def test_division_by_zero_is_a_fault_of_the_thread_that_divides() -> None:
    with pytest.raises(Fault, match=r"thread \(1, 0, 0\).*division by zero; PTX line \d+: div.u32 d, x, y"):
        compute("div.u32 d, x, y;", "u4", np.array([4, 4], "u4"), np.array([1, 0], "u4"))


def test_lanes_diverge_and_meet_again_at_the_lowest_program_counter() -> None:
    out = np.zeros(64, dtype=np.uint32)
    body = """
    and.b32 %r1, t, 3; mov.u32 %r2, 0; mov.u32 %r3, 0;
    LOOP: add.u32 %r2, %r2, 10; setp.ge.u32 %p1, %r3, %r1; @%p1 bra OUT; add.u32 %r3, %r3, 1; bra LOOP;
    OUT: activemask.b32 %r4; setp.eq.u32 %p2, %r4, -1; @!%p2 trap;
    add.u64 %rd1, a0, at4; st.global.u32 [%rd1], %r2;
    """
    report = run(body, out, block=64)
    assert out.tolist() == [10 * (lane % 4 + 1) for lane in range(64)]
    assert report.instructions == 2 * (6 + 3 + 4 * 3 + 3 * 2 + 5 + 1)


def test_an_instruction_under_a_predicate_leaves_the_other_lanes_alone() -> None:
    out = np.zeros(32, dtype=np.uint32)
    run(
        "setp.lt.u32 %p1, t, 5; mov.u32 %r1, 7; @%p1 mov.u32 %r1, 9; @!%p1 add.u32 %r1, %r1, t;"
        "add.u64 %rd1, a0, at4; @%p1 st.global.u32 [%rd1], %r1; @!%p1 st.global.u32 [%rd1], %r1;",
        out,
    )
    assert out.tolist() == [9 if lane < 5 else 7 + lane for lane in range(32)]


def test_threads_that_return_early_are_gone_and_the_others_go_on() -> None:
    out = np.zeros(64, dtype=np.uint32)
    body = "setp.gt.u32 %p1, t, 40; @%p1 ret; bar.sync 0; add.u64 %rd1, a0, at4; st.global.u32 [%rd1], 1;"
    for schedule in ("lockstep", "warps"):
        out[:] = 0
        run(body, out, block=64, schedule=schedule)
        assert out.tolist() == [1] * 41 + [0] * 23


def test_special_registers_number_threads_and_ctas_x_first() -> None:
    out = np.zeros((2, 3, 4, 40, 6), dtype=np.uint32)
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %tid.y; mov.u32 %r4, %warpid; mov.u32 %r5, %laneid;
    mov.u32 %r6, %nctaid.x; mov.u32 %r7, %ntid.x; mov.u32 %r8, %ctaid.z;
    mad.lo.u32 %r9, %r8, 3, %r2; mad.lo.u32 %r9, %r9, %r6, %r1; mad.lo.u32 %r9, %r9, 2, %r3;
    mad.lo.u32 %r9, %r9, %r7, t; mad.wide.u32 %rd1, %r9, 24, a0;
    st.global.v2.u32 [%rd1], {t, %r3}; st.global.v2.u32 [%rd1+8], {%r1, %r2}; st.global.v2.u32 [%rd1+16], {%r4, %r5};
    """
    program(body).run("k", [out], grid=(4, 3, 2), block=(20, 2))
    z, y, x, thread = np.unravel_index(np.arange(out.size // 6), out.shape[:4])
    expected = np.stack([thread % 20, thread // 20, x, y, thread // 32, thread % 32], axis=1)
    assert np.array_equal(out.reshape(-1, 6), expected)
    assert z.max() == 1


@pytest.mark.parametrize(
    ("line", "source"),
    [
        ("shfl.sync.bfly.b32 %r2|%p1, %r1, 5, 31, -1;", lambda lane: (lane ^ 5, True)),
        ("shfl.sync.down.b32 %r2|%p1, %r1, 3, 31, -1;", lambda lane: (lane + 3, True) if lane < 29 else (lane, False)),
        ("shfl.sync.up.b32 %r2|%p1, %r1, 2, 0, -1;", lambda lane: (lane - 2, True) if lane > 1 else (lane, False)),
        ("shfl.sync.idx.b32 %r2|%p1, %r1, 9, 31, -1;", lambda lane: (9, True)),
        ("shfl.sync.idx.b32 %r2|%p1, %r1, 1, 0x1807, -1;", lambda lane: (lane & 24 | 1, True)),
    ],
)
def test_shuffles_read_the_lane_that_the_manual_says(line: str, source: Callable[[int], tuple[int, bool]]) -> None:
    out = np.zeros((32, 2), dtype=np.uint32)
    run(
        f"add.u32 %r1, t, 100; {line} selp.u32 %r3, 1, 0, %p1; add.u64 %rd1, a0, at8;"
        "st.global.v2.u32 [%rd1], {%r2, %r3};",
        out,
    )
    assert out.tolist() == [[100 + source(lane)[0], source(lane)[1]] for lane in range(32)]


def test_a_shuffle_from_or_without_a_lane_it_names_is_a_fault() -> None:
    half = "setp.lt.u32 %p1, t, 16; @!%p1 bra END; shfl.sync.bfly.b32 %r1, t, {by}, 31, {mask}; END: "
    run(half.format(by=8, mask="0xffff"))
    with pytest.raises(Fault, match="waits for lanes 0xffff0000 of member mask 0xffffffff"):
        run(half.format(by=8, mask="-1"))
    with pytest.raises(Fault, match="shfl reads lane 16, which is not active"):
        run(half.format(by=16, mask="0xffff"))
    with pytest.raises(Fault, match="does not name"):
        run(half.format(by=1, mask="0xff"))


def test_votes_matches_and_reductions_see_the_lanes_of_their_own_warp() -> None:
    out = np.zeros((64, 8), dtype=np.uint32)
    body = """
    setp.gt.u32 %p1, t, 40; vote.sync.ballot.b32 %r1, %p1, -1; vote.sync.any.pred %p2, %p1, -1; selp.u32 %r2, 1, 0, %p2;
    vote.sync.all.pred %p3, !%p1, -1; selp.u32 %r3, 1, 0, %p3; shr.u32 %r9, t, 3; match.any.sync.b32 %r4, %r9, -1;
    redux.sync.add.u32 %r5, t, -1; redux.sync.max.s32 %r6, t, -1; match.all.sync.b32 %r7|%p4, 5, -1;
    mov.u32 %r8, %lanemask_lt;
    mad.wide.u32 %rd1, t, 32, a0; st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};
    st.global.v4.u32 [%rd1+16], {%r5, %r6, %r7, %r8};
    """
    run(body, out, block=64)
    assert out[0].tolist() == [0, 0, 1, 0xFF, 496, 31, 0xFFFFFFFF, 0]
    assert out[45].tolist() == [0xFFFFFE00, 1, 0, 0xFF00, 1520, 63, 0xFFFFFFFF, (1 << 13) - 1]


def test_a_register_that_was_never_written_is_a_fault() -> None:
    with pytest.raises(Fault, match=r"%r2 is read but never written; PTX line \d+: add.u32 %r1, %r2, 1"):
        run("add.u32 %r1, %r2, 1;")


def test_names_in_inner_braces_hide_outer_ones() -> None:
    out = np.zeros(32, dtype=np.uint32)
    run(
        "mov.u32 %r1, 1; { .reg .b32 %r1; mov.u32 %r1, 2; { .reg .pred p; } }"
        "add.u64 %rd1, a0, at4; st.global.u32 [%rd1], %r1;",
        out,
    )
    assert out.tolist() == [1] * 32


def test_an_unknown_instruction_names_its_line() -> None:
    with pytest.raises(NotImplementedError, match=r"tex\.1d\.v4 is not known.*PTX line \d+: tex.1d.v4"):
        run("tex.1d.v4 {%r1}, [a0];", np.zeros(1))
    with pytest.raises(NotImplementedError, match=r"add\.f64"):
        run("add.f64 %rd1, %rd1, %rd2;")


def test_a_kernel_that_does_not_end_and_a_trap_are_faults() -> None:
    with pytest.raises(Fault, match="max_instructions=1000"):
        run("LOOP: add.u32 t, t, 1; bra LOOP;", max_instructions=1000)
    with pytest.raises(Fault, match=r"thread \(3, 0, 0\).*trap"):
        run("setp.eq.u32 %p1, t, 3; @%p1 trap;")


def test_a_uniform_branch_that_is_not_uniform_is_a_fault() -> None:
    with pytest.raises(Fault, match=r"bra\.uni"):
        run("setp.eq.u32 %p1, t, 3; @%p1 bra.uni END; mov.u32 %r1, 1; END: ")


def test_a_branch_through_a_table_goes_where_its_index_says() -> None:
    out = np.zeros(32, dtype=np.uint32)
    body = """
    and.b32 %r1, t, 1; TABLE: .branchtargets EVEN, ODD; brx.idx %r1, TABLE;
    EVEN: mov.u32 %r2, 5; bra END; ODD: mov.u32 %r2, 6; END: add.u64 %rd1, a0, at4; st.global.u32 [%rd1], %r2;
    """
    run(body, out)
    assert out.tolist() == [5, 6] * 16


def test_the_text_says_its_version_its_kernels_and_what_they_take() -> None:
    found = Program(
        LINES
        + ".shared .align 16 .b8 pool[48];\n.visible .entry one(.param .u64 .ptr .global .align 1 x, .param .f32 s,\n"
        ".param .align 8 .b8 box[24]) .maxntid 64, 2, 1 .minnctapersm 2 { .shared .align 4 .f32 mine[4]; ret; }\n"
        '.entry two() .reqntid 32 { .pragma "nounroll"; .loc 1 2 3\n ret; }'
    )
    assert (found.version, found.target, list(found.entries)) == ("7.4", "sm_80", ["one", "two"])
    one = found.entries["one"]
    assert one.parameters == [("x", "u64", 8), ("s", "f32", 4), ("box", "b8", 24)]
    assert (one.max_threads, one.shared_bytes, found.entries["two"].max_threads) == (128, 64, 32)
    with pytest.raises(Fault, match="compiled for at most 128"):
        found.run("one", [None, 1.5, bytes(24)], grid=(1,), block=(256,))
    with pytest.raises(Fault, match=r"compiled for \(32, 1, 1\)"):
        found.run("two", [], grid=(1,), block=(16,))
