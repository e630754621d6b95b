"""Operations that commute with an order of the channels, ``f(x[order]) == f(x)[order]``, each with the reason."""

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx

from lightning_hinm.ops import hinm_conv2d, hinm_linear
from lightning_hinm.passes.axes import (
    Made,
    Rule,
    argument,
    is_number,
    pass_beside,
    pass_concatenation,
    pass_expansion,
    pass_extremum,
    pass_getitem,
    pass_permutation,
    pass_reduction,
    pass_reshape,
    pass_split,
    pass_stack,
    pass_unbind,
)
from lightning_hinm.passes.channels import Channels
from lightning_hinm.passes.heads import (
    add_axes,
    drop_heads,
    keep_heads,
    multiply_heads,
    pass_attention,
    permute_heads,
    reshape_heads,
)
from lightning_hinm.passes.sparsify import shape_of

if TYPE_CHECKING:
    from lightning_hinm.passes.follow import Walk


def _pass_numbers(walk: "Walk", node: fx.Node) -> Made:
    """Number by number, whatever its channel; or, a norm, over the whole axis or none of it, then number by number."""
    return walk.broadcast(node, node.all_input_nodes)


def _pass_dropout(walk: "Walk", node: fx.Node) -> Made:
    """The identity, where it is idle."""
    return walk.alone(node) if argument(node, 2, "training", True) is False else None


def _pass_same(walk: "Walk", node: fx.Node) -> Made:
    """The identity, or another type, which another value may have."""
    return walk.carried.get(argument(node, 0, "input"), ())


def _pass_shape(walk: "Walk", node: fx.Node) -> Made:
    """What is asked of a shape does not depend on orders."""
    if node.op == "call_function" and node.args[1] in ("T", "mT"):
        return (permute_heads if node.args[0] in walk.heads else pass_permutation)(walk, node)
    return () if node.op == "call_method" or node.args[1] in ("shape", "dtype", "device", "ndim") else None


def _pass_pooling(dims: int) -> Rule:
    def rule(walk: "Walk", node: fx.Node) -> Made:
        """Over the last dimensions; channels stand before those."""
        channels = walk.alone(node)
        return channels if channels and -channels.axis > dims and shape_of(node) is not None else None

    return rule


def _pass_interpolation(walk: "Walk", node: fx.Node) -> Made:
    """Over all dimensions but the first two."""
    channels, shape = walk.alone(node), shape_of(node)
    return channels if channels and shape is not None and channels.axis == 1 - len(shape) else None


def _pass_padding(walk: "Walk", node: fx.Node) -> Made:
    """Of other dimensions; two numbers for each, from the last one on."""
    channels, pads = walk.alone(node), argument(node, 1, "pad")
    if channels is None or not isinstance(pads, (tuple, list)):
        return None
    own = pads[-2 * channels.axis - 2 : -2 * channels.axis]
    return channels if all(type(pad) is int and pad == 0 for pad in own) else None


def _pass_batch_norm(walk: "Walk", node: fx.Node) -> Made:
    """Each channel by numbers of its own, where statistics are frozen: its parameters are put in the same order."""
    return _with_parameters(walk, node, node.all_input_nodes[1:]) if is_frozen_norm(node) else None


