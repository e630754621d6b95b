from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import choose_vectors, hinm_mask
from lightning_hinm.pattern import HiNMPattern
from lightning_hinm.schedule import GradualSchedule

SCHEDULES = st.builds(
    lambda a, b, updates: GradualSchedule(min(a, b), max(a, b), updates),
    st.integers(0, 20).map(lambda i: i / 20),
    st.integers(0, 20).map(lambda i: i / 20),
    st.integers(1, 12),
)
PATTERNS = st.builds(
    lambda vector_sparsity, nm, window: HiNMPattern(4, vector_sparsity, *nm, window=window),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9]),
    st.sampled_from([(1, 4), (2, 4), (4, 4), (2, 8), (3, 8), (1, 1)]),
    st.sampled_from([None, 8]),
)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"begin": -0.1}, "begin=-0.1"),
        ({"end": 1.5}, "end=1.5"),
        ({"end": float("nan")}, "end=nan"),
        ({"begin": 0.5, "end": 0.2}, "begin=0.5 must not be after end=0.2"),
        ({"updates": 0}, "updates=0"),
    ],
)
def test_a_schedule_that_cannot_exist_is_refused_by_field(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GradualSchedule(**fields)  # type: ignore[arg-type]


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"begin=2.*end=-1.*updates=-3"):
        GradualSchedule(2, -1, -3)


@pytest.mark.parametrize("fields", [{"begin": "0"}, {"end": None}, {"updates": 2.0}, {"updates": True}])
def test_a_field_of_the_wrong_type_is_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=next(iter(fields))):
        GradualSchedule(**fields)  # type: ignore[arg-type]


@given(SCHEDULES)
def test_every_update_is_due_exactly_at_its_time(schedule: GradualSchedule) -> None:
    begin, end = Fraction(str(schedule.begin)), Fraction(str(schedule.end))
    for i in range(1, schedule.last + 1):
        time = begin + (end - begin) * Fraction(i - 1, max(schedule.last - 1, 1))
        assert schedule.due(time) == i
        assert schedule.due(time - Fraction(1, 10**9)) == i - 1


@given(SCHEDULES, st.lists(st.fractions(0, 1), min_size=2))
def test_what_is_due_never_falls_and_all_is_due_in_the_end(schedule: GradualSchedule, times: list[Fraction]) -> None:
    due = [schedule.due(time) for time in sorted(times)]
    assert due == sorted(due)
    assert schedule.due(1) == schedule.last


def test_equal_begin_and_end_is_one_update_whatever_updates_says() -> None:
    schedule = GradualSchedule(0.2, 0.2, updates=7)
    assert [schedule.due(progress) for progress in (0, 0.19, 0.2, 1)] == [0, 0, 1, 1]
    assert schedule.pattern(1, HiNMPattern()) == HiNMPattern()


def test_times_are_those_of_the_decimal_numbers_that_a_person_wrote() -> None:
    # In floats 0.1 + (0.7 - 0.1) * 1 / 3 is 0.29999999999999993, and 3 batches of 10 would be one batch late or early.
    schedule = GradualSchedule(0.1, 0.7, updates=4)
    assert schedule.due(Fraction(3, 10)) == 2
    assert schedule.due(Fraction(5, 10)) == 3


@given(SCHEDULES, PATTERNS)
def test_the_last_update_has_exactly_the_target(schedule: GradualSchedule, target: HiNMPattern) -> None:
    assert schedule.pattern(schedule.last, target) == target


@given(SCHEDULES, PATTERNS)
def test_vectors_go_first_and_n_falls_only_when_all_target_vectors_are_gone(
    schedule: GradualSchedule, target: HiNMPattern
) -> None:
    patterns = [schedule.pattern(i, target) for i in range(1, schedule.last + 1)]
    for pattern in patterns:
        assert pattern.n == target.m or pattern.vector_sparsity == target.vector_sparsity
        assert (pattern.m, pattern.vector_size, pattern.window) == (target.m, target.vector_size, target.window)
    assert [p.vector_sparsity for p in patterns] == sorted(p.vector_sparsity for p in patterns)
    assert [p.n for p in patterns] == sorted((p.n for p in patterns), reverse=True)


@given(SCHEDULES, PATTERNS, st.integers(8, 80))
def test_no_update_keeps_more_vectors_than_the_one_before(
    schedule: GradualSchedule, target: HiNMPattern, in_features: int
) -> None:
    kept = [schedule.pattern(i, target).kept(in_features) for i in range(1, schedule.last + 1)]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (HiNMPattern(), [(0.366, 4), (0.5, 3), (0.5, 2), (0.5, 2), (0.5, 2)]),
        (HiNMPattern(n=4), [(0.244, 4), (0.392, 4), (0.468, 4), (0.496, 4), (0.5, 4)]),  # n never falls
        (HiNMPattern(vector_sparsity=0.0), [(0.0, 3), (0.0, 2), (0.0, 2), (0.0, 2), (0.0, 2)]),  # only n falls
        (HiNMPattern(vector_sparsity=0.0, n=4), [(0.0, 4)] * 5),  # dense
        (HiNMPattern(vector_sparsity=0.75, n=2, m=8), [(0.4575, 8), (0.735, 8), (0.75, 4), (0.75, 2), (0.75, 2)]),
    ],
)
def test_five_updates_follow_the_cubic_curve(target: HiNMPattern, expected: list[tuple[float, int]]) -> None:
    patterns = [GradualSchedule(updates=5).pattern(i, target) for i in range(1, 6)]
    assert [(p.vector_sparsity, p.n) for p in patterns] == expected


@given(SCHEDULES, PATTERNS, st.integers(1, 12), st.integers(8, 50), st.integers(0, 1000))
def test_masks_nest_and_the_last_obeys_the_target(
    schedule: GradualSchedule, target: HiNMPattern, rows: int, in_features: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    order, index, mask = torch.randperm(rows, generator=draw), None, None
    for i in range(1, schedule.last + 1):
        pattern = schedule.pattern(i, target)
        saliency = torch.rand(rows, in_features, generator=draw)  # other weights matter at each update
        if index is None or pattern.n == pattern.m:
            index = choose_vectors(saliency, pattern, order, within=mask)
        elif index.shape[1] != pattern.kept(in_features):
            index = choose_vectors(saliency, target, order, within=mask)
        layout = HiNMLayout(pattern, order, index)
        after = hinm_mask(saliency, layout, within=mask)
        assert mask is None or not (after & ~mask).any()
        mask = after
    assert mask is not None
    assert torch.equal(mask, hinm_mask(mask.float(), HiNMLayout(target, order, index)))
