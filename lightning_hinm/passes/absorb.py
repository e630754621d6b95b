"""Orders of rows that need not be restored, because all who read the rows can be told of the order instead."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lightning_hinm.layout import inverse, is_in_order
from lightning_hinm.ops import hinm_conv2d, hinm_linear
from lightning_hinm.passes.channels import Channels, Stream
from lightning_hinm.passes.follow import Edge, Flow, Layer, follow_channels
from lightning_hinm.passes.rules import DENSE
from lightning_hinm.passes.sparsify import (
    find_layer_calls,
    finish_pass,
    held,
    held_or_none,
    lift_buffer,
    operand,
    set_operand,
)

CHANNEL_AXIS: Mapping[Any, int] = {hinm_linear: -1, hinm_conv2d: -3}
_DENSE_AXIS = {"linear": -1, "hf_conv1d": -1, "conv1d": -2, "conv2d": -3}
_Orders = Mapping[Stream, Tensor]


@dataclass(frozen=True)
class OrderFate:
    """What becomes of the order in which a layer packs its rows.

    Args:
        kind: ``"in order"``: nothing moves; ``"absorbed"``: the rows stay where they are packed; ``"restored"``: they
            are written elsewhere.
        readers: the sparse layers that find their columns by it.
        because: of a restored order, the node that needs another one.
        reason: why, in a phrase of which ``because`` is the subject.
    """

    kind: str
    readers: tuple[fx.Node, ...] = ()
    because: fx.Node | None = None
    reason: str = ""


def absorb_orders_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """Layers leave their rows in the order in which they are packed, where all who read them can be told of it.

    Before::

        %y = hinm.linear(%x, ..., %output_order, %bias, ..., %restore, ...)
        %z = hinm.linear(gelu(%y), ..., %vector_index, ..., %columns, ...)

    After::

        %y = hinm.linear(%x, ..., arange, index_select(%bias, 0, %output_order), ..., [], ...)
        %z = hinm.linear(gelu(%y), ..., place[%vector_index], ..., place[%columns], ...)

    Equal, because channel ``order[i]`` of a stream stands at position ``i`` of all values that carry it: what makes one
    of them from others commutes with ``order`` (``rules``), with its parameters put in that order; a layer that packs
    its rows in another one writes them where they belong, which costs what restoring does; a column ``c`` of a reader
    is found at ``place[c]``, with ``place = inverse(order)``; and at every edge of the stream one ``index_select`` puts
    a value in the order, or back. A reader on a GPU whose columns would leave their run is such an edge: its kernel
    reads a run as one block.

    The order of a stream is that of most of its writers, where that leaves fewer restores and ``index_select`` in the
    graph than there are restores without it. Anything that is not in the tables of ``rules`` ends a stream.

    Args:
        gm: sparsified; rewritten in place.

    Returns:
        ``gm``.
    """
    layers = _sparse_layers(gm)
    flow = follow_channels(gm, layers)
    orders = _choose_orders(gm, flow, layers)
    buffers = _Buffers(gm)
    # First, while all still read what the walk saw them read.
    for edge in [*flow.edges, *_untold(gm, flow, layers, orders)]:
        if (order := edge.channels.order(orders)) is not None:
            _move(gm, edge, order if edge.enters else inverse(order), buffers)
    absorbed = 0
    for node, channels in flow.writers.items():
        if (order := channels.order(orders)) is not None:
            _write_in_order(gm, node, order, buffers)
            absorbed += _is_restored(layers[node], channels, {}) and not _is_restored(layers[node], channels, orders)
    for node, channels in flow.readers.items():
        order = channels.order(orders)
        if order is not None and _can_be_told(gm, node, order):
            for name, tensor in _renumbered(gm, node, order).items():
                set_operand(node, name, lift_buffer(gm, f"hinm_{node.name}_{name}", tensor))
    return finish_pass(gm, "absorb_orders_pass", absorbed, "orders")


def orders_of(gm: fx.GraphModule) -> dict[fx.Node, OrderFate]:
    """What ``absorb_orders_pass`` is about to do with the order of each sparse layer of a sparsified graph.

    Layers whose buffers the graph does not hold itself are missing: their orders are always restored.
    """
    layers = _sparse_layers(gm)
    flow = follow_channels(gm, layers)
    orders = _choose_orders(gm, flow, layers)
    return {node: _fate(gm, node, flow, layers, orders) for node in flow.writers}


def find_streams(gm: fx.GraphModule, weights: Set[str] = frozenset()) -> list[set[fx.Node]]:
    """The layers that write one stream, and would have to have one order for it to be absorbed by all who read it.

    Args:
        gm: as Dynamo hands it over, sparsified or not; left as it is.
        weights: names of the placeholders of weights that are still dense, and will be sparse.

    Returns:
        The nodes of each set of two or more layers that do not have one order yet, where one would spare more restores
        than the ``index_select`` it needs.
    """
    layers = _sparse_layers(gm)
    for call in find_layer_calls(gm):
        if call.weight.name in weights and "example_value" in call.weight.meta:
            shape = tuple(call.weight.meta["example_value"].shape)
            shape = shape[::-1] if call.kind == "hf_conv1d" else shape
            columns = shape[1] if call.options.get("groups", 1) == 1 else None
            layers[call.node] = Layer(call.x, _DENSE_AXIS[call.kind], shape[0], None, columns)
    flow = follow_channels(gm, {node: layers[node] for node in gm.graph.nodes if node in layers})
    return [set(nodes) for nodes in _divided(flow, layers)]


def _divided(flow: Flow, layers: Mapping[fx.Node, Layer]) -> list[list[fx.Node]]:
    """The writers of each stream that ``find_streams`` finds."""
    writers: dict[Stream, list[fx.Node]] = {}
    for node, channels in flow.writers.items():
        if len(channels.parts) == 1:
            writers.setdefault(channels.streams[0], []).append(node)
    found = []
    for stream, nodes in writers.items():
        different = not all(_is_alike(layers[nodes[0]], layers[node]) for node in nodes)
        moved = {stream: torch.arange(stream.size)}
        cost = sum(_cost(edge, len(nodes), moved) for edge in flow.edges)
        if len(nodes) > max(cost, 1) and different:
            found.append(nodes)
    return found


def _sparse_layers(gm: fx.GraphModule) -> dict[fx.Node, Layer]:
    """The sparse ops whose buffers the graph holds itself: only then do they stay what they are."""
    layers = {}
    for node in gm.graph.nodes:
        if node.target not in CHANNEL_AXIS:
            continue
        buffers = [held_or_none(gm, node, name) for name in ("output_order", "restore", "vector_index", "columns")]
        if any(tensor is None or tensor.is_meta for tensor in buffers):
            continue
        axis = CHANNEL_AXIS[node.target]
        columns = operand(node, "in_features") if axis == -1 else operand(node, "in_channels")
        columns = columns if operand(node, "groups", 1) == 1 else None
        order = held(gm, node, "output_order").to("cpu", torch.int64)
        x: Any = node.args[0]
        layers[node] = Layer(x, axis, len(order), order, columns)
    return layers


# ---------------------------------------------------------------- which orders


def _choose_orders(gm: fx.GraphModule, flow: Flow, layers: Mapping[fx.Node, Layer]) -> dict[Stream, Tensor]:
    """The order of each stream that has another than the original one.

    Streams that one restore or one ``index_select`` depends on are decided together.
    """
    costs: list[tuple[tuple[Stream, ...], Callable[[_Orders], int]]] = [
        *((rows.streams, partial(_is_restored, layers[node], rows)) for node, rows in flow.writers.items()),
        *((columns.streams, partial(_is_untold, gm, node, columns)) for node, columns in flow.readers.items()),
        *((edge.channels.streams, partial(_cost, edge, len(layers))) for edge in flow.edges),
    ]
    chosen: dict[Stream, Tensor] = {}
    for component in _components([streams for streams, _ in costs]):
        own = [cost for streams, cost in costs if streams and streams[0] in component]

        def total(orders: _Orders, own: Sequence[Callable[[_Orders], int]] = own) -> int:
            return sum(cost(orders) for cost in own)

        orders = {stream: order for stream in component if (order := _most_frequent(stream.orders)) is not None}
        for stream in list(orders):
            fewer = {each: order for each, order in orders.items() if each is not stream}
            orders = fewer if total(fewer) <= total(orders) else orders
        if total(orders) < total({}):
            chosen |= orders
    return chosen


def _components(groups: Iterable[Sequence[Stream]]) -> list[dict[Stream, None]]:
    """The streams, those together that are in one group with each other, directly or not."""
    found: list[dict[Stream, None]] = []
    for group in groups:
        touching = [each for each in found if any(stream in each for stream in group)]
        found = [each for each in found if each not in touching]
        found.append({stream: None for each in (*touching, dict.fromkeys(group)) for stream in each})
    return found


def _most_frequent(orders: Iterable[Tensor | None]) -> Tensor | None:
    moving = Counter(tuple(order.tolist()) for order in orders if order is not None and not is_in_order(order))
    return torch.tensor(moving.most_common(1)[0][0]) if moving else None


def _is_restored(layer: Layer, channels: Channels, orders: _Orders) -> bool:
    """Whether the rows have to be written elsewhere than where they are packed."""
    assert layer.order is not None, "of a sparse layer it is known"  # noqa: S101
    order = channels.order(orders)
    return not is_in_order(layer.order) if order is None else not torch.equal(layer.order, order)


def _is_alike(one: Layer, two: Layer) -> bool:
    return one.order is not None and two.order is not None and torch.equal(one.order, two.order)


def _is_untold(gm: fx.GraphModule, reader: fx.Node, channels: Channels, orders: _Orders) -> bool:
    order = channels.order(orders)
    return order is not None and not _can_be_told(gm, reader, order)


def _cost(edge: Edge, most: int, orders: _Orders) -> int:
    """Copies at an edge; more than ``most`` where none may be made."""
    if edge.parameter or not any(stream in orders for stream in edge.channels.streams):
        return 0
    return 1 if edge.safe else most + 1


def _fate(gm: fx.GraphModule, node: fx.Node, flow: Flow, layers: Mapping[fx.Node, Layer], orders: _Orders) -> OrderFate:
    channels, own = flow.writers[node], layers[node].order
    assert own is not None, "of a sparse layer it is known"  # noqa: S101
    shared = set(channels.streams)
    readers = tuple(each for each, read in flow.readers.items() if shared & set(read.streams))
    if not _is_restored(layers[node], channels, orders):
        return OrderFate("in order" if is_in_order(own) else "absorbed", () if is_in_order(own) else readers)
    edges = [edge for edge in flow.edges if not edge.parameter and shared & set(edge.channels.streams)]
    leaves = [edge for edge in edges if not edge.enters]
    divided = next((nodes for nodes in _divided(flow, layers) if node in nodes), [])
    if not divided and not shared & set(orders):
        if leaves:
            return OrderFate("restored", (), leaves[0].users[0], _why_it_reads_in_order(leaves[0].users[0]))
        if edges:
            return OrderFate("restored", (), edges[0].value, "comes in the original order")
        whole = channels.order(
            {stream: order for stream in shared if (order := _most_frequent(stream.orders)) is not None}
        )
        for reader in readers:
            if whole is not None and not _can_be_told(gm, reader, whole):
                return OrderFate("restored", (), reader, "reads its columns in runs that the order mixes")
    alike = divided or [each for each in flow.writers if shared & set(flow.writers[each].streams)]
    other = next((each for each in alike if not _is_alike(layers[each], layers[node])), None)
    return OrderFate("restored", (), other, "writes the same channels in another order")


def _why_it_reads_in_order(user: fx.Node) -> str:
    if user.op == "output":
        return "is the result of the graph"
    if user.target in DENSE:
        return "is dense"
    if user.target in CHANNEL_AXIS:
        return "reads each group of its channels by itself"
    return "is not known to treat all channels alike"


# ---------------------------------------------------------------- what changes


class _Buffers:
    """One buffer for each order that an ``index_select`` needs, on each device."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._nodes: dict[tuple[Any, ...], fx.Node] = {}

    def node(self, order: Tensor, device: torch.device) -> fx.Node:
        key = (device, *order.tolist())
        if key not in self._nodes:
            name = next(name for i in count() if not hasattr(self._gm, name := f"hinm_order_{i}"))
            self._nodes[key] = lift_buffer(self._gm, name, order.to(device))
        return self._nodes[key]


