"""The step of the GPU's benchmark that searches there, on devices that are none."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu import record, search, steps
from lightning_hinm import HiNMPattern
from lightning_hinm.gyro import SearchResult
from tests.elsewhere import DEVICE, Elsewhere, elsewhere

CPU = torch.device("cpu")
MATRIX = search.Matrix(64, 48, HiNMPattern(16, window=None))
SEARCHES = ("first", "on the CPU", "identity", "again")


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is done, but less often, and not by the paper's loop."""
    monkeypatch.setattr("lightning_hinm.gyro.SMALL", 0)
    for name, less in {"ROUNDS": 4, "FEWEST": 2, "LAST": {"least": 4e-5}}.items():
        monkeypatch.setattr(f"lightning_hinm.gyro.exchange.{name}", less)


def test_the_matrices_are_of_all_kinds() -> None:
    patterns = [matrix.pattern for matrix in search.MATRICES]
    assert {(pattern.n, pattern.m) for pattern in patterns} == {(2, 4)}
    assert {pattern.vector_size for pattern in patterns} == {32, 64}
    assert {pattern.vector_sparsity for pattern in patterns} == {0.0, 0.5}
    runs = {(matrix.pattern.window, len(matrix.pattern.runs(matrix.columns)) > 1) for matrix in search.MATRICES}
    assert runs == {(256, False), (256, True), (None, False)}
    (free,) = (matrix for matrix in search.MATRICES if matrix.pattern.window is None)
    assert len(HiNMPattern(64).runs(free.columns)) > 1


def test_the_step_finds_on_a_device_what_it_finds_on_a_cpu(tmp_path: Path) -> None:
    found, said = record.Record(tmp_path / "gpu.json"), list[str]()
    with Elsewhere():
        assert steps.permute(found, DEVICE, [MATRIX], 60.0, said.append)
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["search"]
    assert row["device"]["retained"] == row["cpu"]["retained"] > row["identity"]
    assert row["device"]["gap_closed"] == row["cpu"]["gap_closed"] > 0
    assert min(row["device"]["seconds"], row["cpu"]["seconds"]) > 0
    assert row["left"] is None
    assert re.match("64x48, V=16 75.00% no window: .* s, on the CPU .*; MiB to the host unknown, of assign", said[0])


def test_all_that_leaves_is_the_layout_and_what_assignment_problems_bring_over() -> None:
    saliency = search.random_layer(MATRIX.rows, MATRIX.columns)
    with Elsewhere() as device, search.bytes_assigned() as assigned:
        layout = search.search(elsewhere(saliency), MATRIX.pattern).layout
    answer = tuple(layout.output_order.shape), tuple(layout.vector_index.shape), ()
    assert sum(assigned) == sum(4 * math.prod(size) for size in device.left if size not in answer) > 0


@pytest.mark.parametrize(("seconds", "searched"), [(60.0, 2), (-1.0, 0)])
def test_matrices_beyond_the_time_are_listed(tmp_path: Path, seconds: float, searched: int) -> None:
    matrices, found = [MATRIX, search.Matrix(32, 24, HiNMPattern(8, 0.0))], record.Record(tmp_path / "gpu.json")
    said: list[str] = []
    assert steps.permute(found, CPU, matrices, seconds, said.append)
    assert [row["matrix"] for row in found.data["search"]] == [str(matrix) for matrix in matrices[:searched]]
    assert found.data["not_searched"] == [str(matrix) for matrix in matrices[searched:]]
    assert any(line.startswith("not searched, ") for line in said) == (searched < 2)


Change = Callable[[SearchResult], dict[str, Any]]
MISTAKES: dict[str, tuple[str, Change]] = {
    "it retains what it says": ("first", lambda result: {"retained": result.retained + 1e-9}),
    "the same generator gives the same layout": (
        "again",
        lambda result: {"layout": dataclasses.replace(result.layout, vector_index=result.layout.vector_index.flip(1))},
    ),
    "it retains no less than identity": ("identity", lambda _: {"retained": 1.0}),
    "it retains 99.8% of what it does on a CPU": ("on the CPU", lambda _: {"retained": 1.0}),
}


@pytest.mark.parametrize("law", MISTAKES)
def test_a_law_that_is_broken_fails_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, law: str) -> None:
    broken, change = MISTAKES[law]
    change_search(monkeypatch, broken, change)
    found, said = record.Record(tmp_path / "gpu.json"), list[str]()
    assert not steps.permute(found, CPU, [MATRIX], 60.0, said.append)
    assert found.data["search"][0]["wrong"] == [f"not so: {law}"]
    assert said[0].endswith(f"; not so: {law}")


def test_a_layout_that_is_none_fails_the_step_and_costs_no_other_matrix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def twice_the_same_row(result: SearchResult) -> dict[str, Any]:
        order = result.layout.output_order.clone()
        order[0] = order[1]
        return {"layout": dataclasses.replace(result.layout, output_order=order)}

    change_search(monkeypatch, "first", twice_the_same_row)
    found = record.Record(tmp_path / "gpu.json")
    assert not steps.permute(found, CPU, [MATRIX, MATRIX], 60.0, print)
    assert "output_order is not a permutation" in found.data["search"][0]["failed"]
    assert found.data["search"][1]["wrong"] == []


def change_search(monkeypatch: pytest.MonkeyPatch, which: str, change: Change) -> None:
    """One of the searches of the first matrix finds something else."""
    inner, calls = search._search, iter(SEARCHES)

    def changed(*arguments: Any) -> SearchResult:
        result = inner(*arguments)
        return dataclasses.replace(result, **change(result)) if next(calls, None) == which else result

    monkeypatch.setattr(search, "_search", changed)


def copy(name: str, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "gpu_memcpy", "name": name, "args": {"device": 0, "stream": 7, **arguments}}


HOME = "Memcpy DtoH (Device -> Pageable)"
EVENTS = [
    {"ph": "M", "pid": 0, "args": {"labels": "GPU 0"}},
    copy(HOME, bytes=4096, correlation=24),
    copy("Memcpy HtoD (Pageable -> Device)", bytes=512),
    copy("Memcpy DtoH (Device -> Pinned)", bytes=8),
    {"ph": "X", "cat": "kernel", "name": "void cdist", "args": {}},
]


@pytest.mark.parametrize(
    ("events", "total"), [(EVENTS, 4104), (EVENTS[2:3], None), ([*EVENTS, copy(HOME)], None), ([], None)]
)
def test_the_bytes_to_the_host_are_those_of_the_trace_or_unknown(
    monkeypatch: pytest.MonkeyPatch, events: list[dict[str, Any]], total: int | None
) -> None:
    def export(path: str) -> None:
        Path(path).write_text(json.dumps({"traceEvents": events}))

    profiled = mock.MagicMock()
    profiled.return_value.__enter__.return_value.export_chrome_trace = export
    monkeypatch.setattr(search, "profile", profiled)
    result = mock.Mock()
    assert search.bytes_left(lambda: result, torch.device("cuda")) == (result, total)
