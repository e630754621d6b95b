"""Layouts that were searched before, on the user's disk: the same question is not searched twice.

An entry is one safetensors file, named by a hash of all that the answer depends on: the saliency, the pattern, the
method, the state of the generator, what was fixed, the version of torch and the code of the search. Matrices that share
an order of rows are one question with an entry each. Only the user may read it; it is written atomically, and checked
when it is read: one that is damaged, or retains something else than it says, is thrown away.

The environment variable ``LIGHTNING_HINM_LAYOUTS`` names another folder, or is ``off``.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_hinm import cache
from lightning_hinm.layout import HiNMLayout, check_layout
from lightning_hinm.pattern import HiNMPattern

log = logging.getLogger(__name__)

SWITCH = "LIGHTNING_HINM_LAYOUTS"
NUMBERS = 1 << 22  # that are mixed at a time
MIX = 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179  # odd: the last two words of the initial hash of SHA-512
MOST_BYTES = 1 << 29  # of all entries; beyond, those that were not used for longest go


@dataclass(frozen=True)
class Entry:
    """An answer, what it retains, and the state that the search left the generator in."""

    layout: HiNMLayout
    retained: float
    gap_closed: float
    generator: Tensor


def folder() -> Path | None:
    """Where entries lie, or None if the cache is switched off."""
    return cache.folder("layouts", SWITCH)


def key_of(patterns: Sequence[HiNMPattern], method: str, groups: int, tensors: dict[str, Tensor | None]) -> str | None:
    """The name of the entries for this question, to which each adds its matrix's number; or None without a cache.

    Args:
        patterns: that are searched for, one for each matrix.
        method: of the search.
        groups: of a convolution.
        tensors: what else the answer depends on, by name.
    """
    if folder() is None:
        return None
    facts = {"code": _code(), "torch": torch.__version__, "method": method, "groups": groups}
    wanted = [pattern.to_dict() for pattern in patterns]
    digest = hashlib.sha256(json.dumps(facts | {"patterns": wanted}, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {None if tensor is None else (tensor.dtype, tuple(tensor.shape))}".encode())
        if tensor is not None:
            digest.update(str(fingerprint(tensor)).encode())
    return digest.hexdigest()


def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Two sums over the bits of all its numbers, mixed with their places: all that leaves the tensor's device.

    Whole numbers wrap around, so the order in which a device adds them changes nothing. Not for adversaries.
    """
    bits = tensor.detach().contiguous().flatten()
    numbers = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for first in range(0, len(numbers), NUMBERS):
        part = numbers[first : first + NUMBERS].to(torch.int64)
        mixed = torch.arange(first, first + len(part), device=bits.device).mul_(MIX[0]).add_(part).mul_(MIX[1])
        mixed = mixed.bitwise_xor_(mixed >> 32).mul_(MIX[0])  # the high halves reach the low ones
        mixed = mixed.bitwise_xor_(mixed >> 29)
        sums += torch.stack((mixed.sum(), (mixed * mixed).sum()))
    return int(sums[0]), int(sums[1])


def read(key: str, pattern: HiNMPattern, shape: torch.Size, groups: int) -> Entry | None:
    """The entry of that name, checked; None if there is none, or none that can be used."""
    from safetensors import SafetensorError, safe_open

    place = folder()
    path = None if place is None else place / f"{key}.safetensors"
    try:
        if path is None or not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            numbers = file.metadata() or {}
            kept, gap = float(numbers["retained"]), float(numbers["gap_closed"])
            order, index, generator = (file.get_tensor(name) for name in ("output_order", "vector_index", "generator"))
        layout = HiNMLayout(pattern, order.to(torch.int64), index.to(torch.int64))
        check_layout(layout, *shape, groups=groups)
        torch.Generator().set_state(generator)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        log.warning("%s cannot be used (%s), so the search runs again. %s=off does without.", path, error, SWITCH)
        forget(key)
        return None
    with suppress(OSError):  # of another user, or gone by now
        os.utime(path)  # used just now
    return Entry(layout, kept, gap, generator)


def write(key: str, entry: Entry) -> None:
    """Keeps an entry. A disk that takes none is no error: the next search just takes as long as this one."""
    from safetensors.torch import save

    place = folder()
    if place is None:
        return
    layout = entry.layout.to("cpu")
    tensors = {"output_order": layout.output_order.to(torch.int32), "vector_index": layout.vector_index.to(torch.int32)}
    numbers = {"retained": repr(entry.retained), "gap_closed": repr(entry.gap_closed)}
    data = save({**tensors, "generator": entry.generator}, numbers)
    try:
        cache.write(place / f"{key}.safetensors", data)
        _make_room(place)
    except OSError as error:
        log.warning("%s takes no layout (%s): the search will run again. %s=off says nothing.", place, error, SWITCH)


def forget(key: str) -> None:
    """Removes an entry, if it can be removed."""
    place = folder()
    if place is not None:
        try:
            (place / f"{key}.safetensors").unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", key, error)


def _make_room(place: Path) -> None:
    entries = []
    for path in place.iterdir():  # parts of writers that were killed, too
        with suppress(FileNotFoundError):  # another process makes room as well
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    entries.sort()
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries[:-1]:
        if total <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size


@functools.cache
def _code() -> str:
    """What the search is made of: another version may find another layout."""
    files = [
        *Path(__file__).parent.glob("*.py"),
        *(Path(__file__).parents[1] / f"{name}.py" for name in ("mask", "pattern")),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
