"""What a run of a kernel counted, and the one exception for what it did wrong."""

from dataclasses import dataclass, field

SHARED_KINDS = ("ld.shared", "st.shared", "ldmatrix", "stmatrix", "cp.async")


class Fault(Exception):
    """A mistake of the kernel that would be one on hardware: what, the PTX line and its text, the thread, the value."""


def _kinds() -> dict[str, int]:
    return dict.fromkeys(SHARED_KINDS, 0)


def _directions() -> dict[str, int]:
    return {"load": 0, "store": 0}


@dataclass
class Report:
    """Counts over the whole grid; a count of instructions is per warp, as the profilers count.

    Attributes:
        instructions: instructions that warps issued.
        wavefronts: passes over the 32 banks of shared memory, by kind of instruction.
        wavefronts_ideal: the passes that the same bytes need without bank conflicts, by kind.
        global_sectors: 32-byte sectors that the requests of warps touched, for "load" (with cp.async) and "store" (with
            atomics).
        global_sectors_ideal: sectors that the distinct bytes of each request would fill, rounded up per request.
        mma: matrix multiply instructions, sparse and dense.
        barriers: barriers completed, one for each CTA that passes.
    """

    instructions: int = 0
    wavefronts: dict[str, int] = field(default_factory=_kinds)
    wavefronts_ideal: dict[str, int] = field(default_factory=_kinds)
    global_sectors: dict[str, int] = field(default_factory=_directions)
    global_sectors_ideal: dict[str, int] = field(default_factory=_directions)
    mma: int = 0
    barriers: int = 0

    @property
    def shared_wavefronts(self) -> int:
        """Wavefronts of every kind together."""
        return sum(self.wavefronts.values())

    @property
    def shared_ideal(self) -> int:
        """Ideal wavefronts of every kind together."""
        return sum(self.wavefronts_ideal.values())
