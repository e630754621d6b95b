"""Packed twins: made of tensors, fresh as long as those are what they were, shared between all who need them."""

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hinm import HiNMPattern, HiNMWeight, pack, unpack
from lightning_hinm.prune import layout_of
from lightning_hinm.twins import PackedTwin, repack_all, twin_of, twins_of
from tests.graphs import set_orders

PATTERN = HiNMPattern(vector_size=8)


def pruned() -> Any:
    layer = nn.Linear(16, 16)
    set_orders(layer, PATTERN, seed=int(torch.randint(1 << 30, ())))
    return layer


def twin_for(layer: Any, *others: Tensor, norm: nn.Module | None = None) -> PackedTwin:
    """Of a weight; of others too, whose sum is the bias."""
    layout = layout_of(layer)
    assert layout is not None

    def make(weight: Tensor, *rest: Tensor) -> tuple[HiNMWeight, Tensor | None]:
        return pack(weight, layout, name="0"), sum(rest, torch.zeros(16)) if rest else None

    return PackedTwin("0", [layer.weight, *others], make, kind="linear", norm=norm)


def double(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return weight.mul_(2)


def double_in_inference_mode(weight: Tensor) -> Tensor:
    with torch.inference_mode():
        return weight.mul_(2)


def move(weight: Any) -> Tensor:
    weight.data = weight.data.clone()
    return weight


@pytest.mark.parametrize("change", [double, double_in_inference_mode, move, lambda weight: nn.Parameter(weight * 2)])
def test_a_twin_is_fresh_until_a_source_changes_and_again_when_it_is_repacked(change: Any) -> None:
    layer, bias = pruned(), torch.randn(16)
    twin = twin_for(layer, bias)
    held = twin.layer.operands
    places = [None if tensor is None else tensor.data_ptr() for tensor in held]  # what a CUDA graph reads
    for which in (0, 1, 0):
        sources: list[Tensor] = [layer.weight, bias]
        assert twin.is_fresh(sources)
        changed = change(sources[which])
        sources[which] = changed
        assert not twin.is_fresh(sources)
        twin.repack(sources)
        assert twin.is_fresh(sources)
        assert torch.equal(unpack(twin.layer.packed), sources[0])
        assert torch.equal(twin.layer.bias, sources[1])  # type: ignore[arg-type]
        assert all(one is other for one, other in zip(twin.layer.operands, held, strict=True))  # in place
        assert places == [None if tensor is None else tensor.data_ptr() for tensor in held]
        layer.weight, bias = sources  # type: ignore[assignment]


def test_a_twin_of_a_norm_is_stale_when_the_norm_was_trained_though_no_version_tells() -> None:
    layer, norm, x = pruned(), nn.BatchNorm1d(16), torch.randn(4, 16)
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    twin, version = twin_for(layer, mean, norm=norm), mean._version
    assert twin.is_fresh([layer.weight, mean])
    norm.eval()(x)
    assert twin.is_fresh([layer.weight, mean])
    norm.train()(x)
    assert mean._version == version  # why the norm has to be asked
    assert not twin.is_fresh([layer.weight, mean])
    twin.repack([layer.weight, mean])
    assert twin.is_fresh([layer.weight, mean])


def test_inference_tensors_are_known_by_where_they_lie_but_never_those_of_a_norm() -> None:
    with torch.inference_mode():
        layer, norm = pruned(), nn.BatchNorm1d(16)
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    assert twin_for(layer, mean).is_fresh([layer.weight, mean])
    assert not twin_for(layer, mean, norm=norm).is_fresh([layer.weight, mean])


def test_what_needs_the_same_twin_shares_it_and_gets_it_fresh() -> None:
    layer = pruned()
    layout = layout_of(layer)
    assert layout is not None
    made = []

    def create() -> PackedTwin:
        made.append(twin_for(layer))
        return made[-1]

    one = twin_of(layout, None, [layer.weight], create)
    double(layer.weight)
    assert twin_of(layout, None, [layer.weight], create) is one
    assert torch.equal(unpack(one.layer.packed), layer.weight)
    other = twin_of(layout, "another", [layer.weight], create)
    assert other is not one
    assert set(twins_of(layout)) == {one, other}
    layer.double()
    assert twin_of(layout, None, [layer.weight], create) not in (one, other)
    assert len(made) == 3
    assert twins_of(layout_of(pruned())) == twins_of(None) == []


def test_a_twin_lives_as_long_as_whoever_runs_it_and_keeps_alive_no_source() -> None:
    layer, bias = pruned(), torch.randn(16)
    layout = layout_of(layer)
    assert layout is not None
    twin = twin_of(layout, None, [layer.weight, bias], functools.partial(twin_for, layer, bias))
    assert all(one is other for one, other in zip(twin.sources, (layer.weight, bias), strict=True))
    source = weakref.ref(bias)
    del bias
    gc.collect()
    assert source() is None
    assert twin.sources[1] is None
    alive = weakref.ref(twin)
    del twin
    gc.collect()
    assert alive() is None
    assert twins_of(layout) == []


def test_what_cannot_be_packed_any_more_is_refused_together() -> None:
    layers = [pruned() for _ in range(3)]
    twins = [twin_for(layer) for layer in layers]
    with torch.no_grad():
        for layer in layers[:2]:
            layer.weight.add_(1)
        layers[2].weight.mul_(2)
    with pytest.raises(ValueError, match=r"(?s)cannot be packed any more:\n  0: \d+ of 256 .*\n  0: \d+ of 256 "):
        repack_all([(twin, [layer.weight]) for twin, layer in zip(twins, layers, strict=True)])
    assert torch.equal(unpack(twins[2].layer.packed), layers[2].weight)
    assert not twins[0].is_fresh([layers[0].weight])
