"""Ratios on a noisy machine: alternate the candidates in one run and take medians."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def take_turns(
    *functions: Callable[[], Any], seconds: float = 2.0, warm_up: int = 3, least: int = 5
) -> list[list[float]]:
    """Seconds of every call of each function, called in turn for about ``seconds`` in all, ``least`` times or more."""
    for function in functions:
        for _ in range(warm_up):
            function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < least:
        for own, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return times


def alternate(*functions: Callable[[], Any], seconds: float = 2.0, warm_up: int = 3) -> list[float]:
    """Median seconds of each function, called in turn for about ``seconds`` in all, at least five times each."""
    return [statistics.median(own) for own in take_turns(*functions, seconds=seconds, warm_up=warm_up)]
