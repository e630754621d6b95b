"""What CTAs of a cluster do to each other's shared memory: stores, mbarriers, bulk copies on their way, who knows what.

A copy lands as late as it may: when a thread that has looked in vain before looks again at the mbarrier it completes,
and nothing else is missing there. What a thread may touch follows from vector clocks: each warp knows how far the
others had come when they released what it acquired, by a barrier of the CTA or of the cluster, or through an mbarrier.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .clocks import Clocks
from .counters import SECTOR
from .parse import Instruction
from .report import Fault
from .shared import FLIGHT
from .values import U8, U64, Array

if TYPE_CHECKING:
    from .group import Group
    from .machine import Machine

RANK = 24  # bits of an offset below the rank of a CTA, plus 1, in an address of shared::cluster
OFFSET = (1 << RANK) - 1
GRANULE = 16  # bytes that bulk copies consist of
MOST_BYTES = (1 << 20) - 1  # that an mbarrier counts


@dataclass
class Flight:
    """A bulk copy on its way to one CTA, from the CTA that issued it."""

    ins: Instruction
    source_slot: int
    slot: int
    start: int
    data: Array


@dataclass
class Mbarrier:
    """One mbarrier, as the PTX manual describes it.

    Attributes:
        agent: its column among the clocks, which counts the phases that it completed.
        arriving: what those knew who arrived in this phase or before, and ``released`` the same at the last completion.
        remote: whether another CTA arrived in this phase, and ``was_remote`` in the one before.
    """

    name: str
    agent: int
    creator: int
    created: int
    count: int
    pending: int
    arriving: Array
    released: Array
    bytes: int = 0
    phase: int = 0
    fenced: bool = False
    remote: bool = False
    was_remote: bool = False
    flights: list[Flight] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        """Bytes of the copies that will complete here."""
        return sum(len(flight.data) for flight in self.flights)

    def __str__(self) -> str:
        missing = f"{self.pending} of {self.count} arrivals and {self.bytes - self.in_flight} bytes missing"
        return f"{self.name} in phase {self.phase}, {missing}"


class Transactions:
    """All mbarriers and bulk copies of the CTAs that run together."""

    def __init__(self, machine: "Machine", cluster: int, warps: int) -> None:
        self.machine, self.shared, self.cluster, self.warps = machine, machine.shared, cluster, warps
        ctas = len(machine.ctas)
        self.clocks = Clocks(ctas, warps)
        granules = ctas * self.shared.stride // GRANULE
        # The clock of each warp of the CTA when it last read or wrote there.
        self.read_at = np.zeros((granules, warps), dtype=np.int32)
        self.written_at = np.zeros((granules, warps), dtype=np.int32)
        self.fenced_at = np.zeros(self.clocks.rows, dtype=np.int64)  # when it last ordered its writes before copies
        # Who brought what lies there, and at which time of its own: the mbarrier that a copy completed, or the warp of
        # another CTA that stored it; -1: the CTA itself.
        self.landed_by = np.full(granules, -1, dtype=np.int64)
        self.landed_at = np.zeros(granules, dtype=np.int64)
        self.mbarriers: dict[tuple[int, int], Mbarrier] = {}
        self.alive = np.ones(ctas, dtype=bool)
        self.released: dict[tuple[int, int], Array] = {}  # of a cluster and a phase of its barrier

    # ---- whom it concerns

    def row(self, group: "Group", lane: int) -> int:
        """The row of a lane's warp among the clocks."""
        return int(group.cta_slots[lane]) * self.warps + int(group.warp_ids[lane])

    def rows_of(self, group: "Group", mask: Array) -> list[int]:
        """The rows of the warps that have a lane in the mask."""
        return np.unique(group.cta_slots[mask] * self.warps + group.warp_ids[mask]).tolist()

    def place(self, group: "Group", ins: Instruction, lane: int, address: int) -> tuple[int, int]:
        """CTA and offset of an address of shared memory, the CTA's own or that of ``mapa``."""
        own, rank = int(group.cta_slots[lane]), address >> RANK
        if rank > self.cluster:
            raise self.fault(group, ins, lane, f"shared address {address:#x} is in no CTA of the cluster")
        slot = own if rank == 0 else own // self.cluster * self.cluster + rank - 1
        if not self.alive[slot]:
            raise self.fault(group, ins, lane, f"reaches into CTA {group.cta(slot)}, which has exited")
        return slot, address & OFFSET

    def fault(self, group: "Group", ins: Instruction, lane: int, what: str) -> Fault:
        """A fault of one thread."""
        return ins.fault(f"{group.describe(int(lane))}: {what}")

    # ---- loads and stores

    def read(self, group: "Group", ins: Instruction, index: Array, width: int, lanes: Array) -> None:
        """Note elements that are read, once what lies there is known to have landed."""
        self.touch(group, ins, index, width, lanes, self.read_at, "reads")

    def write(self, group: "Group", ins: Instruction, index: Array, width: int, lanes: Array) -> None:
        """Note elements that are written."""
        self.touch(group, ins, index, width, lanes, self.written_at, "writes")

    def touch(
        self, group: "Group", ins: Instruction, index: Array, width: int, lanes: Array, at: Array, verb: str
    ) -> None:
        granule, warp = index * width // GRANULE, group.warp_ids[lanes]
        rows = group.cta_slots[lanes] * self.warps + warp
        at[granule, warp] = self.clocks.known[rows, rows]
        by = self.landed_by[granule]
        if (by >= 0).any():
            unknown = (by >= 0) & (self.clocks.known[rows, by] < self.landed_at[granule])
            if unknown.any():
                place = int(unknown.argmax())
                byte = int(index[place]) * width % self.shared.stride
                what = f"{verb} shared byte {byte}, which came from another CTA or by a copy, without waiting for it"
                raise self.fault(group, ins, lanes[place], f"race: {what}")

    def store(self, group: "Group", ins: Instruction, addresses: Array, raw: Array, lanes: Array) -> None:
        """Raw elements into the shared memory of any CTA of the cluster."""
        width = raw.dtype.itemsize
        for lane, address, value in zip(lanes.tolist(), addresses.tolist(), raw, strict=True):
            slot, start = self.place(group, ins, lane, address)
            if start % width or start + width > self.shared.size:
                where = f"shared address {start} with {width} bytes of CTA {group.cta(slot)}"
                raise self.fault(group, ins, lane, f"{where} is outside its {self.shared.size} bytes, or misaligned")
            row, own = self.row(group, lane), int(group.cta_slots[lane])
            if slot != own and not self.clocks.known[row, slot * self.warps : (slot + 1) * self.warps].all():
                raise self.fault(group, ins, lane, f"stores to CTA {group.cta(slot)}, which may not have begun")
            self.check_order(group, ins, lane, slot, start, width, "stores")
            at = slot * self.shared.stride + start
            self.shared.data[at : at + width] = np.array([value]).view(U8)
            self.shared.state[at : at + width] = 0
            self.landed_by[at // GRANULE], self.landed_at[at // GRANULE] = row, self.clocks.known[row, row]

    # ---- mbarriers

    def create(self, group: "Group", ins: Instruction, lane: int, address: int, count: int) -> None:
        """``mbarrier.init``."""
        slot, offset = self.place(group, ins, lane, address)
        if offset % 8 or offset + 8 > self.shared.size:
            raise self.fault(group, ins, lane, f"an mbarrier at shared address {offset}, misaligned or outside")
        if (slot, offset) in self.mbarriers:
            raise self.fault(group, ins, lane, f"the mbarrier at shared address {offset} is initialised twice")
        if not 1 <= count < 1 << 20:
            raise self.fault(group, ins, lane, f"an mbarrier of {count} arrivals")
        row = self.row(group, lane)
        nothing = np.zeros(self.clocks.known.shape[1], dtype=np.int64)
        clock, name = int(self.clocks.known[row, row]), f"the mbarrier at shared byte {offset} of CTA {group.cta(slot)}"
        self.mbarriers[slot, offset] = Mbarrier(
            name, self.clocks.agent(), row, clock, count, count, nothing, nothing.copy()
        )

    def find(self, group: "Group", ins: Instruction, lane: int, slot: int, offset: int) -> Mbarrier:
        """The mbarrier there, if this thread may know that it is initialised."""
        found = self.mbarriers.get((slot, offset))
        own = int(group.cta_slots[lane])
        if found is None:
            where = f"shared byte {offset} of CTA {group.cta(slot)}"
            raise self.fault(group, ins, lane, f"there is no initialised mbarrier at {where}")
        row = self.row(group, lane)
        if row != found.creator and self.clocks.known[row, found.creator] < found.created:
            raise self.fault(group, ins, lane, f"no barrier orders this after the initialisation of {found.name}")
        if slot != own and not found.fenced:
            raise self.fault(group, ins, lane, f"no fence.mbarrier_init made {found.name} known to the cluster")
        return found

    def arrive(
        self, group: "Group", ins: Instruction, lane: int, address: int, *, arrivals: int, expected: int, wide: bool
    ) -> None:
        """``mbarrier.arrive``, ``expect_tx`` or both; ``wide``: with the scope of the cluster."""
        slot, offset = self.place(group, ins, lane, address)
        found = self.find(group, ins, lane, slot, offset)
        foreign = slot != int(group.cta_slots[lane])
        if foreign and not wide:
            raise self.fault(group, ins, lane, f"arrives at {found.name} of another CTA with the scope of its own")
        if arrivals > found.pending:
            raise self.fault(group, ins, lane, f"arrives once more than its phase counts at {found}")
        found.pending -= arrivals
        found.bytes += expected
        found.remote |= foreign
        if not 0 <= found.bytes <= MOST_BYTES:
            raise self.fault(group, ins, lane, f"expects {found.bytes} bytes at {found.name}")
        if arrivals:
            np.maximum(found.arriving, self.clocks.release(self.row(group, lane)), out=found.arriving)
        self.machine.version += 1
        if found.pending == 0 and found.in_flight > found.bytes:
            raise self.fault(group, ins, lane, f"more bytes than expected are on their way: {found}")
        if found.pending == 0 and found.bytes == 0:
            self.complete(found)

    def complete(self, found: Mbarrier) -> None:
        """End a phase."""
        found.phase += 1
        found.pending, found.bytes = found.count, 0
        found.released = found.arriving.copy()
        found.was_remote, found.remote = found.remote, False
        self.machine.version += 1

    def test(
        self, group: "Group", ins: Instruction, address: Array, parity: Array, *, wide: bool
    ) -> tuple[Array, Array, str]:
        """Lanes for which the phase of that parity is complete; those that must wait, and what for.

        The others have looked for the first time, in vain: a thread that goes on regardless finds nothing landed.
        """
        mask = group.current()
        done, stuck, why = np.zeros(group.lanes, dtype=bool), np.zeros(group.lanes, dtype=bool), ""
        keys = (
            (group.cta_slots.astype(np.int64) << 33) | (address.astype(np.int64) << 1) | (parity & 1).astype(np.int64)
        )
        for key in np.unique(keys[mask]).tolist():
            these = mask & (keys == key)
            lane, odd = int(these.argmax()), key & 1
            slot, offset = self.place(group, ins, lane, key >> 1 & 0xFFFFFFFF)
            if slot != int(group.cta_slots[lane]):
                raise self.fault(group, ins, lane, "waits for an mbarrier of another CTA")
            places = np.flatnonzero(these)
            _, firsts = np.unique(group.warp_ids[places], return_index=True)  # a CTA's: its warps tell them apart
            for first in places[firsts].tolist():
                found = self.find(group, ins, first, slot, offset)
            looked = these & (group.looked == key)
            if found.phase & 1 == odd and found.pending == 0 and found.bytes == found.in_flight and looked.any():
                self.land(found)
            if found.phase & 1 == odd:
                stuck |= looked
                why = f"waits for parity {odd} of {found}"
                group.looked[these] = key
                continue
            if found.was_remote and not wide:
                raise self.fault(group, ins, lane, f"waits for another CTA at {found.name} with the scope of its own")
            done |= these
            group.looked[these] = -1
            for row in self.rows_of(group, these):
                self.clocks.acquire(row, found.released)
                self.clocks.known[row, found.agent] = found.phase
        return done, stuck, why

    def land(self, found: Mbarrier) -> None:
        """All copies arrive, and end the phase."""
        for flight in found.flights:
            start = flight.slot * self.shared.stride + flight.start
            stop = start + len(flight.data)
            self.shared.data[start:stop] = flight.data
            self.shared.state[start:stop] = 0
            self.landed_by[start // GRANULE : stop // GRANULE] = found.agent
            self.landed_at[start // GRANULE : stop // GRANULE] = found.phase + 1
        found.flights.clear()
        self.complete(found)

    def fence_initialisation(self, group: "Group") -> None:
        """``fence.mbarrier_init``: what these warps initialised may be reached by the cluster."""
        rows = set(self.rows_of(group, group.current()))
        for found in self.mbarriers.values():
            found.fenced |= found.creator in rows

    def fence_proxy(self, group: "Group") -> None:
        """``fence.proxy.async``: what these warps wrote is in order before what bulk copies write."""
        for row in self.rows_of(group, group.current()):
            self.fenced_at[row] = self.clocks.known[row, row]

    # ---- bulk copies

    def issue(
        self,
        group: "Group",
        ins: Instruction,
        lane: int,
        to: int,
        source: int,
        size: int,
        mbarrier: int,
        mask: int | None,
    ) -> None:
        """A bulk copy from global memory, to this CTA or to those of the cluster that the mask names."""
        for what, number in (("destination", to), ("source", source), ("size", size)):
            if number % GRANULE or (what == "size" and size == 0):
                raise self.fault(group, ins, lane, f"the {what} of a bulk copy is {number:#x}, no multiple of 16")
        data = self.fetch(group, ins, lane, source, size)
        own = int(group.cta_slots[lane])
        first = own // self.cluster * self.cluster
        if mask is not None and not 0 < mask < 1 << self.cluster:
            raise self.fault(group, ins, lane, f"the mask {mask:#x} names no CTA, or one that the cluster lacks")
        slots = [own] if mask is None else [first + rank for rank in range(self.cluster) if mask >> rank & 1]
        start, offset = to & OFFSET, mbarrier & OFFSET
        for address in (to, mbarrier):  # in a multicast the offset counts, and each CTA is its own
            self.place(group, ins, lane, address)
        if start + size > self.shared.size:
            size_of = f"{size} bytes at shared address {start} are outside the {self.shared.size} bytes of the CTA"
            raise self.fault(group, ins, lane, size_of)
        for slot in slots:
            if not self.alive[slot]:
                raise self.fault(group, ins, lane, f"copies into CTA {group.cta(slot)}, which has exited")
            found = self.find(group, ins, lane, slot, offset)
            self.check_order(group, ins, lane, slot, start, size, "copies")
            at = slot * self.shared.stride + start
            theirs = slice(slot * self.warps, (slot + 1) * self.warps)
            if (self.written_at[at // GRANULE : (at + size) // GRANULE] > self.fenced_at[theirs]).any():
                what = f"copies {size} bytes at shared byte {start} of CTA {group.cta(slot)}, written"
                raise self.fault(group, ins, lane, f"{what} with no fence.proxy.async between")
            self.shared.state[at : at + size] |= U8(FLIGHT)
            found.flights.append(Flight(ins, own, slot, start, data))
            if found.pending == 0 and found.in_flight > found.bytes:
                raise self.fault(group, ins, lane, f"more bytes than expected are on their way: {found}")
        self.machine.version += 1

    def fetch(self, group: "Group", ins: Instruction, lane: int, source: int, size: int) -> Array:
        """The bytes of a copy, counted once however many CTAs they go to."""
        memory = group.memory
        if not any(buffer.base <= source and source + size <= buffer.end for buffer in memory.buffers):
            raise memory.fault(group, ins, lane, memory.outside(source, size, False))
        aligned = int(memory.aligned(np.array([source], dtype=U64))[0])
        group.report.global_sectors["load"] += (aligned + size - 1) // SECTOR - aligned // SECTOR + 1
        group.report.global_sectors_ideal["load"] += -(-size // SECTOR)
        at = source - memory.origin
        return memory.views[1][at : at + size].copy()

    def check_order(
        self, group: "Group", ins: Instruction, lane: int, slot: int, start: int, size: int, act: str
    ) -> None:
        """Raise unless all that happened to these bytes is known to the thread."""
        shared, row = self.shared, self.row(group, lane)
        at = slot * shared.stride + start
        granules = slice(at // GRANULE, -(-(at + size) // GRANULE))
        where = f"{size} bytes at shared byte {start} of CTA {group.cta(slot)}"
        if (shared.state[at : at + size] & FLIGHT).any():
            raise self.fault(group, ins, lane, f"{act} {where}, to which another copy is in flight")
        theirs = slice(slot * self.warps, (slot + 1) * self.warps)
        known = self.clocks.known[row, theirs]
        for verb, done in (("reads", self.read_at), ("writes", self.written_at)):
            late = (done[granules] > known).any(axis=0)
            if late.any():
                what = f"{act} {where}, which warp {int(late.argmax())} {verb} with nothing between"
                raise self.fault(group, ins, lane, f"race: {what}")
        by = self.landed_by[granules]
        if ((by >= 0) & (self.clocks.known[row, by] < self.landed_at[granules])).any():
            raise self.fault(group, ins, lane, f"race: {act} {where}, over a copy that it has not waited for")
        if shared.races:
            shared.readers[at : at + size] = 0

    # ---- barriers of a CTA, and its end

    def meet(self, slots: Iterable[int], passed: Array) -> None:
        """Warps of each CTA passed a barrier: ``passed`` is ``[n, warps]``."""
        for slot, warps in zip(slots, passed, strict=True):
            self.clocks.meet(slot * self.warps + np.flatnonzero(warps))

    def note_exits(self, group: "Group", alive: Array) -> None:
        """Fault if a CTA has ended that copies are on their way to, or from."""
        gone = group.slots[self.alive[group.slots] & ~alive]
        if not len(gone):
            return
        self.alive[gone] = False
        self.machine.version += 1
        for found in self.mbarriers.values():
            for flight in found.flights:
                for slot, way in ((flight.slot, "to"), (flight.source_slot, "from")):
                    if not self.alive[slot]:
                        what = f"CTA {group.cta(slot)} has exited, but a copy {way} it is on its way"
                        raise flight.ins.fault(what)


def tracked(code: Iterable[Any]) -> bool:
    """Whether instructions need all this."""
    names = (ins.parts for ins in code)
    return any(parts[0] in ("mbarrier", "mapa") or parts[:2] == ["barrier", "cluster"] or "bulk" in parts
               or "shared::cluster" in parts for parts in names)  # fmt: skip
