"""One update on one rank or on several."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from trainings import (
    FOREIGN,
    ONE_SHOT,
    PATTERN,
    SETS,
    Batches,
    Stream,
    Tiny,
    Watch,
    assert_same,
    fit,
    is_legal,
    pruning_of,
    trainer_of,
)

from lightning_hinm.callback import Choice, HiNMPruning, update
from lightning_hinm.callback.state import fresh_state
from lightning_hinm.callback.update import gather_taylor_, saliency_of, search_layers, settle_saliency_
from lightning_hinm.gyro import search, search_shared
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import retained
from lightning_hinm.prune import PrunableLayer, find_layers

pytestmark = FOREIGN


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
        }
        torch.save(left, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of two spawned processes
def test_two_processes_agree_on_every_mask_layout_and_weight(tmp_path: Path) -> None:
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


@pytest.mark.filterwarnings("ignore")  # of two spawned processes
def test_two_processes_find_bit_for_bit_what_one_finds(tmp_path: Path) -> None:
    def run(folder: Path, **settings: Any) -> None:
        folder.mkdir()
        callback = pruning_of(method="exchange", saliency="magnitude", schedule=ONE_SHOT, shared_orders=SETS)
        trainer_of(callback, Deposit(callback, folder), **settings).fit(Stream(), Batches())

    run(tmp_path / "one")
    run(tmp_path / "two", strategy=DDPStrategy(start_method="spawn", process_group_backend="gloo"), devices=2)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one/0.pt", "two/1.pt"))
    assert one["masks"].keys() == two["masks"].keys() != set()
    for kind in ("masks", "orders", "indices"):
        for name, tensor in one[kind].items():
            assert torch.equal(tensor, two[kind][name])
    assert torch.equal(one["orders"]["net.0"], one["orders"]["net.2"])


def ranks_of(strategy: Any, rank: int = 0) -> Any:
    """A trainer as one of two ranks sees it."""
    return SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy)


def test_every_rank_searches_its_share_and_is_told_the_rest() -> None:
    layers, _ = find_layers(Tiny(), PATTERN)
    state, sent = fresh_state(layers), {}

    def choose(layer: PrunableLayer, layout: HiNMLayout | None, time_budget: float | None) -> Choice:
        return Choice(layer.matrix > 0)

    def share(*arguments: Any) -> Any:
        raise AssertionError("nothing is shared")

    sets = [[layer] for layer in layers]

    for rank in (0, 1):  # what each rank sends
        strategy = SimpleNamespace(broadcast=lambda found, src: sent.update({src: found}) if found else None)
        search_layers(sets, share, choose, state, "magnitude", ranks_of(strategy, rank), None)
    assert sent.keys() == {0, 1}
    strategy = SimpleNamespace(broadcast=lambda found, src: sent[src])
    for rank in (0, 1):  # what each rank gets
        found = search_layers(sets, share, choose, state, "magnitude", ranks_of(strategy, rank), None)
        assert found == {"net.0": sent[0], "net.2": sent[1]}


def test_one_rank_searches_the_whole_of_a_set_and_goes_on_from_its_layouts() -> None:
    layers, _ = find_layers(Stream(), PATTERN)
    sets, state, asked = [layers[:2], layers[2:]], fresh_state(layers), []
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))

    def share(together: Any, scores: Any, time_budget: float | None) -> Any:
        asked.append([layer.name for layer in together])
        assert all(torch.equal(score, layer.matrix.abs()) for score, layer in zip(scores, together, strict=True))
        return [search(score, PATTERN, method="identity", output_order=order) for score in scores]

    def choose(layer: PrunableLayer, layout: HiNMLayout | None, time_budget: float | None) -> Choice:
        asked.append((layer.name, layout is not None and torch.equal(layout.output_order, order)))
        return Choice(layer.matrix > 0, layout)

    sent: dict[str, Any] = {}
    strategy = SimpleNamespace(broadcast=lambda found, src: found)
    for rank, expected in enumerate(
        [[["net.0", "net.2"], ("net.0", True), ("net.2", True)], [("net.4", False)]],
    ):
        asked.clear()
        found = search_layers(sets, share, choose, state, "magnitude", ranks_of(strategy, rank), None)
        assert asked == expected
        sent |= {name: one for name, one in found.items() if one is not None}
    assert list(sent) == ["net.0", "net.2", "net.4"]
    sizes = [layer.weight.numel() for layer in layers[:2]]
    assert sent["net.0"].seconds / sent["net.2"].seconds == pytest.approx(sizes[0] / sizes[1])


def test_sums_of_ranks_become_their_mean_also_where_one_rank_has_none() -> None:
    layers, _ = find_layers(Tiny(), PATTERN)
    state = fresh_state(layers)
    state.sums = {"net.0": torch.full((24, 16), 4.0)}
    other = {(24, 16): torch.full((24, 16), 2.0), (10, 24): torch.full((10, 24), 1.0)}  # of the other rank
    strategy = SimpleNamespace(reduce=lambda own, reduce_op: (own + other[tuple(own.shape)]) / 2)
    settle_saliency_(state, layers, "taylor", ranks_of(strategy))
    assert (saliency_of(state, layers[0], "taylor") == 3).all()
    assert (saliency_of(state, layers[1], "taylor") == 0.5).all()


def test_ranks_update_together_or_not_at_all() -> None:
    callback, asked = pruning_of(schedule=ONE_SHOT, saliency_steps=1), []

    class Doubtful(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            def reduce(decision: bool, all: bool = True) -> bool:
                asked.append(decision)
                return decision and len(asked) > 3  # another rank has not summed enough yet

            trainer.strategy.reduce_boolean_decision = reduce  # type: ignore[method-assign]

    masked: list[bool] = []
    fit(callback, Doubtful(), Watch(lambda *_: masked.append(bool(callback.masks))))
    assert masked[:5] == [False, False, False, True, True]
    assert asked == [True] * 4


def test_a_step_with_a_non_finite_gradient_is_not_summed() -> None:
    model, callback = Tiny(), pruning_of()
    layers = find_layers(model, PATTERN)[0]
    for layer in layers:
        layer.weight.grad = torch.ones_like(layer.weight)
    model.head.bias.grad = torch.zeros(2)
    optimizer = model.configure_optimizers()
    gather_taylor_(callback._state, layers, optimizer)
    model.head.bias.grad[0] = float("inf")  # GradScaler looks at all gradients
    gather_taylor_(callback._state, layers, optimizer)
    assert callback._state.steps == {"net.0": 1, "net.2": 1}
    assert torch.equal(callback._state.sums["net.0"], model.net[0].weight.detach().abs())


def test_the_retained_saliency_of_several_updates_is_that_of_the_last_mask() -> None:
    given = {"net.0": torch.rand(24, 16), "net.2": torch.rand(10, 24)}
    callback = pruning_of(saliency=given)
    fit(callback)
    for entry in callback.report.pruned:
        assert entry.retained == pytest.approx(retained(given[entry.name], callback.masks[entry.name]))
        assert callback.layouts[entry.name].retained == entry.retained


def test_a_long_search_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_set_gets_the_budget_of_all_its_layers_and_each_says_that_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[float] = []

    def short(*args: Any, time_budget: float, **settings: Any) -> Any:
        budgets.append(time_budget)
        return search_shared(*args, time_budget=0.0, **settings)

    monkeypatch.setattr(update, "search_shared", short)
    callback = pruning_of(
        method="exchange", schedule=ONE_SHOT, saliency="magnitude", time_budget=100.0, shared_orders=SETS
    )
    fit(callback, model=Stream())
    assert budgets == [pytest.approx(100 * (384 + 576) / (384 + 576 + 240), rel=0.01)]
    assert [entry.ended_by_budget for entry in callback.report.pruned] == [True, True, False]
