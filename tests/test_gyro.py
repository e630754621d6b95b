import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from benchmarks.optimum import best_retained, groupings
from lightning_hinm.gyro import SMALL, gyro_permute, search, search_shared
from lightning_hinm.gyro.cache import fingerprint
from lightning_hinm.gyro.exchange import (
    LAST,
    SHARE,
    THOROUGH,
    TURNS,
    _anneal_rows,
    _balance,
    _kept,
    _likely,
    _pruned_runs,
    _Rows,
    _sums,
)
from lightning_hinm.gyro.gap import sum_of_largest
from lightning_hinm.gyro.paper import _balanced_clusters, _vector_values
from lightning_hinm.gyro.problem import (
    BARRED,
    TRIED,
    Blocks,
    Clock,
    Problem,
    _priced,
    _threads,
    assign,
    assign_vectors,
    joined_values,
    row_values,
    top_sum,
)
from lightning_hinm.layout import HiNMLayout, check_layout, inverse
from lightning_hinm.mask import choose_vectors, hinm_mask, retained
from lightning_hinm.pattern import HiNMPattern
from tests.elsewhere import Elsewhere, elsewhere
from tests.strategies import N_M, patterns, saliencies

ROOT = Path(__file__).parents[1]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def value(saliency: torch.Tensor, layout: HiNMLayout) -> float:
    return retained(saliency, hinm_mask(saliency, layout))


