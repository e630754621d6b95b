"""Clusters of CTAs: mbarriers, copies to several CTAs, and what orders the accesses of one with those of another."""

import re
from typing import Any

import numpy as np
import pytest

from tests.ptx import Fault, Report
from tests.ptx.snippets import run

BOTH = pytest.mark.parametrize("schedule", ["lockstep", "warps"])
MODULE = ".extern .shared .align 16 .b8 pool[];"
HINTS = ".explicitcluster .reqnctapercluster 2, 1, 1"
SIZES: dict[str, Any] = {"block": 64, "grid": 4, "shared": 1024 + 64, "module": MODULE, "hints": HINTS}

# Two CTAs of a cluster: each copies half of 1024 bytes to both; then all read, say so to both, and wait for both to
# have read, %r1 times. %r8 is the mbarrier of what is there, %r9 that of what is free. At the first round's end the
# source is another one.
PIPELINE = """
.reg .pred q; .reg .b32 rank; mov.u32 rank, %cluster_ctarank; mov.u32 %r7, pool;
add.u32 %r8, %r7, 1024; add.u32 %r9, %r7, 1032;
setp.eq.u32 %p1, t, 0; setp.lt.u32 %p2, t, 2; mul.lo.u32 %r3, rank, 512; cvt.u64.u32 %rd3, %r3; add.u64 %rd4, a0, %rd3;
add.u32 %r4, %r7, %r3; mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u16 %rs1, 3;
@%p1 mbarrier.init.shared::cta.b64 [%r8], 1; @%p1 mbarrier.init.shared::cta.b64 [%r9], {readers};
@%p1 fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
ROUND:
@!%p1 bra FULL;
mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r8], {bytes};
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r4], [%rd4], 512, [%r8], %rs1;
FULL:
mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 q, [%r8], %r1; {retry}
shl.b32 %r10, t, 4; add.u32 %r10, %r10, %r7; ld.shared.u32 %r11, [%r10]; add.u32 %r2, %r2, %r11;
{before} @!%p2 bra EMPTY; {mapa} {arrive}
EMPTY:
{wait}
add.u64 %rd4, %rd4, 1024; add.u32 %r1, %r1, 1; setp.lt.u32 %p3, %r1, 2; @%p3 bra ROUND;
mov.u32 %r12, %ctaid.x; mad.lo.u32 %r12, %r12, 64, t; mad.wide.u32 %rd5, %r12, 4, a1; st.global.u32 [%rd5], %r2;
{end}
"""
PARTS = {
    "readers": "2",
    "bytes": "1024",
    "retry": "@!q bra FULL;",
    "before": "bar.sync 0;",
    "mapa": "mapa.shared::cluster.u32 %r13, %r9, t;",
    "arrive": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r13];",
    "wait": "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 q, [%r9], %r1; @!q bra EMPTY;",
    "end": "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
}


def pipeline(
    schedule: str = "lockstep", seed: int = 0, *, find: str = "", replacement: str = "", **parts: str
) -> Report:
    """The pipeline with something in another way; what it adds up is checked."""
    body = PIPELINE.format(**{**PARTS, **parts})
    assert find in body
    body = body.replace(find, replacement, 1) if find else body
    source, out = np.arange(512, dtype=np.uint32), np.zeros((4, 64), dtype=np.uint32)
    report = run(body, source, out, **SIZES, schedule=schedule, seed=seed)
    assert np.array_equal(out, np.broadcast_to(source.reshape(2, 64, 4)[:, :, 0].sum(axis=0), (4, 64)))
    return report


@BOTH
def test_ctas_of_a_cluster_share_what_each_of_them_copies(schedule: str) -> None:
    for seed in range(3):
        report = pipeline(schedule, seed)
        # Two clusters, two rounds of 1024 bytes each: counted once, not once for each CTA.
        assert report.global_sectors["load"] == report.global_sectors_ideal["load"] == 2 * 2 * 1024 // 32


def test_an_order_that_holds_by_arrivals_alone_is_enough() -> None:
    # Without the barrier of the CTA each warp says for itself that it has read.
    each = {"before": "and.b32 %r14, t, 31; setp.lt.u32 %p2, %r14, 2; bar.warp.sync -1;", "readers": "4"}
    pipeline("lockstep", 0, **each, mapa="mapa.shared::cluster.u32 %r13, %r9, %r14;")


