"""What bounds kernels on each GPU: estimates, or what was measured on it (``tune``).

What was measured is kept in a file that only the user may write, below ``~/.cache/lightning-hinm/gpus``, for each kind
of GPU and version of the package; the environment variable ``LIGHTNING_HINM_GPUS`` names another folder, or is ``off``.
A file that makes no sense, or that others may write, is passed over, and that is said once.
"""

import functools
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_hinm import cache
from lightning_hinm.ops.operands import warn_once

SWITCH = "LIGHTNING_HINM_GPUS"


@dataclass(frozen=True)
class Gpu:
    """What bounds a kernel.

    Args:
        name: for messages.
        memory: bytes a second from its memory.
        l2: bytes a second from its L2 cache to all multiprocessors.
        sparse: FLOP a second of ``mma.sp``, counted on non-zeros.
        dense: FLOP a second of its BLAS.
        multiprocessors: how many blocks run at once, if each has one to itself.
        launch: seconds that a kernel takes besides.
        gpc: multiprocessors of the least of its processing clusters, in one of which the blocks of a cluster lie; 0
            where no kernel has clusters of blocks.
        measured: whether these were measured, or are estimates from data sheets.
    """

    name: str
    memory: float
    l2: float
    sparse: float
    dense: float
    multiprocessors: int
    launch: float = 2e-6
    gpc: int = 0
    measured: bool = False


# By compute capability: a newer one that is missing takes the last before it. Estimates, but for an H200's, which are
# within a tenth of benchmarks/results/gpu-nvidia-h200.json; an H100 has a slower memory.
GPUS = {
    (8, 0): Gpu("A100", 1.4e12, 4.5e12, 300e12, 270e12, 108),
    (8, 6): Gpu("RTX 30", 0.85e12, 2.2e12, 68e12, 68e12, 82),
    (8, 9): Gpu("RTX 40", 0.9e12, 4.5e12, 150e12, 150e12, 128),
    (9, 0): Gpu("H200", 4.18e12, 7.8e12, 231e12, 742e12, 132, 1.8e-6, gpc=16, measured=True),
    (10, 0): Gpu("B200", 7.0e12, 10e12, 440e12, 1600e12, 148),
    (12, 0): Gpu("RTX 50", 1.5e12, 5.0e12, 200e12, 200e12, 170),
}


def gpu_of(device: torch.device) -> Gpu:
    """The figures of a CUDA device: measured ones if there are any, else those of the table."""
    measured = load_gpu(torch.cuda.get_device_name(device))
    return measured or estimate(torch.cuda.get_device_capability(device))


def estimate(capability: tuple[int, int]) -> Gpu:
    """The row of the table for a compute capability."""
    return GPUS[max((known for known in GPUS if known <= capability), default=min(GPUS))]


def save_gpu(found: Gpu, device_name: str) -> Path | None:
    """Keeps the figures for that kind of GPU, atomically; None if keeping them is switched off.

    Raises:
        OSError: if the disk does not take them, or others may write in their folder.
    """
    path = _path(device_name)
    if path is None:
        return None
    if path.parent.exists() and not cache.is_private(path.parent):
        raise PermissionError(
            f"{path.parent}: others than you may write there, but figures are kept in a folder of your own only. Run "
            f"chmod go-w on it, or name another one in {SWITCH}."
        )
    cache.write(path, json.dumps(asdict(found), indent=1).encode())
    load_gpu.cache_clear()
    return path


@functools.cache
def load_gpu(device_name: str) -> Gpu | None:
    """The figures that were measured for that kind of GPU, checked; None if there are none that make sense."""
    path = _path(device_name)
    if path is None or not path.is_file():
        return None
    try:
        if not (cache.is_private(path) and cache.is_private(path.parent)):
            raise ValueError("others than you may write it, or in its folder")
        given = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict) or given.keys() != {field.name for field in fields(Gpu)}:
            raise ValueError("its fields are not those of this version")
        for name, value in given.items():
            if not _makes_sense(name, value):
                raise ValueError(f"{name}={str(value)[:50]!r} makes no sense")
    except (OSError, ValueError, RecursionError) as error:
        warn_once(f"{path}: {error}, so kernels are chosen by estimates. Run python -m lightning_hinm tune again.")
        return None
    return Gpu(**given)


def _makes_sense(name: str, value: Any) -> bool:
    if name == "name":
        return isinstance(value, str) and value != ""
    if name == "measured":
        return value is True
    if name == "gpc":
        return type(value) is int and 0 <= value < 1 << 10
    kinds = (int,) if name == "multiprocessors" else (int, float)
    try:
        return type(value) in kinds and 0 < float(value) < math.inf
    except OverflowError:
        return False


def _path(device_name: str) -> Path | None:
    place = cache.folder("gpus", SWITCH)
    if place is None:
        return None
    try:
        release = version("lightning-hinm")
    except PackageNotFoundError:  # run from its source
        release = "source"
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-")
    return place / f"{name}-{release}.json"
