"""Whole networks against dense Inductor, on networks small enough to run here."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import models
from lightning_hinm import HiNMPattern, plan
from lightning_hinm.prune import find_layers


class Noisy(nn.Sequential):
    """Never computes the same twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x[:, :1])


def small_network(kind: type[nn.Sequential]) -> models.Network:
    return models.Network(
        f"a small {kind.__name__}",
        lambda: kind(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 4)),
        lambda batch: {"x" if kind is Noisy else "input": torch.ones(batch, 32)},
        needs=None,
    )


def run_models(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = models.main([*arguments, "--vector-size", "8", "--seconds", "0", "--out", str(out)])
    return code, json.loads(out.read_text())


@pytest.mark.slow
def test_whole_networks_are_compared_and_the_table_says_what_the_json_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # dense and sparse seconds of a layer: the plan leaves all dense at batch 1, and none at batch 3
    times = functools.cache(lambda workload: (1.0, 2.0) if workload.input_shape[0] == 1 else (2.0, 1.0))
    monkeypatch.setattr(plan, "measure", times)
    monkeypatch.setitem(models.NETWORKS, "small", small_network(nn.Sequential))
    code, written = run_models(tmp_path / "models.json", "small", "--batch", "1", "3")
    assert code == 0
    printed = capsys.readouterr().out
    dense, sparse = rows = written["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    assert [(row["layers_sparse"], row["hinm_ops"]) for row in rows] == [(0, 0), (2, 2)]  # 4 rows are less than a tile
    assert all((row["layers_pruned"], row["layers_reordered"]) == (2, 2) for row in rows)
    assert dense["bytes_after"] == dense["bytes_before"] == sparse["bytes_before"] == 4 * (2 * 64 * 32 + 4 * 32)
    assert sparse["bytes_after"] != sparse["bytes_before"]
    head, _, *lines = [
        [cell.strip() for cell in line[1:-1].split(" | ")] for line in printed.split("\n") if "|" in line
    ]
    for row, line in zip(rows, lines, strict=True):
        cells = dict(zip(head, line, strict=True))
        assert row["calls"] == models.LEAST
        assert row["error"] <= models.TOLERANCE
        assert row["ratio"] == row["dense_ms"] / row["hinm_ms"]
        assert row["compile_ratio"] == row["hinm_compile_s"] / row["dense_compile_s"]
        assert (cells["network"], cells["batch"]) == (row["title"], str(row["batch"]))
        assert (float(cells["dense ms"]), float(cells["hinm ms"])) == pytest.approx(
            (row["dense_ms"], row["hinm_ms"]), abs=0.01
        )
        assert (float(cells["times dense"]), float(cells["noise"])) == pytest.approx(
            (row["ratio"], row["noise"]), abs=0.01
        )
        assert cells["layers sparse"] == f"{row['layers_sparse']} of 2"
        assert cells["hinm ops"] == str(row["hinm_ops"])
        assert float(cells["error"]) == pytest.approx(row["error"], rel=0.5)
    assert len(written["goals"]) == 2
    assert all(f"{goal['text']}: {goal['found']}" in printed for goal in written["goals"])
    assert all(f"{name} {value}" in printed for name, value in written["facts"].items())


@pytest.mark.slow
def test_a_network_that_computes_something_else_is_marked_and_ends_the_benchmark_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(models.NETWORKS, "noisy", small_network(Noisy))
    code, written = run_models(tmp_path / "models.json", "noisy", "--batch", "1")
    assert code == 1
    assert written["rows"][0]["error"] > models.TOLERANCE
    assert " WRONG " in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_all_that_a_network_returns_is_compared(wrong: float) -> None:
    wanted = {"first": torch.ones(2, 3), "last": torch.tensor([-4.0, 1.0])}
    assert models.difference(wanted, wanted) == models.difference(wanted["last"], wanted["last"]) == 0
    assert models.difference(wanted | {"last": torch.tensor([-4.0, 1.4])}, wanted) == pytest.approx(0.1)
    for name in wanted:
        assert not models.difference(wanted | {name: wanted[name] * wrong}, wanted) <= models.TOLERANCE


def models_row(network: str, ratio: float, **others: Any) -> models.Row:
    values = {field.name: 0 for field in dataclasses.fields(models.Row)} | {"compile_ratio": 1.0, "batch": 1}
    values |= {"network": network, "title": network, "ratio": ratio, "sparsity": 0.875, "vector_size": 64}
    return models.Row(**(values | others))  # type: ignore[arg-type]


def test_the_goals_of_whole_networks_name_what_misses_them() -> None:
    rows = [models_row("minilm", 1.4), models_row("minilm", 1.2, batch=16), models_row("vit", 0.97, noise=0.05)]
    fast, few, slower, late = models.goals_of(rows)
    assert [goal.reached for goal in (fast, few, slower, late)] == [True, False, True, True]
    assert str(few) == "MISSED   MiniLM, batch 16: at least 1.3 times dense: 1.20"
    rows = [models_row("bert", 0.9, noise=0.05), models_row("llama", 2.0, compile_ratio=2.1)]
    slower, late = models.goals_of(rows)
    assert (slower.reached, slower.found) == (False, "bert at batch 1 0.90, noise 0.05")
    assert (late.reached, late.found) == (False, "llama at batch 1 2.10")
    assert len(models.goals_of([models_row("minilm", 1.0, sparsity=0.75)])) == 2


def test_the_parts_of_a_run_are_all_of_it() -> None:
    times = [float(i // 2) for i in range(2 * models.PARTS)]
    assert [models.middle(times, part) for part in range(models.PARTS)] == list(range(models.PARTS))
    assert all(models.middle(times[: models.PARTS], part) >= 0 for part in range(models.PARTS))


def test_all_that_is_wrong_with_the_options_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="2"):
        models.main(["lenet", "minilm", "bert", "vit", "--batch", "0", "--seconds", "nan", "--sparsity", "1.5"])
    said = capsys.readouterr().err
    for wrong in ("lenet: the networks are minilm, bert", "bert, vit: transformers is not installed", "--batch 0: ",
                  "--seconds nan: ", "1.5"):  # fmt: skip
        assert wrong in said


@pytest.mark.parametrize("name", models.NETWORKS)
def test_every_network_takes_its_inputs_and_has_layers_that_can_be_pruned(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if models.NETWORKS[name].needs:
        pytest.importorskip(models.NETWORKS[name].needs)
    monkeypatch.setattr(models, "has_minilm_weights", lambda: False)
    network, inputs = models.NETWORKS[name].make().eval(), models.NETWORKS[name].inputs(2)
    with torch.inference_mode():
        output = network(**inputs)
    tensors = [output] if isinstance(output, Tensor) else list(output.values())
    assert all(len(tensor) == 2 and tensor.dtype == torch.float32 for tensor in tensors)
    layers, _ = find_layers(network, HiNMPattern.from_sparsity(*models.MINILM_PATTERN))
    assert len(layers) >= 8