def _write_in_order(gm: fx.GraphModule, node: fx.Node, order: Tensor, buffers: _Buffers) -> None:
    """The layer writes channel ``order[i]`` at position ``i``."""
    packed = held(gm, node, "output_order")
    positions = inverse(order).to(packed.device)[packed.to(torch.int64)]
    if operand(node, "expansion_metadata") is not None:  # of a kernel, the row that each packed row goes to
        rows = held(gm, node, "restore")
        restore = torch.where(rows >= 0, inverse(order).to(rows)[rows.to(torch.int64).clamp(min=0)], rows)
    elif is_in_order(positions):
        restore = positions.new_empty(0)
    else:
        restore = inverse(positions)
    for name, tensor in (("output_order", positions), ("restore", restore)):
        set_operand(node, name, lift_buffer(gm, f"hinm_{node.name}_{name}", tensor))
    bias = operand(node, "bias")
    if bias is not None:
        with gm.graph.inserting_before(node):
            set_operand(node, "bias", _select(gm, bias, 0, buffers.node(order, packed.device)))


def _move(gm: fx.GraphModule, edge: Edge, order: Tensor, buffers: _Buffers) -> None:
    """Puts an ``index_select`` before the first of those who read a value.

    Its result is stored as the value is, since a reader may take a view that only such a storage has.
    """
    example, axis = edge.value.meta["example_value"], edge.channels.axis
    dims = _from_outermost(example)
    with gm.graph.inserting_before(edge.users[0]):
        if dims == list(range(len(dims))):
            moved = _select(gm, edge.value, axis, buffers.node(order, example.device))
        else:
            stored = gm.graph.call_function(torch.permute, (edge.value, dims))
            stored.meta["example_value"] = example.permute(dims)
            picked = _select(gm, stored, dims.index(axis % len(dims)), buffers.node(order, example.device))
            moved = gm.graph.call_function(torch.permute, (picked, [dims.index(dim) for dim in range(len(dims))]))
            moved.meta["example_value"] = example
    for user in edge.users:
        user.replace_input_with(edge.value, moved)


