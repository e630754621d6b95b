"""The most that any layout retains, by trying them all: tiny sizes only."""

import itertools
from collections.abc import Iterator

from torch import Tensor

from lightning_hinm import HiNMPattern


def best_retained(saliency: Tensor, pattern: HiNMPattern) -> float:
    """Every partition of the rows into two tiles, every choice and grouping of vectors.

    Args:
        saliency: ``[2 V, I]``; 4 x 8 takes milliseconds, and each column more several times as long.
        pattern: of one run.

    Raises:
        ValueError: if the rows are not two tiles.
    """
    rows, columns = saliency.shape
    if rows != 2 * pattern.vector_size:
        raise ValueError(f"best_retained: got {rows} rows, but takes two tiles of {pattern.vector_size}.")
    kept, values = pattern.kept(columns), saliency.double()

    def retained_of(tile: tuple[int, ...]) -> float:
        part = values[list(tile)]
        return max(
            sum(part[:, list(group)].topk(pattern.n, dim=1).values.sum().item() for group in groups)
            for chosen in itertools.combinations(range(columns), kept)
            for groups in groupings(chosen, pattern.m)
        )

    tiles = list(itertools.combinations(range(rows), pattern.vector_size))
    worth = {tile: retained_of(tile) for tile in tiles}
    return max(worth[tile] + worth[tuple(sorted({*range(rows)} - {*tile}))] for tile in tiles) / values.sum().item()


def groupings(columns: tuple[int, ...], m: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to cut columns into groups of m, whatever their order."""
    if not columns:
        yield []
        return
    first, rest = columns[0], columns[1:]
    for mates in itertools.combinations(rest, m - 1):
        for more in groupings(tuple(column for column in rest if column not in mates), m):
            yield [(first, *mates), *more]
