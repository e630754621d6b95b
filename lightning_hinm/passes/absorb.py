"""Orders of rows that need not be restored, because all who read the rows can be told of the order instead."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lightning_hinm.layout import inverse, is_in_order
from lightning_hinm.ops import hinm_conv2d, hinm_linear
from lightning_hinm.passes.sparsify import finish_pass, lift_buffer, operand, set_operand

CHANNEL_AXIS: Mapping[Any, int] = {hinm_linear: -1, hinm_conv2d: -3}
# What maps each number by itself, whatever its channel. Whatever is not in these tables restores.
UNARY = {
    *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.softsign),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.logsigmoid, F.tanhshrink, F.sigmoid, F.tanh),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.abs, torch.neg, torch.square, torch.sqrt, torch.rsqrt),
    *(torch.clamp, torch.erf, operator.neg),
    *("relu", "relu_", "sigmoid", "tanh", "exp", "abs", "neg", "square", "sqrt", "clamp", "contiguous"),
    *("float", "half", "bfloat16", "double", "to", "clone"),
}
# The same of two; the other one is a number, or in the same order.
BINARY = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.iadd, operator.imul),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.pow),
    *("add", "add_", "sub", "mul", "mul_", "div", "pow"),
}
# Over the pixels of each channel by itself.
SPATIAL = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
CHANNEL_PARAMETERS = ("running_mean", "running_var", "weight", "bias")  # of a BatchNorm


@dataclass(frozen=True)
class OrderFate:
    """What becomes of the order in which a layer packs its rows.

    Args:
        kind: ``"in order"``: nothing moves; ``"absorbed"``: the rows stay where they are packed; ``"restored"``: they
            are written elsewhere.
        readers: the sparse layers that find their columns by it.
        because: of a restored order, the node that needs another one.
        reason: why, in a phrase of which ``because`` is the subject.
        norms: the BatchNorms on the way to the readers.
    """

    kind: str
    readers: tuple[fx.Node, ...] = ()
    because: fx.Node | None = None
    reason: str = ""
    norms: tuple[fx.Node, ...] = ()


def absorb_orders_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """A layer whose rows only sparse layers read leaves them in the order in which they are packed.

    Before::

        %y = hinm.linear(%x, ..., %output_order, %bias, ..., %restore, ...)
        %z = hinm.linear(gelu(%y), ..., %vector_index, ..., %columns, ...)

    After::

        %y = hinm.linear(%x, ..., arange, index_select(%bias, 0, %output_order), ..., [], ...)
        %z = hinm.linear(gelu(%y), ..., place[%vector_index], ..., place[%columns], ...)

    Equal, because channel ``output_order[i]`` of ``%y`` stands at position ``i`` now, what lies between treats every
    channel by itself (the parameters of a BatchNorm are put into the same order), and a column ``c`` of the reader is
    found at ``place[c]``, with ``place = inverse(output_order)``. Anything that is not in the tables of this file
    restores, and so does a reader on a GPU whose columns would leave their run: its kernel reads a run as one block.

    Args:
        gm: sparsified; rewritten in place.

    Returns:
        ``gm``.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target in CHANNEL_AXIS and (fate := _follow(gm, node)).kind == "absorbed":
            _absorb(gm, node, fate)
            count += 1
    return finish_pass(gm, "absorb_orders_pass", count, "orders")


def orders_of(gm: fx.GraphModule) -> dict[fx.Node, OrderFate]:
    """What ``absorb_orders_pass`` is about to do with the order of each sparse layer of a sparsified graph.

    Layers whose buffers the graph does not hold itself are missing: their orders are always restored.
    """
    ops = [node for node in gm.graph.nodes if node.target in CHANNEL_AXIS]
    return {node: _follow(gm, node) for node in ops if _buffer(gm, node, "output_order") is not None}


def _follow(gm: fx.GraphModule, producer: fx.Node) -> OrderFate:
    """Whether all who read a layer's rows can be told of their order."""
    order = _buffer(gm, producer, "output_order")
    if order is None:
        return OrderFate("restored")
    if is_in_order(order):
        return OrderFate("in order")
    axis = CHANNEL_AXIS[producer.target]
    carried, readers, norms = {producer}, [], []
    for node in gm.graph.nodes:  # in an order in which inputs come before their users
        if node is producer or not carried & set(node.all_input_nodes):
            continue
        if node.target in CHANNEL_AXIS and node.args[0] in carried and not carried & set(_nodes(node.args[1:])):
            if reason := _refusal(gm, node, axis, order):
                return OrderFate("restored", (), node, reason)
            readers.append(node)
        elif node.op not in ("call_function", "call_method"):
            return _restore_for(node)
        elif node.target in UNARY or (node.target in SPATIAL and axis == -3) or _is_idle_dropout(node):
            if node.args[0] not in carried or _nodes((node.args[1:], node.kwargs)):
                return _restore_for(node)
            carried.add(node)
        elif node.target in BINARY:
            if not all(isinstance(each, (int, float)) or each in carried for each in node.args) or node.kwargs:
                return _restore_for(node)
            carried.add(node)
        elif axis == -1 and node.args[0] in carried and _keeps_last_size(node, len(order)):
            carried.add(node)
        elif node.target is F.batch_norm and axis == -3 and _is_frozen_norm(node, carried):
            norms.append(node)
            carried.add(node)
        else:
            return _restore_for(node)
    return OrderFate("absorbed" if readers else "in order", tuple(readers), norms=tuple(norms))


