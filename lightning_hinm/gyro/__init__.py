"""The permutation search: the order of rows and vectors in which the pattern keeps the most saliency.

``"gyro"`` is the loop of arXiv 2407.20496, ``"exchange"`` is ours. Both search one matrix, or several that share one
order of rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hinm.gyro import cache
from lightning_hinm.gyro.exchange import gyro_exchange
from lightning_hinm.gyro.gap import Gap
from lightning_hinm.gyro.paper import gyro_paper
from lightning_hinm.gyro.problem import Clock, Problem
from lightning_hinm.layout import HiNMLayout, wrong_with_order
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
        gap_closed: how far ``retained`` came from ``"identity"``, 0, to an unstructured mask that keeps as many, 1. It
            is below 0 where a layer gives more to those that it shares its ``output_order`` with than it gets.
        seconds: that it took; few where the layout was kept on disk. Of a search for several layers, a share by size.
        ended_by_budget: whether the time budget cut it short, be it by fewer rounds.
    """

    layout: HiNMLayout
    retained: float
    gap_closed: float
    seconds: float
    ended_by_budget: bool


@dataclass(frozen=True)
class Progress:
    """Of a search that takes long: as in ``SearchResult``, so far, the mean of several; ``str()`` is for a log."""

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
        ValueError: as in ``gyro_permute``, or if groups, order or mask are not of such a saliency.
    """
    return _search([saliency], [pattern], groups, method, generator, time_budget, output_order, within, progress)[0]


def search_shared(
    saliencies: Sequence[Tensor],
    patterns: Sequence[HiNMPattern],
    *,
    groups: int = 1,
    method: str = "exchange",
    generator: torch.Generator | None = None,
    time_budget: float | None = None,
    output_order: Tensor | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[SearchResult]:
    """``search`` for layers that share one ``output_order``: a result for each, with the same order.

    What it maximises, and what is never less than identity's, is the sum of what they retain, each a fraction of its
    own total: no layer outweighs another, and a layer of zeros counts nothing. A single layer is searched as ever.

    Args:
        saliencies: non-negative, ``[O, I]`` each, with one O.
        patterns: of each, with one ``vector_size``.
        groups: as in ``search``.
        method: as in ``gyro_permute``.
        generator: as in ``gyro_permute``.
        time_budget: seconds for all together.
        output_order: as in ``search``, of all.
        progress: as in ``search``.

    Raises:
        ValueError: as in ``search``, or if one order cannot serve all.
    """
    rows = sorted({len(saliency) for saliency in saliencies})
    sizes = sorted({pattern.vector_size for pattern in patterns})
    if len(rows) != 1 or len(sizes) != 1:
        raise ValueError(
            f"search_shared: got layers of {rows} rows in tiles of vector_size={sizes}, but one output_order serves "
            "only layers with as many rows and tiles of one size."
        )
    return _search(saliencies, patterns, groups, method, generator, time_budget, output_order, None, progress)


def _search(
    saliencies: Sequence[Tensor],
    patterns: Sequence[HiNMPattern],
    groups: int,
    method: str,
    generator: torch.Generator | None,
    time_budget: float | None,
    output_order: Tensor | None,
    within: Tensor | None,
    progress: Callable[[Progress], None] | None,
) -> list[SearchResult]:
    """One question, asked of the disk first."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: the permutation search knows {', '.join(map(repr, METHODS))}.")
    if time_budget is not None and not time_budget >= 0:
        raise ValueError(f"time_budget={time_budget}: a budget is at least 0 seconds, or None for no limit.")
    for saliency in saliencies:
        check_saliency(saliency)
    _check_rows(saliencies[0], patterns[0].vector_size, groups, output_order, within)
    saliencies = [saliency.detach().to(saliencies[0].device) for saliency in saliencies]
    clock, inference, gradients = Clock(time_budget), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def tell(so_far: Progress) -> None:
        if progress is not None:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):  # as the caller has it
                progress(so_far)

    generator = torch.Generator().manual_seed(0) if generator is None else generator
    key = None
    if method != "identity" and not clock.expired():
        tensors = {"generator": generator.get_state(), "order": output_order, "within": within}
        tensors |= {f"saliency {i}": saliency for i, saliency in enumerate(saliencies)}
        key = cache.key_of(patterns, method, groups, tensors)
    with torch.inference_mode(False):  # a layout may serve a training
        entries = [] if key is None else _read_entries(key, saliencies, patterns, groups)
    if entries:
        generator.set_state(entries[0].generator)
    else:
        with torch.inference_mode():  # a small matrix is searched by small operations, which cost less in it
            found = _search_groups(
                saliencies, patterns, groups, method, generator, clock, output_order, within, progress and tell
            )
            gaps = [
                Gap(saliency, each.layout.pattern, each.identity).closed(each.retained)
                for saliency, each in zip(saliencies, found, strict=True)
            ]
        for each, gap in zip(found, gaps, strict=True):
            with torch.inference_mode(False):
                order, index = (part.cpu().clone() for part in (each.layout.output_order, each.layout.vector_index))
            layout = HiNMLayout(each.layout.pattern, order, index, each.retained)
            entries.append(cache.Entry(layout, each.retained, gap, generator.get_state()))
        for i, entry in enumerate(entries if key is not None and not clock.ended else ()):
            cache.write(f"{key}-{i}", entry)
    seconds, weights = clock.seconds, sum(saliency.numel() for saliency in saliencies)
    return [
        SearchResult(entry.layout, entry.retained, entry.gap_closed, seconds * saliency.numel() / weights, clock.ended)
        for saliency, entry in zip(saliencies, entries, strict=True)
    ]


