"""What is said about a model is what becomes of it: no test here depends on which of two is faster."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_hinm.backend
from lightning_hinm import HiNMPattern, explain, prune, to_hinm
from lightning_hinm.kernels import host
from lightning_hinm.layout import is_in_order
from lightning_hinm.ops import hinm_linear
from lightning_hinm.passes.sparsify import operand
from lightning_hinm.plan import LayerPlan, ModelPlan
from lightning_hinm.prune import layout_of
from lightning_hinm.workload import Workload
from tests.graphs import set_orders
from tests.test_plan import Net
from tests.test_workload import replayed_everywhere

pytestmark = pytest.mark.usefixtures("fresh_compiler")
PATTERN = HiNMPattern(vector_size=8)
ROOT = Path(__file__).parents[1]
X = torch.randn(5, 8, 10, generator=torch.Generator().manual_seed(0))


def pruned(model: nn.Module) -> Any:
    set_orders(model, PATTERN)
    return model.eval()


@pytest.fixture
def net() -> Net:
    prune(model := Net(), PATTERN, method="identity")
    return model.eval()


def sparse_wins(monkeypatch: pytest.MonkeyPatch, *, by: float = 2.0) -> None:
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda workload: (1.0, 1.0 / by))


def by_name(plan: ModelPlan) -> dict[str, LayerPlan]:
    return {layer.name: layer for layer in plan.layers}


def orders(plan: ModelPlan) -> dict[str, str | None]:
    return {layer.name: layer.order for layer in plan.layers if layer.path == "sparse"}


# ------------------------------------------------------------------------------------------------------------- decided


@pytest.mark.parametrize("converted", [False, True])
def test_every_layer_is_listed_with_path_reason_bytes_and_times(
    net: Net, converted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse_wins(monkeypatch)
    plan = explain(to_hinm(net) if converted else net)
    assert [layer.name for layer in plan.layers] == ["conv1", "linear", "conv2", "head"]
    assert [layer.path for layer in plan.layers] == ["sparse"] * 3 + ["dense"]
    linear, head = plan.layers[1], plan.layers[3]
    assert (linear.shape, linear.pattern, linear.dense_bytes) == ((32, 16), PATTERN, 32 * 16 * 4)
    packed = to_hinm(net).linear
    assert linear.bytes == packed.packed.nbytes + sum(tensor.nbytes for tensor in packed.expanded.values())
    assert (linear.predicted_seconds, linear.measured_seconds, linear.calls) == (0.5, None, None)
    assert "sparse is 2.00 times as fast on 128x16" in linear.reason
    assert (head.reason, head.bytes, head.predicted_seconds) == ("no layout", head.dense_bytes, None)
    table = str(plan).splitlines()
    assert len(table) == 6
    assert table[0].split()[:4] == ["layer", "kind", "shape", "pattern"]
    assert "no layout" in table[4]
    assert table[5].split() == ["total", f"{plan.dense_bytes:,}", f"{plan.bytes:,}"]


def test_the_product_that_runs_a_layer_on_the_cpu_is_named(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    assert [layer.kernel for layer in explain(net).layers] == ["compiled"] * 3 + [None]
    monkeypatch.setenv(host.SWITCH, "off")
    assert [layer.kernel for layer in explain(net).layers] == ["torch"] * 3 + [None]
    sparse_wins(monkeypatch, by=0.5)
    assert [layer.kernel for layer in explain(net).layers] == [None] * 4


def test_times_are_measured_there_and_then_and_the_backend_takes_them_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Workload] = []

    def take_turns(workload: Workload) -> tuple[float, float]:
        asked.append(workload)
        return float(len(asked)), 1e-3

    monkeypatch.setattr("lightning_hinm.workload._take_turns", take_turns)
    model, x = pruned(nn.Sequential(nn.Linear(16, 24))), torch.randn(3, 16)
    first, second = (explain(model, x).layers[0].decision for _ in range(2))
    assert first is not None
    assert second is not None
    assert len(set(asked)) == 1, "alone and in its graph, the layer is called alike"
    assert (first.dense_seconds, second.dense_seconds) == (1.0, 2.0)
    with torch.inference_mode():
        torch.compile(model, backend="hinm", options={"inner": "eager"})(x)
    assert len(asked) == 2


@pytest.mark.parametrize("inputs", [(), (torch.ones(3, 16),)], ids=["alone", "traced"])
@pytest.mark.parametrize("converted", [False, True])
def test_times_are_those_of_cuda_graphs_where_inductor_is_configured_for_them(
    converted: bool, inputs: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed_everywhere(monkeypatch)
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda workload: (2.0, 1.0 if workload.replayed else 4.0))
    model = pruned(nn.Sequential(nn.Linear(16, 24)))
    model = to_hinm(model) if converted else model
    for configured, ending in ((False, "16"), (True, "16 in a CUDA graph"), (False, "16")):
        with torch._inductor.config.patch({"triton.cudagraphs": configured}):
            (layer,) = explain(model, *inputs).layers
        assert layer.path == ("sparse" if configured or converted else "dense")
        assert layer.decision is not None
        assert layer.decision.sparse_seconds == (1.0 if configured else 4.0)
        assert layer.decision.calls.endswith(ending)


def test_a_layer_with_a_forward_of_its_own_is_listed_as_dense(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    plan = explain(nn.Sequential(Doubled(16, 8)), torch.randn(2, 16))
    (layer,) = plan.layers
    assert (layer.name, layer.kind, layer.path, layer.shape) == ("0", "linear", "dense", (8, 16))
    assert layer.reason == "Doubled has a forward of its own"
    assert layer.calls == 1


def test_a_losing_layer_stays_dense_with_its_bytes(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch, by=0.5)
    for layer in explain(net).layers[:3]:
        assert layer.path == "dense"
        assert layer.bytes == layer.dense_bytes
        assert layer.predicted_seconds == 1.0
        assert layer.order is None


def test_weights_that_left_their_pattern_are_named(net: Net) -> None:
    with torch.no_grad():
        net.linear.weight.add_(1)
    layer = by_name(explain(net))["linear"]
    assert layer.path == "dense"
    assert "weights are not zero outside the pattern" in layer.reason


def test_what_a_layout_retained_is_shown_where_it_is_known(net: Net) -> None:
    layout = layout_of(net.linear)
    assert layout is not None

    object.__setattr__(layout, "retained", 0.75)
    assert by_name(explain(net))["linear"].retained == 0.75
    assert "0.7500" in str(explain(net))


def test_a_tied_weight_counts_its_bytes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    pruned(model)
    for each in (model, to_hinm(model)):
        first, second = explain(each).layers
        assert (first.dense_bytes, second.dense_bytes, second.bytes) == (16 * 16 * 4, 0, 0)
        assert first.bytes > 0
        assert "shares the weight of 0" in second.reason


# --------------------------------------------------------------------------------------------------------------- timed


def test_layers_are_timed_in_the_model_on_the_inputs_given(net: Net) -> None:
    net.train()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan = explain(net, X, scale=2.0)
    assert all(layer.measured_seconds is not None and layer.measured_seconds > 0 for layer in plan.layers)
    assert "on 5x8x1x10" in plan.layers[0].reason
    assert "on 5x10x16" in plan.layers[1].reason
    assert net.training
    assert net.norm.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert plan.seconds is not None
    assert sum(layer.measured_seconds or 0 for layer in plan.layers) < plan.seconds
    assert "One forward takes" in str(plan)


class Twice(nn.Module):
    """Calls one layer twice, by keyword too, another never."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.never = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(input=torch.softmax(self.again(x), dim=-1)[:1])


