"""Operations that commute with an order of the channels, ``f(x[order]) == f(x)[order]``, each with the reason."""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lightning_hinm.ops import hinm_conv2d, hinm_linear
from lightning_hinm.passes.channels import Channels, Stream
from lightning_hinm.passes.sparsify import shape_of

if TYPE_CHECKING:
    from lightning_hinm.passes.follow import Walk

# What a rule makes of a node: the channels of its value, of each of a tuple of values, () where it has none any more,
# or None where the operation does not commute with orders of them.
Made = Channels | tuple[Channels, ...] | None
Rule = Callable[["Walk", fx.Node], Made]


def _pass_numbers(walk: "Walk", node: fx.Node) -> Made:
    """Number by number, whatever its channel; or, a norm, over the whole axis or none of it, then number by number."""
    return walk.broadcast(node, node.all_input_nodes)


def _pass_dropout(walk: "Walk", node: fx.Node) -> Made:
    """The identity, where it is idle."""
    return walk.alone(node) if argument(node, 2, "training", True) is False else None


def _pass_shape(walk: "Walk", node: fx.Node) -> Made:
    """What is asked of a shape does not depend on orders."""
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


def _pass_reduction(walk: "Walk", node: fx.Node) -> Made:
    """A sum, mean, ... over all channels does not depend on their order; over anything else it is one for each."""
    channels, before, after = walk.alone(node), input_shape(node), shape_of(node)
    dims = argument(node, 1, "dim")
    if channels is None or before is None or after is None:
        return None
    given = dims if isinstance(dims, (tuple, list)) else (dims,)
    rank = len(before)
    if dims is None or not given:
        return ()
    if not all(type(dim) is int for dim in given):
        return None
    reduced = {dim if dim < 0 else dim - rank for dim in given}
    if channels.axis in reduced:
        return ()
    return channels if len(after) == rank else channels.moved(channels.axis + sum(d > channels.axis for d in reduced))


def _pass_reshape(walk: "Walk", node: fx.Node) -> Made:
    """Where as many numbers follow from the channels' axis on as before, and that axis holds whole channels.

    The numbers keep their sequence, so each channel's are still neighbours, at its place among the channels.
    """
    channels, before, after = walk.alone(node), input_shape(node), shape_of(node)
    if channels is None or before is None or after is None or any(isinstance(a, torch.dtype) for a in node.args):
        return None
    numbers = _count(before[channels.axis :])
    for axis in range(-len(after), 0):
        size = after[axis]
        whole = isinstance(size, int) and size > 0 and size % channels.size == 0
        if whole and statically_known_true(_count(after[axis:]) == numbers):
            times = size // channels.size
            return Channels(axis, tuple((stream, spread * times) for stream, spread in channels.segments))
    return None


def _pass_expansion(walk: "Walk", node: fx.Node) -> Made:
    """Copies along other axes."""
    channels, after = walk.alone(node), shape_of(node)
    if channels is None or after is None or not statically_known_true(after[channels.axis] == channels.size):
        return None
    return channels


def _pass_permutation(walk: "Walk", node: fx.Node) -> Made:
    """The channels' axis goes where it is sent."""
    channels, before = walk.alone(node), input_shape(node)
    dims: Any = node.args[1:] or tuple(node.kwargs.values())
    dims = dims[0] if len(dims) == 1 else dims
    if (
        channels is None
        or before is None
        or not isinstance(dims, (tuple, list))
        or not all(type(dim) is int for dim in dims)
    ):
        return None
    rank = len(before)
    sent = list(range(rank))
    if node.target in ("permute", torch.permute):
        sent = [dim % rank for dim in dims]
    else:
        first, second = (dim % rank for dim in dims)
        sent[first], sent[second] = second, first
    return channels.moved(sent.index(channels.axis + rank) - rank)


