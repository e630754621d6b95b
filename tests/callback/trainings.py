"""Tiny models, quick trainings, and what must hold after them. Data depends on the number of the batch alone, so that
every training can be stopped anywhere."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_hinm.callback import HiNMPruning
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.pattern import HiNMPattern, layer_kind, to_matrix
from lightning_hinm.prune import layout_of
from lightning_hinm.schedule import GradualSchedule

# Foreign warnings, each by name: the first is Lightning 2.6 on torch 2.13.
FOREIGN = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step` but have no `val_dataloader`.*"),
]
PATTERN = HiNMPattern(vector_size=4)  # 75 %
ONE_SHOT = GradualSchedule(0.0, 0.0)


class Batches:
    """A loader of batch numbers. It claims to be resumable, and rightly so: nothing depends on what it yields."""

    def __init__(self, count: int = 6) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.count))

    def __len__(self) -> int:
        return self.count

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Endless(Batches):
    __len__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.tensor(0)


class Tiny(LightningModule):
    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 10))
            self.head = nn.Linear(10, 2)  # smaller than a tile
        self.optimizer, self.settings = optimizer, {"lr": 0.05} | settings

    @torch.compiler.disable
    def draw(self) -> Tensor:
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        draw = torch.Generator().manual_seed(1000 * number + self.trainer.global_rank)
        return torch.randn(8, 16, generator=draw).to(self.device)

    def loss(self) -> Tensor:
        x = self.draw()
        return (self(x) - x[:, :2].sin()).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self(torch.ones(1, 16, device=self.device)).sum())

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(torch.ones(1, 16))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), **self.settings)


class Stream(Tiny):
    """Two layers with as many rows, ``SETS``, and one with others."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))


SETS = [["net.0", "net.2"]]


class Watch(Callback):
    """Calls a function after every batch."""

    def __init__(self, look: Callable[[Trainer, Any], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.look(trainer, pl_module)


def pruning_of(**settings: Any) -> HiNMPruning:
    """Quick by default: no search, few steps of saliency."""
    return HiNMPruning(**{"pattern": PATTERN, "method": "identity", "saliency_steps": 2} | settings)


def trainer_of(*callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_checkpointing": checkpointing}
    return Trainer(**quiet | defaults | {"callbacks": list(callbacks)} | settings)


def fit(*callbacks: Callback, model: LightningModule | None = None, loader: Any = None, **settings: Any) -> Any:
    model = Tiny() if model is None else model
    trainer_of(*callbacks, **settings).fit(model, Batches() if loader is None else loader)
    return model


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if layer_kind(module)}


def sparsity_of(weight: Tensor) -> float:
    return (weight == 0).float().mean().item()


def obeys(model: nn.Module, callback: HiNMPruning) -> bool:
    """Every pruned weight is exactly zero, and at least one layer is pruned."""
    layers = layers_of(model)
    return bool(callback.masks) and not any(layers[name].weight[~mask].any() for name, mask in callback.masks.items())


def is_legal(mask: Tensor, layout: HiNMLayout) -> bool:
    """The pattern spelt out, row by row and group by group; independent of the package's own masks."""
    pattern, (rows, in_features) = layout.pattern, mask.shape
    for tile, columns in enumerate(layout.vector_index.tolist()):
        for row in layout.output_order[tile * pattern.vector_size : (tile + 1) * pattern.vector_size].tolist():
            kept = set(mask[row].nonzero().flatten().tolist())
            if not kept <= set(columns):
                return False
            for first in range(0, len(columns), pattern.m):
                real = [column for column in columns[first : first + pattern.m] if column < in_features]
                if len(kept & set(real)) != min(pattern.n, len(real)):
                    return False
    return sorted(layout.output_order.tolist()) == list(range(rows))


def assert_target(model: nn.Module, callback: HiNMPruning, pattern: HiNMPattern = PATTERN) -> None:
    assert obeys(model, callback)
    for name, mask in callback.masks.items():
        module, layout = layers_of(model)[name], callback.layouts[name]
        assert layout.pattern == pattern
        assert is_legal(to_matrix(mask, str(layer_kind(module))), layout)
        assert layout_of(module) is layout or torch.equal(layout_of(module).vector_index, layout.vector_index)


class TwoOptimizers(Tiny):
    """Manual optimization; both graphs are built before the first of the two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(16, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        one, two = self.optimizers()
        first, second = self.loss(), self.other(torch.ones(3, 16)).relu().square().sum()
        hidden = self.other(torch.ones(3, 16).requires_grad_()).tanh().sum()
        one.zero_grad()
        self.manual_backward(first)
        one.step()
        two.zero_grad()
        self.manual_backward(second + hidden)
        two.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW([*self.net.parameters(), *self.head.parameters()], lr=0.05),
            torch.optim.SGD(self.other.parameters(), lr=0.001, momentum=0.9),
        ]


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list):
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    else:
        assert one == two
