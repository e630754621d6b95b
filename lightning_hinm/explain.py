"""What becomes of every layer of a model, and why: packed, timed, decided and traced."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import fx, nn

from lightning_hinm.backend import sparsify_graph
from lightning_hinm.format import HiNMWeight, pack
from lightning_hinm.layout import is_in_order
from lightning_hinm.ops import expanded_bytes, form_of, hinm_conv2d, hinm_linear
from lightning_hinm.options import Options
from lightning_hinm.passes import find_calls, find_layer_calls, orders_of
from lightning_hinm.passes.sparsify import operand
from lightning_hinm.pattern import layer_kind, other_kind, plain_name
from lightning_hinm.plan import LayerPlan, ModelPlan, decide
from lightning_hinm.prune import PrunableLayer, layout_of
from lightning_hinm.traced import evaluating, guard_layouts, read_graphs, reading_backend, trace_tensors
from lightning_hinm.workload import (
    LEAST,
    MOST,
    SECONDS,
    Workload,
    measuring_anew,
    packed_of,
    wait_for,
    workload_of,
)


class Forward(NamedTuple):
    """What one forward of a model takes, in seconds, and its layers in it: all their calls, and the inputs of each."""

    seconds: float
    layers: Mapping[nn.Module, float]
    shapes: Mapping[nn.Module, list[tuple[int, ...]]]


class Place(NamedTuple):
    """Where an order ends, or is stopped: a layer, or the word for what is none. Graphs outlive models."""

    layer: "ref[nn.Module] | None"
    word: str


class Fate(NamedTuple):
    """What a graph does with the order of one call of a layer, at which places, and why."""

    layer: "ref[nn.Module]"
    word: str
    places: tuple[Place, ...] = ()
    reason: str = ""


class Reading(NamedTuple):
    """What a graph does with its layers: the fates of their orders, and the calls on which each was decided."""

    fates: list[Fate]
    workloads: "list[tuple[ref[nn.Module], Sequence[Workload]]]"


OUT_OF_REACH = "out of reach of"
SPARSE_OPS = (hinm_linear, hinm_conv2d)


@measuring_anew()
def explain(model: nn.Module, *inputs: Any, **named_inputs: Any) -> ModelPlan:
    """What ``torch.compile(model, backend="hinm")`` does with every layer of a pruned or converted model, and why.

    Two times decide on a layer, dense and sparse, both measured there and then, alone and on random numbers: of a small
    input, or, with inputs, of all its calls in one forward, each in the order and the storage that its graph gives it.
    With inputs the model is run on them, in eval mode and without gradients:

    * in eager mode, to measure the calls of each layer inside the model as it stands, and all that is around them:
      medians of several forwards, whose sum is the time of the whole. On a GPU each layer is waited for, which takes
      longer than a forward that is left alone, and the fused kernel of ``nn.TransformerEncoderLayer`` is not used;
    * once traced by Dynamo, to read in its graphs which layers run sparse, and what becomes of the order of each one's
      rows. That is what a compiled model does; in eager mode a converted one restores every order.

    It takes no mode, but what Inductor is configured for: inside ``torch._inductor.config.patch({"triton.cudagraphs":
    True})`` it explains ``mode="reduce-overhead"``, and on a GPU both times of a layer are those of a CUDA graph. The
    times of the model stay those of eager mode.

    Args:
        model: pruned, converted, or neither: a layer without a layout is listed as dense.
        inputs: of ``model.forward``.
        named_inputs: of ``model.forward``.

    Returns:
        The plan of every layer, and what the whole model gains. What could not be traced is said in a note.
    """
    model = getattr(model, "_orig_mod", model)
    named = ((plain_name(path), module) for path, module in model.named_modules())
    layers = {name: module for name, module in named if layer_kind(module) or packed_of(module) or other_kind(module)}
    if not inputs and not named_inputs:
        return ModelPlan(tuple(_explain_layers(layers, None, [])))
    with evaluating(model):
        forward = time_forward(model, list(layers.values()), inputs, named_inputs)
    readings: list[Reading] = []
    notes: list[str] = []
    if any(packed_of(module) or layout_of(module) for module in layers.values()):
        readings, notes = trace_layers(model, inputs, named_inputs)
    plans = _explain_layers(layers, forward, readings)
    plans = _add_orders(plans, layers, [fate for reading in readings for fate in reading.fates])
    unknown = [plan.name for plan in plans if plan.path == "sparse" and plan.calls and plan.order is None]
    if unknown and not notes:
        notes = [f"Order unknown of {', '.join(unknown)}: no call of it is in a graph that Dynamo captures."]
    return ModelPlan(tuple(plans), forward.seconds, tuple(notes))


def _explain_layers(
    layers: Mapping[str, nn.Module], forward: Forward | None, readings: Sequence[Reading]
) -> list[LayerPlan]:
    plans: list[LayerPlan] = []
    owners: dict[int, str] = {}
    traced: dict[int, list[Sequence[Workload]]] = {}  # of each graph that decided on a weight
    for reading in readings:
        for reference, workloads in reading.workloads:
            if workloads and (layer := reference()) is not None:
                traced.setdefault(_identity(layer), []).append(workloads)
    called = {_identity(module) for module in forward.shapes} if forward else set()
    for name, module in layers.items():
        shapes = forward.shapes.get(module, []) if forward else []
        plan = _explain_layer(name, module, shapes, traced.get(_identity(module), []))
        if forward is not None:
            plan = replace(plan, calls=len(shapes), measured_seconds=forward.layers.get(module))
            if not shapes:
                read = _identity(module) in traced and _identity(module) not in called
                calls = "its weight is read without calling it" if read else "never called on these inputs"
                plan = replace(plan, reason=f"{calls}; {plan.reason}")
        owner = owners.setdefault(_identity(module), name)
        if owner != name:
            plan = replace(plan, dense_bytes=0, bytes=0, reason=f"{plan.reason}; shares the weight of {owner}")
        plans.append(plan)
    return plans


def _explain_layer(
    name: str, module: nn.Module, shapes: Sequence[tuple[int, ...]], traced: Sequence[Sequence[Workload]]
) -> LayerPlan:
    layer: Any = module
    packed = packed_of(module)
    if packed is not None:
        held = packed.nbytes + sum(tensor.nbytes for tensor in layer.expanded.values())
        plan = LayerPlan(name, layer.kind, packed.shape, packed.pattern, "sparse", "packed", 0, held, converted=True)
        plan = replace(plan, dense_bytes=math.prod(packed.shape) * packed.values.element_size())
        plan = replace(plan, retained=getattr(layer, "retained", None))
        return _decide_layer(plan, module, packed, shapes, [])
    kind, layout, weight = str(layer_kind(module) or other_kind(module)), layout_of(module), layer.weight
    pattern = None if layout is None else layout.pattern
    plan = LayerPlan(name, kind, tuple(weight.shape), pattern, "dense", "no layout", weight.nbytes, weight.nbytes)
    if layer_kind(module) is None:
        return replace(plan, reason=f"{type(module).__name__} has a forward of its own")
    if layout is None:
        return plan
    prunable = PrunableLayer(name, module, kind, layout.pattern)
    try:
        packed = pack(prunable.matrix, layout, groups=prunable.groups, name=name)
    except ValueError as error:
        return replace(plan, reason=str(error).removeprefix(f"{name}: "))
    plan = replace(plan, retained=getattr(layout, "retained", None))
    return _decide_layer(plan, module, packed, shapes, traced)


def _decide_layer(
    plan: LayerPlan,
    module: nn.Module,
    packed: HiNMWeight,
    shapes: Sequence[tuple[int, ...]],
    traced: Sequence[Sequence[Workload]],
) -> LayerPlan:
    """On the path that its graphs take; the times are those of the calls as the graphs have them, if all are the same.

    A graph may lack calls, or know those of a tied layer too, or have been made for inputs of other sizes.
    """
    own = [workload_of(module, shape, replayed=Options().replays) for shape in shapes or (None,)]
    calls = [workload for each in traced for workload in each]
    same = not shapes or Counter(each.input_shape for each in calls) == Counter(each.input_shape for each in own)
    decided = decide(*calls) if traced else None
    decision = decide(*(calls if traced and same else own))
    won = f"sparse is {decision.dense_seconds / decision.sparse_seconds:.2f} times as fast on {decision.calls}"
    if decided is not None:
        decision = replace(decision, path=decided.path)
        paths = [decide(*each).path for each in traced]
        if len(set(paths)) > 1:
            won = f"{won}; sparse in {paths.count('sparse')} of {len(paths)} graphs"
    if plan.converted:
        plan = replace(plan, reason=f"packed; {won}")
    else:
        held = packed.nbytes + expanded_bytes(packed) if decision.path == "sparse" else plan.dense_bytes
        plan = replace(plan, path=decision.path, reason=won, bytes=held)
    order = "in order" if plan.path == "sparse" and is_in_order(packed.output_order) else None
    product = {"positions": "compiled", "tiles": "torch"}.get(form_of(packed))
    return replace(plan, decision=decision, order=order, product=product)


def _identity(module: nn.Module) -> int:
    """Of the tensor that tied layers have in common."""
    return id(module.metadata if packed_of(module) else module.weight)


# --------------------------------------------------------------------------------------------------------------- timed


def time_forward(
    model: nn.Module, layers: Sequence[nn.Module], inputs: tuple[Any, ...], named_inputs: Mapping[str, Any]
) -> Forward:
    """Medians of several forwards, after one for warm-up; what is compiled inside the model runs in eager mode."""
    totals: list[float] = []
    shapes: dict[nn.Module, list[tuple[int, ...]]] = {}
    seconds: list[dict[nn.Module, float]] = []  # of each forward
    started: dict[nn.Module, float] = {}
    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))

    def before(module: nn.Module, args: tuple[Any, ...], named_args: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(named_args.values()))
        shapes.setdefault(module, []).append(tuple(x.shape))
        wait_for(device)
        started[module] = time.perf_counter()

    def after(module: nn.Module, args: tuple[Any, ...], named_args: dict[str, Any], output: Any) -> None:
        wait_for(device)
        seconds[-1][module] = seconds[-1].get(module, 0.0) + time.perf_counter() - started[module]

    def run() -> None:
        shapes.clear()
        seconds.append({})
        wait_for(device)
        start = time.perf_counter()
        model(*inputs, **named_inputs)
        wait_for(device)
        totals.append(time.perf_counter() - start)

    fast = torch.backends.mha.get_fastpath_enabled()
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
    try:
        # Its nested tensors would reach the layers, too, and have no shape.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.compiler.set_stance("force_eager"):
            run()
            totals.clear(), seconds.clear()  # type: ignore[func-returns-value]
            end = time.perf_counter() + SECONDS
            while len(totals) < LEAST or (len(totals) < MOST and time.perf_counter() < end):
                run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    rest = statistics.median(total - sum(each.values()) for total, each in zip(totals, seconds, strict=True))
    medians = {module: statistics.median(each.get(module, 0.0) for each in seconds) for module in shapes}
    return Forward(rest + sum(medians.values()), medians, shapes)


# -------------------------------------------------------------------------------------------------------------- traced


def trace_layers(
    model: nn.Module, inputs: tuple[Any, ...], named_inputs: Mapping[str, Any]
) -> tuple[list[Reading], list[str]]:
    """What the backend "hinm" would make of each graph that Dynamo captures, at each of its calls; a note if it failed.

    What the user compiled stays compiled.
    """
    readings: list[Reading] = []
    try:
        read_graphs(_read_layers, readings, model, inputs, named_inputs)
    except Exception as error:  # whatever Dynamo, a pass or the packing met: the rest of the plan holds
        cause = getattr(error, "inner_exception", None) or error
        reason = f"{type(cause).__name__}: {str(cause).strip()}"
        return readings, [f"Order unknown: the model could not be traced: {reason}"]
    return readings, []


def _read_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Reading:
    traced = trace_tensors(gm, example_inputs)
    guard_layouts(traced)
    layers, reached = traced.layers, {call.weight for call in find_calls(gm)}
    fates = [
        Fate(ref(layer.module), OUT_OF_REACH, tuple(Place(None, _word(user)) for user in node.users))
        for node, layer in traced.pruned.items()
        if node not in reached
    ]
    sparsified = sparsify_graph(gm, traced, Options())
    owners = {id(each.tensor): each.module for each in traced.converted.values() if each.key == "metadata"}
    owners |= {id(twin.layer.metadata): traced.tensors[nodes[0]].module for twin, nodes in sparsified.twins}
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    dense = {call.node: ref(layers[call.weight].module) for call in find_layer_calls(gm) if call.weight in layers}

    def layer_of(node: fx.Node) -> "ref[nn.Module] | None":
        metadata = operand(node, "metadata")
        tensor = getattr(gm, str(metadata.target)) if metadata.op == "get_attr" else given.get(metadata)
        return ref(owners[id(tensor)]) if id(tensor) in owners else None

    def place(node: fx.Node) -> Place:
        if node.target in SPARSE_OPS:
            return Place(layer_of(node), "a sparse layer")
        return Place(dense.get(node), _word(node))

    orders = orders_of(gm)
    for node in gm.graph.nodes:
        layer = layer_of(node) if node.target in SPARSE_OPS else None
        if layer is None:
            continue
        fate = orders.get(node)
        if fate is None:
            fates.append(Fate(layer, "restored:", reason="the graph is given it anew at each call"))
        elif fate.kind == "absorbed":
            fates.append(Fate(layer, "absorbed by", tuple(map(place, fate.readers))))
        elif fate.kind == "restored":
            places = () if fate.because is None else (place(fate.because),)
            fates.append(Fate(layer, "restored:", places, fate.reason))
        else:
            fates.append(Fate(layer, fate.kind))
    return Reading(fates, [(ref(layers[node].module), each) for node, each in sparsified.workloads.items()])


_read_layers = reading_backend(_read_graph)


def _word(node: fx.Node) -> str:
    """What a person calls the node of a graph."""
    if node.op == "output":
        return "the output"
    return str(getattr(node.target, "__name__", node.target))


def _add_orders(plans: Sequence[LayerPlan], layers: Mapping[str, nn.Module], fates: Sequence[Fate]) -> list[LayerPlan]:
    names: dict[nn.Module, str] = {}
    for name, module in layers.items():
        names.setdefault(module, name)

    def describe(place: Place) -> str:
        layer = None if place.layer is None else place.layer()
        return place.word if layer is None else names.get(layer, place.word)

    told: dict[int, list[str]] = {}
    stolen: dict[int, str] = {}
    for fate in fates:
        layer = fate.layer()
        if layer is None:
            continue
        who = ", ".join(dict.fromkeys(map(describe, fate.places)))
        if fate.word == OUT_OF_REACH:
            stolen[_identity(layer)] = who
        else:
            told.setdefault(_identity(layer), []).append(" ".join(filter(None, (fate.word, who, fate.reason))))
    explained = []
    for plan in plans:
        identity = _identity(layers[plan.name])
        if plan.path == "sparse" and identity in stolen and identity not in told:
            reason = f"{stolen[identity]} takes its weight by itself"
            plan = replace(plan, path="dense", reason=reason, bytes=plan.dense_bytes, order=None)
        elif plan.path == "sparse" and plan.order is None and identity in told:
            plan = replace(plan, order="; ".join(dict.fromkeys(told[identity])))
        explained.append(plan)
    return explained
