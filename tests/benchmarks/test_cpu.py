"""Sparse ops against dense ones on a CPU: what is timed computes the same."""

import time

import pytest
import torch

from benchmarks import cpu


@pytest.mark.parametrize("clock", [time.perf_counter, time.thread_time])
def test_the_cpu_benchmark_times_ops_that_compute_the_dense_result(clock: cpu.Clock) -> None:
    for row in (
        cpu.linear_row((64, 48), (3, 16, 0.75, None), clock, 0.0),
        cpu.conv_row((16, 64, 3, 5, 2), clock, 0.0),
    ):
        numbers = {name: value for name, value in row.items() if name.startswith(("dense_ms", "sparse_ms", "ratio"))}
        assert len(numbers) == 8
        assert all(value > 0 for value in numbers.values())


def test_the_cpu_benchmark_refuses_an_op_that_computes_something_else() -> None:
    right, wrong = torch.ones(3), torch.full((3,), 1.001)
    with pytest.raises(AssertionError, match=r"the results differ by 1\.0e-03"):
        cpu.compare("identity", [lambda: right, lambda: wrong], time.perf_counter, 0.0)