def _pass_getitem(walk: "Walk", node: fx.Node) -> Made:
    """A part of the channels, or a part of everything else."""
    value: Any = node.args[0]
    items = node.args[1]
    if value in walk.pieces:
        return walk.pieces[value][items] if type(items) is int else None
    channels, shape = walk.alone(node), input_shape(node)
    items = items if isinstance(items, tuple) else (items,)
    if channels is None or shape is None:
        return None
    if not all(item is None or item is ... or type(item) in (int, slice) or _is_index(item) for item in items):
        return None
    rest = (slice(None),) * (len(shape) - sum(item is not None and item is not ... for item in items))
    places = [i for i, item in enumerate(items) if item is ...] or [len(items)]
    items = (*items[: places[0]], *rest, *items[places[0] + 1 :])
    dims = [i for i, item in enumerate(items) if item is not None]
    place = dims[channels.axis]
    wanted: Any = items[place]
    after = sum(item is None or isinstance(item, slice) for item in items[place + 1 :])
    if not isinstance(wanted, slice):
        return None
    if not all(number is None or type(number) is int for number in (wanted.start, wanted.stop, wanted.step)):
        return None
    start, stop, step = wanted.indices(channels.size)
    part = _range(channels, start, stop) if step == 1 else None
    return None if part is None else part.moved(-1 - after)


def _pass_split(walk: "Walk", node: fx.Node) -> Made:
    """Parts of the channels, or parts of everything else."""
    channels, before, values = walk.alone(node), input_shape(node), node.meta.get("example_value")
    dim = argument(node, 2, "dim", 0)
    if channels is None or before is None or type(dim) is not int or not isinstance(values, (tuple, list)):
        return None
    if not all(user.target is operator.getitem and type(user.args[1]) is int for user in node.users):
        return None
    if dim % len(before) - len(before) != channels.axis:
        return (channels,) * len(values)
    parts: list[Channels] = []
    rest: Channels | None = channels
    for value in values[:-1]:
        size = value.shape[channels.axis]
        halves = rest.cut(size) if rest is not None and isinstance(size, int) else None
        if halves is None:
            return None
        parts.append(halves[0])
        rest = halves[1]
    return (*parts, rest) if rest is not None else None


def _pass_concatenation(walk: "Walk", node: fx.Node) -> Made:
    """Channels one after another, or values that have the same channels."""
    values: Any = argument(node, 0, "tensors", ())
    dim = argument(node, 1, "dim", 0)
    if not isinstance(values, (tuple, list)) or not all(isinstance(value, fx.Node) for value in values):
        return None
    shapes = [shape_of(value) for value in values]
    rank = len(shape_of(node) or ())
    carried = [walk.carried[value] for value in values if value in walk.carried]
    if type(dim) is not int or not rank or not carried or any(shape is None or len(shape) != rank for shape in shapes):
        return None
    axis = carried[0].axis
    if any(channels.axis != axis for channels in carried):
        return None
    if dim % rank - rank != axis:
        return walk.broadcast(node, values)
    segments: dict[fx.Node, tuple[tuple[Stream, int], ...]] = {}
    for value, shape in zip(values, shapes, strict=True):
        if value in walk.carried:
            segments[value] = walk.carried[value].segments
        elif value not in segments:
            size = shape[axis] if shape is not None else None
            if not isinstance(size, int):
                return None
            segments[value] = ((Stream(size), 1),)  # nobody writes it: it has an order only if it is joined to one
            walk.enter(node, value, Channels(axis, segments[value]))
    return Channels(axis, tuple(segment for value in values for segment in segments[value]))


def _pass_batch_norm(walk: "Walk", node: fx.Node) -> Made:
    """Each channel by numbers of its own, where statistics are frozen: its parameters are put in the same order."""
    return _with_parameters(walk, node, node.all_input_nodes[1:]) if is_frozen_norm(node) else None


