"""Groups of lanes, which advance together: registers, masks, where they wait, and what they know of themselves.

Layout: a group of lanes is ``[warps, CTAs, 32]`` flattened, so that one warp of every CTA is a slice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import GlobalMemory
from .operands import Step
from .parse import Instruction
from .report import Report
from .values import U32, U64, Array

if TYPE_CHECKING:
    from .machine import Machine
    from .transactions import Transactions

LANES = 32


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
    def transactions(self) -> "Transactions":
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