def structured(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of four hidden kinds, shuffled: what an order of the rows can win a lot on."""
    generator = seeded(seed)
    kinds = torch.rand(4, columns, generator=generator) ** 4
    return (kinds.repeat(rows // 4, 1) + 0.1 * torch.rand(rows, columns, generator=generator))[
        torch.randperm(rows, generator=generator)
    ]


# --- laws -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(patterns(), saliencies(), st.integers(0, 99))
def test_exchange_retains_at_least_gyro_and_gyro_at_least_identity(pattern, saliency, seed):
    values = []
    for method in ("identity", "gyro", "exchange"):
        layout = gyro_permute(saliency, pattern, method=method, generator=seeded(seed))
        check_layout(layout, *saliency.shape)
        values.append(value(saliency, layout))
    assert values == sorted(values)


@pytest.mark.parametrize(
    "pattern", [HiNMPattern(32), HiNMPattern(8, 0.75, 1, 4, 16), HiNMPattern(64, 0.0, window=None)]
)
def test_exchange_alone_retains_at_least_identity_where_the_papers_loop_does_not_help_it(pattern):
    saliency = torch.rand(136, 124, generator=seeded())
    assert saliency.numel() > SMALL
    base = value(saliency, gyro_permute(saliency, pattern, method="identity"))
    assert value(saliency, gyro_permute(saliency, pattern)) > base


@settings(max_examples=30)
@given(patterns(), saliencies(), st.sampled_from(["gyro", "exchange"]))
def test_the_same_generator_gives_the_same_layout(pattern, saliency, method):
    one, two = (gyro_permute(saliency, pattern, method=method, generator=seeded(7)) for _ in range(2))
    assert torch.equal(one.output_order, two.output_order)
    assert torch.equal(one.vector_index, two.vector_index)


@settings(max_examples=30)
@given(patterns(), saliencies())
def test_the_value_reported_is_the_value_of_the_mask(pattern, saliency):
    result = search(saliency, pattern)
    assert result.retained == result.layout.retained == value(saliency, result.layout)


@settings(max_examples=30)
@given(patterns(), saliencies())
def test_a_fixed_output_order_stays_and_vectors_come_from_within(pattern, saliency):
    rows = saliency.shape[0]
    order = torch.randperm(rows, generator=seeded(3))
    vectors = HiNMPattern(pattern.vector_size, pattern.vector_sparsity / 2, pattern.m, pattern.m, pattern.window)
    within = hinm_mask(saliency, HiNMLayout(vectors, order, choose_vectors(saliency, vectors, order)))
    result = search(saliency, pattern, output_order=order, within=within)
    check_layout(result.layout, *saliency.shape)
    assert torch.equal(result.layout.output_order, order)
    assert not (hinm_mask(saliency, result.layout) & ~within).any()


def test_the_global_random_state_is_neither_read_nor_set():
    saliency = structured(32, 24)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = gyro_permute(saliency, HiNMPattern(4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(gyro_permute(saliency, HiNMPattern(4)).vector_index, one.vector_index)


def test_the_saliency_is_left_as_it_was():
    saliency = structured(32, 24)
    copy = saliency.clone()
    gyro_permute(saliency, HiNMPattern(4))
    assert torch.equal(saliency, copy)


# --- quality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_exchange_comes_within_two_percent_of_the_optimum_of_tiny_matrices(seed):
    saliency = torch.rand(4, 8, generator=seeded(seed)) ** 3
    pattern = HiNMPattern(2, 0.0, n=2, m=4)
    best = best_retained(saliency, pattern)
    found = value(saliency, gyro_permute(saliency, pattern))
    assert 0.98 * best <= found <= best + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_exchange_comes_within_two_percent_of_the_optimum_where_vectors_are_pruned(seed):
    saliency = torch.rand(4, 6, generator=seeded(seed)) ** 3
    pattern = HiNMPattern(2, 1 / 3, n=1, m=2)
    best = best_retained(saliency, pattern)
    assert 0.98 * best <= value(saliency, gyro_permute(saliency, pattern)) <= best + 1e-6


def test_the_order_of_rows_recovers_hidden_kinds():
    saliency, pattern = structured(64, 48), HiNMPattern(16, 0.5)
    values = {m: value(saliency, gyro_permute(saliency, pattern, method=m)) for m in ("identity", "gyro", "exchange")}
    assert values["gyro"] > values["identity"] + 0.02
    assert values["exchange"] > values["identity"] + 0.08


def odd_saliencies():
    numbers = torch.rand(64, 96, generator=seeded())
    return {
        "constant": torch.ones(64, 96),
        "integers": (numbers * 3).floor(),
        "heavy tail": numbers**40,
        "sparse": numbers * (numbers > 0.95),
        "one row": numbers[:1],
        "one column": numbers[:, :1],
        "one live row": torch.zeros(64, 96).index_fill(0, torch.tensor([3]), 1.0),
        "bfloat16": numbers.bfloat16(),
        "float16": numbers.half(),
        "float64": numbers.double(),
    }


@pytest.mark.parametrize("kind", odd_saliencies())
@pytest.mark.parametrize(
    "pattern", [HiNMPattern(16), HiNMPattern(16, 0.5, 4, 4), HiNMPattern(256, 0.75, 1, 4)], ids=str
)
def test_no_kind_of_saliency_makes_exchange_worse_than_gyro_or_identity(kind, pattern):
    saliency = odd_saliencies()[kind]
    identity, gyro, exchange = (search(saliency, pattern, method=m) for m in ("identity", "gyro", "exchange"))
    check_layout(exchange.layout, *saliency.shape)
    assert identity.retained <= gyro.retained <= exchange.retained
    assert 0 <= exchange.gap_closed <= 1 + 1e-9


# --- exact forms ------------------------------------------------------------------------------------------------------


@given(st.sampled_from(N_M), st.integers(0, 99))
def test_top_sum_is_the_sum_of_the_n_largest(n_m, seed):
    n, m = n_m
    parts = (torch.rand(m, 5, 3, generator=seeded(seed)) * 4).floor()
    assert torch.allclose(top_sum(list(parts), n), parts.topk(n, dim=0).values.sum(dim=0))


@given(st.sampled_from(N_M), st.integers(0, 99))
def test_the_value_of_a_group_with_every_column_as_its_last_member_is_exact(n_m, seed):
    n, m = n_m
    assume(n < m)  # else groups are not searched
    rest = (torch.rand(m - 1, 1, 2, 3, generator=seeded(seed)) * 4).floor().double()
    columns = (torch.rand(1, 5, 3, generator=seeded(seed + 1)) * 4).floor().double()
    values = joined_values(rest.unbind(), columns, columns.sum(dim=2), n)
    for group in range(2):
        members = torch.cat((rest[:, 0, group].expand(5, -1, -1), columns[0].unsqueeze(1)), dim=1)  # [5, m, 3]
        worth = members.topk(n, dim=1).values.sum(dim=(1, 2))
        assert torch.allclose((values[0, group] - values[0, group, 0]) / 2, worth - worth[0], atol=1e-12)


@given(st.integers(1, 7), st.integers(0, 4), st.integers(0, 999))
def test_prices_do_not_change_what_an_assignment_is_worth(rows, extra, seed):
    values = torch.rand(1, rows, rows + extra, generator=seeded(seed)).double()
    numbers = values[0].numpy()
    plain, priced = assign([numbers])[0], assign(list(_priced(values)))[0][:rows]
    assert priced.max() < rows + extra
    worth = [numbers[np.arange(rows), choice].sum() for choice in (plain, priced)]
    assert worth[0] == pytest.approx(worth[1], abs=1e-9)


def test_assignments_shared_by_threads_are_those_of_one(monkeypatch):
    values = [torch.rand(rows, rows + 2, generator=seeded(rows)).numpy() for rows in range(1, 12)]
    alone = assign(values)
    solvers = []
    module = "lightning_hinm.gyro.problem."
    monkeypatch.setattr(f"{module}PER_THREAD", 1)
    monkeypatch.setattr(f"{module}_threads", lambda process: solvers.append(process) or _threads(process))
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    shared = assign(values)
    assert solvers == [os.getpid()] * 2
    assert all(np.array_equal(*pair) for pair in zip(alone, shared, strict=True))


def test_a_process_that_was_forked_has_threads_of_its_own():
    program = """
import os, signal, numpy, torch
from lightning_hinm.gyro import problem
problem.PER_THREAD = 1
torch.set_num_threads(2)
problem.assign([numpy.eye(2)] * 2)
child = os.fork()
if child == 0:
    signal.alarm(20)  # rather than wait for ever
    problem.assign([numpy.eye(2)] * 2)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout.split() == ["7"], result.stderr


@given(st.integers(1, 60), st.integers(0, 20), st.sampled_from([1.0, 1e-3, 1e-5]), st.integers(0, 999))
def test_barred_columns_do_not_blur_the_prices_of_small_values(rows, extra, scale, seed):
    values = torch.rand(1, rows, rows + extra, generator=seeded(seed)) * scale
    values[:, :, rows:] = BARRED
    numbers = values[0].double().numpy()
    plain, priced = assign([numbers])[0], assign(list(_priced(values)))[0][:rows]
    worth = [numbers[np.arange(rows), choice].sum() for choice in (plain, priced)]
    assert worth[0] == pytest.approx(worth[1], rel=1e-5)


@given(st.sampled_from(N_M), st.booleans(), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_a_draw_gains_exactly_what_it_says_and_keeps_every_column_once(n_m, pruned, most, tries, seed):
    n, m = n_m
    assume(n < m)  # else groups are not searched
    points = torch.rand(2, 4 * m, 3, generator=seeded(seed)) ** 3
    slots = torch.stack([torch.randperm(4 * m, generator=seeded(seed))[: 2 * m] for _ in range(2)]).unflatten(1, (2, m))
    free = torch.ones(2, 4 * m, dtype=torch.bool).scatter(1, slots.flatten(1), False)
    blocks = Blocks(points, slots.numpy(), n, free.numpy() if pruned else None, most, aged=pruned)

    def worth() -> torch.Tensor:
        groups = points[torch.arange(2).view(2, 1, 1), torch.from_numpy(blocks.slots)]  # [2, G, m, V]
        return groups.topk(n, dim=2).values.sum(dim=(1, 2, 3))

    before = worth()
    assert np.allclose(blocks.worth, before)
    for _ in range(3):
        gain = blocks.draw(problem(points[0].t(), HiNMPattern(3, 0.5, n, m, None)), np.arange(2), tries)
        assert torch.allclose(worth(), before + torch.from_numpy(gain).float(), atol=1e-5)
        assert (gain >= 0).all()
        before = worth()
    held = torch.from_numpy(blocks.slots).flatten(1).sort(dim=1).values
    assert (held.diff(dim=1) > 0).all()
    if pruned:
        assert torch.equal(free, torch.ones_like(free).scatter(1, held, False))
    else:
        assert torch.equal(held, slots.flatten(1).sort(dim=1).values)


@pytest.mark.parametrize("most", [8, 3])  # one assignment, or several
def test_of_draws_that_are_tried_at_once_the_best_of_each_block_counts(most, monkeypatch):
    points = torch.rand(2, 40, 3, generator=seeded()) ** 3
    slots = np.stack([torch.randperm(40, generator=seeded(block))[:32].view(8, 4).numpy() for block in range(2)])
    free = np.ones((2, 40), bool)
    free[np.arange(2)[:, None], slots.reshape(2, -1)] = False

    def deal(self, *shape):  # what is drawn for one block must not depend on how many are
        return np.stack([torch.randn(shape[1:], generator=seeded(len(skipped) + i)).numpy() for i in range(shape[0])])

    def draw(active, tries):
        blocks = Blocks(points, slots, 2, free.copy(), most, aged=True)
        return blocks, blocks.draw(problem(points[0].t(), HiNMPattern(3, 0.5, window=None)), active, tries)

    skipped = []
    monkeypatch.setattr(Problem, "noise", deal)
    together, gain = draw(np.arange(2), 3)
    for block in range(2):
        alone = []
        for i in range(3):
            skipped[:] = [0] * (3 * block + i)
            alone.append(draw(np.array([block]), 1))
        skipped.clear()
        gains = [float(each[0]) for _, each in alone]
        best = gains.index(max(gains))
        assert len(set(gains)) == 3
        assert gain[block] == pytest.approx(gains[best])
        assert np.array_equal(together.slots[block], alone[best][0].slots[block])
        assert np.array_equal(together.free[block], alone[best][0].free[block])


@given(st.integers(0, 4), st.integers(0, 99))
def test_no_column_is_chosen_twice_where_fewer_are_free_than_are_elected(count, seed):
    points = torch.rand(2, 40, 3, generator=seeded(seed)) ** 3
    order = torch.stack([torch.randperm(40, generator=seeded(seed + block)) for block in range(2)])
    slots, free = order[:, :32].unflatten(1, (8, 4)), torch.zeros(2, 40, dtype=torch.bool)
    free.scatter_(1, order[:, 32 : 32 + count], True)
    points.scatter_add_(1, order[:, 32:, None].expand(-1, -1, 3), torch.full((2, 8, 3), 2.0))  # all would be chosen
    open_to = free.scatter(1, slots.flatten(1), True)
    blocks = Blocks(points, slots.numpy(), 2, free.numpy(), 8, aged=True)
    for _ in range(6):
        blocks.draw(problem(points[0].t(), HiNMPattern(3, 0.5, window=None)), np.arange(2), 1)
        held = torch.from_numpy(blocks.slots).flatten(1)
        assert (held.sort(dim=1).values.diff(dim=1) > 0).all()
        assert open_to.gather(1, held).all()


@pytest.mark.parametrize("aged", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_mostly_the_vector_that_came_long_ago_is_drawn_but_by_the_paper_any(pruned, aged):
    points = torch.rand(1, 900, 3, generator=seeded())
    slots = torch.randperm(900, generator=seeded())[:800].view(1, 200, 4)
    free = torch.ones(1, 900, dtype=torch.bool).scatter(1, slots.flatten(1), False) if pruned else None
    blocks = Blocks(points, slots.numpy(), 2, None if free is None else free.numpy(), 200, aged=aged)
    blocks.draw(problem(points[0].t(), HiNMPattern(3, 0.0, window=None)), np.array([0]), 1)
    # The others in the order in which they came, and what came now behind them.
    left = torch.from_numpy(blocks.slots)[0, :, :3]
    same = torch.cat((slots[0, :, :3] == left, torch.zeros(200, 1, dtype=torch.bool)), dim=1)
    drawn = same.int().argmin(dim=1)  # the first place where they differ
    assert torch.equal(slots[0][torch.arange(4) != drawn.unsqueeze(1)].view(200, 3), left)
    counts = torch.bincount(drawn, minlength=4).tolist()
    if aged:
        assert counts[0] > 2 * counts[1] > 4 * counts[2] > 0
    else:
        assert min(counts) > 35


@pytest.mark.parametrize(
    ("groups", "aged", "least", "expected"),
    [
        (2, True, (4, 256), [1, 64, 64]),  # 128 may fail
        (64, True, (4, 256), [1, 2, 2]),  # 4
        (2, True, (4, 0), [1, 64]),  # 4
        (2, False, (4, 0), [1, 1, 1, 1]),  # the paper's loop tries none at once
        (130, True, (4, 256), [1, 1, 1, 1]),
        (130, True, (6, 256), [1, 1, 1, 1, 1, 1]),
    ],
)
def test_few_groups_may_fail_more_often_before_a_search_ends_and_are_tried_many_times_at_once(
    groups, aged, least, expected, monkeypatch
):
    points, slots = torch.rand(1, 4 * groups, 3), np.arange(4 * groups).reshape(1, groups, 4)
    tried = []
    monkeypatch.setattr(Blocks, "draw", lambda blocks, problem, active, tries: tried.append(tries) or np.zeros(1))
    blocks = Blocks(points, slots, 2, None, 512, aged=aged)
    blocks.assign(problem(points[0].t(), HiNMPattern(3, 0.0)), None, 1e-6, *least)
    assert tried == expected


def test_draws_are_tried_one_by_one_while_they_gain_much(monkeypatch):
    points, slots = torch.rand(2, 8, 3), np.arange(8).reshape(1, 2, 4).repeat(2, axis=0)
    blocks, tried = Blocks(points, slots, 2, None, 8, aged=True), []
    gains = iter([0.1, 0.0011, 0.0009, 0.1, 0.0])  # of what both blocks retain
    monkeypatch.setattr(
        Blocks,
        "draw",
        lambda blocks, *options: tried.append(options[2]) or blocks.worth.sum() * np.array([next(gains), 0]),
    )
    blocks.assign(problem(points[0].t(), HiNMPattern(3, 0.0)), 5, 1e-6, 4, 512)
    assert tried == [1, 1, 1, 32, 32]


@pytest.mark.parametrize(("vector_sparsity", "inside"), [(0.0, False), (0.5, False), (0.5, True)])
def test_columns_are_elected_only_where_some_may_be_chosen_that_are_not(vector_sparsity, inside, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        "lightning_hinm.gyro.problem.joined_values",
        lambda rest, columns, *more: (
            shapes.append((rest[0].shape[1], columns.shape[1])) or joined_values(rest, columns, *more)
        ),
    )
    monkeypatch.setattr("lightning_hinm.gyro.SMALL", 0)  # the paper's loop elects none
    saliency, pattern, order = structured(32, 48), HiNMPattern(32, vector_sparsity), torch.arange(32)
    layout = HiNMLayout(pattern, order, choose_vectors(saliency, pattern, order))
    within = hinm_mask(saliency, layout) if inside else None  # a mask that keeps no column more
    search(saliency, pattern, output_order=order, within=within)
    assert {columns > groups for groups, columns in shapes} == {vector_sparsity > 0 and not inside}


@pytest.mark.parametrize(
    ("pattern", "fixed", "expected"),
    [
        (HiNMPattern(4, 0.5), False, (6, LAST)),
        (HiNMPattern(4, 0.0), False, (6, THOROUGH)),  # all columns are kept
        (HiNMPattern(4, 0.05), False, (6, THOROUGH)),  # here too, of so few
        (HiNMPattern(16, 0.5), False, (0, THOROUGH)),  # one tile
        (HiNMPattern(4, 0.5), True, (0, LAST)),
    ],
)
def test_vectors_are_searched_longest_where_rows_are_free_and_choose_nothing_but_groups(
    pattern, fixed, expected, monkeypatch
):
    calls, annealed = [], []

    def assign_all(problems, order, indices, **options):
        calls.append(options)
        return indices

    monkeypatch.setattr(
        "lightning_hinm.gyro.exchange._anneal_rows", lambda problems: annealed.append(1) or _anneal_rows(problems)
    )
    monkeypatch.setattr("lightning_hinm.gyro.exchange._assign_all", assign_all)
    search(structured(16, 16), pattern, output_order=torch.arange(16) if fixed else None)
    turns = [options for options in calls if "draws" in options]
    assert (len(turns), calls[-1]) == expected
    assert bool(annealed) == bool(turns)


@pytest.mark.parametrize("pattern", [HiNMPattern(16, 0.0), HiNMPattern(96, 0.0), HiNMPattern(96, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_where_rows_choose_nothing_but_groups_exchange_is_no_worse_than_gyro(pattern, seed):
    saliency = torch.rand(96, 256, generator=seeded(seed)) ** 3
    assert saliency.numel() > SMALL  # else the paper's loop is run too
    found = [search(saliency, pattern, method=method).retained for method in ("exchange", "gyro")]
    assert found[0] >= found[1]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 999))
def test_every_tile_takes_as_many_rows_as_it_has_places(tiles, v, seed):
    size = np.full(tiles, v)
    size[seed % tiles] = 1 + seed % v  # the short one
    values = torch.rand(3, int(size.sum()), tiles, generator=seeded(seed)).numpy()
    values[:, :, 0] += 10 * (seed % 2)  # all rows want the same tile
    price = torch.rand(3, tiles, generator=seeded(seed)).numpy()
    alone = [price[i : i + 1].copy() for i in range(3)]
    tile = _balance(values, size, price, 0.2)
    for i in range(3):
        assert np.array_equal(np.bincount(tile[i], minlength=tiles), size)
        # Problems that are solved together are none the wiser.
        assert np.array_equal(_balance(values[i : i + 1], size, alone[i], 0.2), tile[i : i + 1])
        assert np.array_equal(alone[i][0], price[i])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_two_tiles_take_the_rows_that_are_worth_most_in_them(first, second, seed):
    values = torch.rand(2, first + second, 2, generator=seeded(seed)).numpy()
    tile = _balance(values, np.array([first, second]), np.zeros((2, 2), np.float32), 0.2)
    owner = np.repeat([0, 1], [first, second])
    for of_problem, found in zip(values, tile, strict=True):
        best = of_problem[:, owner][np.arange(first + second), assign([of_problem[:, owner]])[0]].sum()
        assert of_problem[np.arange(first + second), found].sum() == pytest.approx(best, rel=1e-6)


def test_a_crowded_tile_keeps_the_rows_that_want_it_most_and_grows_dearer():
    values = np.array([[[5, 0, 0], [9, 0, 3], [4, 0, 3], [1, 0, 0], [0, 8, 0], [0, 0, 2]]], np.float32)
    price = np.zeros((1, 3), np.float32)
    tile = _balance(values, np.array([2, 2, 2]), price, 1.0)
    # Four rows want the first: of those that must go, the one that likes the third goes there.
    assert tile.tolist() == [[0, 0, 2, 1, 1, 2]]
    assert price.tolist() == [[1, -0.5, -0.5]]
    many = _balance(values[:, :1].repeat(30, axis=1), np.array([10, 10, 10]), price, 1.0)
    assert np.bincount(many[0]).tolist() == [10, 10, 10]
    assert price[0, 0] == 2.0  # never by more than the rate


def test_rows_that_go_elsewhere_are_assigned_in_parts_no_larger_than_one_problem_takes(monkeypatch):
    values = torch.rand(2, 60, 4, generator=seeded()).numpy()
    values[:, :, 0] += 1
    sizes = []
    monkeypatch.setattr("lightning_hinm.gyro.exchange.ROWS", 7)
    monkeypatch.setattr(
        "lightning_hinm.gyro.exchange.assign",
        lambda parts: sizes.extend(part.shape for part in parts) or assign(parts),
    )
    tile = _balance(values, np.full(4, 15), np.zeros((2, 4), np.float32), 0.2)
    assert [np.bincount(of_problem).tolist() for of_problem in tile] == [[15, 15, 15, 15]] * 2
    assert sizes == ([(7, 7)] * 6 + [(3, 3)]) * 2


@pytest.mark.parametrize("products", [1 << 22, 0])  # of small matrices, and of none
def test_the_sums_of_tiles_are_those_of_their_rows_here_and_elsewhere(products, monkeypatch):
    monkeypatch.setattr("lightning_hinm.gyro.exchange.PRODUCTS", products)
    saliency, own = torch.rand(9, 5, generator=seeded()), np.array([[2, 0, 0, 2, 3, 2, 0, 3, 3], [1, 0] * 4 + [2]])
    expected = torch.stack([saliency[tiles == tile].sum(dim=0) for tiles in own for tile in range(4)])  # some without
    torch.testing.assert_close(_sums(saliency, own, 4), expected)
    with Elsewhere():
        torch.testing.assert_close(_sums(elsewhere(saliency), own, 4).cpu(), expected)


# Where a pattern keeps all columns, the stand-in keeps as many as n:m would, if it took them whole.
@pytest.mark.parametrize(
    ("pattern", "keeps"),
    [
        (HiNMPattern(2, 0.5, window=8), [4, 4, 4, 4, 4, 4]),  # of the last run, of two columns, both
        (HiNMPattern(2, 0.75, 1, 2), [10]),
        (HiNMPattern(2, 0.0), [21]),
        (HiNMPattern(2, 0.0, 1, 4, window=8), [2, 2, 2, 2, 2, 1]),
    ],
)
def test_a_tile_keeps_the_columns_with_the_largest_sums_of_each_run_here_and_elsewhere(pattern, keeps):
    sums = torch.rand(3, 42, generator=seeded())
    runs = _pruned_runs(pattern, 42)
    expected = torch.zeros_like(sums)
    for (first, last), count in zip(pattern.runs(42), keeps, strict=True):
        best = sums[:, first:last].argsort(dim=1, descending=True)[:, :count]
        expected.scatter_(1, best + first, 1.0)
    assert torch.equal(_kept(sums, runs), expected)
    with Elsewhere():
        assert torch.equal(_kept(elsewhere(sums), runs).cpu(), expected)


@pytest.mark.parametrize(
    ("pattern", "count"), [(HiNMPattern(16, 0.0), 24), (HiNMPattern(16, 0.0, 1, 4), 12), (HiNMPattern(16, 0.5), 24)]
)
def test_rows_that_like_the_same_columns_are_annealed_into_one_tile(pattern, count):
    kinds = torch.arange(64) % 4
    likes = torch.stack([torch.randperm(48, generator=seeded(kind)) < count for kind in range(4)]).float()
    saliency = likes[kinds] + 0.5 * torch.rand(64, 48, generator=seeded())
    order = _anneal_rows([problem(saliency, pattern)])
    assert [len(tile.unique()) for tile in kinds[order].split(16)] == [1] * 4


def test_large_kinds_of_rows_come_together_as_suits_them_best():
    # Four kinds of 16 rows; the first two like almost the same columns, and so do the last two.
    likes = torch.zeros(4, 64)
    for kind, columns in enumerate([range(0, 32), range(4, 36), range(36, 64), range(32, 60)]):
        likes[kind, list(columns)] = 1.0
    kinds = torch.arange(64) % 4
    pattern, hits = HiNMPattern(32, 0.5), 0
    for seed in range(6):
        saliency = likes[kinds] + 0.2 * torch.rand(64, 64, generator=seeded(seed))
        order = search(saliency, pattern, generator=seeded(seed)).layout.output_order
        hits += kinds[order[:32]].unique().tolist() in ([0, 1], [2, 3])
    assert hits == 6


# A round costs 2048: there is work for two at a time, for any number of them, and not even for one.
@pytest.mark.parametrize(("side_by_side", "starts", "kept"), [(3 * 2048 - 1, 10, 2), (1 << 20, 16, 4), (0, 5, 1)])
def test_the_best_of_several_short_annealings_are_annealed_further(side_by_side, starts, kept, monkeypatch):
    work, started = problem(torch.rand(16, 16, generator=seeded()), HiNMPattern(2)), []
    monkeypatch.setattr("lightning_hinm.gyro.exchange.SIDE_BY_SIDE", side_by_side)

    def cool(rows, *options):
        started.append((options, rows.tile, rows.price))
        rows.price = rows.price + np.arange(len(rows.price))[:, None]

    monkeypatch.setattr("lightning_hinm.gyro.exchange._Rows.cool", cool)
    worths = iter([np.arange(starts) % 7 * 1.0, np.arange(kept)])  # the best of the short ones, then of the long ones
    monkeypatch.setattr("lightning_hinm.gyro.exchange._Rows.worth", lambda _: next(worths))
    order = _anneal_rows([work])
    (short, tiles, prices), (long, best, price) = started
    assert short == (20, 2.0, 0.5, 0.4)
    assert len({tile.tobytes() for tile in tiles}) == starts
    assert prices.shape == (starts, 8)
    assert not prices.any()
    assert long == (150, 0.5, 0.1, 1.0)
    first = sorted(range(starts), key=lambda i: (-(i % 7), i))[:kept]
    assert np.array_equal(best, tiles[first])
    assert price.tolist() == [[number] * 8 for number in first]
    assert torch.equal(order, torch.from_numpy(best[-1]).argsort(stable=True))


@pytest.mark.parametrize("most", [64, 4])
def test_a_move_is_made_inside_blocks_and_leaves_the_state_before_it_as_it_was(most, monkeypatch):
    shares = []
    monkeypatch.setattr("lightning_hinm.gyro.exchange.TILES", most)
    monkeypatch.setattr(
        "lightning_hinm.gyro.exchange._sums",
        lambda part, tile, count: (
            shares.extend(np.bincount(own, minlength=count).tolist() for own in tile) or _sums(part, tile, count)
        ),
    )
    rows = _Rows([problem(structured(32, 24), HiNMPattern(4))])
    rows.deal(2)
    tile, price = rows.tile, rows.price
    before = tile.copy()
    rows.move(0.0)
    assert shares == [[4] * min(most, 8)] * 2 * -(-8 // most)
    assert np.array_equal(tile, before)
    assert not price.any()
    assert rows.price.any()
    still = rows.tile
    rows.tile, rows.price = tile, price
    rows.problem.generator.manual_seed(1)
    rows.move(50.0)
    assert not any(np.array_equal(*tiles) for tiles in zip(rows.tile, still, strict=True))
    assert [np.bincount(of_one).tolist() for of_one in rows.tile] == [[4] * 8] * 2


def test_annealings_side_by_side_find_what_each_finds_alone():
    rows = _Rows([problem(structured(32, 24), HiNMPattern(4))])
    rows.deal(3)
    tile, price = rows.tile, rows.price
    rows.move(0.0)
    together = rows.tile, rows.price
    for i in range(3):
        rows.tile, rows.price = tile[i : i + 1], price[i : i + 1]
        rows.move(0.0)
        assert np.array_equal(rows.tile[0], together[0][i])
        assert (rows.price[0] == 0).tolist() == (together[1][i] == 0).tolist()  # by a rate that is a mean of all


@pytest.mark.parametrize(("most", "parts"), [(64, [2]), (7, [1, 1])])
def test_rows_are_worth_what_their_tiles_keep_of_the_stand_in(most, parts, monkeypatch):
    saliency, pattern, sizes = structured(32, 24), HiNMPattern(4, 0.75), []
    monkeypatch.setattr("lightning_hinm.gyro.exchange.TILES", most)
    monkeypatch.setattr(
        "lightning_hinm.gyro.exchange._sums",
        lambda part, tile, count: sizes.append(len(tile)) or _sums(part, tile, count),
    )
    rows = _Rows([problem(saliency, pattern)])
    rows.deal(2)
    likely = _likely(saliency, pattern)
    kept = pattern.kept(24)
    expected = [
        float(sum(likely[own == tile].sum(dim=0).topk(kept).values.sum() for tile in range(8))) for own in rows.tile
    ]
    assert rows.worth().tolist() == pytest.approx(expected)
    assert sizes == parts  # the sums of many tiles are made one annealing at a time


def test_no_round_is_begun_where_its_time_is_over_and_that_is_said(monkeypatch):
    work, moves = replace(problem(torch.rand(8, 16), HiNMPattern(2)), clock=Clock(1000.0)), []
    monkeypatch.setattr("lightning_hinm.gyro.exchange._Rows.move", lambda *_: moves.append(1))
    passing = itertools.count(SHARE * 0.41, 1e-6)
    monkeypatch.setattr(Clock, "used", property(lambda _: next(passing)))
    rows = _Rows([work])
    rows.deal(1)
    rows.cool(10, 2.0, 0.5, 0.4)
    assert not moves
    assert work.clock.ended


def test_a_matrix_with_few_rounds_is_annealed_once_from_hot_to_cold(monkeypatch):
    started = []
    monkeypatch.setattr("lightning_hinm.gyro.exchange.WORK", 0)
    monkeypatch.setattr("lightning_hinm.gyro.exchange._Rows.cool", lambda rows, *options: started.append(options))
    _anneal_rows([problem(torch.rand(8, 16, generator=seeded()), HiNMPattern(2))])
    assert started == [(24, 2.0, 0.1, 1.0)]


def test_noise_falls_from_first_to_last_and_ends_and_falls_faster_where_time_is_short():
    noises = []
    rows = SimpleNamespace(move=noises.append, problem=SimpleNamespace(clock=Clock(None)))
    _Rows.cool(rows, 10, 2.0, 0.5, 1.0)
    assert noises == pytest.approx([2.0 * 0.25 ** (i / 8) for i in range(1, 8)] + [0.0] * 3)
    noises.clear()

    class Short:  # nearly a quarter of the time for each round
        ended, rounds = False, 0

        @property
        def used(self) -> float:
            self.rounds += 1
            return SHARE * (0.1 + 0.3 * (self.rounds - 1) / 4.000001)

    clock = rows.problem.clock = Short()
    _Rows.cool(rows, 10, 2.0, 0.5, 0.4)
    assert noises == pytest.approx([2.0 * 0.25 ** (done / 0.8) for done in (0.25, 0.5, 0.75)] + [0.0], rel=1e-4)
    assert clock.ended


def test_what_likely_survives_is_the_saliency_itself_where_nothing_is_pruned_within_groups_or_all_in_place_of_them():
    saliency = torch.rand(5, 12, generator=seeded())
    assert torch.equal(_likely(saliency, HiNMPattern(4, 0.5, 4, 4)), saliency)
    assert torch.equal(_likely(saliency, HiNMPattern(4, 0.0)), saliency)
    likely = _likely(saliency, HiNMPattern(4, 0.5))
    assert torch.equal(likely.argsort(dim=1), saliency.argsort(dim=1))
    smaller = 1 - torch.exp(-saliency / saliency.mean(dim=1, keepdim=True))
    assert torch.allclose(likely, saliency * smaller**3)
    assert not _likely(torch.zeros(2, 12), HiNMPattern(4, 0.5)).any()
    equal = torch.full((2, 12), 0.5)  # weights that are alike have one chance
    assert torch.equal(_likely(equal, HiNMPattern(4, 0.5)).unique(), _likely(equal, HiNMPattern(4, 0.5))[0, :1])


def problem(saliency: torch.Tensor, pattern: HiNMPattern) -> Problem:
    return Problem(saliency, pattern, seeded(), Clock(None), None, None)


def test_the_value_of_a_row_in_a_tile_is_what_the_mask_retains():
    saliency, pattern = torch.rand(8, 13, generator=seeded()), HiNMPattern(4, 0.0, window=None)
    order = torch.randperm(8, generator=seeded(1))
    layout = HiNMLayout(pattern, order, choose_vectors(saliency, pattern, order))
    rows = row_values(problem(saliency, pattern), order, layout.vector_index)
    own = rows.gather(1, (torch.arange(8) // 4).unsqueeze(1)).sum().item()
    assert own == pytest.approx(value(saliency, layout) * saliency.sum().item())


# --- the defects of the public reference ------------------------------------------------------------------------------


def test_the_mask_of_a_permuted_layout_is_in_the_weights_own_order():
    # The reference applied the vector permutation twice and retained 0.454 where no permutation at all had 0.603.
    saliency, pattern = structured(32, 32), HiNMPattern(8, 0.5)
    layout = gyro_permute(saliency, pattern, method="gyro")
    packed = (
        saliency[layout.output_order]
        .unflatten(0, (-1, 8))
        .gather(2, layout.vector_index.unsqueeze(1).expand(-1, 8, -1))
    )
    kept = packed.unflatten(2, (-1, 4)).topk(2, dim=3).values.sum()
    assert value(saliency, layout) == pytest.approx((kept / saliency.sum()).item(), rel=1e-6)


@pytest.mark.parametrize("vector_sparsity", [0.25, 0.5, 0.75])
def test_the_cost_of_rows_counts_all_pruned_columns_at_any_vector_sparsity(vector_sparsity):
    saliency = torch.rand(4, 32, generator=seeded())
    pattern = HiNMPattern(4, vector_sparsity, n=4, m=4, window=None)
    layout = gyro_permute(saliency, pattern, method="identity")
    kept = _vector_values(problem(saliency, pattern), saliency.sum(dim=0, keepdim=True))
    assert kept.item() == pytest.approx(value(saliency, layout) * saliency.sum().item(), rel=1e-5)


def test_a_retry_draws_other_rows_than_the_draw_before():
    saliency, pattern = structured(32, 32), HiNMPattern(8, 0.5, window=None)
    work = problem(saliency, pattern)
    assert not np.array_equal(work.noise(4, 8).argsort(axis=1), work.noise(4, 8).argsort(axis=1))


def test_a_failed_draw_does_not_end_the_search():
    saliency, pattern = structured(64, 48), HiNMPattern(8, 0.5, window=None)
    order = torch.arange(64)
    index = choose_vectors(saliency, pattern, order)
    found = []
    for retries in (1, 16):
        moved = assign_vectors(problem(saliency, pattern), order, index, pruned=False, retries=retries)
        found.append(value(saliency, HiNMLayout(pattern, order, moved)))
    assert found[1] > found[0]


def test_clusters_are_equal_in_size_and_hold_every_sample_once():
    points = torch.rand(24, 5, generator=seeded())
    clusters = _balanced_clusters(problem(points, HiNMPattern(4)), points, 6)
    assert clusters.shape == (6, 4)
    assert clusters.flatten().sort().values.tolist() == list(range(24))


def test_clusters_bring_like_rows_together():
    points = torch.eye(3).repeat(4, 1)  # four rows of each of three kinds
    clusters = _balanced_clusters(problem(points, HiNMPattern(4)), points, 3, steps=20)
    assert torch.cdist(points[clusters], points[clusters].mean(dim=1, keepdim=True)).sum() < 12 * (2 / 3) ** 0.5


# --- budgets, groups, devices, bad input ------------------------------------------------------------------------------


def test_a_budget_of_zero_gives_identity_and_says_so():
    saliency = structured(32, 24)
    result = search(saliency, HiNMPattern(4), time_budget=0)
    same = gyro_permute(saliency, HiNMPattern(4), method="identity")
    assert result.ended_by_budget
    assert torch.equal(result.layout.output_order, same.output_order)
    assert torch.equal(result.layout.vector_index, same.vector_index)


def test_a_budget_ends_a_long_search_with_the_best_so_far():
    saliency, pattern = structured(512, 512), HiNMPattern(32, 0.5)
    result = search(saliency, pattern, time_budget=0.3)
    assert result.ended_by_budget
    assert result.seconds < 5
    assert result.retained >= value(saliency, gyro_permute(saliency, pattern, method="identity"))


@pytest.mark.parametrize("method", ["gyro", "exchange"])
def test_a_budget_holds_what_it_takes_to_weigh_the_layouts(method, monkeypatch):
    def slow(*arguments):
        time.sleep(0.3)
        return hinm_mask(*arguments)

    monkeypatch.setattr("lightning_hinm.gyro.hinm_mask", slow)
    monkeypatch.setattr("lightning_hinm.gyro.exchange.TURNS", 10**9)  # endless, were it not for the budget
    monkeypatch.setattr("lightning_hinm.gyro.paper.RETRIES", 10**9)
    start = time.monotonic()
    result = search(structured(256, 256), HiNMPattern(16), method=method, time_budget=1.0)
    assert result.ended_by_budget
    assert time.monotonic() - start < 1.2


def test_the_annealing_leaves_half_of_a_budget_to_the_vectors(monkeypatch):
    saliency, pattern = structured(256, 256), HiNMPattern(32, 0.5)
    monkeypatch.setattr("lightning_hinm.gyro.exchange.ROUNDS", 10**9)  # endless, were it not for the budget
    result = search(saliency, pattern, time_budget=1.0)
    unhurried = search(saliency, pattern, method="gyro")
    assert result.retained > unhurried.retained


def test_the_number_of_threads_does_not_change_the_result(monkeypatch):
    # A few rounds on more numbers than one thread is given: waiting for each other costs more than all the rest.
    monkeypatch.setattr("lightning_hinm.gyro.exchange.ROUNDS", 2)
    monkeypatch.setattr("lightning_hinm.gyro.exchange.FEWEST", 2)
    saliency, pattern = structured(192, 256), HiNMPattern(32, 0.5)
    threads, layouts = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            layouts.append(gyro_permute(saliency, pattern))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(layouts[0].output_order, layouts[1].output_order)
    assert torch.equal(layouts[0].vector_index, layouts[1].vector_index)


def test_larger_matrices_deal_their_tiles_and_groups_out_to_several_problems(monkeypatch):
    saliency, pattern = structured(128, 160), HiNMPattern(8, 0.5)
    monkeypatch.setattr("lightning_hinm.gyro.exchange.TILES", 5)
    monkeypatch.setattr("lightning_hinm.gyro.exchange.ROWS", 24)
    monkeypatch.setattr("lightning_hinm.gyro.problem.GROUPS", 7)
    monkeypatch.setattr("lightning_hinm.gyro.problem.BATCH", 1 << 12)
    layout = gyro_permute(saliency, pattern)
    check_layout(layout, 128, 160)
    assert value(saliency, layout) > value(saliency, gyro_permute(saliency, pattern, method="gyro"))


@pytest.mark.parametrize("budget", [None, 0.05])
def test_small_matrices_are_searched_by_exchange_first_and_by_the_papers_loop_if_time_is_left(budget, monkeypatch):
    called = []

    def exchange(problems, order, indices):
        called.append("exchange")
        while budget is not None and not problems[0].clock.expired():
            pass
        return order, indices

    monkeypatch.setattr("lightning_hinm.gyro.gyro_exchange", exchange)
    monkeypatch.setattr("lightning_hinm.gyro.gyro_paper", lambda _, *found: called.append("gyro") or found)
    result = search(structured(16, 16), HiNMPattern(4), time_budget=budget)
    assert called == (["exchange", "gyro"] if budget is None else ["exchange"])
    assert result.ended_by_budget == (budget is not None)


def test_without_a_budget_nothing_is_ended():
    assert not search(structured(32, 24), HiNMPattern(4)).ended_by_budget


def test_the_groups_of_a_convolution_are_searched_one_by_one():
    saliency, pattern = structured(32, 24), HiNMPattern(4)
    layout = search(saliency, pattern, groups=4).layout
    check_layout(layout, 32, 24, groups=4)
    alone = value(saliency[:8], gyro_permute(saliency[:8], pattern))
    together = hinm_mask(saliency, layout)[:8]
    assert retained(saliency[:8], together) == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("method", ["gyro", "exchange"])
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (70, 5), (9, 4), (64, 130)])
def test_odd_shapes_are_padded_not_refused(method, shape):
    saliency = torch.rand(shape, generator=seeded())
    check_layout(gyro_permute(saliency, HiNMPattern(8, 0.5, window=16), method=method), *shape)


def test_an_all_zero_saliency_gives_identity_and_retains_all():
    result = search(torch.zeros(16, 16), HiNMPattern(4))
    assert result.retained == 1.0
    assert result.layout.output_order.tolist() == list(range(16))


def test_groups_are_ascending_so_that_metadata_follows_the_columns():
    index = gyro_permute(structured(32, 24), HiNMPattern(4)).vector_index.unflatten(1, (-1, 4))
    assert (index.diff(dim=2) > 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_saliency_does_not_matter(scale):
    saliency = structured(32, 24).double()
    one, two = gyro_permute(saliency, HiNMPattern(4)), gyro_permute(saliency * scale, HiNMPattern(4))
    assert value(saliency, two) == pytest.approx(value(saliency, one), abs=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_saliency_that_is_not_finite_and_non_negative_is_refused(bad):
    saliency = torch.rand(8, 8)
    saliency[2, 3] = bad
    with pytest.raises(ValueError, match="1 of 64 values are negative, NaN or infinite"):
        gyro_permute(saliency, HiNMPattern(4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": 0}, "the 32 rows do not fill whole tiles of vector_size=8 in each of groups=0"),
        ({"groups": 3}, "in each of groups=3"),
        ({"groups": 8}, "in each of groups=8.*a vector_size that divides the rows of each group"),
        ({"output_order": torch.arange(5)}, "output_order has 5 entries, but the weight has 32 rows"),
        ({"output_order": torch.arange(32) // 2}, r"output_order is not a permutation of 0\.\.31"),
        ({"output_order": torch.arange(32.0)}, r"output_order is torch.float32 \[32\], not int64 \[O\]"),
        ({"output_order": torch.arange(32).flip(0), "groups": 2}, "moves rows between the 2 groups"),
        ({"within": torch.ones(32, 24, dtype=torch.bool)}, "within is the mask in force with an output_order"),
        ({"within": torch.ones(32, 24), "output_order": torch.arange(32)}, r"within .*bool \[32, 24\]"),
        ({"within": torch.ones(3, 3, dtype=torch.bool), "output_order": torch.arange(32)}, r"within .*bool \[32, 24\]"),
    ],
)
def test_groups_an_order_or_a_mask_of_another_layer_are_refused_before_anything_is_searched(wrong, message, no_search):
    no_search()
    with pytest.raises(ValueError, match=message):
        search(structured(32, 24), HiNMPattern(8), **wrong)


@pytest.mark.parametrize(
    ("saliency", "pattern"),
    [
        (structured(32, 24), HiNMPattern(8, 0.0, 4, 4)),  # keeps all, as an early update of a schedule may
        (torch.eye(32), HiNMPattern(8, 0.0)),  # identity keeps all that there is
        (torch.ones(32, 24), HiNMPattern(8)),  # no layout is better than another
        (torch.zeros(32, 24), HiNMPattern(8)),
    ],
    ids=["dense", "sparse", "constant", "zeros"],
)
@pytest.mark.parametrize("method", ["gyro", "exchange"])
def test_nothing_is_searched_where_no_layout_is_better_than_identity(saliency, pattern, method, monkeypatch):
    for name in ("gyro_paper", "gyro_exchange"):
        monkeypatch.setattr(f"lightning_hinm.gyro.{name}", None)
    result = search(saliency, pattern, method=method)
    assert result.layout.output_order.tolist() == list(range(32))
    assert not result.ended_by_budget


def test_an_unknown_method_or_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match=r"method='greedy': .*'identity', 'gyro', 'exchange'"):
        gyro_permute(torch.rand(8, 8), HiNMPattern(4), method="greedy")
    with pytest.raises(ValueError, match="time_budget=-1"):
        gyro_permute(torch.rand(8, 8), HiNMPattern(4), time_budget=-1)


@pytest.mark.parametrize("method", ["identity", "gyro", "exchange"])
@pytest.mark.parametrize(
    ("shape", "pattern", "groups"),
    [
        ((28, 34), HiNMPattern(8, window=8), 1),  # 5 runs
        ((32, 20), HiNMPattern(8, 0.5, 1, 4), 2),
        ((32, 20), HiNMPattern(8, 0.5, 4, 4), 1),
    ],
)
def test_a_search_elsewhere_finds_the_same_and_sends_nothing_back_but_assignments(
    method, shape, pattern, groups, monkeypatch
):
    monkeypatch.setattr("lightning_hinm.gyro.SMALL", 0)
    less = {"exchange.ROUNDS": 5, "exchange.FEWEST": 2, "exchange.QUICK_ROUNDS": 1, "exchange.STARTS": 2}
    for name, count in {**less, "problem.RETRIES": 1, "paper.RETRIES": 1}.items():
        monkeypatch.setattr(f"lightning_hinm.gyro.{name}", count)  # all is done, but less often
    made, init = [0], Blocks.__init__

    def counting(blocks, *arguments, **options):
        made[0] += 1
        init(blocks, *arguments, **options)

    monkeypatch.setattr(Blocks, "__init__", counting)
    saliency = structured(*shape)
    here = search(saliency, pattern, method=method, groups=groups, generator=seeded())
    with Elsewhere() as device:
        away = search(elsewhere(saliency), pattern, method=method, groups=groups, generator=seeded())
    assert torch.equal(away.layout.output_order, here.layout.output_order)
    assert torch.equal(away.layout.vector_index, here.layout.vector_index)
    assert (away.retained, away.gap_closed) == (here.retained, here.gap_closed)
    rows, tiles = shape[0] // groups, -(-shape[0] // groups // pattern.vector_size)
    left, kept = Counter(device.left), pattern.kept(shape[1])
    layouts = {(), (shape[0],), (tiles * groups, kept), (rows,), (tiles, kept)}
    in_tiles = {(rows, tiles), (1, rows, tiles), (2, rows, tiles), (2,)}  # each row, and all in two annealings
    in_groups, sums = set(), set()
    for _, columns, count in pattern.equal_runs(shape[1]):
        held = min(pattern.kept_of_run(columns), columns)
        size = held // pattern.m
        elected = min(max(-(-size // 4), min(size, 16)), columns) if method == "exchange" and held < columns else 0
        blocks = range(1, tiles * count + 1)
        tries = {1} | {max(TRIED // (active * size), 1) for active in blocks if size and method == "exchange"}
        in_groups |= {(active * some, size, size + elected) for active in blocks for some in tries}
        sums |= {size for some in blocks for size in ((some, columns), (some,))}
    clusters = set()
    if method == "gyro":  # what clusters of rows are worth in full tiles, and how near they are
        full = rows // pattern.vector_size
        clusters = {(count * full, full) for count in (1, 2, 4, 8)}
    assert set(left) <= layouts | in_tiles | in_groups | sums | clusters
    # Sums leave once for all draws of a turn, not for each; so do layouts.
    assert sum(left[size] for size in sums - in_tiles) <= made[0] * 2
    assert sum(left[size] for size in layouts - {()} - sums) <= groups * (4 * TURNS + 8)
    assert (method == "identity") == (set(left) <= layouts)
    assert (method == "exchange") == ((2, rows, tiles) in left)


def test_a_mask_elsewhere_is_the_same_and_stays_there():
    saliency, pattern = structured(68, 50), HiNMPattern(16, 0.5, window=8)
    layout = gyro_permute(saliency, pattern)
    with Elsewhere() as device:
        mask = hinm_mask(elsewhere(saliency), layout)
        assert set(device.left) <= {()}
        assert retained(elsewhere(saliency), mask) == value(saliency, layout)
        assert torch.equal(mask.cpu(), hinm_mask(saliency, layout))
        with pytest.raises(RuntimeError, match="tensors of two devices"):
            mask & hinm_mask(saliency, layout)
    assert device.left[-1] == (68, 50)


@pytest.mark.gpu
def test_a_search_on_cuda_stays_there_and_is_never_worse_than_identity():
    saliency = structured(64, 48).cuda()
    layout = gyro_permute(saliency, HiNMPattern(16))
    assert layout.output_order.device.type == "cpu"
    assert value(saliency, layout) >= value(saliency, gyro_permute(saliency, HiNMPattern(16), method="identity"))


def test_inverse_of_the_output_order_restores_the_rows():
    saliency = structured(32, 24)
    order = gyro_permute(saliency, HiNMPattern(4)).output_order
    assert torch.equal(saliency[order][inverse(order)], saliency)


def test_a_search_that_a_budget_shortened_says_so(monkeypatch):
    saliency, pattern = structured(256, 256), HiNMPattern(32, 0.5)
    monkeypatch.setattr("lightning_hinm.gyro.exchange.ROUNDS", 10**9)
    monkeypatch.setattr("lightning_hinm.gyro.exchange.WORK", 10**18)
    assert search(saliency, pattern, time_budget=3.0).ended_by_budget  # fewer rounds, though time was left


def test_narrow_types_keep_their_small_values():
    saliency = torch.rand(64, 64, generator=seeded()) * 1e-3
    saliency[0, 0] = 60000.0
    saliency = saliency.half()
    narrow, wide = (search(one, HiNMPattern(16)).layout for one in (saliency, saliency.float()))
    assert torch.equal(narrow.output_order, wide.output_order)
    assert torch.equal(narrow.vector_index, wide.vector_index)


@pytest.mark.parametrize("method", ["identity", "gyro", "exchange"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_layout_may_serve_a_training_and_who_is_told_finds_the_mode_as_it_was(method, mode, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_HINM_LAYOUTS", str(tmp_path))
    monkeypatch.setattr("lightning_hinm.gyro.problem.SECONDS_BETWEEN_REPORTS", 0.0)

    def modes() -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with mode():
        for again in (False, True):  # searched, and read from disk
            told: list[tuple[bool, bool]] = []
            layout = search(
                structured(32, 24), HiNMPattern(4), method=method, progress=lambda _, told=told: told.append(modes())
            ).layout
            assert not layout.output_order.is_inference()
            assert not layout.vector_index.is_inference()
            assert set(told) == ({modes()} if method != "identity" and not again else set())


def test_a_weight_that_requires_a_gradient_is_searched_without_one():
    weight = torch.nn.Parameter(torch.rand(32, 24, generator=seeded()))
    assert search(weight.abs(), HiNMPattern(4)).retained > 0


@pytest.mark.parametrize("vector_sparsity", [0.0, 0.5])
def test_rows_without_a_preference_are_not_assigned_one_by_one(vector_sparsity, monkeypatch):
    # Rows that are alike are worth the same in every tile of the annealing.
    saliency, largest = torch.arange(64.0).repeat(512, 1), []

    def watched(values):
        largest.extend(matrix.shape[0] for matrix in values)
        return assign(values)

    monkeypatch.setattr("lightning_hinm.gyro.exchange.assign", watched)
    monkeypatch.setattr("lightning_hinm.gyro.exchange.ROWS", 32)
    check_layout(gyro_permute(saliency, HiNMPattern(8, vector_sparsity)), 512, 64)
    assert max(largest) <= 32


# --- the cache on disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_HINM_LAYOUTS", str(tmp_path / "layouts"))
    return tmp_path / "layouts"


@pytest.fixture
def no_search(monkeypatch):
    def refuse(*_):
        raise AssertionError("searched again")

    return lambda: monkeypatch.setattr("lightning_hinm.gyro._search_rows", refuse)


def test_the_same_question_is_answered_from_disk_and_leaves_the_generator_where_the_search_did(cache_folder, no_search):
    saliency, pattern = structured(32, 24), HiNMPattern(4)
    generators = [seeded(3), seeded(3)]
    first = search(saliency, pattern, generator=generators[0])
    (entry,) = cache_folder.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600
    assert cache_folder.stat().st_mode & 0o777 == 0o700
    no_search()
    second = search(saliency.clone(), pattern, generator=generators[1])
    assert torch.equal(first.layout.output_order, second.layout.output_order)
    assert torch.equal(first.layout.vector_index, second.layout.vector_index)
    assert first.retained == second.retained == second.layout.retained
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize(
    "change",
    [
        {"saliency": structured(32, 24, seed=1)},
        {"saliency": structured(32, 24).double()},
        {"pattern": HiNMPattern(4, 0.5, 1, 4)},
        {"pattern": HiNMPattern(4, window=8)},
        {"method": "gyro"},
        {"groups": 2},
        {"generator": 1},
        {"output_order": torch.arange(32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_question_is_searched(cache_folder, no_search, change):
    asked = {"saliency": structured(32, 24), "pattern": HiNMPattern(4), "generator": 0}

    def ask(question):
        return search(
            question.pop("saliency"), question.pop("pattern"), **question | {"generator": seeded(question["generator"])}
        )

    ask(dict(asked))
    no_search()
    with pytest.raises(AssertionError, match="searched again"):
        ask(asked | change)


def test_a_question_from_elsewhere_is_the_same_and_only_two_numbers_of_it_leave(cache_folder, no_search):
    saliency, pattern = structured(32, 24), HiNMPattern(4)
    first = search(saliency, pattern)
    no_search()
    with Elsewhere() as device:
        again = search(elsewhere(saliency), pattern)
    assert torch.equal(again.layout.vector_index, first.layout.vector_index)
    assert set(device.left) == {()}


@given(st.sampled_from([torch.float16, torch.float32, torch.float64, torch.bool]), st.integers(0, 999))
def test_a_fingerprint_tells_tensors_apart_by_every_bit_and_place_and_knows_no_strides(dtype, seed):
    numbers = structured(8, 5, seed)
    numbers = numbers > 0.5 if dtype == torch.bool else numbers.to(dtype)
    found = fingerprint(numbers)
    assert fingerprint(numbers.t().contiguous().t()) == found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_hinm.gyro.cache.NUMBERS", 3)
        assert fingerprint(numbers) == found
    other = numbers.clone()
    bits = other.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[other.element_size()])
    bits[seed % 8, seed % 5] ^= 1
    assert fingerprint(other) != found
    swapped = numbers.flatten().flip(0).view(numbers.shape)
    assert (fingerprint(swapped) == found) == torch.equal(swapped, numbers)
    assert fingerprint(numbers[:1]) != found


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other columns", "illegal"])
def test_a_damaged_entry_is_thrown_away_and_the_search_runs_again(cache_folder, damage, caplog):
    saliency, pattern = structured(32, 24), HiNMPattern(4)
    first = search(saliency, pattern)
    (entry,) = cache_folder.iterdir()
    data = bytearray(entry.read_bytes())
    if damage == "cut":
        del data[-40:]
    elif damage == "flipped":
        data[12] ^= 255
    elif damage == "emptied":
        data.clear()
    else:
        tensors = load(bytes(data))
        if damage == "illegal":
            tensors["vector_index"][0, 0] = 10**6
        else:  # legal, but not what it says that it retains
            tensors["vector_index"] = tensors["vector_index"].flip(0)
        data = save(tensors, {"retained": repr(first.retained), "gap_closed": "0.5"})
    entry.write_bytes(data)
    again = search(saliency, pattern)
    assert torch.equal(again.layout.vector_index, first.layout.vector_index)
    assert search(saliency, pattern).retained == first.retained
    assert entry.stat().st_size != len(data) or entry.read_bytes() != bytes(data)


def test_a_search_that_a_budget_ended_is_not_kept_and_identity_is_not_worth_it(cache_folder):
    search(structured(512, 512), HiNMPattern(32), time_budget=0.1)
    search(structured(32, 24), HiNMPattern(4), time_budget=0)
    search(structured(32, 24), HiNMPattern(4), method="identity")
    assert not cache_folder.exists()


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_HINM_LAYOUTS", str(tmp_path / "file" / "layouts"))
    assert search(structured(32, 24), HiNMPattern(4)).retained > 0
    assert "takes no layout" in caplog.text


def test_the_entries_that_were_not_used_for_longest_make_room(cache_folder, monkeypatch):
    for seed in range(4):
        search(structured(32, 24, seed), HiNMPattern(4))
        entries = sorted(cache_folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        if seed == 0:
            first, size = entries[0], entries[0].stat().st_size
            monkeypatch.setattr("lightning_hinm.gyro.cache.MOST_BYTES", 3 * size + 100)
        os.utime(entries[-1], ns=(seed * 10**9, seed * 10**9))
    assert len(list(cache_folder.iterdir())) == 3
    assert not first.exists()


def test_without_a_home_there_is_no_cache_and_the_search_runs(monkeypatch):
    monkeypatch.delenv("LIGHTNING_HINM_LAYOUTS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    assert search(structured(32, 24), HiNMPattern(4)).retained > 0


def test_an_entry_that_only_can_be_read_is_used(cache_folder, no_search, monkeypatch):
    first = search(structured(32, 24), HiNMPattern(4))

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr("os.utime", refuse)
    no_search()
    assert search(structured(32, 24), HiNMPattern(4)).gap_closed == first.gap_closed


def test_off_writes_nothing_and_the_default_is_below_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    search(structured(32, 24), HiNMPattern(4))  # off, as all tests are
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("LIGHTNING_HINM_LAYOUTS")
    search(structured(32, 24), HiNMPattern(4))
    assert len(list((tmp_path / "lightning-hinm" / "layouts").iterdir())) == 1


# --- one order for several matrices -----------------------------------------------------------------------------------


def alike(*columns: int, rows: int = 64, same: bool = True) -> list[torch.Tensor]:
    """Matrices of four kinds of rows; in all of them the same rows are of one kind, or in each others."""
    kinds = [torch.arange(rows).remainder(4)[torch.randperm(rows, generator=seeded(0 if same else i))]
             for i in range(len(columns))]  # fmt: skip
    draws = [seeded(100 + i) for i in range(len(columns))]
    return [
        (torch.rand(4, count, generator=draw) ** 4)[kind] + 0.1 * torch.rand(rows, count, generator=draw)
        for count, kind, draw in zip(columns, kinds, draws, strict=True)
    ]


@st.composite
def matrices_of_one_height(draw):
    """Two or three saliencies with as many rows, and a pattern for each, with tiles of one size."""
    first, pattern = draw(saliencies()), draw(patterns())
    more = draw(st.lists(st.tuples(saliencies(), patterns()), min_size=1, max_size=2))
    rows = torch.arange(len(first))
    return (
        [first, *(saliency[rows % len(saliency)] for saliency, _ in more)],
        [pattern, *(replace(other, vector_size=pattern.vector_size) for _, other in more)],
    )


@settings(max_examples=12)
@given(matrices_of_one_height(), st.sampled_from(["gyro", "exchange"]), st.integers(0, 99))
def test_a_shared_order_is_legal_everywhere_and_never_worse_than_identity_for_the_sum(case, method, seed):
    found = search_shared(*case, method=method, generator=seeded(seed))
    base = [search(saliency, pattern, method="identity").retained for saliency, pattern in zip(*case, strict=True)]
    for result, saliency, pattern in zip(found, *case, strict=True):
        check_layout(result.layout, *saliency.shape)
        assert result.layout.pattern == pattern
        assert torch.equal(result.layout.output_order, found[0].layout.output_order)
        assert result.retained == result.layout.retained == value(saliency, result.layout)
    assert sum(result.retained for result in found) >= sum(base) - 1e-12
    again = search_shared(*case, method=method, generator=seeded(seed))
    for one, two in zip(found, again, strict=True):
        assert torch.equal(one.layout.output_order, two.layout.output_order)
        assert torch.equal(one.layout.vector_index, two.layout.vector_index)


@settings(max_examples=30)
@given(patterns(), saliencies(), st.sampled_from(["identity", "gyro", "exchange"]))
def test_a_set_of_one_is_the_plain_search(pattern, saliency, method):
    generators = [seeded(3), seeded(3)]
    plain = search(saliency, pattern, method=method, generator=generators[0])
    (alone,) = search_shared([saliency], [pattern], method=method, generator=generators[1])
    assert torch.equal(plain.layout.output_order, alone.layout.output_order)
    assert torch.equal(plain.layout.vector_index, alone.layout.vector_index)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("rows", [64, 256], ids=["with the paper's loop", "annealed alone"])
@pytest.mark.parametrize("pattern", [HiNMPattern(16), HiNMPattern(8, 0.75, 1, 4, 16)], ids=str)
def test_matrices_of_one_structure_lose_next_to_nothing_by_sharing_their_order(rows, pattern):
    matrices = alike(48, 96, rows=rows)
    shared = search_shared(matrices, [pattern, pattern])
    for matrix, result in zip(matrices, shared, strict=True):
        identity, own = (search(matrix, pattern, method=method).retained for method in ("identity", "exchange"))
        assert result.retained > identity + 0.9 * (own - identity) > identity + 0.01


def test_matrices_of_different_structure_share_the_gain():
    matrices, pattern = alike(48, 96, same=False), HiNMPattern(16)
    shared = search_shared(matrices, [pattern, pattern])
    identity, own = (
        [search(matrix, pattern, method=method).retained for matrix in matrices] for method in ("identity", "exchange")
    )
    assert sum(identity) + 0.01 < sum(result.retained for result in shared) < sum(own)


@pytest.mark.parametrize("seed", range(4))
def test_a_shared_order_comes_within_two_percent_of_the_optimum_of_tiny_matrices(seed):
    cases = [
        (torch.rand(4, 8, generator=seeded(seed)) ** 3, HiNMPattern(2, 0.0, n=2, m=4)),
        (torch.rand(4, 6, generator=seeded(seed + 50)) ** 3, HiNMPattern(2, 1 / 3, n=1, m=2)),
    ]

    def best_of(tile: tuple[int, ...]) -> float:
        return sum(
            max(
                sum(saliency[list(tile)][:, list(group)].topk(pattern.n, dim=1).values.sum().item() for group in groups)
                for chosen in itertools.combinations(range(saliency.shape[1]), pattern.kept(saliency.shape[1]))
                for groups in groupings(chosen, pattern.m)
            )
            / saliency.sum().item()
            for saliency, pattern in cases
        )

    best = max(best_of(one) + best_of(two) for one, two in [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))])
    found = search_shared(*zip(*cases, strict=True))
    assert 0.98 * best <= sum(result.retained for result in found) <= best + 1e-6


def test_the_scale_of_one_of_several_matrices_does_not_matter():
    matrices, patterns = alike(48, 96, same=False), [HiNMPattern(16)] * 2
    one = search_shared(matrices, patterns)
    two = search_shared([matrices[0], matrices[1] * 2.0**20], patterns)
    assert torch.equal(one[0].layout.output_order, two[0].layout.output_order)


@pytest.mark.parametrize("batch", [1, 6000])
def test_blocks_that_are_searched_a_few_at_a_time_stay_in_their_runs(batch, monkeypatch):
    saliency, pattern = torch.rand(40, 164, generator=seeded()) ** 4, HiNMPattern(8, window=16)  # ten runs, and a bit
    base, whole = (search(saliency, pattern, method=method).retained for method in ("identity", "exchange"))
    monkeypatch.setattr("lightning_hinm.gyro.problem.BATCH", batch)
    found = search(saliency, pattern)
    check_layout(found.layout, *saliency.shape)
    assert found.retained == value(saliency, found.layout) > (base + 3 * whole) / 4


def test_a_matrix_of_zeros_counts_nothing():
    (matrix,), pattern = alike(48), HiNMPattern(16)
    found = search_shared([torch.zeros(64, 32), matrix, torch.ones(64, 8)], [pattern] * 3)
    assert found[1].retained == pytest.approx(search(matrix, pattern).retained, abs=0.002)
    assert [found[0].retained, found[2].retained] == [1.0, 0.25]


def test_one_order_needs_as_many_rows_and_tiles_of_one_size():
    matrices = [torch.rand(16, 8), torch.rand(16, 8)]
    with pytest.raises(ValueError, match=r"search_shared: .*vector_size=\[4, 8\]"):
        search_shared(matrices, [HiNMPattern(4), HiNMPattern(8)])
    with pytest.raises(ValueError, match=r"search_shared: got layers of \[8, 16\] rows"):
        search_shared([matrices[0], matrices[1][:8]], [HiNMPattern(4)] * 2)
    with pytest.raises(ValueError, match="search_shared: got layers of"):
        search_shared([], [])


def test_a_budget_is_shared_by_the_matrices_and_its_end_is_told_of_each(monkeypatch):
    matrices, patterns = alike(96, 64, rows=128), [HiNMPattern(16)] * 2
    for result, matrix in zip(search_shared(matrices, patterns, time_budget=0), matrices, strict=True):
        assert result.ended_by_budget
        assert result.retained == search(matrix, patterns[0], method="identity").retained
    monkeypatch.setattr("lightning_hinm.gyro.exchange.ROUNDS", 10**9)  # endless, were it not for the budget
    monkeypatch.setattr("lightning_hinm.gyro.exchange.WORK", 10**18)
    found = search_shared(matrices, patterns, time_budget=1.0)
    assert [result.ended_by_budget for result in found] == [True, True]
    assert found[0].seconds == pytest.approx(1.5 * found[1].seconds)
    assert 0.3 <= found[0].seconds + found[1].seconds < 5  # the share of the annealing, at least
    for result, matrix in zip(found, matrices, strict=True):
        assert result.retained > search(matrix, patterns[0], method="identity").retained + 0.01


def test_several_matrices_are_one_question_to_the_disk(cache_folder, no_search):
    matrices, patterns = alike(48, 96), [HiNMPattern(16), HiNMPattern(16, 0.75)]
    generators = [seeded(3), seeded(3)]
    first = search_shared(matrices, patterns, generator=generators[0])
    assert len(list(cache_folder.iterdir())) == 2
    no_search()
    second = search_shared(matrices, patterns, generator=generators[1])
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.layout.output_order, two.layout.output_order)
        assert torch.equal(one.layout.vector_index, two.layout.vector_index)
        assert (one.retained, one.gap_closed) == (two.retained, two.gap_closed)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    for other in ([matrices[1], matrices[0]], [matrices[0], matrices[1] * 2], matrices[:1]):
        with pytest.raises(AssertionError, match="searched again"):
            search_shared(other, patterns[: len(other)])


@pytest.mark.parametrize("damage", ["missing", "another order"])
def test_an_answer_from_disk_that_is_not_whole_is_searched_again(cache_folder, damage):
    matrices, patterns = alike(48, 96), [HiNMPattern(16)] * 2
    first = search_shared(matrices, patterns)
    path = sorted(cache_folder.iterdir())[1]
    if damage == "missing":
        path.unlink()
    else:  # two rows of one tile change places, which retains as much
        tensors = load(path.read_bytes())
        tensors["output_order"][:2] = tensors["output_order"][:2].flip(0)
        path.write_bytes(save(tensors, {"retained": repr(first[1].retained), "gap_closed": "0.5"}))
    again = search_shared(matrices, patterns)
    assert torch.equal(again[0].layout.output_order, again[1].layout.output_order)
    assert [result.gap_closed for result in again] == [result.gap_closed for result in first]


@pytest.mark.parametrize("method", ["gyro", "exchange"])
def test_a_long_search_for_several_matrices_reports_their_mean_and_does_not_change_by_it(method, monkeypatch):
    monkeypatch.setattr("lightning_hinm.gyro.problem.SECONDS_BETWEEN_REPORTS", 0.0)
    monkeypatch.setattr("lightning_hinm.gyro.problem.SEARCH_PER_REPORT", 0)
    matrices, patterns, told = alike(48, 96), [HiNMPattern(16)] * 2, []
    found = search_shared(matrices, patterns, method=method, progress=told.append)
    silent = search_shared(matrices, patterns, method=method)
    assert torch.equal(found[1].layout.vector_index, silent[1].layout.vector_index)
    assert len(told) > 4
    mean = sum(result.retained for result in found) / 2
    assert 0.9 * mean < told[-1].retained <= mean + 1e-12


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [9, 17, 24])
def test_the_gap_ends_where_an_unstructured_mask_keeps_as_many_and_begins_at_identity_whatever_was_given(columns):
    saliency, pattern = structured(16, columns), HiNMPattern(4, 0.0 if columns % 4 else 0.5)
    order = torch.randperm(16, generator=seeded())
    low, found = search(saliency, pattern, method="identity"), search(saliency, pattern, output_order=order)
    kept = int(hinm_mask(saliency, low.layout).sum())  # fewer where virtual columns complete a group
    high = (saliency.flatten().topk(kept).values.sum(dtype=torch.float64) / saliency.sum(dtype=torch.float64)).item()
    assert found.gap_closed == pytest.approx((found.retained - low.retained) / (high - low.retained))
    assert found.gap_closed > 0


@given(saliencies(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.data())
def test_the_sum_of_the_largest_is_that_of_a_sort(saliency, dtype, data):
    saliency = saliency.to(dtype).clamp(max=6e4) * (-1 if not saliency.any() else 1)  # -0, too
    k = data.draw(st.integers(1, saliency.numel()))
    exact = saliency.double().flatten().sort(descending=True).values[:k].sum().item()
    assert sum_of_largest(saliency, k) == pytest.approx(exact, rel=1e-14)


def test_the_gap_closed_is_nought_at_identity_and_one_at_the_unstructured_mask():
    saliency, pattern = structured(32, 24), HiNMPattern(4)
    assert search(saliency, pattern, method="identity").gap_closed == 0.0
    found = search(saliency, pattern)
    kept = round(saliency.numel() * (1 - pattern.sparsity))
    best = saliency.flatten().topk(kept).values.sum().item() / saliency.sum().item()
    low = search(saliency, pattern, method="identity").retained
    assert found.gap_closed == pytest.approx((found.retained - low) / (best - low), rel=1e-5)
    assert search(torch.ones(32, 24), pattern).gap_closed == 1.0


@pytest.mark.parametrize("method", ["gyro", "exchange"])
def test_a_long_search_reports_how_much_of_the_gap_it_has_closed_so_far(method, monkeypatch):
    monkeypatch.setattr("lightning_hinm.gyro.problem.SECONDS_BETWEEN_REPORTS", 0.0)
    monkeypatch.setattr("lightning_hinm.gyro.problem.SEARCH_PER_REPORT", 0)
    saliency, told = structured(64, 48), []
    result = search(saliency, HiNMPattern(16), method=method, groups=2, progress=told.append)
    assert len(told) > 4
    assert all(one.seconds <= two.seconds for one, two in itertools.pairwise(told))  # through both groups
    assert told[-1].gap_closed <= 1
    assert str(told[-1]) == f"gap closed {told[-1].gap_closed:.2f} after {told[-1].seconds:.0f} s of search"
    alone = search(saliency[32:], HiNMPattern(16), method=method, groups=1, generator=seeded())
    assert max(one.retained for one in told) <= 1
    assert result.gap_closed > 0 < alone.gap_closed


def test_a_report_does_not_change_the_result(monkeypatch):
    monkeypatch.setattr("lightning_hinm.gyro.problem.SECONDS_BETWEEN_REPORTS", 0.0)
    monkeypatch.setattr("lightning_hinm.gyro.problem.SEARCH_PER_REPORT", 0)
    saliency, pattern = structured(64, 48), HiNMPattern(16)
    silent, told = search(saliency, pattern), search(saliency, pattern, progress=lambda progress: None)
    assert torch.equal(silent.layout.vector_index, told.layout.vector_index)
