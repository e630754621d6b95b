"""The callback in real trainings of tiny models. Data depends on the number of the batch alone, so that every training
can be stopped anywhere."""

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_hinm.callback import Choice, HiNMPruning, pruning
from lightning_hinm.callback.enforce import mask_gradients_, mask_weights_
from lightning_hinm.callback.update import gather_taylor_
from lightning_hinm.format import load_layouts
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import hinm_mask, keep_top
from lightning_hinm.pattern import HiNMPattern, layer_kind, to_matrix
from lightning_hinm.prune import layout_of, prune
from lightning_hinm.schedule import GradualSchedule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),  # Lightning 2.6 on torch 2.13
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

    def loss(self) -> Tensor:
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        draw = torch.Generator().manual_seed(1000 * number + self.trainer.global_rank)
        x = torch.randn(8, 16, generator=draw).to(self.device)
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


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the callback says on rank zero."""
    said: list[str] = []
    monkeypatch.setattr(pruning, "rank_zero_info", said.append)
    return said


# --- arguments


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"saliency": "tailor"}, "saliency='tailor' must be 'taylor', 'magnitude'"),
        ({"saliency_steps": 0}, "saliency_steps=0"),
        ({"method": "gready"}, "method='gready' must be one of identity, gyro, exchange"),
        ({"time_budget": 0.0}, "time_budget=0.0"),
        ({"method": "?", "saliency": "?"}, r"saliency='\?'.*method='\?'"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HiNMPruning(**settings)


def test_arguments_keep_their_names_and_values() -> None:
    settings: dict[str, Any] = {
        "pattern": {"net": PATTERN},
        "schedule": ONE_SHOT,
        "include": ["net"],
        "ignore": ["re:.*2"],
        "saliency": "magnitude",
        "saliency_steps": 3,
        "method": "identity",
        "seed": 7,
        "time_budget": 1.0,
    }
    callback = HiNMPruning(**settings)
    fit(callback)
    assert all(getattr(callback, name) is value for name, value in settings.items())


def test_a_recipe_builds_it_and_a_typo_is_refused(tmp_path: Path) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    recipe = {
        "class_path": "lightning_hinm.HiNMPruning",
        "init_args": {
            "pattern": {"net.0": {"vector_size": 8, "vector_sparsity": 0.75}, "net": {"vector_size": 4}},
            "schedule": {"begin": 0.1, "end": 0.5, "updates": 3},
            "include": ["net"],
            "saliency": "magnitude",
        },
    }
    callback = parser.instantiate(parser.parse_object({"callback": recipe})).callback
    assert callback.pattern == {"net.0": HiNMPattern(8, 0.75), "net": PATTERN}
    assert callback.schedule == GradualSchedule(0.1, 0.5, 3)
    one = {"class_path": "lightning_hinm.HiNMPruning", "init_args": {"pattern": {"vector_size": 4}}}
    callback = parser.instantiate(parser.parse_object({"callback": one})).callback
    assert (callback.pattern, callback.schedule, callback.saliency) == (PATTERN, GradualSchedule(), "taylor")
    for wrong in ({"metod": "gyro"}, {"method": "gready"}, {"pattern": {"vector_siez": 4}}, {"schedule": {"star": 0}}):
        with pytest.raises((jsonargparse.ArgumentError, SystemExit)):
            parser.parse_object({"callback": {"class_path": "lightning_hinm.HiNMPruning", "init_args": wrong}})


# --- when, and how much


def test_one_shot_magnitude_prunes_before_the_first_step() -> None:
    callback, start = pruning_of(schedule=ONE_SHOT, saliency="magnitude"), Tiny().net[0].weight.detach()
    fit(callback, max_steps=1, max_epochs=1)
    assert torch.equal(callback.masks["net.0"], hinm_mask(start.abs(), callback.layouts["net.0"]))


def test_taylor_waits_for_its_steps_and_sums_each_of_them() -> None:
    class Sums(Callback):
        total: Any = 0

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step < 3:
                self.total = self.total + (pl_module.net[0].weight * pl_module.net[0].weight.grad).abs().detach()

    callback, sums, masked = pruning_of(schedule=ONE_SHOT, saliency_steps=3), Sums(), []
    fit(sums, callback, Watch(lambda trainer, model: masked.append(len(callback.masks))))
    assert masked[:4] == [0, 0, 2, 2]
    assert torch.equal(callback.masks["net.0"], hinm_mask(sums.total, callback.layouts["net.0"]))


def test_taylor_and_magnitude_choose_differently() -> None:
    one, two = pruning_of(schedule=ONE_SHOT), pruning_of(schedule=ONE_SHOT, saliency="magnitude")
    fit(one), fit(two)
    assert not torch.equal(one.masks["net.0"], two.masks["net.0"])


def test_a_given_saliency_decides() -> None:
    model = Tiny()
    given = {"net.0": torch.rand(24, 16), "net.2": torch.rand(10, 24)}
    callback = pruning_of(schedule=ONE_SHOT, saliency=given)
    fit(callback, model=model)
    for name, layout in callback.layouts.items():
        assert torch.equal(callback.masks[name], hinm_mask(given[name], layout))


@pytest.mark.parametrize("saliency", ["taylor", "magnitude"])
@pytest.mark.parametrize(
    "pattern",
    [
        PATTERN,
        HiNMPattern(4, 0.25, 1, 4),
        HiNMPattern(8, 0.5, 2, 8),
        HiNMPattern(4, 0.75, 4, 4),
        HiNMPattern(5, 0.0, 2, 4),
        HiNMPattern(4, 0.5, 2, 4, window=4),
    ],
    ids=str,
)
def test_masks_nest_and_obey_the_schedule_until_the_target_is_reached(pattern: HiNMPattern, saliency: Any) -> None:
    callback = pruning_of(pattern=pattern, saliency=saliency, method="exchange", schedule=GradualSchedule(0.0, 0.8))
    seen: list[tuple[dict[str, Tensor], dict[str, HiNMLayout]]] = []

    def look(trainer: Trainer, model: Tiny) -> None:
        seen.append((callback.masks, callback.layouts))
        for name, mask in callback.masks.items():
            assert is_legal(mask, callback.layouts[name])
            assert not model.get_submodule(name).weight[~mask].any()

    model = fit(callback, Watch(look))
    assert_target(model, callback, pattern)
    steps = [sum(mask.sum().item() for mask in masks.values()) for masks, _ in seen if masks]
    assert steps[0] > steps[-1]
    for (before, old), (after, new) in pairwise(seen):
        for name in before:
            assert not (after[name] & ~before[name]).any()
            assert torch.equal(old[name].output_order, new[name].output_order)
            if old[name].pattern.n < pattern.m:
                assert torch.equal(old[name].vector_index, new[name].vector_index)


def test_several_updates_due_at_once_collapse_into_the_last() -> None:
    callback, updates = pruning_of(saliency="magnitude", schedule=GradualSchedule(0.0, 1.0, updates=100)), set()
    with pytest.warns(UserWarning, match="nothing trains after it"):
        fit(callback, Watch(lambda trainer, model: updates.add(callback.state_dict()["update"])))
    assert 1 in updates
    assert len(updates) <= 18
    assert max(updates) == 100


@pytest.mark.parametrize("how", ["batches", "max_steps", "stopped"])
def test_a_training_too_short_for_its_schedule_ends_with_the_target_and_says_so(how: str, tmp_path: Path) -> None:
    def stop(trainer: Trainer, model: Any) -> None:
        trainer.should_stop = how == "stopped"

    callback, saved = pruning_of(saliency_steps=100), ModelCheckpoint(tmp_path, save_last=True)
    settings = {"max_steps": 4} if how == "max_steps" else {}
    with pytest.warns(UserWarning, match=r"ended at update 0 of 5.*saliency_steps` \(100\)"):
        model = fit(callback, Watch(stop), saved, max_epochs=1, **settings)
    assert_target(model, callback)
    if how != "stopped":  # Lightning saves before it calls `on_train_end`
        stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(stored["net.0.weight"], model.net[0].weight)


def test_each_layer_has_the_first_pattern_that_matches() -> None:
    patterns = {"net.2": HiNMPattern(5, 0.5, 1, 4), "re:net": PATTERN}
    callback = pruning_of(pattern=patterns)
    model = fit(callback)
    assert {name: layout.pattern for name, layout in callback.layouts.items()} == {
        "net.0": PATTERN,
        "net.2": patterns["net.2"],
    }
    assert obeys(model, callback)


def test_progress_with_two_manual_optimizers_is_that_of_the_batches() -> None:
    steps: list[int] = []

    def look(trainer: Trainer, model: Any) -> None:
        if callback.masks and not steps:
            steps.append(trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    callback = pruning_of(schedule=GradualSchedule(0.5, 0.5), saliency="magnitude")
    fit(callback, Watch(look), model=TwoOptimizers(), max_epochs=2)
    assert steps == [7]  # of 12 batches, 24 steps


def test_a_longer_resume_does_not_move_what_is_due(tmp_path: Path) -> None:
    settings = {"schedule": GradualSchedule(0.5, 0.5), "saliency": "magnitude"}
    fit(pruning_of(**settings), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1), max_epochs=2)
    callback, masked = pruning_of(**settings), []
    watch = Watch(lambda trainer, model: masked.append(trainer.global_step) if callback.masks else None)
    trainer_of(callback, watch, max_epochs=9).fit(Tiny(), Batches(), ckpt_path=tmp_path / "epoch=0-step=3.ckpt")
    assert masked == list(range(7, 55))  # 6 of the first 12 batches are half


# --- enforcement


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.Adam, {"foreach": False}),
        (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    ],
)
def test_weights_and_every_optimizer_state_are_zero_where_pruned(optimizer: Any, settings: dict[str, Any]) -> None:
    checked = 0

    def look(trainer: Trainer, model: Tiny) -> None:
        nonlocal checked
        if not callback.masks:
            return
        assert obeys(model, callback)
        for name, mask in callback.masks.items():
            weight = model.get_submodule(name).weight
            for value in trainer.optimizers[0].state[weight].values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    assert not value[~mask].any()
                    assert value[mask].any()
                    checked += 1

    callback = pruning_of()
    fit(callback, Watch(look), model=Tiny(optimizer, **settings))
    assert checked > 20


def test_zeroing_leaves_no_nan_where_gradients_and_weights_are_not_finite() -> None:
    model = Tiny()
    weight, mask = model.net[0].weight, torch.rand(24, 16) < 0.5
    weight.data[~mask] = float("nan")
    weight.grad = torch.full_like(weight, float("inf"))
    layers = [pruning.PrunableLayer("net.0", model.net[0], "linear", PATTERN)]
    mask_weights_(layers, {"net.0": mask}, ())
    mask_gradients_(layers, {"net.0": mask})
    assert torch.equal(weight != 0, mask)
    assert torch.equal(weight.grad != 0, mask)


def test_every_change_of_weights_moves_their_version_counter() -> None:
    model = Tiny()
    before = model.net[0].weight._version
    layers = [pruning.PrunableLayer("net.0", model.net[0], "linear", PATTERN)]
    mask_weights_(layers, {"net.0": torch.ones(24, 16, dtype=torch.bool)}, ())
    assert model.net[0].weight._version > before


def test_with_accumulation_only_real_steps_count_also_the_last_short_one() -> None:
    callback, steps = pruning_of(schedule=ONE_SHOT, saliency_steps=4), []

    def look(trainer: Trainer, model: Any) -> None:
        steps.append((trainer.global_step, bool(callback.masks)))
        assert not callback.masks or obeys(model, callback)

    fit(callback, Watch(look), accumulate_grad_batches=4)  # 6 batches: a step after 4, and a short one after 2
    assert [step for step, _ in steps] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 4, 5, 5, 6]
    assert [masked for _, masked in steps] == [False] * 11 + [True] * 7


def test_a_clipping_norm_counts_kept_weights_only() -> None:
    class Clipped(Tiny):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            for name, mask in callback.masks.items():
                grad = self.get_submodule(name).weight.grad
                assert not grad[~mask].any()
                assert grad[mask].any()
                nonlocal checked
                checked += 1
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")

    checked, callback = 0, pruning_of(schedule=ONE_SHOT, saliency="magnitude")
    fit(callback, model=Clipped(), gradient_clip_val=1.0)
    assert checked == 2 * 18


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


@pytest.mark.parametrize("saliency", ["taylor", "magnitude"])
def test_two_manual_optimizers_keep_every_layer_masked(saliency: Any) -> None:
    callback = pruning_of(saliency=saliency)

    def look(trainer: Trainer, model: Any) -> None:
        assert not callback.masks or obeys(model, callback)

    model = fit(callback, Watch(look), model=TwoOptimizers())
    assert set(callback.masks) == {"net.0", "net.2", "other"}
    assert_target(model, callback)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_ends_with_the_target(precision: Any) -> None:
    class Cast(Tiny):
        def loss(self) -> Tensor:
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(self.global_step))
            x = x.to(self.net[0].weight.dtype)
            return (self(x) - x[:, :2]).square().mean()

    callback = pruning_of()
    assert_target(fit(callback, model=Cast(), precision=precision), callback)


def test_a_step_that_the_grad_scaler_skips_is_no_step_for_taylor() -> None:
    # The scale is so large at first that gradients overflow, until the scaler has halved it often enough.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
    callback, summed, scales = pruning_of(schedule=ONE_SHOT, saliency_steps=3), [], []

    def look(trainer: Trainer, model: Any) -> None:
        summed.append(max(callback.state_dict()["steps"].values(), default=0))
        scales.append(scaler.get_scale())
        assert not callback.masks or obeys(model, callback)

    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    model = fit(callback, Watch(look), plugins=[plugin], max_epochs=6)
    skipped = sum(before > after for before, after in zip([2.0**30, *scales], scales, strict=False))
    assert skipped >= 2
    assert summed[: skipped + 3] == [0] * skipped + [1, 2, 0]
    assert_target(model, callback)


# --- averaged weights


class Averages(Callback):
    """What validation saw."""

    def __init__(self, callback: HiNMPruning) -> None:
        self.callback, self.seen, self.versions = callback, 0, []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if self.callback.masks:
            assert obeys(pl_module, self.callback)
            self.seen += 1


@pytest.mark.parametrize("first", ["pruning", "averaging"])
@pytest.mark.parametrize("averaging", ["ema", "swa", "swa with batch norm"])
def test_averaged_weights_obey_the_mask_in_validation_checkpoint_and_end(
    averaging: str, first: str, tmp_path: Path
) -> None:
    callback = pruning_of(schedule=GradualSchedule(0.2, 0.7, 3))
    average = EMAWeightAveraging(decay=0.9) if averaging == "ema" else StochasticWeightAveraging(0.01, 2)
    model = Tiny()
    if averaging == "swa with batch norm":
        model.net.insert(1, nn.BatchNorm1d(24))
    watch, saved = Averages(callback), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    pair = [callback, average] if first == "pruning" else [average, callback]
    trainer = trainer_of(*pair, watch, saved, max_epochs=6)
    trainer.fit(model, Batches(), Batches(1))
    assert watch.seen > 2
    assert_target(model, callback)
    for path in sorted(tmp_path.glob("*.ckpt")):
        stored = torch.load(path, weights_only=True)
        for name, layer in stored["callbacks"]["HiNMPruning"]["layers"].items():
            restored = pruning_of(schedule=callback.schedule)
            restored.load_state_dict(stored["callbacks"]["HiNMPruning"])
            assert layer["mask"].dtype == torch.uint8
            assert not stored["state_dict"][f"{name}.weight"][~restored.masks[name]].any()
    assert len(list(tmp_path.glob("*.ckpt"))) >= 6


def test_a_swap_of_averaged_weights_moves_the_version_counter_for_validation_and_back() -> None:
    versions: list[int] = []

    class Versions(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            versions.append(pl_module.net[0].weight._version)

        def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            versions.append(pl_module.net[0].weight._version)

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            versions.append(pl_module.net[0].weight._version)

    trainer = trainer_of(pruning_of(schedule=ONE_SHOT, saliency="magnitude"), EMAWeightAveraging(), Versions())
    trainer.fit(Tiny(), Batches(1), Batches(1))
    assert len(set(versions[2:])) == len(versions[2:])  # after the sanity check


def test_a_teacher_that_a_callback_holds_stays_dense() -> None:
    class Teacher(Callback):
        def __init__(self) -> None:
            self.teacher = Tiny()

    teacher = Teacher()
    fit(pruning_of(), teacher)
    assert sparsity_of(teacher.teacher.net[0].weight) == 0


def test_an_average_of_a_part_of_the_model_is_masked_too() -> None:
    class PartAverage(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.average = torch.optim.swa_utils.AveragedModel(pl_module.net)

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            self.average.update_parameters(pl_module.net)

    part, callback = PartAverage(), pruning_of()
    fit(part, callback)
    assert not part.average.module[0].weight[~callback.masks["net.0"]].any()
    assert part.average.module[0].weight[callback.masks["net.0"]].all()


# --- resume, and fitting again


def final_state(trainer: Trainer) -> dict[str, Any]:
    """Everything that a training leaves behind, as tensors and primitives."""
    dumped = trainer._checkpoint_connector.dump_checkpoint()
    return {name: dumped[name] for name in ("state_dict", "optimizer_states", "global_step")} | {
        "pruning": dumped["callbacks"]["HiNMPruning"]
    }


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


@pytest.mark.parametrize("stop", [1, 3, 6, 8, 11, 14, 17])  # gathering, between updates, at an epoch's end, after all
@pytest.mark.parametrize("saliency", ["taylor", "magnitude"])
def test_a_resumed_training_is_bit_equal_to_one_never_stopped(stop: int, saliency: Any, tmp_path: Path) -> None:
    settings = {"saliency": saliency, "saliency_steps": 4, "schedule": GradualSchedule(0.1, 0.8, 4)}
    settings["method"] = "exchange"
    whole = trainer_of(pruning_of(**settings), ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1))
    whole.fit(Tiny(), Batches())
    (path,) = tmp_path.glob(f"*step={stop}.ckpt")
    callback = pruning_of(**settings)
    resumed = trainer_of(callback)
    model = Tiny()
    resumed.fit(model, Batches(), ckpt_path=path)  # `weights_only` by default
    assert_same(final_state(whole), final_state(resumed))
    assert_target(model, callback)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_training_with_accumulation_and_averaging_is_bit_equal(stop: int, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [EMAWeightAveraging(decay=0.8), pruning_of(schedule=GradualSchedule(0.2, 0.6, 3))]

    settings = {"accumulate_grad_batches": 4, "max_epochs": 4}
    whole = trainer_of(*callbacks(), ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1), **settings)
    whole.fit(Tiny(), Batches())
    (path,) = tmp_path.glob(f"*step={stop}.ckpt")
    resumed = trainer_of(*callbacks(), **settings)
    resumed.fit(Tiny(), Batches(), ckpt_path=path)
    assert_same(final_state(whole), final_state(resumed))


def test_a_resume_of_a_finished_training_trains_on_with_frozen_masks(tmp_path: Path) -> None:
    first = pruning_of()
    trainer = trainer_of(first)
    trainer.fit(Tiny(), Batches())
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    second = pruning_of(schedule=GradualSchedule(0.5, 0.9, 9))  # another schedule: it is over anyway
    model, other = Tiny(), trainer_of(second, max_epochs=5)
    other.fit(model, Batches(), ckpt_path=tmp_path / "done.ckpt")
    assert other.global_step == 30
    assert_same(first.masks, second.masks)
    assert_target(model, second)


def test_a_second_fit_of_the_same_model_keeps_its_masks() -> None:
    callback, model = pruning_of(), Tiny()
    fit(callback, model=model)
    masks = callback.masks
    fit(callback, model=model)
    assert_same(masks, callback.masks)
    assert_target(model, callback)


def test_rewound_weights_of_the_same_model_are_masked_from_the_start() -> None:
    callback, model = pruning_of(), Tiny()
    fit(callback, model=model)
    masks, sparsities = callback.masks, []
    model.load_state_dict(Tiny().state_dict())  # a lottery ticket
    fit(Watch(lambda trainer, model: sparsities.append(sparsity_of(model.net[0].weight))), callback, model=model)
    assert sparsities[0] == 0.75
    assert_same(masks, callback.masks)


def test_a_fit_of_another_model_starts_anew() -> None:
    callback, first, second = pruning_of(), Tiny(), Tiny()
    fit(callback, model=first)
    with torch.no_grad():
        second.net[0].weight.copy_(torch.randn(24, 16))
    dense: list[bool] = []
    fit(Watch(lambda trainer, model: dense.append(sparsity_of(model.net[0].weight) == 0)), callback, model=second)
    assert dense[0]
    assert_target(second, callback)
    assert layout_of(first.net[0]) is not layout_of(second.net[0])


def test_a_layer_that_was_replaced_between_two_fits_is_pruned_anew() -> None:
    callback, model = pruning_of(), Tiny()
    fit(callback, model=model)
    model.net[2] = nn.Linear(24, 12)
    model.head = nn.Linear(12, 2)
    fit(callback, model=model)
    assert callback.masks["net.2"].shape == (12, 24)
    assert_target(model, callback)


def test_copies_and_pickles_of_callback_and_model_work_on() -> None:
    callback, model = pruning_of(), Tiny()
    copied: list[Any] = []
    fit(callback, Watch(lambda *_: copied.append(copy.deepcopy(callback))), model=model)
    assert_same(copied[-1].masks, callback.masks)
    again = pickle.loads(pickle.dumps(callback))  # noqa: S301 - our own bytes
    twin = copy.deepcopy(model)
    assert torch.equal(layout_of(twin.net[0]).vector_index, layout_of(model.net[0]).vector_index)
    fit(again, model=twin)
    assert_target(twin, again)
    assert_same(again.masks, callback.masks)


def test_hooks_are_gone_after_the_training_and_after_an_exception() -> None:
    trainer = trainer_of(pruning_of())
    trainer.fit(Tiny(), Batches())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks

    def fail(trainer: Trainer, model: Any) -> None:
        raise RuntimeError("stop here")

    trainer = trainer_of(pruning_of(), Watch(fail))
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(Tiny(), Batches())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


# --- checkpoints


def primitives_only(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and primitives_only(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(primitives_only, value))
    return value is None or isinstance(value, (str, int, float, bool, Tensor))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiny, HiNMPruning]:
    callback, model = pruning_of(method="exchange"), Tiny()
    path = tmp_path_factory.mktemp("checkpoint") / "done.ckpt"
    trainer = trainer_of(callback)
    trainer.fit(model, Batches())
    trainer.save_checkpoint(path)
    return path, model, callback


def test_a_checkpoint_is_a_plain_dense_one_with_zeros_in_it(finished: Any) -> None:
    path, _, callback = finished
    stored = torch.load(path, weights_only=True)["state_dict"]
    plain = Tiny()
    assert {name: value.shape for name, value in stored.items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    plain.load_state_dict(stored, strict=True)
    assert obeys(plain, callback)


def test_the_state_holds_tensors_and_primitives_only_and_is_small(finished: Any) -> None:
    _, model, callback = finished
    state = callback.state_dict()
    assert primitives_only(state)
    size = sum(
        value.numel() * value.element_size()
        for layer in state["layers"].values()
        for value in layer.values()
        if isinstance(value, Tensor)
    )
    assert size < 0.3 * sum(model.net[i].weight.nbytes for i in (0, 2))
    assert not state["sums"]


def test_layouts_come_back_from_a_checkpoint(finished: Any) -> None:
    path, model, _ = finished
    plain = Tiny()
    plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    load_layouts(plain, path)
    assert torch.equal(layout_of(plain.net[0]).vector_index, layout_of(model.net[0]).vector_index)
    assert torch.equal(layout_of(plain.net[0]).output_order, layout_of(model.net[0]).output_order)


def test_a_module_has_a_layout_only_with_its_target_pattern() -> None:
    callback, model = pruning_of(), Tiny()
    prune(model, PATTERN)  # its layout goes with the weights that it belonged to
    model.net[0].weight.data.normal_()
    seen: list[bool] = []

    def look(trainer: Trainer, model: Any) -> None:
        reached = "net.0" in callback.layouts and callback.layouts["net.0"].pattern == PATTERN
        assert (layout_of(model.net[0]) is not None) == reached
        seen.append(reached)

    fit(callback, Watch(look), model=model)
    assert set(seen) == {False, True}


def test_the_checkpoint_of_another_pattern_is_refused_before_training(finished: Any) -> None:
    path, _, _ = finished
    trained: list[int] = []
    trainer = trainer_of(pruning_of(pattern=HiNMPattern(4, 0.25)), Watch(lambda *_: trained.append(1)), max_epochs=9)
    with pytest.raises(ValueError, match=r"net\.0: the checkpoint has .*0\.5.* the callback .*0\.25.*\n.*net\.2"):
        trainer.fit(Tiny(), Batches(), ckpt_path=path)
    assert not trained


def test_the_state_of_another_model_is_refused_with_every_layer_that_differs(finished: Any) -> None:
    model = Tiny()
    model.net[2] = nn.Linear(24, 12)
    model.head = nn.Linear(12, 2)
    model.more = nn.Linear(16, 16)
    callback = pruning_of()
    callback.load_state_dict(finished[2].state_dict())
    with pytest.raises(ValueError, match=r"more: only in the model(.|\n)*net\.2: .*\[10, 24\].*\[12, 24\]"):
        fit(callback, model=model)
    assert sparsity_of(model.net[0].weight) == 0
    with pytest.warns(UserWarning, match="no gradient has reached more"):
        assert_target(fit(callback, model=model), callback)  # the refused state has left no trace


def test_a_checkpoint_from_the_middle_of_another_schedule_is_refused(tmp_path: Path) -> None:
    fit(pruning_of(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1), max_epochs=2)
    callback = pruning_of(schedule=GradualSchedule(0.0, 0.9, 7))
    with pytest.raises(ValueError, match=r"after update \d of GradualSchedule.*end=0\.3.*updates=7"):
        fit_from(callback, next(tmp_path.glob("*step=3.ckpt")))


def fit_from(callback: HiNMPruning, path: Path) -> None:
    trainer_of(callback).fit(Tiny(), Batches(), ckpt_path=path)


def flip_a_bit(state: dict[str, Any]) -> None:
    state["layers"]["net.0"]["mask"][3] ^= 4


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a bit of a mask": (flip_a_bit, r"net\.0: its mask does not obey its layout"),
    "an index out of range": (
        lambda state: state["layers"]["net.2"]["vector_index"].fill_(1000),
        r"net\.2: .*outside 0\.\.23",
    ),
    "no permutation": (lambda state: state["layers"]["net.0"]["output_order"].fill_(0), r"net\.0: .*permutation"),
    "an order too short": (
        lambda state: state["layers"]["net.0"].update(output_order=torch.arange(8, dtype=torch.int32)),
        r"net\.0: ",
    ),
    "a missing mask": (lambda state: state["layers"]["net.0"].pop("mask"), r"net\.0: .*mask"),
    "a pattern of lies": (lambda state: state["targets"]["net.0"]["pattern"].update(n=9), r"net\.0: .*n=9"),
    "a layer without a target": (lambda state: state["targets"].pop("net.0"), r"net\.0: "),
    "a negative update": (lambda state: state.update(update=-1), r"update=-1"),
    "an update beyond the last": (lambda state: state.update(update=99), r"update=99"),
    "a length that is no number": (lambda state: state.update(total_batches="18"), r"total_batches='18'"),
    "retained beyond one": (lambda state: state.update(retained=1.5), r"retained=1\.5"),
    "a missing key": (lambda state: state.pop("sums"), r"must hold exactly"),
    "layers that are a list": (lambda state: state.update(layers=[]), r"layers is list"),
    "a schedule of lies": (lambda state: state["schedule"].update(updates=0), r"schedule=.*updates=0"),
    "an adopted stranger": (lambda state: state.update(adopted=["nobody"]), r"adopted: 'nobody'"),
    "a sum that is not finite": (
        lambda state: state.update(sums={"net.0": torch.full((24, 16), float("nan"))}, steps={"net.0": 1}),
        r"net\.0: its saliency sum is negative or not finite",
    ),
    "a sum of another shape": (
        lambda state: state.update(sums={"net.0": torch.ones(3)}, steps={"net.0": 1}),
        r"net\.0: its saliency sum must be .*\(24, 16\)",
    ),
    "a sum over no steps": (lambda state: state.update(sums={"net.0": torch.ones(24, 16)}), r"net\.0: .*steps=None"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: str, finished: Any) -> None:
    harm, said = DAMAGES[damage]
    state = copy.deepcopy(finished[2].state_dict())
    harm(state)
    callback = pruning_of()
    with pytest.raises(ValueError, match=said):
        callback.load_state_dict(state)
    assert not callback.masks
    assert not callback.state_dict()


def test_all_damaged_layers_are_named_at_once(finished: Any) -> None:
    state = copy.deepcopy(finished[2].state_dict())
    for layer in state["layers"].values():
        layer["mask"] = layer["mask"][:-1]
    with pytest.raises(ValueError, match=r"net\.0(.|\n)*net\.2"):
        pruning_of().load_state_dict(state)


def test_masks_are_taken_from_the_zeros_of_a_weights_only_checkpoint(finished: Any, lines: list[str]) -> None:
    model, callback = Tiny(), pruning_of()
    model.load_state_dict(finished[1].state_dict())
    model.net.append(nn.Linear(10, 8))
    model.head = nn.Linear(8, 2)
    nn.init.zeros_(model.net[3].weight)  # initialised so, not pruned
    fit(callback, model=model)
    masks = finished[2].masks
    assert torch.equal(callback.masks["net.0"], masks["net.0"])
    assert torch.equal(callback.masks["net.2"], masks["net.2"])
    said = [line for line in lines if "pruned already" in line]
    assert len(said) == 2
    assert all("sparsity 0.75" in line and "load_layouts" in line for line in said)
    assert callback.masks["net.3"].any()
    assert callback.layouts.keys() == {"net.3"}


def test_a_model_that_prune_has_pruned_keeps_masks_and_layouts(lines: list[str]) -> None:
    model, callback = Tiny(), pruning_of()
    prune(model, PATTERN)
    before = {name: module.weight != 0 for name, module in layers_of(model).items() if layout_of(module)}
    fit(callback, model=model)
    assert_same(before, callback.masks)
    assert_target(model, callback)
    assert sum("with its layout" in line for line in lines) == 2


# --- every kind of training


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"overfit_batches": 2, "max_epochs": 6},
        {"max_steps": 8, "max_epochs": -1},
        {"limit_train_batches": 0.5},
        {"barebones": True, "logger": None, "enable_progress_bar": None, "enable_model_summary": None},
    ],
    ids=str,
)
def test_every_kind_of_training_ends_with_the_target(settings: dict[str, Any]) -> None:
    callback = pruning_of()
    if "barebones" in settings:
        settings = settings | {"enable_checkpointing": None}
    assert_target(fit(callback, **settings), callback)


def test_a_loader_without_length_needs_max_steps_only() -> None:
    callback = pruning_of()
    assert_target(fit(callback, loader=Endless(), max_steps=9, max_epochs=-1), callback)


@pytest.mark.parametrize("settings", [{"max_epochs": 2}, {"max_epochs": -1, "max_time": "00:00:00:09"}], ids=str)
def test_an_unknown_length_is_refused_before_the_first_step(settings: dict[str, Any]) -> None:
    model = Tiny()
    start = model.net[0].weight.clone()
    with pytest.raises(ValueError, match=r"max_steps=-1 and inf batches.*Trainer\(max_steps="):
        fit(pruning_of(), model=model, loader=Endless(), **settings)
    assert torch.equal(model.net[0].weight, start)


def test_validate_test_and_predict_leave_model_and_callback_alone(finished: Any) -> None:
    path, _, _ = finished
    callback, model = pruning_of(), Tiny()
    start = copy.deepcopy(model.state_dict())
    trainer = trainer_of(callback)
    trainer.validate(model, Batches(1), verbose=False)
    trainer.test(model, Batches(1), verbose=False)
    trainer.predict(model, Batches(1))
    assert_same(start, dict(model.state_dict()))
    trainer.test(model, Batches(1), ckpt_path=path, verbose=False)
    assert not callback.masks


def test_testing_the_best_checkpoint_does_not_turn_back_a_training(tmp_path: Path) -> None:
    callback, model = pruning_of(), Tiny()
    trainer = trainer_of(callback, ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1))
    trainer.fit(model, Batches())
    masks = callback.masks
    trainer.test(model, Batches(1), ckpt_path=next(tmp_path.glob("*step=3.ckpt")), verbose=False)
    assert_same(masks, callback.masks)


def test_a_model_built_in_configure_model_is_pruned() -> None:
    class Late(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net = None  # type: ignore[assignment]

        def configure_model(self) -> None:
            if self.net is None:
                self.net = Tiny().net

    callback = pruning_of()
    assert_target(fit(callback, model=Late()), callback)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_have_the_names_of_plain_ones(whole: bool) -> None:
    model: Any = Tiny()
    callback = pruning_of(include=["net"])
    if whole:
        fit(callback, model=torch.compile(model, backend="eager"))
    else:
        model.net = torch.compile(model.net, backend="eager")
        fit(callback, model=model)
    assert set(callback.masks) == set(callback.state_dict()["layers"]) == {"net.0", "net.2"}
    inner = getattr(model.net, "_orig_mod", model.net)
    assert sparsity_of(inner[0].weight) == 0.75
    assert layout_of(inner[0]) is not None


class Convolutions(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=2), nn.Flatten()
        )
        self.image = nn.Conv2d(12, 8, (3, 1))
        self.head = nn.Linear(96, 2)

    def loss(self) -> Tensor:
        return super().loss() + self.image(torch.ones(2, 12, 5, 5)).square().mean()


def test_convolutions_grouped_ones_too_are_pruned() -> None:
    callback = pruning_of(method="exchange", ignore=["net.1"])
    model = fit(callback, model=Convolutions())
    assert set(callback.masks) == {"net.3", "image"}
    assert sparsity_of(model.image.weight) == pytest.approx(0.75, abs=0.03)
    order = callback.layouts["net.3"].output_order
    assert (order[:4] < 4).all()


def test_a_shared_weight_is_pruned_once_and_both_modules_know_its_layout() -> None:
    model, callback = Tiny(), pruning_of()
    model.twin = nn.Linear(16, 24)
    model.twin.weight = model.net[0].weight
    fit(callback, model=model)
    assert set(callback.masks) == {"net.0", "net.2"}
    assert torch.equal(layout_of(model.twin).vector_index, callback.layouts["net.0"].vector_index)


def test_the_same_seed_gives_the_same_layouts_and_the_global_one_is_left_alone() -> None:
    layouts = []
    for seed in (3, 3):
        callback = pruning_of(method="exchange", seed=seed)
        seed_everything(len(layouts), verbose=False)
        states: list[Tensor] = []
        fit(callback, Watch(lambda *_, states=states: states.append(torch.get_rng_state())))  # type: ignore[misc]
        assert all(torch.equal(states[0], state) for state in states)
        layouts.append({name: layout.vector_index for name, layout in callback.layouts.items()})
    assert_same(*layouts)


def test_a_subclass_may_prune_in_another_way_and_needs_no_layout(tmp_path: Path) -> None:
    class Unstructured(HiNMPruning):
        def choose_mask(self, layer: Any, saliency: Tensor, pattern: HiNMPattern, **kwargs: Any) -> Choice:
            kept = round(saliency.numel() * (1 - pattern.sparsity))
            within = kwargs["within"]
            scores = saliency if within is None else saliency.masked_fill(~within, -1)
            return Choice(keep_top(scores.flatten(), kept).view_as(scores))

    callback = Unstructured(PATTERN, saliency_steps=2)
    trainer = trainer_of(callback)
    model = Tiny()
    trainer.fit(model, Batches())
    assert sparsity_of(model.net[0].weight) == 0.75
    assert layout_of(model.net[0]) is None
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    again = Unstructured(PATTERN, saliency_steps=2)
    trainer_of(again, max_epochs=4).fit(Tiny(), Batches(), ckpt_path=tmp_path / "done.ckpt")
    assert_same(callback.masks, again.masks)


# --- two processes


class Deposit(Callback):
    """Each rank leaves its masks, layouts and weights in a file."""

    def __init__(self, callback: HiNMPruning, folder: Path) -> None:
        self.callback, self.folder = callback, folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        left = {
            "masks": self.callback.masks,
            "orders": {name: layout.output_order for name, layout in self.callback.layouts.items()},
            "indices": {name: layout.vector_index for name, layout in self.callback.layouts.items()},
            "weights": dict(pl_module.state_dict()),
            "said": len(self.callback.report.layers),
        }
        torch.save(left, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore")  # of two spawned processes
def test_two_processes_prune_as_one_and_agree_in_everything(tmp_path: Path) -> None:
    def callbacks() -> tuple[Callback, ...]:
        callback = pruning_of(method="exchange", saliency_steps=3)
        return callback, Deposit(callback, tmp_path)

    spawned = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    trainer_of(*callbacks(), strategy=spawned, devices=2).fit(Tiny(), Batches())
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same(ranks[0], ranks[1])
    assert set(ranks[0]["masks"]) == {"net.0", "net.2"}
    for name, mask in ranks[0]["masks"].items():
        assert is_legal(mask, HiNMLayout(PATTERN, ranks[0]["orders"][name], ranks[0]["indices"][name]))
        assert not ranks[0]["weights"][f"{name}.weight"][~mask].any()


def test_work_is_shared_out_over_ranks_and_told_to_all() -> None:
    # Two ranks in one process: what one rank finds is what the other is told.
    model = Tiny()
    told: dict[int, Any] = {}
    for rank in (1, 0):
        callback, asked = pruning_of(saliency="magnitude", schedule=ONE_SHOT), []

        def broadcast(found: Any, src: int, rank: int = rank, asked: list[int] = asked) -> Any:
            asked.append(src)
            assert (found is not None) == (src == rank)
            told[src] = told.get(src, found) if found is None else found
            return told.get(src, SimpleNamespace())

        callback._layers = pruning.find_layers(model, PATTERN)[0]
        trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=SimpleNamespace(broadcast=broadcast))
        own = pruning.search_layers(
            callback._layers,
            lambda layer, budget: Choice(torch.ones(layer.matrix.shape, dtype=torch.bool)),
            callback._state,
            "magnitude",
            trainer,  # type: ignore[arg-type]
            None,
        )
        assert asked == [0, 1]
        assert set(own) == {"net.0", "net.2"}


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_an_unsupported_strategy_is_refused_by_name(strategy: type) -> None:
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=f"got {strategy.__name__}.*single device or DDP"):
        HiNMPruning().setup(trainer, Tiny(), "fit")  # type: ignore[arg-type]
    HiNMPruning().setup(trainer, Tiny(), "test")  # type: ignore[arg-type]


# --- bad input


@pytest.mark.parametrize("argument", ["include", "ignore", "pattern"])
def test_a_layer_name_that_matches_nothing_is_refused(argument: str) -> None:
    value = {"nett": PATTERN} if argument == "pattern" else ["nett"]
    with pytest.raises(ValueError, match=f"{argument}: 'nett' matches no"):
        fit(pruning_of(**{argument: value}))


def test_a_model_with_nothing_prunable_is_refused_with_every_reason() -> None:
    with pytest.raises(ValueError, match=r"nothing to prune(.|\n)*head: 2 rows are less than one tile"):
        fit(pruning_of(include=["head"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_layer_at_the_start(value: float) -> None:
    model = Tiny()
    model.net[0].weight.data[0, 0] = value
    model.net[2].weight.data[:2] = value
    with pytest.raises(ValueError, match=r"net\.0: 1 of 384(.|\n)*net\.2: 48 of 240"):
        fit(pruning_of(), model=model)


def test_weights_that_diverge_are_refused_by_layer_and_nothing_is_pruned() -> None:
    def diverge(trainer: Trainer, model: Any) -> None:
        model.net[2].weight.data.fill_(float("nan"))

    model, callback = Tiny(), pruning_of(saliency="magnitude", schedule=GradualSchedule(0.5, 0.5))
    with pytest.raises(ValueError, match=r"nothing was pruned(.|\n)*net\.2: saliency: 240 of 240"):
        fit(callback, Watch(diverge), model=model)
    assert sparsity_of(model.net[0].weight) == 0
    assert not callback.masks


def test_a_buffer_called_attn_mask_is_nobodys_business(tmp_path: Path) -> None:
    model, callback = Tiny(), pruning_of()
    model.register_buffer("attn_mask", torch.ones(3, 3, dtype=torch.bool))
    model.net.register_buffer("weight_mask", torch.ones(2))
    trainer = trainer_of(callback)
    trainer.fit(model, Batches())
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    assert torch.load(tmp_path / "done.ckpt", weights_only=True)["state_dict"]["attn_mask"].all()
    assert_target(model, callback)


def test_a_parametrised_weight_is_refused_by_name() -> None:
    model = Tiny()
    parametrizations.weight_norm(model.net[2])
    with pytest.raises(ValueError, match=r"net\.2: its weight is parametrised"):
        fit(pruning_of(), model=model)
    fit(pruning_of(ignore=["net.2"]), model=model)


@pytest.mark.parametrize("how", ["frozen", "unused", "no gradient"])
def test_a_layer_that_taylor_never_sees_is_pruned_by_magnitude_with_one_warning(how: str) -> None:
    model, callback = Tiny(), pruning_of(schedule=ONE_SHOT)
    model.spare = nn.Linear(16, 8)
    start = model.spare.weight.detach().clone()
    if how == "frozen":
        model.spare.weight.requires_grad_(False)
    elif how == "no gradient":
        model.loss = lambda: Tiny.loss(model) + 0 * model.spare(torch.ones(1, 16)).sum()  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="no gradient has reached spare,.*magnitude") as caught:
        fit(callback, model=model)
    assert sum("no gradient" in str(one.message) for one in caught) == 1
    assert how != "frozen" or torch.equal(callback.masks["spare"], hinm_mask(start.abs(), callback.layouts["spare"]))
    assert_target(model, callback)


def test_a_given_saliency_is_checked_for_all_layers_at_the_start() -> None:
    given = {"net.0": torch.rand(24, 16) - 5}
    with pytest.raises(ValueError, match=r"net\.0.*negative(.|\n)*net\.2.*got nothing"):
        fit(pruning_of(saliency=given))


def test_a_step_with_a_non_finite_gradient_is_not_summed() -> None:
    model, callback = Tiny(), pruning_of()
    layers = pruning.find_layers(model, PATTERN)[0]
    for layer in layers:
        layer.weight.grad = torch.ones_like(layer.weight)
    model.head.bias.grad = torch.zeros(2)
    optimizer = model.configure_optimizers()
    gather_taylor_(callback._state, layers, optimizer)
    model.head.bias.grad[0] = float("inf")  # GradScaler looks at all gradients
    gather_taylor_(callback._state, layers, optimizer)
    assert callback._state.steps == {"net.0": 1, "net.2": 1}
    assert torch.equal(callback._state.sums["net.0"], model.net[0].weight.detach().abs())


# --- what it says


def test_sparsity_and_retained_saliency_reach_every_logger_and_the_progress_bar(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name=name) for name in ("one", "two")]
    callback = pruning_of(schedule=GradualSchedule(0.0, 0.5, 3), saliency="magnitude")
    trainer = trainer_of(callback, logger=loggers, log_every_n_steps=1)
    trainer.fit(Tiny(), Batches())
    for logger in loggers:
        table = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        column = table[0].split(",").index("hinm/sparsity")
        values = [float(row.split(",")[column]) for row in table[1:] if row.split(",")[column]]
        assert values == sorted(values)
        assert values[-1] == pytest.approx(0.75)
        assert len(values) > 1
    assert trainer.progress_bar_metrics["hinm/sparsity"] == pytest.approx(0.75)
    assert 0.25 < trainer.progress_bar_metrics["hinm/retained"] < 1
    assert trainer.callback_metrics["hinm/retained"] == pytest.approx(callback.state_dict()["retained"])


def test_every_event_is_one_line_with_its_numbers(lines: list[str]) -> None:
    fit(pruning_of(schedule=ONE_SHOT, saliency="magnitude"))
    assert "2 layers to prune, 1 skipped\n  head: 2 rows" in lines[0]
    assert lines[1].startswith("HiNMPruning: update 1 of 1 at step 0: sparsity 0.75")
    assert "2 layers searched in" in lines[1]
    assert len(lines) == 2


def test_the_report_lists_every_layer_with_its_numbers_or_its_reason() -> None:
    callback = pruning_of(schedule=ONE_SHOT, saliency="magnitude")
    fit(callback)
    entries = {entry.name: entry for entry in callback.report.layers}
    assert entries["net.0"].sparsity == 0.75
    assert 0.25 < entries["net.0"].retained < 1
    assert "less than one tile" in str(entries["head"].reason)
    assert "net.2" in str(callback.report)


def test_a_long_search_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_hinm.callback import update

    said: list[str] = []
    monkeypatch.setattr(update, "rank_zero_info", said.append)
    monkeypatch.setattr(update, "SECONDS_BETWEEN_LINES", 0.0)
    fit(pruning_of(schedule=ONE_SHOT, saliency="magnitude"))
    assert ["searched 1 of 2 layers" in said[0], "searched 2 of 2 layers" in said[1]] == [True, True]


def test_a_time_budget_is_shared_out_by_size_and_its_end_is_reported() -> None:
    budgets: dict[str, float] = {}

    class Budgets(HiNMPruning):
        def choose_mask(self, layer: Any, *args: Any, **kwargs: Any) -> Choice:
            budgets[layer.name] = kwargs["time_budget"]
            choice = super().choose_mask(layer, *args, **kwargs)
            return Choice(choice.mask, choice.layout, ended_by_budget=layer.name == "net.2")

    callback = Budgets(PATTERN, ONE_SHOT, saliency="magnitude", method="identity", time_budget=100.0)
    fit(callback)
    assert budgets["net.0"] == pytest.approx(100 * 384 / (384 + 240), rel=0.01)
    assert budgets["net.2"] == pytest.approx(100, rel=0.01)  # the first has left almost all of its share
    assert [entry.ended_by_budget for entry in callback.report.pruned] == [False, True]
