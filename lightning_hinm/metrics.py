"""How sparse, and how much of the saliency is left: sums over layers, batches and ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_hinm.mask import retained


class HiNMSparsity(Metric):
    """Fraction of exact zeros in all the weights, or masks, that were seen; 0 before the first.

    Args:
        kwargs: as for ``torchmetrics.Metric``.

    >>> sparsity = HiNMSparsity()
    >>> sparsity.update(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    >>> sparsity.update(torch.tensor([True, False, False, False]))
    >>> sparsity.compute()
    tensor(0.6250, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    zeros: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("zeros", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, weight: Tensor) -> None:
        """Counts one weight, or one mask (bool, True = kept), of any shape."""
        self.zeros += (weight == 0).sum()
        self.total += weight.numel()

    def compute(self) -> Tensor:
        """Zeros over all, a float64 scalar."""
        return self.zeros.double() / self.total.clamp(min=1)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """A figure and its axes, as ``torchmetrics.Metric`` draws it; needs matplotlib."""
        return self._plot(val, ax)


class RetainedSaliency(Metric):
    """Kept over total saliency of all the layers that were seen, in ``[0, 1]``; 1 where the total is 0.

    Args:
        kwargs: as for ``torchmetrics.Metric``.

    >>> share = RetainedSaliency()
    >>> share.update(torch.tensor([[3.0, 1.0]]), torch.tensor([[True, False]]))
    >>> share.compute()
    tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    kept: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # float64, also after `.half()` (see `set_dtype` of torchmetrics): sums of millions of terms
        self.add_state("kept", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, saliency: Tensor, mask: Tensor) -> None:
        """Adds one layer.

        Args:
            saliency: non-negative, any shape.
            mask: bool, the same shape; True = kept.
        """
        total = saliency.sum(dtype=torch.float64)
        self.kept += retained(saliency, mask) * total
        self.total += total

    def compute(self) -> Tensor:
        """Kept over total, a float64 scalar."""
        return torch.where(self.total > 0, self.kept / self.total, 1.0)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """A figure and its axes, as ``torchmetrics.Metric`` draws it; needs matplotlib."""
        return self._plot(val, ax)
