"""The machine: a grid in chunks of CTAs, lanes as arrays, the lowest program counter first.

Lockstep has one group of all warps; the schedule "warps" has a group for each, and runs them one after another between
barriers. Where CTAs form clusters, those of one rank have groups of their own, and come as far as they can before
another rank goes on.
"""

import numpy as np

from .group import LANES, Block, Group, Launch, Waiting
from .report import Fault
from .shared import SharedMemory
from .transactions import Transactions
from .values import Array

MOST_SAID = 4  # of those that wait for each other


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