def _check_rows(
    saliency: Tensor, vector_size: int, groups: int, output_order: Tensor | None, within: Tensor | None
) -> None:
    """Refuses groups that do not fill tiles, and an order or a mask that are not of such a saliency."""
    order = torch.arange(len(saliency)) if output_order is None else output_order
    wrong = wrong_with_order(order, len(saliency), vector_size, groups)
    if within is not None and (output_order is None or within.dtype != torch.bool or within.shape != saliency.shape):
        wrong.append(f"within is the mask in force with an output_order, bool {list(saliency.shape)}")
    if wrong:
        raise ValueError(
            f"search: {'; '.join(wrong)}. Pass the layer's own groups, order and mask, and a vector_size that divides "
            "the rows of each group."
        )


def _read_entries(
    key: str, saliencies: Sequence[Tensor], patterns: Sequence[HiNMPattern], groups: int
) -> list[cache.Entry]:
    """The whole answer from disk, or nothing: an entry for each matrix, with one order, that retains what it says."""
    entries: list[cache.Entry] = []
    for i, (saliency, pattern) in enumerate(zip(saliencies, patterns, strict=True)):
        entry = cache.read(f"{key}-{i}", pattern, saliency.shape, groups)
        if entry is None:
            return []
        value, order = retained(saliency, hinm_mask(saliency, entry.layout)), entry.layout.output_order
        same = not entries or torch.equal(order, entries[0].layout.output_order)
        if not same or not math.isclose(value, entry.retained, rel_tol=1e-9):
            cache.forget(f"{key}-{i}")
            return []
        entries.append(replace(entry, layout=replace(entry.layout, retained=value), retained=value))
    return entries


class _Found(NamedTuple):
    """The layout of one matrix, what it retains, and what identity's does: None where that was not asked."""

    layout: HiNMLayout
    retained: float
    identity: float | None


def _search_groups(
    saliencies: Sequence[Tensor],
    patterns: Sequence[HiNMPattern],
    groups: int,
    method: str,
    generator: torch.Generator,
    clock: Clock,
    output_order: Tensor | None,
    within: Tensor | None,
    progress: Callable[[Progress], None] | None,
) -> list[_Found]:
    """Each group of a convolution by itself."""
    if groups == 1:
        return _search_rows(saliencies, patterns, method, generator, clock, output_order, within, progress)
    rows = len(saliencies[0]) // groups
    orders, indices = [], []

    def tell(of_group: Progress) -> None:
        if progress is not None:
            progress(replace(of_group, seconds=clock.seconds))

    for group in range(groups):
        part = slice(group * rows, (group + 1) * rows)
        fixed = None if output_order is None else output_order[part] - group * rows
        own = clock.share(groups - group)  # of what is left
        inside = None if within is None else within[part]
        parts = [saliency[part] for saliency in saliencies]
        found = _search_rows(parts, patterns, method, generator, own, fixed, inside, progress and tell)
        clock.ended |= own.ended
        orders.append(found[0].layout.output_order + group * rows)
        indices.append([each.layout.vector_index for each in found])
    order = torch.cat(orders)
    layouts = [
        HiNMLayout(pattern, order, torch.cat(index))
        for pattern, index in zip(patterns, zip(*indices, strict=True), strict=True)
    ]
    values = _retained_by(list(zip(saliencies, patterns, strict=True)), layouts)
    return [_Found(layout, value, None) for layout, value in zip(layouts, values, strict=True)]


