"""Resuming, fitting again, checkpoints, and refusing what does not belong."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from trainings import (
    FOREIGN,
    PATTERN,
    SETS,
    Batches,
    Stream,
    Tiny,
    Watch,
    assert_same,
    assert_target,
    fit,
    layers_of,
    obeys,
    pruning_of,
    sparsity_of,
    trainer_of,
)

from lightning_hinm.callback import HiNMPruning
from lightning_hinm.format import load_layouts
from lightning_hinm.pattern import HiNMPattern
from lightning_hinm.prune import layout_of, prune
from lightning_hinm.schedule import GradualSchedule

pytestmark = FOREIGN


def final_state(trainer: Trainer) -> dict[str, Any]:
    """Everything that a training leaves behind, as tensors and primitives."""
    dumped = trainer._checkpoint_connector.dump_checkpoint()
    return {name: dumped[name] for name in ("state_dict", "optimizer_states", "global_step")} | {
        "pruning": dumped["callbacks"]["HiNMPruning"]
    }


@pytest.mark.parametrize(
    ("saliency", "stop"),
    [
        *(("taylor", stop) for stop in (1, 3, 6, 14)),  # gathering, between updates, at an epoch's end, after all
        ("magnitude", 8),
        *(pytest.param("taylor", stop, marks=pytest.mark.slow) for stop in (8, 11, 17)),
        *(pytest.param("magnitude", stop, marks=pytest.mark.slow) for stop in (1, 3, 6, 11, 14, 17)),
    ],
)
def test_a_resumed_training_is_bit_equal_to_one_never_stopped(saliency: Any, stop: int, tmp_path: Path) -> None:
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
    for one, two in zip(whole.callbacks[0].report.pruned, callback.report.pruned, strict=True):
        assert (one.sparsity, one.retained) == (two.sparsity, two.retained)
        assert layout_of(layers_of(model)[two.name]).retained == two.retained < 1


@pytest.mark.parametrize("stop", [1, 11, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (6, 17))])
def test_a_resumed_training_with_shared_orders_is_bit_equal(stop: int, tmp_path: Path) -> None:
    def callback() -> HiNMPruning:
        schedule = GradualSchedule(0.1, 0.8, 4)
        return pruning_of(saliency_steps=4, schedule=schedule, method="exchange", shared_orders=SETS)

    whole = trainer_of(callback(), ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1))
    whole.fit(Stream(), Batches())
    (path,) = tmp_path.glob(f"*step={stop}.ckpt")
    second, model = callback(), Stream()
    resumed = trainer_of(second)
    resumed.fit(model, Batches(), ckpt_path=path)
    assert_same(final_state(whole), final_state(resumed))
    assert_target(model, second)
    assert torch.equal(second.layouts["net.0"].output_order, second.layouts["net.2"].output_order)


def test_orders_that_were_searched_apart_cannot_be_shared_by_a_resume(tmp_path: Path) -> None:
    settings = {"method": "exchange", "schedule": GradualSchedule(0.1, 0.8, 4)}
    fit(pruning_of(**settings), ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1), model=Stream())
    (path,) = tmp_path.glob("*step=6.ckpt")
    model, trainer = Stream(), trainer_of(pruning_of(**settings, shared_orders=SETS))
    with pytest.raises(ValueError, match=r"net\.0, net\.2: the callback lets them share one order, but the checkpoint"):
        trainer.fit(model, Batches(), ckpt_path=path)


def test_a_state_from_before_layouts_knew_what_they_retained_is_resumed_without_inventing_it(tmp_path: Path) -> None:
    settings = {"schedule": GradualSchedule(0.1, 0.8, 4), "method": "exchange"}
    fit(pruning_of(**settings), ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1))
    path, callback, model = tmp_path / "epoch=1-step=8.ckpt", pruning_of(**settings), Tiny()
    checkpoint = torch.load(path, weights_only=True)
    for layer in checkpoint["callbacks"]["HiNMPruning"]["layers"].values():
        assert 0 < layer.pop("retained") < 1
    torch.save(checkpoint, path)
    trainer_of(callback).fit(model, Batches(), ckpt_path=path)
    assert_target(model, callback)
    assert [entry.retained for entry in callback.report.pruned] == [None, None]
    assert layout_of(model.net[0]).retained is None


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


def test_rewound_weights_of_the_same_model_and_their_average_are_masked_from_the_start() -> None:
    class Start(Callback):
        sparsities: tuple[float, ...] = ()

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            averaged = average._average_model.module.net[0].weight
            self.sparsities = self.sparsities or (sparsity_of(pl_module.net[0].weight), sparsity_of(averaged))

    callback, model, average, start = pruning_of(), Tiny(), EMAWeightAveraging(), Start()
    fit(callback, model=model)
    masks = callback.masks
    model.load_state_dict(Tiny().state_dict())  # a lottery ticket
    fit(start, callback, average, model=model)
    assert start.sparsities == (0.75, 0.75)
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


def test_a_learning_rate_finder_does_not_carry_masks_over_to_another_model(tmp_path: Path) -> None:
    callback, finder = pruning_of(), LearningRateFinder(num_training_steps=5, update_attr=False)
    fit(callback)
    other = Tiny()
    nn.init.normal_(other.net[0].weight)
    alone = pruning_of()
    fit(alone, model=copy.deepcopy(other))
    fit(callback, finder, model=other, default_root_dir=tmp_path)
    assert_same(callback.masks, alone.masks)


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
    "a layer retained beyond one": (
        lambda state: state["layers"]["net.2"].update(retained=1.5),
        r"net\.2: .*retained=1",
    ),
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
    by_name = {entry.name: entry for entry in callback.report.pruned}
    assert (by_name["net.0"].sparsity, by_name["net.0"].retained) == (0.75, None)


def test_a_model_that_prune_has_pruned_keeps_masks_and_layouts(lines: list[str]) -> None:
    model, callback = Tiny(), pruning_of()
    report = prune(model, PATTERN)
    before = {name: module.weight != 0 for name, module in layers_of(model).items() if layout_of(module)}
    fit(callback, model=model)
    assert_same(before, callback.masks)
    assert_target(model, callback)
    assert sum("with its layout" in line for line in lines) == 2
    for one, two in zip(report.pruned, callback.report.pruned, strict=True):
        assert (one.name, one.sparsity, one.retained) == (two.name, two.sparsity, two.retained)