def _pass_group_norm(walk: "Walk", node: fx.Node) -> Made:
    """Each group of channels by itself, where no channel leaves its group; then as a BatchNorm."""
    groups, channels = argument(node, 1, "num_groups"), walk.carried.get(node.all_input_nodes[0])
    if channels is None or type(groups) is not int:
        return None
    if groups != channels.size:  # a channel that is a group of its own may go anywhere
        rest: Channels | None = channels
        for _ in range(groups - 1):
            halves = None if rest is None else rest.cut(channels.size // groups)
            rest = None if halves is None else halves[1]
        if rest is None:
            return None
    return _with_parameters(walk, node, node.all_input_nodes[1:])


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


def _range(channels: Channels, start: int, stop: int) -> Channels | None:
    halves = channels.cut(stop)
    halves = halves[0].cut(start) if halves is not None else None
    return halves[1] if halves is not None and halves[1].segments else None


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument that may be passed by its place or by its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def is_frozen_norm(norm: fx.Node) -> bool:
    """Whether a BatchNorm uses the statistics that it is given, and does not change them."""
    statistics = argument(norm, 1, "running_mean"), argument(norm, 2, "running_var")
    return argument(norm, 5, "training", False) is False and None not in statistics


def input_shape(node: fx.Node) -> Sequence[Any] | None:
    """The shape of the only tensor that ``node`` reads."""
    shapes = [shape for value in node.all_input_nodes if (shape := shape_of(value)) is not None]
    return shapes[0] if len(shapes) == 1 else None


def is_number(node: fx.Node) -> bool:
    """Whether a node is one of a number, or of the sizes of a shape."""
    return isinstance(node.meta.get("example_value"), (int, float, torch.SymInt, torch.SymFloat, torch.Size))


def _is_index(item: Any) -> bool:
    return isinstance(item, fx.Node) and isinstance(item.meta.get("example_value"), torch.SymInt)


def _count(sizes: Sequence[Any]) -> Any:
    return functools.reduce(operator.mul, sizes, 1)


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
    out = [value for value in (node.kwargs.get("out"),) if isinstance(value, fx.Node)]
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
    *(torch.clamp, torch.erf, torch.reciprocal, torch.maximum, torch.minimum, torch.where, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.pow),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow),
    *(operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne),
    *("relu", "sigmoid", "tanh", "exp", "abs", "neg", "square", "sqrt", "rsqrt", "clamp", "erf", "reciprocal"),
    *("add", "sub", "mul", "div", "pow", "where", "masked_fill", "clone"),
}
_IN_PLACE = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.relu_),
    *("relu_", "sigmoid_", "tanh_", "clamp_", "add_", "sub_", "mul_", "div_"),
}
_SAME = {"contiguous", "detach", "float", "half", "bfloat16", "double", "to", "type", "type_as"}
ELEMENTWISE = _NUMBERS | _IN_PLACE | {"float", "half", "bfloat16", "double", "to"}
# Of each run of numbers its mean and variance, which no order of them changes, then number by number.
_NORMS = {F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm}
_REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std")

RULES: Mapping[Any, Rule] = {
    **dict.fromkeys((*_NUMBERS, *_IN_PLACE, *_SAME, *_NORMS), _pass_numbers),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _pass_dropout),
    **dict.fromkeys(("size", "dim", "numel", getattr), _pass_shape),
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d), _pass_pooling(1)),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), _pass_pooling(2)),
    F.interpolate: _pass_interpolation,
    **dict.fromkeys((F.pad, torch._C._nn.pad), _pass_padding),
    **dict.fromkeys((*_REDUCTIONS, *(getattr(torch, name) for name in _REDUCTIONS)), _pass_reduction),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _pass_reshape),
    **dict.fromkeys((torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze), _pass_reshape),
    "expand": _pass_expansion,
    **dict.fromkeys(("permute", "transpose", torch.permute, torch.transpose), _pass_permutation),
    operator.getitem: _pass_getitem,
    **dict.fromkeys(("split", "chunk", torch.split, torch.chunk), _pass_split),
    **dict.fromkeys((torch.cat, torch.concat), _pass_concatenation),
    F.batch_norm: _pass_batch_norm,
    **dict.fromkeys((F.group_norm, torch.group_norm), _pass_group_norm),
    **dict.fromkeys((torch.conv1d, torch.conv2d), _pass_depthwise),
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
