"""Which layers run sparse and which dense, and why: decided by the times of both.

Shapes: O rows, I columns.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_hinm import kernels
from lightning_hinm.ops import cost
from lightning_hinm.ops.cost import Choice
from lightning_hinm.ops.fragments import refusal
from lightning_hinm.pattern import HiNMPattern
from lightning_hinm.workload import Workload, measure

# Sparse must win by more than the noise of a measurement, and on a CPU by more than what a layer may lose in a graph,
# where Inductor fuses less with it: a tie leaves the layer as it is.
MARGINS = {"cpu": 0.8}
MARGIN = 0.95  # elsewhere


@dataclass(frozen=True)
class Decision:
    """``path`` is ``"sparse"`` or ``"dense"``; the times are seconds of all ``calls``, alone on random numbers.

    On a GPU ``predicted`` has, by path, for each call the kernel, the roof that should bind it, and the time that
    follows from it.
    """

    path: str
    calls: str
    dense_seconds: float
    sparse_seconds: float
    predicted: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Both times, and for what."""
        return f"sparse {_milliseconds(self.sparse_seconds)}, dense {_milliseconds(self.dense_seconds)} on {self.calls}"


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs, and why.

    Args:
        name: of the layer in the model.
        kind: as ``pattern.layer_kind`` tells.
        shape: of its weight.
        pattern: None without a layout.
        path: ``"sparse"`` or ``"dense"``.
        reason: why.
        dense_bytes: of the dense weight; 0 where it is that of a layer above.
        bytes: of what the layer reads on that path instead, the cached expansion counted. A dense model that is
            compiled keeps its dense weights besides; ``to_hinm(inplace=True)`` frees them.
        retained: kept / total of the saliency that it was pruned by, where that is known.
        order: what a compiled model does with the order of its rows: ``"in order"``, ``"absorbed by ..."`` or
            ``"restored: ..."``, once for each fate that a call of it meets; None where that is not known.
        decision: sparse against dense, alone on random numbers; None where there was nothing to decide.
        calls: in one forward on the inputs given; None without inputs.
        measured_seconds: of all these calls inside the model as it stands.
        converted: whether the model as it stands runs the layer packed.
        product: of a layer that no GPU kernel takes: ``"compiled"`` for the CPU, or ``"torch"``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: HiNMPattern | None
    path: str
    reason: str
    dense_bytes: int
    bytes: int
    retained: float | None = None
    order: str | None = None
    decision: Decision | None = None
    calls: int | None = None
    measured_seconds: float | None = None
    converted: bool = False
    product: str | None = None

    @property
    def kernel(self) -> str | None:
        """The GPU kernel that runs it, and the roof that should bind it; else the product of a sparse layer."""
        if self.decision is None or self.path not in self.decision.predicted:
            return self.product if self.path == "sparse" else None
        chosen = self.decision.predicted[self.path]
        return ", ".join(dict.fromkeys(f"{choice.kernel} ({choice.roof})" for choice in chosen))

    @property
    def predicted_seconds(self) -> float | None:
        """Time of all its calls on the chosen path: from the roofs of a GPU, or measured alone on random numbers."""
        if self.decision is None:
            return None
        if self.path in self.decision.predicted:
            return sum(choice.seconds for choice in self.decision.predicted[self.path])
        return self.decision.sparse_seconds if self.path == "sparse" else self.decision.dense_seconds

    @property
    def planned_seconds(self) -> float | None:
        """What the layer will take in the model: the time measured there, if its path stays what it is."""
        stays = self.converted or self.path == "dense" or self.predicted_seconds is None
        return self.measured_seconds if stays else self.predicted_seconds

    @property
    def row(self) -> tuple[str, ...]:
        """The layer in the columns of ``ModelPlan``'s table."""
        dense, sparse = (self.decision.dense_seconds, self.decision.sparse_seconds) if self.decision else (None, None)
        times = (self.predicted_seconds, dense, sparse, self.measured_seconds)
        return (
            self.name or "(the model)",
            self.kind,
            "x".join(map(str, self.shape)),
            self._pattern(),
            "-" if self.retained is None else f"{self.retained:.4f}",
            self.order or ("unknown" if self.path == "sparse" and self.calls else "-"),
            self.path,
            self.kernel or "-",
            f"{self.dense_bytes:,}",
            f"{self.bytes:,}",
            *map(_milliseconds, times),
            self.reason,
        )

    def _pattern(self) -> str:
        """Rows of a tile x total sparsity x n:m, and the window where it cuts the columns."""
        if self.pattern is None:
            return "-"
        v, n, m, window = (getattr(self.pattern, name) for name in ("vector_size", "n", "m", "window"))
        columns = self.shape[0] if self.kind == "hf_conv1d" and not self.converted else math.prod(self.shape[1:])
        cut = f", window {window}" if len(self.pattern.runs(columns)) > 1 else ""
        return f"{v} x {self.pattern.sparsity:.1%} x {n}:{m}{cut}"


