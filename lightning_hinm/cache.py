"""Where what was found out once is kept on the user's disk: private folders, and files that are written whole."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def folder(name: str, switch: str) -> Path | None:
    """The folder of that name below ``~/.cache/lightning-hinm``, which may not exist yet; None for no cache.

    Args:
        name: of what is kept there.
        switch: an environment variable that names another folder, or is ``off``.
    """
    setting = os.environ.get(switch, "")
    if setting.lower() == "off":
        return None
    if setting:
        return Path(setting)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # nobody's home
        return None
    return base / "lightning-hinm" / name


def is_private(path: Path) -> bool:
    """Whether nobody else may write a file, or put another one in the place of one that lies in a folder.

    Raises:
        OSError: if there is no such file or folder.
    """
    if os.name != "posix":  # its folders are the user's own, and permissions are not in these bits
        return True
    status = path.stat()
    return status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022


def write(path: Path, data: bytes) -> None:
    """Writes a file that only the user may read, and its folder if it is missing; a reader never sees a part of it.

    Raises:
        OSError: if the disk does not take it; then nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