def _restore_for(node: fx.Node) -> OrderFate:
    if node.op == "output":
        return OrderFate("restored", (), node, "is the result of the graph")
    dense = node.target in (F.linear, torch.conv1d, torch.conv2d, torch.addmm)
    return OrderFate("restored", (), node, "is dense" if dense else "is not known to treat all channels alike")


def _absorb(gm: fx.GraphModule, producer: fx.Node, fate: OrderFate) -> None:
    order = _held(gm, producer, "output_order").to(torch.int64)
    gathers = lift_buffer(gm, f"hinm_{producer.name}_order", order)
    positions = torch.arange(len(order), device=order.device)
    if operand(producer, "expansion_metadata") is None:
        in_order = order.new_empty(0)
    else:  # of a kernel, the row that each packed row goes to
        rows = _held(gm, producer, "restore")
        in_order = torch.where(rows >= 0, torch.arange(len(rows), device=rows.device, dtype=rows.dtype), rows)
    changes = {"output_order": positions, "restore": in_order}
    bias = operand(producer, "bias")
    _replace(gm, producer, changes)
    if bias is not None:
        with gm.graph.inserting_before(producer):
            set_operand(producer, "bias", gm.graph.call_function(torch.index_select, (bias, 0, gathers)))
    for norm in fate.norms:
        given = _norm_arguments(norm)
        with gm.graph.inserting_before(norm):
            moved = {
                name: given[name] and gm.graph.call_function(torch.index_select, (given[name], 0, gathers))
                for name in CHANNEL_PARAMETERS
            }
        norm.args, norm.kwargs = (given.pop("input"),), given | moved
    for reader in fate.readers:
        _replace(gm, reader, _renumbered(gm, reader, order))


def _renumbered(gm: fx.GraphModule, reader: fx.Node, order: Tensor) -> dict[str, Tensor]:
    """The reader's columns where they stand now; virtual ones stay."""
    place, kernel = inverse(order), _kernel_size(reader)
    changes = {}
    for name in ("vector_index", "columns"):
        numbers = _held(gm, reader, name)
        wide = numbers.to(torch.int64)
        channel = (wide // kernel).clamp(max=len(place) - 1)
        moved = torch.where(wide < len(place) * kernel, place[channel] * kernel + wide % kernel, wide)
        changes[name] = moved.to(numbers.dtype)
    return changes


def _refusal(gm: fx.GraphModule, reader: fx.Node, axis: int, order: Tensor) -> str | None:
    """Why the columns of a reader cannot be renumbered; None if they can."""
    if operand(reader, "groups", 1) != 1:
        return "reads each group of its channels by itself"
    buffers = [_buffer(gm, reader, name) for name in ("vector_index", "columns")]
    channels = operand(reader, "in_features") if axis == -1 else operand(reader, "in_channels")
    if CHANNEL_AXIS[reader.target] != axis or channels != len(order) or any(buffer is None for buffer in buffers):
        return "has columns that are not these channels"
    window = operand(reader, "window")
    # A convolution is gathered from wherever its columns lie, and so is whatever a CPU runs.
    if axis == -3 or window is None or channels <= 4 * window or operand(reader, "expansion_metadata") is None:
        return None
    index = _held(gm, reader, "columns").to(torch.int64)
    moved = _renumbered(gm, reader, order.to(torch.int64))["columns"].to(torch.int64)
    return None if torch.equal(index // window, moved // window) else "reads its columns in runs that the order mixes"


def _kernel_size(reader: fx.Node) -> int:
    """Columns of each channel."""
    return operand(reader, "kernel_height", 1) * operand(reader, "kernel_width", 1)


def _keeps_last_size(node: fx.Node, channels: int) -> bool:
    """Whether a view leaves the last dimension alone."""
    if node.target not in ("view", "reshape", torch.reshape):
        return False
    sizes: Any = node.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    return len(sizes) > 0 and isinstance(sizes[-1], int) and sizes[-1] == channels


def _is_idle_dropout(node: fx.Node) -> bool:
    if node.target not in (F.dropout, F.dropout2d):
        return False
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return training is False


def _norm_arguments(node: fx.Node) -> dict[str, Any]:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _is_frozen_norm(node: fx.Node, carried: set[fx.Node]) -> bool:
    given = _norm_arguments(node)
    parameters = [given[name] for name in CHANNEL_PARAMETERS]
    fixed = given["training"] is False and given["running_mean"] is not None
    return fixed and given["input"] in carried and not carried & set(_nodes(parameters))


def _nodes(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


def _buffer(gm: fx.GraphModule, node: fx.Node, name: str) -> Tensor | None:
    """The tensor behind an operand, where the graph holds it itself: only then does it stay what it is."""
    source = operand(node, name)
    return getattr(gm, str(source.target)) if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _held(gm: fx.GraphModule, node: fx.Node, name: str) -> Tensor:
    """The same, of an operand that is known to be held."""
    return getattr(gm, operand(node, name).target)


def _replace(gm: fx.GraphModule, node: fx.Node, changes: Mapping[str, Tensor]) -> None:
    for name, tensor in changes.items():
        set_operand(node, name, lift_buffer(gm, f"hinm_{node.name}_{name}", tensor))
