"""When the callback prunes, in every kind of training, and what it says."""

import copy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from trainings import (
    FOREIGN,
    ONE_SHOT,
    PATTERN,
    SETS,
    Batches,
    Endless,
    Stream,
    Tiny,
    TwoOptimizers,
    Watch,
    assert_same,
    assert_target,
    fit,
    is_legal,
    obeys,
    pruning_of,
    sparsity_of,
    trainer_of,
)

from lightning_hinm.callback import Choice, HiNMPruning
from lightning_hinm.callback.update import generator_of
from lightning_hinm.gyro import search_shared
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import hinm_mask, keep_top
from lightning_hinm.pattern import HiNMPattern
from lightning_hinm.prune import PrunableLayer, layout_of, prune
from lightning_hinm.schedule import GradualSchedule

pytestmark = FOREIGN


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


NESTED = (
    PATTERN,
    HiNMPattern(4, 0.25, 1, 4),
    HiNMPattern(8, 0.5, 2, 8),
    HiNMPattern(4, 0.75, 4, 4),
    HiNMPattern(5, 0.0, 2, 4),
    HiNMPattern(4, 0.5, 2, 4, window=4),
)
SALIENCIES = ("taylor", "magnitude", "given")


@pytest.mark.parametrize(
    ("pattern", "saliency"),
    [
        pytest.param(pattern, saliency, marks=() if i % 3 == j else pytest.mark.slow)
        for i, pattern in enumerate(NESTED)
        for j, saliency in enumerate(SALIENCIES)
    ],
)
def test_masks_nest_and_obey_the_schedule_until_the_target_is_reached(pattern: HiNMPattern, saliency: Any) -> None:
    if saliency == "given":  # it does not know what is pruned already
        draw = torch.Generator().manual_seed(0)
        saliency = {f"net.{i}": torch.rand(shape, generator=draw) ** 9 for i, shape in ((0, (24, 16)), (2, (10, 24)))}
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


@pytest.mark.parametrize("saliency", ["taylor", "magnitude"])
@pytest.mark.parametrize("pattern", [PATTERN, HiNMPattern(4, 0.5, 4, 4), HiNMPattern(4, 0.0)], ids=str)
def test_layers_that_share_an_order_have_it_from_the_first_update_to_the_last(
    pattern: HiNMPattern, saliency: Any
) -> None:
    settings = {"method": "exchange", "saliency": saliency, "shared_orders": SETS, "seed": 2}  # some move no row
    callback = pruning_of(pattern=pattern, **settings)
    seen: list[tuple[dict[str, Tensor], dict[str, HiNMLayout]]] = []

    def look(trainer: Trainer, model: Any) -> None:
        if callback.masks and (not seen or callback.layouts["net.0"].pattern != seen[-1][1]["net.0"].pattern):
            seen.append(({name: mask.clone() for name, mask in callback.masks.items()}, callback.layouts))

    assert_target(fit(callback, Watch(look), model=Stream()), callback, pattern)
    assert len(seen) >= 2
    first = seen[0][1]["net.0"].output_order
    assert not torch.equal(first, torch.arange(24))
    assert all(torch.equal(layouts[name].output_order, first) for _, layouts in seen for name in SETS[0])
    for (before, _), (after, layouts) in pairwise(seen):
        assert not any((after[name] & ~before[name]).any() for name in before)
        assert all(is_legal(mask, layouts[name]) for name, mask in after.items())


@pytest.mark.parametrize("pattern", [PATTERN, HiNMPattern(4, 0.5, 4, 4)], ids=str)
def test_rows_that_shall_stay_in_order_do_in_every_update(pattern: HiNMPattern) -> None:
    callback, seen = pruning_of(pattern=pattern, method="exchange", in_order=["net.0"]), []

    def look(trainer: Trainer, model: Any) -> None:
        seen.append({name: layout.output_order for name, layout in callback.layouts.items()})

    assert_target(fit(callback, Watch(look), model=Stream()), callback, pattern)
    orders = [each for each in seen if each]
    assert orders
    assert all(torch.equal(each["net.0"], torch.arange(24)) for each in orders)
    assert not torch.equal(orders[-1]["net.2"], torch.arange(24))
    with pytest.raises(ValueError, match=r"in_order: 'net\.9' matches no"):
        fit(pruning_of(in_order=["net.9"]), model=Stream())


