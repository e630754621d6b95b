"""Rules of what stands between the layers of an attention, where channels are cut into heads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lightning_hinm.passes.axes import Made, argument, count, permuted_axes
from lightning_hinm.passes.channels import Channels, Heads
from lightning_hinm.passes.sparsify import shape_of

if TYPE_CHECKING:
    from lightning_hinm.passes.follow import Walk


def keep_heads(walk: "Walk", node: fx.Node) -> Made:
    """The identity, another type or storage, number by number, or copies along other axes."""
    return walk.heads_alone(node)


def drop_heads(walk: "Walk", node: fx.Node) -> Made:
    """The identity, where it is idle."""
    return walk.heads_alone(node) if argument(node, 2, "training", True) is False else None


def permute_heads(walk: "Walk", node: fx.Node) -> Made:
    """Both axes go where they are sent."""
    heads, axes = walk.heads_alone(node), permuted_axes(node)
    return None if heads is None or axes is None else heads.moved(axes[heads.axis], axes[heads.inner])


def add_axes(walk: "Walk", node: fx.Node) -> Made:
    """``x[:, :, None]``: all of it, with new axes."""
    heads, items, rank = walk.heads_alone(node), node.args[1], len(shape_of(node) or ())
    items = items if isinstance(items, tuple) else (items,)
    if heads is None or not all(item is None or item is ... or item == slice(None) for item in items):
        return None
    unnamed = rank - sum(item is not ... for item in items)
    is_old: list[bool] = []  # of each axis of the result
    for item in items:
        is_old += [True] * unnamed if item is ... else [item is not None]
    is_old += [True] * (rank - len(is_old))
    places = [axis - rank for axis, old in enumerate(is_old) if old]
    return heads.moved(places[heads.axis], places[heads.inner])


def reshape_heads(walk: "Walk", node: fx.Node) -> Made:
    """Heads that stay as they are, take up an axis of their copies, or stand one after another again."""
    x = argument(node, 0, "input")
    heads, before, after = walk.heads.get(x), shape_of(x), shape_of(node)
    if heads is None or before is None or after is None or any(isinstance(each, torch.dtype) for each in node.args):
        return None
    if heads.inner < heads.axis:  # what stands before the heads is not looked at
        return None
    numbers, rest = count(before[heads.axis :]), before[len(before) + heads.axis + 1 :]
    for axis in range(-len(after), 0):
        behind = after[len(after) + axis + 1 :]
        if not statically_known_true(count(after[axis:]) == numbers):
            continue
        if _are_equal(behind, rest):
            return heads.moved(axis, heads.inner)
        if not _are_equal(behind, rest[1:]):
            continue
        if heads.inner == heads.axis + 1:
            return Channels(axis, tuple(segment for channels in heads.each for segment in channels.segments))
        if isinstance(rest[0], int):
            return heads.repeated(rest[0]).moved(axis, heads.inner)
    return None


def multiply_heads(walk: "Walk", node: fx.Node) -> Made:
    """Weights of an attention and its values, head by head; or queries and keys, which one order leaves alone."""
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    one, two = walk.heads.get(left), walk.heads.get(right)
    if two is None or two.axis > -3:
        return None
    if one is None:
        walk.restore(node, left)
        return two if two.inner == -1 else None
    return () if (one.inner, two.inner) == (-1, -2) and _join(one, two) else None


def pass_attention(walk: "Walk", node: fx.Node) -> Made:
    """A mean of the values, channel by channel, by weights that an order of queries and keys leaves alone."""
    query, key, value, mask = (argument(node, i, name) for i, name in enumerate(("query", "key", "value", "attn_mask")))
    queries, keys, values = (walk.heads.get(each) for each in (query, key, value))
    shape, channels = shape_of(node), walk.carried.get(value)
    if not (queries and keys and _lie_as_attention_reads(queries, keys) and _join(queries, keys)):
        walk.restore(node, query)
        walk.restore(node, key)
    walk.restore(node, mask)
    if values is None:  # the same channels for all heads, or in their original order
        return () if channels is None else channels if channels.axis == -1 else None
    if shape is None or not _lie_as_attention_reads(values):
        return None
    times, rest = divmod(shape[-3], len(values.each))  # each head of the values serves a group of queries
    return None if rest else values.repeated(times)


def _lie_as_attention_reads(*heads: Heads) -> bool:
    return all((each.axis, each.inner) == (-3, -1) for each in heads)


def _join(one: Heads, two: Heads) -> bool:
    """Whether each head of both, those of ``two`` repeated, can have one order; from now on they do."""
    times, rest = divmod(len(one.each), len(two.each))
    if rest or one.axis != two.axis:
        return False
    return all(channels.join(other) for channels, other in zip(one.each, two.repeated(times).each, strict=True))


def _are_equal(one: Sequence[Any], two: Sequence[Any]) -> bool:
    return len(one) == len(two) and all(statically_known_true(a == b) for a, b in zip(one, two, strict=True))
