"""Speed of the sparse ops against the dense functions on the CPU: ``python benchmarks/cpu.py [--out cpu.json]``.

Every layout is random and legal, with the rows in the identity order and in a random one. Both sides run in turn in the
same process, and the ratio is that of their medians: above 1, sparse is faster. They alternate call by call, where each
finds the caches full of the other's weight, as in a large model; and in runs of ten, of which the first is dropped
("warm"). On a machine with other work to do the ratios mean little: the load is printed. ``--clock cpu --threads 1``
counts the time of this process alone.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hinm import HiNMLayout, HiNMPattern, hinm_mask, pack
from lightning_hinm.mask import choose_vectors
from lightning_hinm.ops import expand_all

Call = Callable[[], Tensor]
Clock = Callable[[], float]

SHAPES = [(3072, 768), (768, 3072)]
# tokens, vector size, sparsity, and the ratio that the project promises for it
CASES = [
    (512, 64, 0.875, 1.8),
    (512, 128, 0.75, 1.2),
    (512, 64, 0.75, None),
    (16, 64, 0.75, 1.5),
    (16, 64, 0.875, None),
    (1, 64, 0.875, None),
]
# channels, rows, kernel, image, batch
CONVOLUTIONS = [(256, 256, 1, 14, 8), (256, 256, 3, 14, 8), (512, 512, 3, 7, 8)]


def masked_weight(rows: int, columns: int, pattern: HiNMPattern, *, shuffled: bool) -> tuple[Tensor, HiNMLayout]:
    """A random weight that obeys the pattern, and its layout."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    order = torch.randperm(rows, generator=generator) if shuffled else torch.arange(rows)
    layout = HiNMLayout(pattern, order, choose_vectors(weight.abs(), pattern, order))
    return weight * hinm_mask(weight.abs(), layout), layout


def in_turn(calls: Sequence[Call], clock: Clock, seconds: float, run: int) -> list[float]:
    """Median seconds of each call, taken in turn, ``run`` of each in a row."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < 7 or time.perf_counter() < end:
        for call, record in zip(calls, times, strict=True):
            for i in range(run):
                start = clock()
                call()
                if i or run == 1:
                    record.append(clock() - start)
    return [statistics.median(record[2:]) for record in times]


def linear_row(shape: tuple[int, int], case: tuple[Any, ...], clock: Clock, seconds: float) -> dict:
    tokens, v, sparsity, promised = case
    pattern = HiNMPattern.from_sparsity(sparsity, vector_size=v)
    x, bias = torch.randn(tokens, shape[1]), torch.randn(shape[0])
    row: dict[str, Any] = {"layer": f"linear {shape[0]}x{shape[1]}", "input": [tokens, shape[1]], "vector_size": v}
    row |= {"sparsity": sparsity, "promised": promised}
    for name, shuffled in (("identity", False), ("random", True)):
        weight, layout = masked_weight(*shape, pattern, shuffled=shuffled)
        packed = pack(weight, layout)
        args = (*packed.tensors.values(), bias, *expand_all(packed).values(), shape[1], *pattern.fields)
        calls = [partial(F.linear, x, weight, bias), partial(torch.ops.hinm.linear, x, *args)]
        row |= compare(name, calls, clock, seconds)
    return row


def conv_row(case: tuple[int, ...], clock: Clock, seconds: float) -> dict:
    channels, rows, kernel, size, batch = case
    pattern = HiNMPattern.from_sparsity(0.875)
    x, bias, padding = torch.randn(batch, channels, size, size), torch.randn(rows), kernel // 2
    row: dict[str, Any] = {"layer": f"conv2d {rows}x{channels}x{kernel}x{kernel}", "input": list(x.shape)}
    row |= {"vector_size": 64, "sparsity": 0.875, "promised": None}
    for name, shuffled in (("identity", False), ("random", True)):
        weight, layout = masked_weight(rows, channels * kernel**2, pattern, shuffled=shuffled)
        weight = weight.reshape(rows, channels, kernel, kernel)
        packed = pack(weight, layout)
        numbers = (channels, kernel, kernel, 1, 1, padding, padding, 1, 1, 1, *pattern.fields)
        args = (*packed.tensors.values(), bias, *expand_all(packed).values(), *numbers)
        calls = [partial(F.conv2d, x, weight, bias, 1, padding), partial(torch.ops.hinm.conv2d, x, *args)]
        row |= compare(name, calls, clock, seconds)
    return row


def compare(order: str, calls: Sequence[Call], clock: Clock, seconds: float) -> dict:
    dense, sparse = in_turn(calls, clock, seconds, 1)
    dense_warm, sparse_warm = in_turn(calls, clock, seconds, 10)
    error = (calls[1]() - calls[0]()).norm() / calls[0]().norm()
    assert error < 1e-5, f"the results differ by {error:.1e}"
    return {
        f"dense_ms_{order}": dense * 1e3,
        f"sparse_ms_{order}": sparse * 1e3,
        f"ratio_{order}": dense / sparse,
        f"ratio_warm_{order}": dense_warm / sparse_warm,
    }


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)  # noqa: S603
    return result.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each comparison")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of this thread, with 1 thread")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu counts one thread: add --threads 1")
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "clock": options.clock,
        "dtype": "float32",
        "commit": commit(),
        "load_before": os.getloadavg()[0],
    }
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'layer':24} {'input':16} {'V':>3} {'sparsity':>8} {'dense ms':>9} {'sparse ms':>9} {'ratio':>6} "
          f"{'warm':>5} {'random order':>12} {'warm':>5} {'promised':>8}")  # fmt: skip
    rows = []
    with torch.inference_mode():
        makers = [partial(linear_row, shape, case) for shape in SHAPES for case in CASES]
        makers += [partial(conv_row, case) for case in CONVOLUTIONS]
        for make in makers:
            row = make(clock, options.seconds)
            rows.append(row)
            size = "x".join(map(str, row["input"]))
            times = f"{row['dense_ms_random']:9.3f} {row['sparse_ms_random']:9.3f} {row['ratio_identity']:6.2f} "
            times += f"{row['ratio_warm_identity']:5.2f}"
            promised = "" if row["promised"] is None else f"{row['promised']:8.2f}"
            print(f"{row['layer']:24} {size:16} {row['vector_size']:3} {row['sparsity']:8} {times} "
                  f"{row['ratio_random']:12.2f} {row['ratio_warm_random']:5.2f} {promised}", flush=True)  # fmt: skip
    facts["load_after"] = os.getloadavg()[0]
    print(f"load before {facts['load_before']:.1f}, after {facts['load_after']:.1f}, on {facts['cores']} cores")
    if options.out:
        options.out.write_text(json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