def test_every_call_of_a_layer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    again, never = explain(pruned(Twice()), torch.randn(3, 16)).layers
    assert (again.calls, again.predicted_seconds) == (2, 1.0)
    assert "on 3x16, 1x16" in again.reason
    assert (never.calls, never.measured_seconds) == (0, None)
    assert never.reason.startswith("never called on these inputs; ")


class Borrowed(nn.Module):
    """Reads the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


def test_a_layer_whose_weight_is_read_without_a_call_of_it_is_decided_on_what_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sparse_wins(monkeypatch)
    (layer,) = explain(pruned(Borrowed()), torch.randn(3, 16)).layers
    assert layer.reason.startswith("its weight is read without calling it; sparse is")
    assert layer.reason.endswith("on 3x16")
    assert (layer.path, layer.calls, layer.measured_seconds) == ("sparse", 0, None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_transformer_encoder_is_explained_with_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    model = pruned(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plan = explain(model, torch.randn(2, 5, 32), src_key_padding_mask=padding)
    first, second = orders(plan).items()
    assert first == ("layers.0.linear1", "absorbed by layers.0.linear2")
    assert str(second[1]).startswith("restored: ")
    assert torch.backends.mha.get_fastpath_enabled()


# -------------------------------------------------------------------------------------------------------------- traced


def mlp() -> Any:
    return pruned(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 4)))


def test_orders_are_absorbed_or_restored_for_a_reader_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    plan = explain(mlp(), torch.randn(3, 16))
    assert plan.notes == ()
    assert orders(plan) == {"0": "absorbed by 2", "2": "absorbed by 3", "3": "restored: 4 is dense"}
    assert "absorbed by 2" in str(plan)


def test_the_fate_of_an_order_is_what_the_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    model, x, graphs = mlp(), torch.randn(3, 16), []
    absorb = lightning_hinm.backend.absorb_orders_pass
    monkeypatch.setattr("lightning_hinm.backend.absorb_orders_pass", lambda gm: graphs.append(absorb(gm)) or graphs[-1])
    with torch.inference_mode():
        torch.compile(model, backend="hinm", options={"inner": "eager"})(x)
    trial, gm = graphs  # on which the layers were decided, and which runs
    assert [node.target for node in trial.graph.nodes] == [node.target for node in gm.graph.nodes]
    ops = [node for node in gm.graph.nodes if node.target is hinm_linear]
    restored = [not is_in_order(getattr(gm, operand(node, "output_order").target)) for node in ops]
    assert restored == [False, False, True]
    assert [str(order).startswith("restored") for order in orders(explain(model, x)).values()] == restored


def sparse_wins_where(monkeypatch: pytest.MonkeyPatch, wins: Callable[[Workload], bool]) -> None:
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda workload: (1.0, 0.5 if wins(workload) else 1.05))


@pytest.mark.parametrize("name", ["restored", "feature_major", "feature_major_out"])
def test_what_decides_is_a_layer_as_its_graph_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins_where(monkeypatch, lambda workload: not getattr(workload, name))
    model, x, graphs = mlp(), torch.randn(3, 16), []
    absorb = lightning_hinm.backend.absorb_orders_pass
    monkeypatch.setattr("lightning_hinm.backend.absorb_orders_pass", lambda gm: graphs.append(gm) or absorb(gm))
    with torch.inference_mode():
        torch.compile(model, backend="hinm", options={"inner": "eager"})(x)
    runs = [node.target is hinm_linear for node in graphs[-1].graph.nodes if node.target in (hinm_linear, F.linear)]
    plan = explain(model, x)
    assert [layer.path == "sparse" for layer in plan.layers] == [*runs[:3], False]
    assert (
        runs[:3]
        == {
            "restored": [True, True, False],
            "feature_major": [True, False, False],
            "feature_major_out": [False, False, True],
        }[name]
    )


def test_calls_that_no_graph_has_are_decided_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins_where(monkeypatch, lambda workload: not workload.restored)
    plan = explain(pruned(Untraceable()), torch.randn(3, 16))
    assert [layer.path for layer in plan.layers] == ["dense", "dense"]


def test_tied_layers_run_as_their_graph_decides_on_all_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins_where(monkeypatch, lambda workload: workload.input_shape[0] > 1)
    model = Twice()
    model.never = nn.Linear(16, 16)
    model.never.weight = model.again.weight
    model.forward = lambda x: model.again(torch.softmax(model.never(x), dim=-1)[:1])  # type: ignore[method-assign]
    first, second = explain(pruned(model), torch.randn(3, 16)).layers
    assert (first.path, second.path) == ("sparse", "sparse")
    assert (first.predicted_seconds, second.predicted_seconds) == (1.05, 0.5)


def test_calls_are_those_of_the_inputs_given_also_where_graphs_are_dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    model = pruned(Broken())
    for tokens in (3, 4, 5, 6):
        first, *_ = explain(model, torch.randn(tokens, 16)).layers
        assert first.reason == f"sparse is 2.00 times as fast on {tokens}x16"


def test_graphs_that_decide_differently_on_one_layer_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins_where(monkeypatch, lambda workload: workload.input_shape[0] > 1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            torch._dynamo.graph_break()
            return self.layer(y[:1])

    (layer,) = explain(pruned(Model()), torch.randn(3, 16)).layers
    assert (layer.path, layer.calls, layer.predicted_seconds) == ("sparse", 2, 1.55)
    assert layer.reason == "sparse is 1.29 times as fast on 3x16, 1x16; sparse in 1 of 2 graphs"


def test_rows_in_order_need_no_restoring_and_no_tracing(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    for plan in (explain(net), explain(net, X), explain(to_hinm(net))):
        assert orders(plan) == {"conv1": "in order", "linear": "in order", "conv2": "in order"}


def test_calls_of_one_layer_may_meet_different_fates(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    plan = explain(pruned(Model()), torch.randn(3, 16))
    assert orders(plan) == {"layer": "absorbed by layer; restored: the output is the result of the graph"}


class Broken(nn.Module):
    """Dynamo cannot capture it whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return torch.tanh(self.third(self.second(y)))


