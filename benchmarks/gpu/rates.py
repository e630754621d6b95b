"""What bounds the kernels on this GPU: memory, L2, tensor cores and launches, as ``ops.figures.GPUS`` wants them."""

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.clock import Call, Clock, Machine, eager_pass
from benchmarks.gpu.weights import fragments_of, linear_operands
from lightning_hinm import HiNMPattern, kernels, unpack
from lightning_hinm.format import random_weight
from lightning_hinm.ops import cost, gpu, hinm_linear
from lightning_hinm.ops.operands import LinearOperands
from lightning_hinm.ops.tune import COPIED, SIDE, measure_gpu

Numbers = dict[str, Any]
PROBE = Path(__file__).with_name("probe.cu")
SECONDS = 0.3  # of each measurement
LAUNCHES = 1000
MEASUREMENTS = ("memory", "dense", "gather", "sparse", "transpose", "launch", "tune", "cusparselt", "probe")


class Rates:
    """The measurements, on one machine; ``scale`` divides their sizes where the kernels are emulated."""

    def __init__(self, machine: Machine, clock: Clock, scale: int = 1) -> None:
        self.machine, self.clock, self.scale = machine, clock, scale
        self.device = machine.device
        self.generator = torch.Generator(self.device).manual_seed(0)

    def all(self, keep: Callable[[str, Numbers], None]) -> list[str]:
        """Every measurement, each handed to ``keep`` with its name; what failed comes back, in words."""
        failures = []
        for name in MEASUREMENTS:
            try:
                numbers = getattr(self, name)()
                keep(name, numbers)
                if "failed" in numbers:  # a part of it
                    failures.append(f"{name}: {numbers['failed']}")
            except Exception as error:  # one that fails must not cost the others
                failures.append(f"{name}: {type(error).__name__}: {error}")
                keep(name, {"failed": failures[-1]})
        return failures

    def memory(self) -> Numbers:
        """Bytes a second that a kernel reads and writes."""
        numbers = self._randn(self._scaled(2**29))
        # Not copy_: captured, it is the driver's memcpy, which may use two thirds of the memory (NVIDIA/cccl#1672).
        negated = partial(torch.neg, numbers, out=torch.empty_like(numbers))
        return {"copy": 2 * numbers.nbytes / self._seconds(negated)}

    def dense(self) -> Numbers:
        """FLOP a second of the BLAS in bfloat16, on random numbers."""
        rates = {}
        for size in (4096, 8192):
            rows = self._scaled(size)
            a, b = self._randn(rows, rows), self._randn(rows, rows)
            rates[str(size)] = 2 * rows**3 / self._seconds(partial(torch.mm, a, b))
        return rates

    def gather(self) -> Numbers:
        """Bytes a second that the gather kernel brings from L2, by the height of a tile.

        A tile for each multiprocessor and an input that L2 holds: every block gathers its own rows of 256 bytes.
        """
        columns, tokens = self._scaled(4096), self._scaled(2048)
        found: Numbers = {}
        for v in (32, 64, 128):
            rows = v * max(self.machine.gpu.multiprocessors // self.scale, 2)
            seconds, operands = self._bare_gather(rows, columns, tokens, HiNMPattern(v, 0.5, window=None))
            values, metadata, index, _ = fragments_of(operands)
            weight, kept = values.nbytes + metadata.nbytes + index.nbytes, index.shape[1]
            blocks = math.ceil(tokens / cost.GATHER_TOKENS)
            rowwise = blocks * (rows // v) * kept * cost.GATHER_TOKENS * 2
            found[str(v)] = {"gathered": rowwise / seconds, "with_weight": (rowwise + blocks * weight) / seconds,
                             "sparse": rows * kept * tokens / seconds}  # fmt: skip
        return found

    def sparse(self) -> Numbers:
        """FLOP a second on non-zeros of each kernel, where input and weight stay in L2 and the weight is not gathered
        thinner than 2:4: as near as they come to the rate of ``mma.sp``.
        """
        rows, columns, tokens = self._scaled(4096), self._scaled(1024), self._scaled(8192)
        pattern, rates = HiNMPattern(128, 0.0, window=256), {}
        packed = random_weight((rows, columns), pattern, torch.bfloat16, self.generator, restored=False)
        operands, x = linear_operands(packed), self._randn(columns, tokens).t()
        out, call = x.new_empty(rows, tokens).t(), replace(self._call(operands, x), feature_major=True)
        for choice in cost.list_kernels(call, self.machine.shared_limit, self.machine.gpu):
            if choice.kernel != "unpack":
                seconds = self._seconds(partial(gpu.run_linear, x, out, operands, choice))
                rates[f"{choice.kernel}_{choice.tokens}"] = rows * columns * tokens / seconds
        return rates

    def transpose(self) -> Numbers:
        """Bytes a second that the transposes read and write."""
        x = self._randn(self._scaled(8192), self._scaled(4096))
        turned, back = x.new_empty(x.shape[1], x.shape[0]), torch.empty_like(x)
        into = self._seconds(partial(gpu._turn, x, turned))
        return {"into": 2 * x.nbytes / into, "out": 2 * x.nbytes / self._seconds(partial(gpu._turn, turned, back))}

    def launch(self) -> Numbers:
        """Seconds of the smallest layer: of the host, a call after the other; of the GPU, inside a graph."""
        packed = random_weight((32, 64), HiNMPattern(32, 0.5), torch.bfloat16, self.generator)
        operands, x = linear_operands(packed), self._randn(1, 64)
        out, dense = x.new_empty(1, 32), self._randn(32, 64)
        choice = cost.choose_kernel(self._call(operands, x), self.machine.shared_limit, self.machine.gpu)
        calls: dict[str, Call] = {
            "op": partial(hinm_linear, x, *operands),
            "kernel": partial(gpu.run_linear, x, out, operands, choice),
            "dense": partial(F.linear, x, dense),
        }
        count = max(LAUNCHES // self.scale, 2)
        found: Numbers = {"choice": f"{choice.kernel}_{choice.tokens}"}
        for name, call in calls.items():
            many = [call] * count
            host = self.clock.in_turn({name: eager_pass(many)}, 0.0, eager=True)[name].seconds
            self.clock.synchronize()
            start = time.perf_counter()
            eager_pass(many).run()
            queued = (time.perf_counter() - start) / count
            found[name] = {"host": queued, "eager": host, "graph": self._seconds(call, copies=count)}
        return found

    def tune(self) -> Numbers:
        """What the library measures for its planner: rates that predict its kernels, below the peaks."""
        if self.clock.on_gpu:
            return asdict(measure_gpu(self.device))
        sizes = {"side": self._scaled(SIDE), "copied": self._scaled(COPIED)}
        return asdict(measure_gpu(self.device, seconds=self._seconds, **sizes))

    def cusparselt(self) -> Numbers:
        """Whether torch's cuSPARSELt runs at all, and inside a graph: in a process of its own step, since a capture
        that fails leaves torch's allocator in a state that later steps should not start from.
        """
        from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

        x = self._randn(64, 128)
        pattern = HiNMPattern(128, 0.0, window=None)
        packed = random_weight((128, 128), pattern, torch.bfloat16, self.generator, permuted=False, restored=False)
        weight = SparseSemiStructuredTensorCUSPARSELT.from_dense(unpack(packed))
        F.linear(x, weight)
        self.clock.synchronize()
        try:
            return {"version": torch.backends.cusparselt.version(), "captured": True,
                    "graph": self._seconds(partial(F.linear, x, weight))}  # fmt: skip
        except RuntimeError as error:
            return {"version": torch.backends.cusparselt.version(), "captured": False, "failed": str(error)}

    def probe(self) -> Numbers:
        """``probe.cu``, part by part: FLOP a second of the tensor cores alone, bytes a second gathered from L2."""
        if not self.clock.on_gpu:
            return {"skipped": "needs a GPU"}
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if nvcc is None:
            return {"skipped": "needs nvcc on the PATH or in /usr/local/cuda"}
        capability = torch.cuda.get_device_capability(self.device)
        parts = {
            "mma": (True, ""),
            "tma": (capability >= (9, 0), "9.0 or more"),
            "bulk": (capability == (9, 0), "9.0"),
            "wgmma": (capability == (9, 0), "9.0"),
        }
        found: Numbers = {}
        failed = []
        with TemporaryDirectory() as folder:
            program = str(Path(folder) / "probe")
            _run(nvcc, *probe_flags(capability), "-o", program, str(PROBE))
            for part, (is_there, needed) in parts.items():
                if not is_there:
                    found[part] = {"skipped": f"needs compute capability {needed}"}
                    continue
                try:
                    found |= json.loads(_run(program, part, timeout=15))
                except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                    failed.append(f"{part}: {error}")
        return found | ({"failed": "; ".join(failed)} if failed else {})

    def _bare_gather(self, rows: int, columns: int, tokens: int, pattern: HiNMPattern) -> tuple[float, LinearOperands]:
        """Seconds of the gather kernel alone, between feature-major tensors."""
        packed = random_weight((rows, columns), pattern, torch.bfloat16, self.generator)
        operands, x = linear_operands(packed), self._randn(columns, tokens)
        out = x.new_empty(rows, tokens)
        image = gpu.Image(tokens, tokens, columns)
        return self._seconds(partial(gpu._launch_gather, x, out, operands, image)), operands

    def _scaled(self, size: int) -> int:
        return max(size // self.scale, 32)

    def _call(self, operands: Any, x: torch.Tensor) -> cost.Call:
        return cost.Call(gpu.pattern_of(operands), operands.output_order.shape[0], operands.in_features, len(x))

    def _randn(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, device=self.device, dtype=torch.bfloat16)

    def _seconds(self, call: Call, copies: int = 4) -> float:
        self.clock.renew()
        one = self.clock.capture([call] * (copies if self.clock.on_gpu else 1))
        return self.clock.in_turn({"": one}, SECONDS / self.scale)[""].seconds


def peaks_of(measured: Numbers, machine: Machine, name: str) -> cost.Gpu:
    """The peaks as a row of ``ops.figures.GPUS``; what was not measured stays as it was estimated."""
    estimate, probe = machine.gpu, measured.get("probe", {})

    def first(*values: float | None) -> float:
        return next(value for value in values if value)

    gather = measured.get("gather", {})
    kernels_of_l2 = [part["with_weight"] for part in gather.values() if isinstance(part, dict)]
    rates = [value for key, value in measured.get("sparse", {}).items() if key != "failed"]
    dense = [value for key, value in measured.get("dense", {}).items() if key != "failed"]
    return cost.Gpu(
        name,
        _round(first(measured.get("memory", {}).get("copy"), estimate.memory)),
        _round(first(probe.get("l2_rows_256"), max(kernels_of_l2, default=None), estimate.l2)),
        _round(first(probe.get("mma_sp"), max(rates, default=None), estimate.sparse)),
        _round(first(max(dense, default=None), estimate.dense)),
        estimate.multiprocessors if machine.device.type != "cuda" else _multiprocessors(machine.device),
        _round(first(measured.get("launch", {}).get("kernel", {}).get("graph"), estimate.launch)),
        gpc=estimate.gpc,
        measured=True,
    )


def print_row(row: cost.Gpu, capability: Sequence[int]) -> str:
    """The row as Python: what to paste into the table."""
    numbers = f"{row.memory:.3g}, {row.l2:.3g}, {row.sparse:.3g}, {row.dense:.3g}, {row.multiprocessors}, {row.launch}"
    gpc = f", gpc={row.gpc}" if row.gpc else ""
    return f'({capability[0]}, {capability[1]}): Gpu("{row.name}", {numbers}{gpc}, measured=True),'


def probe_flags(capability: tuple[int, int]) -> list[str]:
    """Of nvcc for ``probe.cu``: wgmma is of sm_90a alone, and from 10.0 on mma.sp wants ordered metadata."""
    architecture = "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"
    return ["-O3", "-std=c++17", f"-arch={architecture}", *(["-DORDERED"] if capability >= (10, 0) else [])]


def prepare(device: torch.device) -> None:
    """Loads the kernels before anything is captured; nothing to do where they are emulated."""
    if device.type == "cuda":
        kernels.prepare(device)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _round(number: float) -> float:
    return float(f"{number:.3g}")


def _run(*command: str, timeout: float = 60) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)  # noqa: S603
    if result.returncode:
        raise RuntimeError(f"{command[0]}: {(result.stderr or result.stdout).strip()[-2000:]}")
    return result.stdout
