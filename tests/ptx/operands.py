"""Operands, decoded once: an instruction's text becomes closures that read and write arrays over the lanes."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import Entry, Instruction, Register, Variable, immediate
from .values import FLOATS, STORAGE, U64, Array, constant, type_dtype

if TYPE_CHECKING:
    from .group import Group

Step = Callable[["Group"], None]
Read = Callable[["Group"], Any]
Write = Callable[["Group", Any], None]
Build = Callable[["Builder"], Step]

# the window of generic addresses that is shared memory; its low half is zero, so a truncated pointer is the offset
SHARED_WINDOW = 0x7F00_0000_0000_0000
LOCAL_WINDOW = 0x7E00_0000_0000_0000

SPECIAL = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|nwarpid|clock|clock_hi|clock64|globaltimer|smid|nsmid|gridid"
    r"|lanemask_(?:eq|lt|le|gt|ge)|dynamic_smem_size|total_smem_size|cluster_ctarank|cluster_nctarank)$"
)

_BUILDERS: dict[tuple[str, str], Build] = {}


def opcode(*names: str, domain: str = "") -> Callable[[Build], Build]:
    """Register how instructions of these base names are built; ``domain`` "float" or "int" by their last type."""

    def register(build: Build) -> Build:
        for name in names:
            _BUILDERS[name, domain] = build
        return build

    return register


class Builder:
    """What a family of instructions needs to turn one of them into a closure.

    Attributes:
        parts: the opcode split at its dots, and ``mods`` the same without the name, as a set.
        kind: the last type of the opcode, such as ``s32`` or ``bf16x2``; empty if it has none.
    """

    def __init__(self, entry: Entry, ins: Instruction, addresses: dict[str, int]) -> None:
        self.entry = entry
        self.ins = ins
        self.parts = ins.parts
        self.mods = set(ins.parts[1:])
        self.operands = ins.operands
        self.addresses = addresses
        self.types = [part for part in ins.parts[1:] if _is_type(part)]
        self.kind = self.types[-1] if self.types else ""

    def build(self) -> Step:
        """The closure of this instruction, guard not included.

        Raises:
            NotImplementedError: if there is no rule for it.
        """
        domain = "float" if self.kind in FLOATS else "int"
        build = _BUILDERS.get((self.parts[0], domain)) or _BUILDERS.get((self.parts[0], ""))
        if build is None or (self.kind == "f64" and self.parts[0] not in ("mov", "ld", "st", "selp")):
            raise self.ins.unsupported()
        try:
            return build(self)
        except (IndexError, ValueError, KeyError) as error:
            raise self.ins.unsupported(f"has operands that are not understood ({error!r})") from error

    def register(self, text: str) -> Register | None:
        """The register of that name, if it is one."""
        found = self.ins.scope.find(text)
        return found if isinstance(found, Register) else None

    def read(self, text: str | int, dtype: Any = None) -> Read:
        """Reader of an operand, by text or position, as ``dtype`` (default: the instruction's type)."""
        text = self.operands[text] if isinstance(text, int) else text
        dtype = type_dtype(self.kind) if dtype is None else np.dtype(dtype)
        if text.startswith("!"):
            inner = self.read(text[1:].strip(), dtype)
            return lambda group: ~inner(group)
        register = self.register(text)
        if register is not None:
            return self._read_register(register, dtype)
        if text.startswith("{"):
            return self._read_vector(text, dtype)
        if SPECIAL.match(text):
            name = text[1:]
            return lambda group: _cast(group.special(name), dtype)
        value = self.value_of(text)
        scalar = constant(value, dtype)
        return lambda group: scalar

    def _read_register(self, register: Register, dtype: Any) -> Read:
        index, storage = register.index, STORAGE[register.bits]
        ins = self.ins
        if storage.itemsize < dtype.itemsize:
            raise ValueError(f"{register.name} is too narrow")

        def bits(group: "Group") -> Array:
            value = group.registers[index]
            if value is None:
                raise ins.fault(f"{register.name} is read but never written")
            return value

        if storage == dtype:
            return bits
        if storage.itemsize == dtype.itemsize:
            return lambda group: bits(group).view(dtype)
        # the low bits, as ld and st and cvt take a register wider than their type
        return lambda group: bits(group).astype(STORAGE[8 * dtype.itemsize]).view(dtype)

    def _read_vector(self, text: str, dtype: Any) -> Read:
        names = [name.strip() for name in text[1:-1].split(",")]
        part = np.dtype(STORAGE[8 * dtype.itemsize // len(names)])
        reads = [self.read(name, part) for name in names]

        def join(group: "Group") -> Array:
            columns = [np.broadcast_to(read(group), group.lanes) for read in reads]
            return np.stack(columns, axis=1).view(dtype).reshape(-1)

        return join

    def value_of(self, text: str) -> int:
        """A number, or the address of a variable with what is added to it."""
        try:
            return immediate(text)
        except ValueError:
            name, sign, rest = re.match(r"([\w$]+)\s*(?:([+-])\s*(\S+))?$", text).groups()  # type: ignore[union-attr]
        variable = self.ins.scope.find(name)
        if not isinstance(variable, Variable):
            raise self.ins.unsupported(f"names {name}, which is declared nowhere")
        if variable.space == "shared":
            base = (
                -(-self.entry.shared_bytes // variable.align) * variable.align if variable.dynamic else variable.offset
            )
        elif variable.space == "local":
            base = variable.offset
        else:
            base = self.addresses[name]
        return base + (int(rest, 0) * (-1 if sign == "-" else 1) if rest else 0)

    def write(self, text: str | int) -> Write:
        """Writer of a destination: only active lanes change, narrow values are extended by their own sign."""
        text = self.operands[text] if isinstance(text, int) else text
        if text == "_":
            return lambda group, value: None
        if text.startswith("{"):
            return self._write_vector(text)
        register = self.register(text)
        if register is None:
            raise self.ins.unsupported(f"writes {text}, which is no register")
        index, storage = register.index, STORAGE[register.bits]
        size = storage.itemsize
        zero = storage.type(0)

        def write(group: "Group", value: Any) -> None:
            if value.dtype != storage:
                value = value.view(storage) if value.dtype.itemsize == size else value.astype(storage)
            mask = group.mask
            if mask is None:
                if value.shape != group.shape:
                    value = np.broadcast_to(value, group.lanes).copy()
                group.registers[index] = value
            else:
                old = group.registers[index]
                group.registers[index] = np.where(mask, value, zero if old is None else old)

        return write

    def _write_vector(self, text: str) -> Write:
        names = [name.strip() for name in text[1:-1].split(",")]
        writes = [self.write(name) for name in names]

        def split(group: "Group", value: Any) -> None:
            whole = np.broadcast_to(value, group.lanes)
            part = STORAGE[8 * whole.dtype.itemsize // len(writes)]
            columns = np.ascontiguousarray(whole).view(part).reshape(-1, len(writes))
            for column, write in enumerate(writes):
                write(group, np.ascontiguousarray(columns[:, column]))

        return split

    def pair(self, text: str | int) -> tuple[Write, Write | None]:
        """Writers of ``d`` or of ``d|p``."""
        text = self.operands[text] if isinstance(text, int) else text
        first, bar, second = text.partition("|")
        return self.write(first.strip()), self.write(second.strip()) if bar else None

    def address(self, text: str | int, bits: int = 0) -> Read:
        """Reader of the address in brackets, as unsigned 64 bits; a 32-bit sum wraps as 32 bits do."""
        text = self.operands[text] if isinstance(text, int) else text
        inner = text.strip("[] ")
        name, sign, rest = re.match(r"([\w$%]+)\s*(?:([+-])\s*(\S+))?$", inner).groups()  # type: ignore[union-attr]
        register = self.register(name)
        if register is None:
            fixed = np.uint64(self.value_of(inner) & (2**64 - 1))
            return lambda group: np.full(group.lanes, fixed)
        dtype = STORAGE[register.bits]
        base = self._read_register(register, dtype)
        shift = int(f"{sign}{rest.lstrip('+')}", 0) if rest and not rest.startswith("-") else int(rest or "0", 0)
        offset = constant(shift, dtype)
        if register.bits == 64:
            return base if shift == 0 else lambda group: base(group) + offset
        if register.bits != 32:
            raise ValueError(f"{name} is no address")
        return lambda group: (base(group) + offset).astype(U64)


def _is_type(part: str) -> bool:
    return (
        part in FLOATS or part == "pred" or (part[:1] in ("b", "u", "s", "f") and part[1:] in ("8", "16", "32", "64"))
    )


def _cast(value: Array, dtype: Any) -> Array:
    """Special registers are 32 or 64 bits; a wider or narrower type takes their low bits."""
    return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)
