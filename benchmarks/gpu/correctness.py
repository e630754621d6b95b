"""Every kernel against float64 of the unpacked weight: every entry, activation and storage, on shapes with tails."""

import itertools
import math
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.weights import conv2d_operands, linear_operands
from lightning_hinm import HiNMPattern, kernels, unpack
from lightning_hinm.format import random_weight
from lightning_hinm.ops import cost, gpu, hinm_conv2d, hinm_linear
from lightning_hinm.ops.fragments import tile_rows
from lightning_hinm.ops.operands import ACTIVATIONS, LinearOperands, activate_

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
MOST_FAILURES = 20  # after so many, the rest would say nothing new
ORDERS = ("restored", "tile")


@dataclass(frozen=True)
class Matrix:
    """A weight of ``rows`` x ``columns``, and the numbers of tokens to run it on."""

    pattern: HiNMPattern
    rows: int
    columns: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Image:
    """A convolution, and the images to run it on."""

    pattern: HiNMPattern
    channels: int
    rows: int
    kernel: tuple[int, int]
    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 2


@dataclass(frozen=True)
class Table:
    """What is checked. ``hostile``: matrices that also run on inputs of every form, in graphs, streams and threads."""

    matrices: Sequence[Matrix]
    images: Sequence[Image]
    hostile: Sequence[Matrix]
    complete: bool = False  # the table claims to reach every entry, with every activation and order


TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300)
PATTERNS = [
    HiNMPattern(32, 0.5),
    HiNMPattern(32, 0.875, window=None),
    HiNMPattern(64, 0.5, window=104),
    HiNMPattern(64, 0.75, window=None),
    HiNMPattern(64, 0.0, window=64),
    HiNMPattern(96, 0.5, window=64),
    HiNMPattern(128, 0.75),
    HiNMPattern(128, 0.5, window=36),  # no multiple of 8: blocks of a cluster cannot share it out
    HiNMPattern(256, 0.875, window=128),
    HiNMPattern(256, 0.5, window=None),
]
SHAPES = [(32, 64), (70, 150), (300, 37), (257, 1000), (1030, 1300), (512, 2048)]
LARGE = [
    Matrix(HiNMPattern(64, 0.5), 3072, 768, (512,)),
    Matrix(HiNMPattern(64, 0.75), 4096, 11008, (1, 16, 300)),
    Matrix(HiNMPattern(128, 0.5, window=None), 11008, 4096, (1, 16, 300)),
]
IMAGES = [
    Image(HiNMPattern(64, 0.5), 64, 64, (3, 3), (14, 14), padding=(1, 1)),
    Image(HiNMPattern(32, 0.75, window=None), 16, 96, (3, 3), (15, 13), (2, 2), (1, 1)),
    Image(HiNMPattern(32, 0.5), 32, 64, (3, 2), (15, 13), (3, 2), (0, 2), (2, 2), groups=2),
    Image(HiNMPattern(64, 0.5), 32, 256, (3, 3), (9, 17), padding=(2, 2), dilation=(2, 2), groups=4),
    Image(HiNMPattern(32, 0.5), 40, 64, (1, 1), (8, 8), batch=3),
    Image(HiNMPattern(128, 0.5, window=None), 40, 130, (1, 1), (7, 7), batch=3),
    Image(HiNMPattern(32, 0.5), 40, 64, (1, 1), (8, 8), (2, 2)),
    Image(HiNMPattern(32, 0.5), 3, 64, (7, 7), (37, 40), (2, 2), (3, 3)),
    Image(HiNMPattern(96, 0.5), 8, 96, (2, 2), (9, 9), (3, 3)),
    Image(HiNMPattern(256, 0.75, window=None), 128, 256, (3, 3), (7, 7), padding=(1, 1), batch=5),
]
HOSTILE = [
    Matrix(HiNMPattern(64, 0.5, window=64), 200, 328, (5, 130)),
    Matrix(HiNMPattern(32, 0.75, window=None), 70, 150, (16, 65)),
]
FULL = Table([*itertools.starmap(Matrix, ((p, *s, TOKENS) for p in PATTERNS for s in SHAPES)), *LARGE], IMAGES, HOSTILE,
             complete=True)  # fmt: skip
# For tools that slow a kernel down a hundredfold.
SUBSET = Table(
    [
        Matrix(HiNMPattern(32, 0.5, window=64), 70, 300, (3, 17, 140)),
        Matrix(HiNMPattern(64, 0.5, window=104), 300, 470, (16, 70)),
        Matrix(HiNMPattern(128, 0.75, window=None), 130, 150, (9, 130)),
        Matrix(HiNMPattern(32, 0.875, window=None), 40, 1590, (3,)),  # more columns than one block unpacks
    ],
    [IMAGES[1], IMAGES[5]],
    [],
)