def test_a_model_that_is_captured_in_parts_is_explained_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    model = nn.Sequential(pruned(Broken()), pruned(Broken()))
    expected = {
        "first": "restored: the output is the result of the graph",
        "third": "restored: the output is the result of the graph",
    }
    with torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(4):
            plan = explain(model, torch.randn(3, 16))
            assert plan.notes == ()
            names = {f"{i}.{name}": order for i in (0, 1) for name, order in expected.items()}
            assert orders(plan) == names | {f"{i}.second": f"absorbed by {i}.third" for i in (0, 1)}


def test_what_the_user_compiled_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    model, x, graphs = pruned(Broken()), torch.randn(3, 16), []

    def backend(gm: Any, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend=backend)
    with torch.inference_mode():
        before = compiled(x)
    count = len(graphs)
    assert orders(explain(compiled, x)) == orders(explain(model, x))
    with torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(4):
            explain(model, x)
    with torch.inference_mode():
        assert torch.equal(compiled(x), before)
    assert len(graphs) == count == 2


def test_a_module_that_is_compiled_inside_the_model_is_seen_through(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    model = nn.Sequential(mlp(), nn.Softmax(dim=-1))
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[call-overload]
    plan = explain(model, torch.randn(3, 16))
    assert orders(plan)["0.0"] == "absorbed by 0.2"


def packed_tensors() -> list[int]:
    gc.collect()
    return [id(each) for each in gc.get_objects() if issubclass(type(each), Tensor) and each.dtype == torch.uint8]


def test_whoever_only_asks_does_not_hold_the_weights_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    model = nn.Sequential(pruned(Broken()), mlp())
    layers = [weakref.ref(module) for module in model.modules()]
    before = packed_tensors()  # of other tests
    explain(model, torch.randn(3, 16))
    assert set(packed_tensors()) <= set(before)
    del model
    gc.collect()
    assert all(layer() is None for layer in layers)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fine = nn.Linear(16, 16), nn.Linear(16, 16)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.fine(self.layer(x))


def test_what_cannot_be_traced_is_unknown_and_said_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    plan = explain(pruned(Untraceable()), torch.randn(3, 16))
    assert orders(plan) == {"layer": None, "fine": None}
    assert plan.notes == ("Order unknown of layer, fine: no call of it is in a graph that Dynamo captures.",)
    assert str(plan).endswith(plan.notes[0])
    assert "unknown" in str(plan).splitlines()[1]


def test_a_failure_of_the_tracing_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)
    model = mlp()
    with torch.no_grad():
        model[0].weight.add_(1)
    plan = explain(model, torch.randn(3, 16))
    assert by_name(plan)["0"].path == "dense"
    assert by_name(plan)["2"].path == "sparse"
    (note,) = plan.notes
    assert "could not be traced: ValueError: Nothing was compiled:\n  0: " in note


def test_a_weight_that_something_else_reads_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_wins(monkeypatch)

    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed, self.called = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(torch.matmul(x, self.mixed.weight))

    mixed, called = explain(pruned(Free()), torch.randn(3, 16)).layers
    assert (mixed.path, mixed.bytes, mixed.reason) == ("dense", mixed.dense_bytes, "matmul takes its weight by itself")
    assert (called.path, called.order) == ("sparse", "restored: the output is the result of the graph")


@pytest.mark.parametrize(
    "first",
    ["from lightning_hinm.explain import explain", pytest.param("import lightning_hinm", marks=pytest.mark.slow)],
)
def test_the_function_is_not_hidden_by_its_module(first: str) -> None:
    program = (
        f"{first}\nimport importlib, sys, lightning_hinm, lightning_hinm.explain\n"
        "module = importlib.import_module('lightning_hinm.explain')\n"
        "assert lightning_hinm.explain is module.explain\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
