"""When to prune, and how much: from the progress of a training to the pattern that is due."""

from dataclasses import dataclass, replace
from fractions import Fraction

from lightning_hinm.pattern import HiNMPattern, exact


@dataclass(frozen=True)
class GradualSchedule:
    """Total sparsity rises with a cubic curve (Zhu and Gupta, arXiv 1710.01878): fast first, slowly towards the target.

    Update ``i`` (1-based) comes at progress ``begin + (end - begin) * (i - 1) / (updates - 1)`` and asks for
    ``target * (1 - (1 - i / updates) ** 3)``.

    Args:
        begin: fraction of the training before the first update.
        end: fraction of the training before the last update, which has the target; ``begin == end`` is one-shot.
        updates: number of updates.

    Raises:
        ValueError: if no such schedule can exist; every offending field is named.
        TypeError: if a field has the wrong type.

    >>> schedule = GradualSchedule(begin=0.0, end=0.4, updates=3)
    >>> [schedule.due(progress) for progress in (0.0, 0.19, 0.2, 0.9)]
    [1, 1, 2, 3]
    >>> [f"{schedule.pattern(i, HiNMPattern()).sparsity:.3f}" for i in (1, 2, 3)]
    ['0.500', '0.750', '0.750']
    """

    begin: float = 0.0
    end: float = 0.3
    updates: int = 5

    def __post_init__(self) -> None:
        for field in ("begin", "end"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"GradualSchedule: {field}={value!r} must be a float.")
        if isinstance(self.updates, bool) or not isinstance(self.updates, int):
            raise TypeError(f"GradualSchedule: updates={self.updates!r} must be an int.")
        wrong = [
            f"{field}={value} must be in [0, 1], a fraction of the training, e.g. 0.3"
            for field, value in (("begin", self.begin), ("end", self.end))
            if not 0 <= value <= 1
        ]
        if self.begin > self.end:
            wrong.append(f"begin={self.begin} must not be after end={self.end}; equal is one-shot")
        if self.updates < 1:
            wrong.append(f"updates={self.updates} must be at least 1, e.g. 5")
        if wrong:
            raise ValueError("GradualSchedule: " + "; ".join(wrong) + ".")

    @property
    def last(self) -> int:
        """Number of the last update: ``updates``, or 1 where ``begin == end``."""
        return 1 if self.begin == self.end else self.updates

    def due(self, progress: Fraction | float) -> int:
        """Number of the latest update that is due at ``progress``; 0 before the first."""
        begin, end, now = exact(self.begin), exact(self.end), exact(progress)
        if now < begin:
            return 0
        if self.last == 1:
            return 1
        return min(((now - begin) * (self.last - 1) / (end - begin)).__floor__() + 1, self.last)

    def pattern(self, update: int, target: HiNMPattern) -> HiNMPattern:
        """The pattern of one update: first whole vectors go, then ``n`` falls, so that every mask fits in the last.

        Args:
            update: 1-based, at most ``last``.
            target: the pattern of the last update.
        """
        if update >= self.last:
            return target
        whole = 1 - exact(target.vector_sparsity)  # what is left when all target vectors are gone
        final = 1 - whole * Fraction(target.n, target.m)
        sparsity = final * (1 - (1 - Fraction(update, self.last)) ** 3)
        if sparsity <= 1 - whole:
            return replace(target, vector_sparsity=float(sparsity), n=target.m)
        nearest = (target.m * (1 - sparsity) / whole + Fraction(1, 2)).__floor__()
        return replace(target, n=max(nearest, target.n))
