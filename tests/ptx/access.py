"""Loads and stores, asynchronous copies and atomics: which bytes, of which memory, for which lanes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .counters import global_sectors, shared_wavefronts
from .group import LANES, Copy
from .mbarrier import copy_in_bulk
from .operands import LOCAL_WINDOW, SHARED_WINDOW, Builder, Step, opcode
from .parse import Instruction
from .transactions import OFFSET
from .values import RAW, U8, U32, U64, Array, decoder, encoder, type_dtype

if TYPE_CHECKING:
    from .group import Group

WINDOW = U64(0xFFFF_FFFF_0000_0000)


def space_of(b: Builder) -> str:
    """State space of an access; empty for a generic address."""
    for part in b.parts[1:]:
        space = part.removesuffix("::cta")
        if space in ("param", "global", "shared", "local", "const"):
            return space
    return ""


def count_shared(group: "Group", kind: str, address: Array, width: int) -> None:
    """Count the wavefronts of a request; CTAs whose requests are alike are looked at once."""
    rows = group.spread(address).view(np.int64)
    active = group.mask
    ctas = group.layout[1]
    times = 1
    cube = rows.reshape(group.layout)
    lanes = None if active is None else active.reshape(group.layout)
    if ctas > 1 and (cube == cube[:, :1]).all() and (lanes is None or (lanes == lanes[:, :1]).all()):
        cube, times = cube[:, :1], ctas
        lanes = None if lanes is None else lanes[:, :1]
    flat = None if lanes is None else lanes.reshape(-1, LANES)
    waves, ideal = shared_wavefronts(cube.reshape(-1, LANES), flat, width)
    group.report.wavefronts[kind] += waves * times
    group.report.wavefronts_ideal[kind] += ideal * times


def count_global(group: "Group", direction: str, address: Array, width: int) -> None:
    """Count the sectors of a request."""
    active = None if group.mask is None else group.mask.reshape(-1, LANES)
    rows = group.spread(group.memory.aligned(address)).view(np.int64).reshape(-1, LANES)
    touched, ideal = global_sectors(rows, active, width)
    group.report.global_sectors[direction] += touched
    group.report.global_sectors_ideal[direction] += ideal


def split_spaces(
    group: "Group", address: Array, access: Callable[[str, Array, Array | None], None], ins: Instruction
) -> None:
    """Send the lanes of a generic access to the memories that their addresses lie in."""
    where = address & WINDOW
    shared = where == U64(SHARED_WINDOW)
    local = where == U64(LOCAL_WINDOW)
    for space, part in (("shared", shared), ("local", local), ("global", ~(shared | local))):
        if part.all():
            access(space, address, None)
            return
        if part.any():
            access(space, address, part)


def load_raw(group: "Group", ins: Instruction, space: str, address: Array, width: int, constant_path: bool) -> Array:
    """Raw elements for the active lanes."""
    lanes = group.index
    if space == "shared":
        count_shared(group, "ld.shared", address, width)
        return group.shared.load(group, ins, address, width, lanes)
    if space == "local":
        return local_view(group, width)[local_index(group, ins, address, width)]
    count_global(group, "load", address, width)
    return group.memory.load(group, ins, address, width, lanes, constant_path)


def store_raw(group: "Group", ins: Instruction, space: str, address: Array, raw: Array) -> None:
    """Write raw elements of the active lanes."""
    width = raw.dtype.itemsize
    if space == "shared":
        count_shared(group, "st.shared", address, width)
        group.shared.store(group, ins, address, raw, group.index)
    elif space == "local":
        local_view(group, width)[local_index(group, ins, address, width)] = raw
    else:
        count_global(group, "store", address, width)
        group.memory.store(group, ins, address, raw, group.index)


def local_view(group: "Group", width: int) -> Array:
    """Local memory of all lanes, made when first used."""
    if group.local is None:
        group.local = np.zeros(group.lanes * group.launch.local_bytes, dtype=U8)
    return group.local.view(RAW[width])


def local_index(group: "Group", ins: Instruction, address: Array, width: int) -> Array:
    """Element index of local addresses."""
    size = group.launch.local_bytes
    if (address & U64(width - 1)).any() or int(address.max()) + width > size:
        raise ins.fault(f"local address {int(address.max())} with {width} bytes is outside {size} bytes, or misaligned")
    return (group.index * size + address.view(np.int64)) // width


def strip(space: str, address: Array) -> Array:
    """An address within its space from a generic one."""
    return address & U64(0xFFFFFFFF) if space in ("shared", "local") else address


def vector_names(text: str) -> list[str]:
    """Registers of a vector operand, or the one register."""
    return [name.strip() for name in text.strip("{}").split(",")]


@opcode("ld", "ldu")
def _load(b: Builder) -> Step:
    space = space_of(b)
    names = vector_names(b.operands[0])
    element = type_dtype(b.kind)
    width = element.itemsize * len(names)
    writes = [b.write(name) for name in names]
    ins, constant_path = b.ins, "nc" in b.mods
    if space == "param":
        return _load_parameter(b, element, writes)
    if "shared::cluster" in b.parts:
        raise b.ins.unsupported("reads the shared memory of another CTA")
    read = b.address(1)

    def deliver(group: "Group", raw: Array) -> None:
        columns = raw.view(element).reshape(-1, len(names))
        for at, write in enumerate(writes):
            write(group, group.spread(np.ascontiguousarray(columns[:, at])))

    def step(group: "Group") -> None:
        address = group.pick(read(group))
        if space:
            deliver(group, load_raw(group, ins, space, address, width, constant_path))
            return

        def access(found: str, at: Array, part: Array | None) -> None:
            with narrowed(group, part):
                chosen = strip(found, at if part is None else at[part])
                deliver(group, load_raw(group, ins, found, chosen, width, False))

        split_spaces(group, address, access, ins)

    return step


class narrowed:
    """Only some of the active lanes, for as long as the context lasts; None is all of them."""

    def __init__(self, group: "Group", part: Array | None) -> None:
        self.group, self.part = group, part

    def __enter__(self) -> None:
        self.outer = self.group.mask
        if self.part is not None:
            mask = np.zeros(self.group.lanes, dtype=bool)
            mask[self.group.index[self.part]] = True
            self.group.enter(mask)

    def __exit__(self, *_: object) -> None:
        if self.part is not None:
            self.group.enter(self.outer)


def _load_parameter(b: Builder, element: Any, writes: list[Any]) -> Step:
    name, _, offset = b.operands[1].strip("[] ").partition("+")
    start = int(offset or "0", 0)

    def step(group: "Group") -> None:
        data = group.launch.parameters[name.strip()]
        for at, write in enumerate(writes):
            begin = start + at * element.itemsize
            write(group, np.frombuffer(data, dtype=element, count=1, offset=begin)[0])

    if name.strip() not in {parameter[0] for parameter in b.entry.parameters}:
        raise b.ins.unsupported(f"names {name}, which is no parameter of {b.entry.name}")
    return step


@opcode("st")
def _store(b: Builder) -> Step:
    space = space_of(b)
    names = vector_names(b.operands[1])
    element = np.dtype(f"u{type_dtype(b.kind).itemsize}")
    raw_dtype = RAW[element.itemsize * len(names)]
    reads = [b.read(name, element) for name in names]
    address_of, ins = b.address(0), b.ins
    elsewhere = b.parts[1] == "shared::cluster"
    if space in ("param", "const") or ("shared::cluster" in b.parts and not elsewhere):
        raise b.ins.unsupported()

    def step(group: "Group") -> None:
        address = group.pick(address_of(group))
        columns = [group.pick(read(group)) for read in reads]
        raw = np.ascontiguousarray(columns[0]) if len(columns) == 1 else np.stack(columns, axis=1).view(raw_dtype)[:, 0]
        if elsewhere:
            count_shared(group, "st.shared", address & OFFSET, raw.dtype.itemsize)
            group.transactions.store(group, ins, address, raw, group.index)
            return
        if space:
            store_raw(group, ins, space, address, raw)
            return

        def access(found: str, at: Array, part: Array | None) -> None:
            with narrowed(group, part):
                chosen = strip(found, at if part is None else at[part])
                store_raw(group, ins, found, chosen, raw if part is None else raw[part])

        split_spaces(group, address, access, ins)

    return step


@opcode("cvta")
def _cvta(b: Builder) -> Step:
    space = space_of(b)
    window = U64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0))
    read, write = b.read(1, U64 if b.kind == "u64" else U32), b.write(0)
    if b.kind == "u32":
        raise b.ins.unsupported("is for 32-bit addresses")
    if "to" in b.mods and window:
        return lambda group: write(group, read(group) & U64(0xFFFFFFFF))
    return lambda group: write(group, read(group) | window)


@opcode("cp")
def _copy(b: Builder) -> Step:
    if b.parts[1:3] == ["async", "bulk"]:
        return copy_in_bulk(b)
    if b.parts[1] != "async" or "mbarrier" in b.mods:
        raise b.ins.unsupported()
    if b.parts[2] == "commit_group":
        return _commit
    if b.parts[2] in ("wait_group", "wait_all"):
        return _wait(b)
    size = int(b.operands[2], 0)
    if size not in (4, 8, 16) or ("cg" in b.mods and size != 16):
        raise b.ins.unsupported("copies a number of bytes that is not allowed")
    hints = any("cache_hint" in part for part in b.parts)
    extra = b.operands[3 : len(b.operands) - hints]
    target_of, source_of, ins = b.address(0), b.address(1), b.ins
    register = b.register(extra[0].lstrip("! ")) if extra else None
    ignores = register is not None and register.bits == 1
    size_of = b.read(extra[0], np.bool_ if ignores else U32) if extra else None

    def step(group: "Group") -> None:
        lanes = group.index
        target, source = group.pick(target_of(group)), group.pick(source_of(group))
        count_shared(group, "cp.async", target, size)
        if size_of is None:
            count_global(group, "load", source, size)
            raw = group.memory.load(group, ins, source, size, lanes)
        else:
            given = group.pick(size_of(group))
            raw = fetch(group, ins, source, size, np.where(given, U32(0), U32(size)) if ignores else given)
        index = group.shared.claim(group, ins, target, size, lanes, flight=True)
        group.copies.append(Copy(lanes, group.committed[lanes], index, raw))

    return step


def fetch(group: "Group", ins: Instruction, source: Array, size: int, given: Array) -> Array:
    """Raw elements of which each lane reads only its first ``given`` bytes; the rest is zero."""
    if (given > size).any():
        at = int((given > size).argmax())
        lane = int(group.index[at])
        raise ins.fault(f"{group.describe(lane)}: src-size {int(given[at])} is more than the {size} bytes of the copy")
    if (source & U64(size - 1)).any():
        at = int((source & U64(size - 1)).argmax())
        lane = int(group.index[at])
        raise ins.fault(f"{group.describe(lane)}: global address {int(source[at]):#x} is not a multiple of {size}")
    raw = np.zeros(len(source), dtype=RAW[size])
    whole = given == size
    if whole.any():
        with narrowed(group, whole):
            count_global(group, "load", source[whole], size)
            raw[whole] = group.memory.load(group, ins, source[whole], size, group.index)
    octets = raw.view(U8).reshape(-1, size)
    for byte in range(size):
        part = (given > byte) & ~whole
        if not part.any():
            break
        with narrowed(group, part):
            octets[part, byte] = group.memory.load(group, ins, source[part] + U64(byte), 1, group.index)
    return raw


def _commit(group: "Group") -> None:
    step = 1 if group.mask is None else group.mask.astype(np.int64)
    group.committed = group.committed + step


def _wait(b: Builder) -> Step:
    everything = b.parts[2] == "wait_all"
    keep = 0 if everything else int(b.operands[0], 0)

    def step(group: "Group") -> None:
        if everything:
            _commit(group)
        left = []
        for copy in group.copies:
            done = copy.number < group.committed[copy.lanes] - keep
            if group.mask is not None:
                done &= group.mask[copy.lanes]
            if done.all():
                group.shared.land(group, copy.index, copy.raw, copy.lanes)
                continue
            if done.any():
                group.shared.land(group, copy.index[done], copy.raw[done], copy.lanes[done])
                rest = ~done
                copy = Copy(copy.lanes[rest], copy.number[rest], copy.index[rest], copy.raw[rest])
            left.append(copy)
        group.copies = left

    return step


def _limited(old: Any, new: Any) -> Any:
    return old.dtype.type(0) if old >= new else old + old.dtype.type(1)


ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, new: old + new,
    "inc": _limited,
    "dec": lambda old, new: new if old == 0 or old > new else old - old.dtype.type(1),
    "exch": lambda old, new: new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
}


@opcode("atom", "red")
def _atomic(b: Builder) -> Step:
    returns = b.parts[0] == "atom"
    name = next((part for part in b.parts[1:] if part in ATOMIC or part == "cas"), "")
    space = space_of(b)
    if not name or space not in ("", "global"):
        raise b.ins.unsupported("is no atomic of global memory that this interpreter knows")
    kind, element, ins = b.kind, type_dtype(b.kind), b.ins
    width = element.itemsize
    write = b.write(0) if returns else None
    address_of = b.address(int(returns))
    reads = [b.read(at, element) for at in range(int(returns) + 1, len(b.operands))]
    packed = kind in ("f16", "bf16", "f16x2", "bf16x2")
    decode, encode = (decoder(kind), encoder(kind)) if packed else (None, None)

    def change(old: Any, values: list[Any]) -> Any:
        if name == "cas":
            return values[1] if old == values[0] else old
        if decode is None or encode is None:
            return ATOMIC[name](old, values[0])
        return encode(ATOMIC[name](decode(np.atleast_1d(old)), decode(np.atleast_1d(values[0]))))[0]

    def step(group: "Group") -> None:
        address = group.pick(address_of(group))
        count_global(group, "store", address, width)
        index = group.memory.index(group, ins, address, width, group.index, write=True)
        view = group.memory.views[width].view(element)
        values = [group.pick(read(group)) for read in reads]
        old = np.empty(len(index), dtype=element)
        # One lane after another: lanes may meet at an address, and each sees what the one before it left.
        for at, place in enumerate(index.tolist()):
            old[at] = view[place]
            view[place] = change(old[at], [value[at] for value in values])
        if write is not None:
            write(group, group.spread(old))

    return step
