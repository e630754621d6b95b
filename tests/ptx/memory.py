"""Global memory: the arrays that a kernel was given, at their true addresses, and nothing else."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import Instruction
from .report import Fault
from .values import RAW, U8, U32, U64, Array

if TYPE_CHECKING:
    from .group import Group


ALLOCATION = 512  # alignment of what a GPU's allocator gives


@dataclass
class Buffer:
    """An extent that accesses may lie in; ``owner`` must outlive it, and ``storage`` is where its allocation begins."""

    name: str
    base: int
    end: int
    owner: Any
    storage: int
    writable: bool = True


class _Window:
    """Memory from an address on, for NumPy to view; that it is mapped everywhere is not asked."""

    def __init__(self, base: int, size: int) -> None:
        self.__array_interface__ = {"data": (base, False), "shape": (size,), "typestr": "|u1", "version": 3}


def buffer_of(argument: Any, name: str) -> Buffer:
    """The extent of a NumPy array or a torch tensor on the CPU, from its lowest to its highest byte.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(argument, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(argument)
        whole = argument
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        return Buffer(name, low, high, argument, pointer_of(whole), argument.flags.writeable)
    if hasattr(argument, "data_ptr") and hasattr(argument, "element_size"):
        if argument.device.type != "cpu":
            raise TypeError(f"argument {name}: a tensor on {argument.device}. The interpreter takes CPU tensors.")
        low, size = argument.data_ptr(), argument.element_size()
        span = sum((extent - 1) * stride for extent, stride in zip(argument.shape, argument.stride(), strict=True))
        high = low + (size * (span + 1) if argument.numel() else 0)
        return Buffer(name, low, high, argument, argument.untyped_storage().data_ptr())
    raise TypeError(f"argument {name}: {type(argument).__name__}. Pass an array, a CPU tensor, a number or None.")


def pointer_of(argument: Any) -> int:
    """The address that a kernel gets for an array or tensor: its first element's."""
    if isinstance(argument, np.ndarray):
        return int(argument.__array_interface__["data"][0])
    return int(argument.data_ptr())


class Region:
    """Buffers that overlap, merged, with the warp that last stored each byte (0 for none)."""

    def __init__(self, base: int, end: int, storage: int) -> None:
        self.base, self.end = base, end
        self.phase = storage % ALLOCATION
        self.stored: Array | None = None


class GlobalMemory:
    """All buffers of one launch, viewed as one sparse array from the lowest address on."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = sorted((buffer for buffer in buffers if buffer.end > buffer.base), key=lambda found: found.base)
        self.regions: list[Region] = []
        for buffer in self.buffers:
            if self.regions and buffer.base < self.regions[-1].end:
                self.regions[-1].end = max(self.regions[-1].end, buffer.end)
            else:
                self.regions.append(Region(buffer.base, buffer.end, buffer.storage))
        # From a multiple of 16 on, so that an aligned address is an aligned element of every view.
        self.origin = self.buffers[0].base & ~15 if self.buffers else 0
        size = -(-(self.regions[-1].end - self.origin) // 16) * 16 if self.regions else 0
        window: Array = np.asarray(_Window(self.origin, size)) if size else np.zeros(0, dtype=U8)
        self.views = {width: window.view(dtype) for width, dtype in RAW.items()}
        self.recent: dict[int, Buffer] = {}
        self.bases = np.array([region.base for region in self.regions], dtype=U64)
        self.phases = np.array([region.phase for region in self.regions], dtype=U64)

    def aligned(self, address: Array) -> Array:
        """Addresses as a GPU would have them, where allocations begin at multiples of 512: for counting sectors."""
        if len(self.regions) < 2:
            return address - self.phases[:1] if self.regions else address
        region = np.searchsorted(self.bases, address, side="right") - 1
        return address - self.phases[region]

    def index(
        self, group: "Group", ins: Instruction, address: Array, width: int, lanes: Array, write: bool = False
    ) -> Array:
        """Element index into the view of ``width``, once bounds and alignment hold."""
        low = address & U64(width - 1)
        if low.any():
            at = int(low.argmax())
            what = f"global address {int(address[at]):#x} is not a multiple of {width}"
            raise self.fault(group, ins, lanes[at], what)
        first, last = int(address.min()), int(address.max()) + width
        buffer = self.recent.get(ins.pc)
        if buffer is None or first < buffer.base or last > buffer.end:
            self.find(group, ins, address, width, lanes, first, last, write)
        return (address - U64(self.origin)).view(np.int64) >> (width.bit_length() - 1)

    def find(
        self,
        group: "Group",
        ins: Instruction,
        address: Array,
        width: int,
        lanes: Array,
        first: int,
        last: int,
        write: bool,
    ) -> None:
        """Note the buffer that holds the whole request; raise if a lane's access lies in none."""
        for buffer in self.buffers:
            if buffer.base <= first and last <= buffer.end and (buffer.writable or not write):
                self.recent[ins.pc] = buffer
                return
        inside = np.zeros(len(address), dtype=bool)
        for buffer in self.buffers:
            if buffer.writable or not write:
                # the sum of an address and a width may wrap around
                inside |= (address >= U64(buffer.base)) & (address <= U64(max(0, buffer.end - width)))
        if not inside.all():
            at = int((~inside).argmax())
            raise self.fault(group, ins, lanes[at], self.outside(int(address[at]), width, write))

    def outside(self, address: int, width: int, write: bool) -> str:
        """Why an address is refused, with the buffer nearest to it."""
        if address < 4096:
            return f"null pointer: {width} bytes at global address {address:#x}"
        if not self.buffers:
            return f"{width} bytes at global address {address:#x}, but no array was passed"
        for found in self.buffers:
            if write and not found.writable and found.base <= address < found.end:
                return f"store to {found.name}, which is read-only, at global address {address:#x}"
        near = min(self.buffers, key=lambda found: max(found.base - address, address + width - found.end))
        return (
            f"{width} bytes at global address {address:#x} are outside every array; the nearest is {near.name}, "
            f"{near.end - near.base} bytes, at byte {address - near.base} of it"
        )

    def fault(self, group: "Group", ins: Instruction, lane: int, what: str) -> Fault:
        """A fault of one thread."""
        return ins.fault(f"{group.describe(int(lane))}: {what}")

    def load(
        self, group: "Group", ins: Instruction, address: Array, width: int, lanes: Array, constant: bool = False
    ) -> Array:
        """Raw elements at ``address``; ``constant`` is the read-only path, which must not meet this launch's stores."""
        index = self.index(group, ins, address, width, lanes)
        if constant and any(region.stored is not None for region in self.regions):
            for region, inside, where in self.stored(address, width):
                if region.stored is not None and region.stored[where].any():
                    at = int(inside[int(region.stored[where].any(axis=1).argmax())])
                    what = f"ld.global.nc of {int(address[at]):#x}, which this launch has stored to"
                    raise self.fault(group, ins, lanes[at], what)
        return self.views[width][index]

    def stored(self, address: Array, width: int) -> list[tuple[Region, Array, Array]]:
        """Each region met: it, the positions in ``address`` inside it, and their bytes in ``region.stored``."""
        found = []
        first, last = int(address.min()), int(address.max())
        for region in self.regions:
            if region.end <= first or region.base > last:
                continue
            inside = np.flatnonzero((address >= U64(region.base)) & (address < U64(region.end)))
            if len(inside):
                where = (address[inside] - U64(region.base)).view(np.int64)
                found.append((region, inside, where[:, None] + np.arange(width)))
        return found

    def store(self, group: "Group", ins: Instruction, address: Array, raw: Array, lanes: Array) -> None:
        """Write raw elements; different values to one byte by different warps are a fault, however far apart."""
        width = raw.dtype.itemsize
        index = self.index(group, ins, address, width, lanes, write=True)
        view = self.views[width]
        fresh = np.ascontiguousarray(raw).view(U8).reshape(-1, width)
        ids = group.grid_warps(lanes)
        for region, inside, where in self.stored(address, width):
            if region.stored is None:
                region.stored = np.zeros(region.end - region.base, dtype=U32)
            owners = region.stored[where]
            mine = ids[inside][:, None]
            foreign = (owners != 0) & (owners != mine)
            if foreign.any():
                old = view[index[inside]].view(U8).reshape(-1, width)
                clash = (foreign & (old != fresh[inside])).any(axis=1)
                if clash.any():
                    at = int(inside[int(clash.argmax())])
                    what = f"stores to {int(address[at]):#x} another value than another warp stored there"
                    raise self.fault(group, ins, lanes[at], what)
            region.stored[where] = mine
        view[index] = raw
        wrong = (view[index].view(U8).reshape(-1, width) != fresh).any(axis=1)
        if wrong.any():
            at = int(wrong.argmax())
            what = f"stores to {int(address[at]):#x} another value than a thread of the same instruction"
            raise self.fault(group, ins, lanes[at], what)
