"""Whatever a graph is made of, with orders absorbed it computes what it computed before."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from lightning_hinm import HiNMPattern
from lightning_hinm.passes import absorb_orders_pass, orders_of, sparsify_layers_pass
from lightning_hinm.prune import find_layers
from tests.graphs import moved, packed_by_name, restored, result, set_order, sparse_ops

WIDTH = 16
# All take and return [2, 3, WIDTH]; the last ones are not known to treat all channels alike.
UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.relu,
    lambda y: y.mul_(0.5),
    lambda y: F.relu(y, inplace=True),
    lambda y: y - y.mean(-1, keepdim=True),
    lambda y: y.reshape(6, WIDTH).view(2, 3, WIDTH),
    lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
    lambda y: torch.cat(y.chunk(2, -1), -1),
    lambda y: torch.cat([y[..., WIDTH // 2 :], y[..., : WIDTH // 2]], -1),
    lambda y: torch.cat([y[..., : WIDTH // 2], y[..., : WIDTH // 2]], -1),
    lambda y: torch.cat([y[:, 1:], y[:, :1] * 2], 1),
    lambda y: F.layer_norm(y, (WIDTH,), SCALE, SCALE / 2),
    lambda y: SCALE * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1),
    lambda y: F.group_norm(y.transpose(1, 2), 2, SCALE).transpose(1, 2),
    lambda y: F.prelu(y.transpose(1, 2), SCALE).mT,
    lambda y: y.flatten(0, 1).reshape_as(y) + y.norm(dim=1, keepdim=True).expand_as(y),
    lambda y: torch.stack(y.unbind(1), 0).movedim(0, 1),
    lambda y: torch.stack([y, y.relu()], 2)[:, :, 1] * y.max(-1, keepdim=True).values,
    lambda y: y.cumsum(1).flip(0, 1) + y.softmax(1) + F.normalize(y, dim=-1),
    lambda y: y + y[..., WIDTH // 2 : 0].sum(-1, keepdim=True),
    lambda y: F.instance_norm(y.swapaxes(1, 2), None, None, SCALE).swapaxes(2, 1),
    lambda y: attend(y.roll(1, -1), y.flip(-1), y),
    lambda y: attend(y, y * 2, y.flip(1)),
    lambda y: (y.view(2, 3, 2, 8) * 2).transpose(1, 2)[:, :, None].transpose(1, 3).flatten(2).view(2, 3, WIDTH),
    lambda y: F.layer_norm(y.unflatten(-1, (2, 8)), (8,)).reshape(6, WIDTH).view(2, 3, WIDTH),
    lambda y: y.roll(1, -1),
    lambda y: y.flip(-1),
    lambda y: y.softmax(-1),
    lambda y: y.reshape(2, 3, 4, WIDTH // 4).transpose(2, 3).reshape(2, 3, WIDTH),
    lambda y: y.reshape(2, 3, 4, WIDTH // 4)[:, :, :1].expand(2, 3, 4, WIDTH // 4).flatten(2),
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.mul,
    lambda y, z: y.add_(z),
    lambda y, z: y + z.mean(1, keepdim=True),
    lambda y, z: torch.stack([y, z], -1).amax(-1),
    lambda y, z: y.view_as(z).lerp(z, 0.5),
    lambda y, z: torch.cat([y, z], -1)[..., WIDTH // 2 : -WIDTH // 2],
    lambda y, z: torch.cat([y[..., : WIDTH // 2], z[..., WIDTH // 2 :]], -1),
    lambda y, z: attend(y, z, y),
    lambda y, z: attend(y.roll(1, -1), z.roll(1, -1), z),
]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads, the values of the second one repeated from the first where ``v`` is half as wide."""
    q, k, v = (each.view(2, 3, 2, WIDTH // 2).transpose(1, 2) for each in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v) + (q @ k.transpose(-1, -2)).softmax(-1) @ v
    return mixed.transpose(1, 2).reshape(2, 3, WIDTH)


SCALE = torch.linspace(0.5, 2.0, WIDTH, dtype=torch.float64)
HALVES = [torch.tensor([3, 1, 0, 2, 7, 5, 4, 6]) + start for start in (0, 8)]
ORDERS = [
    torch.arange(WIDTH),
    torch.arange(WIDTH).flip(0),
    torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2)),
    torch.cat(HALVES),
    torch.cat(HALVES),  # twice as likely
    torch.cat([HALVES[1], HALVES[0]]),
]


class Program(nn.Module):
    """Steps, each of which takes earlier values; the last values are the result."""

    def __init__(self, steps: list[tuple[str, int, int, int]], results: list[int]) -> None:
        super().__init__()
        self.steps, self.results = steps, results
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for kind, *_ in steps if kind == "layer").double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values, layers = [x * 1.0], iter(self.layers)
        for kind, which, first, second in self.steps:
            y, z = values[-1 - first % len(values)], values[-1 - second % len(values)]
            if kind == "layer":
                values.append(next(layers)(y))
            else:
                values.append(UNARY[which % len(UNARY)](y) if kind == "unary" else BINARY[which % len(BINARY)](y, z))
        return tuple(values[-1 - i % len(values)] for i in self.results)


steps = st.tuples(
    st.sampled_from(["layer", "layer", "unary", "binary"]), st.integers(0, 99), st.integers(0, 2), st.integers(0, 4)
)


def traced(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """As Dynamo would: parameters are placeholders, values known. (It would take a hundred times as long.)"""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return False

    graph = Tracer().trace(model)
    last, values = graph.find_nodes(op="placeholder")[-1], [x]
    for node in list(graph.find_nodes(op="get_attr")):
        with graph.inserting_after(last):
            last = graph.placeholder(node.name + "_")
        values.append(
            model.get_parameter(node.target) if hasattr(model, "layers") and "layers" in node.target else SCALE
        )
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    gm = fx.GraphModule(nn.Module(), graph)

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            node.meta["example_value"] = value = super().run_node(node)
            return value

    with torch.no_grad():
        Recorder(gm).run(*(value.detach().clone() for value in values))
    return gm, values


@settings(max_examples=80)
@given(
    st.lists(steps, min_size=3, max_size=12),
    st.lists(st.integers(0, 3), min_size=1, max_size=2),
    st.lists(st.sampled_from(range(len(ORDERS))), min_size=12, max_size=12),
)
def test_any_graph_computes_what_it_computed_before(
    program: list[tuple[str, int, int, int]], results: list[int], orders: list[int]
) -> None:
    torch.manual_seed(0)
    model = Program(program, results)
    pattern = HiNMPattern(4, 0.5)
    layers = {} if not model.layers else {layer.name: layer for layer in find_layers(model, pattern)[0]}
    for layer, order in zip(layers.values(), orders, strict=False):
        set_order(layer, ORDERS[order], model)
    gm, values = traced(model, torch.randn(2, 3, WIDTH, dtype=torch.float64))
    sparsify_layers_pass(gm, packed_by_name(gm, values, *(layer.module for layer in layers.values())))
    expected, before, fates = result(gm, values), restored(gm), orders_of(gm)
    absorb_orders_pass(gm)
    torch.testing.assert_close(result(gm, values), expected, rtol=1e-9, atol=1e-9)
    assert [fates[node].kind == "restored" for node in sparse_ops(gm)] == restored(gm)
    assert sum(restored(gm)) + len(moved(gm)) <= sum(before)
