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
    # Calls that fail on purpose, such as asking an old driver for a new function, are the caller's to judge.
    quiet = ["--report-api-errors", "no"] if check == "memcheck" else []
    return [str(tool), "--tool", check, "--error-exitcode", str(EXIT), *quiet, *program]


def environment(check: str) -> dict[str, str]:
    """Of that program: each tensor is an allocation of its own, so that a read past its end is one out of bounds."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if check == "memcheck" else {}


def verdict(code: int | None, said: str) -> str | None:
    """None if it found nothing, else what is wrong. Whatever it returns, without a summary it checked nothing."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) \w+", said)
    if code == 0 and summaries and not any(int(count) for count in summaries):
        return None
    if summaries and any(int(count) for count in summaries):
        return f"it found errors: {', '.join(re.findall(r'SUMMARY: .*', said))}"
    if code is None:
        return "it did not end in time"
    return f"exit code {code}" + ("" if summaries else ", and no summary: the tool did not run to its end")
