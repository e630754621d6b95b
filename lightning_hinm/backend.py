"""``torch.compile(model, backend="hinm")``: pruned layers become sparse ops, the rest goes to the inner backend."""

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lightning_hinm.format import HiNMWeight
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.modules import HiNMLayer, Packing, pack_weight
from lightning_hinm.ops import hinm_conv2d, hinm_linear, warn_once
from lightning_hinm.ops.operands import is_channels_last
from lightning_hinm.options import Options, read_options
from lightning_hinm.passes import (
    LayerCall,
    absorb_orders_pass,
    contexts_of,
    feature_major_islands_pass,
    find_calls,
    find_norm_calls,
    fold_norm,
    fold_norms_pass,
    fuse_activations_pass,
    lift_tensors_pass,
    seen_shape,
    sparsify_layers_pass,
    unfuse_encoder_layers_pass,
)
from lightning_hinm.passes.sparsify import operand
from lightning_hinm.pattern import layer_kind
from lightning_hinm.plan import decide
from lightning_hinm.prune import layout_of
from lightning_hinm.traced import (
    Traced,
    TracedTensor,
    copy_graph,
    find_aliases,
    guard,
    guard_layouts,
    trace_tensors,
)
from lightning_hinm.twins import Maker, PackedTwin, repack_all, twin_of, twins_of
from lightning_hinm.workload import Workload, workload_of

log = logging.getLogger(__name__)


class Sparsified(NamedTuple):
    """The twins that a graph runs, each with the placeholders that it is made of; and by the placeholder of its weight
    the calls on which it was decided whether a layer is one of them, if it was."""

    twins: list[tuple[PackedTwin, tuple[fx.Node, ...]]]
    workloads: Mapping[fx.Node, Sequence[Workload]]


class Origin(NamedTuple):
    """The input of a graph that the packed weight of a sparse op comes from, and how."""

    node: fx.Node
    name: str
    owner: HiNMLayout | Packing
    make: Maker
    layer: HiNMLayer


