"""What runs sparse and what dense: no test here depends on which of the two is faster."""

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_hinm import HiNMPattern, prune
from lightning_hinm.ops import cost
from lightning_hinm.plan import COLUMNS, Decision, LayerPlan, ModelPlan, decide, predict
from lightning_hinm.workload import Workload
from tests.ptx.device import emulated

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


def test_a_decision_for_cuda_graphs_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload((16, 16), PATTERN, (4, 16), torch.float32, CPU)
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda workload: (2.0, 1.0 if workload.replayed else 3.0))
    launched, replayed = decide(workload), decide(replace(workload, replayed=True))
    assert (launched.path, launched.calls) == ("dense", "4x16")
    assert (replayed.path, replayed.calls) == ("sparse", "4x16 in a CUDA graph")


def test_a_convolution_is_predicted_on_its_real_pixels() -> None:
    """Tokens that the gather kernel pads are no work of the dense layer, nor does anything read an image nine times."""
    pattern, cpu = HiNMPattern(32, 0.5), torch.device("cpu")
    image = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    conv = Workload((512, 512, 3, 3), pattern, (64, 512, 7, 7), torch.float16, cpu, **image)
    with emulated():
        gpu = cost.gpu_of(cpu)
        found = predict(conv)
        slow = replace(gpu, memory=1.0)
        gather = mock.patch.object(cost, "choose_kernel", lambda *call: cost.list_kernels(*call)[-1])
        with mock.patch.object(cost, "gpu_of", return_value=slow), gather:
            moved = predict(conv)
    assert found["dense"].seconds == pytest.approx(2 * 512 * 4608 * 64 * 49 / gpu.dense + gpu.launch)
    numbers = 64 * 512 * 49  # of the images that come in, and as many go out
    assert moved["dense"].seconds == pytest.approx(2 * (512 * 4608 + 2 * numbers))
    weight = 512 * 2304 * 9 // 8 + 16 * 2304 * 2
    planes = 2 * 64 * 3 * 512 * 9 * 8  # three of a channel, each of nine rows of eight; written, and read again
    assert moved["sparse"].seconds == pytest.approx(weight + 2 * 2 * numbers + 2 * planes)


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
