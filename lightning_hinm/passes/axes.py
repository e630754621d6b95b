"""Rules of operations that move the axis of the channels, take parts of them, or treat other axes only."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lightning_hinm.layout import is_in_order
from lightning_hinm.passes.channels import Channels, Heads, Stream
from lightning_hinm.passes.sparsify import shape_of

if TYPE_CHECKING:
    from lightning_hinm.passes.follow import Walk

# What a rule makes of a node: the channels of its value, or its heads, or the channels of each of a tuple of values;
# () where it has none any more; None where the operation does not commute with orders of them.
Made = Channels | tuple[Channels, ...] | Heads | None
Rule = Callable[["Walk", fx.Node], Made]


def pass_reduction(place: int) -> Rule:
    def rule(walk: "Walk", node: fx.Node) -> Made:
        """A sum, norm, ... over all channels does not depend on their order; over anything else it is one for each."""
        channels, before, after = walk.alone(node), input_shape(node), shape_of(node)
        dims = _dims(node, place)
        if channels is None or before is None or after is None or dims is None:
            return None
        if not dims:
            return () if statically_known_true(count(after) == 1) else None
        return () if channels.axis in dims else _beside(channels, dims, before, after)

    return rule


def pass_beside(place: int = 1, name: str = "dim") -> Rule:
    def rule(walk: "Walk", node: fx.Node) -> Made:
        """Along other dimensions, each channel by itself."""
        channels, before, after = walk.alone(node), input_shape(node), shape_of(node)
        dims = _dims(node, place, name)
        if channels is None or before is None or after is None or not dims or channels.axis in dims:
            return None
        return _beside(channels, dims, before, after)

    return rule


def pass_extremum(walk: "Walk", node: fx.Node) -> Made:
    """Of two values, number by number; of one, as a reduction. Where it is found among the channels depends on them."""
    channels, before, values = walk.alone(node), input_shape(node), node.meta.get("example_value")
    if channels is None:
        return walk.broadcast(node, node.all_input_nodes)
    if not isinstance(values, (tuple, list)):
        return ()
    dims = _dims(node)
    if before is None or not dims or not _is_unpacked(node):
        return None
    if channels.axis in dims:
        return () if all(user.args[1] == 0 for user in node.users) else None
    return (_beside(channels, dims, before, values[0].shape),) * len(values)


def pass_unbind(walk: "Walk", node: fx.Node) -> Made:
    """Parts of everything else."""
    channels, before, values = walk.alone(node), input_shape(node), node.meta.get("example_value")
    dims = _dims(node)
    if channels is None or before is None or dims is None or not isinstance(values, (tuple, list)):
        return None
    dims = dims or {-len(before)}
    if channels.axis in dims or not values or not _is_unpacked(node):
        return None
    return (_beside(channels, dims, before, values[0].shape),) * len(values)


def pass_reshape(walk: "Walk", node: fx.Node) -> Made:
    """Where as many numbers follow from the channels' axis on as before, and that axis holds whole channels.

    The numbers keep their sequence, so each channel's are still neighbours, at its place among the channels. Also
    where the axis is cut into heads that no channel leaves, or copies of all channels stand one after another. A value
    whose shape they take is asked for nothing else.
    """
    x = argument(node, 0, "input")
    if x not in walk.carried:
        return ()
    channels, before, after = walk.carried[x], shape_of(x), shape_of(node)
    if before is None or after is None or any(isinstance(a, torch.dtype) for a in node.args):
        return None
    numbers = count(before[channels.axis :])
    for axis in range(-len(after), 0):
        size = after[axis]
        whole = isinstance(size, int) and size > 0 and size % channels.size == 0
        if whole and _is_whole(after, axis, numbers):
            times = size // channels.size
            return Channels(axis, tuple((stream, spread * times) for stream, spread in channels.segments))
        copies = before[channels.axis - 1] if len(before) > -channels.axis else 1
        if isinstance(copies, int) and size == copies * channels.size and _is_whole(after, axis, copies * numbers):
            return Channels(axis, channels.segments * copies)
    return None if node in walk.barred else _cut_into_heads(node, channels, numbers, after)


def _cut_into_heads(node: fx.Node, channels: Channels, numbers: Any, after: Sequence[Any]) -> Heads | None:
    """``[..., heads * size, *rest]`` as ``[..., heads, size, *rest]``."""
    # What is in order needs no rule, and would be a stream for each head of each layer.
    orders = [order for stream in channels.streams for order in stream.orders if order is not None]
    if all(is_in_order(order) for order in orders):
        return None
    for axis in range(-len(after), -1):
        heads, size = after[axis], after[axis + 1]
        cut = type(heads) is int and type(size) is int and heads > 1 and heads * size == channels.size
        if not cut or not _is_whole(after, axis, numbers):
            continue
        each: list[Channels] = []
        rest = channels
        for _ in range(heads - 1):
            halves = rest.cut(size)
            if halves is None:
                return None
            each.append(halves[0].moved(axis + 1))
            rest = halves[1]
        return Heads(axis, (*each, rest.moved(axis + 1)), frozenset([node]))
    return None


def pass_expansion(walk: "Walk", node: fx.Node) -> Made:
    """Copies along other axes. A value to whose shape they fit is asked for nothing else."""
    channels, after = walk.carried.get(argument(node, 0, "input")), shape_of(node)
    if channels is None:
        return ()
    return channels if after is not None and statically_known_true(after[channels.axis] == channels.size) else None


def pass_permutation(walk: "Walk", node: fx.Node) -> Made:
    """The channels' axis goes where it is sent; strides that differ show where."""
    channels, axes = walk.alone(node), permuted_axes(node)
    return None if channels is None or axes is None else channels.moved(axes[channels.axis])


