"""Fixtures of several files."""

from pathlib import Path

import pytest
from trainings import Batches, Tiny, pruning_of, trainer_of

from lightning_hinm.callback import HiNMPruning, pruning


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the callback says on rank zero."""
    said: list[str] = []
    monkeypatch.setattr(pruning, "rank_zero_info", said.append)
    return said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiny, HiNMPruning]:
    callback, model = pruning_of(method="exchange"), Tiny()
    path = tmp_path_factory.mktemp("checkpoint") / "done.ckpt"
    trainer = trainer_of(callback)
    trainer.fit(model, Batches())
    trainer.save_checkpoint(path)
    return path, model, callback