# What is wrong, how, and what is said of it.
MISTAKES: dict[str, tuple[dict[str, str], str]] = {
    "no loop around the wait": (
        {"retry": ""},
        r"reads shared byte \d+, (to which a cp\.async is in flight|which was never written)",
    ),
    "more bytes expected": ({"bytes": "1040"}, "deadlock.*waits for parity 0 .* 0 of 1 arrivals and 16 bytes missing"),
    "less bytes expected": ({"bytes": "1008"}, "more bytes than expected are on their way: .* and -16 bytes missing"),
    "one CTA left out": ({"find": "%rs1, 3;", "replacement": "%rs1, 1;"}, "deadlock: .* and 1024 bytes missing"),
    "a CTA too much": ({"find": "%rs1, 3;", "replacement": "%rs1, 7;"}, "the mask 0x7 names no CTA, or one that the"),
    "no CTA": ({"find": "%rs1, 3;", "replacement": "%rs1, 0;"}, "the mask 0x0 names no CTA"),
    "no fence of the initialisation": (
        {"find": "@%p1 fence.mbarrier_init.release.cluster;"},
        "no fence.mbarrier_init made the mbarrier at shared byte 1024 of CTA .* known to the cluster",
    ),
    "no barrier of the cluster": (
        {"find": PARTS["end"] + "\nROUND", "replacement": "ROUND"},
        "there is no initialised mbarrier at shared byte 1024 of CTA",
    ),
    "an arrival without a wait": (
        {"find": "barrier.cluster.wait.acquire.aligned;"},
        "arrives at the cluster's barrier, but has not waited|there is no initialised mbarrier",
    ),
    "a wait without an arrival": (
        {"find": "barrier.cluster.arrive.release.aligned;"}, "waits for the cluster, but has not arrived",
    ),
    "an arrival that releases nothing": (
        {"find": "arrive.release.aligned", "replacement": "arrive.relaxed.aligned"},
        "no barrier orders this after the initialisation of the mbarrier",
    ),
    "nobody waits for readers": ({"wait": ""}, "race: copies .* which warp . reads with nothing between|another copy"),
    "one reader is enough": ({"readers": "1"}, "arrives once more than its phase|race: copies|another copy"),
    "readers that say so before they have all read": ({"before": ""}, "race: copies 512 bytes .*, which warp 1 reads"),
    "readers that never say so": ({"arrive": ""}, "deadlock: .* waits for parity 0 of .* at shared byte 1032"),
    "readers that say so to themselves": (
        {"mapa": "mov.u32 %r13, %r9;"}, "race: copies|another copy|arrives once more|deadlock",
    ),
    "an arrival elsewhere with a narrow scope": (
        {"arrive": "mbarrier.arrive.release.cta.shared::cluster.b64 _, [%r13];"},
        "arrives at the mbarrier .* of another CTA with the scope of its own",
    ),
    "a wait for elsewhere with a narrow scope": (
        {"wait": PARTS["wait"].replace("acquire.cluster", "acquire.cta")},
        "waits for another CTA at the mbarrier .* with the scope of its own",
    ),
    "a rank that is not there": (
        {"mapa": "mov.u32 %r14, 2; mapa.shared::cluster.u32 %r13, %r9, %r14;"}, "rank 2 of a cluster of 2",
    ),
    "an end that waits for nobody": (
        {"end": "", "wait": "", "find": "%r1, 2; @%p3", "replacement": "%r1, 1; @%p3"},
        r"CTA \(\d, 0, 0\) has exited, but a copy (to|from) it is on its way|reaches into CTA .*, which has exited",
    ),
    "a destination off by 8": ({"find": "[%r4], [%rd4]", "replacement": "[%r4+8], [%rd4]"}, "the destination of a"),
    "a source off by 8": ({"find": "[%r4], [%rd4]", "replacement": "[%r4], [%rd4+8]"}, "the source of a bulk copy is"),
    "a size off by 8": ({"find": "[%rd4], 512", "replacement": "[%rd4], 504"}, "the size of a bulk copy is 0x1f8"),
    "a size of nothing": ({"find": "[%rd4], 512", "replacement": "[%rd4], 0"}, "the size of a bulk copy is 0x0"),
    "a destination outside": (
        {"find": "[%r4], [%rd4]", "replacement": "[%r4+1024], [%rd4]"}, "are outside the 1088 bytes of the CTA",
    ),
    "a source outside": (
        {"find": "[%r4], [%rd4]", "replacement": "[%r4], [%rd4+1024]"}, "512 bytes at global address .* outside every",
    ),
    "an mbarrier that is none": (
        {"find": "512, [%r8]", "replacement": "512, [%r8+16]"}, "there is no initialised mbarrier at shared byte 1040",
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_sharing_is_a_fault(mistake: str, schedule: str) -> None:
    parts, message = MISTAKES[mistake]
    with pytest.raises(Fault, match=message):
        pipeline(schedule, 1, **parts)


# Two CTAs of a cluster hand their numbers over, three times: all wait until each has read what it was given before;
# each thread stores its number to its place in the other CTA; all wait for the cluster, and each takes what has come.
MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
EXCHANGE = """
.reg .b32 other, here, there, round; .reg .{kind} mine; mov.u32 other, %cluster_ctarank; xor.b32 other, other, 1;
mov.u32 %r1, pool; mad.lo.u32 here, t, {width}, %r1; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r2, %r2, 64, t;
mad.wide.u32 %rd1, %r2, {width}, a0; mad.wide.u32 %rd2, %r2, {width}, a1; ld.global.{kind} mine, [%rd1];
mov.u32 round, 0; {begin}
ROUND: {free} {before}
mapa.shared::cluster.u32 there, here, other; {moved} st.shared::cluster.{kind} [there], mine;
{after} {sent} ld.shared.{kind} mine, [{read}];
add.u32 round, round, 1; setp.lt.u32 %p1, round, 3; @%p1 bra ROUND;
st.global.{kind} [%rd2], mine;
"""
EXCHANGED = {"begin": "", "free": MEET, "before": "", "moved": "", "after": "", "sent": MEET, "read": "here"}
OWN = "st.shared.u32 [here], mine;"


def exchange(kind: str = "u32", schedule: str = "lockstep", seed: int = 0, **parts: str) -> Report:
    """The exchange with something in another way; what each CTA ends with is checked."""
    dtype = {"u32": np.uint32, "f32": np.float32, "f64": np.float64}[kind]
    source, out = (1.5 * np.arange(256)).astype(dtype).reshape(4, 64), np.zeros((4, 64), dtype=dtype)
    body = EXCHANGE.format(kind=kind, width=source.itemsize, **{**EXCHANGED, **parts})
    report = run(body, source, out, **{**SIZES, "shared": 64 * 8}, schedule=schedule, seed=seed)
    assert np.array_equal(out, source[[1, 0, 3, 2]])
    return report


@BOTH
@pytest.mark.parametrize("kind", ["u32", "f32", "f64"])
@pytest.mark.parametrize("begin", ["", OWN], ids=["on nothing", "on what the CTA wrote itself"])
def test_ctas_of_a_cluster_store_to_each_other_between_barriers(kind: str, begin: str, schedule: str) -> None:
    for seed in range(3):
        report = exchange(kind, schedule, seed, begin=begin.replace("u32", kind))
        waves = (4 * 3 + 4 * bool(begin)) * 64 * (8 if kind == "f64" else 4) // 128
        assert report.wavefronts["st.shared"] == report.wavefronts_ideal["st.shared"] == waves


# What is wrong, how, and what is said of it.
WRONG_STORES: dict[str, tuple[dict[str, str], str]] = {
    "no barrier before": ({"free": ""}, r"stores to CTA \(\d, 0, 0\), which may not have begun"),
    "a barrier of the CTA before": ({"free": "bar.sync 0;"}, r"stores to CTA .*, which may not have begun"),
    "an arrival before that releases nothing": (
        {"free": MEET.replace("release", "relaxed")}, r"stores to CTA .*, which may not have begun",
    ),
    "no barrier after": ({"sent": ""}, "reads shared byte .*, which (was never written|came from another CTA)"),
    "no barrier after, where something is": (
        {"begin": OWN, "sent": ""}, "race: (reads shared byte .*, which came from another CTA|stores .* warp . reads)",
    ),
    "a barrier of the CTA after": (
        {"sent": "bar.sync 0;"}, "reads shared byte .*, which (was never written|came from another CTA)",
    ),
    "an arrival after that releases nothing": (
        {"sent": MEET.replace("release", "relaxed")}, "race: reads shared byte .*, which came from another CTA",
    ),
    "over what is still read": (
        {"begin": MEET, "free": ""}, "race: (reads shared byte .*, which came from another CTA|stores .* warp . reads)",
    ),
    "over what was read, as nobody says": (
        {"begin": MEET, "free": MEET.replace("release", "relaxed")},
        r"race: stores 4 bytes at shared byte \d+ of CTA .*, which warp . reads with nothing between",
    ),
    "over what the other CTA writes": (
        {"after": OWN}, "race: (writes shared byte .*, which came from another CTA|stores .* which warp . writes)",
    ),
    "over what the other CTA wrote": (
        {"before": OWN}, "race: (writes shared byte .*, which came from another CTA|stores .* which warp . writes)",
    ),
    "over what was written, as nobody says": (
        {"begin": MEET, "free": OWN + MEET.replace("release", "relaxed")},
        r"race: stores 4 bytes at shared byte \d+ of CTA .*, which warp . writes with nothing between",
    ),
    "over what another CTA stored": (
        {"before": "mov.u32 other, 0;"}, r"race: stores 4 bytes .* of CTA \([02], 0, 0\), over a copy that it has not",
    ),
    "over what another warp stores": (
        {"moved": "and.b32 there, there, 0xffffff7f;"}, "race: stores 4 bytes .*, over a copy that it has not",
    ),
    "a rank that is not there": ({"before": "mov.u32 other, 2;"}, "rank 2 of a cluster of 2"),
    "an address in no CTA": ({"moved": "add.u32 there, here, 0x10000000;"}, "address 0x100000.. is in no CTA of the"),
    "an address off by 2": (
        {"moved": "add.u32 there, there, 2;"}, r"address \d+ with 4 bytes of CTA .* is outside its 512 bytes, or misal",
    ),
    "an address outside": (
        {"moved": "add.u32 there, there, 512;"}, r"address \d+ with 4 bytes of CTA .* is outside its 512 bytes",
    ),
    "a load from elsewhere as if it were here": ({"read": "there"}, "is outside the 512 bytes of the CTA"),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("mistake", WRONG_STORES)
def test_a_mistake_in_storing_to_another_cta_is_a_fault(mistake: str, schedule: str) -> None:
    parts, message = WRONG_STORES[mistake]
    for seed in range(3):
        with pytest.raises(Fault, match=message):
            exchange("u32", schedule, seed, **parts)


@BOTH
def test_a_store_needs_its_cta_to_stay(schedule: str) -> None:
    body = """
    mov.u32 %r1, pool; mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p1, %r2, 1; {meet} @%p1 bra END;
    mov.u32 %r3, 1; mapa.shared::cluster.u32 %r4, %r1, %r3; st.shared::cluster.u32 [%r4], t;
    END: {end}
    """
    keys: dict[str, Any] = {"block": 1, "grid": 2, "shared": 16, "module": MODULE, "hints": HINTS}
    for seed in range(8):
        run(body.format(meet=MEET, end=MEET), **keys, seed=seed, schedule=schedule)
    # Who comes first is a matter of the seed.
    with pytest.raises(Fault, match=r"reaches into CTA \(1, 0, 0\), which has exited"):
        [run(body.format(meet=MEET, end=""), **keys, seed=seed, schedule=schedule) for seed in range(8)]


def test_a_cta_that_ends_too_early_is_not_to_be_reached() -> None:
    body = """
    .reg .pred q; mov.u32 %r7, pool; mov.u32 %r1, %cluster_ctarank; setp.eq.u32 %p1, %r1, 0;
    mbarrier.init.shared::cta.b64 [%r7], 1; fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive; barrier.cluster.wait; @%p1 bra END;
    WAIT: {wait} mov.u32 %r2, 0; mapa.shared::cluster.u32 %r3, %r7, %r2;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3]; END:
    """
    keys: dict[str, Any] = {"block": 1, "grid": 2, "shared": 16, "module": MODULE, "hints": HINTS}
    with pytest.raises(Fault, match=r"reaches into CTA \(0, 0, 0\), which has exited"):
        run(body.format(wait=""), **keys, seed=3)  # rank 0 comes first
    with pytest.raises(Fault, match=r"deadlock: .*waits for parity 0 of .* 1 of 1 arrivals and 0 bytes missing"):
        run(body.format(wait="mbarrier.try_wait.parity.shared::cta.b64 q, [%r7], 0; @!q bra WAIT;"), **keys)


ONE = """
.reg .pred q; mov.u32 %r7, pool; setp.eq.u32 %p1, t, 0; mov.u32 %r8, 0; {before}
@!%p1 bra READY; mbarrier.init.shared::cta.b64 [%r7+512], 1;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r7+512], 512;
{fence} cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r7], [a0], 512, [%r7+512];
READY: {sync} LOOK: {guard} mbarrier.try_wait.parity.shared::cta.b64 q, [%r7+512], %r8; @!q bra LOOK; PAST: {after}
mad.lo.u32 %r9, t, 4, %r7; ld.shared.u32 %r10, [%r9]; add.u64 %rd1, a1, at4; st.global.u32 [%rd1], %r10;
{late}
"""
NONE = {"before": "", "fence": "", "sync": "bar.sync 0;", "guard": "", "after": "", "late": ""}


@BOTH
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, ""),
        ({"guard": "@!%p1 bra PAST;"}, "which came from another CTA or by a copy, without waiting for it|in flight"),
        ({"guard": "@!%p1 bra PAST;", "after": "bar.sync 0;"}, ""),
        ({"sync": ""}, "no barrier orders this after the initialisation|there is no initialised mbarrier"),
        ({"before": "mad.lo.u32 %r9, t, 4, %r7; st.shared.u32 [%r9], t;"}, "race: copies .*, which warp . writes with"),
        ({"before": "mad.lo.u32 %r9, t, 4, %r7; st.shared.u32 [%r9], t; bar.sync 0;"}, "with no fence.proxy.async"),
        (
            {"before": "mad.lo.u32 %r9, t, 4, %r7; st.shared.u32 [%r9], t; fence.proxy.async; bar.sync 0;"},
            "",
        ),
        ({"before": "@%p1 mbarrier.init.shared::cta.b64 [%r7+512], 1;"}, "is initialised twice"),
        ({"late": "setp.lt.u32 %p2, t, 32; @!%p2 st.shared.u32 [%r9], 1;"}, ""),
        ({"sync": "st.shared.u32 [%r7], 1; bar.sync 0;"}, "byte 0, to which a cp.async is in flight|race: copies"),
        ({"late": "st.shared.u32 [%r7+8], t;"}, "race|another value"),
        ({"late": "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r7+512], 2;"}, "arrives once more than its phase counts"),
    ],
)  # fmt: skip
def test_a_cta_of_its_own_waits_for_bulk_copies_too(parts: dict[str, str], message: str, schedule: str) -> None:
    source, out = np.arange(128, dtype=np.uint32), np.zeros(128, dtype=np.uint32)
    keys: dict[str, Any] = {"block": 128, "shared": 528, "module": MODULE, "schedule": schedule}
    if message:
        with pytest.raises(Fault, match=message):
            run(ONE.format(**{**NONE, **parts}), source, out, **keys)
        return
    run(ONE.format(**{**NONE, **parts}), source, out, **keys)
    assert np.array_equal(out, source)


