"""The machine: a grid in chunks of CTAs, lanes as arrays, the lowest program counter first.

Layout: a group of lanes is ``[warps, CTAs, 32]`` flattened, so that one warp of every CTA is a slice. Lockstep has one
group of all warps; the schedule "warps" has a group for each, and runs them one after another between barriers. Where
CTAs form clusters, those of one rank have groups of their own, and come as far as they can before another rank goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import GlobalMemory
from .operands import Step
from .parse import Instruction
from .report import Fault, Report
from .shared import SharedMemory
from .transactions import Transactions
from .values import U32, U64, Array

LANES = 32
MOST_SAID = 4  # of those that wait for each other


@dataclass
class Block:
    """Instructions without a branch between, then ``end``, which chooses where to go on (-1: the group chooses)."""

    steps: list[Step]
    end: Callable[["Group"], int]
    code: list[Instruction]

    def __post_init__(self) -> None:
        self.length = len(self.code)

    def run(self, group: "Group") -> int:
        """Run the block; whatever goes wrong in the interpreter itself names the instruction."""
        at = -1
        try:
            for at, step in enumerate(self.steps):  # noqa: B007
                step(group)
            at += 1
            return self.end(group)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            ins = self.code[min(at, self.length - 1)]
            raise RuntimeError(f"the interpreter failed at PTX line {ins.line}: {ins.text}") from error


@dataclass
class Launch:
    """What all chunks of a run share."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    memory: GlobalMemory
    parameters: dict[str, Array]
    report: Report
    shared_bytes: int
    dynamic_bytes: int
    cluster: int
    races: bool
    precise: bool
    tracked: bool
    registers: int
    local_bytes: int
    budget: int

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return int(np.prod(self.block))

    @property
    def warps(self) -> int:
        """Warps of a CTA, the last one perhaps not full."""
        return -(-self.threads // LANES)


@dataclass
class Waiting:
    """Lanes of a group that wait at a barrier and go on at ``pc``."""

    pc: int
    mask: Array
    barrier: int
    count: int
    ins: Instruction


@dataclass
class Suspended:
    """Lanes of a group that wait for a cluster or an mbarrier; they look again once ``version`` is past."""

    pc: int
    mask: Array
    version: int
    ins: Instruction
    why: str


@dataclass
class Copy:
    """One cp.async of some lanes: ``number`` is the group it was issued in, counted by each lane."""

    lanes: Array
    number: Array
    index: Array
    raw: Array


class Group:
    """Lanes that advance together, with their registers.

    Attributes:
        mask: lanes that the current instruction is for, None for all; ``active`` their number, ``index`` their places.
        live: lanes that have not exited.
        pending: other program counters, with the lanes that wait there to go on.
        slots: its CTAs among those of the machine.
        looked: the mbarrier and parity that a lane has last looked at in vain.
    """

    def __init__(self, machine: "Machine", first_warp: int, warps: int, slots: Array) -> None:
        launch = machine.launch
        ctas = len(slots)
        self.machine = machine
        self.slots = slots
        self.launch = launch
        self.report = launch.report
        self.shared = machine.shared
        self.memory = launch.memory
        self.layout = (warps, ctas, LANES)
        self.lanes = warps * ctas * LANES
        self.shape = (self.lanes,)
        self.rows = warps * ctas
        self.first_warp = first_warp
        self.registers: list[Array | None] = [None] * launch.registers
        warp, cta, lane = np.meshgrid(np.arange(first_warp, first_warp + warps), slots, np.arange(LANES), indexing="ij")
        self.warp_ids = warp.reshape(-1)
        self.cta_slots = cta.reshape(-1)
        self.thread_ids = (warp * LANES + lane).reshape(-1)
        self.lane_ids = lane.reshape(-1).astype(U32)
        self.shared_base = self.cta_slots * machine.shared.stride
        ones = U64(0x0101010101010101)
        self.codes = (self.warp_ids + 1).astype(U64) * ones if launch.races else np.zeros(self.lanes, dtype=U64)
        self.all_lanes = np.arange(self.lanes)
        self.live = self.thread_ids < launch.threads
        self.alive = int(np.count_nonzero(self.live))
        self.pending: dict[int, Array | None] = {0: None if self.alive == self.lanes else self.live}
        self.blocked: list[Waiting] = []
        self.suspended: list[Suspended] = []
        self.looked = np.full(self.lanes, -1, dtype=np.int64)
        self.cluster_arrived = np.zeros(self.lanes, dtype=np.int64)
        self.cluster_waited = np.zeros(self.lanes, dtype=np.int64)
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.lanes, dtype=np.int64)
        self.cache: dict[Any, Any] = {}
        self.local: Array | None = None
        self.enter(None)

    def enter(self, mask: Array | None, active: int | None = None) -> None:
        """Make ``mask`` the lanes of what follows."""
        self.active = self.lanes if mask is None else int(np.count_nonzero(mask)) if active is None else active
        self.mask = None if self.active == self.lanes else mask
        self._index: Array | None = self.all_lanes if self.mask is None else None
        self._warps: int | None = self.rows if self.mask is None else None

    @property
    def index(self) -> Array:
        """Places of the active lanes."""
        if self._index is None:
            self._index = np.flatnonzero(self.mask)  # type: ignore[arg-type]
        return self._index

    @property
    def active_warps(self) -> int:
        """Warps with an active lane."""
        if self._warps is None:
            self._warps = int(self.mask.reshape(-1, LANES).any(axis=1).sum())  # type: ignore[union-attr]
        return self._warps

    @property
    def transactions(self) -> Transactions:
        """What is between this group's CTAs and others."""
        assert self.machine.transactions is not None, "the program has no instruction that needs it"
        return self.machine.transactions

    def pick(self, value: Any) -> Array:
        """The active lanes' part of a value over all lanes."""
        if self.mask is None:
            return value if value.shape == self.shape else np.broadcast_to(value, self.lanes)
        return value[self.index] if value.shape == self.shape else np.broadcast_to(value, self.active)

    def spread(self, values: Array) -> Array:
        """The inverse of `pick`, zero at lanes that are not active."""
        if self.mask is None:
            return values
        whole = np.zeros((self.lanes, *values.shape[1:]), dtype=values.dtype)
        whole[self.index] = values
        return whole

    def warp_rows(self, ins: Instruction) -> Array | None:
        """Rows of 32 lanes that are active, None for all; a row with some lanes only is a fault."""
        if self.mask is None:
            return None
        counts = self.mask.reshape(-1, LANES).sum(axis=1)
        part = (counts != 0) & (counts != LANES)
        if part.any():
            row = int(part.argmax())
            raise ins.fault(f"{self.describe(row * LANES)}: only {counts[row]} of the 32 lanes of the warp are active")
        return np.flatnonzero(counts)

    def cta(self, slot: int) -> tuple[int, int, int]:
        """Place of a CTA in the grid."""
        x, y, _ = self.launch.grid
        number = int(self.machine.ctas[slot])
        return number % x, number // x % y, number // (x * y)

    def describe(self, lane: int) -> str:
        """CTA and thread of a lane, for messages."""
        x, y, _ = self.launch.block
        number = int(self.thread_ids[lane])
        place = (number % x, number // x % y, number // (x * y))
        return f"CTA {self.cta(int(self.cta_slots[lane]))} thread {place} (warp {int(self.warp_ids[lane])})"

    def grid_warps(self, lanes: Array) -> Array:
        """A number for each lane's warp that is its own in the whole grid, from 1."""
        numbers = self.machine.ctas[self.cta_slots[lanes]] * self.launch.warps + self.warp_ids[lanes] + 1
        return numbers.astype(U32)

    def special(self, name: str) -> Array:
        """A special register over all lanes."""
        if name not in self.cache:
            if name.startswith("clock") or name == "globaltimer":
                return np.full(self.lanes, self.machine.steps, dtype=U64 if name in ("clock64", "globaltimer") else U32)
            self.cache[name] = self._special(name)
        return self.cache[name]

    def _special(self, name: str) -> Array:
        base, _, axis = name.partition(".")
        at = "xyz".find(axis) if axis else 0
        if base in ("tid", "ctaid"):
            numbers = self.thread_ids if base == "tid" else self.machine.ctas[self.cta_slots]
            x, y, _ = self.launch.block if base == "tid" else self.launch.grid
            value = (numbers % x, numbers // x % y, numbers // (x * y))[at]
        elif base in ("ntid", "nctaid"):
            value = np.array((self.launch.block if base == "ntid" else self.launch.grid)[at])
        elif base == "warpid":
            value = self.warp_ids
        elif base == "nwarpid":
            value = np.array(self.launch.warps)
        elif base == "dynamic_smem_size":
            value = np.array(self.launch.dynamic_bytes)
        elif base == "total_smem_size":
            value = np.array(self.launch.shared_bytes)
        elif base.startswith("lanemask_"):
            lane = self.lane_ids.astype(np.int64)
            value = {
                "eq": 1 << lane,
                "lt": (1 << lane) - 1,
                "le": (2 << lane) - 1,
                "gt": ~((2 << lane) - 1),
                "ge": ~((1 << lane) - 1),
            }[base[9:]]
        elif base == "cluster_ctarank":
            value = self.cta_slots % self.launch.cluster
        elif base == "cluster_nctarank":
            value = np.array(self.launch.cluster)
        else:
            value = self.lane_ids if base == "laneid" else np.array({"smid": 0, "nsmid": 1, "gridid": 0}.get(base, 0))
        return np.broadcast_to(value, self.lanes).astype(U32)

    def go(self, pc: int, mask: Array | None) -> None:
        """Let lanes go on at ``pc``, together with those already there."""
        there = self.pending.get(pc)
        self.pending[pc] = mask if there is None or mask is None else there | mask

    def exit(self, mask: Array | None) -> None:
        """End lanes."""
        self.live = self.live & ~mask if mask is not None else np.zeros(self.lanes, dtype=bool)
        self.alive = int(np.count_nonzero(self.live))

    def current(self) -> Array:
        """The active lanes as a mask."""
        return np.ones(self.lanes, dtype=bool) if self.mask is None else self.mask

    def arrive(self, ins: Instruction, barrier: int, count: int, pc: int) -> int:
        """Come to a barrier; goes on at once if that completes it for every CTA."""
        self.wait_at(ins, barrier, count, pc)
        whole = self.active == self.alive and self.layout[0] == self.launch.warps
        if whole and count == 0 and len(self.blocked) == 1 and not (self.pending or self.suspended):
            self.blocked.clear()
            self.machine.complete_all(self)
            return pc
        return -1

    def wait_at(self, ins: Instruction, barrier: int, count: int, pc: int) -> None:
        """Note that the active lanes wait at a barrier."""
        if barrier > 15 or count % LANES:
            raise ins.fault(f"barrier {barrier} with {count} threads: there are 16, and a count is a multiple of 32")
        mask = self.current()
        self.whole_warps(ins, mask)
        self.blocked.append(Waiting(pc, mask, barrier, count, ins))

    def whole_warps(self, ins: Instruction, mask: Array) -> None:
        """Fault unless all threads of a warp that have not exited come together."""
        rows, live = mask.reshape(-1, LANES), self.live.reshape(-1, LANES)
        torn = rows.any(axis=1) & (rows != live).any(axis=1)
        if torn.any():
            lane = int(torn.argmax()) * LANES
            raise ins.fault(f"{self.describe(lane)}: divergent barrier, only some of the warp's threads arrive")

    def go_on(self, ins: Instruction, chosen: Array, stuck: Array, why: str, after: int) -> int:
        """Let lanes go on at ``after``, and others look at this instruction again when something has changed."""
        if stuck.any():
            self.suspended.append(Suspended(ins.pc, stuck, self.machine.version, ins, why))
        if not chosen.any():
            return -1
        self.enter(chosen)
        return after

    def resume(self) -> bool:
        """Let lanes look again at what they wait for, if anything has changed; whether there is anything to run."""
        waiting, self.suspended = self.suspended, []
        for each in waiting:
            if each.version < self.machine.version:
                self.go(each.pc, each.mask)
            else:
                self.suspended.append(each)
        return bool(self.pending)

    def arrive_each(self, ins: Instruction, barrier: Array, count: Array, pc: int) -> int:
        """Come to barriers whose numbers or counts are in registers; each warp names one."""
        mask = self.current()
        names = np.broadcast_to(barrier.astype(np.int64) << 32 | count, self.lanes)
        chosen = np.unique(names[mask])
        if len(chosen) == 1:
            return self.arrive(ins, int(chosen[0]) >> 32, int(chosen[0]) & 0xFFFFFFFF, pc)
        for name in chosen.tolist():
            self.enter(mask & (names == name))
            self.wait_at(ins, name >> 32, name & 0xFFFFFFFF, pc)
        return -1

    def run(self, blocks: dict[int, Block]) -> None:
        """Go on until every lane waits at a barrier or has exited, the lowest program counter first."""
        machine, pending = self.machine, self.pending
        while pending:
            pc = min(pending)
            self.enter(pending.pop(pc))
            while pc >= 0:
                block = blocks[pc]
                machine.count(block, self)
                pc = block.run(self)
                if pending and pc >= min(pending):
                    self.go(pc, self.mask)
                    break


class Machine:
    """One chunk of CTAs, run to its end."""

    def __init__(self, launch: Launch, ctas: Array, schedule: str, rng: np.random.Generator) -> None:
        self.launch = launch
        self.ctas = ctas
        self.rng = rng
        self.steps = 0
        self.version = 0  # of all that a suspended lane may wait for
        self.shared = SharedMemory(len(ctas), launch.shared_bytes, races=launch.races, precise=launch.precise)
        self.transactions = Transactions(self, launch.cluster, launch.warps) if launch.tracked else None
        self.shared.transactions = self.transactions
        height = launch.warps if schedule == "lockstep" else 1
        slots = np.arange(len(ctas))
        self.ranks = [
            [Group(self, warp, height, slots[rank :: launch.cluster]) for warp in range(0, launch.warps, height)]
            for rank in range(launch.cluster)
        ]

    @property
    def groups(self) -> list[Group]:
        """Of all ranks."""
        return [group for groups in self.ranks for group in groups]

    def count(self, block: Block, group: Group) -> None:
        """Count a block's instructions, and stop a kernel that does not end."""
        self.steps += block.length
        self.launch.report.instructions += block.length * group.active_warps
        if self.steps > self.launch.budget:
            what = f"more than max_instructions={self.launch.budget} instructions: the kernel does not end"
            raise block.code[0].fault(what) if block.code else Fault(what)

    def run(self, blocks: dict[int, Block]) -> None:
        """Run all groups until every lane has exited: each rank of the clusters alone, until it can go no further."""
        with np.errstate(all="ignore"):
            moved = True
            while moved:
                moved = False
                for rank in self.order(len(self.ranks)):
                    while self.advance(self.ranks[rank], blocks):
                        moved = True
            if any(group.blocked or group.suspended for group in self.groups):
                raise self.stuck("deadlock: no barrier has all its threads")
        self.ranks.clear()  # they know this machine: without the circle their arrays are freed at once
        self.shared.transactions = None

    def order(self, count: int) -> list[int]:
        """In which groups take their turns."""
        return self.rng.permutation(count).tolist() if count > 1 else [0]

    def advance(self, groups: list[Group], blocks: dict[int, Block]) -> bool:
        """Run groups of a rank to where they wait, and complete their barriers; whether anything happened."""
        moved = False
        for number in self.order(len(groups)):
            group = groups[number]
            if group.resume():
                group.run(blocks)
                moved = True
                if self.transactions is not None:
                    alive = [each.live.reshape(each.layout).any(axis=(0, 2)) for each in groups]
                    self.transactions.note_exits(group, np.any(alive, axis=0))
        return (any(group.blocked for group in groups) and self.release(groups)) or moved

    def cluster_phases(self) -> Array:
        """How often all threads of each cluster have arrived at its barrier; those that have exited count."""
        most = np.iinfo(np.int64).max
        least = np.full(len(self.ctas), most)
        for group in self.groups:
            arrived = np.where(group.live, group.cluster_arrived, most).reshape(group.layout).min(axis=(0, 2))
            least[group.slots] = np.minimum(least[group.slots], arrived)
        return least.reshape(-1, self.launch.cluster).min(axis=1)

    def complete_all(self, group: Group) -> None:
        """A barrier that all threads of all CTAs of a lone group have reached."""
        live = group.live.reshape(group.layout).any(axis=2)
        self.launch.report.barriers += int(live.any(axis=0).sum())
        count = len(group.slots)
        self.shared.barrier(group.slots, np.zeros(count, dtype=np.int64), np.ones(count, dtype=bool))
        if self.transactions is not None:
            self.transactions.meet(group.slots.tolist(), live.T)

    def release(self, groups: list[Group]) -> bool:
        """Complete the barriers of CTAs that have all their warps; whether there was one."""
        warps, slots = self.launch.warps, groups[0].slots
        ctas = len(slots)
        barrier = np.full((warps, ctas), -1)
        count = np.zeros((warps, ctas), dtype=np.int64)
        live = np.zeros((warps, ctas), dtype=bool)
        for group in groups:
            rows = slice(group.first_warp, group.first_warp + group.layout[0])
            live[rows] = group.live.reshape(group.layout).any(axis=2)
            for waiting in group.blocked:
                here = waiting.mask.reshape(group.layout).any(axis=2)
                barrier[rows][here] = waiting.barrier
                count[rows][here] = waiting.count
        freed = np.zeros((warps, ctas), dtype=bool)
        bits = (1 << np.arange(warps))[:, None]
        for number in np.unique(barrier[barrier >= 0]).tolist():
            here = barrier == number
            wanted = np.where(here, count, 0).max(axis=0)
            if (here & (count != wanted)).any():
                raise self.stuck(f"warps wait at barrier {number} with different thread counts")
            needed = np.where(wanted == 0, live.sum(axis=0), wanted // LANES)
            arrived = here.sum(axis=0)
            done = (arrived > 0) & (arrived >= needed)
            if (done & (arrived > needed)).any():
                raise self.stuck(f"more warps wait at barrier {number} than its count of threads allows")
            if done.any():
                freed |= here & done
                places = np.flatnonzero(done)
                passed = np.where(here, bits, 0).sum(axis=0)[places]
                whole = (here == live).all(axis=0)[places]
                self.launch.report.barriers += len(places)
                self.shared.barrier(slots[places], passed, whole)
                if self.transactions is not None:
                    self.transactions.meet(slots[places].tolist(), here[:, places].T)
        for group in groups:
            self.wake(group, freed[group.first_warp : group.first_warp + group.layout[0]])
        return bool(freed.any())

    def wake(self, group: Group, freed: Array) -> None:
        """Let the lanes of freed warps go on."""
        lanes = np.repeat(freed.reshape(-1), LANES)
        blocked, group.blocked = group.blocked, []
        for waiting in blocked:
            free, rest = waiting.mask & lanes, waiting.mask & ~lanes
            if free.any():
                group.go(waiting.pc, None if free.all() else free)
            if rest.any():
                group.blocked.append(Waiting(waiting.pc, rest, waiting.barrier, waiting.count, waiting.ins))

    def stuck(self, what: str) -> Fault:
        """A fault of threads that wait, with a place where some do, and what some wait for."""
        waiting = [(each.ins, group, each.mask, "") for group in self.groups for each in group.blocked]
        waiting += [(each.ins, group, each.mask, each.why) for group in self.groups for each in group.suspended]
        if not waiting:
            return Fault(what)
        others = [f"{group.describe(int(mask.argmax()))} {why}" for _, group, mask, why in waiting if why]
        ins, group, mask, _ = waiting[0]
        several = list(dict.fromkeys(others))[:MOST_SAID]
        return ins.fault("; ".join([f"{group.describe(int(mask.argmax()))}: {what}", *several]))
