"""Instructions of clusters: mbarriers, bulk copies, addresses in other CTAs, and the barrier of a cluster."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .operands import Builder, Step, opcode
from .parse import Instruction
from .transactions import RANK
from .values import STORAGE, U16, U32, Array

if TYPE_CHECKING:
    from .group import Group

End = Callable[["Group"], int]


def is_wait(ins: Instruction) -> bool:
    """Whether threads may have to stay at an instruction until something else happens."""
    parts = ins.parts
    return parts[:3] == ["barrier", "cluster", "wait"] or (
        parts[0] == "mbarrier" and parts[1] in ("try_wait", "test_wait")
    )


def each(group: "Group", *values: Array) -> list[tuple[int, ...]]:
    """For each active lane: its place, and its numbers."""
    return list(zip(group.index.tolist(), *(group.pick(value).tolist() for value in values), strict=True))


@opcode("mbarrier")
def _mbarrier(b: Builder) -> Step:
    name, ins = b.parts[1], b.ins
    if name not in ("init", "arrive", "expect_tx") or not any(part.startswith("shared") for part in b.parts):
        raise b.ins.unsupported()
    if name == "arrive" and b.operands[0] != "_":
        raise b.ins.unsupported("returns a state, which this interpreter does not know")
    at = int(name == "arrive")
    address = b.address(at)
    number = b.read(at + 1, U32) if len(b.operands) > at + 1 else None
    expects, wide, relaxed = "expect_tx" in b.mods, "cluster" in b.mods, "relaxed" in b.mods
    if "noComplete" in b.mods or (relaxed and name == "arrive"):
        raise b.ins.unsupported()

    def step(group: "Group") -> None:
        numbers = np.broadcast_to(U32(1) if number is None else number(group), group.lanes)
        for lane, place, count in each(group, address(group), numbers):
            if name == "init":
                group.transactions.create(group, ins, lane, place, count)
                continue
            arrivals = 0 if name == "expect_tx" else 1 if expects else count
            group.transactions.arrive(
                group, ins, lane, place, arrivals=arrivals, expected=count if expects else 0, wide=wide
            )

    return step


@opcode("mapa")
def _mapa(b: Builder) -> Step:
    if b.parts[1:] != ["shared::cluster", "u32"]:
        raise b.ins.unsupported("is of generic or 64-bit addresses")
    address, rank, write, ins = b.read(1, U32), b.read(2, U32), b.write(0), b.ins

    def step(group: "Group") -> None:
        ranks = np.broadcast_to(rank(group), group.lanes)
        wrong = (ranks >= group.launch.cluster) & group.current()
        if wrong.any():
            lane = int(wrong.argmax())
            raise ins.fault(f"{group.describe(lane)}: rank {int(ranks[lane])} of a cluster of {group.launch.cluster}")
        write(group, (np.broadcast_to(address(group), group.lanes) + ((ranks + U32(1)) << U32(RANK))).astype(U32))

    return step


def copy_in_bulk(b: Builder) -> Step:
    """``cp.async.bulk`` from global to shared memory, to one CTA or several."""
    wanted = ["shared::cluster", "global", "mbarrier::complete_tx::bytes"]
    if b.parts[3:6] != wanted or b.parts[6:] not in ([], ["multicast::cluster"]):
        raise b.ins.unsupported("is a bulk copy that this interpreter does not know")
    ins, several = b.ins, len(b.parts) > 6
    target, source, mbarrier = b.address(0), b.address(1), b.address(3)
    size, mask = b.read(2, U32), b.read(4, U16) if several else None

    def step(group: "Group") -> None:
        masks = np.zeros(1, dtype=U16) if mask is None else mask(group)
        numbers = [np.broadcast_to(value, group.lanes) for value in (size(group), masks)]
        for lane, to, begin, length, place, chosen in each(
            group, target(group), source(group), numbers[0], mbarrier(group), numbers[1]
        ):
            group.transactions.issue(group, ins, lane, to, begin, length, place, chosen if several else None)

    return step


@opcode("fence")
def _fence(b: Builder) -> Step:
    """Those that order something with copies; the others order what happens at once here."""
    initialised, proxy = b.parts[1] == "mbarrier_init", b.parts[1:3] == ["proxy", "async"]

    def step(group: "Group") -> None:
        if group.machine.transactions is None:
            return
        if initialised:
            group.transactions.fence_initialisation(group)
        elif proxy:
            group.transactions.fence_proxy(group)

    return step


@opcode("barrier")
def _arrive_at_cluster(b: Builder) -> Step:
    """``barrier.cluster.arrive``; ``wait`` and the barriers of a CTA end a block and are built by the program."""
    if b.parts[1:3] != ["cluster", "arrive"]:
        raise b.ins.unsupported()
    ins, relaxed, aligned = b.ins, "relaxed" in b.mods, "aligned" in b.mods

    def step(group: "Group") -> None:
        mask = group.current()
        if aligned:
            group.whole_warps(ins, mask)
        again = mask & (group.cluster_arrived > group.cluster_waited)
        if again.any():
            raise ins.fault(
                f"{group.describe(int(again.argmax()))}: arrives at the cluster's barrier, but has not waited"
            )
        group.cluster_arrived = group.cluster_arrived + mask
        owner = group.transactions
        for row in owner.rows_of(group, mask):
            slot = row // owner.warps
            lane = int((mask & (group.cta_slots == slot) & (group.warp_ids == row % owner.warps)).argmax())
            key = slot // owner.cluster, int(group.cluster_arrived[lane])
            if not relaxed:
                released = owner.clocks.release(row)
                owner.released[key] = np.maximum(owner.released.get(key, released), released)
        group.machine.version += 1

    return step


def wait(b: Builder, after: int) -> End:
    """The end of a block at which threads wait for an mbarrier, or for the cluster."""
    if b.ins.guard is not None:
        raise b.ins.unsupported("has a guard")
    return wait_for_cluster(b, after) if b.parts[0] == "barrier" else wait_for_mbarrier(b, after)


def wait_for_cluster(b: Builder, after: int) -> End:
    """``barrier.cluster.wait``."""
    ins, aligned = b.ins, "aligned" in b.mods

    def end(group: "Group") -> int:
        mask, owner = group.current(), group.transactions
        if aligned:
            group.whole_warps(ins, mask)
        absent = mask & (group.cluster_arrived == group.cluster_waited)
        if absent.any():
            raise ins.fault(f"{group.describe(int(absent.argmax()))}: waits for the cluster, but has not arrived")
        reached = np.repeat(group.machine.cluster_phases(), owner.cluster)[group.cta_slots]
        done = mask & (reached >= group.cluster_arrived)
        for row in owner.rows_of(group, done):
            slot = row // owner.warps
            lane = int((done & (group.cta_slots == slot) & (group.warp_ids == row % owner.warps)).argmax())
            released = owner.released.get((slot // owner.cluster, int(group.cluster_arrived[lane])))
            if released is not None:
                owner.clocks.acquire(row, released)
        group.cluster_waited = np.where(done, group.cluster_arrived, group.cluster_waited)
        return group.go_on(ins, done, mask & ~done, "waits for the other threads of the cluster", after)

    return end


def wait_for_mbarrier(b: Builder, after: int) -> End:
    """``mbarrier.try_wait.parity`` and ``test_wait.parity``: false at the first look in vain, then as they wait."""
    if "parity" not in b.mods:
        raise b.ins.unsupported("waits for a state, which this interpreter does not know")
    ins, wide = b.ins, "cluster" in b.mods
    write, address, parity = b.write(0), b.address(1), b.read(2, U32)

    def end(group: "Group") -> int:
        mask = group.current()
        places, parities = (np.broadcast_to(value, group.lanes) for value in (address(group), parity(group)))
        done, stuck, why = group.transactions.test(group, ins, places, parities, wide=wide)
        group.enter(mask & ~stuck)
        if group.active:
            write(group, done.view(STORAGE[1]))
        return group.go_on(ins, mask & ~stuck, stuck, why, after)

    return end
