"""NVIDIA's compute-sanitizer: where it is, how it is called, and what it says."""

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

NAME = "compute-sanitizer"
EXIT = 86  # ours, so that its verdict is told from the program's own
PLACES = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/cuda*/bin", "/opt/nvidia/cuda*/bin")


def find_tool() -> Path | None:
    """On the PATH, under CUDA_HOME, where CUDA is usually installed, or in NVIDIA's Python packages."""
    if found := shutil.which(NAME):
        return Path(found)
    folders = [Path(os.environ[name]) / part for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
               for part in ("bin", NAME)]  # fmt: skip
    folders += [folder for place in PLACES for folder in sorted(Path("/").glob(place.lstrip("/")), reverse=True)]
    package = importlib.util.find_spec("nvidia")
    for root in (package.submodule_search_locations or []) if package else []:
        folders += [path.parent for path in sorted(Path(root).glob(f"**/{NAME}"))]
    for folder in folders:
        if (folder / NAME).is_file() and os.access(folder / NAME, os.X_OK):
            return folder / NAME
    return None


def command(tool: Path, check: str, program: Sequence[str]) -> list[str]:
    """A program under ``memcheck`` or ``racecheck``."""
    # Calls that fail on purpose, such as asking an old driver for a new function, are the caller's to judge. And races
    # are wanted all, not the first hundred: the verdict names their kernels.
    flags = ["--report-api-errors", "no"] if check == "memcheck" else ["--print-limit", "0"]
    return [str(tool), "--tool", check, "--error-exitcode", str(EXIT), *flags, *program]


def environment(check: str) -> dict[str, str]:
    """Of that program: each tensor is an allocation of its own, so that a read past its end is one out of bounds."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if check == "memcheck" else {}


def verdict(code: int | None, said: str) -> tuple[bool, str]:
    """Whether it found nothing, and what it found. Whatever it returns, without a summary it checked nothing.

    Args:
        code: what it returned; None: it was killed.
        said: all of its output.
    """
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) \w+", said)
    if any(int(count) for count in summaries):
        kernels = dict.fromkeys(re.findall(r"Race reported between \w+ access at (\w+)", said))
        where = [f"races in {', '.join(kernels)}"] if kernels else []
        return False, f"it found errors: {', '.join(re.findall(r'SUMMARY: .*', said) + where)}"
    if code == 0 and summaries:
        return True, ""
    if code is None:
        return False, "it did not end in time"
    return False, f"exit code {code}" + ("" if summaries else ", and no summary: the tool did not run to its end")
