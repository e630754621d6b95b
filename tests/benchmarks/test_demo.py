"""The demo, on a network and data small enough to run here."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import demo
from benchmarks.timing import alternate
from lightning_hinm import HiNMPattern
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


@pytest.mark.slow
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
