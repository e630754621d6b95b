"""The benchmark of the search, on matrices small enough to run here."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import search
from benchmarks.prototype import prototype
from lightning_hinm import HiNMPattern, gyro_permute, hinm_mask
from lightning_hinm.layout import check_layout
from lightning_hinm.mask import retained


def test_the_prototype_that_the_search_is_measured_against_is_no_straw_man() -> None:
    saliency, pattern = search.random_layer(64, 96), HiNMPattern(16, window=48)
    layout, seconds = prototype(saliency, pattern)
    check_layout(layout, 64, 96)
    assert seconds > 0
    found = [retained(saliency, hinm_mask(saliency, layout))]
    for method in ("identity", "gyro"):
        found.append(retained(saliency, hinm_mask(saliency, gyro_permute(saliency, pattern, method=method))))
    assert found[0] > max(found[1:])


@pytest.mark.slow
def test_the_search_benchmark_writes_every_part_and_draws_the_plot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"2.{name}" for name in search.LAYER_2]
    monkeypatch.setattr(search, "minilm", lambda: {name: search.random_layer(128, 32) for name in names})
    monkeypatch.setattr(search, "LARGE", [(128, 32, 16)])
    monkeypatch.setattr(search, "BUDGETED", [(128, 32, None, 0.05)])
    monkeypatch.setattr(search, "GROWTH", [(128, 32)])
    monkeypatch.setattr(search, "random_layer", lambda *_: torch.rand(128, 32, generator=seeded()))
    rounds = search.exchange.ROUNDS
    layers = {"full": torch.rand(128, 32, generator=seeded()), "short": torch.rand(160, 32, generator=seeded())}
    monkeypatch.setattr(search, "convs", lambda: layers)
    parts = ["rows", "all", "alone", "convs", "large", "growth", "plot"]
    monkeypatch.setattr("sys.argv", ["search", *parts, "--out", str(tmp_path)])
    search.main()
    written = json.loads((tmp_path / "search.json").read_text())
    assert list(written) == parts
    assert all(part["facts"]["commit"] and part["rows"] for part in written.values())
    assert all(row["retained"] >= row["gyro"]["retained"] for row in written["all"]["rows"])
    assert all(row["moves_per_second"] > 0 for row in written["rows"]["rows"])
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "worse than gyro on 0" in said
    assert ["prototype" in row for row in written["convs"]["rows"]] == [True, True, True, False]  # V=64 has half a tile
    assert re.search(r"no less than it on [0-3] of 3\n", said)
    assert rounds == search.exchange.ROUNDS


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
