"""Graph rewrites on what Dynamo hands to a backend: weights are placeholders, layers are functions of them."""

import logging
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from lightning_hinm.modules import PACKED_TENSORS, HiNMLayer
from lightning_hinm.ops import EXPANDED, hinm_conv2d, hinm_linear
from lightning_hinm.ops.operands import Conv2dOperands, LinearOperands
from lightning_hinm.workload import TOKENS

log = logging.getLogger(__name__)

# What each prunable layer is in a graph, and its parameters in order.
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TARGETS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.linear: ("linear", ("input", "weight", "bias")),
    torch.conv1d: ("conv1d", _CONVOLUTION),
    torch.conv2d: ("conv2d", _CONVOLUTION),
    torch.addmm: ("hf_conv1d", ("input", "mat1", "mat2")),
}
_ENCODER_LAYER = torch._transformer_encoder_layer_fwd
_ENCODER_PARAMETERS = (
    *("src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first"),
    *("eps", "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2"),
    *("ffn_weight_1", "ffn_bias_1", "ffn_weight_2", "ffn_bias_2", "mask", "mask_type"),
)


@dataclass(frozen=True)
class LayerCall:
    """One call of a prunable layer; ``node`` may have been replaced since."""

    node: fx.Node
    kind: str
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    options: Mapping[str, Any]


def find_layer_calls(gm: fx.GraphModule) -> list[LayerCall]:
    """The calls of linear and convolution layers whose weight is a placeholder, in the graph's order."""
    calls = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in _TARGETS:
            continue
        kind, names = _TARGETS[node.target]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if kind == "hf_conv1d":
            # addmm(bias, x, weight): its first operand plays the bias, scaled by nothing else.
            if given.pop("beta", 1) != 1 or given.pop("alpha", 1) != 1:
                continue
            given = {"input": given["mat1"], "weight": given["mat2"], "bias": given["input"]}
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        if not isinstance(weight, fx.Node) or weight.op != "placeholder" or not isinstance(x, fx.Node):
            continue
        calls.append(LayerCall(node, kind, x, weight, bias, given))
    return calls


def find_fused_calls(gm: fx.GraphModule) -> list[LayerCall]:
    """The linear layers inside fused ``nn.TransformerEncoderLayer`` nodes; ``x`` is the input of the whole layer."""
    calls = []
    for node in gm.graph.find_nodes(op="call_function", target=_ENCODER_LAYER):
        given = _encoder_arguments(node)
        for i in (1, 2):
            weight, bias = given[f"ffn_weight_{i}"], given[f"ffn_bias_{i}"]
            if weight.op == "placeholder":
                calls.append(LayerCall(node, "linear", given["src"], weight, bias, {}))
    return calls


def find_calls(gm: fx.GraphModule) -> list[LayerCall]:
    """Both."""
    return find_layer_calls(gm) + find_fused_calls(gm)


def unfuse_encoder_layers_pass(gm: fx.GraphModule, weights: Set[str]) -> fx.GraphModule:
    """Every fused encoder layer that reads one of ``weights`` becomes its attention and its two linear layers.

    Before::

        %y = torch._transformer_encoder_layer_fwd(%x, ..., %weight_1, %bias_1, %weight_2, %bias_2, %mask, mask_type)

    After (with ``norm_first``, the norms stand before the attention and before the linear layers instead)::

        %attention = torch._native_multi_head_attention(%x, %x, %x, ..., %mask, False, True, mask_type)[0]
        %h = layer_norm(%attention + %x)
        %y = layer_norm(linear(relu(linear(%h, %weight_1, %bias_1)), %weight_2, %bias_2) + %h)

    Equal, because the fused kernel consists of these very calls. (On a GPU it rounds gelu to its tanh form; the layer
    itself, and so the graph after, does not.)

    Args:
        gm: rewritten in place.
        weights: names of placeholders.

    Returns:
        ``gm``.
    """
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=_ENCODER_LAYER):
        given = _encoder_arguments(node)
        if not weights & {given["ffn_weight_1"].name, given["ffn_weight_2"].name}:
            continue
        with gm.graph.inserting_before(node):
            new = _call_parts(gm.graph, given)
        new.meta = node.meta | new.meta
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        count += 1
    return finish_pass(gm, "unfuse_encoder_layers_pass", count, "layers")


