"""The scripts behind the published numbers, on networks small enough to run here."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import cpu, demo, search
from benchmarks.prototype import prototype
from benchmarks.timing import alternate
from lightning_hinm import HiNMPattern, gyro_permute, hinm_mask
from lightning_hinm.layout import check_layout
from lightning_hinm.mask import retained
from recipes.classifier import Classifier


class TinyClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)), classes=4, learning_rate=1e-2)


class TinyData(demo.L.LightningDataModule):
    """Four classes, told apart by where the largest input stands."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(320, 32, generator=generator)
        self.samples = TensorDataset(inputs, inputs[:, :4].argmax(dim=1))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, batch_size=16)

    val_dataloader = train_dataloader


TINY = dataclasses.replace(
    demo.TASKS["resnet"],
    data=lambda seed, part: TinyData(),
    model=TinyClassifier,
    pattern=HiNMPattern(vector_size=8),
    dense_epochs=3,
    dense_rate=1e-2,
    sparse_epochs=2,
    sparse_rate=1e-2,
    budget=1.0,
)


def test_the_demo_compares_every_variant_and_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(demo.TASKS, "resnet", TINY)
    monkeypatch.setattr("sys.argv", ["demo", "resnet", "--out", str(tmp_path)])
    monkeypatch.setattr(demo, "alternate", lambda *calls, seconds: alternate(*calls, seconds=0.0))
    assert demo.main() == 0
    written = json.loads((tmp_path / "resnet.json").read_text())
    (rows,) = written["seeds"]
    assert [row["variant"] for row in rows] == ["dense", *demo.VARIANTS]
    dense, unstructured, identity, *permuted, _ = rows
    assert dense["accuracy"] > 0.8
    assert all(row["accuracy_pruned"] is not None for row in rows[1:])
    assert all(row["equal"] for row in rows[2:])
    # Taylor saliencies are the same in all of these: an unstructured mask keeps most, a permutation never less.
    assert all(identity["retained"] <= row["retained"] <= unstructured["retained"] for row in permuted)
    assert (tmp_path / "resnet.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"| {row['variant']}" in printed for row in rows)
    assert f"{identity['accuracy']:.3f}" in printed


def test_the_demo_fails_if_a_compiled_model_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(demo.TASKS, "resnet", TINY)
    monkeypatch.setattr(demo, "VARIANTS", {"identity": (demo.HiNMPruning, {"method": "identity"})})
    monkeypatch.setattr("sys.argv", ["demo", "resnet", "--out", str(tmp_path)])
    monkeypatch.setattr(demo, "alternate", lambda *calls, seconds: [0.0, 0.0])
    monkeypatch.setattr(demo, "to_hinm", lambda net: lambda inputs: net(inputs) * 1.001)
    assert demo.main() == 1


def test_the_mean_of_seeds_carries_its_spread() -> None:
    assert demo.mean_spread([0.5], "%.2f") == "0.50"
    assert demo.mean_spread([0.4, 0.6], "%.2f") == "0.50 ± 0.14"
    assert demo.mean_spread([None, None], "%.2f") == "-"


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


def test_candidates_are_timed_in_turn() -> None:
    calls: list[str] = []

    def note(name: str) -> Tensor:
        calls.append(name)
        return torch.zeros(())

    first, second = alternate(lambda: note("a"), lambda: note("b"), seconds=0.0, warm_up=1)
    assert calls == ["a", "b"] + ["a", "b"] * 5
    assert first > 0 < second


def test_the_prototype_that_the_search_is_measured_against_is_no_straw_man() -> None:
    saliency, pattern = search.random_layer(64, 96), HiNMPattern(16, window=48)
    layout, seconds = prototype(saliency, pattern)
    check_layout(layout, 64, 96)
    assert seconds > 0
    found = [retained(saliency, hinm_mask(saliency, layout))]
    for method in ("identity", "gyro"):
        found.append(retained(saliency, hinm_mask(saliency, gyro_permute(saliency, pattern, method=method))))
    assert found[0] > max(found[1:])


def test_the_search_benchmark_writes_every_part_and_draws_the_plot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"2.{name}" for name in search.LAYER_2]
    monkeypatch.setattr(search, "minilm", lambda: {name: search.random_layer(128, 64) for name in names})
    monkeypatch.setattr(search, "LARGE", [(128, 64, 16)])
    monkeypatch.setattr(search, "BUDGETED", [(128, 64, None, 0.05)])
    monkeypatch.setattr(search, "GROWTH", [(128, 64)])
    monkeypatch.setattr(search, "random_layer", lambda *_: torch.rand(128, 64, generator=seeded()))
    rounds = search.exchange.ROUNDS
    monkeypatch.setattr("sys.argv", ["search", "rows", "all", "large", "growth", "plot", "--out", str(tmp_path)])
    search.main()
    written = json.loads((tmp_path / "search.json").read_text())
    assert list(written) == ["rows", "all", "large", "growth", "plot"]
    assert all(part["facts"]["commit"] and part["rows"] for part in written.values())
    assert all(row["retained"] >= row["gyro"]["retained"] for row in written["all"]["rows"])
    assert all(row["moves_per_second"] > 0 for row in written["rows"]["rows"])
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert "worse than gyro on 0" in capsys.readouterr().out
    assert rounds == search.exchange.ROUNDS


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
