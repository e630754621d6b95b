"""The figures of a GPU, measured: here on the emulated one, with times that are made up."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_hinm.ops import cost
from lightning_hinm.ops.figures import estimate
from lightning_hinm.ops.tune import measure_gpu
from tests.ptx.device import emulated

SMALL: dict[str, Any] = {"side": 288, "copied": 4096}
CPU = torch.device("cpu")


def test_every_rate_is_measured_on_the_kernel_that_it_binds() -> None:
    times = iter([2.0, 3.0, 5.0, 7.0, 11.0])
    with emulated() as emulator:

        def seconds(call: Callable[[], Any]) -> float:
            call()
            return next(times)

        found = measure_gpu(CPU, seconds=seconds, **SMALL)
    assert [name for name in emulator.launched if name != "transpose"] == ["gather_bf16_128", "gather_bf16_32"]
    estimated = estimate((9, 0))
    assert found.measured
    assert (found.name, found.multiprocessors) == (estimated.name, estimated.multiprocessors)
    assert found.memory == 2 * 2 * SMALL["copied"] / 2.0
    assert found.dense == 2 * SMALL["side"] ** 3 / 3.0
    assert found.launch == 5.0


def test_predictions_meet_what_was_measured() -> None:
    given = replace(estimate((9, 0)), sparse=3e9, l2=1e8, launch=1e-9)
    side = SMALL["side"]

    def seconds(call: Callable[[], Any]) -> float:
        launched = len(emulator.launched)
        call()
        if "gather" not in "".join(emulator.launched[launched:]):
            return 1e-9
        pattern = call.args[2].packed.pattern  # type: ignore[attr-defined]
        choices = cost.list_kernels(cost.Call(pattern, side, side, side, feature_major=True), 10**9, given)
        return next(choice.seconds for choice in choices if choice.kernel == "gather")

    with emulated() as emulator:
        found = measure_gpu(CPU, seconds=seconds, **SMALL)
    assert found.sparse == pytest.approx(given.sparse, rel=1e-2)
    assert found.l2 == pytest.approx(given.l2, rel=1e-2)


def test_where_no_kernel_runs_nothing_is_measured() -> None:
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="cpu: is no CUDA device"):
        measure_gpu(CPU)
    assert time.perf_counter() - start < 5