def pass_getitem(walk: "Walk", node: fx.Node) -> Made:
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


def pass_split(walk: "Walk", node: fx.Node) -> Made:
    """Parts of the channels, or parts of everything else."""
    channels, before, values = walk.alone(node), input_shape(node), node.meta.get("example_value")
    dim = argument(node, 2, "dim", 0)
    if channels is None or before is None or type(dim) is not int or not isinstance(values, (tuple, list)):
        return None
    if not _is_unpacked(node):
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


def pass_concatenation(walk: "Walk", node: fx.Node) -> Made:
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


def pass_stack(walk: "Walk", node: fx.Node) -> Made:
    """Values that have the same channels, along an axis of its own."""
    values, shape = argument(node, 0, "tensors", ()), shape_of(node)
    dim = argument(node, 1, "dim", 0)
    if not isinstance(values, (tuple, list)) or not all(isinstance(value, fx.Node) for value in values):
        return None
    channels = walk.broadcast(node, values) if type(dim) is int and shape is not None else None
    if channels is None or shape is None:
        return None
    # Of the value's axes, one that stands behind the new one has the number that it had.
    return channels if dim % len(shape) - len(shape) < channels.axis else channels.moved(channels.axis - 1)


def _range(channels: Channels, start: int, stop: int) -> Channels | None:
    if start >= stop:
        return None
    halves = channels.cut(stop)
    halves = halves[0].cut(start) if halves is not None else None
    return halves[1] if halves is not None else None


def _dims(node: fx.Node, place: int = 1, name: str = "dim") -> set[int] | None:
    """The dimensions that an argument names, counted from the last one; none where it is not given, None if unknown."""
    rank = len(input_shape(node) or ())
    # The one method that takes them one by one.
    dims: Any = node.args[1:] if node.target == "flip" and len(node.args) > 2 else argument(node, place, name)
    given: Sequence[Any] = dims if isinstance(dims, (tuple, list)) else () if dims is None else (dims,)
    return {dim if dim < 0 else dim - rank for dim in given} if all(type(dim) is int for dim in given) else None


def _beside(channels: Channels, dims: set[int], before: Sequence[Any], after: Sequence[Any]) -> Channels:
    """The same, where other dimensions are left out, or kept."""
    left = len(after) < len(before)
    return channels.moved(channels.axis + sum(dim > channels.axis for dim in dims)) if left else channels


def _is_unpacked(node: fx.Node) -> bool:
    """Whether its tuple is read value by value."""
    return all(user.target is operator.getitem and type(user.args[1]) is int for user in node.users)


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument that may be passed by its place or by its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def input_shape(node: fx.Node) -> Sequence[Any] | None:
    """The shape of the only tensor that ``node`` reads."""
    shapes = [shape for value in node.all_input_nodes if (shape := shape_of(value)) is not None]
    return shapes[0] if len(shapes) == 1 else None


def permuted_axes(node: fx.Node) -> Sequence[int] | None:
    """Where a permutation puts each axis of what it reads, all counted from the last one, so to be indexed by them."""
    shape = input_shape(node)
    if shape is None or len(node.all_input_nodes) > 1:
        return None
    rank = len(shape)
    marked = torch.empty_strided((1,) * rank, tuple(range(rank)), device="meta")
    args: Any = fx.map_arg(node.args, lambda _: marked)
    named: Any = fx.map_arg(node.kwargs, lambda _: marked)
    function: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    strides = function(*args, **named).stride()
    return [strides.index(axis) - rank for axis in range(rank)]


def is_number(node: fx.Node) -> bool:
    """Whether a node is one of a number, or of the sizes of a shape."""
    return isinstance(node.meta.get("example_value"), (int, float, torch.SymInt, torch.SymFloat, torch.Size))


def _is_index(item: Any) -> bool:
    return isinstance(item, fx.Node) and isinstance(item.meta.get("example_value"), torch.SymInt)


def _is_whole(sizes: Sequence[Any], axis: int, numbers: Any) -> bool:
    """Whether there are so many numbers from an axis on."""
    return statically_known_true(count(sizes[axis:]) == numbers)


def count(sizes: Sequence[Any]) -> Any:
    """How many numbers a value of these sizes has."""
    return functools.reduce(operator.mul, sizes, 1)
