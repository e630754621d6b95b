"""What was measured of a GPU, on disk."""

import json
import os
import stat
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hinm.ops.figures import SWITCH, estimate, gpu_of, load_gpu, save_gpu

MEASURED = replace(estimate((9, 0)), memory=2.5e12, measured=True)
NAME = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(SWITCH, str(tmp_path / "gpus"))
    load_gpu.cache_clear()
    return tmp_path / "gpus"


def test_what_is_saved_comes_back(folder: Path) -> None:
    assert load_gpu(NAME) is None
    path = save_gpu(MEASURED, NAME)
    assert path is not None
    assert path.parent == folder
    assert load_gpu(NAME) == MEASURED
    assert load_gpu("NVIDIA A100") is None


def test_only_the_user_can_read_it(folder: Path) -> None:
    path = save_gpu(MEASURED, NAME)
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_it_lies_in_the_users_cache_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = save_gpu(MEASURED, NAME)
    assert path is not None
    assert path.parent == tmp_path / "lightning-hinm" / "gpus"
    monkeypatch.setenv(SWITCH, "off")
    load_gpu.cache_clear()
    assert save_gpu(MEASURED, NAME) is None
    assert load_gpu(NAME) is None


@pytest.mark.parametrize(
    "change",
    [
        *({"memory": 0.0}, {"l2": -1.0}, {"sparse": float("inf")}, {"sparse": 10**400}, {"l2": float("nan")}),
        *({"dense": "fast"}, {"launch": True}, {"multiprocessors": 1.5}, {"multiprocessors": 10**400}),
        *({"gpc": gpc} for gpc in (-1, 1.5, True, 10**9)),
        *({"measured": False}, {"measured": 1}, {"name": ""}, {"name": 1}, {"more": 1}),
    ],
    ids=lambda change: f"{change}"[:30],
)
def test_a_file_that_makes_no_sense_is_passed_over_and_said(change: dict[str, Any]) -> None:
    path = save_gpu(MEASURED, NAME)
    assert path is not None
    path.write_text(json.dumps(asdict(MEASURED) | change))
    with pytest.warns(UserWarning, match="kernels are chosen by estimates. Run python -m lightning_hinm tune again"):
        assert load_gpu(NAME) is None


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100000])
def test_a_damaged_file_is_passed_over_and_said(text: str) -> None:
    path = save_gpu(MEASURED, NAME)
    assert path is not None
    path.write_text(text)
    with pytest.warns(UserWarning, match="so kernels are chosen by estimates"):
        assert load_gpu(NAME) is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_passed_over_and_said(mode: int) -> None:
    path = save_gpu(MEASURED, NAME)
    assert path is not None
    path.chmod(mode)
    with pytest.warns(UserWarning, match="others than you may write it, or in its folder, so kernels are chosen by"):
        assert load_gpu(NAME) is None


def test_a_folder_that_others_may_write_is_not_used(folder: Path) -> None:
    save_gpu(MEASURED, NAME)
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="others than you may write it, or in its folder, so kernels are chosen by"):
        assert load_gpu(NAME) is None
    with pytest.raises(PermissionError, match=r"gpus: others than you may write there.* Run chmod go-w"):
        save_gpu(MEASURED, NAME)


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    save_gpu(MEASURED, NAME)
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_gpu(replace(MEASURED, memory=1.0), NAME)
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    load_gpu.cache_clear()
    assert load_gpu(NAME) == MEASURED


def test_measured_figures_come_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with warnings.catch_warnings(action="error"):
        assert gpu_of(torch.device("cuda")) == estimate((9, 0))
        save_gpu(MEASURED, NAME)
        assert gpu_of(torch.device("cuda")) == MEASURED
