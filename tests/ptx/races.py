"""Who touched a byte of shared memory since the last barrier: the state behind the race detector.

An access is ordered before a warp once a barrier that the accessing warp passed, too, has been passed by it. So an
access carries the set of warps that it is ordered before, at first only its own, and a barrier that any of them passes
adds all who pass it. Several readers of a byte are a family of such sets; each family has a small number, its code.
"""

import numpy as np

from .values import U8, Array

WARPS = 32


class Families:
    """Codes of families of sets of warps; code 0 is no access at all, code ``1 + w`` one by warp ``w``.

    The last code stands for "several warps", which nobody is ordered after until a barrier of the whole CTA. Without
    ``precise`` every family of two or more has it; with ``precise`` (for barriers of a part of a CTA) they are told
    apart as long as codes last.
    """

    def __init__(self, limit: int, *, precise: bool) -> None:
        self.limit = limit
        self.precise = precise
        self.members: list[frozenset[int]] = [frozenset()]
        self.codes: dict[frozenset[int], int] = {frozenset(): 0}
        self.safe = np.zeros((limit, WARPS), dtype=bool)
        self.safe[0] = True
        self.joined = np.zeros((limit, WARPS), dtype=U8)
        self.joined[limit - 1] = limit - 1
        for warp in range(WARPS):
            code = self.intern(frozenset([1 << warp]))
            self.joined[0, warp] = self.joined[code, warp] = code

    def intern(self, family: frozenset[int]) -> int:
        """Code of a family, a new one if need be."""
        if family not in self.codes:
            if len(self.members) >= self.limit - 1 or (not self.precise and len(family) > 1):
                return self.limit - 1
            code = self.codes[family] = len(self.members)
            self.members.append(family)
            self.safe[code] = [all(group >> warp & 1 for group in family) for warp in range(WARPS)]
        return self.codes[family]

    def join(self, codes: Array, warps: Array) -> Array:
        """Codes after one more access by a warp, elementwise."""
        found = self.joined[codes, warps]
        missing = found == 0
        if missing.any():
            for code, warp in {*zip(codes[missing].tolist(), warps[missing].tolist(), strict=True)}:
                self.joined[code, warp] = self.intern(self.members[code] | {1 << warp})
            found = self.joined[codes, warps]
        return found

    def after_barrier(self, passed: int) -> Array:
        """New code for each code once the warps in the bit set ``passed`` have passed a barrier together."""
        table = np.arange(self.limit, dtype=U8)
        for code in range(1, len(self.members)):
            family = self.members[code]
            table[code] = self.intern(frozenset(group | passed if group & passed else group for group in family))
        return table
