"""The commonest path, through every arm: train, save, a new process, load, ``load_layouts``, compile."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hinm import GradualSchedule, HiNMPattern, HiNMPruning

SECOND_PROCESS = """
import sys, torch
from lightning_hinm import load_layouts
from tests.test_main_job import Net

checkpoint, result = sys.argv[1:]
model = Net.load_from_checkpoint(checkpoint, weights_only=True).eval()
load_layouts(model, checkpoint)
options = {"plan": "sparse", "inner": "aot_eager"}
compiled = torch.compile(model.net, backend="hinm", fullgraph=True, options=options)
x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    compiled(x)  # tracing calls the ops, too
    with torch.profiler.profile() as profile:
        y = compiled(x)
calls = sum(event.count for event in profile.key_averages() if event.key == "hinm::linear")
torch.save({"y": y, "calls": calls}, result)
"""


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_a_trained_checkpoint_compiles_to_sparse_ops_in_a_new_process(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 24, generator=generator), torch.randint(16, (64,), generator=generator))
    pruning = HiNMPruning(HiNMPattern(8, 0.5), GradualSchedule(0.0, 0.5, 3), saliency_steps=2)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[pruning], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    model = Net()
    trainer.fit(model, DataLoader(data, 8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    arguments = [sys.executable, "-c", SECOND_PROCESS, str(tmp_path / "last.ckpt"), str(tmp_path / "result.pt")]
    subprocess.run(arguments, cwd=Path(__file__).parents[1], check=True, capture_output=True, timeout=120)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    with torch.inference_mode():
        wanted = model.net(torch.randn(5, 24, generator=torch.Generator().manual_seed(1)))
    assert result["calls"] == 2
    torch.testing.assert_close(result["y"], wanted, rtol=1e-5, atol=1e-6)
