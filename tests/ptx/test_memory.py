"""Memory: bounds, poison, copies in flight, races between warps, barriers, and what the counters count."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.ptx import Fault
from tests.ptx.counters import global_sectors, shared_wavefronts
from tests.ptx.races import Families
from tests.ptx.snippets import program, run

SHARED = ".extern .shared .align 16 .b8 pool[];"
BOTH = pytest.mark.parametrize("schedule", ["lockstep", "warps"])


def test_vectors_move_whole_and_narrow_loads_extend_by_their_sign() -> None:
    source = np.arange(-64, 64, dtype=np.int8)
    out = np.zeros((8, 4), dtype=np.int32)
    body = """
    mad.wide.u32 %rd1, t, 16, a0; ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    ld.global.s8 %r5, [%rd1+1]; ld.global.u8 %rs1, [%rd1+1]; cvt.u32.u16 %r6, %rs1; ld.global.s16 %r7, [%rd1+2];
    mad.wide.u32 %rd2, t, 16, a1; st.global.cs.v4.b32 [%rd2], {%r4, %r5, %r6, %r7};
    """
    run(body, source, out, block=8)
    words = source.view(np.int32).reshape(8, 4)
    for thread in range(8):
        byte = int(source[16 * thread + 1])
        half = int(source[16 * thread + 2 :][:2].view(np.int16)[0])
        assert out[thread].tolist() == [int(words[thread, 3]), byte, byte & 255, half]


def test_a_pointer_is_the_first_element_and_its_extent_all_bytes_of_a_strided_tensor() -> None:
    base = torch.zeros(6, 40, dtype=torch.int32)
    view = base.t()[1:33, 2:4]
    body = "mad.wide.u32 %rd1, t, 4, a0; st.global.u32 [%rd1], t; st.global.u32 [%rd1+160], t;"
    run(body, view)
    assert torch.equal(base[2, 1:33], torch.arange(32, dtype=torch.int32))
    assert torch.equal(view[:, 1], torch.arange(32, dtype=torch.int32))
    with pytest.raises(Fault, match=r"outside every array; the nearest is p0, 288 bytes, at byte 288 of it"):
        run(body + "st.global.u32 [%rd1+164], t;", view)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "ld.global.u32 %r1, [%rd1+4];",
            r"CTA \(0, 0, 0\) thread \(31, 0, 0\).*outside every array.*at byte 128 of it",
        ),
        ("ld.global.u32 %r1, [%rd1+-4];", r"thread \(0, 0, 0\).*nearest is p0.*at byte -4 of it"),
        ("ld.global.u32 %r1, [%rd1+2];", r"global address 0x[0-9a-f]+ is not a multiple of 4"),
        ("ld.global.v2.u32 {%r1, %r2}, [%rd1];", r"thread \(1, 0, 0\).*is not a multiple of 8"),
        ("ld.global.u32 %r1, [a1];", r"null pointer: 4 bytes at global address 0x0"),
        ("st.global.u32 [a2], t;", r"store to p2, which is read-only"),
    ],
)
def test_a_global_access_outside_the_arrays_or_misaligned_is_a_fault(line: str, message: str) -> None:
    data = np.zeros(48, dtype=np.uint32)
    start = -data.ctypes.data // 4 % 4
    fixed = np.zeros(4, dtype=np.uint32)
    fixed.flags.writeable = False
    with pytest.raises(Fault, match=message):
        run(f"add.u64 %rd1, a0, at4; {line}", data[start : start + 32], None, fixed)


def test_warps_may_store_the_same_value_to_an_address_but_no_other() -> None:
    out = np.zeros(4, dtype=np.uint32)
    run("st.global.u32 [a0], 5;", out, block=64, grid=3)
    assert out[0] == 5
    with pytest.raises(Fault, match="another value than a thread of the same instruction"):
        run("st.global.u32 [a0], t;", out, block=64)
    body = "mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, {}; @%p1 bra NEXT; st.global.u32 [a0], {}; NEXT: "
    run(body.format(0, 1) + body.format(2, 1).replace("NEXT", "END"), out, grid=3)
    with pytest.raises(Fault, match="another value than another warp stored there"):
        run(body.format(0, 1) + body.format(2, 2).replace("NEXT", "END"), out, grid=3)


def test_the_read_only_path_must_not_meet_a_store_of_the_same_launch() -> None:
    data = np.zeros(32, dtype=np.uint32)
    body = "add.u64 %rd1, a0, at4; st.global.u32 [%rd1], t; ld.global{}.u32 %r1, [%rd1];"
    run(body.format(""), data)
    with pytest.raises(Fault, match=r"ld\.global\.nc.*this launch has stored"):
        run(body.format(".nc"), data)


def test_atomics_see_each_other() -> None:
    count, order, total = np.zeros(1, np.uint32), np.zeros(128, np.uint32), np.zeros(2, np.float32)
    body = """
    atom.global.add.u32 %r1, [a0], 2; shr.u32 %r1, %r1, 1; mul.wide.u32 %rd1, %r1, 4; add.u64 %rd1, a1, %rd1;
    st.global.u32 [%rd1], 1; cvt.rn.f32.u32 %f1, t; red.global.add.f32 [a2], %f1; atom.global.inc.u32 %r2, [a3], 99;
    """
    wrapped = np.zeros(1, np.uint32)
    run(body, count, order, total, wrapped, block=64, grid=2)
    assert (count[0], order.sum(), total[0], wrapped[0]) == (256, 128, 2.0 * 2016, 28)


def test_variables_of_the_module_are_memory_with_their_initial_values() -> None:
    out = np.zeros(32, dtype=np.uint32)
    module = ".const .align 4 .u32 table[4] = {7, 0x10, -1, 3};\n.global .align 4 .u32 cell;"
    body = """
    and.b32 %r1, t, 3; mul.wide.u32 %rd1, %r1, 4; mov.u64 %rd2, table; add.u64 %rd1, %rd1, %rd2;
    ld.const.u32 %r2, [%rd1]; ld.const.u32 %r3, [table+4]; add.u32 %r2, %r2, %r3; st.global.u32 [cell], 4;
    add.u64 %rd3, a0, at4; st.global.u32 [%rd3], %r2;
    """
    run(body, out, module=module)
    assert out[:4].tolist() == [23, 32, 15, 19]
    with pytest.raises(Fault, match="store to table, which is read-only"):
        run("mov.u64 %rd1, table; cvta.const.u64 %rd1, %rd1; st.u32 [%rd1], 1;", module=module)


def test_generic_addresses_find_shared_and_local_memory() -> None:
    out = np.zeros(32, dtype=np.uint32)
    body = """
    .shared .align 4 .b8 mine[128]; .local .align 8 .b8 depot[16]; mov.u64 %rd1, mine; cvta.shared.u64 %rd2, %rd1;
    add.u64 %rd3, %rd2, at4; st.u32 [%rd3], t; cvta.to.shared.u64 %rd4, %rd3; ld.shared.u32 %r1, [%rd4];
    mov.u64 %rd5, depot; cvta.local.u64 %rd6, %rd5;
    add.u32 %r2, %r1, 1; st.u32 [%rd6+8], %r2; ld.local.u32 %r3, [%rd5+8];
    add.u64 %rd7, a0, at4; setp.lt.u32 %p1, t, 16; selp.b64 %rd8, %rd7, %rd3, %p1;
    st.u32 [%rd8], %r3; ld.u32 %r4, [%rd8];
    st.global.u32 [%rd7], %r4;
    """
    run(body, out)
    assert out.tolist() == list(range(1, 33))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ld.shared.u32 %r1, [%r9];", "reads shared byte 0, which was never written"),
        ("st.shared.u16 [%r9], %rs9; ld.shared.u32 %r1, [%r9];", "reads shared byte 2, which was never written"),
        ("st.shared.u32 [%r9+4], t;", r"thread \(31, 0, 0\).*shared address 128 with 4 bytes is outside the 128 bytes"),
        ("st.shared.u32 [%r9+-4], t;", "shared address 4294967292 with 4 bytes is outside"),
        ("st.shared.u32 [%r9+2], t;", "shared address 2 is not a multiple of 4"),
        ("st.shared.u32 [pool], t;", "another value than a thread of the same instruction"),
    ],
)
def test_a_shared_access_to_poison_outside_or_misaligned_is_a_fault(line: str, message: str) -> None:
    body = "mov.u32 %r8, pool; mad.lo.u32 %r9, t, 4, %r8; mov.u16 %rs9, 3;" + line
    with pytest.raises(Fault, match=message):
        run(body, module=SHARED, shared=128)


PIPE = """
mov.u32 %r8, pool; mad.lo.u32 %r9, t, 16, %r8; add.u64 %rd1, a0, at16;
cp.async.cg.shared.global.L2::128B [%r9], [%rd1], 16; cp.async.commit_group;
cp.async.ca.shared.global [%r9+512], [%rd1], 8; cp.async.commit_group;
{wait}
ld.shared.v2.u32 {{%r1, %r2}}, [%r9+{at}]; add.u64 %rd2, a1, at8; st.global.v2.u32 [%rd2], {{%r1, %r2}};
"""


def test_an_asynchronous_copy_arrives_with_the_wait_for_its_group_and_not_before() -> None:
    source, out = np.arange(128, dtype=np.uint32), np.zeros((32, 2), dtype=np.uint32)
    for wait, at in (("cp.async.wait_group 1;", 0), ("cp.async.wait_group 0;", 512), ("cp.async.wait_all;", 512)):
        run(PIPE.format(wait=wait, at=at), source, out, module=SHARED, shared=1024)
        assert np.array_equal(out, source.reshape(32, 4)[:, :2])
    for wait, at in (("", 0), ("cp.async.wait_group 2;", 0), ("cp.async.wait_group 1;", 512)):
        with pytest.raises(Fault, match=f"reads shared byte {at}, to which a cp.async is in flight"):
            run(PIPE.format(wait=wait, at=at), source, out, module=SHARED, shared=1024)
    with pytest.raises(Fault, match=r"writes shared byte 0, to which a cp\.async is in flight"):
        run(PIPE.format(wait="st.shared.u32 [%r9], 1;", at=0), source, out, module=SHARED, shared=1024)


def test_a_copy_takes_what_was_there_when_it_was_issued_and_fills_up_with_zeros() -> None:
    source, out = np.arange(128, dtype=np.uint32), np.zeros((32, 4), dtype=np.uint32)
    body = """
    mov.u32 %r8, pool; mad.lo.u32 %r9, t, 16, %r8; add.u64 %rd1, a0, at16;
    setp.lt.u32 %p1, t, 8; selp.b32 %r1, 6, 16, %p1;
    setp.gt.u32 %p2, t, 29; selp.b32 %r1, 0, %r1, %p2; @%p2 mov.u64 %rd1, 0;
    cp.async.cg.shared.global [%r9], [%rd1], 16, %r1; @!%p2 st.global.u32 [%rd1], 77; cp.async.wait_all;
    ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r9]; add.u64 %rd2, a1, at16; st.global.v4.u32 [%rd2], {%r1, %r2, %r3, %r4};
    """
    run(body, source, out, module=SHARED, shared=512)
    expected = np.arange(128, dtype=np.uint32).reshape(32, 4)
    expected[:8, 1] &= 0xFFFF
    expected[:8, 2:] = 0
    expected[30:] = 0
    assert np.array_equal(out, expected)
    assert (source[:120:4] == 77).all()


def test_copies_in_flight_at_the_end_are_no_fault_but_misaligned_ones_are() -> None:
    source = np.zeros(64, dtype=np.uint32)
    start = -source.ctypes.data // 4 % 4
    body = "mov.u32 %r8, pool; mad.lo.u32 %r9, t, 4, %r8; add.u64 %rd1, a0, at4;"
    body += "cp.async.ca.shared.global [%r9], [%rd1], {};"
    run(body.format(4), source[start : start + 32], module=SHARED, shared=128)
    with pytest.raises(Fault, match="is not a multiple of 8"):
        run(body.format(8), source[start : start + 40], module=SHARED, shared=256)


EXCHANGE = """
mov.u32 %r8, pool; mad.lo.u32 %r9, t, 4, %r8; xor.b32 %r1, t, 32; mad.lo.u32 %r10, %r1, 4, %r8;
mov.u32 %r5, 0; mov.u32 %r6, 0;
LOOP: add.u32 %r2, t, %r5; st.shared.u32 [%r9], %r2; {first}
ld.shared.u32 %r3, [%r10]; add.u32 %r6, %r6, %r3; {second}
add.u32 %r5, %r5, 100; setp.lt.u32 %p1, %r5, 300; @%p1 bra LOOP;
add.u64 %rd1, a0, at4; st.global.u32 [%rd1], %r6;
"""


@BOTH
def test_each_barrier_that_orders_warps_is_missed_when_it_is_gone(schedule: str) -> None:
    out, bar = np.zeros(64, dtype=np.uint32), "bar.sync 0;"
    report = run(EXCHANGE.format(first=bar, second=bar), out, block=64, module=SHARED, shared=256, schedule=schedule)
    assert out.tolist() == [3 * (lane ^ 32) + 300 for lane in range(64)]
    assert report.barriers == 6
    for first, second, message in (
        ("", bar, "race: reads shared byte 128, written by warp 1|reads shared byte .*, which was never written"),
        (bar, "", r"race: (writes|reads) shared byte .*, (read|written) by"),
        (bar, "bar.warp.sync -1;", r"race: (writes|reads) shared byte"),
    ):
        with pytest.raises(Fault, match=message):
            run(
                EXCHANGE.format(first=first, second=second), out, block=64, module=SHARED, shared=256, schedule=schedule
            )


def test_without_the_detector_a_missing_barrier_changes_results_in_the_schedule_of_warps() -> None:
    out = np.zeros(64, dtype=np.uint32)
    body = EXCHANGE.format(first="bar.sync 0;", second="")
    run(body, out, block=64, module=SHARED, shared=256, schedule="warps", races=False)
    assert out.tolist() != [3 * (lane ^ 32) + 300 for lane in range(64)]


def test_warps_of_one_instruction_may_read_a_byte_together_but_not_write_it() -> None:
    body = """
    mov.u32 %r8, pool; setp.lt.u32 %p1, t, 32; @!%p1 bra WAIT; mad.lo.u32 %r9, t, 4, %r8; st.shared.u32 [%r9], t;
    WAIT: bar.sync 0; ld.shared.u32 %r1, [pool+4]; {} setp.eq.u32 %p2, t, 95; @%p2 st.shared.u32 [pool+4], 9;
    """
    run(body.format("bar.sync 0;"), block=96, module=SHARED, shared=128)
    with pytest.raises(Fault, match="race: writes shared byte 4, read by another warp"):
        run(body.format(""), block=96, module=SHARED, shared=128)
    with pytest.raises(Fault, match="race: writes shared byte 0, as another warp does in the same instruction"):
        run("st.shared.u32 [pool], 1;", block=64, module=SHARED, shared=128)


def test_a_copy_still_in_flight_is_a_write_past_barriers() -> None:
    body = """
    mov.u32 %r8, pool; mad.lo.u32 %r9, t, 4, %r8; add.u64 %rd1, a0, at4; cp.async.ca.shared.global [%r9], [%rd1], 4;
    cp.async.commit_group; {before} bar.sync 0; {after}
    xor.b32 %r1, t, 32; mad.lo.u32 %r10, %r1, 4, %r8; ld.shared.u32 %r2, [%r10];
    """
    wait = "cp.async.wait_group 0;"
    source = np.zeros(64, dtype=np.uint32)
    for schedule in ("lockstep", "warps"):
        run(body.format(before=wait, after=""), source, block=64, module=SHARED, shared=256, schedule=schedule)
        with pytest.raises(Fault, match=r"written by warp \d with no barrier between|in flight"):
            run(body.format(before="", after=wait), source, block=64, module=SHARED, shared=256, schedule=schedule)


NAMED = """
mov.u32 %r8, pool; mad.lo.u32 %r9, t, 4, %r8; shr.u32 %r1, t, 6; add.u32 %r1, %r1, 1; st.shared.u32 [%r9], t;
bar.sync %r1, 64; xor.b32 %r2, t, {by}; mad.lo.u32 %r10, %r2, 4, %r8; ld.shared.u32 %r3, [%r10]; {last}
st.shared.u32 [%r9], 5;
"""


@BOTH
def test_a_barrier_of_half_a_cta_orders_that_half_alone(schedule: str) -> None:
    keys: dict[str, Any] = {"block": 128, "module": SHARED, "shared": 512, "schedule": schedule}
    assert run(NAMED.format(by=32, last="bar.sync %r1, 64;"), **keys).barriers == 4
    with pytest.raises(Fault, match=r"race: (writes|reads) shared byte"):
        run(NAMED.format(by=32, last=""), **keys)
    with pytest.raises(Fault, match=r"race: reads shared byte|never written"):
        run(NAMED.format(by=64, last="bar.sync %r1, 64;"), **keys)


def test_a_family_of_readers_is_safe_for_a_warp_once_it_has_passed_a_barrier_with_each() -> None:
    found = Families(256, precise=True)
    one = np.array([1], dtype=np.uint8)
    both = found.join(one, np.array([1]))
    assert (found.safe[both].any(), found.safe[one][0].tolist().index(True)) == (False, 0)
    half = found.after_barrier(0b0001 | 0b0100)[both]
    assert not found.safe[half].any()
    after = found.after_barrier(0b0111)[half]
    assert found.safe[after][0, :4].tolist() == [True, True, True, False]


def test_a_barrier_that_part_of_a_warp_reaches_is_a_fault() -> None:
    with pytest.raises(Fault, match="divergent barrier"):
        run("setp.lt.u32 %p1, t, 8; @%p1 bra END; bar.sync 0; END: ")


@BOTH
def test_a_barrier_that_never_has_all_its_threads_is_a_deadlock(schedule: str) -> None:
    body = "setp.lt.u32 %p1, t, 32; @%p1 bra ONE; bar.sync 1; bra END; ONE: bar.sync 2; END: "
    with pytest.raises(Fault, match="deadlock: no barrier has all its threads"):
        run(body, block=64, schedule=schedule)
    with pytest.raises(Fault, match="deadlock"):
        run("bar.sync 1, 96;", block=64, schedule=schedule)


@BOTH
def test_two_barrier_instructions_of_one_number_meet(schedule: str) -> None:
    body = "setp.lt.u32 %p1, t, 32; @%p1 bra ONE; bar.sync 0; bra END; ONE: bar.sync 0; END: "
    assert run(body, block=64, grid=3, schedule=schedule).barriers == 3


@pytest.mark.parametrize(
    ("name", "addresses", "width", "waves", "ideal"),
    [
        ("consecutive words", [4 * lane for lane in range(32)], 4, 1, 1),
        ("one word for all", [64] * 32, 4, 1, 1),
        ("stride of two words", [8 * lane for lane in range(32)], 4, 2, 1),
        ("stride of eight words", [32 * lane for lane in range(32)], 4, 8, 1),
        ("stride of 33 words", [132 * lane for lane in range(32)], 4, 1, 1),
        ("halves of the same words", [2 * lane for lane in range(32)], 2, 1, 1),
        ("halves of one bank", [128 * (lane // 2) + 2 * (lane % 2) for lane in range(32)], 2, 16, 1),
        ("consecutive pairs", [8 * lane for lane in range(32)], 8, 2, 2),
        ("pairs in one bank", [128 * lane for lane in range(32)], 8, 32, 2),
        ("consecutive quads", [16 * lane for lane in range(32)], 16, 4, 4),
        ("quads of rows of 128 bytes", [128 * (lane % 8) + 16 * (lane // 8) for lane in range(32)], 16, 32, 4),
        ("swizzled quads", [128 * (lane % 8) + 16 * ((lane // 8) ^ (lane % 8)) for lane in range(32)], 16, 4, 4),
    ],
)
def test_wavefronts_are_the_most_words_in_a_bank_in_each_phase(
    name: str, addresses: list[int], width: int, waves: int, ideal: int
) -> None:
    assert shared_wavefronts(np.array([addresses]), None, width) == (waves, ideal), name


def test_lanes_that_are_not_active_ask_for_nothing() -> None:
    addresses = np.array([[128 * lane for lane in range(32)]])
    active = np.array([[lane < 3 for lane in range(32)]])
    assert shared_wavefronts(addresses, active, 4) == (3, 1)
    assert shared_wavefronts(addresses, active, 16) == (3, 1)
    assert global_sectors(addresses, active, 4) == (3, 1)


def test_sectors_are_counted_for_each_request_and_broadcasts_once() -> None:
    lanes = np.arange(32)
    assert global_sectors(np.array([4 * lanes]), None, 4) == (4, 4)
    assert global_sectors(np.array([4 * lanes + 16]), None, 4) == (5, 4)
    assert global_sectors(np.array([2 * lanes]), None, 2) == (2, 2)
    assert global_sectors(np.array([1024 * lanes, 0 * lanes]), None, 4) == (33, 5)
    assert global_sectors(np.array([16 * lanes]), None, 16) == (16, 16)


@BOTH
def test_a_run_counts_instructions_wavefronts_and_sectors_of_every_warp_and_cta(schedule: str) -> None:
    source = np.zeros(64, dtype=np.uint32)
    body = """
    shr.u32 %r6, t, 5; mul.lo.u32 %r7, %r6, 256; mov.u32 %r5, pool; add.u32 %r7, %r7, %r5; mad.lo.u32 %r9, t, 8, %r5;
    add.u64 %rd1, a0, at4; ld.global.u32 %r1, [%rd1]; st.shared.u32 [%r9], %r1; ld.shared.u32 %r1, [%r9];
    add.u32 %r1, %r1, 0; setp.lt.u32 %p1, t, 48; @%p1 ld.shared.u32 %r2, [%r7]; st.global.u32 [%rd1], %r1;
    """
    report = run(body, source, block=64, grid=3, module=SHARED, shared=512, schedule=schedule)
    prologue = 6
    assert report.instructions == 6 * (prologue + 13 + 1)
    assert report.wavefronts | {"ld.shared": 18, "st.shared": 12} == report.wavefronts
    assert (report.shared_wavefronts, report.shared_ideal) == (30, 18)
    assert report.global_sectors == {"load": 24, "store": 24} == report.global_sectors_ideal


def test_chunks_of_the_grid_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    out = np.zeros(64 * 7, dtype=np.uint32)
    body = """
    mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 64, t; mad.wide.u32 %rd1, %r2, 4, a0; st.global.u32 [%rd1], %r2;
    """
    whole = program(body).run("k", [out], grid=(7,), block=(64,))
    monkeypatch.setattr("tests.ptx.program.MAX_LANES", 128)
    other = np.zeros_like(out)
    assert program(body).run("k", [other], grid=(7,), block=(64,)) == whole
    assert np.array_equal(out, np.arange(448))
    assert np.array_equal(out, other)
