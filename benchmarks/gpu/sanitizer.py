"""NVIDIA's compute-sanitizer: where it is, how it is called, and what it says."""

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

NAME = "compute-sanitizer"
EXIT = 86  # ours, so that its verdict is told from the program's own
# Kernels whose blocks tell each other by remote mbarriers that a buffer is free (csrc/cluster.cuh, ``arrive_at``). In
# these racecheck takes the copy that fills the buffer next for a race with the reads before. Its release notes say that
# up to 2026.1 it got such indirect orders between the blocks of a cluster wrong
# (docs.nvidia.com/compute-sanitizer/ReleaseNotes). The interpreter in tests/ptx follows them, on the same PTX.
REMOTE = "windowed_cluster_"
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
    # are wanted all, not the first hundred: the verdict depends on where each one is.
    flags = ["--report-api-errors", "no"] if check == "memcheck" else ["--print-limit", "0"]
    return [str(tool), "--tool", check, "--error-exitcode", str(EXIT), *flags, *program]


def environment(check: str) -> dict[str, str]:
    """Of that program: each tensor is an allocation of its own, so that a read past its end is one out of bounds."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if check == "memcheck" else {}


def verdict(code: int | None, said: str) -> tuple[bool, str]:
    """Whether it found nothing that counts, and what it found. Without a summary it checked nothing.

    Args:
        code: what it returned; ``EXIT`` says that the program itself ended well. None: it was killed.
        said: all of its output.
    """
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) \w+", said)
    found, (races, unseen) = sum(int(count) for count in summaries), sort_races(said)
    if code == 0 and summaries and not found:
        return True, ""
    if code == EXIT and 0 < found == len(unseen):
        kernels = ", ".join(dict.fromkeys(unseen))
        return True, f"{found} hazards do not count, for it does not follow orders by remote mbarriers: {kernels}"
    if found:
        where = [f"races in {', '.join(dict.fromkeys(races))}"] if races else []
        return False, f"it found errors: {', '.join(re.findall(r'SUMMARY: .*', said) + where)}"
    if code is None:
        return False, "it did not end in time"
    return False, f"exit code {code}" + ("" if summaries else ", and no summary: the tool did not run to its end")


def sort_races(said: str) -> tuple[list[str], list[str]]:
    """The kernel of each race that counts, and of each that does not: a write after reads in a kernel of ``REMOTE``."""
    races: list[str] = []
    unseen: list[str] = []
    for report in said.split("Race reported between ")[1:]:
        (kind, kernel), *others = re.findall(r"(Read|Write) access at (\w+)", report) or [("", "unknown")]
        does_not_count = kernel.startswith(REMOTE) and kind == "Write" and set(others) == {("Read", kernel)}
        (unseen if does_not_count else races).append(kernel)
    return races, unseen
