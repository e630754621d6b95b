"""How long the callback searches when one process does it, and when two share it, each on one thread."""

import json
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hinm import GradualSchedule, HiNMPattern, HiNMPruning


class Layers(L.LightningModule):
    """Linear layers of given weights, that are pruned in the first step and do nothing else; the first rank reports."""

    def __init__(self, matrices: dict[str, Tensor], report: Path) -> None:
        super().__init__()
        self.layers, self.report = nn.ModuleList(), report
        for matrix in matrices.values():
            self.layers.append(nn.Linear(matrix.shape[1], matrix.shape[0], bias=False))
            self.layers[-1].weight = nn.Parameter(matrix.clone())

    def setup(self, stage: str) -> None:
        torch.set_num_threads(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: Tensor) -> Tensor:
        return sum(parameter.mean() for parameter in self.parameters())  # type: ignore[return-value]

    def on_after_backward(self) -> None:
        self.start = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.is_global_zero:
            digest = 0
            for parameter in self.parameters():
                digest = zlib.crc32((parameter.detach() != 0).numpy().tobytes(), digest)
            self.report.write_text(json.dumps({"seconds": time.monotonic() - self.start, "masks_crc32": digest}))


def search_by_ranks(matrices: dict[str, Tensor], pattern: HiNMPattern, ranks: int) -> dict[str, Any]:
    """Seconds from the gradients to the end of the step, in which the callback searches, and a checksum of all masks.

    Args:
        matrices: weights, ``[O, I]`` each.
        pattern: of all.
        ranks: processes of Lightning's DDP on this machine.
    """
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        trainer = L.Trainer(
            accelerator="cpu", devices=ranks, strategy="ddp_spawn" if ranks > 1 else "auto", max_steps=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[HiNMPruning(pattern, GradualSchedule(0.0, 0.0, 1), saliency="magnitude")],
        )  # fmt: skip
        threads = torch.get_num_threads()
        try:
            trainer.fit(Layers(matrices, report), DataLoader(torch.zeros(ranks, 1)))  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(threads)
        return {"ranks": ranks, **json.loads(report.read_text())}
