"""Matrix instructions against brute force by the layouts of the PTX manual, element by element."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.ptx import Fault
from tests.ptx.snippets import run

SHARED = ".extern .shared .align 16 .b8 pool[];"
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
KINDS = pytest.mark.parametrize("kind", ["bf16", "f16"])


def halves(kind: str, *shape: int, seed: int) -> Any:
    """Random 16-bit patterns of numbers whose sums of products are exact in float32, and those numbers."""
    numbers = np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32) / 4
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    return torch.from_numpy(numbers).to(dtype).view(torch.int16).numpy().view(np.uint16), numbers


MMA = """
mad.wide.u32 %rd1, t, {a_bytes}, a0; ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1];
mad.wide.u32 %rd2, t, {b_bytes}, a1; ld.global.{b_load}, [%rd2];
add.u64 %rd3, a2, at16; ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd3];
add.u64 %rd4, a3, at4; ld.global.u32 %r9, [%rd4];
{guard}
{name}.{kind}.{kind}.f32 {{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {b_registers}, {{%f1, %f2, %f3, %f4}}{tail};
st.global.v4.f32 [%rd3], {{%f1, %f2, %f3, %f4}}; END:
"""


def multiply(
    kind: str, a: Any, b: Any, c: Any, words: Any, selector: int | None, guard: str = "", flavour: str = ""
) -> int:
    """Run mma on ready fragments ``[lanes, halves]``, mma.sp if there is a selector, write ``c``, and count."""
    sparse = selector is not None
    shape = f"mma.sp{flavour}.sync.aligned.m16n8k32.row.col.f32" if sparse else "mma.sync.aligned.m16n8k16.row.col.f32"
    registers = "{%r5, %r6, %r7, %r8}" if sparse else "{%r5, %r6}"
    body = MMA.format(
        a_bytes=16,
        b_bytes=16 if sparse else 8,
        b_load=f"v4.u32 {registers}" if sparse else f"v2.u32 {registers}",
        b_registers=registers,
        guard=guard,
        name=shape,
        kind=kind,
        tail=f", %r9, 0x{selector}" if sparse else "",
    )
    return run(body, a, b, c, words, block=len(a)).mma


def metadata(pairs: Any, selector: int) -> Any:
    """Words ``[32]`` for pairs ``[16, 8, 2]``; lanes that do not supply hold garbage."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 32, dtype=np.uint32)
    for g in range(8):
        for h in range(2):
            word = 0
            for half in range(2):
                for place in range(4):
                    low, high = pairs[g + 8 * half][4 * h + place]
                    word |= (int(low) | int(high) << 2) << (16 * half + 4 * place)
            words[4 * g + 2 * selector + h] = word
    return words


def sparse_case(kind: str, warps: int, selector: int) -> tuple[Any, Any, Any, Any, Any]:
    """Fragments of A, B and C and the words of `warps` products, with the expected fragments of D."""
    rng = np.random.default_rng(warps)
    pairs = np.array(PAIRS)[rng.integers(0, 6, (warps, 16, 8))]
    a_bits, a_numbers = halves(kind, warps, 16, 16, seed=2)
    b_bits, b_numbers = halves(kind, warps, 32, 8, seed=3)
    c = rng.integers(-9, 9, (warps, 32, 4)).astype(np.float32)
    a, b, d = np.zeros((warps, 32, 8), np.uint16), np.zeros((warps, 32, 8), np.uint16), c.copy()
    dense = np.zeros((warps, 16, 32), np.float32)
    for warp in range(warps):
        for row in range(16):
            for place in range(16):
                dense[warp, row, 4 * (place // 2) + pairs[warp, row, place // 2, place % 2]] = a_numbers[
                    warp, row, place
                ]
        for lane in range(32):
            g, t = lane >> 2, lane & 3
            for i in range(8):
                a[warp, lane, i] = a_bits[warp, g + 8 * (i >> 1 & 1), 2 * t + (i & 1) + 8 * (i >> 2)]
                b[warp, lane, i] = b_bits[warp, 2 * t + (i & 1) + 8 * (i >> 1), g]
            for i in range(4):
                row, column = g + 8 * (i >> 1), 2 * t + (i & 1)
                d[warp, lane, i] += sum(dense[warp, row, k] * b_numbers[warp, k, column] for k in range(32))
    words = np.concatenate([metadata(pairs[warp], selector) for warp in range(warps)])
    return a.reshape(-1, 8), b.reshape(-1, 8), c.reshape(-1, 4), words, d.reshape(-1, 4)


@KINDS
@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("flavour", ["", "::ordered_metadata"])
def test_sparse_mma_equals_the_sum_over_kept_products(kind: str, selector: int, flavour: str) -> None:
    a, b, c, words, expected = sparse_case(kind, 2, selector)
    assert multiply(kind, a, b, c, words, selector, flavour=flavour) == 2
    assert np.array_equal(c, expected)


def test_a_product_of_some_warps_leaves_the_others_alone() -> None:
    a, b, c, words, expected = sparse_case("bf16", 3, 0)
    before = c.copy()
    assert multiply("bf16", a, b, c, words, 0, guard="shr.u32 %r10, t, 5; setp.ne.u32 %p1, %r10, 1; @%p1 bra END;") == 1
    assert np.array_equal(c[32:64], expected[32:64])
    assert np.array_equal(c[:32], before[:32])
    assert np.array_equal(c[64:], before[64:])


def test_a_dropped_weight_does_not_meet_an_infinity() -> None:
    a, b, c, words, _ = sparse_case("bf16", 1, 0)
    words[:] = np.where(np.arange(32) % 4 < 2, 0x44444444, words)  # the first two of every four are kept
    b.reshape(8, 4, 4, 2)[:, 1] = b.reshape(8, 4, 4, 2)[:, 3] = 0x7F80
    multiply("bf16", a, b, c, words, 0)
    assert np.isfinite(c).all()


def test_metadata_must_be_ordered_where_it_is_supplied() -> None:
    for nibble in (0b0000, 0b0001, 0b0110, 0b1011):
        a, b, c, words, _ = sparse_case("f16", 1, 1)
        words[4 * 5 + 3] = int(words[4 * 5 + 3]) & ~(0xF << 20) | nibble << 20
        message = re.escape(f"nibble {nibble:#06b} of row 13, columns 20 to 23")
        with pytest.raises(Fault, match=rf"thread \(23, 0, 0\).*{message}"):
            multiply("f16", a, b, c, words, 1)


def test_a_matrix_instruction_of_part_of_a_warp_is_a_fault() -> None:
    a, b, c, words, _ = sparse_case("f16", 1, 0)
    with pytest.raises(Fault, match="only 31 of the 32 lanes of the warp are active"):
        multiply("f16", a, b, c, words, 0, guard="setp.eq.u32 %p1, t, 9; @%p1 bra END;")


@KINDS
def test_dense_mma_equals_the_product(kind: str) -> None:
    a_bits, a_numbers = halves(kind, 16, 16, seed=5)
    b_bits, b_numbers = halves(kind, 16, 8, seed=6)
    c = np.arange(128, dtype=np.float32).reshape(32, 4)
    a, b, expected = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16), c.copy()
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        a[lane] = [a_bits[g + 8 * (i >> 1 & 1), 2 * t + (i & 1) + 8 * (i >> 2)] for i in range(8)]
        b[lane] = [b_bits[2 * t + (i & 1) + 8 * (i >> 1), g] for i in range(4)]
        expected[lane] += [a_numbers[g + 8 * (i >> 1)] @ b_numbers[:, 2 * t + (i & 1)] for i in range(4)]
    multiply(kind, a, b, c, np.zeros(32, np.uint32), None)
    assert np.array_equal(c, expected)


FILL = """
mov.u32 %r8, pool; mad.lo.u32 %r9, t, {pitch}, %r8; mad.wide.u32 %rd1, t, 16, a0;
ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1]; st.shared.v4.u32 [%r9], {{%r1, %r2, %r3, %r4}};
"""


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("turn", ["", ".trans"])
@pytest.mark.parametrize(("pitch", "waves"), [(16, 1), (128, 8), (144, 1), (32, 2)])
def test_ldmatrix_gives_each_lane_its_two_elements_of_each_matrix(
    count: int, turn: str, pitch: int, waves: int
) -> None:
    rows = np.random.default_rng(count).integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    out = np.zeros((32, count, 2), dtype=np.uint16)
    registers = ", ".join(f"%r{20 + at}" for at in range(count))
    stores = "".join(f"st.global.u32 [%rd2+{4 * at}], %r{20 + at};" for at in range(count))
    body = FILL.format(pitch=pitch) + (
        f"ldmatrix.sync.aligned.m8n8.x{count}{turn}.shared.b16 {{{registers}}}, [%r9];"
        f"mad.wide.u32 %rd2, t, {4 * count}, a1; {stores}"
    )
    report = run(body, rows, out, module=SHARED, shared=32 * pitch)
    for lane in range(32):
        for matrix in range(count):
            pair = [(lane >> 2, 2 * (lane & 3) + i) for i in range(2)]
            places = [(column, row) if turn else (row, column) for row, column in pair]
            assert out[lane, matrix].tolist() == [rows[8 * matrix + row, column] for row, column in places]
    assert (report.wavefronts["ldmatrix"], report.wavefronts_ideal["ldmatrix"]) == (count * waves, count)


@pytest.mark.parametrize("turn", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(turn: str) -> None:
    rows = np.random.default_rng(9).integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    out = np.zeros_like(rows)
    body = (
        FILL.format(pitch=16)
        + f"""
    ldmatrix.sync.aligned.m8n8.x4{turn}.shared::cta.b16 {{%r1, %r2, %r3, %r4}}, [%r9]; bar.sync 0;
    stmatrix.sync.aligned.m8n8.x4{turn}.shared.b16 [%r9+512], {{%r1, %r2, %r3, %r4}}; bar.sync 0;
    ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r9+512]; mad.wide.u32 %rd2, t, 16, a1;
    st.global.v4.u32 [%rd2], {{%r1, %r2, %r3, %r4}};
    """
    )
    report = run(body, rows, out, module=SHARED, shared=1024)
    assert np.array_equal(out, rows)
    assert report.wavefronts["stmatrix"] == 4


def test_movmatrix_transposes_a_matrix_of_halves() -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    out = np.zeros_like(matrix)
    run(
        "add.u64 %rd1, a0, at4; ld.global.u32 %r1, [%rd1]; movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;"
        "add.u64 %rd2, a1, at4; st.global.u32 [%rd2], %r2;",
        matrix,
        out,
    )
    assert np.array_equal(out, matrix.T)


def test_rows_of_ldmatrix_are_aligned_written_and_seen_in_order() -> None:
    rows = np.zeros((32, 8), dtype=np.uint16)
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, "
    for tail, message in (
        (load + "[%r9+8];", "shared address 8 is not a multiple of 16"),
        (load + "[%r9+16];", r"thread \(31, 0, 0\).*512 with 16 bytes is outside the 512 bytes"),
    ):
        with pytest.raises(Fault, match=message):
            run(FILL.format(pitch=16) + tail, rows, module=SHARED, shared=512)
    with pytest.raises(Fault, match="reads shared byte 512, which was never written"):
        run(FILL.format(pitch=16) + load + "[%r9+16];", rows, module=SHARED, shared=528)
    exchange = "xor.b32 %r7, %r9, 512;" + load + "[%r7];"
    wide = np.zeros((64, 8), dtype=np.uint16)
    run(FILL.format(pitch=16) + "bar.sync 0;" + exchange, wide, block=64, module=SHARED, shared=1024)
    with pytest.raises(Fault, match="race: reads shared byte 512, written by warp 1"):
        run(FILL.format(pitch=16) + exchange, wide, block=64, module=SHARED, shared=1024)