def _pass_group_norm(walk: "Walk", node: fx.Node) -> Made:
    """Each group of channels by itself, where no channel leaves its group; then as a BatchNorm."""
    groups, channels = argument(node, 1, "num_groups"), walk.carried.get(node.all_input_nodes[0])
    if channels is None or type(groups) is not int or channels.axis != 1 - len(shape_of(node) or ()):
        return None
    if groups != channels.size:  # a channel that is a group of its own may go anywhere
        rest: Channels | None = channels
        for _ in range(groups - 1):
            halves = None if rest is None else rest.cut(channels.size // groups)
            rest = None if halves is None else halves[1]
        if rest is None:
            return None
    return _with_parameters(walk, node, node.all_input_nodes[1:])


def _pass_instance_norm(walk: "Walk", node: fx.Node) -> Made:
    """Each channel by itself, and by numbers of its own, where no statistics are changed."""
    given = [value is not None for value in (argument(node, 1, "running_mean"), argument(node, 2, "running_var"))]
    used = argument(node, 5, "use_input_stats", True)
    return _with_parameters(walk, node, node.all_input_nodes[1:]) if given == [used is False] * 2 else None


def _pass_prelu(walk: "Walk", node: fx.Node) -> Made:
    """Number by number, by one number for all, or by one for each entry of dimension 1."""
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    channels, rank, own = walk.carried.get(x), len(shape_of(node) or ()), shape_of(weight)
    if channels is None or weight in walk.carried or own is None:
        return None
    if channels.axis != 1 - rank or all(size == 1 for size in own):
        return channels
    return _with_parameters(walk, node, [weight])


def _pass_depthwise(walk: "Walk", node: fx.Node) -> Made:
    """A convolution of each channel by itself: its weight is put in the same order."""
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    channels = walk.carried.get(x)
    shape = shape_of(weight) if isinstance(weight, fx.Node) else None
    groups = argument(node, 6, "groups", 1)
    if channels is None or shape is None or not shape[0] == groups == channels.size:
        return None
    if channels.axis != 1 - len(shape):  # of an image without a batch, dimension 1 is not that of its channels
        return None
    return _with_parameters(walk, node, node.all_input_nodes[1:], weight=weight)


def _with_parameters(walk: "Walk", node: fx.Node, values: Sequence[fx.Node], *, weight: fx.Node | None = None) -> Made:
    """The channels along dimension 1, if ``values`` have them along their last axis, ``weight`` along its first."""
    x = node.all_input_nodes[0]
    channels, shape = walk.carried.get(x), shape_of(x)
    if channels is None or shape is None or channels.axis != 1 - len(shape) or argument(node, 0, "input") is not x:
        return None
    for value in values:
        axis = -len(shape_of(value) or ()) if value is weight else -1
        if not is_number(value) and not walk.enter(node, value, channels.moved(axis), parameter=True):
            return None
    return channels


def is_frozen_norm(norm: fx.Node) -> bool:
    """Whether a BatchNorm uses the statistics that it is given, and does not change them."""
    statistics = argument(norm, 1, "running_mean"), argument(norm, 2, "running_var")
    return argument(norm, 5, "training", False) is False and None not in statistics


def written_by(node: fx.Node) -> Sequence[fx.Node]:
    """What an operation may write into."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return ()
    if node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet = target if isinstance(target, torch._ops.OpOverloadPacket) else target.overloadpacket
        mutable = any(getattr(packet, name)._schema.is_mutable for name in packet.overloads())
        return node.all_input_nodes if mutable else ()
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    out: list[fx.Node] = []
    fx.map_arg(node.kwargs.get("out"), out.append)
    in_place = name.endswith("_") or target in _WRITES or _inplace(node)
    first = [value for value in node.args[:1] if isinstance(value, fx.Node)] or node.all_input_nodes
    return [*out, *first] if in_place else out


def _inplace(node: fx.Node) -> bool:
    """Whether a function is told so."""
    if isinstance(node.target, str) or "inplace" in node.kwargs:
        return node.kwargs.get("inplace", False) is not False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # of one that is built in, and takes no such argument
        return False
    return given.get("inplace", False) is not False


_WRITES = {
    operator.setitem,
    *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
    *(getattr(operator, f"i{name}") for name in ("and", "or", "xor", "lshift", "rshift", "matmul", "concat")),
}
# Number by number. Of several operands, a number of each channel is computed from those of this channel alone.
_NUMBERS = {
    *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.softsign),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.logsigmoid, F.tanhshrink, F.sigmoid, F.tanh),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.abs, torch.neg, torch.square, torch.sqrt, torch.rsqrt),
    *(torch.sin, torch.cos, torch.log),
    *(torch.clamp, torch.erf, torch.reciprocal, torch.maximum, torch.minimum, torch.where, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.addcmul, torch.addcdiv, torch.lerp),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow),
    *(operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne),
    *("relu", "sigmoid", "tanh", "exp", "abs", "neg", "square", "sqrt", "rsqrt", "clamp", "erf", "reciprocal"),
    *("sin", "cos", "log"),
    *("add", "sub", "mul", "div", "pow", "addcmul", "addcdiv", "lerp", "where", "masked_fill", "clone"),
}
_IN_PLACE = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.relu_),
    *("relu_", "sigmoid_", "tanh_", "clamp_", "add_", "sub_", "mul_", "div_"),
}
_SAME = {"contiguous", "detach", "float", "half", "bfloat16", "double", "to", "type", "type_as"}
ELEMENTWISE = _NUMBERS | _IN_PLACE | {"float", "half", "bfloat16", "double", "to"}
# Of each run of numbers its mean and variance, or its length, which no order of them changes; then number by number.
_NORMS = {F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm, F.normalize}
_REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp")
_RESHAPES = ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t")


def _both(*names: str) -> list[Any]:
    """Methods and functions."""
    return [*names, *(getattr(torch, name) for name in names)]


RULES: Mapping[Any, Rule] = {
    **dict.fromkeys((*_NUMBERS, *_IN_PLACE, *_NORMS), _pass_numbers),
    **dict.fromkeys(_SAME, _pass_same),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _pass_dropout),
    **dict.fromkeys(("size", "dim", "numel", getattr), _pass_shape),
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d), _pass_pooling(1)),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), _pass_pooling(2)),
    F.interpolate: _pass_interpolation,
    **dict.fromkeys((F.pad, torch._C._nn.pad), _pass_padding),
    **dict.fromkeys(_both(*_REDUCTIONS), pass_reduction(1)),
    **dict.fromkeys((*_both("norm"), torch.linalg.norm, torch.linalg.vector_norm), pass_reduction(2)),
    **dict.fromkeys(_both("max", "min"), pass_extremum),
    **dict.fromkeys((*_both("softmax", "log_softmax"), F.softmax, F.log_softmax, F.softmin), pass_beside()),
    **dict.fromkeys(_both("cumsum", "select", "narrow"), pass_beside()),
    **dict.fromkeys(_both("flip"), pass_beside(1, "dims")),
    **dict.fromkeys(_both("roll"), pass_beside(2, "dims")),
    **dict.fromkeys((*_both(*_RESHAPES), "view", "view_as", "reshape_as"), pass_reshape),
    **dict.fromkeys((*_both("tile", "broadcast_to"), "expand", "expand_as", "repeat"), pass_expansion),
    **dict.fromkeys(_both(*_PERMUTATIONS), pass_permutation),
    operator.getitem: pass_getitem,
    **dict.fromkeys(_both("split", "chunk"), pass_split),
    **dict.fromkeys(_both("unbind"), pass_unbind),
    **dict.fromkeys((torch.cat, torch.concat), pass_concatenation),
    torch.stack: pass_stack,
    F.batch_norm: _pass_batch_norm,
    F.instance_norm: _pass_instance_norm,
    **dict.fromkeys((F.group_norm, torch.group_norm), _pass_group_norm),
    **dict.fromkeys((F.prelu, torch.prelu, "prelu"), _pass_prelu),
    **dict.fromkeys((torch.conv1d, torch.conv2d), _pass_depthwise),
    F.scaled_dot_product_attention: pass_attention,
}
# Of what reads a value that has heads.
HEADS_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys((*_NUMBERS, *_SAME, "expand"), keep_heads),
    **dict.fromkeys((F.dropout,), drop_heads),
    **dict.fromkeys(("size", "dim", "numel", getattr), _pass_shape),
    **dict.fromkeys(_both(*_PERMUTATIONS), permute_heads),
    **dict.fromkeys((*_both(*_RESHAPES), "view"), reshape_heads),
    **dict.fromkeys((*_both("matmul"), operator.matmul), multiply_heads),
    operator.getitem: add_axes,
    F.scaled_dot_product_attention: pass_attention,
}
DENSE = {
    *(F.linear, torch.addmm, torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}
# What these make is new, and they write nothing.
FRESH = {
    *(*_NUMBERS, *_NORMS, *DENSE, F.batch_norm, F.group_norm, F.embedding, torch.cat, hinm_linear, hinm_conv2d),
    *(
        torch.matmul,
        torch.bmm,
        torch.softmax,
        F.softmax,
        F.scaled_dot_product_attention,
        operator.matmul,
        "matmul",
        "softmax",
    ),
}
