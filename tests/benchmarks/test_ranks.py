"""The benchmark of a search that is shared out over processes."""

import pytest
import torch

from benchmarks.ranks import search_by_ranks
from lightning_hinm import HiNMPattern


@pytest.mark.slow
def test_two_processes_find_what_one_finds() -> None:
    matrices = {str(i): torch.randn(32, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    one, two = (search_by_ranks(matrices, HiNMPattern(8), ranks) for ranks in (1, 2))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["masks_crc32"] == two["masks_crc32"] != 0
    assert min(one["seconds"], two["seconds"]) > 0
