"""What runs sparse and what dense: no test here depends on which of the two is faster."""

import pytest
import torch
from torch import Tensor, nn

from lightning_hinm import HiNMPattern, explain, prune, to_hinm
from lightning_hinm.plan import Workload, decide, measure, workload_of

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv1", "conv2"])
def test_every_kind_of_layer_can_be_timed(net: Net, name: str, dtype: torch.dtype) -> None:
    workload = workload_of(net.get_submodule(name).to(dtype))
    assert workload.dtype == dtype
    assert all(seconds > 0 for seconds in measure(workload))
    assert measure(workload) == measure(workload)  # once in a process


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


@pytest.mark.parametrize("converted", [False, True])
def test_explain_lists_every_layer_with_path_reason_bytes_and_times(
    net: Net, converted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse_wins(monkeypatch, by=2.0)
    model = to_hinm(net) if converted else net
    plan = explain(model)
    assert [layer.name for layer in plan.layers] == ["conv1", "linear", "conv2", "head"]
    assert [layer.path for layer in plan.layers] == ["sparse"] * 3 + ["dense"]
    linear, head = plan.layers[1], plan.layers[3]
    assert (linear.shape, linear.pattern, linear.dense_bytes) == ((32, 16), PATTERN, 32 * 16 * 4)
    packed = to_hinm(net).linear
    assert linear.bytes == packed.packed.nbytes + sum(tensor.nbytes for tensor in packed.expanded.values())
    assert (linear.predicted_seconds, linear.measured_seconds) == (0.5, None)
    assert "sparse 500.000 ms, dense 1000.000 ms on 128x16" in linear.reason
    assert (head.reason, head.bytes, head.predicted_seconds) == ("no layout", head.dense_bytes, None)
    table = str(plan).splitlines()
    assert len(table) == 6
    assert table[0].split()[:4] == ["layer", "kind", "shape", "path"]
    assert "no layout" in table[4]


def test_explain_times_the_layers_in_the_model_on_the_inputs_given(net: Net) -> None:
    net.train()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan = explain(net, torch.randn(5, 8, 10), scale=2.0)
    assert all(layer.measured_seconds is not None and layer.measured_seconds > 0 for layer in plan.layers)
    assert "on 5x8x1x10" in plan.layers[0].reason
    assert "on 5x10x16" in plan.layers[1].reason
    assert net.training
    assert net.norm.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_explain_keeps_a_losing_layer_dense_with_its_bytes(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch, by=0.5)
    for layer in explain(net).layers[:3]:
        assert layer.path == "dense"
        assert layer.bytes == layer.dense_bytes
        assert layer.predicted_seconds == 1.0


def test_explain_says_which_weights_left_their_pattern(net: Net) -> None:
    with torch.no_grad():
        net.linear.weight.add_(1)
    (layer,) = [layer for layer in explain(net).layers if layer.name == "linear"]
    assert layer.path == "dense"
    assert "weights are not zero outside the pattern" in layer.reason
