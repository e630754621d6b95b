"""Shared memory of the CTAs that run together, with what is known of every byte.

The state of a byte: bit 7, never written; bit 6, an asynchronous copy to it is in flight; low bits, the code of the
last write that no barrier has ordered yet. Zero is the common case, and tested for whole words at once.
"""

from typing import TYPE_CHECKING

import numpy as np

from .parse import Instruction
from .races import Families
from .report import Fault
from .values import RAW, U8, U64, Array

if TYPE_CHECKING:
    from .group import Group
    from .transactions import Transactions

POISON, FLIGHT, CODE = 0x80, 0x40, 0x3F


def _bits(raw: Array) -> Array:
    """Raw elements as integers, two for one of 16 bytes."""
    return raw.view(U64) if raw.dtype.itemsize == 16 else raw


class SharedMemory:
    """``ctas`` blocks of ``size`` bytes; an access names its lanes, whose CTA chooses the block."""

    def __init__(self, ctas: int, size: int, *, races: bool, precise: bool) -> None:
        self.size = size
        self.stride = max(16, -(-size // 16) * 16)
        self.races = races
        self.data = np.zeros(ctas * self.stride, dtype=U8)
        self.state = np.full(ctas * self.stride, POISON, dtype=U8)
        self.readers = np.zeros(ctas * self.stride if races else 0, dtype=U8)
        self.data_views = {width: self.data.view(dtype) for width, dtype in RAW.items()}
        self.state_views = {width: self.state.view(dtype) for width, dtype in RAW.items()}
        self.reader_views = {width: self.readers.view(dtype) for width, dtype in RAW.items()}
        self.writers = Families(CODE + 1, precise=precise)
        self.families = Families(256, precise=precise)
        self.transactions: Transactions | None = None  # where bulk copies may write

    def index(self, group: "Group", ins: Instruction, address: Array, width: int, lanes: Array) -> Array:
        """Element index into the views of ``width``, once bounds and alignment hold."""
        low = address & U64(width - 1)
        if low.any():
            at = int(low.argmax())
            raise self.fault(group, ins, lanes[at], f"shared address {int(address[at])} is not a multiple of {width}")
        if len(address) and int(address.max()) + width > self.size:
            at = int(address.argmax())
            where = f"shared address {int(address[at])} with {width} bytes is outside the {self.size} bytes of the CTA"
            raise self.fault(group, ins, lanes[at], where)
        return (group.shared_base[lanes] + address.view(np.int64)) >> (width.bit_length() - 1)

    def fault(self, group: "Group", ins: Instruction, lane: int, what: str) -> Fault:
        """A fault of one thread."""
        return ins.fault(f"{group.describe(int(lane))}: {what}")

    def codes(self, group: "Group", width: int, lanes: Array) -> Array:
        """The code of each lane's own access, repeated over the bytes of what `_bits` returns."""
        codes = group.codes[lanes]
        return np.repeat(codes, 2) if width == 16 else codes.astype(RAW[width])

    def load(self, group: "Group", ins: Instruction, address: Array, width: int, lanes: Array) -> Array:
        """Raw elements at ``address``, one for each of ``lanes``."""
        index = self.index(group, ins, address, width, lanes)
        state = _bits(self.state_views[width][index])
        own = self.codes(group, width, lanes)
        if state.any() and not ((state == 0) | (state == own)).all():
            self.explain(group, ins, state, address, width, lanes, "reads")
        if self.transactions is not None:
            self.transactions.read(group, ins, index, width, lanes)
        if self.races:
            self.note_readers(index, width, own, group.warp_ids[lanes])
        return self.data_views[width][index]

    def note_readers(self, index: Array, width: int, own: Array, warps: Array) -> None:
        """Add warps to the readers of what they read."""
        view = self.reader_views[width]
        before = _bits(view[index])
        fresh = before == 0
        if not fresh.all():
            todo = before != own
            if not todo.any():
                return
            if not (fresh | ~todo).all():
                self.join_readers(index, width, warps)
                return
        view[index] = own.view(view.dtype)
        if not (_bits(view[index]) == own).all():
            self.join_readers(index, width, warps)

    def join_readers(self, index: Array, width: int, warps: Array) -> None:
        """The same where a byte has readers of several warps; repeated until no warp of a tie is left out."""
        view = self.reader_views[width]
        warps = warps[:, None]
        while len(index):
            before = view[index]
            codes = before.view(U8).reshape(-1, width)
            ones = codes[:, :1]
            if (codes == ones).all():  # all bytes of an element alike: one look-up for it
                after = np.repeat(self.families.join(ones, warps), width, axis=1)
            else:
                after = self.families.join(codes, np.broadcast_to(warps, codes.shape))
            left = (after != codes).any(axis=1)
            if not left.any():
                return
            index, warps = index[left], warps[left]
            view[index] = np.ascontiguousarray(after[left]).view(view.dtype).reshape(-1)

    def claim(self, group: "Group", ins: Instruction, address: Array, width: int, lanes: Array, flight: bool) -> Array:
        """Check that these writes are ordered after all earlier accesses, and note them; returns their index."""
        index = self.index(group, ins, address, width, lanes)
        view = self.state_views[width]
        state = _bits(view[index])
        own = self.codes(group, width, lanes)
        poison = np.array([POISON] * 8, dtype=U8).view(state.dtype)[0]
        known = state & ~poison
        if known.any() and not ((known == 0) | (known == own)).all():
            self.explain(group, ins, known, address, width, lanes, "writes")
        if self.transactions is not None:
            self.transactions.write(group, ins, index, width, lanes)
        if self.races:
            readers = self.reader_views[width]
            read = _bits(readers[index])
            if read.any():
                if not ((read == 0) | (read == own)).all():
                    self.explain_readers(group, ins, read, address, width, lanes)
                readers[index] = 0
        mark = own | np.array([FLIGHT] * 8, dtype=U8).view(state.dtype)[0] if flight else own
        view[index] = mark.view(view.dtype)
        if self.races and not (_bits(view[index]) == mark).all():
            wrong = (_bits(view[index]) != mark).reshape(len(index), -1).any(axis=1)
            at = int(wrong.argmax())
            what = f"writes shared byte {int(address[at])}, as another warp does in the same instruction"
            raise self.fault(group, ins, lanes[at], f"race: {what}")
        return index

    def store(self, group: "Group", ins: Instruction, address: Array, raw: Array, lanes: Array) -> None:
        """Write raw elements."""
        width = raw.dtype.itemsize
        index = self.claim(group, ins, address, width, lanes, flight=False)
        view = self.data_views[width]
        view[index] = raw
        wrong = _bits(view[index]) != _bits(raw)
        if wrong.any():
            at = int(wrong.reshape(len(index), -1).any(axis=1).argmax())
            what = f"stores to shared byte {int(address[at])} another value than a thread of the same instruction"
            raise self.fault(group, ins, lanes[at], what)

    def land(self, group: "Group", index: Array, raw: Array, lanes: Array) -> None:
        """An asynchronous copy arrives: its bytes are now written by the threads that waited for them."""
        width = raw.dtype.itemsize
        self.data_views[width][index] = raw
        self.state_views[width][index] = self.codes(group, width, lanes).view(RAW[width])

    def barrier(self, ctas: Array, passed: Array, whole: Array) -> None:
        """Order what was accessed before a barrier.

        Args:
            ctas: which CTAs had a barrier completed, ``[n]``.
            passed: bit set of the warps that passed it, ``[n]``.
            whole: whether those are all warps of the CTA that have not exited, ``[n]``.
        """
        if not self.races:
            return
        state, readers = self.state.reshape(-1, self.stride), self.readers.reshape(-1, self.stride)
        if whole.all() and len(ctas) == len(state):
            state &= U8(POISON | FLIGHT)
            readers[:] = 0
            return
        full = ctas[whole]
        state[full] &= U8(POISON | FLIGHT)
        readers[full] = 0
        for cta, bits in zip(ctas[~whole].tolist(), passed[~whole].tolist(), strict=True):
            low = self.writers.after_barrier(bits)
            state[cta] = (state[cta] & U8(POISON | FLIGHT)) | low[state[cta] & CODE]
            readers[cta] = self.families.after_barrier(bits)[readers[cta]]

    def explain(
        self, group: "Group", ins: Instruction, state: Array, address: Array, width: int, lanes: Array, verb: str
    ) -> None:
        """Raise the fault of the first byte whose state forbids the access; return if all are well after all."""
        codes = state.view(U8).reshape(-1, width)
        safe = self.writers.safe[codes & CODE, group.warp_ids[lanes][:, None]] if self.races else True
        bad = (codes & (POISON | FLIGHT) != 0) | ~np.asarray(safe)
        if not bad.any():
            return
        at, byte = (int(position) for position in np.argwhere(bad)[0])
        code, where = int(codes[at, byte]), int(address[at]) + byte
        if code & FLIGHT:
            what = f"{verb} shared byte {where}, to which a cp.async is in flight"
        elif code & POISON:
            what = f"{verb} shared byte {where}, which was never written"
        else:
            what = f"race: {verb} shared byte {where}, written by {self.writer(code)} with no barrier between"
        raise self.fault(group, ins, lanes[at], what)

    def explain_readers(
        self, group: "Group", ins: Instruction, read: Array, address: Array, width: int, lanes: Array
    ) -> None:
        """Raise the fault of a write over what another warp reads; return if barriers of a part ordered them."""
        codes = read.view(U8).reshape(-1, width)
        bad = ~self.families.safe[codes, group.warp_ids[lanes][:, None]]
        if bad.any():
            at, byte = (int(position) for position in np.argwhere(bad)[0])
            what = f"race: writes shared byte {int(address[at]) + byte}, read by another warp with no barrier between"
            raise self.fault(group, ins, lanes[at], what)

    def writer(self, code: int) -> str:
        """Who a code stands for."""
        return f"warp {code - 1}" if code <= 32 else "another warp"
