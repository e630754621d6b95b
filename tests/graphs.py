"""Graphs as Dynamo hands them over, of layers that are packed in orders that a test chooses."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_hinm import HiNMPattern
from lightning_hinm.gyro import search
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import hinm_mask
from lightning_hinm.modules import HiNMLayer, pack_layer
from lightning_hinm.passes import find_fused_calls, sparsify_layers_pass, unfuse_encoder_layers_pass
from lightning_hinm.passes.sparsify import operand
from lightning_hinm.prune import PrunableLayer, find_layers, layout_of, set_layout


class Chain(nn.Module):
    """Layers, and what lies between them, as a function."""

    def __init__(self, layers: Sequence[nn.Module], forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def capture(
    function: Any, *inputs: Tensor, dynamic: bool | None = None, **named: Any
) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo makes of ``function``, and its inputs."""
    captured: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured.extend((gm, list(example_inputs)))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs, **named)
    return captured[0], captured[1]


def packed_by_name(gm: fx.GraphModule, inputs: list[Any], *modules: nn.Module) -> dict[str, HiNMLayer]:
    nodes = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    return {node.name: pack_layer(m) for node, value in nodes.items() for m in modules if value is m.weight}


def set_orders(
    model: nn.Module,
    pattern: HiNMPattern,
    shared: Sequence[Sequence[str]] = (),
    blocks: Mapping[str, int] = {},
    seed: int = 0,
) -> None:
    """Prunes a model to random orders of rows, which takes no search.

    Args:
        model: any.
        pattern: what its layers are pruned to.
        shared: names of the layers that have one order.
        blocks: layers whose rows stay in as many equal blocks.
        seed: of the orders.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {layer.name: layer for layer in find_layers(model, pattern)[0]}
    first = {name: names[0] for names in shared for name in names}
    assert set(first) | set(blocks) <= set(layers)
    orders: dict[str, Tensor] = {}
    for name, layer in layers.items():
        count = blocks.get(name, layer.groups)
        rows = layer.matrix.shape[0] // count
        order = torch.cat([torch.randperm(rows, generator=generator) + i * rows for i in range(count)])
        set_order(layer, orders.setdefault(first.get(name, name), order), model)


def set_order(layer: PrunableLayer, order: Tensor, model: nn.Module) -> HiNMLayout:
    """Prunes a layer to an order of its rows."""
    saliency = layer.matrix.abs()
    layout = search(saliency, layer.pattern, groups=layer.groups, method="identity", output_order=order).layout
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.to_weight(hinm_mask(saliency, layout)), 0)
    set_layout(layer, layout, model)
    return layout


def sparse_graph(model: nn.Module, *inputs: Tensor, **named: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The sparsified graph of a pruned model, and its inputs."""
    gm, values = capture(model.eval(), *inputs, **named)
    packed = packed_by_name(gm, values, *(module for module in model.modules() if layout_of(module) is not None))
    assert len(packed) == len({id(module.weight) for module in model.modules() if layout_of(module) is not None})
    if find_fused_calls(gm):
        unfuse_encoder_layers_pass(gm, packed.keys())
    return sparsify_layers_pass(gm, packed), values


def result(gm: fx.GraphModule, values: Sequence[Any]) -> Any:
    """What a graph returns; its inputs stay as they are."""
    with torch.no_grad():
        return gm(*(copy.deepcopy(value) for value in values))


def sparse_ops(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if "hinm." in str(node.target)]


def restored(gm: fx.GraphModule) -> list[bool]:
    """Of each sparse op on a CPU, whether it restores its order."""
    return [getattr(gm, operand(node, "restore").target).numel() > 0 for node in sparse_ops(gm)]


def moved(gm: fx.GraphModule) -> list[str]:
    """What an ``index_select`` puts in another order, but for parameters."""
    selects = gm.graph.find_nodes(op="call_function", target=torch.index_select)
    return [node.args[0].name for node in selects if node.args[0].op != "placeholder" or node.args[0].name == "l_x_"]
