"""Instructions across the lanes of a warp: shuffles, votes, matches, reductions, and what only synchronises."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .operands import Builder, Step, opcode
from .parse import Instruction
from .values import S32, STORAGE, U32, Array, type_dtype

if TYPE_CHECKING:
    from .group import Group

LANES = 32


def rows(group: "Group", value: Any) -> Array:
    """A value over lanes as ``[warps, 32]``."""
    return np.broadcast_to(value, group.lanes).reshape(-1, LANES)


def members(group: "Group", ins: Instruction, mask: Any) -> Array:
    """Active lanes ``[warps, 32]``, once each names itself and every lane that its member mask names is active, too."""
    active = rows(group, group.current())
    names = rows(group, mask).astype(np.int64)
    bits = 1 << np.arange(LANES)
    present = (active * bits).sum(axis=1)[:, None]
    live = (rows(group, group.live) * bits).sum(axis=1)[:, None]
    missing = active & ((names & live & ~present) != 0)
    absent = active & ((names & bits) == 0)
    for wrong, what in (
        (missing, "waits for lanes {0:#x} of member mask {1:#x}, which do not execute it together with this thread"),
        (absent, "is executed by a lane that its member mask {1:#x} does not name"),
    ):
        if wrong.any():
            row, lane = (int(place) for place in np.argwhere(wrong)[0])
            lacking = int(names[row, lane] & live[row, 0] & ~present[row, 0])
            raise ins.fault(
                f"{group.describe(row * LANES + lane)}: {ins.parts[0]} " + what.format(lacking, int(names[row, lane]))
            )
    return active


@opcode("shfl")
def _shfl(b: Builder) -> Step:
    if "sync" not in b.mods:
        raise b.ins.unsupported("needs .sync")
    write, write_valid = b.pair(0)
    source, by, clamp, mask = (b.read(at, U32) for at in (1, 2, 3, 4))
    mode, ins = b.parts[2], b.ins
    own = np.arange(LANES)

    def step(group: "Group") -> None:
        active = members(group, ins, mask(group))
        value = rows(group, source(group))
        amount = rows(group, by(group)).astype(np.int64) & 31
        limits = rows(group, clamp(group)).astype(np.int64)
        segment = limits >> 8 & 31
        highest = (own & segment) | (limits & 31 & ~segment)
        if mode == "up":
            lane = own - amount
            valid = lane >= highest
        else:
            lane = {
                "down": lambda: own + amount,
                "bfly": lambda: own ^ amount,
                "idx": lambda: (own & segment) | (amount & ~segment),
            }[mode]()
            valid = lane <= highest
        lane = np.where(valid, lane, own)
        wrong = active & ~np.take_along_axis(active, lane, axis=1)
        if wrong.any():
            row, at = (int(place) for place in np.argwhere(wrong)[0])
            raise ins.fault(f"{group.describe(row * LANES + at)}: shfl reads lane {lane[row, at]}, which is not active")
        write(group, np.take_along_axis(value, lane, axis=1).reshape(-1))
        if write_valid is not None:
            write_valid(group, valid.reshape(-1))

    return step


def ballot(active: Array, flags: Array) -> Array:
    """Word of the lanes that are active and whose flag is set, ``[warps, 32]``."""
    words = ((active & flags) * (1 << np.arange(LANES))).sum(axis=1).astype(U32)
    return np.repeat(words, LANES)


@opcode("vote")
def _vote(b: Builder) -> Step:
    mode, ins = b.parts[2], b.ins
    flag, mask, write = b.read(1, STORAGE[1]), b.read(2, U32), b.write(0)

    def step(group: "Group") -> None:
        active = members(group, ins, mask(group))
        flags = rows(group, flag(group))
        if mode == "ballot":
            write(group, ballot(active, flags))
            return
        every, some = (flags | ~active).all(axis=1), (flags & active).any(axis=1)
        found = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(group, np.repeat(found, LANES))

    return step


@opcode("match")
def _match(b: Builder) -> Step:
    ins = b.ins
    write, write_all = b.pair(0)
    value, mask = b.read(1), b.read(2, U32)
    everything = b.parts[1] == "all"

    def step(group: "Group") -> None:
        active = members(group, ins, mask(group))
        values = rows(group, value(group))
        same = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        found = (same * (1 << np.arange(LANES))).sum(axis=2)
        if everything:
            agree = (same | ~active[:, None, :]).all(axis=2)
            found = np.where(agree, found, 0)
            if write_all is not None:
                write_all(group, agree.reshape(-1))
        write(group, found.astype(U32).reshape(-1))

    return step


@opcode("activemask")
def _activemask(b: Builder) -> Step:
    write = b.write(0)
    return lambda group: write(group, ballot(rows(group, group.current()), np.ones((1, LANES), dtype=bool)))


@opcode("redux")
def _redux(b: Builder) -> Step:
    functions: dict[str, Callable[..., Any]] = {
        "add": np.add.reduce,
        "min": np.minimum.reduce,
        "max": np.maximum.reduce,
        "and": np.bitwise_and.reduce,
        "or": np.bitwise_or.reduce,
        "xor": np.bitwise_xor.reduce,
    }
    name = b.parts[2]
    dtype = type_dtype(b.kind)
    function, ins = functions[name], b.ins
    neutral: Any = {"and": -1, "min": np.iinfo(dtype).max, "max": np.iinfo(dtype).min}.get(name, 0)
    neutral = dtype.type(neutral if name != "and" else np.iinfo(dtype).max if dtype.kind == "u" else -1)
    value, mask, write = b.read(1), b.read(2, U32), b.write(0)

    def step(group: "Group") -> None:
        active = members(group, ins, mask(group))
        found = function(np.where(active, rows(group, value(group)), neutral), axis=1, dtype=dtype)
        write(group, np.repeat(found, LANES))

    return step


@opcode("elect")
def _elect(b: Builder) -> Step:
    write, write_flag = b.pair(0)
    mask, ins = b.read(1, U32), b.ins

    def step(group: "Group") -> None:
        active = members(group, ins, mask(group))
        first = active.argmax(axis=1)
        write(group, np.repeat(first.astype(S32), LANES))
        if write_flag is not None:
            write_flag(group, (np.arange(LANES) == first[:, None]).reshape(-1))

    return step


@opcode("membar", "griddepcontrol", "nanosleep", "prefetch", "prefetchu", "applypriority", "discard")
def _nothing(b: Builder) -> Step:
    if b.parts[:2] == ["discard", "global"]:
        raise b.ins.unsupported()
    return lambda group: None


@opcode("bar")
def _warp_barrier(b: Builder) -> Step:
    """``bar.warp.sync``; the barriers of a CTA end a block and are built by the program."""
    mask, ins = b.read(0, U32), b.ins

    def step(group: "Group") -> None:
        members(group, ins, mask(group))

    return step
