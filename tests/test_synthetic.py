"""Random packed weights are legal ones."""

import pytest
import torch

from lightning_hinm import HiNMPattern, unpack
from lightning_hinm.format import check_packed, random_weight

PATTERNS = [
    HiNMPattern(8),
    HiNMPattern(5, 0.25, n=1, m=4),
    HiNMPattern(16, 0.75, n=4, m=8, window=8),
    HiNMPattern(7, 0.0, n=2, m=3, window=None),
    HiNMPattern(4, 0.75, n=4, m=4),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(32, 48), (37, 50), (16, 43), (12, 3, 3, 2)], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_a_random_weight_is_a_legal_one(pattern: HiNMPattern, shape: tuple[int, ...], permuted: bool) -> None:
    weight = random_weight(shape, pattern, torch.float32, torch.Generator().manual_seed(1), permuted=permuted)
    check_packed(weight)
    kept = weight.values.count_nonzero()
    assert unpack(weight).shape == shape
    assert unpack(weight).count_nonzero() == kept > 0


def test_its_rows_stay_in_their_group() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = random_weight((32, 8, 1, 1), HiNMPattern(8), torch.float16, generator, groups=2)
    check_packed(weight, groups=2)


def test_order_changes_nothing_but_the_order() -> None:
    one, other = (
        random_weight((32, 64), HiNMPattern(8), torch.float16, torch.Generator().manual_seed(3), permuted=permuted)
        for permuted in (False, True)
    )
    assert torch.equal(one.values, other.values)
    first, second = (weight.layout.vector_index for weight in (one, other))
    assert not torch.equal(first, second)
    assert torch.equal(first, second.sort(dim=1).values)


def test_rows_that_are_not_restored_lie_in_their_order() -> None:
    weight = random_weight((30, 64), HiNMPattern(8), torch.float16, torch.Generator(), restored=False)
    assert weight.layout.output_order.tolist() == list(range(30))
