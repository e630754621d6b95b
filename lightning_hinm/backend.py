"""``torch.compile(model, backend="hinm")``: pruned layers become sparse ops, the rest goes to the inner backend."""

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lightning_hinm.layout import HiNMLayout
from lightning_hinm.modules import PACKED_TENSORS, HiNMLayer, pack_layer, pack_weight
from lightning_hinm.ops import EXPANDED, hinm_conv2d, hinm_linear, warn_once
from lightning_hinm.passes import (
    LayerCall,
    absorb_orders_pass,
    find_fused_calls,
    find_layer_calls,
    fuse_activations_pass,
    lift_tensors_pass,
    sparsify_layers_pass,
    unfuse_encoder_layers_pass,
)
from lightning_hinm.pattern import layer_kind
from lightning_hinm.plan import TOKENS, decide, workload_of
from lightning_hinm.prune import LAYOUT_ATTRIBUTE, layout_of

log = logging.getLogger(__name__)

OPTIONS = {"plan": ("auto", "sparse", "dense"), "inner": ("inductor", "aot_eager", "eager")}


class PackedTwin:
    """The packed weight of a dense layer, and the state of that weight when it was packed.

    All graphs of a layer share one twin. They hold its buffers, so a repack in place reaches them all.
    """

    def __init__(self, name: str, module: nn.Module, layout: HiNMLayout) -> None:
        self.name = name
        self.layer = pack_layer(module, name=name)
        self._layout = weakref.ref(layout)  # a graph must not keep alive what it is guarded by
        self._stamp = _stamp(module.weight)  # type: ignore[arg-type]

    def fits(self, weight: Tensor) -> bool:
        """Whether ``weight`` can be packed in place."""
        return (weight.dtype, weight.device) == (self.layer.values.dtype, self.layer.values.device)

    def is_fresh(self, weight: Tensor) -> bool:
        """Whether ``weight`` is what was packed. Writes through ``.data`` cannot be seen."""
        reference, version, pointer = self._stamp
        if reference() is not weight or weight.data_ptr() != pointer:
            return False
        return weight.is_inference() or weight._version == version

    def repack(self, weight: Tensor) -> None:
        """Packs ``weight``, of the shape and kind that it had, in place.

        Raises:
            ValueError: if it has anything outside the pattern.
        """
        layout = self._layout()
        assert layout is not None, "the guard of a graph fails with its layout"  # noqa: S101
        self.layer.repack(pack_weight(weight, layout, kind=self.layer.kind, groups=self.layer.groups, name=self.name))
        self._stamp = _stamp(weight)
        log.info("hinm: repacked %s", self.name)


class TracedTensor(NamedTuple):
    """A module's tensor that Dynamo met, and its key there; ``source`` is Dynamo's path to the module."""

    tensor: Tensor
    key: str
    module: nn.Module
    name: str
    source: Any


# Derived from the layers alone, and gone with their layouts. A layout belongs to one layer.
_twins: "weakref.WeakKeyDictionary[HiNMLayout, PackedTwin]" = weakref.WeakKeyDictionary()


