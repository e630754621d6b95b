import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_hinm.pattern import HiNMPattern, from_matrix, layer_kind, other_kind, to_matrix
from tests.strategies import patterns


@given(patterns(), st.integers(1, 300))
def test_kept_is_whole_groups_between_one_and_all(pattern, columns):
    kept = pattern.kept_of_run(columns)
    assert kept % pattern.m == 0
    assert pattern.m <= kept <= pattern.padded(columns)


@given(patterns(), st.integers(1, 300))
def test_kept_is_the_nearest_multiple_of_m_with_ties_up(pattern, columns):
    wanted = columns * (1 - Fraction(str(pattern.vector_sparsity)))
    multiples = range(pattern.m, pattern.padded(columns) + 1, pattern.m)
    nearest = min(multiples, key=lambda multiple: (abs(multiple - wanted), -multiple))
    assert pattern.kept_of_run(columns) == (nearest if pattern.vector_sparsity else pattern.padded(columns))


def test_float_rounding_loses_no_group():
    assert HiNMPattern(vector_sparsity=0.8, window=None).kept(640) == 128


@given(patterns(), st.integers(1, 300))
def test_runs_cut_the_columns_only_beyond_four_windows(pattern, columns):
    runs = pattern.runs(columns)
    assert [column for run in runs for column in range(*run)] == list(range(columns))
    if pattern.window is None or columns <= 4 * pattern.window:
        assert len(runs) == 1
    else:
        assert all(last - first == pattern.window for first, last in runs[:-1])
    assert pattern.kept(columns) == sum(pattern.kept_of_run(last - first) for first, last in runs)


@pytest.mark.parametrize(("sparsity", "vector_sparsity"), [(0.5, 0.0), (0.75, 0.5), (0.875, 0.75), (0.9, 0.8)])
def test_from_sparsity_gives_that_sparsity_exactly(sparsity, vector_sparsity):
    pattern = HiNMPattern.from_sparsity(sparsity, vector_size=32)
    assert pattern == HiNMPattern(32, vector_sparsity)
    assert pattern.sparsity == sparsity


@pytest.mark.parametrize("sparsity", [0.4, 1.0, -1.0, math.inf])
def test_from_sparsity_refuses_what_n_of_m_cannot_give(sparsity):
    with pytest.raises(ValueError, match=r"sparsity=.* must be in \[0\.5, 1\)"):
        HiNMPattern.from_sparsity(sparsity)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 5}, "n=5 must be between 1 and m=4"),
        ({"n": 0}, "n=0 must be between 1 and m=4"),
        ({"m": 0}, "m=0 must be at least 1"),
        ({"vector_size": 0}, "vector_size=0 must be at least 1"),
        ({"vector_sparsity": 1.0}, r"vector_sparsity=1\.0 must be in \[0, 1\)"),
        ({"vector_sparsity": float("nan")}, "vector_sparsity=nan"),
        ({"window": 6}, "window=6 must be a positive multiple of m=4"),
        ({"window": 0}, "window=0"),
    ],
)
def test_a_pattern_that_cannot_exist_is_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        HiNMPattern(**fields)


def test_all_wrong_fields_stand_in_one_message():
    with pytest.raises(ValueError, match=r"vector_size=0.*vector_sparsity=2.*n=9"):
        HiNMPattern(vector_size=0, vector_sparsity=2, n=9)


@pytest.mark.parametrize("fields", [{"vector_size": 64.0}, {"n": True}, {"vector_sparsity": "0.5"}, {"window": 2.0}])
def test_a_field_of_the_wrong_type_is_refused(fields):
    with pytest.raises(TypeError, match=next(iter(fields))):
        HiNMPattern(**fields)


@given(patterns())
def test_dict_round_trip(pattern):
    assert HiNMPattern.from_dict(pattern.to_dict()) == pattern


@pytest.mark.parametrize("fields", [{}, {"vector_size": 4}, HiNMPattern().to_dict() | {"x": 1}, [1], {"n": "2"}])
def test_from_dict_refuses_anything_but_the_fields(fields):
    with pytest.raises(ValueError, match="HiNMPattern"):
        HiNMPattern.from_dict(fields)


def test_from_dict_refuses_a_field_of_the_wrong_type_with_a_value_error():
    with pytest.raises(ValueError, match="vector_size"):
        HiNMPattern.from_dict(HiNMPattern().to_dict() | {"vector_size": "64"})


class Conv1D(nn.Module):
    """Stands for the Hugging Face layer: known by its qualified name, weight ``[in, out]``."""

    __module__ = "transformers.pytorch_utils"
    __qualname__ = "Conv1D"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 8))

    def forward(self, x):
        return x @ self.weight


class SameForward(nn.Linear):
    pass


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(2, 2), "linear"),
        (nn.Conv1d(2, 2, 3), "conv1d"),
        (nn.Conv2d(2, 2, 3), "conv2d"),
        (Conv1D(), "hf_conv1d"),
        (SameForward(2, 2), "linear"),
        (OwnForward(2, 2), None),
        (nn.Conv3d(2, 2, 3), None),
        (nn.ConvTranspose2d(2, 2, 3), None),
        (nn.Embedding(2, 2), None),
    ],
)
def test_layer_kind_knows_what_is_prunable(module, kind):
    assert layer_kind(module) == kind
    assert other_kind(module) == ("linear" if isinstance(module, OwnForward) else None)


@pytest.mark.parametrize("module", [nn.Linear(6, 8), nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, (3, 2), groups=2), Conv1D()])
def test_matrix_round_trip(module):
    kind, weight = layer_kind(module), module.weight.detach()
    matrix = to_matrix(weight, kind)
    assert matrix.shape[0] == 8
    assert torch.equal(from_matrix(matrix, kind, tuple(weight.shape)), weight)


@pytest.mark.parametrize(("in_features", "window"), [(40, None), (40, 16), (64, 16), (65, 16), (96, 16), (100, 16)])
def test_equal_runs_are_the_runs_taken_together(in_features: int, window: int | None) -> None:
    pattern = HiNMPattern(window=window)
    found = [
        (first + i * columns, first + (i + 1) * columns)
        for first, columns, count in pattern.equal_runs(in_features)
        for i in range(count)
    ]
    assert found == pattern.runs(in_features)
    assert len(pattern.equal_runs(in_features)) <= 2
