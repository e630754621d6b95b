"""Saliencies to search, made up: those of real layers have to be downloaded."""

import torch
from torch import Tensor


def random_layer(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Magnitudes of a layer whose rows and columns differ in scale, as those of trained layers do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).abs_()
    weight *= torch.rand(rows, 1, generator=generator) + 0.1
    return weight.mul_(torch.rand(1, columns, generator=generator) + 0.1)