@dataclass
class Findings:
    """What was seen: launches of each entry, the worst error of each dtype, and all that was wrong or failed."""

    checks: int = 0
    launched: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    met: set[tuple[str, str, str]] = field(default_factory=set)  # entry, activation, order
    left_out: list[str] = field(default_factory=list)  # entries that this GPU has not

    def compare(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Counts a result, and keeps its error; a NaN is an error without bounds."""
        self.checks += 1
        found = found.to(expected.device)
        error = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))
        error = float("inf") if error != error else error
        dtype = str(found.dtype).removeprefix("torch.")
        self.worst[dtype] = max(self.worst.get(dtype, 0.0), error)
        if found.shape != expected.shape or not error < TOLERANCES[found.dtype]:
            self.wrong.append(f"{name}: relative error {error:.2e}, shape {list(found.shape)}")

    def expect(self, name: str, holds: bool) -> None:
        """Counts a claim."""
        self.checks += 1
        if not holds:
            self.wrong.append(name)

    @property
    def record(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "checks": self.checks,
            "worst": self.worst,
            "wrong": self.wrong,
            "failed": self.failed,
            "launched": dict(sorted(self.launched.items())),
            "left_out": self.left_out,
        }


class Checker:
    """Runs tables on a device.

    Args:
        device: where the kernels run.
        home: where weights are packed and references computed; the CPU leaves nothing but the kernels on the GPU.
    """

    def __init__(self, device: torch.device, home: torch.device) -> None:
        lacks_clusters = cost.gpu_of(device).gpc < cost.CLUSTER
        left_out = [name for name, entry in kernels.entries().items() if entry.cluster > 1 and lacks_clusters]
        self.device, self.home, self.findings = device, home, Findings(left_out=left_out)
        self.generator = torch.Generator(home).manual_seed(0)
        self.turns: Counter[tuple[str, torch.dtype]] = Counter()

    def run(self, table: Table) -> Findings:
        """Every check of a table; one that raises is noted, and the others go on."""
        checks: list[tuple[Callable[..., None], Any]] = []
        checks += [(self._check_matrix, matrix) for matrix in table.matrices]
        checks += [(self._check_image, image) for image in table.images]
        for check in (self._check_forms, self._check_surroundings):
            checks += [(check, matrix) for matrix in table.hostile]
        with _launches(self.findings), torch.inference_mode():
            for check, subject in checks:
                for dtype in TOLERANCES:
                    if len(self.findings.wrong) + len(self.findings.failed) >= MOST_FAILURES:
                        return self.findings
                    try:
                        check(subject, dtype)
                    except Exception:
                        self.findings.failed.append(f"{subject}, {dtype}: {traceback.format_exc(limit=-3)}")
        if table.complete:
            self._check_coverage()
        return self.findings

    # -------------------------------------------------------------------------------------------------------- tables

    def _check_matrix(self, matrix: Matrix, dtype: torch.dtype) -> None:
        weights = {order: self._weight(matrix, dtype, order) for order in ORDERS}
        bias = self._randn(matrix.rows, dtype=dtype)
        here_bias = bias.to(self.device)
        for n in matrix.tokens:
            x = self._randn(n, matrix.columns, dtype=dtype)
            exact = {order: F.linear(x.double(), dense) for order, (_, dense) in weights.items()}
            here = x.to(self.device)
            for choice, features in self._ways(matrix, n):
                entry = entry_of(choice, matrix.pattern, dtype)
                activation, order, biased = self._turn(entry, dtype)
                own = weights[order][0]._replace(bias=here_bias if biased else None, activation=activation)
                name = f"{matrix}, {n} tokens, {dtype}, {entry}, {activation}, {order}"
                expected = activate_(exact[order] + (bias.double() if biased else 0.0), activation)
                stored = _feature_major(here) if features else here
                found, again = (self._run(stored, own, choice).to(self.home) for _ in range(2))
                self.findings.compare(name, found, expected)
                self.findings.expect(f"{name}: not the same twice", found.equal(again))
        operands, dense = weights["restored"]
        for size in ((0, matrix.columns), (matrix.columns,), (2, 3, matrix.columns)):  # as the op is called
            x = self._randn(*size, dtype=dtype)
            found = hinm_linear(x.to(self.device), *operands)
            self.findings.expect(f"{matrix}: shape for {size}", found.shape == (*size[:-1], matrix.rows))
            self.findings.compare(f"{matrix}, {dtype}, {size}", found, F.linear(x.double(), dense))

    def _check_image(self, image: Image, dtype: torch.dtype) -> None:
        shape = image.rows, image.channels // image.groups, *image.kernel
        packed = random_weight(shape, image.pattern, dtype, self.generator, groups=image.groups)
        spatial: dict[str, Any] = {"stride": image.stride, "padding": image.padding, "dilation": image.dilation}
        dense, bias = unpack(packed).double(), self._randn(image.rows, dtype=dtype)
        x = self._randn(image.batch, image.channels, *image.size, dtype=dtype)
        exact = F.conv2d(x.double(), dense, bias.double(), **spatial, groups=image.groups)
        here = x.to(self.device)
        forms = {"contiguous": here, "channels last": here.contiguous(memory_format=torch.channels_last),
                 "misaligned": _misaligned(here), "one image": here[0]}  # fmt: skip
        operands = conv2d_operands(packed, bias.to(self.device), **spatial, groups=image.groups, device=self.device)
        size, columns = (exact.shape[2], exact.shape[3]), image.channels // image.groups * math.prod(image.kernel)
        geometry = image.kernel, image.stride, image.padding, image.dilation
        images = (image.batch, image.channels, *image.size)
        call = cost.convolution_call(image.pattern, image.rows, columns, images, size, *geometry)
        choices = cost.list_kernels(call, kernels.shared_limit(self.device), cost.gpu_of(self.device))
        activations = itertools.cycle(ACTIVATIONS)
        for form, choice in itertools.product(forms, choices):
            activation = next(activations)
            own = operands._replace(activation=activation)
            found = gpu.run_conv2d(forms[form], own, size, choice)
            expected = activate_(exact[0 if form == "one image" else ...].clone(), activation)
            self.findings.compare(f"{image}, {dtype}, {choice.kernel}, {form}, {activation}", found, expected)
        found = hinm_conv2d(here, *operands)
        self.findings.compare(f"{image}, {dtype}, op", found, exact)

    def _check_forms(self, matrix: Matrix, dtype: torch.dtype) -> None:
        """Inputs of every stride and alignment, on every kernel."""
        operands, dense = self._weight(matrix, dtype, "restored")
        for n in matrix.tokens:
            for form, x in _forms(self._randn(n, matrix.columns, dtype=dtype).to(self.device)).items():
                expected = F.linear(x.to(self.home).double(), dense)
                for choice in self._choices(matrix, n):
                    name = f"{matrix}, {n} tokens, {dtype}, {choice.kernel}_{choice.tokens}, {form}"
                    self.findings.compare(name, self._run(x, operands, choice), expected)
                self.findings.compare(f"{matrix}, {dtype}, op, {form}", hinm_linear(x, *operands), expected)

    def _check_surroundings(self, matrix: Matrix, dtype: torch.dtype) -> None:
        """Another thread; on a GPU also another stream, and a graph that is replayed on new numbers."""
        operands, dense = self._weight(matrix, dtype, "restored")
        for n in matrix.tokens:
            x = self._randn(n, matrix.columns, dtype=dtype)
            here, expected = x.to(self.device), F.linear(x.double(), dense)
            for choice in self._choices(matrix, n):
                name = f"{matrix}, {n} tokens, {dtype}, {choice.kernel}_{choice.tokens}"
                for where, found in self._elsewhere(here, operands, choice):
                    self.findings.compare(f"{name}, {where}", found, expected)

    def _elsewhere(self, x: Tensor, operands: LinearOperands, choice: cost.Choice) -> Iterator[tuple[str, Tensor]]:
        results: list[Tensor] = []

        def work() -> None:
            with torch.inference_mode():  # a thread has its own
                results.append(self._run(x, operands, choice))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        yield "in a thread", results[0]
        if self.device.type != "cuda":
            return
        stream, late = torch.cuda.Stream(self.device), torch.full_like(x, float("nan"))
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # a launch on any other stream would read the NaN
            late.copy_(x)
            found = self._run(late, operands, choice)
        stream.synchronize()
        yield "on a stream", found
        kernels.prepare(self.device)
        static, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self._run(static, operands, choice)
        static.copy_(x)
        graph.replay()
        torch.cuda.synchronize(self.device)
        yield "in a graph", found.clone()

    def _check_coverage(self) -> None:
        entries = set(kernels.entries()) - set(self.findings.left_out)
        linear = {name for name in entries if name not in ("transpose", "planes")}
        missing = sorted(entries - set(self.findings.launched))
        missing += [f"{entry} with {activation}, {order}" for entry, activation, order
                    in sorted(set(itertools.product(linear, ACTIVATIONS, ORDERS)) - self.findings.met)]  # fmt: skip
        if missing:
            self.findings.failed.append(f"the table did not reach {', '.join(missing)}")

    # --------------------------------------------------------------------------------------------------------- parts

    def _weight(self, matrix: Matrix, dtype: torch.dtype, order: str) -> tuple[LinearOperands, Tensor]:
        """The op's operands, on the device; dense, in float64, at home."""
        shape, restored = (matrix.rows, matrix.columns), order == "restored"
        packed = random_weight(shape, matrix.pattern, dtype, self.generator, restored=restored)
        return linear_operands(packed, device=self.device), unpack(packed).double()

    def _choices(self, matrix: Matrix, tokens: int) -> list[cost.Choice]:
        return [choice for choice, features in self._ways(matrix, tokens) if not features]

    def _ways(self, matrix: Matrix, tokens: int) -> list[tuple[cost.Choice, bool]]:
        """Every kernel, on row-major input; and the gather kernel, which reads feature-major input as it lies."""
        call = cost.Call(matrix.pattern, matrix.rows, matrix.columns, tokens)
        about = kernels.shared_limit(self.device), cost.gpu_of(self.device)
        ways = [(choice, False) for choice in cost.list_kernels(call, *about)]
        if tokens not in (matrix.tokens[0], matrix.tokens[-1]):  # an unpacked weight knows nothing of tokens
            ways = [(choice, features) for choice, features in ways if choice.kernel != "unpack"]
        other = cost.list_kernels(replace(call, feature_major=True), *about)
        return ways + [(choice, True) for choice in other if choice.kernel == "gather"]

    def _turn(self, entry: str, dtype: torch.dtype) -> tuple[str, str, bool]:
        """An activation, an order and whether with a bias: each entry goes through all of them, call by call."""
        turn = self.turns[entry, dtype]
        self.turns[entry, dtype] += 1
        activation, order = list(ACTIVATIONS)[turn % 5], ORDERS[turn // 5 % 2]
        self.findings.met.add((entry, activation, order))
        return activation, order, turn % 3 > 0

    def _run(self, x: Tensor, operands: LinearOperands, choice: cost.Choice) -> Tensor:
        out = x.new_full((len(x), operands.output_order.shape[0]), float("nan"))
        gpu.run_linear(x, out, operands, choice)
        return out

    def _randn(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.home, dtype=dtype)


def entry_of(choice: cost.Choice, pattern: HiNMPattern, dtype: torch.dtype) -> str:
    """The entry that a choice launches on a weight of that pattern."""
    short, height = gpu.SHORT[dtype], tile_rows(pattern)
    if choice.kernel in ("unpack", "gather"):
        return "unpack" if choice.kernel == "unpack" else f"gather_{short}_{height}"
    return f"{choice.kernel}_{short}_{32 if choice.kernel == 'decode' else min(height, 64)}_{choice.tokens}"


def _feature_major(x: Tensor) -> Tensor:
    """The same tokens, each feature a row that starts on a boundary of 16 bytes."""
    # Without contiguous, nothing to pad would leave the rows of tokens as they are.
    return F.pad(x.t().contiguous(), (0, -len(x) % 8), value=float("nan"))[:, : len(x)].t()


@contextmanager
def _launches(findings: Findings) -> Iterator[None]:
    """Counts what is launched."""
    launch = kernels.launch

    def count(entry: str, *arguments: Any) -> None:
        findings.launched[entry] += 1
        launch(entry, *arguments)

    kernels.launch = count
    try:
        yield
    finally:
        kernels.launch = launch


def _misaligned(x: Tensor) -> Tensor:
    """The same numbers, contiguous, from an odd address on."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _forms(x: Tensor) -> dict[str, Tensor]:
    """The same ``[N, I]`` with other strides and addresses; the last one has other numbers."""
    n, columns = x.shape
    return {
        "rows 8 apart": F.pad(x, (0, 8))[:, :columns],
        "rows 3 apart": F.pad(x, (0, 3))[:, :columns],
        "misaligned": _misaligned(x),
        "every second column": x.repeat_interleave(2, dim=1)[:, ::2],
        "every second row": x.repeat_interleave(2, dim=0)[::2],
        "feature-major": x.t().contiguous().t(),
        "feature-major, rows apart": F.pad(x.t(), (0, 8 - n % 8))[:, :n].t(),
        "feature-major, misaligned": _misaligned(x.t().contiguous()).t(),
        "one row for all": x[:1].expand(n, columns),
    }
