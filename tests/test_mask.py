import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_hinm.layout import HiNMLayout, check_layout
from lightning_hinm.mask import choose_vectors, hinm_mask, keep_top, retained
from lightning_hinm.pattern import HiNMPattern
from tests.strategies import layouts, patterns, saliencies


def reference_mask(saliency: torch.Tensor, layout: HiNMLayout) -> torch.Tensor:
    """The definition, one row and one group at a time."""
    (rows, in_features), pattern = saliency.shape, layout.pattern
    mask = torch.zeros(rows, in_features, dtype=torch.bool)
    for position, row in enumerate(layout.output_order.tolist()):
        tile = layout.vector_index[position // pattern.vector_size].tolist()
        for first in range(0, len(tile), pattern.m):
            real = [column for column in tile[first : first + pattern.m] if column < in_features]
            real.sort(key=lambda column: (-saliency[row, column].item(), column))
            mask[row, real[: pattern.n]] = True
    return mask


@given(st.data(), saliencies())
def test_the_mask_is_the_definition_ties_to_the_lower_column(data, saliency):
    layout = data.draw(layouts(*saliency.shape))
    assert torch.equal(hinm_mask(saliency, layout), reference_mask(saliency, layout))


@given(st.data(), st.integers(1, 20), st.integers(1, 40))
def test_every_group_keeps_exactly_n_of_m_even_of_an_all_zero_saliency(data, rows, columns):
    layout = data.draw(layouts(rows, columns))
    mask, pattern = hinm_mask(torch.zeros(rows, columns), layout), layout.pattern
    wide = torch.nn.functional.pad(mask, (0, pattern.padded(columns) - columns))
    for tile, index in enumerate(layout.vector_index):
        rows_of_tile = layout.output_order[tile * pattern.vector_size : (tile + 1) * pattern.vector_size]
        kept = wide[rows_of_tile][:, index].unflatten(1, (-1, pattern.m)).sum(dim=2)
        real = (index < columns).unflatten(0, (-1, pattern.m)).sum(dim=1).clamp(max=pattern.n)
        assert torch.equal(kept, real.expand_as(kept))
        assert int(mask[rows_of_tile].sum()) == int(kept.sum())


def test_a_large_matrix_in_blocks_gives_the_same_mask(monkeypatch):
    saliency = torch.rand(40, 36, generator=torch.Generator().manual_seed(0))
    pattern = HiNMPattern(8, 0.5)
    layout = HiNMLayout(pattern, torch.randperm(40), choose_vectors(saliency, pattern, torch.arange(40)))
    whole = hinm_mask(saliency, layout)
    monkeypatch.setattr("lightning_hinm.mask.BLOCK", 1)
    assert torch.equal(hinm_mask(saliency, layout), whole)


@given(st.data(), saliencies())
def test_a_mask_within_a_vector_mask_is_a_subset_of_it(data, saliency):
    pattern = data.draw(patterns())
    rows, columns = saliency.shape
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    vectors = HiNMPattern(pattern.vector_size, pattern.vector_sparsity / 2, pattern.m, pattern.m, pattern.window)
    wide = hinm_mask(saliency, HiNMLayout(vectors, order, choose_vectors(saliency, vectors, order)))
    other = saliency.flip(0)
    layout = HiNMLayout(pattern, order, choose_vectors(other, pattern, order, within=wide))
    check_layout(layout, rows, columns)
    assert not (hinm_mask(other, layout, within=wide) & ~wide).any()


def test_ties_keep_exactly_n_and_the_largest():
    assert keep_top(torch.tensor([5.0, 5.0, 5.0, 0.1]), 2).tolist() == [True, True, False, False]


@given(st.data(), st.integers(1, 20), st.integers(0, 2))
def test_what_is_kept_is_what_a_stable_sort_keeps_however_few_there_are(data, size, dim):
    shape = [3, 4, 5]
    shape[dim] = size
    seed, k = data.draw(st.integers(0, 999)), data.draw(st.integers(0, size))
    values = torch.randint(-1, 4, shape, generator=torch.Generator().manual_seed(seed)).double() / 2
    best = values.sort(dim=dim, descending=True, stable=True).indices.narrow(dim, 0, k)
    assert torch.equal(keep_top(values, k, dim=dim), torch.zeros(shape, dtype=torch.bool).scatter(dim, best, True))
    assert torch.equal(keep_top(values, k, dim=dim - 3), keep_top(values, k, dim=dim))


@given(patterns(), saliencies())
def test_chosen_vectors_have_the_largest_sums_of_their_run_and_make_a_legal_layout(pattern, saliency):
    rows, columns = saliency.shape
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    index = choose_vectors(saliency, pattern, order)
    check_layout(HiNMLayout(pattern, order, index), rows, columns)
    for tile, chosen in enumerate(index):
        v = pattern.vector_size
        sums = saliency[order[tile * v : (tile + 1) * v]].sum(dim=0, dtype=torch.float64)
        for first, last in pattern.runs(columns):
            own = chosen[(chosen >= first) & (chosen < last)]
            rest = torch.tensor([column for column in range(first, last) if column not in own.tolist()])
            assert len(rest) == 0 or sums[own].min() >= sums[rest.long()].max()


@given(saliencies())
def test_retained_is_a_fraction_and_monotone(saliency):
    rows, columns = saliency.shape
    none, all_ = torch.zeros(rows, columns, dtype=torch.bool), torch.ones(rows, columns, dtype=torch.bool)
    some = saliency >= saliency.median()
    assert retained(saliency, all_) == 1.0
    assert retained(saliency, none) == (0.0 if saliency.any() else 1.0)
    assert 0.0 <= retained(saliency, some) <= 1.0
    assert retained(saliency.t(), (saliency > 0).t().contiguous()) <= 1.0  # summed in another order than its total


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([[1.0, -1.0]]), "1 of 2 values are negative"),
        (torch.tensor([[1.0, float("nan")]]), "1 of 2 values are negative, NaN"),
        (torch.tensor([[1.0, float("inf")]]), "1 of 2 values are negative, NaN or infinite"),
        (torch.tensor([[1, 2]]), r"torch.int64 \[1, 2\]"),
        (torch.rand(3), r"torch.float32 \[3\]"),
        (torch.rand(0, 4), "non-empty"),
        (torch.rand(1, 4).to(torch.float8_e5m2), "torch.float8_e5m2 .* of 16 bits or more"),
        (torch.rand(1, 4).to_sparse(), "torch.sparse_coo, but a saliency is a dense"),
        (torch.full((2, 2), 6e307, dtype=torch.float64), r"values up to 6e\+307 add up to more than float64 holds"),
    ],
)
def test_a_saliency_that_is_none_is_refused(bad, message):
    layout = HiNMLayout(HiNMPattern(1, 0.0), torch.arange(1), torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(ValueError, match=message):
        hinm_mask(bad, layout)


def test_a_layout_of_another_number_of_rows_is_refused():
    layout = HiNMLayout(HiNMPattern(1, 0.0), torch.arange(1), torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="saliency has 3 rows, but output_order has 1"):
        hinm_mask(torch.rand(3, 4), layout)


@pytest.mark.gpu
def test_cpu_and_cuda_choose_the_same_mask():
    saliency = (torch.rand(96, 80) * 8).floor()
    pattern = HiNMPattern(32, 0.5)
    layout = HiNMLayout(pattern, torch.randperm(96), choose_vectors(saliency, pattern, torch.arange(96)))
    assert torch.equal(hinm_mask(saliency.cuda(), layout).cpu(), hinm_mask(saliency, layout))