def hinm_backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend ``"hinm"`` of ``torch.compile``.

    Layers that carry a layout run as ``hinm::linear`` and ``hinm::conv2d``, in the same graph as those that ``to_hinm``
    has converted. A graph that needs gradients is compiled dense, as it stands. Each call checks that the weights are
    still those that were packed, and packs anew if not.

    Args:
        gm: from Dynamo; rewritten in place.
        example_inputs: from Dynamo: the real parameters among them.
        options: ``plan``: ``"auto"`` (default) leaves a layer dense where that is faster, ``"sparse"`` never and
            ``"dense"`` always. ``inner``, the backend for the rest: ``"inductor"`` (default), ``"aot_eager"`` or
            ``"eager"``.

    Raises:
        ValueError: for unknown options, or weights that are not zero outside their pattern.
    """
    plan, inner_name = _read_options(options or {})
    from torch._dynamo.backends.registry import lookup_backend

    inner = lookup_backend(inner_name)
    if plan == "dense":
        return inner(gm, example_inputs)
    calls = find_layer_calls(gm) + find_fused_calls(gm)
    traced = _trace_tensors(gm, example_inputs)
    layers = {node: each for node, each in traced.items() if each.key == "weight" and layer_kind(each.module)}
    converted = {
        node: each
        for node, each in traced.items()
        if isinstance(each.module, HiNMLayer) and each.key in (*PACKED_TENSORS, *EXPANDED)
    }
    layouts = {node: layout for node, layer in layers.items() if (layout := layout_of(layer.module)) is not None}
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        idle = [layers[node].name for node in layouts if not layers[node].module.training]
        if idle:
            warn_once(
                f"torch.compile(backend='hinm'): gradients are enabled, so {len(idle)} pruned layers run dense "
                f"({_few(idle)}). For inference, call the model under torch.inference_mode()."
            )
        return inner(gm, example_inputs)
    for each in layers.values():
        _guard(each.source, each.module, LAYOUT_ATTRIBUTE)
    for each in {each.module: each for each in converted.values()}.values():
        _guard(each.source, each.module, "packing")
    if not layouts and not converted:
        _warn_without_layout(gm, calls)
        return inner(gm, example_inputs)
    reached = {call.weight for call in calls}
    _warn_out_of_reach({layers[node].name: node for node in layouts if node not in reached})
    twins = _make_twins(layers, {node: layout for node, layout in layouts.items() if node in reached})
    if plan == "auto":
        twins = {node: twin for node, twin in twins.items() if _pays(node, twin, calls)}
    packed = {node.name: twin.layer for node, twin in twins.items()}
    lift_tensors_pass(gm, {node.name: each.tensor for node, each in converted.items()})
    sparsify_layers_pass(unfuse_encoder_layers_pass(gm, packed.keys()), packed)
    fuse_activations_pass(absorb_orders_pass(gm))
    positions = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    checks = [(positions[node], twin) for node, twin in twins.items()]
    compiled = inner(gm, example_inputs)

    def run(*args: Any) -> Any:
        stale = [(twin, args[i]) for i, twin in checks if not twin.is_fresh(args[i])]
        if stale:
            _repack_all(stale)
        return compiled(*args)

    return run


def repack(model: nn.Module) -> None:
    """Packs every weight of ``model`` anew: needed after writes through ``.data``, which nothing else can notice.

    Args:
        model: what was compiled, or the module inside, or a converted model whose packed values were changed by hand.

    Raises:
        ValueError: if a weight is not zero outside its pattern; all offenders in one message.
    """
    layouts = [(module, layout) for module in model.modules() if (layout := layout_of(module)) is not None]
    _repack_all([(_twins[layout], module.weight) for module, layout in layouts if layout in _twins])  # type: ignore
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            if isinstance(module, HiNMLayer):
                module.repack(module.packed)


def _read_options(options: Mapping[str, Any]) -> tuple[str, str]:
    wrong = [
        f"{name}={value!r} must be one of {', '.join(OPTIONS[name])}"
        if name in OPTIONS
        else f"{name!r} is unknown, only {' and '.join(OPTIONS)} are options"
        for name, value in options.items()
        if name not in OPTIONS or value not in OPTIONS[name]
    ]
    if wrong:
        raise ValueError(f"torch.compile(backend='hinm', options=...): {'; '.join(wrong)}.")
    return options.get("plan", "auto"), options.get("inner", "inductor")


def _make_twins(
    layers: Mapping[fx.Node, TracedTensor], layouts: Mapping[fx.Node, HiNMLayout]
) -> dict[fx.Node, PackedTwin]:
    """The packed twin of each layer, shared with the graphs that were compiled before."""
    twins, wrong = {}, []
    for node, layout in layouts.items():
        name, module = layers[node].name, layers[node].module
        weight: Tensor = module.weight  # type: ignore[assignment]
        twin = _twins.get(layout)
        try:
            if twin is None or not twin.fits(weight):
                twin = _twins[layout] = PackedTwin(name, module, layout)
            elif not twin.is_fresh(weight):
                twin.repack(weight)
            twins[node] = twin
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("Nothing was compiled:\n  " + "\n  ".join(wrong))
    return twins


def _repack_all(stale: Sequence[tuple[PackedTwin, Tensor]]) -> None:
    wrong = []
    for twin, weight in stale:
        try:
            twin.repack(weight)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("Weights changed, and cannot be packed any more:\n  " + "\n  ".join(wrong))


def _pays(node: fx.Node, twin: PackedTwin, calls: Sequence[LayerCall]) -> bool:
    """Whether all calls of a layer together are faster sparse, on the shapes that Dynamo saw."""
    decisions = []
    for call in calls:
        if call.weight is node and "example_value" in call.x.meta:
            shape = tuple(_hint(size) for size in call.x.meta["example_value"].shape)
            if call.kind == "linear":  # x of a fused call is the input of what it is fused into
                shape = (*shape[:-1], twin.layer.shape[1])
            decisions.append(decide(workload_of(twin.layer, shape)))
    pays = sum(d.sparse_seconds for d in decisions) < sum(d.dense_seconds for d in decisions)
    pays = pays and any(d.path == "sparse" for d in decisions)
    reasons = "; ".join(d.reason for d in decisions)
    log.info("hinm: %s runs %s: %s", twin.name, "sparse" if pays else "dense", reasons)
    return pays


def _hint(size: Any) -> int:
    """A dynamic size stands for the one that was seen."""
    return size if isinstance(size, int) else int(size.node.hint or TOKENS)


def _trace_tensors(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[fx.Node, TracedTensor]:
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
    return traced


def _guard(source: Any, module: nn.Module, attribute: str) -> None:
    """Has Dynamo compile anew where an attribute of a module is another object, or there is one at last.

    Dynamo shares a graph between all modules of a class, whose layouts differ. As for any object that a graph is
    specialised on, its limit of recompilations then counts for each root module on its own.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, LocalSource

    if attribute not in module.__dict__:
        absent = functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=attribute)
        install_guard(source.make_guard(absent))
        return
    install_guard(AttrSource(source, attribute).make_guard(GuardBuilder.ID_MATCH))
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


def _warn_without_layout(gm: fx.GraphModule, calls: Sequence[LayerCall]) -> None:
    sparse = any(node.target in (hinm_linear, hinm_conv2d) for node in gm.graph.nodes)
    if calls and not sparse:
        warn_once(
            f"torch.compile(backend='hinm'): none of {len(calls)} linear and convolution layers in the graph has a "
            "layout, so all run dense. Prune the model by prune() or HiNMPruning; in a new process, call "
            "load_layouts(model, ckpt_path) after loading the weights."
        )


def _warn_out_of_reach(weights: Mapping[str, fx.Node]) -> None:
    if weights:
        users = sorted(
            {getattr(user.target, "__name__", str(user.target)) for node in weights.values() for user in node.users}
        )
        warn_once(
            f"torch.compile(backend='hinm'): {len(weights)} pruned layers run dense ({_few(list(weights))}), because "
            f"{_few(users)} takes their weights by itself. Only a call of the layer becomes a sparse op."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _stamp(weight: Tensor) -> tuple["weakref.ref[Tensor]", int, int]:
    # Inference tensors count no versions.
    return weakref.ref(weight), -1 if weight.is_inference() else weight._version, weight.data_ptr()