def hinm_backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend ``"hinm"`` of ``torch.compile``.

    Layers that carry a layout run as ``hinm::linear`` and ``hinm::conv2d``, in the same graph as those that ``to_hinm``
    has converted. A graph that needs gradients is compiled dense, as it stands. Each call checks that the weights are
    still those that were packed, and packs anew if not.

    Args:
        gm: from Dynamo; rewritten in place.
        example_inputs: from Dynamo: the real parameters among them.
        mode: of Inductor, one of ``torch._inductor.list_mode_options()``: ``"reduce-overhead"`` runs in CUDA graphs.
        options: ``plan``: ``"auto"`` (default) leaves a layer dense where that is faster on inputs of the sizes that
            Dynamo has seen, ``"sparse"`` never and ``"dense"`` always. ``inner``, the backend for the rest:
            ``"inductor"`` (default), ``"aot_eager"`` or ``"eager"``. ``mode``, because ``torch.compile`` takes no
            ``mode`` beside ``options``.

    Raises:
        ValueError: for unknown options, or weights that are not zero outside their pattern.
    """
    chosen = read_options(mode, options)
    inner = chosen.inner_backend()
    if chosen.plan == "dense":
        return inner(gm, example_inputs)
    traced = trace_tensors(gm, example_inputs)
    pruned = traced.pruned
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        idle = [each.name for each in pruned.values() if not each.module.training]
        if idle:
            warn_once(
                f"torch.compile(backend='hinm'): gradients are enabled, so {len(idle)} pruned layers run dense "
                f"({_few(idle)}). For inference, call the model under torch.inference_mode()."
            )
        return inner(gm, example_inputs)
    guard_layouts(traced)
    aliases = find_aliases(gm, example_inputs, traced)
    if aliases:
        warn_once(
            f"torch.compile(backend='hinm'): {len(aliases)} pruned layers run dense ({_few(list(aliases.values()))}), "
            "because their weights are reached by another way than the layers' own `weight`. Call the layers instead."
        )
    if not pruned and not traced.converted:
        if not aliases:
            _warn_without_layout(gm)
        return inner(gm, example_inputs)
    reached = {call.weight for call in find_calls(gm)}
    _warn_out_of_reach({each.name: node for node, each in pruned.items() if node not in reached})
    twins = sparsify_graph(gm, traced, chosen).twins
    finish_graph(gm)
    positions = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    checks = [(twin, [positions[node] for node in nodes]) for twin, nodes in twins]
    compiled = inner(gm, example_inputs)

    def run(*args: Any) -> Any:
        stale = [
            (twin, sources)
            for twin, places in checks
            if not twin.is_fresh(sources := [args[place] for place in places])
        ]
        if stale:
            repack_all(stale)
        return compiled(*args)

    return run


def sparsify_graph(gm: fx.GraphModule, traced: Traced, options: Options) -> Sparsified:
    """The calls of pruned layers become sparse ops, which still restore all orders, and the norms behind them fold.

    Args:
        gm: from Dynamo; rewritten in place.
        traced: its tensors.
        options: how it is compiled, not ``plan="dense"``.

    Raises:
        ValueError: for weights that are not zero outside their pattern; all offenders in one message.
    """
    calls = find_calls(gm)
    reached = {call.weight for call in calls}
    pruned = {node: each for node, each in traced.pruned.items() if node in reached}
    twins, workloads = _make_twins(pruned), {}
    if options.plan == "auto":
        workloads = _find_workloads(gm, pruned, twins, calls, options)
        twins = {node: twin for node, twin in twins.items() if _wins(twin.name, workloads[node])}
    converted = traced.converted
    lift_tensors_pass(gm, {node.name: each.tensor for node, each in converted.items()})
    _sparsify(gm, twins)
    origins = [
        Origin(node, twin.name, layout_of(pruned[node].module), twin.make, twin.layer)  # type: ignore[arg-type]
        for node, twin in twins.items()
    ]
    origins += [_converted_origin(node, each) for node, each in converted.items() if each.key == "values"]
    folded = _fold_norms(gm, traced.tensors, origins)
    held = {id(tensor) for tensor in gm.buffers()}
    used = [(twin, (node,)) for node, twin in twins.items() if id(twin.layer.values) in held]
    return Sparsified([*used, *folded], workloads)


def finish_graph(gm: fx.GraphModule) -> None:
    """What sparse ops can do for each other."""
    feature_major_islands_pass(fuse_activations_pass(absorb_orders_pass(gm)))


def repack(model: nn.Module) -> None:
    """Packs every weight of ``model`` anew: needed after writes through ``.data``, which nothing else can notice.

    Args:
        model: what was compiled, or the module inside, or a converted model whose packed values were changed by hand.

    Raises:
        ValueError: if a weight is not zero outside its pattern; all offenders in one message.
    """
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            if isinstance(module, HiNMLayer):
                module.repack(module.packed)
    stale = []
    for module in model.modules():
        packed = isinstance(module, HiNMLayer)
        for twin in twins_of(module.packing if packed else layout_of(module)):  # type: ignore[arg-type]
            sources = [module.values if packed else module.weight, *twin.sources[1:]]
            if all(source is not None for source in sources):  # else it is not fresh, whatever happens here
                stale.append((twin, sources))
    repack_all(stale)  # type: ignore[arg-type]


def _make_twins(layers: Mapping[fx.Node, TracedTensor]) -> dict[fx.Node, PackedTwin]:
    """The packed twin of each pruned layer, shared with the graphs that were compiled before."""
    twins, wrong = {}, []
    for node, (weight, _, module, name, _) in layers.items():
        layout, kind, groups = layout_of(module), str(layer_kind(module)), int(getattr(module, "groups", 1))
        assert layout is not None  # noqa: S101
        make = functools.partial(_pack, weakref.ref(layout), kind=kind, groups=groups, name=name)
        create = functools.partial(PackedTwin, name, [weight], make, kind=kind, groups=groups)
        try:
            twins[node] = twin_of(layout, weakref.ref(module), [weight], create)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("Nothing was compiled:\n  " + "\n  ".join(wrong))
    return twins


def _sparsify(gm: fx.GraphModule, twins: Mapping[fx.Node, PackedTwin]) -> None:
    packed = {node.name: twin.layer for node, twin in twins.items()}
    sparsify_layers_pass(unfuse_encoder_layers_pass(gm, packed.keys()), packed)


def _pack(layout: "weakref.ref[HiNMLayout]", weight: Tensor, **like: Any) -> tuple[HiNMWeight, None]:
    own = layout()  # a graph must not keep alive what it is guarded by
    assert own is not None, "the guard of a graph fails with its layout"  # noqa: S101
    return pack_weight(weight, own, **like), None


def _converted_origin(node: fx.Node, values: TracedTensor) -> Origin:
    layer = values.module
    assert isinstance(layer, HiNMLayer)  # noqa: S101
    return Origin(node, values.name, layer.packing, functools.partial(_with_values, layer.packed), layer)


def _with_values(packed: HiNMWeight, values: Tensor) -> tuple[HiNMWeight, None]:
    return replace(packed, values=values), None


def _fold_norms(
    gm: fx.GraphModule, traced: Mapping[fx.Node, TracedTensor], origins: Sequence[Origin]
) -> list[tuple[PackedTwin, tuple[fx.Node, ...]]]:
    """Folds every norm that stays what it is; the twins that took the place of layers, and what they are made of."""
    by_values = {id(origin.layer.values): origin for origin in origins}
    layers, folded = {}, []
    for call in find_norm_calls(gm):
        origin = by_values.get(id(getattr(gm, operand(call.op, "values").target)))
        statistics = traced.get(call.tensors["running_mean"])
        if origin is None or statistics is None or not all(node in traced for node in call.tensors.values()):
            continue
        nodes = (origin.node, *call.tensors.values())
        sources, norm, names = [traced[node].tensor for node in nodes], statistics.module, tuple(call.tensors)
        if not _counts_batches(norm, call.norm) or any(tensor.is_inference() for tensor in sources):
            continue  # a training of the norm could not be seen
        make = functools.partial(_fold, origin.make, names, eps=call.eps, name=origin.name)
        owners = [(weakref.ref(traced[node].module), traced[node].key) for node in nodes]
        kind, groups = origin.layer.kind, origin.layer.groups
        create = functools.partial(PackedTwin, origin.name, sources, make, kind=kind, groups=groups, norm=norm)
        try:
            twin = twin_of(origin.owner, (call.eps, names, *owners), sources, create)
        except ValueError as error:
            log.info("hinm: a norm stays: %s", error)
            continue
        guard(statistics.source, norm)
        layers[call.op.name] = twin.layer
        folded.append((twin, nodes))
    fold_norms_pass(gm, layers)
    return folded


def _counts_batches(norm: nn.Module, call: fx.Node) -> bool:
    """Whether ``num_batches_tracked`` tells that the norm was trained: of a forward of its own, a copy is asked."""
    forward = type(norm).forward
    if norm._buffers.get("num_batches_tracked") is None:
        return False
    if forward in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward):
        return True
    try:
        with torch.random.fork_rng(devices=()), torch.inference_mode(False), torch.no_grad():
            asked: Any = copy.deepcopy(norm).cpu().train()
            before, statistics = asked.num_batches_tracked.clone(), asked.running_mean
            shape = (2, len(statistics), *[2] * (call.meta["example_value"].dim() - 2))
            forward(asked, statistics.new_ones(shape))
            return not torch.equal(before, asked.num_batches_tracked)
    except Exception as error:  # it may do anything
        log.info("hinm: a norm stays, because a copy of it cannot be trained: %r", error)
        return False


def _fold(
    make: Maker, names: Sequence[str], weight: Tensor, *tensors: Tensor, eps: float, name: str
) -> tuple[HiNMWeight, Tensor]:
    packed, _ = make(weight)
    return fold_norm(packed, **dict(zip(names, tensors, strict=True)), eps=eps, name=name)


def _find_workloads(
    gm: fx.GraphModule,
    layers: Mapping[fx.Node, TracedTensor],
    twins: Mapping[fx.Node, PackedTwin],
    calls: Sequence[LayerCall],
    options: Options,
) -> dict[fx.Node, list[Workload]]:
    """The calls of each layer: on the shapes that Dynamo saw, and each with the order and the storage that it would
    have if all layers were sparse."""
    mkldnn: Any = torch.backends.mkldnn
    turned = options.inner == "inductor" and mkldnn.is_available() and mkldnn.enabled
    trial = copy_graph(gm)
    _sparsify(trial, twins)
    finish_graph(trial)
    contexts = contexts_of(trial)
    found = {}
    for node, twin in twins.items():
        workloads = []
        for call in calls:
            shape = seen_shape(call.x) if call.weight is node else None
            if shape is not None:
                if call.kind == "linear":  # x of a fused call is the input of what it is fused into
                    shape = (*shape[:-1], twin.layer.shape[1])
                workload = workload_of(layers[node].module, shape, replayed=options.replays)
                if call.kind == "conv2d":  # on a CPU, Inductor turns all images channels last
                    last = (turned and workload.device.type == "cpu") or is_channels_last(call.x.meta["example_value"])
                    workload = replace(workload, channels_last=last)
                workloads.append(workload)
        own = contexts.get(id(twin.layer.values), [])
        if len(own) == len(workloads):
            workloads = [replace(workload, **context) for workload, context in zip(workloads, own, strict=True)]
        found[node] = workloads
    return found


def _wins(name: str, workloads: Sequence[Workload]) -> bool:
    decision = decide(*workloads)
    log.info("hinm: %s runs %s: %s", name, decision.path, decision.reason)
    return decision.path == "sparse"


def _warn_without_layout(gm: fx.GraphModule) -> None:
    calls = find_calls(gm)
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
