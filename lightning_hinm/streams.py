"""Which layers write one stream of channels, found by tracing the model."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

from torch import nn

from lightning_hinm.passes import find_streams
from lightning_hinm.pattern import HiNMPattern
from lightning_hinm.prune import find_layers
from lightning_hinm.traced import guard, read_graphs, reading_backend, trace_tensors

# A graph, and the layers whose weights its placeholders are, by their names.
_Graph = tuple[Any, dict[str, "ref[nn.Module]"]]


def shared_orders(
    model: nn.Module,
    *inputs: Any,
    pattern: HiNMPattern | Mapping[str, HiNMPattern] | None = None,
    include: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    **named_inputs: Any,
) -> list[list[str]]:
    """The sets of layers that ``torch.compile(model, backend="hinm")`` would restore nothing of, had they one order.

    Layers whose rows are added or multiplied with each other, the two projections that every block adds to the residual
    stream of a transformer for one, leave their rows as they are packed only if all are packed in one order. A set is
    listed where that spares more restores than the ``index_select`` it needs elsewhere. A shared order retains a little
    less saliency than orders of their own.

    Args:
        model: not pruned yet; it is traced in eval mode, and left as it is.
        inputs: what it is called with; shapes are all that matters.
        named_inputs: the same, by name.
        pattern: as for ``prune``, and so are the others: which layers will be pruned. None: ``HiNMPattern()``.
        include: as for ``prune``.
        ignore: as for ``prune``.

    Returns:
        Names of the layers of each set, two or more in each, in the model's order; no layer is in two sets.

    Raises:
        ValueError: as ``prune``, for entries that match nothing, or nothing to prune.
    """
    layers, _ = find_layers(model, HiNMPattern() if pattern is None else pattern, include=include, ignore=ignore)
    wanted = {id(layer.weight): layer for layer in layers}
    found: list[set[str]] = []
    graphs: list[_Graph] = []
    read_graphs(_record_graph, graphs, model, inputs, named_inputs)
    for gm, modules in graphs:
        known = {name: module() for name, module in modules.items()}
        names = {name: layer for name, module in known.items() if module and (layer := wanted.get(id(module.weight)))}
        for stream in find_streams(gm, names.keys()):
            # An order fits layers of one vector_size, and of one group of channels.
            by_size: dict[int, set[str]] = {}
            for node in stream:
                for weight in node.all_input_nodes:
                    if weight.name in names and names[weight.name].groups == 1:
                        layer = names[weight.name]
                        by_size.setdefault(layer.pattern.vector_size, set()).add(layer.name)
            found.extend(by_size.values())
    return _merged(found, [layer.name for layer in layers])


def _read_graph(gm: Any, example_inputs: list[Any]) -> _Graph:
    layers = trace_tensors(gm, example_inputs).layers
    for each in layers.values():
        guard(each.source, each.module)
    return gm, {node.name: ref(each.module) for node, each in layers.items()}


_record_graph = reading_backend(_read_graph)


def _merged(sets: Sequence[set[str]], names: Sequence[str]) -> list[list[str]]:
    """Sets that have a layer in common are one: a layer that is called twice has one order."""
    merged: list[set[str]] = []
    for names_of_set in sets:
        touching = [each for each in merged if each & names_of_set]
        merged = [each for each in merged if not each & names_of_set] + [names_of_set.union(*touching)]
    ordered = [[name for name in names if name in each] for each in merged]
    return sorted((each for each in ordered if len(each) > 1), key=lambda each: names.index(each[0]))
