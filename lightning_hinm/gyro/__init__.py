"""The permutation search: the order of rows and vectors in which the pattern keeps the most saliency.

``"gyro"`` is the loop of arXiv 2407.20496, ``"exchange"`` is ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hinm.gyro import cache
from lightning_hinm.gyro.exchange import gyro_exchange
from lightning_hinm.gyro.paper import gyro_paper
from lightning_hinm.gyro.problem import Clock, Problem
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import check_saliency, choose_vectors, hinm_mask, retained
from lightning_hinm.pattern import HiNMPattern

METHODS = ("identity", "gyro", "exchange")

# Up to this size the default also runs the paper's loop and keeps the better of both.
SMALL = 1 << 14


@dataclass(frozen=True)
class SearchResult:
    """A layout, what it retains, and what it took to find it.

    Args:
        layout: on the CPU.
        retained: of the saliency.
        gap_closed: how far ``retained`` came from ``"identity"``, 0, to an unstructured mask that keeps as many, 1.
        seconds: that it took; few where the layout was kept on disk.
        ended_by_budget: whether the time budget cut it short, be it by fewer rounds.
    """

    layout: HiNMLayout
    retained: float
    gap_closed: float
    seconds: float
    ended_by_budget: bool


@dataclass(frozen=True)
class Progress:
    """Of a search that takes long: as in ``SearchResult``, so far; ``str()`` is for a log."""

    seconds: float
    retained: float
    gap_closed: float

    def __str__(self) -> str:
        return f"gap closed {self.gap_closed:.2f} after {self.seconds:.0f} s of search"


def gyro_permute(
    saliency: Tensor,
    pattern: HiNMPattern,
    *,
    method: str = "exchange",
    generator: torch.Generator | None = None,
    time_budget: float | None = None,
) -> HiNMLayout:
    """The layout that retains the most saliency that ``method`` finds, never less than ``"identity"``.

    Any shape is taken: fewer rows than a tile are one tile, a window that does not divide the columns leaves a shorter
    last run (``HiNMPattern.runs``), and a saliency of zeros is answered with identity. A result is kept on disk unless
    ``LIGHTNING_HINM_LAYOUTS=off`` (``gyro.cache``).

    Args:
        saliency: non-negative, ``[O, I]``, on any device.
        pattern: the pattern to search for.
        method: ``"identity"`` keeps the rows where they are and the columns with the largest sums in each tile;
            ``"gyro"`` is the loop of arXiv 2407.20496; ``"exchange"`` anneals rows on a stand-in for what survives and
            assigns vectors exactly, many at once, and is the best.
        generator: randomness, on the CPU; None seeds one with 0. Same state of it, machine and libraries: same layout.
        time_budget: seconds after which the best layout so far is returned; 0 gives identity, None no limit.

    Returns:
        The layout, on the CPU.

    Raises:
        ValueError: if the saliency is negative, not finite or no matrix, or the method unknown.
    """
    return search(saliency, pattern, method=method, generator=generator, time_budget=time_budget).layout


def search(
    saliency: Tensor,
    pattern: HiNMPattern,
    *,
    groups: int = 1,
    method: str = "exchange",
    generator: torch.Generator | None = None,
    time_budget: float | None = None,
    output_order: Tensor | None = None,
    within: Tensor | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """``gyro_permute`` for one layer, with what training needs.

    A search that ran to its end is kept on disk, and not run again (``gyro.cache``).

    Args:
        saliency: non-negative, ``[O, I]``.
        pattern: the pattern to search for.
        groups: groups of a convolution; each is a matrix of its own, and no row leaves it.
        method: as in ``gyro_permute``.
        generator: as in ``gyro_permute``.
        time_budget: as in ``gyro_permute``.
        output_order: int64 ``[O]``; given, rows stay as it says and only the vectors are searched.
        within: bool ``[O, I]``, the mask in force with that ``output_order``: only columns that a tile still keeps.
        progress: called now and then in a long search; what it is told is of one group of a convolution.

    Raises:
        ValueError: as in ``gyro_permute``.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: the permutation search knows {', '.join(map(repr, METHODS))}.")
    if time_budget is not None and not time_budget >= 0:
        raise ValueError(f"time_budget={time_budget}: a budget is at least 0 seconds, or None for no limit.")
    check_saliency(saliency)
    saliency, clock = saliency.detach(), Clock(time_budget)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    key = None
    if method != "identity" and not clock.expired():
        tensors = {"saliency": saliency, "generator": generator.get_state(), "order": output_order, "within": within}
        key = cache.key_of(pattern, method, groups, tensors)
        entry = None if key is None else cache.read(key, pattern, saliency.shape, groups)
        if key is not None and entry is not None:
            value = retained(saliency, hinm_mask(saliency, entry.layout))
            if math.isclose(value, entry.retained, rel_tol=1e-9):
                generator.set_state(entry.generator)
                layout = replace(entry.layout, retained=value)
                return SearchResult(layout, value, entry.gap_closed, clock.seconds, ended_by_budget=False)
            cache.forget(key)
    layout = _search_groups(saliency, pattern, groups, method, generator, clock, output_order, within, progress)
    value = retained(saliency, hinm_mask(saliency, layout))
    layout = replace(layout, retained=value)
    gap = _Gap(saliency, pattern).closed(value)
    if key is not None and not clock.ended:
        cache.write(key, cache.Entry(layout, value, gap, generator.get_state()))
    return SearchResult(layout, value, gap, clock.seconds, clock.ended)


