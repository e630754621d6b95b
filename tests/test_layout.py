import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_hinm.layout import HiNMLayout, check_layout, inverse
from lightning_hinm.pattern import HiNMPattern
from tests.strategies import layouts


@given(st.integers(1, 40), st.integers(0, 999))
def test_inverse_undoes_an_order(count, seed):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) * 3
    assert torch.equal(y[order][inverse(order)], y)


@given(st.data(), st.integers(1, 20), st.integers(1, 40))
def test_legal_layouts_pass_the_check(data, rows, columns):
    check_layout(data.draw(layouts(rows, columns)), rows, columns)


PATTERN = HiNMPattern(4, 0.5, window=None)


def layout(rows: int = 8, columns: int = 16, pattern: HiNMPattern = PATTERN) -> HiNMLayout:
    index = torch.cat([torch.arange(first, first + pattern.kept_of_run(last - first))
                       for first, last in pattern.runs(columns)])  # fmt: skip
    return HiNMLayout(pattern, torch.arange(rows), index.repeat(-(-rows // pattern.vector_size), 1))


def changed(value: HiNMLayout, *, order: torch.Tensor | None = None, index: dict | None = None) -> HiNMLayout:
    vector_index = value.vector_index.clone()
    for at, column in (index or {}).items():
        vector_index[at] = column
    return HiNMLayout(value.pattern, value.output_order if order is None else order, vector_index)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (changed(layout(), order=torch.zeros(8, dtype=torch.int64)), "not a permutation of 0..7"),
        (changed(layout(), order=torch.arange(8) + 1), "not a permutation of 0..7"),
        (changed(layout(), index={(0, 0): 99}), r"columns outside 0\.\.15"),
        (changed(layout(), index={(1, 3): -1}), r"columns outside 0\.\.15"),
        (changed(layout(), index={(1, 3): 0}), "names a column twice"),
        (layout(rows=12), "output_order has 12 entries, but the weight has 8 rows"),
        (layout(columns=32), "keeps 16 columns, but the pattern keeps 8 of 16"),
    ],
)
def test_a_damaged_layout_is_refused_by_rule(bad, message):
    with pytest.raises(ValueError, match=rf"fc1: .*{message}"):
        check_layout(bad, 8, 16, name="fc1")


def test_a_column_outside_its_run_is_refused():
    pattern = HiNMPattern(4, 0.5, window=8)
    good = layout(4, 40, pattern)
    check_layout(good, 4, 40)
    bad = HiNMLayout(pattern, good.output_order, torch.arange(20).unsqueeze(0))  # the right number, but none per run
    with pytest.raises(ValueError, match="leave their run"):
        check_layout(bad, 4, 40)


def test_virtual_columns_before_the_last_groups_are_refused():
    pattern = HiNMPattern(2, 0.0, window=None)
    good = HiNMLayout(pattern, torch.arange(2), torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]]))
    check_layout(good, 2, 7)
    with pytest.raises(ValueError, match="before the last groups"):
        check_layout(changed(good, index={(0, 0): 7, (0, 7): 0}), 2, 7)


def test_no_row_may_leave_its_group_of_a_convolution():
    order = torch.arange(8)
    order[[0, 7]] = order[[7, 0]]
    check_layout(changed(layout(), order=order), 8, 16)
    with pytest.raises(ValueError, match="between the 2 groups"):
        check_layout(changed(layout(), order=order), 8, 16, groups=2)


def test_tensors_of_the_wrong_type_or_number_of_tiles_are_refused():
    with pytest.raises(ValueError, match="must be int64"):
        HiNMLayout(PATTERN, torch.arange(8).int(), torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="has 3 tiles, but 8 rows in tiles of vector_size=4 make 2"):
        HiNMLayout(PATTERN, torch.arange(8), torch.zeros(3, 8, dtype=torch.int64))


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), float("inf"), "0.5", True])
def test_a_retained_saliency_outside_nought_to_one_is_refused(bad):
    with pytest.raises(ValueError, match=r"HiNMLayout: retained=.*must be a number in \[0, 1\], or None"):
        dataclasses.replace(layout(), retained=bad)


def test_a_layout_keeps_what_it_retained_wherever_it_goes():
    assert layout().retained is None
    one = dataclasses.replace(layout(), retained=0.25)
    assert [again.retained for again in (copy.deepcopy(one), copy.copy(one), one.to("meta"))] == [0.25] * 3


def test_layouts_are_compared_by_identity_and_survive_deepcopy():
    one = layout()
    two = copy.deepcopy(one)
    assert one != two
    assert torch.equal(one.vector_index, two.vector_index)
