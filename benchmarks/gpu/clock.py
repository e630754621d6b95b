"""Seconds of a call on a device, candidates in turn: inside a CUDA graph, and as Python calls it."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from lightning_hinm import kernels
from lightning_hinm.ops import cost

Call = Callable[[], Any]
Key = TypeVar("Key")

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
PASS = 5e-4  # seconds that a pass should take at least, so that the start of a graph does not count
MOST_COPIES = 1024
HEAD_START = 200_000, 3_000  # cycles that the GPU waits, and for each call: the host queues a whole pass meanwhile


@dataclass(frozen=True)
class Machine:
    """Where the kernels run; on a CPU the kernels are emulated, and the times are those of the emulation."""

    device: torch.device
    l2: int  # bytes
    shared_limit: int
    gpu: cost.Gpu

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        """The machine behind a device."""
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 12
        return cls(device, l2, kernels.shared_limit(device), cost.gpu_of(device))

    def copies(self, nbytes: int) -> int:
        """How many weights of that size are passed through, so that the L2 cache has none of them at its next turn."""
        return min(math.ceil(2 * self.l2 / max(nbytes, 1)), MOST_COPIES)


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the median of the rounds, and their quartiles."""

    seconds: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Pass:
    """Several calls in a row, as one thing to run; ``held`` is what a graph reads, and does not keep alive itself."""

    run: Call
    calls: int
    held: Sequence[Call]


class Clock:
    """Measures passes on one device; tests on a CPU take the same way, without graphs and events."""

    def __init__(self, device: torch.device, least_rounds: int = LEAST_ROUNDS) -> None:
        self.device, self.least_rounds, self.on_gpu = device, least_rounds, device.type == "cuda"
        if self.on_gpu:
            self.stream = torch.cuda.Stream(device)  # the default one cannot be captured
            self.renew()

    def renew(self) -> None:
        """Starts a comparison: its graphs share one pool of memory, since no output outlives its pass."""
        if self.on_gpu:
            with suppress(RuntimeError):  # after a capture that failed, torch may refuse
                torch.cuda.empty_cache()  # what the graphs before held
            self.pool = torch.cuda.graph_pool_handle()  # a pool whose graphs are all gone cannot be used again

    def capture(self, calls: Sequence[Call], expected: float = PASS) -> Pass:
        """A pass over all calls, as a CUDA graph; repeated, if a call takes ``expected`` seconds and all too few.

        Raises:
            RuntimeError: if a call cannot be captured.
        """
        repeats = math.ceil(PASS / max(expected * len(calls), 1e-9)) if self.on_gpu else 1
        calls = list(calls) * max(repeats, 1)
        if not self.on_gpu:
            return eager_pass(calls)
        with torch.cuda.stream(self.stream):
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            calls[0]()  # whatever is made at a first call cannot be made in a capture
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self.pool)
            try:
                try:
                    _run_all(calls)
                finally:
                    graph.capture_end()
            except Exception:
                self.renew()
                raise
        torch.cuda.default_stream(self.device).wait_stream(self.stream)
        return Pass(graph.replay, len(calls), calls)

    def in_turn(self, passes: Mapping[Key, Pass], seconds: float, *, eager: bool = False) -> dict[Key, Time]:
        """The time of one call of each pass, all of them in turn for about ``seconds``.

        Args:
            passes: what is compared.
            seconds: of the whole comparison.
            eager: count from the host's first call to the GPU's last result, else on the GPU alone.
        """
        once = self._on_host if eager or not self.on_gpu else self._on_gpu
        samples: dict[Key, list[float]] = {key: [] for key in passes}
        for one in passes.values():
            one.run()
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < self.least_rounds or (time.perf_counter() < end and rounds < MOST_ROUNDS):
            for key, one in passes.items():
                samples[key].append(once(one) / one.calls)
            rounds += 1
        return {key: summary(sample) for key, sample in samples.items()}

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _on_gpu(self, one: Pass) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        fixed, each = HEAD_START
        torch.cuda._sleep(fixed + each * one.calls)
        start.record()
        one.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def _on_host(self, one: Pass) -> float:
        self.synchronize()
        start = time.perf_counter()
        one.run()
        self.synchronize()
        return time.perf_counter() - start


def eager_pass(calls: Sequence[Call]) -> Pass:
    """A pass whose every call is Python's own."""
    return Pass(partial(_run_all, calls), len(calls), calls)


def summary(sample: Sequence[float]) -> Time:
    """Of one candidate's rounds."""
    quartiles = statistics.quantiles(sample, n=4) if len(sample) > 1 else [*sample] * 3
    low, median, high = (float(f"{each:.5g}") for each in quartiles)  # the clock knows no more digits
    return Time(median, low, high, len(sample))


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