@dataclass(frozen=True)
class ModelPlan:
    """Every prunable or packed layer, in the model's order; ``str()`` is a table, ``layers`` is data.

    Args:
        layers: the plan of each.
        seconds: of one forward of the whole model as it stands, in eager mode, the layers' own times among them; None
            without inputs.
        notes: what the table cannot say.
    """

    layers: tuple[LayerPlan, ...]
    seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """Of all dense weights of the layers, a shared one counted once."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Of the same on the chosen paths."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def share(self) -> float | None:
        """Fraction of the forward that is spent in the layers."""
        return None if not self.seconds else self._measured(self.layers) / self.seconds

    @property
    def speedup(self) -> float | None:
        """By Amdahl's law, how many times as fast the whole model is if every layer takes what is planned for it."""
        if not self.seconds:
            return None
        planned = sum(layer.planned_seconds or 0.0 for layer in self.layers if layer.measured_seconds is not None)
        return self.seconds / (self.seconds - self._measured(self.layers) + planned)

    @property
    def limit(self) -> float | None:
        """The same if the sparse layers cost nothing."""
        if not self.seconds:
            return None
        return self.seconds / (self.seconds - self._measured(layer for layer in self.layers if layer.path == "sparse"))

    def to_dict(self) -> dict[str, Any]:
        """All of it as primitives, for JSON."""
        totals = ("dense_bytes", "bytes", "seconds", "share", "speedup", "limit")
        derived = ("kernel", "predicted_seconds", "planned_seconds")
        layers = [asdict(layer) | {name: getattr(layer, name) for name in derived} for layer in self.layers]
        return {"layers": layers, "notes": list(self.notes), **{name: getattr(self, name) for name in totals}}

    def __str__(self) -> str:
        totals = ("total", *[""] * 7, f"{self.dense_bytes:,}", f"{self.bytes:,}", *[""] * 5)
        rows = [COLUMNS, *(layer.row for layer in self.layers), totals]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if self.seconds:
            lines.append(
                f"One forward takes {_milliseconds(self.seconds)}, {self.share:.1%} of it in these layers. It is "
                f"{self.speedup:.2f} times as fast if they run as planned, {self.limit:.2f} times if the sparse ones "
                "cost nothing."
            )
        return "\n".join([*lines, *self.notes])

    @staticmethod
    def _measured(layers: Iterable[LayerPlan]) -> float:
        return sum(layer.measured_seconds or 0.0 for layer in layers)


COLUMNS = (
    *("layer", "kind", "shape", "pattern", "retained", "order", "path", "kernel", "bytes before", "after"),
    *("predicted", "dense alone", "sparse alone", "in the model", "why"),
)


def decide(*workloads: Workload) -> Decision:
    """Sparse where all these calls of one layer together win by more than noise, else dense."""
    times = [measure(workload) for workload in workloads]
    dense, sparse = sum(dense for dense, _ in times), sum(sparse for _, sparse in times)
    sizes = Counter("x".join(map(str, workload.input_shape)) for workload in workloads)
    calls = ", ".join(size if count == 1 else f"{count} calls of {size}" for size, count in sizes.items())
    if workloads[0].replayed:
        calls += " in a CUDA graph"
    choices = [predict(workload) for workload in workloads]
    paths = choices[0] if all(choices) and choices else {}
    predicted = {path: tuple(choice[path] for choice in choices) for path in paths}
    margin = MARGINS.get(workloads[0].device.type, MARGIN)
    return Decision("sparse" if sparse < margin * dense else "dense", calls, dense, sparse, predicted)


def predict(workload: Workload) -> dict[str, Choice]:
    """By path, the kernel on a GPU, its roof and the time that follows; empty where no kernel runs the layer."""
    device = workload.device
    if kernels.refusal(device) or refusal(workload.pattern, math.prod(workload.shape[1:]), workload.dtype):
        return {}
    gpu, call = cost.gpu_of(device), _call_of(workload)
    return {
        "sparse": cost.choose_kernel(call, kernels.shared_limit(device), gpu),
        "dense": cost.predict_dense(call, gpu),
    }


def _call_of(workload: Workload) -> cost.Call:
    shape, pattern, activated = workload.shape, workload.pattern, workload.activation != "none"
    if len(shape) == 2:
        storage = workload.feature_major, workload.feature_major_out
        return cost.Call(pattern, *shape, math.prod(workload.input_shape[:-1]), *storage, activated=activated)
    *batch, channels, height, width = workload.input_shape
    images: Any = (math.prod(batch), channels, height, width)
    spatial: Any = (shape[2:], workload.stride, workload.padding, workload.dilation)
    axes = zip((height, width), *spatial, strict=True)
    out = [(size + 2 * pad - spread * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, spread in axes]
    pointwise = shape[2:] == (1, 1) and not any(workload.padding)
    if pointwise and workload.groups == 1 and workload.channels_last:  # a linear layer
        return cost.Call(pattern, shape[0], shape[1], images[0] * math.prod(out), activated=activated)
    of_weight = (pattern, shape[0], math.prod(shape[1:]))
    return cost.convolution_call(*of_weight, images, (out[0], out[1]), *spatial, activated=activated)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f} ms"