def _search_rows(
    saliencies: Sequence[Tensor],
    patterns: Sequence[HiNMPattern],
    method: str,
    generator: torch.Generator,
    clock: Clock,
    output_order: Tensor | None,
    within: Tensor | None,
    progress: Callable[[Progress], None] | None,
) -> list[_Found]:
    """Matrices with the same rows: the best of identity and the method."""
    pairs = list(zip(saliencies, patterns, strict=True))

    def found(order: Tensor, indices: Sequence[Tensor]) -> list[_Found]:
        of_all = [
            HiNMLayout(pattern, order, _ascending_groups(index, pattern))
            for pattern, index in zip(patterns, indices, strict=True)
        ]
        values = _retained_by(pairs, of_all)
        return [_Found(layout, value, None) for layout, value in zip(of_all, values, strict=True)]

    fixed = None if output_order is None else output_order.to(saliencies[0].device)
    first = torch.arange(len(saliencies[0]), device=saliencies[0].device) if fixed is None else fixed
    begun = clock.seconds
    chosen = [choose_vectors(saliency, pattern, first, within=within) for saliency, pattern in pairs]
    candidates = [found(first, chosen)]
    # What remains to be done with the search's own layouts takes about as long, and what follows not longer.
    rest = clock.share(1, 2 * (clock.seconds - begun))
    varied = any(bool(low < peak) for low, peak in (saliency.aminmax() for saliency in saliencies))
    lost = any(each.retained < 1 for each in candidates[0])  # of a pattern that keeps all, nothing
    if method != "identity" and varied and lost and not rest.expired():
        report = None if progress is None else _reporter(pairs, clock, progress)
        problems = [
            Problem(_scaled(saliency, len(pairs)), pattern, generator, rest, fixed, within, report)
            for saliency, pattern in pairs
        ]
        papers = generator.clone_state()  # the paper's loop finds what it would find by itself
        of_method = gyro_paper if method == "gyro" else gyro_exchange
        candidates.append(found(*of_method(problems, first, chosen)))
        small = sum(saliency.numel() for saliency in saliencies) <= SMALL and fixed is None
        if method == "exchange" and small and not rest.expired():
            alike = [replace(problem, generator=papers) for problem in problems]
            candidates.append(found(*gyro_paper(alike, first, chosen)))
    clock.ended |= rest.ended
    best = max(candidates, key=lambda candidate: sum(each.retained for each in candidate))  # the first of equals
    if output_order is not None:
        return best
    return [each._replace(identity=identity.retained) for each, identity in zip(best, candidates[0], strict=True)]


def _scaled(saliency: Tensor, count: int) -> Tensor:
    """float32 with a largest value of 1; with a total of 1 if it is one of several, whose sum shall count."""
    peak = saliency.max()
    # A narrow type is widened before it is divided, a wide one after: both keep their small values.
    wide = saliency if saliency.dtype == torch.float64 else saliency.float()
    scaled = (wide / peak if peak > 0 else wide).float()
    return scaled if count == 1 or not peak > 0 else scaled / scaled.sum(dtype=torch.float64)


def _reporter(
    pairs: Sequence[tuple[Tensor, HiNMPattern]], clock: Clock, progress: Callable[[Progress], None]
) -> Callable[[Tensor, Tensor], None]:
    """Tells ``progress`` what a layout retains; of several matrices, what they would with the largest sums."""
    gaps: list[Gap] = []  # one each, made for the first report

    def report(order: Tensor, index: Tensor) -> None:
        if not gaps:
            gaps.extend(Gap(saliency, pattern) for saliency, pattern in pairs)
        indices = [choose_vectors(*pair, order) for pair in pairs] if len(pairs) > 1 else [index]
        layouts = [HiNMLayout(pair[1], order, index) for pair, index in zip(pairs, indices, strict=True)]
        values = _retained_by(pairs, layouts)
        closed = [gap.closed(value) for gap, value in zip(gaps, values, strict=True)]
        progress(Progress(clock.seconds, fmean(values), fmean(closed)))

    return report


def _retained_by(pairs: Sequence[tuple[Tensor, HiNMPattern]], layouts: Sequence[HiNMLayout]) -> list[float]:
    return [
        retained(saliency, hinm_mask(saliency, layout)) for (saliency, _), layout in zip(pairs, layouts, strict=True)
    ]


def _ascending_groups(index: Tensor, pattern: HiNMPattern) -> Tensor:
    """Columns ascending inside each group: the mask is the same, and metadata then follows the column order."""
    return index.unflatten(1, (-1, pattern.m)).sort(dim=2).values.flatten(1)
