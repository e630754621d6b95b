"""Activations that a kernel applies before it writes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lightning_hinm.ops import hinm_conv2d, hinm_linear
from lightning_hinm.passes.sparsify import finish_pass, operand, set_operand

_NAMES: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", "relu": "relu", "relu_": "relu", F.silu: "silu"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def fuse_activations_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """A layer on a GPU kernel applies the activation that is all that reads its result.

    Before::

        %y = hinm.linear(%x, ..., window)
        %z = relu(%y)

    After::

        %z = hinm.linear(%x, ..., window, "relu")

    Equal, because the op is defined so, up to the rounding of ``%y`` that is left out. On a CPU the activation stays
    where it is: there Inductor fuses it with what follows.

    Args:
        gm: sparsified; rewritten in place.

    Returns:
        ``gm``.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in (hinm_linear, hinm_conv2d) or operand(node, "expansion_metadata") is None:
            continue
        users = list(node.users)
        name = _activation_of(users[0], node) if len(users) == 1 else None
        if name is None or operand(node, "activation", "none") != "none":
            continue
        set_operand(node, "activation", name)
        node.meta = dict(users[0].meta)
        users[0].replace_all_uses_with(node)
        gm.graph.erase_node(users[0])
        count += 1
    return finish_pass(gm, "fuse_activations_pass", count, "activations")


def _activation_of(user: fx.Node, node: fx.Node) -> str | None:
    """The name of the activation that ``user`` applies to ``node``."""
    if user.op not in ("call_function", "call_method") or user.args[:1] != (node,):
        return None
    if user.target is F.gelu:
        return _GELU.get(str(user.kwargs.get("approximate", "none"))) if len(user.args) == 1 else None
    # What else these functions take is whether they work in place.
    return _NAMES.get(user.target)
