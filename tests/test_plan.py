"""What runs sparse and what dense: no test here depends on which of the two is faster."""

import itertools
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hinm import HiNMPattern, prune, to_hinm
from lightning_hinm.ops import hinm_conv2d, hinm_linear
from lightning_hinm.plan import COLUMNS, Decision, LayerPlan, ModelPlan, Workload, decide, measure, workload_of

PATTERN = HiNMPattern(vector_size=8)
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(8, 16, 3, padding="same", groups=2)
        self.linear = nn.Linear(16, 32)
        self.conv2 = nn.Conv2d(1, 16, (3, 2), stride=2, padding=(1, 2))
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = self.linear(self.conv1(x).transpose(1, 2)) * scale
        return self.head(self.norm(self.drop(self.conv2(y.unsqueeze(1)))).mean(dim=3)[..., :4])


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    prune(model, PATTERN, method="identity")
    return model


def sparse_wins(monkeypatch: pytest.MonkeyPatch, *, by: float) -> None:
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda workload: (1.0, 1.0 / by))


def test_a_tie_leaves_a_layer_dense_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload((16, 16), PATTERN, (4, 16), torch.float32, CPU)
    for by, path in ((0.5, "dense"), (1.0, "dense"), (1.02, "dense"), (1.5, "sparse")):
        sparse_wins(monkeypatch, by=by)
        decision = decide(workload)
        assert decision.path == path
    assert decision.reason == "sparse 666.667 ms, dense 1000.000 ms on 4x16"


def test_all_calls_of_a_layer_are_decided_together(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (Workload((16, 16), PATTERN, (tokens, 16), torch.float32, CPU) for tokens in (4, 9))
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda workload: (1.0, 2.0) if workload is few else (3.0, 1.0))
    assert [decide(few).path, decide(many).path, decide(few, many).path] == ["dense", "sparse", "sparse"]
    decision = decide(few, few, many)
    assert (decision.path, decision.dense_seconds, decision.sparse_seconds) == ("dense", 5.0, 5.0)
    assert decision.calls == "2 calls of 4x16, 9x16"


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

    monkeypatch.setattr("lightning_hinm.plan.hinm_linear", record)
    for flags in itertools.product([False, True], repeat=3):
        reads, writes, restored = flags
        storage = {"restored": restored, "feature_major": reads, "feature_major_out": writes}
        measure(Workload((24, 20), PATTERN, (3, 20), torch.float32, CPU, **storage))
        assert seen.pop() == flags


@pytest.mark.parametrize("last", [False, True])
def test_both_sides_are_timed_on_images_as_they_lie(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    for name, function in (("hinm_conv2d", hinm_conv2d), ("F.conv2d", F.conv2d)):

        def record(x: torch.Tensor, *operands: Any, function: Any = function) -> torch.Tensor:
            out = function(x, *operands)
            seen.extend(each.is_contiguous(memory_format=torch.channels_last) for each in (x, out))
            return out

        monkeypatch.setattr(f"lightning_hinm.plan.{name}", record)
    measure(
        Workload((24, 20, 1, 1), PATTERN, (2, 20, 3, 3), torch.float32, CPU, (1, 1), (0, 0), (1, 1), channels_last=last)
    )
    assert seen
    assert set(seen) == {last}


def test_what_else_the_machine_does_now_and_then_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.cycle((2.0, 9.0, 8.0, 1.0, 9.0, 9.0))  # dense, sparse, dense, ...
    monkeypatch.setattr("lightning_hinm.plan._seconds", lambda call, device: next(seconds))
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


def layer(path: str, measured: float | None, **given: Any) -> LayerPlan:
    """A layer that takes 4 s dense and 1 s sparse, alone."""
    decision = Decision(path, "4x16", 4.0, 1.0)
    facts: dict[str, Any] = {"decision": decision, "measured_seconds": measured} | given
    return LayerPlan("name", "linear", (16, 16), PATTERN, path, "why", 1024, 512, **facts)


def test_amdahls_law_counts_only_layers_that_change_their_path() -> None:
    plan = ModelPlan((layer("sparse", 5.0), layer("dense", 3.0), layer("dense", None)), seconds=10.0)
    assert plan.share == 0.8
    assert plan.speedup == 10 / (10 - 5 + 1)  # alone, the dense layer took 4 s, not 3: that is no gain and no loss
    assert plan.limit == 10 / 5
    assert "One forward takes 10000.000 ms, 80.0% of it" in str(plan)
    packed = ModelPlan((layer("sparse", 5.0, converted=True),), seconds=10.0)
    assert (packed.speedup, packed.limit) == (1.0, 2.0)


def test_without_times_nothing_is_said_of_the_whole_model() -> None:
    plan = ModelPlan((layer("sparse", None),))
    assert (plan.seconds, plan.share, plan.speedup, plan.limit) == (None, None, None, None)
    assert "forward" not in str(plan)


@pytest.mark.parametrize(
    ("pattern", "kind", "shape", "expected"),
    [
        (HiNMPattern(), "linear", (64, 1024), "64 x 75.0% x 2:4"),
        (HiNMPattern(), "linear", (64, 1028), "64 x 75.0% x 2:4, window 256"),
        (HiNMPattern(), "hf_conv1d", (1028, 64), "64 x 75.0% x 2:4, window 256"),
        (HiNMPattern(window=None), "linear", (64, 1028), "64 x 75.0% x 2:4"),
        (HiNMPattern(32, 0.75), "conv2d", (64, 200, 3, 3), "32 x 87.5% x 2:4, window 256"),
        (None, "linear", (64, 64), "-"),
    ],
)
def test_a_pattern_is_short_and_names_its_window_only_where_it_cuts(
    pattern: HiNMPattern | None, kind: str, shape: tuple[int, ...], expected: str
) -> None:
    plan = LayerPlan("name", kind, shape, pattern, "dense", "why", 4, 2)
    assert plan.row[COLUMNS.index("pattern")] == expected


def test_a_plan_is_data_for_json() -> None:
    plan = ModelPlan((layer("sparse", 5.0, retained=0.5, order="in order", calls=2),), seconds=10.0, notes=("a note",))
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert (data["bytes"], data["dense_bytes"], data["seconds"], data["notes"]) == (512, 1024, 10.0, ["a note"])
    (found,) = data["layers"]
    assert found["pattern"] == PATTERN.to_dict()
    assert (found["retained"], found["order"], found["calls"]) == (0.5, "in order", 2)
    assert (found["predicted_seconds"], found["decision"]["dense_seconds"], found["kernel"]) == (1.0, 4.0, None)
