"""Which modules the tensors of a Dynamo graph belong to, and what has Dynamo compile it anew."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from lightning_hinm.modules import PACKED_TENSORS, HiNMLayer
from lightning_hinm.ops import EXPANDED
from lightning_hinm.pattern import layer_kind
from lightning_hinm.prune import LAYOUT_ATTRIBUTE, layout_of

log = logging.getLogger(__name__)


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

    if attribute is not None and attribute not in module.__dict__:
        absent = functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=attribute)
        install_guard(source.make_guard(absent))
        return
    exact = source if attribute is None else AttrSource(source, attribute)
    install_guard(exact.make_guard(GuardBuilder.ID_MATCH))
    while hasattr(source, "base"):
        source = source.base
    if isinstance(source, LocalSource):
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
