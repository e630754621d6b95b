"""Pruned weights stay zero: in weights, gradients, optimizer state and averaged copies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from trainings import (
    FOREIGN,
    ONE_SHOT,
    PATTERN,
    Batches,
    Tiny,
    TwoOptimizers,
    Watch,
    assert_target,
    fit,
    obeys,
    pruning_of,
    sparsity_of,
    trainer_of,
)

from lightning_hinm.callback import HiNMPruning, pruning
from lightning_hinm.callback.enforce import mask_gradients_, mask_weights_
from lightning_hinm.schedule import GradualSchedule

pytestmark = FOREIGN


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


class Reviving(torch.optim.SGD):
    """Writes into every weight and momentum, as noise, orthogonalisation or a fused kernel may."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for weight in self.param_groups[0]["params"]:
            weight.add_(0.01)
            self.state[weight]["momentum_buffer"].add_(0.01)
        return loss


def test_an_optimizer_that_writes_into_every_weight_revives_none() -> None:
    stepped = 0

    class Steps(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            nonlocal stepped
            for name, mask in callback.masks.items():
                weight = pl_module.get_submodule(name).weight
                assert torch.equal(weight != 0, mask)
                assert torch.equal(optimizer.state[weight]["momentum_buffer"] != 0, mask)
                stepped += 1

    callback = pruning_of()
    fit(callback, Steps(), model=Tiny(Reviving, lr=0.01, momentum=0.9))
    assert stepped > 20


def test_weights_and_gradients_are_masked_before_the_step_of_an_update_itself() -> None:
    class Before(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            for name, mask in callback.masks.items():
                weight = pl_module.get_submodule(name).weight
                assert not weight[~mask].any()
                assert not weight.grad[~mask].any()

    callback = pruning_of(schedule=ONE_SHOT, saliency="magnitude")
    fit(callback, Before())
    assert callback.masks


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


@pytest.mark.parametrize("first", ["pruning", "averaging"])
def test_averaged_weights_obey_the_mask_in_a_checkpoint_without_any_validation(first: str, tmp_path: Path) -> None:
    callback, average = pruning_of(schedule=GradualSchedule(0.2, 0.7, 3)), EMAWeightAveraging(decay=0.9)
    pair = [callback, average] if first == "pruning" else [average, callback]
    model = fit(*pair, ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1))
    assert_target(model, callback)
    obeyed = 0
    for path in tmp_path.glob("*.ckpt"):
        stored, restored = torch.load(path, weights_only=True), pruning_of(schedule=callback.schedule)
        restored.load_state_dict(stored["callbacks"]["HiNMPruning"])
        for name, mask in restored.masks.items():
            assert not stored["state_dict"][f"{name}.weight"][~mask].any()
            assert not stored["current_model_state"][f"{name}.weight"][~mask].any()
            obeyed += 1
    assert obeyed > 20


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


def test_an_average_that_nobody_knows_of_is_masked_when_it_is_copied_over_in_the_end() -> None:
    class Shadow(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.shadow = [parameter.detach().clone() for parameter in pl_module.parameters()]

        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            for parameter, shadow in zip(pl_module.parameters(), self.shadow, strict=True):
                parameter.data.copy_(shadow)

    callback = pruning_of()
    assert_target(fit(Shadow(), callback), callback)


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
