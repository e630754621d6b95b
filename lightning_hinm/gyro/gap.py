"""How far a layout comes from no permutation towards no pattern at all."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import choose_vectors, hinm_mask, retained
from lightning_hinm.pattern import HiNMPattern


class Gap:
    """Between identity and an unstructured mask that keeps as many.

    Args:
        saliency: non-negative, ``[O, I]``.
        pattern: the pattern of both.
        low: what identity retains, where that is known.
    """

    def __init__(self, saliency: Tensor, pattern: HiNMPattern, low: float | None = None) -> None:
        if low is None:
            order = torch.arange(saliency.shape[0], device=saliency.device)
            mask = hinm_mask(saliency, HiNMLayout(pattern, order, choose_vectors(saliency, pattern, order)))
            low = retained(saliency, mask)
        kept, (rows, in_features) = 0, saliency.shape
        for first, last in pattern.runs(in_features):
            slots = pattern.kept_of_run(last - first)
            virtual = max(slots - (last - first), 0)  # all in the last group
            kept += rows * (slots // pattern.m * pattern.n - max(pattern.n - (pattern.m - virtual), 0))
        total = saliency.sum(dtype=torch.float64).item()
        self.low, self.high = low, sum_of_largest(saliency, kept) / total if total else 1.0

    def closed(self, value: float) -> float:
        """0 at identity, 1 where nothing better is possible; 1 too where identity is best."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 1.0


def sum_of_largest(saliency: Tensor, k: int) -> float:
    """Of the ``k`` largest of ``[O, I]``, in float64.

    The upper 16 bits of a number order it: counted, they leave few for ``topk`` to choose among.
    """
    values = saliency.flatten().abs()  # no -0
    size = values.element_size()
    upper = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]) >> (8 * size - 16)
    above = values.numel() - torch.bincount(upper, minlength=1 << 15).cumsum(0)  # numbers whose upper bits are larger
    last = int((above >= k).sum())
    among = values[upper == last]
    chosen = among.topk(k - int(above[last]), sorted=False).values.sum(dtype=torch.float64)
    return float(chosen + F.threshold(values, float(among.max()), 0.0).sum(dtype=torch.float64))
