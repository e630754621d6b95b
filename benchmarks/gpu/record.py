"""The JSON of a run: what was measured where, written after every case, so that a run that is killed has shown it."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import sanitizer

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Of installed packages, those that start so: what runs, and what it is compared with.
PACKAGES = re.compile(r"(torch|lightning|numpy|cuda[-_]|nvidia[-_](cublas|cuda|cudnn|cusparselt|nvjitlink)|triton)")


class Record:
    """A JSON file that is always whole. ``$OUT``, if it is set, gets a copy.

    Args:
        path: of the file.
        fresh: start anew, else go on with what is there.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {} if fresh or not path.exists() else json.loads(path.read_text())

    def put(self, name: str, value: Any) -> None:
        """Sets a part, and writes the file."""
        self.data[name] = value
        self.save()

    def add(self, name: str, value: Any) -> None:
        """Appends to a part, and writes the file."""
        self.data.setdefault(name, []).append(value)
        self.save()

    def save(self) -> None:
        """Writes the file: the old one or the new one is there, never half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = text_of(self.data)
        for path in [self.path, *copies_of(self.path)]:
            partial = path.with_name(f"{path.name}.part")
            partial.write_text(text)
            os.replace(partial, path)


def text_of(data: dict[str, Any]) -> str:
    """JSON with a line for each part, and for each item of a list: a case is a line."""
    parts = []
    for name, value in data.items():
        body = json.dumps(value, default=str)
        if isinstance(value, list) and value:
            body = "[\n  " + ",\n  ".join(json.dumps(item, default=str) for item in value) + "\n ]"
        parts.append(f" {json.dumps(name)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def copies_of(path: Path) -> list[Path]:
    """Where else a result goes."""
    folder = os.environ.get("OUT")
    return [Path(folder) / path.name] if folder and Path(folder).is_dir() else []


def path_for(device: torch.device) -> Path:
    """Of the JSON, named after the GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "emulated"
    return RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def facts(device: torch.device) -> dict[str, Any]:
    """The machine, its software and this commit."""
    found: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": packages(),
        "nvidia_smi": nvidia_smi(),
        "sanitizer": sanitizer_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def packages() -> dict[str, str]:
    """Versions of the installed packages that a time can depend on."""
    names = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions() if each.metadata}
    return {name: version for name, version in sorted(names.items()) if name and PACKAGES.match(name.lower())}


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks, power and temperature as they are; None without the tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    fields = ["name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
              "temperature.gpu", "utilization.gpu"]  # fmt: skip
    said = _run(tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    values = said.splitlines()[0].split(", ") if said else []
    return dict(zip(fields, values, strict=False)) or None


def sanitizer_version() -> str | None:
    """Of compute-sanitizer, on which it depends what it takes for an error; None without the tool."""
    tool = sanitizer.find_tool()
    said = _run(str(tool), "--version") if tool else ""
    return next((line for line in said.splitlines() if line.startswith("Version")), None)


def commit() -> str:
    """Of this checkout, with a mark if it was changed; ``unknown`` where there is none."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    head = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return (head or "unknown") + ("-dirty" if head and changed else "")


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
