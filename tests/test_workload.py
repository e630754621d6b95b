"""One call of a pruned layer, timed: no test here depends on which of its two paths is faster."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from lightning_hinm import HiNMPattern, prune, to_hinm
from lightning_hinm.ops import hinm_conv2d, hinm_linear
from lightning_hinm.workload import CAPTURED, LEAST, Workload, _calls, _capture, measure, measuring_anew, workload_of
from tests.test_plan import Net

PATTERN = HiNMPattern(vector_size=8)
CPU = torch.device("cpu")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    prune(model, PATTERN, method="identity")
    return model


def replayed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds for a model on a GPU holds here."""

    def on_gpu(module: nn.Module, *shape: Any, replayed: bool) -> Workload:
        return replace(workload_of(module, *shape), replayed=replayed)

    for user in ("backend", "explain"):
        monkeypatch.setattr(import_module(f"lightning_hinm.{user}"), "workload_of", on_gpu)


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


def test_what_is_replayed_is_timed_so_and_apart_from_what_python_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Workload((24, 20), PATTERN, (6, 20), torch.float32, CPU)
    captured: list[Any] = []

    def capture(call: Any, device: torch.device) -> tuple[Any, int]:
        captured.append(call)
        return call, 4

    monkeypatch.setattr("lightning_hinm.workload._capture", capture)
    monkeypatch.setattr("lightning_hinm.workload._seconds", lambda call, device: 8.0 if call in captured else 3.0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=0))
    for _ in range(2):
        assert measure(launched) == (3.0, 3.0)
        assert measure(replace(launched, replayed=True)) == (2.0, 2.0)
    assert len(captured) == 2, "the dense call and the sparse one, once in a process"


def test_calls_in_a_graph_meet_a_weight_that_the_cache_has_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload((24, 20), PATTERN, (6, 20), torch.float32, CPU, replayed=True)
    size, seen = 24 * 20 * 4, list[int]()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=size))
    monkeypatch.setattr("lightning_hinm.workload.F.linear", lambda x, weight, bias: seen.append(weight.data_ptr()) or x)
    dense, sparse = _calls(workload)
    for _ in range(6):
        dense()
    assert seen[:2] == seen[2:4] == seen[4:]
    assert len(set(seen)) == 2, "two of them, so that together they are twice what the cache holds"
    monkeypatch.undo()
    assert len({tuple(sparse().flatten().tolist()) for _ in range(3)}) == 1, "copies of one weight"


def test_a_call_is_warmed_up_beside_a_capture_and_repeated_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def entered(name: str) -> Iterator[None]:
        seen.append(f"enter {name}")
        yield
        seen.append(f"leave {name}")

    def seconds(call: Any, device: torch.device) -> float:
        call()
        return CAPTURED / 1.5

    side, graph = mock.Mock(), mock.Mock()
    monkeypatch.setattr("lightning_hinm.workload._side_stream", lambda device: side)
    monkeypatch.setattr("lightning_hinm.workload._seconds", seconds)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current stream")
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered("device"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered("stream" if stream is side else "another"))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, stream, **__: entered("graph" if stream is side else "another"))
    run, count = _capture(lambda: seen.append("call"), torch.device("cuda", 0))
    warm_up, pass_ = ["enter stream", *["call"] * LEAST, "leave stream"], ["enter graph", "call", "call", "leave graph"]
    assert (seen, count) == (["enter device", *warm_up, *pass_, "leave device"], 2)
    side.wait_stream.assert_called_once_with("the current stream")
    run()
    graph.replay.assert_called_once_with()
    assert seen.count("call") == LEAST + count, "a replay calls no Python"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 1, 1)])
def test_layers_are_timed_in_cuda_graphs_on_a_gpu(shape: tuple[int, ...]) -> None:
    image: Any = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} if len(shape) == 4 else {}
    x = (4, 64, 3, 3) if len(shape) == 4 else (4, 64)
    workload = Workload(shape, HiNMPattern(32), x, torch.float16, torch.device("cuda", 0), **image)
    for each in (workload, replace(workload, replayed=True)):
        assert all(0 < seconds < 1 for seconds in measure(each))


def test_a_measurement_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    measure(Workload((24, 20), PATTERN, (3, 20), torch.float32, CPU))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["linear", "conv1", "conv2"])
def test_a_packed_layer_has_the_workload_of_the_dense_one(net: Net, name: str) -> None:
    converted = to_hinm(net)
    assert workload_of(net.get_submodule(name)) == workload_of(converted.get_submodule(name))


def test_only_what_runs_on_a_gpu_is_replayed(net: Net) -> None:
    assert not workload_of(net.linear, replayed=True).replayed
    with FakeTensorMode():
        net.linear.weight = nn.Parameter(torch.empty(32, 16, device="cuda"))
    assert [workload_of(net.linear, replayed=replayed).replayed for replayed in (False, True)] == [False, True]


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
