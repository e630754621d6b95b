"""Which layers run sparse and which dense, and why: decided by timing both on random numbers of the layer's shapes."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hinm import kernels
from lightning_hinm.format import HiNMWeight, pack, random_weight
from lightning_hinm.ops import cost, expand_all, expanded_bytes, hinm_conv2d, hinm_linear
from lightning_hinm.ops.cost import Choice
from lightning_hinm.ops.fragments import refusal
from lightning_hinm.pattern import HiNMPattern, layer_kind, plain_name
from lightning_hinm.prune import PrunableLayer, layout_of

# What a layer is timed on when no input is known: one short batch of tokens, or one small image.
TOKENS, PIXELS = 128, (14, 14)
MARGIN = 0.95  # sparse must win by more than the noise of a measurement; a tie leaves the layer as it is
SECONDS, LEAST, MOST = 0.05, 3, 25  # a measurement ends after this time, but has at least so many repetitions


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


@dataclass(frozen=True)
class Decision:
    """``path`` is ``"sparse"`` or ``"dense"``; the times are of one call, in seconds, measured in isolation.

    On a GPU ``predicted`` has, by path, the kernel, the roof that should bind it, and the time that follows from it.
    """

    path: str
    reason: str
    dense_seconds: float
    sparse_seconds: float
    predicted: Mapping[str, Choice] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs, and why; ``bytes`` is what it holds on that path, the cached expansion counted."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: HiNMPattern | None
    path: str
    reason: str
    dense_bytes: int
    bytes: int
    decision: Decision | None = None
    measured_seconds: float | None = None

    @property
    def kernel(self) -> str | None:
        """The GPU kernel that runs it, and the roof that should bind it; None where none does."""
        if self.decision is None or self.path not in self.decision.predicted:
            return None
        choice = self.decision.predicted[self.path]
        return f"{choice.kernel} ({choice.roof})"

    @property
    def predicted_seconds(self) -> float | None:
        """Time of one call on the chosen path: from the roofs of a GPU, or measured in isolation on random numbers."""
        if self.decision is None:
            return None
        if self.path in self.decision.predicted:
            return self.decision.predicted[self.path].seconds
        return self.decision.sparse_seconds if self.path == "sparse" else self.decision.dense_seconds


@dataclass(frozen=True)
class ModelPlan:
    """Every prunable or packed layer, in the model's order; ``str()`` is a table, ``layers`` is data."""

    layers: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        rows = [("layer", "kind", "shape", "path", "kernel", "bytes before", "after", "predicted", "measured", "why")]
        for layer in self.layers:
            times = (_milliseconds(layer.predicted_seconds), _milliseconds(layer.measured_seconds))
            shape = "x".join(map(str, layer.shape))
            memory = (f"{layer.dense_bytes:,}", f"{layer.bytes:,}")
            rows.append((layer.name, layer.kind, shape, layer.path, layer.kernel or "-", *memory, *times, layer.reason))
        before, after = sum(layer.dense_bytes for layer in self.layers), sum(layer.bytes for layer in self.layers)
        rows.append(("total", "", "", "", "", f"{before:,}", f"{after:,}", "", "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(9)]
        return "\n".join("  ".join((*map(str.ljust, row, widths), row[9])).rstrip() for row in rows)


def explain(model: nn.Module, *inputs: Any, **named_inputs: Any) -> ModelPlan:
    """What ``plan="auto"`` does with every layer of a pruned model, or what became of it in a converted one.

    With inputs the model is run on them, in eval mode and without gradients: each layer is then decided on the input it
    really gets, and the time it takes inside the model, as it stands, is measured.

    Args:
        model: pruned, converted, or neither: a layer without a layout is listed as dense.
        inputs: of ``model.forward``.
        named_inputs: of ``model.forward``.

    Returns:
        The plan of every layer.
    """
    layers = {}
    for path, module in model.named_modules():
        kind = layer_kind(module) or (module.kind if _packed_of(module) else None)
        if kind is not None:
            layers[plain_name(path)] = (str(kind), module)
    seen: dict[nn.Module, tuple[tuple[int, ...], float]] = {}
    if inputs or named_inputs:
        seen = _time_layers(model, [module for _, module in layers.values()], inputs, named_inputs)
    return ModelPlan(tuple(_explain_layer(name, kind, module, seen) for name, (kind, module) in layers.items()))


def _explain_layer(
    name: str, kind: str, module: nn.Module, seen: dict[nn.Module, tuple[tuple[int, ...], float]]
) -> LayerPlan:
    input_shape, measured = seen.get(module, (None, None))
    packed, layout = _packed_of(module), layout_of(module)
    if packed is not None:
        decision = decide(workload_of(module, input_shape))
        dense_bytes = math.prod(packed.shape) * packed.values.element_size()
        held = packed.nbytes + sum(tensor.nbytes for tensor in module.expanded.values())  # type: ignore[operator]
        reason = f"packed: {decision.reason}"
        return LayerPlan(
            name, kind, packed.shape, packed.pattern, "sparse", reason, dense_bytes, held, decision, measured
        )
    weight: Tensor = module.weight  # type: ignore[assignment]
    shape, dense_bytes = tuple(weight.shape), weight.nbytes
    if layout is None:
        return LayerPlan(name, kind, shape, None, "dense", "no layout", dense_bytes, dense_bytes, None, measured)
    layer = PrunableLayer(name, module, kind, layout.pattern)
    try:
        packed = pack(layer.matrix, layout, groups=layer.groups, name=name)
    except ValueError as error:
        reason = str(error).removeprefix(f"{name}: ")
        return LayerPlan(name, kind, shape, layout.pattern, "dense", reason, dense_bytes, dense_bytes, None, measured)
    decision = decide(workload_of(module, input_shape))
    held = packed.nbytes + expanded_bytes(packed) if decision.path == "sparse" else dense_bytes
    return LayerPlan(
        name, kind, shape, layout.pattern, decision.path, decision.reason, dense_bytes, held, decision, measured
    )


def workload_of(module: nn.Module, input_shape: tuple[int, ...] | None = None) -> Workload:
    """The workload of a pruned or a packed layer on an input of that shape; a small one if it is None."""
    packed, layout = _packed_of(module), layout_of(module)
    if packed is not None:
        kind, shape, pattern, like = str(module.kind), packed.shape, packed.pattern, packed.values
    elif layout is not None:
        kind, pattern, like = layer_kind(module) or "", layout.pattern, module.weight  # type: ignore[assignment]
        shape = tuple(like.shape)[::-1] if kind == "hf_conv1d" else tuple(like.shape)
    else:
        raise ValueError(f"{type(module).__name__}: has no layout, so it has no sparse workload. Prune it first.")
    common: dict[str, Any] = {"pattern": pattern, "dtype": like.dtype, "device": like.device}
    common["threads"] = torch.get_num_threads()
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


def decide(workload: Workload) -> Decision:
    """Sparse where it wins by more than noise, else dense."""
    dense, sparse = measure(workload)
    path = "sparse" if sparse < MARGIN * dense else "dense"
    size = "x".join(map(str, workload.input_shape))
    reason = f"sparse {sparse * 1e3:.3f} ms, dense {dense * 1e3:.3f} ms on {size}"
    return Decision(path, reason, dense, sparse, predict(workload))


def predict(workload: Workload) -> dict[str, Choice]:
    """By path, the kernel on a GPU, its roof and the time that follows; empty where no kernel runs the layer."""
    shape, device, pattern = workload.shape, workload.device, workload.pattern
    if kernels.refusal(device) or refusal(pattern, math.prod(shape[1:]), workload.dtype):
        return {}
    gpu = cost.gpu_of(device)
    if len(shape) == 2:
        call = cost.Call(pattern, *shape, math.prod(workload.input_shape[:-1]))
    else:
        *_, height, width = workload.input_shape
        spatial = zip((height, width), shape[2:], workload.stride, workload.padding, workload.dilation, strict=True)
        out = [(size + 2 * pad - spread * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, spread in spatial]
        images, pixels = math.prod(workload.input_shape[:-3]), math.prod(out)
        direct = (*shape[2:], *workload.stride) == (1, 1, 1, 1) and not any(workload.padding)
        direct = direct and pixels % cost.ALIGNED == 0
        planes = 0 if direct else 2 * shape[3] * math.prod(workload.input_shape) // workload.stride[1]
        if not direct:
            pixels = out[0] * -(-out[1] // cost.ALIGNED) * cost.ALIGNED
        tokens = images * -(-pixels // cost.GATHER_TOKENS) * cost.GATHER_TOKENS  # a block takes pixels of one image
        call = cost.Call(pattern, shape[0], math.prod(shape[1:]), tokens, planes=planes)
    choice = cost.choose_kernel(call, kernels.shared_limit(device), gpu)
    return {} if choice is None else {"sparse": choice, "dense": cost.predict_dense(call, gpu)}


@functools.cache
def measure(workload: Workload) -> tuple[float, float]:
    """Seconds of one call, dense and sparse, alternating; a shape is measured once in a process."""
    with torch.inference_mode(False), torch.no_grad():
        calls = _calls(workload)
        times: tuple[list[float], list[float]] = ([], [])
        end = math.inf
        while len(times[0]) < LEAST or (len(times[0]) < MOST and time.perf_counter() < end):
            for call, record in zip(calls, times, strict=True):
                record.append(_seconds(call, workload.device))
            if end == math.inf:  # the first round is warm-up
                end = time.perf_counter() + SECONDS
                times[0].clear(), times[1].clear()  # type: ignore[func-returns-value]
    return statistics.median(times[0]), statistics.median(times[1])


def _calls(workload: Workload) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The dense and the sparse call on random numbers; no global seed is read or set."""
    generator = torch.Generator(workload.device).manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=workload.device).to(workload.dtype)

    shape, pattern, groups = workload.shape, workload.pattern, workload.groups
    x, weight, bias = numbers(*workload.input_shape), numbers(*shape), numbers(shape[0])
    packed = random_weight(shape, pattern, workload.dtype, generator, groups=groups)
    operands = (*packed.tensors.values(), bias, *expand_all(packed, groups=groups).values())
    if len(shape) == 2:
        return (lambda: F.linear(x, weight, bias)), (lambda: hinm_linear(x, *operands, shape[1], *pattern.fields))
    spatial = (workload.stride, workload.padding, workload.dilation)
    geometry = (shape[1] * groups, *shape[2:], *(size for pair in spatial for size in pair), groups)
    return (
        lambda: F.conv2d(x, weight, bias, *spatial, groups),
        lambda: hinm_conv2d(x, *operands, *geometry, *pattern.fields),
    )


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_layers(
    model: nn.Module, layers: list[nn.Module], inputs: tuple[Any, ...], named_inputs: dict[str, Any]
) -> dict[nn.Module, tuple[tuple[int, ...], float]]:
    """Shape of the last input, and the median time of one call, of each layer that the model runs."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    times: dict[nn.Module, list[float]] = {}
    started: dict[nn.Module, float] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        shapes[module] = tuple(args[0].shape)
        _wait(args[0].device)
        started[module] = time.perf_counter()

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _wait(args[0].device)
        times.setdefault(module, []).append(time.perf_counter() - started[module])

    with _evaluating(model), torch.inference_mode():
        model(*inputs, **named_inputs)  # warm-up
        handles = [layer.register_forward_pre_hook(before) for layer in layers]
        handles += [layer.register_forward_hook(after) for layer in layers]
        try:
            for _ in range(LEAST):
                model(*inputs, **named_inputs)
        finally:
            for handle in handles:
                handle.remove()
    return {module: (shapes[module], statistics.median(record)) for module, record in times.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was


def _packed_of(module: nn.Module) -> HiNMWeight | None:
    """The packed weight of a converted layer; asked by name, since the modules stand above the plan."""
    packed = getattr(module, "packed", None)
    return packed if isinstance(packed, HiNMWeight) else None


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f} ms"
