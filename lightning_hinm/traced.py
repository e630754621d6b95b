"""Which modules the tensors of a Dynamo graph belong to, what has Dynamo compile it anew, and how graphs are read."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lightning_hinm.modules import PACKED_TENSORS, HiNMLayer
from lightning_hinm.ops import EXPANDED
from lightning_hinm.pattern import layer_kind, named_layers
from lightning_hinm.prune import LAYOUT_ATTRIBUTE, layout_of

log = logging.getLogger(__name__)

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
_told: ContextVar[list[Any]] = ContextVar("told")


class TracedTensor(NamedTuple):
    """A module's tensor that Dynamo met, and its key there; ``source`` is Dynamo's path to the module."""

    tensor: Tensor
    key: str
    module: nn.Module
    name: str
    source: Any


class Traced(NamedTuple):
    """The tensors of modules among the placeholders of a graph."""

    tensors: dict[fx.Node, TracedTensor]

    @property
    def layers(self) -> dict[fx.Node, TracedTensor]:
        """The weights of prunable layers."""
        return {node: each for node, each in self.tensors.items() if each.key == "weight" and layer_kind(each.module)}

    @property
    def pruned(self) -> dict[fx.Node, TracedTensor]:
        """Those of them that have a layout."""
        return {node: each for node, each in self.layers.items() if layout_of(each.module) is not None}

    @property
    def converted(self) -> dict[fx.Node, TracedTensor]:
        """The tensors of packed layers."""
        names = (*PACKED_TENSORS, *EXPANDED)
        return {
            node: each
            for node, each in self.tensors.items()
            if isinstance(each.module, HiNMLayer) and each.key in names and not each.tensor.is_meta
        }


def trace_tensors(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Traced:
    """The module of each placeholder that is a module's parameter or buffer.

    A tensor does not know its module, and a copied module is not its original. Dynamo knows by which path it reached
    each tensor, so that path is walked again, and what it leads to is checked by identity.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    traced = {}
    for node, example in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is None or not isinstance(example, Tensor):
            continue
        try:
            output = InstructionTranslator.current_tx().output
            key, source = source.index, source.base.base  # from ``._parameters["weight"]`` to its module
            module, name = _walk(source, output.local_scope, output.global_scope)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            log.debug("hinm: %s is reached by a path that cannot be walked: %r", node.name, error)
            continue
        if isinstance(module, nn.Module) and (module._parameters | module._buffers).get(key) is example:
            traced[node] = TracedTensor(example, key, module, name or type(module).__name__, source)
    return Traced(traced)


def find_aliases(gm: fx.GraphModule, example_inputs: Sequence[Any], traced: Traced) -> dict[fx.Node, str]:
    """The placeholders of weights of pruned layers that are reached as something else: their layers' names."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    scope = InstructionTranslator.current_tx().output.local_scope
    layers = {}
    for root in scope.values():
        if isinstance(root, nn.Module):
            pruned = ((name, each) for name, each in named_layers(root).items() if layout_of(each) is not None)
            layers.update({id(each.weight): name for name, each in pruned})
    placeholders = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
    found = {node: layers[id(example)] for node, example in placeholders if id(example) in layers}
    return {node: name for node, name in found.items() if node not in traced.pruned}


def guard_layouts(traced: Traced) -> None:
    """Has Dynamo compile anew where a layout, or how a converted layer is packed, is another one."""
    for each in traced.layers.values():
        guard(each.source, each.module, LAYOUT_ATTRIBUTE)
    for each in {each.module: each for each in traced.converted.values()}.values():
        guard(each.source, each.module, "packing")


def guard(source: Any, module: nn.Module, attribute: str | None = None) -> None:
    """Has Dynamo compile anew where a module, or an attribute of it, is another object, or there is one at last.

    Dynamo shares a graph between all modules of a class, whose layouts differ. As for any object that a graph is
    specialised on, its limit of recompilations then counts for each root module on its own.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, LocalSource
    from torch._dynamo.symbolic_convert import InstructionTranslator

    if attribute is not None and attribute not in module.__dict__:
        absent = functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=attribute)
        install_guard(source.make_guard(absent))
        return
    exact = source if attribute is None else AttrSource(source, attribute)
    install_guard(exact.make_guard(GuardBuilder.ID_MATCH))
    while hasattr(source, "base"):
        source = source.base
    # Not if it is the tuple of a ``*args``, as a decorated forward has one: that is another at each call.
    local_scope = InstructionTranslator.current_tx().output.local_scope
    if isinstance(source, LocalSource) and isinstance(local_scope.get(source.local_name), nn.Module):
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def _walk(source: Any, local_scope: Mapping[str, Any], global_scope: Mapping[str, Any]) -> tuple[Any, str]:
    """The object that a Dynamo source stands for, and the module path on the way to it."""
    if hasattr(source, "local_name"):
        return local_scope[source.local_name], ""
    if hasattr(source, "global_name"):
        return global_scope[source.global_name], ""
    base, name = _walk(source.base, local_scope, global_scope)
    if hasattr(source, "member"):
        return getattr(base, source.member), name
    if hasattr(source, "index"):
        return base[source.index], f"{name}.{source.index}".lstrip(".")
    return base, name  # a wrapper that only says how to guard


def reading_backend(read: Callable[[fx.GraphModule, list[Any]], Any]) -> Backend:
    """A backend that runs each graph as it is, and tells ``read_graphs`` at each call what ``read`` found in it.

    One backend for all models, and told at each call, because Dynamo keeps the graphs of a model that it cannot capture
    whole: a second reading runs them again, and uses up none of the recompilations that a user may need. So what
    ``read`` found must keep no model alive, and ``read`` must guard the modules that it is about.

    Args:
        read: is given a copy of the graph, and Dynamo's inputs of it.
    """

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found = read(copy_graph(gm), example_inputs)

        def run(*args: Any) -> Any:
            _told.get().append(found)
            return gm.forward(*args)

        return run

    return backend


def read_graphs(
    backend: Backend, found: list[Any], model: nn.Module, inputs: Sequence[Any], named_inputs: Mapping[str, Any]
) -> None:
    """Calls a model, in eval mode and without gradients; what the user compiled of it stays compiled.

    Args:
        backend: of ``reading_backend``.
        found: what it reads in each graph is appended, once for each call of the graph, also if another one fails.
        model: left as it is.
        inputs: of ``model.forward``.
        named_inputs: of ``model.forward``.
    """
    import torch._dynamo

    def call() -> Any:
        return model(*inputs, **named_inputs)

    token = _told.set(found)
    try:
        with evaluating(model):
            torch.compile(call, backend=backend)()
    finally:
        _told.reset(token)
        torch._dynamo.reset_code(call.__code__)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, on the same tensors, that may be rewritten."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
