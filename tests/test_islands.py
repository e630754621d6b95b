"""Feature-major storage between sparse layers, on the graphs that Dynamo hands over."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lightning_hinm import HiNMPattern, prune
from lightning_hinm.ops import cost, hinm_linear
from lightning_hinm.ops.cost import Call, Choice
from lightning_hinm.passes import (
    absorb_orders_pass,
    contexts_of,
    feature_major_islands_pass,
    fuse_activations_pass,
    sparsify_layers_pass,
)
from lightning_hinm.passes.sparsify import operand
from tests.graphs import Chain, capture, packed_by_name, result, set_orders, sparse_graph
from tests.ptx.device import emulated

TOKENS = torch.randn(3, 5, 32)


def mlp(hidden: int = 64) -> list[nn.Module]:
    return [nn.Linear(32, hidden), nn.Linear(hidden, 48)]


Case = tuple[list[nn.Module], Callable[..., Tensor]]

# what lies between layers, and whether each layer writes feature-major
ISLANDS: dict[str, tuple[Case, list[bool]]] = {
    "straight": ((mlp(), lambda x, a, b: b(a(x))), [True, False]),
    "gelu": ((mlp(), lambda x, a, b: b(F.gelu(a(x)))), [True, False]),
    "in place": ((mlp(), lambda x, a, b: b(F.relu(a(x), inplace=True))), [True, False]),
    "scaled": ((mlp(), lambda x, a, b: b(a(x) * 2.0 + torch.arange(64.0))), [True, False]),
    "flattened": ((mlp(), lambda x, a, b: b(a(x).view(-1, 64)).view(3, 5, 48)), [True, False]),
    "three": (([*mlp(), nn.Linear(48, 16)], lambda x, a, b, c: c(b(a(x).relu()).relu())), [True, True, False]),
    "two readers": (([*mlp(), nn.Linear(64, 16)], lambda x, a, b, c: b(y := a(x)).sum() + c(y)), [True, False, False]),
    "swiglu": (([*mlp(), nn.Linear(32, 64)], lambda x, a, b, c: b(F.silu(a(x)) * c(x))), [True, True, False]),
    "itself": (([nn.Linear(32, 32)], lambda x, a: a(a(x).relu())), [True, False]),
    "result": ((mlp(), lambda x, a, b: b(y := a(x)).sum() + y), [False, False]),
    "residual": (([nn.Linear(32, 32), nn.Linear(32, 32)], lambda x, a, b: b(a(x) + x)), [False, False]),
    "residual first": (([nn.Linear(32, 32), nn.Linear(32, 32)], lambda x, a, b: b(x + a(x))), [False, False]),
    "half": (([*mlp(), nn.Linear(32, 64)], lambda x, a, b, c: b(a(x) * c(x).softmax(-1))), [False, False, False]),
    "layer norm": ((mlp(), lambda x, a, b: b(F.layer_norm(a(x), (64,)))), [False, False]),
    "contiguous": ((mlp(), lambda x, a, b: b(a(x).contiguous())), [False, False]),
    "transposed": ((mlp(32), lambda x, a, b: b(a(x).transpose(0, 1))), [False, False]),
    "other rows": ((mlp(), lambda x, a, b: b(a(x).view(3, 10, 32).repeat(1, 1, 2))), [False, False]),
    "heads": ((mlp(), lambda x, a, b: b(a(x).view(3, 5, 4, 16).relu().flatten(2))), [False, False]),
    "dense reader": (([nn.Linear(32, 64), nn.Linear(64, 4)], lambda x, a, b: b(a(x))), [False]),
}


def chain(layers: list[nn.Module], function: Callable[..., Tensor]) -> tuple[fx.GraphModule, list[Any]]:
    """The sparsified graph of layers in random orders, and its inputs."""
    model = Chain(layers, function)
    set_orders(model, HiNMPattern(8, window=16))
    return sparse_graph(model, TOKENS)


def storages(gm: fx.GraphModule) -> list[bool]:
    return [operand(node, "feature_major", False) for node in gm.graph.nodes if node.target is hinm_linear]


@pytest.mark.parametrize("case", ISLANDS.values(), ids=ISLANDS)
def test_what_only_sparse_layers_read_stays_feature_major(case: tuple[Case, list[bool]]) -> None:
    (layers, function), expected_storages = case
    gm, inputs = chain(layers, function)
    expected = result(gm, inputs)[0]
    feature_major_islands_pass(gm)
    assert storages(gm) == expected_storages
    torch.testing.assert_close(result(gm, inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_inside_an_island_nothing_is_transposed_and_at_its_end_rows_come_out() -> None:
    gm, inputs = chain(mlp(), lambda x, a, b: b(F.gelu(a(x))))
    feature_major_islands_pass(gm)
    strides: dict[str, tuple[int, ...]] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if n.op == "call_function":
                strides[n.name] = out.stride()
            return out

    with torch.no_grad():
        Record(gm).run(*inputs)
    first, gelu, last = strides.values()
    assert first == gelu == (5, 1, 15), "a feature is a row of 15 tokens"
    assert last == (5 * 48, 48, 1)


def test_a_finished_graph_tells_how_each_layer_runs() -> None:
    gm, _ = chain([*mlp(), nn.Linear(48, 16)], lambda x, a, b, c: c(F.gelu(b(a(x).relu())).sum(0)))
    feature_major_islands_pass(absorb_orders_pass(gm))
    first, second, third = (context for (context,) in contexts_of(gm).values())
    plain = {"activation": "none"}
    assert first == plain | {"restored": False, "feature_major": False, "feature_major_out": True}
    assert second == plain | {"restored": False, "feature_major": True, "feature_major_out": False}
    assert third == plain | {"restored": True, "feature_major": False, "feature_major_out": False}


@pytest.mark.parametrize("gain", [1e-6, 0.0, -1e-6])
@pytest.mark.parametrize("layers", [2, 4])
def test_on_a_gpu_islands_are_where_the_predicted_time_falls(gain: float, layers: int) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers))).half().eval()
    prune(model, HiNMPattern(32), method="identity")
    x = torch.randn(16, 64).half()

    def choose(call: Call, shared_limit: int, gpu: cost.Gpu) -> Choice:
        return Choice("gather", 128, 0, 1e-4 - gain * (call.feature_major + call.feature_major_out), "memory")

    with emulated():
        gm, inputs = capture(model, x)
        sparsify_layers_pass(gm, packed_by_name(gm, inputs, *model))
        with torch.no_grad():
            expected = gm(*inputs)[0]
            with mock.patch.object(cost, "choose_kernel", choose):
                feature_major_islands_pass(gm)
            assert storages(gm) == [gain > 0] * (layers - 1) + [False]
            torch.testing.assert_close(gm(*inputs)[0], expected, rtol=2e-3, atol=2e-3)


def test_on_a_gpu_islands_are_predicted_with_the_activations_that_their_layers_apply() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).half().eval()
    prune(model, HiNMPattern(32), method="identity")
    told: list[bool] = []

    def choose(call: Call, shared_limit: int, gpu: cost.Gpu) -> Choice:
        told.append(call.activated)
        return Choice("gather", 128, 0, 1e-4, "memory")

    with emulated():
        gm, inputs = capture(model, torch.randn(16, 64).half())
        sparsify_layers_pass(gm, packed_by_name(gm, inputs, model[0], model[2]))
        with mock.patch.object(cost, "choose_kernel", choose):
            feature_major_islands_pass(fuse_activations_pass(gm))
    assert told[:2] == [True, False]
