"""One call of a pruned layer: all that its time depends on, and that time, on random numbers of its shapes.

Shapes: O rows, I columns.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hinm.format import HiNMWeight, random_weight
from lightning_hinm.ops import expand_all, hinm_conv2d, hinm_linear
from lightning_hinm.ops.operands import activate_
from lightning_hinm.pattern import HiNMPattern, layer_kind
from lightning_hinm.prune import layout_of

# What a layer is timed on when no input is known: one short batch of tokens, or one small image.
TOKENS, PIXELS = 128, (14, 14)
SECONDS, LEAST, MOST = 0.1, 3, 25  # a measurement ends after this time, but has at least so many repetitions
CAPTURED = 5e-3  # seconds of calls that one CUDA graph repeats: enough that its own start does not count
MOST_COPIES = 64  # of a weight

Seconds = tuple[float, float]  # dense and sparse
_measured: "dict[Workload, Seconds]" = {}
_anew: ContextVar["dict[Workload, Seconds] | None"] = ContextVar("anew", default=None)


@dataclass(frozen=True)
class Workload:
    """One call of a pruned layer: all that its time depends on.

    Args:
        shape: of the weight, ``[O, I]`` or ``[O, C, kh, kw]``.
        pattern: the pattern it obeys.
        input_shape: ``[..., I]`` or ``[B, C, H, W]``.
        dtype: of weight and input.
        device: of both.
        stride: of a convolution, and so on.
        padding: zeros on both sides.
        dilation: as for ``F.conv2d``.
        groups: channel groups of a convolution.
        threads: of the CPU.
        restored: whether the rows are written back in the order of the channels: no reader has absorbed theirs.
        feature_major: whether the input of a linear layer lies so.
        feature_major_out: whether its result shall.
        channels_last: whether the images of a convolution lie so, then its result too.
        activation: that follows: a GPU kernel applies it before it writes.
        replayed: whether it runs inside a CUDA graph: then it never waits for Python to launch it.
    """

    shape: tuple[int, ...]
    pattern: HiNMPattern
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    threads: int = 1
    restored: bool = True
    feature_major: bool = False
    feature_major_out: bool = False
    channels_last: bool = False
    activation: str = "none"
    replayed: bool = False


def workload_of(module: nn.Module, input_shape: tuple[int, ...] | None = None, *, replayed: bool = False) -> Workload:
    """The workload of a pruned or a packed layer on an input of that shape; a small one if it is None.

    Args:
        module: the layer.
        input_shape: of its input.
        replayed: whether what runs on a GPU is replayed from CUDA graphs.
    """
    packed, layout = packed_of(module), layout_of(module)
    if packed is not None:
        kind, shape, pattern, like = str(module.kind), packed.shape, packed.pattern, packed.values
    elif layout is not None:
        kind, pattern, like = layer_kind(module) or "", layout.pattern, module.weight  # type: ignore[assignment]
        shape = tuple(like.shape)[::-1] if kind == "hf_conv1d" else tuple(like.shape)
    else:
        raise ValueError(f"{type(module).__name__}: has no layout, so it has no sparse workload. Prune it first.")
    common: dict[str, Any] = {"pattern": pattern, "dtype": like.dtype, "device": like.device}
    common |= {"threads": torch.get_num_threads(), "replayed": replayed and like.device.type == "cuda"}
    if kind in ("linear", "hf_conv1d"):
        return Workload(shape, input_shape=input_shape or (TOKENS, shape[1]), **common)
    kernel, dilation, stride = shape[2:], tuple(module.dilation), tuple(module.stride)  # type: ignore[arg-type]
    given: Any = module.padding
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(given) if not isinstance(given, str) else tuple(r // 2 if given == "same" else 0 for r in reach)
    input_shape = input_shape or (1, shape[1] * int(module.groups), *PIXELS[: len(kernel)])  # type: ignore[arg-type]
    if len(kernel) == 1:  # a Conv1d is a Conv2d over images of height 1
        shape, input_shape = (*shape[:2], 1, *kernel), (*input_shape[:-1], 1, input_shape[-1])
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    groups = int(module.groups)  # type: ignore[arg-type]
    return Workload(
        shape, input_shape=input_shape, stride=stride, padding=padding, dilation=dilation, groups=groups, **common
    )


def measure(workload: Workload) -> Seconds:
    """Seconds of one call, dense and sparse; measured once in a process, or inside ``measuring_anew``."""
    known = _measured if (anew := _anew.get()) is None else anew
    if workload not in known:
        known[workload] = _measured[workload] = _take_turns(workload)
    return known[workload]


@contextmanager
def measuring_anew() -> Iterator[None]:
    """What was measured before does not count inside, but what is measured inside counts from then on.

    Inside another one, that one holds.
    """
    token = _anew.set({} if _anew.get() is None else _anew.get())
    try:
        yield
    finally:
        _anew.reset(token)


def _take_turns(workload: Workload) -> Seconds:
    """The shortest of each counts: whatever else the machine does can only make a call longer."""
    with torch.inference_mode():  # in which a compiled model is meant to run: autograd would add to the sparse call
        calls = _calls(workload)  # held to the end: a CUDA graph does not keep alive what it reads
        passes = [_capture(call, workload.device) if workload.replayed else (call, 1) for call in calls]
        times: tuple[list[float], list[float]] = ([], [])
        end = math.inf
        while len(times[0]) < LEAST or (len(times[0]) < MOST and time.perf_counter() < end):
            for (run, count), record in zip(passes, times, strict=True):
                record.append(_seconds(run, workload.device) / count)
            if end == math.inf:  # the first round is warm-up
                end = time.perf_counter() + SECONDS
                times[0].clear(), times[1].clear()  # type: ignore[func-returns-value]
    return min(times[0]), min(times[1])


def _calls(workload: Workload) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The dense and the sparse call on random numbers; no global seed is read or set."""
    generator = torch.Generator(workload.device).manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=workload.device).to(workload.dtype)

    shape, pattern, groups, activation = workload.shape, workload.pattern, workload.groups, workload.activation
    x, weight, bias = numbers(*workload.input_shape), numbers(*shape), numbers(shape[0])
    packed = random_weight(shape, pattern, workload.dtype, generator, groups=groups, restored=workload.restored)
    operands = (*packed.tensors.values(), bias, *expand_all(packed, groups=groups).values())
    weights, packed_weights = _in_turn((weight,), workload), _in_turn(operands, workload)
    if len(shape) == 2:
        stored = x.movedim(-1, 0).contiguous().movedim(0, -1) if workload.feature_major else x
        tail = (shape[1], *pattern.fields, activation, workload.feature_major_out)
        return (
            lambda: activate_(F.linear(x, next(weights)[0], bias), activation),
            lambda: hinm_linear(stored, *next(packed_weights), *tail),
        )
    x = x.to(memory_format=torch.channels_last) if workload.channels_last else x
    spatial = (workload.stride, workload.padding, workload.dilation)
    geometry = (shape[1] * groups, *shape[2:], *(size for pair in spatial for size in pair), groups)
    return (
        lambda: activate_(F.conv2d(x, next(weights)[0], bias, *spatial, groups), activation),
        lambda: hinm_conv2d(x, *next(packed_weights), *geometry, *pattern.fields, activation),
    )


