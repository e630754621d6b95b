import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import get_context
from torchmetrics import Metric

from lightning_hinm.mask import keep_top, retained
from lightning_hinm.metrics import HiNMSparsity, RetainedSaliency

METRICS = (HiNMSparsity, RetainedSaliency)


def scores(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * scale


def feed(metric: Metric, seed: int, scale: float = 1.0) -> None:
    """One layer: a quarter of its weights kept."""
    saliency = scores(4, 8, seed=seed, scale=scale)
    mask = keep_top(saliency, 2)
    metric.update(saliency * mask) if isinstance(metric, HiNMSparsity) else metric.update(saliency, mask)


def test_sparsity_counts_zeros_over_layers_of_different_sizes() -> None:
    metric = HiNMSparsity()
    metric.update(torch.tensor([0.0, 1.0]))
    metric.update(torch.zeros(6))
    assert metric.compute() == 7 / 8


def test_sparsity_takes_masks_as_it_takes_weights() -> None:
    weight = torch.tensor([[0.0, -1.0, 2.0, 0.0]])
    assert HiNMSparsity()(weight) == HiNMSparsity()(weight != 0) == 0.5


def test_sparsity_before_the_first_layer_is_zero() -> None:
    metric = HiNMSparsity()
    metric.update(torch.ones(0))
    assert metric.compute() == 0


def test_retained_of_one_layer_is_that_of_the_functional_core() -> None:
    saliency = scores(16, 16)
    mask = keep_top(saliency, 4)
    assert RetainedSaliency()(saliency, mask).item() == pytest.approx(retained(saliency, mask), rel=1e-12)


def test_retained_weighs_layers_by_their_saliency_not_by_their_number() -> None:
    metric = RetainedSaliency()
    metric.update(torch.tensor([99.0]), torch.tensor([True]))
    metric.update(torch.tensor([1.0]), torch.tensor([False]))
    assert metric.compute().item() == pytest.approx(0.99)


def test_retained_of_no_saliency_at_all_is_one() -> None:
    assert RetainedSaliency()(torch.zeros(3), torch.tensor([True, False, False])) == 1


def test_retained_counts_nothing_that_is_pruned_even_in_half_precision() -> None:
    saliency = torch.full((300, 300), 6.0, dtype=torch.float16)  # its sum is beyond float16
    mask = torch.zeros_like(saliency, dtype=torch.bool)
    mask[0] = True
    assert RetainedSaliency()(saliency, mask).item() == pytest.approx(1 / 300)


@pytest.mark.parametrize("metric", METRICS)
def test_reset_forgets_everything(metric: Callable[[], Metric]) -> None:
    one, two = metric(), metric()
    feed(one, 0)
    one.reset()
    feed(one, 1)
    feed(two, 1)
    assert one.compute() == two.compute()


@pytest.mark.parametrize("metric", METRICS)
def test_a_pickled_metric_goes_on_where_it_was(metric: Callable[[], Metric]) -> None:
    one = metric()
    feed(one, 0)
    two = pickle.loads(pickle.dumps(one))  # noqa: S301 - our own bytes
    feed(one, 1, scale=9)
    feed(two, 1, scale=9)
    assert one.compute() == two.compute()


@pytest.mark.parametrize("metric", METRICS)
def test_a_clone_does_not_share_its_sums(metric: Callable[[], Metric]) -> None:
    one = metric()
    feed(one, 0)
    before, two = one.compute(), one.clone()
    two.update(torch.zeros(1000)) if metric is HiNMSparsity else two.update(
        torch.ones(1000), torch.zeros(1000, dtype=torch.bool)
    )
    assert one.compute() == before != two.compute()


def reduce_on_rank(rank: int, address: str) -> list[float]:
    """Both metrics on one of two ranks, which see different numbers of layers."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        metrics = [metric() for metric in METRICS]
        for metric in metrics:
            for layer in range(rank + 1):
                feed(metric, seed=10 * rank + layer, scale=1 + 5 * rank)
        return [metric.compute().item() for metric in metrics]
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_would(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/rendezvous"
    with get_context("spawn").Pool(1) as pool:
        other = pool.apply_async(reduce_on_rank, (1, address))
        got = reduce_on_rank(0, address), other.get(timeout=120)
    alone = [metric() for metric in METRICS]
    for metric in alone:
        for seed, scale in ((0, 1), (10, 6), (11, 6)):
            feed(metric, seed, scale)
    expected = pytest.approx([metric.compute().item() for metric in alone])
    assert got[0] == got[1] == expected
