"""A pruned model's layers, packed, in their place.

Shapes: O rows, I columns.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hinm.format import HiNMWeight, pack
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.modules.layers import HiNMConv2d, HiNMLayer, HiNMLinear
from lightning_hinm.pattern import layer_kind
from lightning_hinm.plan import ModelPlan, decide
from lightning_hinm.prune import layout_of
from lightning_hinm.workload import workload_of

log = logging.getLogger(__name__)

# What a forward or state-dict call of the dense layer would have run; the swapped layer runs it too.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def pack_layer(dense: nn.Module, *, name: str = "layer", packed: HiNMWeight | None = None) -> HiNMLayer:
    """The packed layer that computes what a pruned ``dense`` layer computes, on its device.

    Args:
        dense: a prunable layer that carries a layout.
        name: for messages.
        packed: its weight, if that is packed already.

    Raises:
        ValueError: if there is no layout, or the weight has anything outside the pattern.
    """
    packed = packed or _pack_own_weight(dense, name)
    kind = layer_kind(dense)
    layer_class = HiNMLinear if kind in ("linear", "hf_conv1d") else HiNMConv2d
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could never be saved for a gradient
        return layer_class.from_packed(dense, packed).train(dense.training)


def _pack_own_weight(dense: nn.Module, name: str) -> HiNMWeight:
    layout, kind = layout_of(dense), layer_kind(dense)
    if layout is None or kind is None:
        raise ValueError(f"{name}: has no layout, but only pruned layers can be packed. Prune it, or load_layouts.")
    return pack_weight(dense.weight, layout, kind=kind, groups=int(getattr(dense, "groups", 1)), name=name)  # type: ignore


def pack_weight(weight: Tensor, layout: HiNMLayout, *, kind: str, groups: int = 1, name: str = "layer") -> HiNMWeight:
    """``pack`` for the weight of a layer of any kind, in the layer's own shape."""
    with torch.inference_mode(False), torch.no_grad():
        return pack(weight.t() if kind == "hf_conv1d" else weight, layout, groups=groups, name=name)


@torch.inference_mode(False)  # what is copied and packed may serve a training later
def to_hinm(model: nn.Module, *, plan: str | ModelPlan = "sparse", inplace: bool = False) -> nn.Module:
    """The model with every pruned layer packed; no tracing, so it works where ``torch.compile`` fails.

    Args:
        model: a pruned model, on its final device; a single pruned layer is a model too.
        plan: ``"sparse"`` packs every layer that has a layout, ``"dense"`` none, ``"auto"`` those for which it pays
            on a small input. ``explain(model, x)`` is a plan too, made for the inputs that the model will get.
        inplace: swap the layers of ``model`` itself and free each dense weight as it goes. Otherwise ``model`` stays
            as it is, and everything but the dense weights is copied.

    Returns:
        The converted model; ``model`` itself if ``inplace``, unless it is a single layer.

    Raises:
        ValueError: for a model without any layout, or weights that are not zero outside their pattern: all offending
            layers in one message, and nothing was changed.
    """
    if not isinstance(plan, ModelPlan) and plan not in ("sparse", "auto", "dense"):
        raise ValueError(f"to_hinm: plan={plan!r} must be 'sparse', 'auto', 'dense' or what explain() returns.")
    chosen = _packable(model)
    if plan != "sparse":
        chosen = {name: module for name, module in chosen.items() if _runs_sparse(name, module, plan)}
    packed = _pack_all(chosen)
    log.info("to_hinm: packed %d layers of %s", len(chosen), type(model).__name__)
    places = _places(model)
    memo: dict[int, Any] = {}
    while chosen:  # whoever holds a dense layer is let go with it
        _, module = chosen.popitem()
        layer = pack_layer(module, packed=packed[id(module.weight)])
        if not inplace:
            layer.bias = copy.deepcopy(layer.bias, memo)
        take_hooks(layer, module)
        memo[id(module)] = layer
        if inplace:
            for parent, attribute in places.get(id(module), ()):
                parent._modules[attribute] = layer
            if module is model:
                return layer
    if not inplace:
        model = copy.deepcopy(model, memo)
    leave_fast_path(model)
    return model


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module hangs, by its id: a shared one hangs in several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    return places


def _packable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers to convert by name, a shared one once."""
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    own = {id(module) for attention in attentions for module in attention.modules()}  # it reads their weights itself
    chosen = {
        name: module
        for name, module in model.named_modules()
        if layer_kind(module) is not None and layout_of(module) is not None and id(module) not in own
    }
    if not chosen and not any(isinstance(module, HiNMLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__}: no layer has a layout, but only pruned layers can be packed. Prune the model by "
            "prune() or HiNMPruning; in a new process, call load_layouts(model, ckpt_path) after loading the weights."
        )
    return chosen


def _runs_sparse(name: str, module: nn.Module, plan: str | ModelPlan) -> bool:
    if isinstance(plan, ModelPlan):
        return any(layer.name == name and layer.path == "sparse" for layer in plan.layers)
    if plan == "dense":
        return False
    decision = decide(workload_of(module))
    log.info("to_hinm: %s runs %s: %s", name, decision.path, decision.reason)
    return decision.path == "sparse"


def _pack_all(layers: Mapping[str, nn.Module]) -> dict[int, HiNMWeight]:
    """Packed weights by the id of the dense one, so that tied layers share theirs; all offenders in one message."""
    packed: dict[int, HiNMWeight] = {}
    wrong = []
    for name, module in layers.items():
        if id(module.weight) in packed:
            continue
        try:
            packed[id(module.weight)] = _pack_own_weight(module, name)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("Nothing was converted:\n  " + "\n  ".join(wrong))
    return packed


def take_hooks(layer: nn.Module, dense: nn.Module) -> None:
    for name in (*HOOKS, *HOOK_FLAGS):
        getattr(layer, name).update(getattr(dense, name))
    layer._is_full_backward_hook = dense._is_full_backward_hook


def leave_fast_path(model: nn.Module) -> None:
    """Keeps ``nn.TransformerEncoderLayer`` from its fused kernel, which would read the dense weights of its layers.

    Only on the instances that hold a packed layer, by the attributes that their own ``forward`` asks.
    """
    for module in model.modules():
        holds = any(isinstance(child, HiNMLayer) for child in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and holds:
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and holds:
            module.use_nested_tensor = False
