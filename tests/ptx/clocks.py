"""What each warp knows of the others: vector clocks, which say what happened before what across CTAs."""

import numpy as np

from .values import Array

MOST_MBARRIERS = 16  # of a CTA


class Clocks:
    """``known[row, column]``: how far a warp, or an mbarrier, had come, as the warp of that row knows."""

    def __init__(self, ctas: int, warps: int) -> None:
        self.warps = warps
        self.rows = ctas * warps
        self.known = np.zeros((self.rows, self.rows + MOST_MBARRIERS * ctas), dtype=np.int64)
        self.own = np.arange(self.rows)
        self.known[self.own, self.own] = 1
        self.agents = self.rows

    def release(self, row: int) -> Array:
        """What the warp knows and has done; what it does from now on is not part of it."""
        found = self.known[row].copy()
        self.known[row, row] += 1
        return found

    def acquire(self, row: int, released: Array) -> None:
        """The warp learns what another one released."""
        np.maximum(self.known[row], released, out=self.known[row])

    def meet(self, rows: Array) -> None:
        """All of these warps learn what each of them knows."""
        self.known[rows] = self.known[rows].max(axis=0)
        self.known[rows, rows] += 1

    def agent(self) -> int:
        """A column for one more mbarrier."""
        self.agents += 1
        return self.agents - 1
