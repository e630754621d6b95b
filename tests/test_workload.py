"""One call of a pruned layer, timed: no test here depends on which of its two paths is faster."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_hinm import HiNMPattern, prune, to_hinm
from lightning_hinm.ops import hinm_conv2d, hinm_linear
from lightning_hinm.workload import Workload, _calls, measure, measuring_anew, workload_of
from tests.test_plan import Net

PATTERN = HiNMPattern(vector_size=8)
CPU = torch.device("cpu")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    prune(model, PATTERN, method="identity")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv1", "conv2"])
def test_every_kind_of_layer_can_be_timed(net: Net, name: str, dtype: torch.dtype) -> None:
    workload = workload_of(net.get_submodule(name).to(dtype))
    assert workload.dtype == dtype
    assert all(seconds > 0 for seconds in measure(workload))
    assert measure(workload) == measure(workload)  # once in a process


def test_a_layer_is_timed_in_the_storage_and_the_order_that_a_graph_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def record(x: torch.Tensor, *operands: Any) -> torch.Tensor:
        seen.append((x.stride(1) != 1, operands[-1], operands[8].numel() > 0))  # operands[8]: restore
        return hinm_linear(x, *operands)

    monkeypatch.setattr("lightning_hinm.workload.hinm_linear", record)
    for flags in itertools.product([False, True], repeat=3):
        reads, writes, restored = flags
        storage = {"restored": restored, "feature_major": reads, "feature_major_out": writes}
        measure(Workload((24, 20), PATTERN, (3, 20), torch.float32, CPU, **storage))
        assert seen.pop() == flags


def test_both_sides_are_timed_with_the_activation_that_follows() -> None:
    image = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    for shape, x, spatial in (((24, 20), (3, 20), {}), ((24, 20, 1, 1), (2, 20, 3, 3), image)):
        workload = Workload(shape, PATTERN, x, torch.float32, CPU, **spatial)  # type: ignore[arg-type]
        plain, activated = (
            [call() for call in _calls(each)] for each in (workload, replace(workload, activation="relu"))
        )
        for before, after in zip(plain, activated, strict=True):
            torch.testing.assert_close(after, before.relu())
            assert (before < 0).any()


@pytest.mark.parametrize("last", [False, True])
def test_both_sides_are_timed_on_images_as_they_lie(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    for name, function in (("hinm_conv2d", hinm_conv2d), ("F.conv2d", F.conv2d)):

        def record(x: torch.Tensor, *operands: Any, function: Any = function) -> torch.Tensor:
            out = function(x, *operands)
            seen.extend(each.is_contiguous(memory_format=torch.channels_last) for each in (x, out))
            return out

        monkeypatch.setattr(f"lightning_hinm.workload.{name}", record)
    measure(
        Workload((24, 20, 1, 1), PATTERN, (2, 20, 3, 3), torch.float32, CPU, (1, 1), (0, 0), (1, 1), channels_last=last)
    )
    assert seen
    assert set(seen) == {last}


def test_what_else_the_machine_does_now_and_then_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.cycle((2.0, 9.0, 8.0, 1.0, 9.0, 9.0))  # dense, sparse, dense, ...
    monkeypatch.setattr("lightning_hinm.workload._seconds", lambda call, device: next(seconds))
    assert measure(Workload((24, 20), PATTERN, (5, 20), torch.float32, CPU)) == (2.0, 1.0)


def test_a_measurement_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    measure(Workload((24, 20), PATTERN, (3, 20), torch.float32, CPU))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["linear", "conv1", "conv2"])
def test_a_packed_layer_has_the_workload_of_the_dense_one(net: Net, name: str) -> None:
    converted = to_hinm(net)
    assert workload_of(net.get_submodule(name)) == workload_of(converted.get_submodule(name))


def test_a_conv1d_is_timed_as_a_conv2d_over_images_of_height_1(net: Net) -> None:
    workload = workload_of(net.conv1, (5, 8, 20))
    assert (workload.shape, workload.input_shape) == ((16, 4, 1, 3), (5, 8, 1, 20))
    assert (workload.stride, workload.padding, workload.dilation, workload.groups) == ((1, 1), (0, 1), (1, 1), 2)


def test_a_layer_without_a_layout_has_no_workload() -> None:
    with pytest.raises(ValueError, match="Linear: has no layout"):
        workload_of(nn.Linear(8, 8))


def test_a_workload_is_measured_once_in_a_process_and_once_inside_measuring_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = itertools.count(1.0)
    monkeypatch.setattr("lightning_hinm.workload._take_turns", lambda workload: (next(times), 0.0))
    workload = Workload((24, 20), PATTERN, (7, 20), torch.float32, CPU)
    assert [measure(workload)[0], measure(workload)[0]] == [1.0, 1.0]
    for found in (2.0, 3.0):
        with measuring_anew():
            assert measure(workload)[0] == found
            with measuring_anew():
                assert measure(workload)[0] == found, "the outer one holds"
        assert measure(workload)[0] == found, "what was measured last counts"
