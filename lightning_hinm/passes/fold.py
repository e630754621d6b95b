"""Frozen BatchNorms that become part of the layer before them.

Shapes: O rows, K values of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lightning_hinm.format import HiNMWeight
from lightning_hinm.modules import PACKED_TENSORS, HiNMLayer
from lightning_hinm.ops import EXPANDED, hinm_conv2d, hinm_linear
from lightning_hinm.passes.rules import argument, is_frozen_norm
from lightning_hinm.passes.sparsify import finish_pass, lift_buffer, operand, set_operand

_TENSORS = {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4}  # the places of F.batch_norm


@dataclass(frozen=True)
class NormCall:
    """A frozen BatchNorm that alone reads the rows of a sparse op.

    ``rows`` is what it reads: the op, or the squeeze behind that of a Conv1d. ``tensors`` are the placeholders that it
    and the op's bias take, by the names that ``fold_norm`` has for them.
    """

    op: fx.Node
    rows: fx.Node
    norm: fx.Node
    tensors: Mapping[str, fx.Node]
    eps: float


def find_norm_calls(gm: fx.GraphModule) -> list[NormCall]:
    """The BatchNorms that can be folded into the sparse op before them, as far as a graph can tell."""
    calls = []
    for norm in gm.graph.find_nodes(op="call_function", target=F.batch_norm):
        rows, eps = argument(norm, 0, "input"), argument(norm, 7, "eps", 1e-5)
        op = _op_before(norm, rows)
        if op is None or not is_frozen_norm(norm) or not isinstance(eps, (int, float)):
            continue
        given = {name: argument(norm, place, name) for name, place in _TENSORS.items()}
        given["layer_bias"] = operand(op, "bias")
        tensors = {name: node for name, node in given.items() if node is not None}
        if all(isinstance(node, fx.Node) and node.op == "placeholder" for node in tensors.values()):
            calls.append(NormCall(op, rows, norm, tensors, eps))
    return calls


def fold_norm(
    packed: HiNMWeight,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    layer_bias: Tensor | None = None,
    eps: float,
    name: str = "layer",
) -> tuple[HiNMWeight, Tensor]:
    """The packed weight and the bias of the layer that computes what a layer and the frozen BatchNorm after it compute.

    Args:
        packed: the layer's weight.
        running_mean: ``[O]``.
        running_var: ``[O]``.
        weight: of the norm, ``[O]``; ones if None.
        bias: of the norm, ``[O]``; zeros if None.
        layer_bias: ``[O]``; zeros if None.
        eps: of the norm.
        name: the layer's name, for the message.

    Returns:
        The packed weight, its rows scaled by ``weight / sqrt(running_var + eps)``, and the bias, ``[O]``; both in the
        dtype of ``packed``, rounded once.

    Raises:
        ValueError: if a row leaves the range of that dtype.
    """
    scale = (running_var.double() + eps).rsqrt()  # [O]
    scale = scale if weight is None else scale * weight.double()
    shift = -running_mean.double() if layer_bias is None else layer_bias.double() - running_mean.double()
    shift = shift * scale if bias is None else shift * scale + bias.double()
    values = packed.values
    wide = torch.promote_types(values.dtype, torch.float32)
    scaled = values.to(wide) * scale[packed.output_order.to(torch.int64)].to(wide).unsqueeze(1)  # [O, K]
    folded, shifted = scaled.to(values.dtype), shift.to(values.dtype)
    peak = scaled.abs().amax(dim=1)
    # A row is as exact as its largest value: below the normal numbers, digits are lost that the norm would have kept.
    lost = (peak > 0) & (peak < torch.finfo(values.dtype).tiny)
    lost |= (scaled.isfinite() & ~folded.isfinite()).any(dim=1)
    if count := int(lost.sum()) + int((shift.isfinite() & ~shifted.isfinite()).sum()):
        raise ValueError(
            f"{name}: with the BatchNorm after it, {count} of {len(scale)} rows leave the range of {values.dtype}, but "
            "a folded weight must stay inside. Call torch.compiler.reset() to compile without folding it, or convert "
            "the model with .to(torch.bfloat16)."
        )
    return replace(packed, values=folded), shifted


def fold_norms_pass(gm: fx.GraphModule, layers: Mapping[str, HiNMLayer]) -> fx.GraphModule:
    """A layer computes the frozen BatchNorm that alone reads its rows.

    Before::

        %y = hinm.conv2d(%x, %values, ..., %bias, %expansion, ...)
        %z = batch_norm(%y, %running_mean, %running_var, %weight, %bias, training=False)

    After::

        %z = hinm.conv2d(%x, %folded_values, ..., %folded_bias, %folded_expansion, ...)

    Equal, because ``(y - mean) * scale + bias`` with ``scale = weight / sqrt(var + eps)`` is linear in each row of the
    weight: ``(scale * W) x + (layer_bias - mean) * scale + bias``; up to rounding, of the folded weight instead of
    ``%y``. That the folded layers are what ``fold_norm`` makes of these tensors, the caller vouches for at every call
    of the graph. A linear layer only on ``[N, O]``: any other BatchNorm1d normalises another dimension than its rows.

    Args:
        gm: sparsified; rewritten in place.
        layers: folded layers by the name of the op that they take the place of.

    Returns:
        ``gm``.
    """
    count = 0
    for call in find_norm_calls(gm):
        layer = layers.get(call.op.name)
        if layer is None:
            continue
        for name, tensor in zip((*PACKED_TENSORS, "bias", *EXPANDED), layer.operands, strict=True):
            if tensor is not None:
                set_operand(call.op, name, lift_buffer(gm, f"hinm_{call.op.name}_folded_{name}", tensor.detach()))
        call.norm.replace_all_uses_with(call.rows)
        gm.graph.erase_node(call.norm)
        count += 1
    return finish_pass(gm, "fold_norms_pass", count, "norms")


def _op_before(norm: fx.Node, rows: Any) -> fx.Node | None:
    """The sparse op whose rows are the channels of a BatchNorm and read by nothing else; its weight is the graph's."""
    value = norm.meta.get("example_value")
    if value is None or not isinstance(rows, fx.Node) or len(rows.users) != 1:
        return None
    if "example_value" not in rows.meta or rows.meta["example_value"].dtype != value.dtype:
        return None
    op, targets = rows, {2: hinm_linear, 4: hinm_conv2d}
    if rows.target in (torch.squeeze, "squeeze") and rows.args[1:] == (-2,):  # of a Conv1d
        op, targets = rows.all_input_nodes[0], {3: hinm_conv2d}
    if op.target is not targets.get(value.dim()) or len(op.users) != 1 or operand(op, "activation", "none") != "none":
        return None
    return op if operand(op, "values").op == "get_attr" else None