def _encoder_arguments(node: fx.Node) -> dict[str, Any]:
    absent = {"mask": None, "mask_type": None}
    return absent | dict(zip(_ENCODER_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)


def _call_parts(graph: fx.Graph, given: Mapping[str, Any]) -> fx.Node:
    x, first, width = given["src"], given["norm_first"], given["embed_dim"]
    sample = x.meta.get("example_value")

    def call(target: Any, arguments: tuple[Any, ...], width: int = width) -> fx.Node:
        node = graph.call_function(target, arguments)
        if sample is not None:
            node.meta["example_value"] = sample.new_empty((*sample.shape[:-1], width))
        return node

    def norm(x: fx.Node, i: int) -> fx.Node:
        return call(F.layer_norm, (x, (width,), given[f"norm_weight_{i}"], given[f"norm_bias_{i}"], given["eps"]))

    def linear(x: fx.Node, i: int, width: int) -> fx.Node:
        return call(F.linear, (x, given[f"ffn_weight_{i}"], given[f"ffn_bias_{i}"]), width)

    y = norm(x, 1) if first else x
    names = ("embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "mask")
    attention = (y, y, y, *(given[name] for name in names), False, True, given["mask_type"])
    y = call(operator.getitem, (graph.call_function(torch._native_multi_head_attention, attention), 0))
    x = call(torch.add, (y, x))
    x = x if first else norm(x, 1)
    hidden = given["ffn_weight_1"].meta["example_value"].shape[0]
    y = linear(norm(x, 2) if first else x, 1, hidden)
    y = call(F.gelu if given["use_gelu"] else F.relu, (y,), hidden)
    x = call(torch.add, (linear(y, 2, width), x))
    return x if first else norm(x, 2)


def sparsify_layers_pass(gm: fx.GraphModule, layers: Mapping[str, HiNMLayer]) -> fx.GraphModule:
    """Every call of a layer whose weight is packed becomes one sparse op.

    Before::

        %y = torch._C._nn.linear(%x, %weight, %bias)

    After::

        %values, %metadata, ..., %restore = get_attr of buffers of the graph module
        %y = hinm.linear(%x, %values, %metadata, ..., %bias, %expansion, %columns, %restore, in_features, V, ...)

    Equal, because the op is defined as ``F.linear(x, unpack(packed), bias)`` and ``unpack(pack(weight)) == weight``,
    for which the caller vouches at every call of the graph. Convolutions likewise; a Conv1d runs as a Conv2d over
    images of height 1, uneven ``padding="same"`` as a pad before it. The weight's placeholder stays: it may have other
    uses.

    Args:
        gm: rewritten in place.
        layers: packed layers by the name of their weight's placeholder.

    Returns:
        ``gm``.
    """
    count = 0
    buffers: dict[str, dict[str, fx.Node | None]] = {}
    for call in find_layer_calls(gm):
        layer = layers.get(call.weight.name)
        if layer is None or not _computes_the_layer(call, layer):
            continue
        node = call.node
        if call.weight.name not in buffers:
            buffers[call.weight.name] = _lift_buffers(gm, call.weight, layer)
        with gm.graph.inserting_before(node):
            new = _call_op(gm.graph, call, layer, buffers[call.weight.name])
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        count += 1
    return finish_pass(gm, "sparsify_layers_pass", count, f"calls of {len(buffers)} layers")


def lift_tensors_pass(gm: fx.GraphModule, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The packed tensors of converted layers, which a graph takes as inputs, become its own.

    Before::

        %y = hinm.linear(%x, %values, %metadata, ...), with placeholders

    After::

        %y = hinm.linear(%x, %hinm_values, %hinm_metadata, ...), with get_attr of buffers of the graph module

    Equal, because they are the same tensors, for which the caller vouches at every call of the graph; nothing is
    copied. Only what a graph holds itself can the passes that follow read. The placeholders stay.

    Args:
        gm: rewritten in place.
        tensors: by the name of their placeholder.

    Returns:
        ``gm``.
    """
    count = 0
    lifted: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.target not in _FIELDS:
            continue
        for name in (*PACKED_TENSORS, *EXPANDED):
            given = operand(node, name)
            if not isinstance(given, fx.Node) or given.op != "placeholder" or given.name not in tensors:
                continue
            if given.name not in lifted:
                lifted[given.name] = lift_buffer(gm, f"hinm_{given.name}", tensors[given.name])
            set_operand(node, name, lifted[given.name])
            count += 1
    return finish_pass(gm, "lift_tensors_pass", count, f"operands from {len(lifted)} tensors")


def finish_pass(gm: fx.GraphModule, name: str, count: int, what: str) -> fx.GraphModule:
    """Checks and compiles a graph in which a pass has changed anything, and says so; returns it."""
    if count:
        _release_unread(gm)
        gm.graph.lint()
        gm.recompile()
        log.info("%s: %d %s", name, count, what)
    return gm


def _computes_the_layer(call: LayerCall, layer: HiNMLayer) -> bool:
    """Whether the call is the layer's own computation: a weight may also be used in another way."""
    if call.kind != layer.kind or call.options.get("groups", 1) != layer.groups:
        return False
    if call.bias is None:
        return True
    shape = shape_of(call.bias) if isinstance(call.bias, fx.Node) else None
    return shape is not None and tuple(shape) == (layer.shape[0],)


def _lift_buffers(gm: fx.GraphModule, weight: fx.Node, layer: HiNMLayer) -> dict[str, fx.Node | None]:
    """Nodes of the layer's buffers, after the last placeholder; None for a buffer that is None."""
    tensors = {name: getattr(layer, name) for name in (*PACKED_TENSORS, *EXPANDED)}
    return {
        name: None if tensor is None else lift_buffer(gm, f"hinm_{weight.name}_{name}", tensor)
        for name, tensor in tensors.items()
    }


def lift_buffer(gm: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """A node of a tensor that the graph module holds from now on, before every call."""
    gm.register_buffer(name, tensor, persistent=False)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        # AOTAutograd asks for the origin of every tensor that it lifts; a name of our own makes it a static input.
        from torch._dynamo.source import LocalSource

        sources[name] = LocalSource(f"__{name}_{id(tensor)}")
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        return gm.graph.get_attr(name)


def _release_unread(gm: fx.GraphModule) -> None:
    """Lets go of the tensors that the graph module was made to hold and that nothing reads any more."""
    for node in list(gm.graph.find_nodes(op="get_attr")):
        if not node.users:
            gm.graph.erase_node(node)
    read = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    for name in [name for name in gm._buffers if name.startswith("hinm_") and name not in read]:
        delattr(gm, name)
        getattr(gm, "_param_name_to_source", {}).pop(name, None)


def _call_op(graph: fx.Graph, call: LayerCall, layer: HiNMLayer, buffers: Mapping[str, fx.Node | None]) -> fx.Node:
    # Read now, not when the call was found: an earlier rewrite may have replaced its operands.
    _, names = _TARGETS[call.node.target]
    given = dict(zip(names, call.node.args, strict=False)) | dict(call.node.kwargs)
    x: Any
    x, bias = (given["mat1"], given["input"]) if call.kind == "hf_conv1d" else (given["input"], given.get("bias"))
    packed = [buffers[name] for name in PACKED_TENSORS] + [bias] + [buffers[name] for name in EXPANDED]
    if call.kind in ("linear", "hf_conv1d"):
        return graph.call_function(hinm_linear, (x, *packed, layer.shape[1], *layer.pattern.fields))
    kernel = layer.shape[2:]
    stride, dilation = (_each(call.options.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    padding = call.options.get("padding", 0)
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if any(size % 2 for size in reach):
            pads = [side for size in reversed(reach) for side in (size // 2, size - size // 2)]
            x = _call(graph, F.pad, x, pads)
            padding = 0
        else:
            padding = [size // 2 for size in reach]
    padding = _each(0 if padding == "valid" else padding, len(kernel))
    if call.kind == "conv1d":
        # Contiguous: else the image is channels last, and so is what comes out, unlike that of F.conv1d.
        stored = graph.call_method("contiguous", (x,))
        stored.meta["example_value"] = x.meta["example_value"].contiguous()
        x = _call(graph, torch.unsqueeze, stored, -2)
        kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    numbers = (layer.shape[1] * layer.groups, *kernel, *stride, *padding, *dilation, layer.groups)
    out = graph.call_function(hinm_conv2d, (x, *packed, *numbers, *layer.pattern.fields))
    if call.kind != "conv1d":
        return out
    out.meta["example_value"] = call.node.meta["example_value"].unsqueeze(-2)
    return _call(graph, torch.squeeze, out, -2)


def _call(graph: fx.Graph, target: Any, x: Any, *arguments: Any) -> fx.Node:
    """A call whose node knows its ``example_value``, as Dynamo's do."""
    node = graph.call_function(target, (x, *arguments))
    with enable_python_dispatcher():  # as Dynamo does: else some functions fix the sizes that are dynamic
        node.meta["example_value"] = target(x.meta["example_value"], *arguments)
    return node


def _each(value: Any, count: int) -> tuple[int, ...]:
    """One number for each spatial dimension: convolutions take a single one for all."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * count if len(sizes) == 1 else sizes


def shape_of(node: fx.Node) -> Sequence[Any] | None:
    """Sizes of a tensor, some of them symbols; None of what is none."""
    value = node.meta.get("example_value")
    return value.shape if isinstance(value, Tensor) else None


def seen_shape(node: fx.Node) -> tuple[int, ...] | None:
    """The same, with the number that Dynamo saw in the place of each symbol."""
    shape = shape_of(node)
    if shape is None:
        return None
    return tuple(size if isinstance(size, int) else int(size.node.hint or TOKENS) for size in shape)


def held_or_none(gm: fx.GraphModule, node: fx.Node, name: str) -> Tensor | None:
    """The tensor behind an operand, where the graph holds it itself."""
    source = operand(node, name)
    return getattr(gm, str(source.target)) if isinstance(source, fx.Node) and source.op == "get_attr" else None


def held(gm: fx.GraphModule, node: fx.Node, name: str) -> Tensor:
    """The same, of an operand that is known to be held."""
    return getattr(gm, operand(node, name).target)


def operand(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a sparse op, by the name of its operand."""
    fields = _FIELDS[node.target]
    if name not in fields:
        return default
    place = 1 + fields.index(name)
    return node.args[place] if place < len(node.args) else default


def set_operand(node: fx.Node, name: str, value: Any) -> None:
    """Passes another one, or one more; those between are passed as they are by default."""
    fields = _FIELDS[node.target]
    given = dict(_DEFAULTS[node.target]) | dict(zip(fields, node.args[1:], strict=False)) | {name: value}
    last = max(len(node.args) - 1, fields.index(name) + 1)
    node.args = (node.args[0], *(given[field] for field in fields[:last]))


_FIELDS: dict[Any, tuple[str, ...]] = {hinm_linear: LinearOperands._fields, hinm_conv2d: Conv2dOperands._fields}
_DEFAULTS: dict[Any, Mapping[str, Any]] = {
    hinm_linear: LinearOperands._field_defaults,
    hinm_conv2d: Conv2dOperands._field_defaults,
}
