"""What HiNM is compared with: cuBLAS and cuDNN on dense weights, cuSPARSELt on 2:4 weights in torch's own tensor."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases import Conv2d, Linear
from benchmarks.gpu.clock import Call, Machine
from lightning_hinm import HiNMPattern, unpack
from lightning_hinm.format import random_weight

TOLERANCE = 1e-2  # of two results in bfloat16
CONV_COPIES = 64  # most copies of a convolution's weight: its images are many times larger


@dataclass
class LinearRivals:
    """Inputs of a linear layer in both storages, and the rivals' calls over all copies of their weights."""

    x: Tensor  # [N, I], row-major
    feature: Tensor  # the same, feature-major
    dense: Sequence[Call]
    dense_feature: Sequence[Call]
    cusparselt: dict[str, Sequence[Call]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass
class ConvRivals:
    """The same for a convolution, on images in both of torch's memory formats."""

    x: Tensor
    dense: Sequence[Call]
    channels_last: Sequence[Call]


class Rivals:
    """Makes them, and keeps the last ones: neighbouring cases differ in their pattern alone."""

    def __init__(self, machine: Machine, dtype: torch.dtype, generator: torch.Generator, *, captured: bool) -> None:
        self.machine, self.dtype, self.generator, self.captured = machine, dtype, generator, captured
        self.last: tuple[object, LinearRivals | ConvRivals] | None = None
        torch.backends.cudnn.benchmark = True  # cuDNN's own best algorithm

    def linear(self, layer: Linear, tokens: int) -> LinearRivals:
        """Of a linear layer on so many tokens."""
        if self.last and self.last[0] == (layer, tokens) and isinstance(self.last[1], LinearRivals):
            return self.last[1]
        self.last = None  # its memory first
        x = self._randn(tokens, layer.columns)
        feature = x.t().contiguous().t()
        weight = self._randn(layer.rows, layer.columns)
        weights = [weight, *(weight.clone() for _ in range(self.machine.copies(weight.nbytes) - 1))]
        dense, other = ([partial(F.linear, tokens_, each) for each in weights] for tokens_ in (x, feature))
        rivals = LinearRivals(x, feature, dense, other)
        try:
            self._add_cusparselt(rivals, layer)
        except Exception as error:
            rivals.unavailable["cusparselt"] = f"{type(error).__name__}: {error}"
        self.last = (layer, tokens), rivals
        return rivals

    def conv2d(self, layer: Conv2d) -> ConvRivals:
        """Of a convolution."""
        if self.last and self.last[0] == layer and isinstance(self.last[1], ConvRivals):
            return self.last[1]
        self.last = None
        x = self._randn(layer.batch, layer.channels, layer.size, layer.size)
        weight = self._randn(layer.rows, layer.channels, layer.kernel, layer.kernel)
        count = min(self.machine.copies(weight.nbytes), CONV_COPIES)
        calls = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            images = x.contiguous(memory_format=memory_format)
            weights = [weight.clone(memory_format=memory_format) for _ in range(count)]
            calls.append([partial(F.conv2d, images, each, None, layer.stride, layer.padding) for each in weights])
        rivals = ConvRivals(x, *calls)
        self.last = layer, rivals
        return rivals

    def _add_cusparselt(self, rivals: LinearRivals, layer: Linear) -> None:
        from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Sparse

        pattern = HiNMPattern(layer.rows, 0.0, window=None)
        shape, flags = (layer.rows, layer.columns), {"permuted": False, "restored": False}
        dense = unpack(random_weight(shape, pattern, self.dtype, self.generator, **flags))
        count = self.machine.copies(dense.nbytes * 9 // 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls this tensor a prototype

            weights = [Sparse.from_dense(dense) for _ in range(count)]
            default = [partial(F.linear, rivals.x, weight) for weight in weights]
            expected = F.linear(rivals.x, dense).float()
            error = float((default[0]().float() - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                raise ArithmeticError(f"wrong result: relative error {error:.2e}")
            rivals.cusparselt["cusparselt"] = default
            if len(rivals.x) % 8:
                return  # the search takes no input that the tensor would pad
            try:
                compressed = torch._cslt_compress(dense)
                algorithm = torch._cslt_sparse_mm_search(compressed, rivals.x.t(), transpose_result=True)
                if algorithm:
                    rivals.cusparselt["cusparselt_searched"] = [
                        partial(F.linear, rivals.x, _with_algorithm(weight, algorithm)) for weight in weights
                    ]
            except Exception as failure:
                rivals.unavailable["cusparselt_searched"] = f"{type(failure).__name__}: {failure}"

    def _randn(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.machine.device, dtype=self.dtype)


def _with_algorithm(weight: Any, algorithm: int) -> Tensor:
    """The same compressed weight, multiplied by another of cuSPARSELt's algorithms."""
    other = weight.detach()
    other.alg_id_cusparselt = algorithm
    return other
