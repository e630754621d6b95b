"""Feature-major islands: activations between sparse layers that stay in the storage in which kernels like them best."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lightning_hinm import kernels
from lightning_hinm.layout import is_in_order
from lightning_hinm.ops import cost, hinm_conv2d, hinm_linear
from lightning_hinm.passes.rules import ELEMENTWISE, argument
from lightning_hinm.passes.sparsify import finish_pass, held, operand, seen_shape, set_operand
from lightning_hinm.pattern import HiNMPattern
from lightning_hinm.workload import TOKENS


@dataclass(eq=False)
class Island:
    """Values of one storage: from the layers that write them to the layers that read them."""

    writers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    closed: bool = True
    """Whether nothing but sparse layers reads them."""
    feature_major: bool = False


def feature_major_islands_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """Linear layers whose results only linear layers read, past elementwise functions, write them feature-major.

    Before::

        %y = hinm.linear(%x, ..., window)
        %z = hinm.linear(gelu(%y), ...)

    After::

        %y = hinm.linear(%x, ..., window, "none", True)
        %z = hinm.linear(gelu(%y), ...)

    Equal, because ``feature_major`` says how the result lies in memory and not what it is; elementwise functions keep
    the strides of what they take, and the op reads any. So nothing is transposed inside an island, and a transpose
    stands at most at its edges, inside the ops there. On a CPU every island is taken: the rows of a tile are written as
    the product has them, and gathered as whole runs of memory. On a GPU the kernels' predicted times say which of them
    pay.

    Args:
        gm: sparsified; rewritten in place.

    Returns:
        ``gm``.
    """
    islands = [island for island in _find_islands(gm) if island.closed and island.readers]
    _choose(gm, islands)
    chosen = [island for island in islands if island.feature_major]
    for island in chosen:
        for node in island.writers:
            set_operand(node, "feature_major", True)
    return finish_pass(gm, "feature_major_islands_pass", len(chosen), "islands")


def contexts_of(gm: fx.GraphModule) -> dict[int, list[dict[str, Any]]]:
    """How each sparse op of a finished graph runs, in the words of ``plan.Workload``; by the id of its values."""
    read = {
        node: all(operand(writer, "feature_major", False) for writer in island.writers)
        for island in _find_islands(gm)
        for node in island.readers
    }
    contexts: dict[int, list[dict[str, Any]]] = {}
    for node in gm.graph.nodes:
        if node.target in (hinm_linear, hinm_conv2d) and operand(node, "values").op == "get_attr":
            context = {
                "restored": not is_in_order(held(gm, node, "output_order")),
                "feature_major": read.get(node, False),
                "feature_major_out": operand(node, "feature_major", False),
                "activation": operand(node, "activation", "none"),
            }
            contexts.setdefault(id(held(gm, node, "values")), []).append(context)
    return contexts


def _find_islands(gm: fx.GraphModule) -> list[Island]:
    of: dict[fx.Node, Island] = {}
    for node in gm.graph.nodes:  # in an order in which inputs come before their users
        met = {of[source] for source in node.all_input_nodes if source in of}
        if node.target is hinm_linear:
            reads = of.get(node.args[0])
            for island in met - {reads}:
                island.closed = False  # read as an operand
            if reads is not None:
                reads.readers.append(node)
            of[node] = Island(writers=[node])
        elif len(met) > 0 and _keeps_storage(node, of):
            island = _join(met, of)
            of[node] = island
        else:
            for island in met:
                island.closed = False
    return list(dict.fromkeys(of.values()))


def _join(islands: set[Island], of: dict[fx.Node, Island]) -> Island:
    """One island of several: a product of two layers' results has one storage."""
    first, *others = islands
    for other in others:
        first.writers += other.writers
        first.readers += other.readers
        first.closed &= other.closed
        of.update((node, first) for node, island in of.items() if island is other)
    return first


def _keeps_storage(node: fx.Node, of: Mapping[fx.Node, Island]) -> bool:
    """Whether a value lies as the values of the islands lie that it is computed from."""
    others = [source for source in node.all_input_nodes if source not in of]
    if node.target in ELEMENTWISE:
        # Another value of several dimensions may lie otherwise, and the first of the two decides.
        return "memory_format" not in node.kwargs and all(_dimensions(source) <= 1 for source in others)
    if node.target in (F.dropout, F.dropout1d, F.dropout2d):
        return argument(node, 2, "training", True) is False
    before, after = seen_shape(node.all_input_nodes[0]), seen_shape(node)
    reshapes = node.target in ("view", "reshape", "flatten", torch.reshape, torch.flatten)
    return reshapes and None not in (before, after) and before[-1:] == after[-1:]  # type: ignore[index]


def _dimensions(node: fx.Node) -> float:
    value = node.meta.get("example_value")
    if isinstance(value, Tensor):
        return value.dim()
    return math.inf if value is None else 0  # a number, maybe a dynamic one


def _choose(gm: fx.GraphModule, islands: list[Island]) -> None:
    """Which islands are feature-major: changed one at a time, as long as the time of their layers falls."""
    reads = {node: island for island in islands for node in island.readers}
    writes = {node: island for island in islands for node in island.writers}
    undecided = []
    for island in islands:
        if all(operand(node, "expansion_metadata") is None for node in (*island.writers, *island.readers)):
            island.feature_major = True  # of no kernel
        else:
            undecided.append(island)

    def seconds(island: Island) -> float:
        nodes = dict.fromkeys((*island.writers, *island.readers))
        storage = (
            (node in reads and reads[node].feature_major, node in writes and writes[node].feature_major)
            for node in nodes
        )
        return sum(_predict(gm, node, *lies) for node, lies in zip(nodes, storage, strict=True))

    while undecided:
        changed = False
        for island in undecided:
            before = seconds(island)
            island.feature_major = not island.feature_major
            if seconds(island) < before:
                changed = True
            else:
                island.feature_major = not island.feature_major
        if not changed:
            break


def _predict(gm: fx.GraphModule, node: fx.Node, *storage: bool) -> float:
    """Seconds of a layer on the kernel that should be fastest, for input and result in rows or feature-major."""
    if operand(node, "expansion_metadata") is None:
        return 0.0
    device = held(gm, node, "expansion").device
    pattern = HiNMPattern(*(operand(node, name) for name in HiNMPattern.__dataclass_fields__))
    shape = seen_shape(node.args[0])  # type: ignore[arg-type]
    tokens = TOKENS if shape is None else math.prod(shape[:-1])
    rows, activated = len(held(gm, node, "output_order")), operand(node, "activation", "none") != "none"
    call = cost.Call(pattern, rows, operand(node, "in_features"), tokens, *storage, activated=activated)
    return cost.choose_kernel(call, kernels.shared_limit(device), cost.gpu_of(device)).seconds
