"""Streams: joined and cut, channels keep one order wherever they stand."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_hinm.passes.channels import Channels, Stream


def written(size: int, *orders: list[int] | None) -> Stream:
    return Stream(size, [None if order is None else torch.tensor(order) for order in orders])


def channels(*streams: Stream, spread: int = 1) -> Channels:
    return Channels(-1, tuple((stream, spread) for stream in streams))


def test_streams_that_are_joined_have_one_order_and_all_writers() -> None:
    one, two, three = written(2, [1, 0]), written(2, None), written(2)
    assert channels(one).join(channels(two))
    assert channels(three).join(channels(two))
    (stream,) = {part for each in (one, two, three) for part in each.now()}
    assert len(stream.orders) == 2
    assert channels(one) != channels(two)
    assert channels(one).parts == channels(two).parts == [(stream, 1)]


def test_channels_are_cut_only_where_a_writer_keeps_the_parts_apart() -> None:
    assert channels(written(4, [1, 2, 0, 3])).cut(2) is None
    assert channels(written(4, None)).cut(2) is None
    assert channels(written(4)).cut(5) is None
    assert channels(written(4)).cut(-1) is None
    halves = channels(written(4, [1, 0, 3, 2], [2, 0, 1, 3])).cut(2)
    assert halves is not None
    assert [[order.tolist() for order in half.streams[0].orders] for half in halves] == [[[1, 0]], [[1, 0]]]


def test_channels_of_several_pixels_are_not_cut_in_the_middle() -> None:
    pixels = channels(Stream(4), spread=3)
    assert pixels.cut(4) is None
    halves = pixels.cut(6)
    assert halves is not None
    assert [half.size for half in halves] == [6, 6]


def test_what_is_joined_to_parts_is_cut_as_they_are() -> None:
    left, right, whole = Stream(1), Stream(2), written(3, [0, 2, 1])
    assert channels(whole).join(channels(left, right))
    assert whole.now() == (*left.now(), *right.now())
    assert not channels(written(3, [2, 1, 0])).join(channels(Stream(1), Stream(2)))
    assert not channels(Stream(4)).join(channels(Stream(2), spread=2))
    assert not channels(Stream(4)).join(channels(Stream(3)))


def test_halves_that_change_places_have_one_order() -> None:
    left, right = Stream(2), Stream(4)
    assert channels(left, right).join(channels(right, left))
    assert len(set(channels(left, right).streams)) == 1


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 3))
def test_an_order_moves_each_stream_in_its_place_and_pixels_with_their_channel(sizes: list[int], spread: int) -> None:
    streams = [Stream(size) for size in sizes]
    orders = {stream: torch.randperm(stream.size) for stream in streams[1:]}
    values = torch.arange(sum(sizes) * spread)
    order = channels(*streams, spread=spread).order(orders)
    if len(sizes) == 1:
        assert order is None
        return
    assert order is not None
    start = 0
    for stream in streams:
        part = values[start : start + stream.size * spread].view(stream.size, spread)
        moved = values[order][start : start + stream.size * spread].view(stream.size, spread)
        assert torch.equal(moved, part[orders[stream]] if stream in orders else part)
        start += stream.size * spread
