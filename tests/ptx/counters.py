"""How many passes a warp's request takes: bank conflicts in shared memory, sectors in global memory.

Legend: a request is one instruction of one warp. Shared memory has 32 banks of 4 bytes; a request of up to 4 bytes a
lane is one phase, of 8 bytes two (half warps), of 16 bytes four (quarter warps), and a matrix of ldmatrix is a phase.
"""

import numpy as np

from .values import Array

BANKS = 32
SECTOR = 32


def _fill(addresses: Array, active: Array | None) -> Array:
    """Rows with the address of an active lane in place of every inactive one; rows with none are dropped."""
    if active is None:
        return addresses
    rows = active.any(axis=1)
    addresses, active = addresses[rows], active[rows]
    first = np.take_along_axis(addresses, active.argmax(axis=1)[:, None], axis=1)
    return np.where(active, addresses, first)


def _distinct(rows: Array) -> Array:
    """True at the first of equal neighbours, in sorted rows."""
    first = np.ones(rows.shape, dtype=bool)
    np.not_equal(rows[:, 1:], rows[:, :-1], out=first[:, 1:])
    return first


def shared_wavefronts(addresses: Array, active: Array | None, width: int) -> tuple[int, int]:
    """Wavefronts of requests and the ideal, which is one for each phase that has an active lane.

    Args:
        addresses: byte offsets in shared memory, ``[requests, lanes]``; lanes are 32, or 8 for rows of ldmatrix.
        active: lanes that take part, or None for all.
        width: bytes that a lane moves.
    """
    lanes = min(addresses.shape[1], 32 if width <= 4 else 128 // width)
    phases = addresses.reshape(-1, lanes)
    phases = _fill(phases, None if active is None else active.reshape(-1, lanes))
    words = phases >> 2
    if width > 4:
        words = (words[:, :, None] + np.arange(width // 4)).reshape(len(words), -1)
    words = np.sort(words, axis=1)
    banks = (words & (BANKS - 1)) + BANKS * np.arange(len(words))[:, None]
    load = np.bincount(banks[_distinct(words)], minlength=BANKS * len(words))
    return int(load.reshape(-1, BANKS).max(axis=1).sum()), len(phases)


def global_sectors(addresses: Array, active: Array | None, width: int) -> tuple[int, int]:
    """Sectors that requests touch, and those that their distinct bytes would fill, rounded up per request.

    Args: as `shared_wavefronts`; an address is a multiple of ``width``, so no lane crosses a sector.
    """
    rows = np.sort(_fill(addresses, active), axis=1)
    distinct = _distinct(rows).sum(axis=1)
    touched = _distinct(rows // SECTOR).sum()
    return int(touched), int((-(-distinct * width // SECTOR)).sum())
