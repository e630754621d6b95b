"""The figures of a GPU, measured on it: they replace the estimates by which ``cost`` chooses kernels."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hinm import kernels
from lightning_hinm.format import random_weight
from lightning_hinm.ops import cost, gpu
from lightning_hinm.ops.cost import Call, Gpu
from lightning_hinm.ops.operands import LinearOperands, expand_all
from lightning_hinm.pattern import HiNMPattern

COPIED = 1 << 28  # numbers of 2 bytes: more than any cache holds
SIDE = 4096  # of the matrices, and the number of tokens
REPEATS, ROUNDS = 20, 7


def measure_gpu(
    device: torch.device,
    *,
    seconds: Callable[[Callable[[], Any]], float] | None = None,
    side: int = SIDE,
    copied: int = COPIED,
) -> Gpu:
    """What bounds the kernels on that device: each rate from a call that it should bind.

    Args:
        device: a CUDA device on which the kernels run.
        seconds: of one call, in a graph of them; by CUDA events if it is None.
        side: of the matrices, and the number of tokens.
        copied: numbers that are copied to measure the memory.

    Raises:
        RuntimeError: if the kernels do not run on the device.
    """
    if reason := kernels.refusal(device):
        raise RuntimeError(reason)
    seconds = seconds or _seconds
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    def time_gather(pattern: HiNMPattern, x: Tensor, assumed: Gpu) -> tuple[float, float]:
        """Seconds of the gather kernel on a layer as wide as high, and what it is predicted to take."""
        packed = random_weight((x.shape[1], x.shape[1]), pattern, x.dtype, generator)
        operands: Any = (*packed.tensors.values(), None, *expand_all(packed).values(), x.shape[1], *pattern.fields)
        call = Call(pattern, x.shape[1], x.shape[1], len(x), x.stride(1) != 1)
        choices = cost.list_kernels(call, kernels.shared_limit(device), assumed)
        choice = next(choice for choice in choices if choice.kernel == "gather")
        run = partial(gpu.run_linear, x, x.new_empty(x.shape), LinearOperands(*operands), choice)
        return seconds(run), choice.seconds

    source, weight, x = numbers(copied), numbers(side, side), numbers(side, side)
    known = cost.gpu_of(device)
    known = replace(
        known,
        memory=2 * source.nbytes / seconds(partial(torch.neg, source, out=torch.empty_like(source))),
        dense=2 * x.numel() * len(weight) / seconds(partial(F.linear, x, weight)),
        launch=seconds(partial(source[:8].add_, 0.0)),
        measured=True,
    )
    # With a rate of 1, the prediction is the work that the rate has to do, and the launches beside it.
    feature_major = x.t().contiguous().t()
    took, work = time_gather(HiNMPattern(128, 0.5, window=None), feature_major, replace(known, sparse=1.0))
    known = replace(known, sparse=work / took)
    took, work = time_gather(HiNMPattern(32, 0.5, window=None), feature_major, replace(known, l2=1.0))
    return replace(known, l2=work / took)


def _seconds(call: Callable[[], Any]) -> float:
    """Of one call in a CUDA graph of them, where Python does not hold the GPU up: the median of a few rounds."""
    call()  # what a kernel or a BLAS sets up at its first call cannot be set up in a capture
    torch.cuda.synchronize()
    graph, samples = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    for _ in range(ROUNDS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3 / REPEATS)
    return sorted(samples[1:])[ROUNDS // 2]  # the first is warm-up