@pytest.mark.parametrize("sets", [[], SETS], ids=["alone", "shared"])
def test_rows_that_shall_stay_in_their_heads_do(sets: list[list[str]]) -> None:
    callback = pruning_of(method="exchange", schedule=ONE_SHOT, shared_orders=sets, heads={"net.[02]": 3})
    with pytest.raises(ValueError, match=r"heads: 'net\.\[02\]' matches no"):
        fit(callback, model=Stream())
    callback = pruning_of(method="exchange", schedule=ONE_SHOT, shared_orders=sets, heads={"re:net.[02]": 3})
    fit(callback, model=Stream())
    for name in ("net.0", "net.2"):
        order = callback.layouts[name].output_order
        assert torch.equal(order // 8, torch.arange(24) // 8)
        assert not torch.equal(order, torch.arange(24))


def test_a_layer_outside_all_sets_is_pruned_as_if_there_were_none() -> None:
    alone, beside = (pruning_of(method="exchange", saliency="magnitude", schedule=ONE_SHOT, shared_orders=sets)
                     for sets in ((), SETS))  # fmt: skip
    for callback in (alone, beside):
        fit(callback, model=Stream())
    assert_same(alone.masks["net.4"], beside.masks["net.4"])
    assert not torch.equal(alone.layouts["net.0"].output_order, alone.layouts["net.2"].output_order)


def test_what_a_set_finds_in_one_update_is_what_the_search_finds() -> None:
    given = {f"net.{i}": torch.rand(shape, generator=torch.Generator().manual_seed(i)) ** 3
             for i, shape in {0: (24, 16), 2: (24, 24), 4: (10, 24)}.items()}  # fmt: skip
    callback = pruning_of(method="exchange", saliency=given, schedule=ONE_SHOT, shared_orders=SETS)
    fit(callback, model=Stream())
    found = search_shared(
        [given[name] for name in SETS[0]], [PATTERN] * 2, generator=generator_of(callback.seed, "net.0", update=1)
    )
    for name, result, entry in zip(SETS[0], found, callback.report.pruned, strict=False):
        assert entry.name == name
        assert torch.equal(callback.masks[name], hinm_mask(given[name], result.layout))
        assert callback.layouts[name].retained == entry.retained == pytest.approx(result.retained)


def test_a_layer_that_was_pruned_before_keeps_its_own_order_and_says_so(lines: list[str]) -> None:
    model, callback = Stream(), pruning_of(method="exchange", shared_orders=SETS)
    prune(model, PATTERN, include=["net.2"])
    own = layout_of(model.net[2]).output_order
    assert_target(fit(callback, model=model), callback)
    assert torch.equal(callback.layouts["net.2"].output_order, own)
    assert not torch.equal(callback.layouts["net.0"].output_order, own)
    (said,) = [line for line in lines if "pruned already" in line]
    assert "net.2 is pruned already" in said
    assert "its rows keep their own order, whatever it was to share one with" in said


def test_layers_that_cannot_share_an_order_are_refused_before_the_first_step() -> None:
    model = Stream()
    with pytest.raises(ValueError, match=r"shared_orders\[0\]: one order needs one number of rows.*'net\.4': 10"):
        fit(pruning_of(shared_orders=[["net"]]), model=model)
    assert sparsity_of(model.net[0].weight) == 0


@pytest.mark.parametrize("method", ["identity", "gyro", "exchange"])
def test_a_saliency_turned_upside_down_brings_no_pruned_weight_back(method: Any) -> None:
    callback, draw = pruning_of(method=method), torch.Generator().manual_seed(0)
    layer = PrunableLayer("net.0", Tiny().net[0], "linear", PATTERN)
    saliency, layout, mask = torch.rand(24, 16, generator=draw), None, None
    for update in range(1, 6):
        choice = callback.choose_mask(
            layer,
            saliency,
            callback.schedule.pattern(update, PATTERN),
            layout=layout,
            within=mask,
            generator=draw,
            time_budget=None,
        )
        assert mask is None or not (choice.mask & ~mask).any()
        assert is_legal(choice.mask, choice.layout)
        layout, mask, saliency = choice.layout, choice.mask, 1 - saliency
    assert layout.pattern == PATTERN


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
    assert_target(model, callback)
    assert sparsity_of(model.image.weight) == pytest.approx(0.75, abs=0.03)
    order = callback.layouts["net.3"].output_order
    assert (order[:4] < 4).all()


class Conv1D(nn.Module):
    """Like Hugging Face's: the weight is ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 24)), nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


Conv1D.__module__ = "transformers.pytorch_utils"


def test_a_hugging_face_layer_has_its_mask_in_its_own_shape() -> None:
    model, callback = Tiny(), pruning_of(method="exchange")
    model.net[0] = Conv1D()
    fit(callback, model=model)
    assert callback.masks["net.0"].shape == (16, 24)
    assert_target(model, callback)


@pytest.mark.parametrize("first", ["pruning", "finder"])
def test_a_learning_rate_finder_inside_the_fit_changes_nothing(first: str, tmp_path: Path) -> None:
    pair = [pruning_of(), LearningRateFinder(num_training_steps=5, update_attr=False)]
    callback, alone = pair[0], pruning_of()
    model = fit(*(pair if first == "pruning" else reversed(pair)), default_root_dir=tmp_path, model=Tiny())
    fit(alone)
    assert_target(model, callback)
    assert_same(callback.masks, alone.masks)


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


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_an_unsupported_strategy_is_refused_by_name(strategy: type) -> None:
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=f"got {strategy.__name__}.*single device or DDP"):
        HiNMPruning().setup(trainer, Tiny(), "fit")  # type: ignore[arg-type]
    HiNMPruning().setup(trainer, Tiny(), "test")  # type: ignore[arg-type]


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
