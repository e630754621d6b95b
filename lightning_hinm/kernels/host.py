"""The product on a CPU: one source, ``host.cpp``, compiled on the user's machine when it is first needed.

It takes a C++ compiler with OpenMP: the one that ``CXX`` names, else ``c++``, ``g++`` or ``clang++``. What it made is
kept in a folder that only the user may write, below ``~/.cache/lightning-hinm/host``; the environment variable
``LIGHTNING_HINM_HOST`` names another one, or is ``off``: then nothing is compiled.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hinm import cache

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
SWITCH = "LIGHTNING_HINM_HOST"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
# What torch itself found the processor to be able to do. Not -march=native: a home may be shared by many machines.
MACHINES = {"AVX512": ("-march=x86-64-v4",), "AVX2": ("-march=x86-64-v3",)}
SECONDS = 300  # a compiler that takes longer hangs
ENTRIES = {torch.float32: "hinm_float32", torch.bfloat16: "hinm_bfloat16"}
HELD = 64  # kept vectors that a tile gathers at a time (host.cpp)
POSITIONS = 256  # that a byte can name
_pack = struct.Struct("=7Q20q").pack  # the fields of Call in host.cpp
_process = os.getpid()  # OpenMP's threads do not survive a fork: a child that asked for them would wait for ever


def held(m: int) -> int:
    """How many kept vectors a tile gathers at a time, whole groups of ``m``; 0 if a byte cannot number them."""
    return max(HELD // m, 1) * m if m <= POSITIONS else 0


def is_off() -> bool:
    """Whether the user wants nothing to be compiled."""
    return os.environ.get(SWITCH, "").lower() == "off"


def refusal() -> str | None:
    """None if the product is compiled, which the first call sees to; else why not, without a full stop."""
    if is_off():
        return f"{SWITCH} is off"
    found = _library()
    return found if isinstance(found, str) else None


def launch(*arguments: Tensor | int | None) -> None:
    """One product, on as many threads as torch uses.

    Args:
        arguments: the fields of ``Call`` in ``host.cpp`` but the last, in their order; None is the null pointer. Of the
            first one is the dtype, which is one of ``ENTRIES``. Shapes, dtypes and strides are the caller's to check.

    Raises:
        RuntimeError: with ``refusal``'s reason.
        IndexError: if a column or a row is out of range.
        MemoryError: if there is no memory to work in.
    """
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    numbers: list[Any] = [each.data_ptr() if isinstance(each, Tensor) else each or 0 for each in arguments]
    x: Any = arguments[0]
    threads = torch.get_num_threads() if os.getpid() == _process else 1
    wrong = library[ENTRIES[x.dtype]](_pack(*numbers, threads))
    if wrong == 3:
        raise MemoryError("hinm: no memory for the product of a packed layer. Pass fewer tokens at a time.")
    if wrong:
        which = "vector_index names a column of the input" if wrong == 1 else "output_order names a row"
        raise IndexError(f"hinm: {which} that does not exist. The packed weight is damaged.")


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled source, or why there is none; found once in a process."""
    if os.name != "posix":
        return f"the product for CPUs is compiled on Linux and macOS only, not on {platform.system()}"
    try:
        return _find()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{SOURCE.name} cannot be compiled and loaded: {error}"


def _find() -> ctypes.CDLL | str:
    flags = (*FLAGS, *MACHINES.get(torch.backends.cpu.get_cpu_capability(), ()))
    facts = (SOURCE.read_bytes(), *(flag.encode() for flag in flags), platform.machine().encode())
    key = hashlib.sha256(b"\0".join(facts)).hexdigest()
    place = _private(cache.folder("host", SWITCH))
    return _kept(place, key) or _compiled(place, key, flags)


def _private(place: Path | None) -> Path | None:
    """The folder, if nobody else may put another file in the place of one that is made or checked there."""
    if place is None or not place.exists():
        return place
    place = place.resolve()  # a name without a slash would be searched for among the system's libraries
    if cache.is_private(place):
        return place
    log.warning("%s is passed over: others than you may write there. Every process compiles for some seconds.", place)
    return None


def _kept(place: Path | None, key: str) -> ctypes.CDLL | None:
    """What was compiled before. A file's name ends in the sha256 of what it holds: one that is damaged is no match."""
    for path in [] if place is None else sorted(place.glob(f"{key}-*.so")):
        try:
            if not cache.is_private(path):
                log.warning("%s is passed over: others than you may write it.", path)
            elif path.stem == f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()}":
                return ctypes.CDLL(str(path))
        except OSError as error:
            log.warning("%s cannot be used (%s), so the source is compiled again.", path, error)
    return None


def _compiled(place: Path | None, key: str, flags: tuple[str, ...]) -> ctypes.CDLL | str:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    compiler = next((words for words in map(shlex.split, names) if words and shutil.which(words[0])), None)
    if compiler is None:
        return f"there is no C++ compiler ({', '.join(names)})"
    # What is in use may not be removable, on a network's file system.
    with tempfile.TemporaryDirectory(dir=_usable(place), ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "host.so"
        command = [*compiler, *flags, str(SOURCE), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL)  # noqa: S603
        if done.returncode:
            said = (done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"])[0]
            return f"{shlex.join(compiler)} does not compile {SOURCE.name} with {' '.join(flags)}: {said[:200]}"
        library, data = ctypes.CDLL(str(path)), path.read_bytes()
    if place is not None:
        try:
            cache.write(place / f"{key}-{hashlib.sha256(data).hexdigest()}.so", data)
        except OSError as error:
            log.warning("%s takes no file (%s): every process will compile for some seconds.", place, error)
    return library


def _usable(place: Path | None) -> Path | None:
    """``place`` if files can be made there, else None, for the system's own temporary folder."""
    try:
        if place is not None:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            return place if os.access(place, os.W_OK | os.X_OK) else None
    except OSError:
        pass
    return None