def test_a_phase_comes_again_with_the_other_parity() -> None:
    body = """
    .reg .pred q; mov.u32 %r7, pool; mbarrier.init.shared::cta.b64 [%r7], 2; mov.u32 %r1, 0;
    NEXT: mbarrier.arrive.shared::cta.b64 _, [%r7]; mbarrier.arrive.shared::cta.b64 _, [%r7];
    LOOK: mbarrier.test_wait.parity.shared::cta.b64 q, [%r7], {parity}; @!q bra LOOK;
    add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 4; @%p1 bra NEXT;
    """
    run(body.format(parity="%r1"), block=1, shared=8, module=MODULE)
    with pytest.raises(Fault, match=r"deadlock: .* waits for parity 0 of the mbarrier .* in phase 2, 2 of 2 arrivals"):
        run(body.format(parity="0"), block=1, shared=8, module=MODULE)


def test_a_grid_is_of_whole_clusters_and_a_chunk_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Fault, match=re.escape("grid (3, 1, 1) along x is no multiple of its clusters of 2 CTAs")):
        run("", block=32, grid=3, hints=HINTS)
    out = np.zeros(8, dtype=np.uint32)
    monkeypatch.setattr("tests.ptx.program.MAX_LANES", 96)
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, %cluster_nctarank; mad.lo.u32 %r2, %r3, 10, %r2;
    mad.wide.u32 %rd1, %r1, 4, a0; st.global.u32 [%rd1], %r2; barrier.cluster.arrive; barrier.cluster.wait;
    """
    run(body, out, block=32, grid=8, hints=HINTS)
    assert out.tolist() == [20, 21] * 4


@pytest.mark.parametrize(
    "line",
    [
        "mapa.u64 %rd1, %rd2, %r1;",
        "mbarrier.arrive.shared::cta.b64 %rd1, [pool];",
        "mbarrier.try_wait.shared::cta.b64 %p1, [pool], %rd1;",
        "mbarrier.inval.shared::cta.b64 [pool];",
        "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [pool], 16;",
        "cp.async.bulk.commit_group;",
        "@%p1 barrier.cluster.wait;",
    ],
)
def test_what_is_not_known_of_clusters_is_refused_by_name(line: str) -> None:
    with pytest.raises(NotImplementedError, match=line.removeprefix("@%p1 ").split(" ")[0].rstrip(";")):
        run(line, module=MODULE, shared=16)
