"""The permutation search on saliencies that lie on the GPU: what it has to keep to there, and what it costs."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.magnitudes import random_layer
from lightning_hinm import HiNMLayout, HiNMPattern, hinm_mask
from lightning_hinm.gyro import SearchResult, exchange, problem, search
from lightning_hinm.layout import check_layout
from lightning_hinm.mask import retained

Record = dict[str, Any]
# Of what the search retains on a CPU: another rounding takes it elsewhere, but to no worse place.
LEAST = 0.998


@dataclass(frozen=True)
class Matrix:
    """Magnitudes of ``rows`` x ``columns``, and the pattern that they are searched for."""

    rows: int
    columns: int
    pattern: HiNMPattern

    def __str__(self) -> str:
        window = "no window" if self.pattern.window is None else f"window {self.pattern.window}"
        v, sparsity = self.pattern.vector_size, self.pattern.sparsity
        return f"{self.rows}x{self.columns}, V={v} {sparsity:.2%} {window}"


# Shapes of layers in MiniLM, ResNet and BERT, in the order of what they take.
MATRICES = [
    Matrix(384, 384, HiNMPattern(64)),
    Matrix(64, 576, HiNMPattern(32)),
    Matrix(384, 384, HiNMPattern(64, 0.0)),
    Matrix(1536, 384, HiNMPattern(64)),
    Matrix(512, 4608, HiNMPattern(64)),
    Matrix(3072, 768, HiNMPattern(64)),
    Matrix(768, 3072, HiNMPattern(64, window=None)),
]


def warm_up(device: torch.device) -> None:
    """What is loaded at a first search is no part of the time of another."""
    search(random_layer(64, 64).to(device), HiNMPattern(16))


def search_matrix(matrix: Matrix, device: torch.device) -> Record:
    """Twice on the device and once on the CPU, by the same generator: what it finds, in what time, and what is wrong.

    Raises:
        ValueError: if a layout is not a legal one.
    """
    here = random_layer(matrix.rows, matrix.columns)
    there = here.to(device)
    found, on_cpu, identity = _search(matrix, there), _search(matrix, here), _search(matrix, there, "identity")
    with bytes_assigned() as assigned:
        again, left = bytes_left(partial(_search, matrix, there), device)
    check_layout(found.layout, matrix.rows, matrix.columns)
    laws = {
        "it retains what it says": found.retained == retained(there, hinm_mask(there, found.layout)),
        "the same generator gives the same layout": _same(found.layout, again.layout),
        "it retains no less than identity": found.retained >= identity.retained,
        f"it retains {LEAST:.1%} of what it does on a CPU": found.retained >= LEAST * on_cpu.retained,
    }
    return {
        "matrix": str(matrix),
        "rows": matrix.rows,
        "columns": matrix.columns,
        "pattern": matrix.pattern.to_dict(),
        "identity": identity.retained,
        "device": _numbers(found),
        "cpu": _numbers(on_cpu),
        "left": left,
        "assigned": sum(assigned),
        "wrong": [f"not so: {law}" for law, holds in laws.items() if not holds],
    }


@contextmanager
def bytes_assigned() -> Iterator[list[int]]:
    """What assignment problems alone have to bring to the CPU, where they are made and solved: the size of each matrix
    of what vectors are worth in groups, or rows in tiles, and of the sums of columns, by which pruned ones are elected.
    """
    found: list[int] = []
    with ExitStack() as patches:

        def count(owner: Any, name: str, size: Callable[..., int]) -> None:
            inner = getattr(owner, name)

            def counting(*arguments: Any, **options: Any) -> Any:
                result = inner(*arguments, **options)
                found.append(size(result, *arguments))
                return result

            patches.enter_context(mock.patch.object(owner, name, counting))

        count(problem, "joined_values", lambda result, *_: result.nbytes)
        count(exchange, "row_values", lambda result, *_: result.nbytes)
        count(exchange, "_balance", lambda _, values, *__: values.nbytes)
        count(problem.Blocks, "__init__", lambda _, blocks, *__: blocks.sums.nbytes + blocks.worth.nbytes)
        yield found


def bytes_left(run: Callable[[], SearchResult], device: torch.device) -> tuple[SearchResult, int | None]:
    """What a search finds, and the bytes that it copies from the GPU to the host; None where nothing tells them."""
    if device.type != "cuda":
        return run(), None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        found = run()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        return found, bytes_to_host(json.loads(trace.read_text())["traceEvents"])


def bytes_to_host(events: list[Record]) -> int | None:
    """The sum over the copies in a trace of Kineto; None if it has none, or one without its size."""
    copies = [event for event in events if event.get("name", "").startswith("Memcpy DtoH")]
    sizes = [event.get("args", {}).get("bytes") for event in copies]
    return sum(sizes) if sizes and None not in sizes else None


def line_of(record: Record) -> str:
    """A matrix on one line."""
    if "failed" in record:
        return f"{record['matrix']}: failed, {record['failed']}"
    own, cpu, left = record["device"], record["cpu"], record["left"]
    sent = "unknown" if left is None else f"{left / 2**20:.2f}"
    parts = [
        f"{record['matrix']}: {own['seconds']:.2f} s, on the CPU {cpu['seconds']:.2f} s",
        f"retained {own['retained']:.4f} and {cpu['retained']:.4f}, identity {record['identity']:.4f}",
        f"gap closed {own['gap_closed']:.3f} and {cpu['gap_closed']:.3f}",
        f"MiB to the host {sent}, of assignment problems {record['assigned'] / 2**20:.2f}",
        *record["wrong"],
    ]
    return "; ".join(parts)


def _search(matrix: Matrix, saliency: torch.Tensor, method: str = "exchange") -> SearchResult:
    return search(saliency, matrix.pattern, method=method, generator=torch.Generator().manual_seed(0))


def _same(one: HiNMLayout, other: HiNMLayout) -> bool:
    return torch.equal(one.output_order, other.output_order) and torch.equal(one.vector_index, other.vector_index)


def _numbers(result: SearchResult) -> Record:
    return {"seconds": result.seconds, "retained": result.retained, "gap_closed": result.gap_closed}