def _search_groups(
    saliency: Tensor,
    pattern: HiNMPattern,
    groups: int,
    method: str,
    generator: torch.Generator,
    clock: Clock,
    output_order: Tensor | None,
    within: Tensor | None,
    progress: Callable[[Progress], None] | None,
) -> HiNMLayout:
    """Each group of a convolution by itself."""
    rows = saliency.shape[0] // groups
    orders, indices = [], []

    def tell(of_group: Progress) -> None:
        if progress is not None:
            progress(replace(of_group, seconds=clock.seconds))

    for group in range(groups):
        part = slice(group * rows, (group + 1) * rows)
        fixed = None if output_order is None else output_order[part] - group * rows
        # what is left, shared by the groups to come
        left = None if clock.budget is None else max(clock.budget - clock.seconds, 0.0) / (groups - group)
        own = Clock(left)
        inside = None if within is None else within[part]
        order, index = _search_matrix(saliency[part], pattern, method, generator, own, fixed, inside, progress and tell)
        clock.ended |= own.ended
        orders.append(order + group * rows)
        indices.append(index)
    return HiNMLayout(pattern, torch.cat(orders).cpu(), torch.cat(indices).cpu())


def _search_matrix(
    saliency: Tensor,
    pattern: HiNMPattern,
    method: str,
    generator: torch.Generator,
    clock: Clock,
    output_order: Tensor | None,
    within: Tensor | None,
    progress: Callable[[Progress], None] | None,
) -> tuple[Tensor, Tensor]:
    """``(output_order, vector_index)`` of one matrix: the best of identity and what the method finds."""
    low, peak = saliency.aminmax()
    # A narrow type is widened before it is divided, a wide one after: both keep their small values.
    wide = saliency if saliency.dtype == torch.float64 else saliency.float()
    scaled = (wide / peak if peak > 0 else wide).float()
    fixed = None if output_order is None else output_order.to(saliency.device)
    first = torch.arange(saliency.shape[0], device=saliency.device) if fixed is None else fixed
    candidates = [(first, choose_vectors(saliency, pattern, first, within=within))]
    if method != "identity" and low < peak and not clock.expired():
        report = None
        if progress is not None:
            gaps: list[_Gap] = []  # one, made for the first report

            def report(order: Tensor, index: Tensor) -> None:
                if not gaps:
                    gaps.append(_Gap(saliency, pattern))
                value = retained(saliency, hinm_mask(saliency, HiNMLayout(pattern, order, index)))
                progress(Progress(clock.seconds, value, gaps[0].closed(value)))

        problem = Problem(scaled, pattern, generator, clock, fixed, within, report)
        if method == "gyro" or (saliency.numel() <= SMALL and fixed is None):
            candidates.append(gyro_paper(problem, *candidates[0]))
        if method == "exchange" and not clock.expired():
            # A clock of its own: it shares out the time that is left.
            rest = Clock(None if clock.budget is None else clock.budget - clock.seconds)
            candidates.append(gyro_exchange(replace(problem, clock=rest), *candidates[0]))
            clock.ended |= rest.ended
    layouts = [(order, _ascending_groups(index, pattern)) for order, index in candidates]
    values = [retained(saliency, hinm_mask(saliency, HiNMLayout(pattern, *layout))) for layout in layouts]
    return layouts[values.index(max(values))]


class _Gap:
    """Between identity and an unstructured mask that keeps as many."""

    def __init__(self, saliency: Tensor, pattern: HiNMPattern) -> None:
        order = torch.arange(saliency.shape[0], device=saliency.device)
        mask = hinm_mask(saliency, HiNMLayout(pattern, order, choose_vectors(saliency, pattern, order)))
        self.low = retained(saliency, mask)
        best = saliency.flatten().topk(int(mask.sum()), sorted=False).values.sum(dtype=torch.float64).item()
        total = saliency.sum(dtype=torch.float64).item()
        self.high = best / total if total else 1.0

    def closed(self, value: float) -> float:
        """0 at identity, 1 where nothing better is possible; 1 too where identity is best."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 1.0


def _ascending_groups(index: Tensor, pattern: HiNMPattern) -> Tensor:
    """Columns ascending inside each group: the mask is the same, and metadata then follows the column order."""
    return index.unflatten(1, (-1, pattern.m)).sort(dim=2).values.flatten(1)