def _in_turn(tensors: tuple[Any, ...], workload: Workload) -> Iterator[tuple[Any, ...]]:
    """The same for every call; but in a CUDA graph, whose calls follow at once, copies in turn: as in a model, where
    others come between, the L2 cache has forgotten a weight when it is its turn again."""
    if not workload.replayed:
        return itertools.repeat(tensors)
    held = [tensor for tensor in tensors if tensor is not None]
    cache = torch.cuda.get_device_properties(workload.device).L2_cache_size
    count = min(math.ceil(2 * cache / sum(tensor.nbytes for tensor in held)), MOST_COPIES)
    copies = [tuple(None if tensor is None else tensor.clone() for tensor in tensors) for _ in range(count - 1)]
    return itertools.cycle([tensors, *copies])


def _capture(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], int]:
    """Replays a CUDA graph of so many calls that its start does not count, and how many they are."""
    stream, graph = _side_stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # The first is warm-up: what a kernel or a BLAS sets up at its first call cannot be set up in a capture.
            once = min(_seconds(call, device) for _ in range(LEAST))
        count = math.ceil(CAPTURED / once)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(count):
                call()
    return graph.replay, count


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, which the default stream cannot be: a BLAS keeps a workspace for every stream it meets."""
    return torch.cuda.Stream(device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def packed_of(module: nn.Module) -> HiNMWeight | None:
    """The packed weight of a converted layer; asked by name, since the modules stand above the plan."""
    packed = getattr(module, "packed", None)
    return packed if isinstance(packed, HiNMWeight) else None
