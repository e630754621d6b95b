"""A device on which the shipped kernels run in the interpreter: CPU tensors, behind the launcher's own interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lightning_hinm import kernels
from lightning_hinm.ops import cost
from lightning_hinm.ops.figures import estimate

from .program import Program
from .report import Report

SHARED_LIMIT = 227 * 1024  # an H100's


@dataclass
class Emulator:
    """What was launched, and how.

    Args:
        ordered: run the texts for compute capability 10 and up.
        clusters: whether blocks share their input; not where ``ordered``.
        schedule: of the interpreter.
        seed: of the order of warps.
        texts: replacements of shipped texts, by their file's name.
    """

    ordered: bool = False
    clusters: bool = True
    schedule: str = "lockstep"
    seed: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    launched: list[str] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def launch(self, name: str, *arguments: Tensor | float | None) -> None:
        """``kernels.launch`` for CPU tensors: same entries, same manifest, same order of arguments."""
        entry = kernels.entries()[name]
        assert len(arguments) == len(entry.parameters), f"{name} takes {[p.name for p in entry.parameters]}"
        sizes: dict[str, Any] = {}
        for parameter, argument in zip(entry.parameters, arguments, strict=True):
            if parameter.type == "pointer":
                assert argument is None or isinstance(argument, Tensor), f"{name}: {parameter.name} is {argument}"
                assert argument is None or argument.data_ptr() % parameter.alignment == 0, f"{name}: {parameter.name}"
            else:
                assert isinstance(argument, int), f"{name}: {parameter.name} is {argument}"
                sizes[parameter.name] = argument
        grid, shared = entry.grid(sizes), entry.shared_bytes(sizes)
        if 0 in grid:
            return
        assert all(size <= most for size, most in zip(grid, kernels.GRID_LIMITS, strict=True)), f"{name}: {grid}"
        program = self._program(entry.kernel)
        assert shared + program.entries[name].shared_bytes <= SHARED_LIMIT, f"{name}: {shared} bytes of shared memory"
        self.launched.append(name)
        block = (entry.block, 1, 1)
        settings: dict[str, Any] = {"schedule": self.schedule, "seed": self.seed}
        report = program.run(name, arguments, grid=grid, block=block, shared=shared, **settings)
        self.reports.append(report)

    def _program(self, kernel: str) -> Program:
        ordered = f"{kernel}.ordered.ptx"
        file = ordered if self.ordered and (kernels.FOLDER / ordered).exists() else f"{kernel}.ptx"
        return parse(self.texts[file]) if file in self.texts else shipped(file)


@cache
def shipped(file: str) -> Program:
    """A text of the package, parsed."""
    return parse((kernels.FOLDER / file).read_text())


@cache
def parse(text: str) -> Program:
    return Program(text)


@contextmanager
def emulated(**settings: Any) -> Iterator[Emulator]:
    """CPU tensors run on the kernels, in the interpreter: layers packed inside hold fragments, ops launch."""
    emulator = Emulator(**settings)
    figures = estimate((9, 0))
    if emulator.ordered or not emulator.clusters:
        figures = replace(figures, gpc=0)
    with (
        mock.patch.object(kernels, "refusal", return_value=None),
        mock.patch.object(kernels, "shared_limit", return_value=SHARED_LIMIT),
        mock.patch.object(kernels, "launch", emulator.launch),
        mock.patch.object(cost, "gpu_of", return_value=figures),
    ):
        yield emulator


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float64."""
    found, expected = found.to(torch.float64), expected.to(torch.float64)
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
