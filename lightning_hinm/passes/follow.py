"""Which values of a graph carry the channels of which streams: a walk from the layers that write them.

An operation that commutes with an order of the channels, ``f(x[order]) == f(x)[order]``, makes a value that carries
them too; ``rules.RULES`` holds all that are known. Any other operation takes its operands in the original order, and
makes a value in the original order. In between stands an edge, where one ``index_select`` would have to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lightning_hinm.passes.axes import Made
from lightning_hinm.passes.channels import Channels, Heads, Stream
from lightning_hinm.passes.rules import FRESH, HEADS_RULES, RULES, is_number, written_by
from lightning_hinm.passes.sparsify import shape_of


class Layer(NamedTuple):
    """What a layer's node reads and writes.

    Args:
        x: its input.
        axis: of its rows and of its columns' channels, in its output and its input.
        rows: how many channels it writes.
        order: int64 ``[rows]`` on the CPU, how it packs them; None where that is not known yet.
        columns: how many channels it can be told to find in another order; None where it cannot be told.
    """

    x: fx.Node
    axis: int
    rows: int
    order: Tensor | None
    columns: int | None


class Edge(NamedTuple):
    """``users`` and what they read of ``value`` differ in what they know of an order.

    Args:
        value: what is read.
        users: in the graph's order.
        channels: ``value`` has them in the original order, and its users want another (``enters``), or the other way.
        enters: which of the two.
        parameter: no more numbers than channels, or a parameter: to move those costs nothing that counts.
        safe: whether a copy may stand for ``value``.
    """

    value: fx.Node
    users: list[fx.Node]
    channels: Channels
    enters: bool
    parameter: bool
    safe: bool


@dataclass
class Flow:
    """What was found.

    Args:
        writers: the rows of each layer.
        readers: the columns of each layer that reads carried channels, and can be told where they stand.
        edges: where streams begin and end otherwise.
    """

    writers: dict[fx.Node, Channels] = field(default_factory=dict)
    readers: dict[fx.Node, Channels] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)


def follow_channels(gm: fx.GraphModule, layers: Mapping[fx.Node, Layer]) -> Flow:
    """The streams of all ``layers`` of a graph whose nodes know their ``example_value``."""
    barred: frozenset[fx.Node] = frozenset()
    while (walk := Walk(gm, layers, barred)).failed:
        barred |= walk.failed
    return walk.flow


class Walk:
    """The state of ``follow_channels``; rules read ``carried`` and ``heads``, and call the public methods.

    Args:
        gm: the graph.
        layers: its layers.
        barred: nodes that may not cut channels into heads, because what follows would not pass them on.
    """

    def __init__(self, gm: fx.GraphModule, layers: Mapping[fx.Node, Layer], barred: frozenset[fx.Node]) -> None:
        self.flow = Flow()
        self.barred = barred
        self.failed: frozenset[fx.Node] = frozenset()  # nodes to bar: what was found is of no use
        self.carried: dict[fx.Node, Channels] = {}
        self.heads: dict[fx.Node, Heads] = {}
        self.pieces: dict[fx.Node, tuple[Channels, ...]] = {}  # of values that are tuples
        self._left: dict[tuple[fx.Node, fx.Node | None], Edge] = {}
        writes = {node: written_by(node) for node in gm.graph.nodes}
        self._pure = not any(writes.values())
        for node in gm.graph.nodes:
            if node in layers:
                self._pass_layer(node, layers[node])
            elif any(self._is_ordered(each) for each in node.all_input_nodes):
                self._pass_node(node, writes[node])
        # An unknown operation may make a view: what is written into it, or into what it was made of, a copy would miss.
        aliased = any(
            each in self.carried or (each.op not in ("placeholder", "get_attr") and each.target not in FRESH)
            for written in writes.values()
            for each in written
        )
        for edge in self._left.values():
            safe = not aliased or all(
                user.op == "output" or (user.target in FRESH and not writes[user]) for user in edge.users
            )
            self.flow.edges.append(edge._replace(safe=safe))

    def _pass_layer(self, node: fx.Node, layer: Layer) -> None:
        read = self.carried.get(layer.x)
        others = nodes_in([value for value in (*node.args, *node.kwargs.values()) if value is not layer.x])
        told = read is not None and (read.axis, read.size) == (layer.axis, layer.columns)
        if told and not any(self._is_ordered(other) for other in others):
            self.flow.readers[node] = self.carried[layer.x]
        else:
            self._leave(node)
        stream = Stream(layer.rows, [layer.order])
        self.carried[node] = self.flow.writers[node] = Channels(layer.axis, ((stream, 1),))

    def _pass_node(self, node: fx.Node, written: Sequence[fx.Node]) -> None:
        rules = HEADS_RULES if any(each in self.heads for each in node.all_input_nodes) else RULES
        rule = rules.get(node.target) if node.op in ("call_function", "call_method") else None
        entered = len(self.flow.edges)
        made: Made = None
        # What is written into keeps its order, so it must carry one already. NumPy's names of arguments are not read.
        known = not {"axis", "out"} & node.kwargs.keys() and all(each in self.carried for each in written)
        if rule is not None and known:
            made = rule(self, node)
        if isinstance(made, Channels | Heads) and not _fits(node, made):
            made = None
        if made is None:
            del self.flow.edges[entered:]
            self._leave(node)
        elif isinstance(made, Channels):
            self.carried[node] = made
        elif isinstance(made, Heads):
            self.heads[node] = made
        elif made:
            self.pieces[node] = made

    def _leave(self, node: fx.Node) -> None:
        for value in node.all_input_nodes:
            self.restore(node, value)

    def restore(self, node: fx.Node, value: Any) -> None:
        """``node`` reads ``value``, if that is in another order, in the original one."""
        if value in self.heads:
            self.failed |= self.heads[value].begun
        if value in self.carried:
            # One copy for all, unless something might be written between its readers.
            key = value, None if self._pure else node
            edge = Edge(value, [], self.carried[value], enters=False, parameter=False, safe=True)
            users = self._left.setdefault(key, edge).users
            users.extend([] if node in users else [node])

    def enter(self, node: fx.Node, value: fx.Node, channels: Channels, *, parameter: bool = False) -> bool:
        """Whether ``node`` may read ``value``, which is in the original order, as if it carried ``channels``."""
        shape = shape_of(value)
        if self._is_ordered(value) or shape is None or not _fits(value, channels):
            return False
        few = all(statically_known_true(size == 1) for i, size in enumerate(shape) if i - len(shape) != channels.axis)
        self.flow.edges.append(Edge(value, [node], channels, enters=True, parameter=parameter or few, safe=True))
        return True

    def alone(self, node: fx.Node) -> Channels | None:
        """The channels of the only tensor that ``node`` reads."""
        tensors = [value for value in node.all_input_nodes if not is_number(value)]
        return self.carried.get(tensors[0]) if len(tensors) == 1 else None

    def heads_alone(self, node: fx.Node) -> Heads | None:
        """The heads of the only tensor that ``node`` reads."""
        tensors = [value for value in node.all_input_nodes if not is_number(value)]
        return self.heads.get(tensors[0]) if len(tensors) == 1 else None

    def _is_ordered(self, value: fx.Node) -> bool:
        return value in self.carried or value in self.pieces or value in self.heads

    def broadcast(self, node: fx.Node, values: Sequence[fx.Node]) -> Channels | None:
        """The channels of what is computed from ``values`` number by number, where all can have one order."""
        channels = next(self.carried[value] for value in values if value in self.carried)
        for value in values:
            own, shape = self.carried.get(value), shape_of(value)
            if own is not None:
                if own.axis != channels.axis or not own.join(channels):
                    return None
            elif is_number(value):
                continue
            elif shape is None:
                return None
            # One number for all channels, or one for each.
            elif len(shape) < -channels.axis or statically_known_true(shape[channels.axis] == 1):
                continue
            elif not self.enter(node, value, channels):
                return None
        return channels


def _fits(node: fx.Node, made: Channels | Heads) -> bool:
    shape = shape_of(node)
    if isinstance(made, Heads):
        sizes = {made.axis: len(made.each), made.inner: made.each[0].size}
    else:
        sizes = {made.axis: made.size}
    if shape is None or len(shape) < -min(sizes):
        return False
    return all(statically_known_true(shape[axis] == size) for axis, size in sizes.items())


def nodes_in(arguments: Any) -> list[fx.Node]:
    """All nodes in a nest of arguments."""
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found