def _from_outermost(value: Tensor) -> list[int]:
    """Its dimensions as they lie in memory."""
    strides = [stride if isinstance(stride, int) else stride.node.hint or 0 for stride in value.stride()]
    single = [statically_known_true(size == 1) for size in value.shape]
    moving = iter(sorted((dim for dim in range(value.dim()) if not single[dim]), key=lambda dim: -strides[dim]))
    return [dim if single[dim] else next(moving) for dim in range(value.dim())]  # one entry lies wherever it stands


def _select(gm: fx.GraphModule, value: fx.Node, axis: int, order: fx.Node) -> fx.Node:
    selected = gm.graph.call_function(torch.index_select, (value, axis, order))
    if "example_value" in value.meta:
        selected.meta["example_value"] = value.meta["example_value"]
    return selected


def _untold(gm: fx.GraphModule, flow: Flow, layers: Mapping[fx.Node, Layer], orders: _Orders) -> list[Edge]:
    """The edges before readers whose columns would leave their runs."""
    return [
        Edge(layers[node].x, [node], channels, enters=False, parameter=False, safe=True)
        for node, channels in flow.readers.items()
        if _is_untold(gm, node, channels, orders)
    ]


def _renumbered(gm: fx.GraphModule, reader: fx.Node, order: Tensor) -> dict[str, Tensor]:
    """The reader's columns where they stand now; virtual ones stay."""
    kernel = operand(reader, "kernel_height", 1) * operand(reader, "kernel_width", 1)  # columns of each channel
    changes = {}
    for name in ("vector_index", "columns"):
        numbers = held(gm, reader, name)
        place, wide = inverse(order).to(numbers.device), numbers.to(torch.int64)
        channel = (wide // kernel).clamp(max=len(place) - 1)
        moved = torch.where(wide < len(place) * kernel, place[channel] * kernel + wide % kernel, wide)
        changes[name] = moved.to(numbers.dtype)
    return changes


def _can_be_told(gm: fx.GraphModule, reader: fx.Node, order: Tensor) -> bool:
    """Whether the reader's kernel finds its columns wherever ``order`` puts them."""
    window = operand(reader, "window")
    # A convolution is gathered from wherever its columns lie, and so is whatever a CPU runs.
    if CHANNEL_AXIS[reader.target] == -3 or operand(reader, "expansion_metadata") is None:
        return True
    if window is None or len(order) <= 4 * window:
        return True
    index = held(gm, reader, "columns").to(torch.int64)
    return torch.equal(index // window, _renumbered(gm, reader, order)["columns"].to(torch.int64) // window)
