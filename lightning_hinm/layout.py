"""Layouts: which columns each tile keeps, and in which order rows and columns are packed.

Shapes: O rows, I columns, T = ceil(O / V) tiles, P kept columns of a tile (virtual ones, numbered >= I, included).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_hinm.pattern import HiNMPattern


@dataclass(frozen=True, eq=False)
class HiNMLayout:
    """All that says how a masked weight is packed; plain data on the CPU, compared by identity.

    Args:
        pattern: the pattern that the layout obeys.
        output_order: int64 ``[O]``, position -> original output channel.
        vector_index: int64 ``[T, P]``, the kept columns of each tile in the order in which N:M sees them; numbers
            from I up are virtual zeros. In a grouped convolution every group of channels has tiles of its own, and
            its columns count from 0.
        retained: kept over total saliency, in ``[0, 1]``, of the saliency that it was searched for; None where that is
            not known.

    Raises:
        ValueError: if the two tensors cannot belong to one weight, or ``retained`` is no such number. ``check_layout``
            checks the tensors against a weight.
    """

    pattern: HiNMPattern
    output_order: Tensor
    vector_index: Tensor
    retained: float | None = None

    def __post_init__(self) -> None:
        order, index = self.output_order, self.vector_index
        if order.dtype != torch.int64 or order.dim() != 1 or index.dtype != torch.int64 or index.dim() != 2:
            raise ValueError(
                f"HiNMLayout: output_order is {order.dtype} {list(order.shape)} and vector_index {index.dtype} "
                f"{list(index.shape)}, but they must be int64 [O] and int64 [T, P]."
            )
        if index.shape[0] != -(-order.numel() // self.pattern.vector_size):
            raise ValueError(
                f"HiNMLayout: vector_index has {index.shape[0]} tiles, but {order.numel()} rows in tiles of "
                f"vector_size={self.pattern.vector_size} make {-(-order.numel() // self.pattern.vector_size)}."
            )
        check_retained(self.retained, "HiNMLayout")

    def to(self, device: torch.device | str) -> "HiNMLayout":
        """The same layout with its tensors on ``device``."""
        return replace(self, output_order=self.output_order.to(device), vector_index=self.vector_index.to(device))


def check_retained(retained: Any, name: str) -> None:
    """Refuses what cannot be a retained saliency; ``name`` says whose, for the message.

    Raises:
        ValueError: unless it is a number in ``[0, 1]``, or None for one that is not known.
    """
    number = isinstance(retained, (int, float)) and not isinstance(retained, bool)
    if retained is not None and not (number and 0 <= retained <= 1):
        raise ValueError(f"{name}: retained={retained!r}, but it must be a number in [0, 1], or None if not known.")


def inverse(order: Tensor) -> Tensor:
    """The order that undoes ``order``: ``y[order][inverse(order)] == y``. int64 ``[O]`` -> int64 ``[O]``.

    >>> inverse(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def is_in_order(order: Tensor) -> bool:
    """Whether an order, ``[O]``, leaves everything where it is; what an order on the meta device does is unknown.

    >>> is_in_order(torch.tensor([0, 1, 2])), is_in_order(torch.tensor([1, 0, 2]))
    (True, False)
    """
    return not order.is_meta and torch.equal(order.to(torch.int64), torch.arange(len(order), device=order.device))


def wrong_with_order(order: Tensor, rows: int, vector_size: int, groups: int) -> list[str]:
    """What is wrong with an ``output_order`` of ``rows``, in tiles of ``vector_size`` and groups that no row leaves."""
    if order.dtype != torch.int64 or order.dim() != 1:
        return [f"output_order is {order.dtype} {list(order.shape)}, not int64 [O]"]
    if order.numel() != rows:
        return [f"output_order has {order.numel()} entries, but the weight has {rows} rows"]
    every = torch.arange(rows, device=order.device)
    if not torch.equal(order.sort().values, every):
        return [f"output_order is not a permutation of 0..{rows - 1}"]
    if groups < 1 or (groups > 1 and rows % (groups * vector_size)):
        return [f"the {rows} rows do not fill whole tiles of vector_size={vector_size} in each of groups={groups}"]
    if not torch.equal(order // (rows // groups), every // (rows // groups)):
        return [f"output_order moves rows between the {groups} groups of the convolution"]
    return []


def check_layout(layout: HiNMLayout, rows: int, in_features: int, *, groups: int = 1, name: str = "layout") -> None:
    """Refuses a layout that does not fit a weight of ``rows`` x ``in_features``: an index out of range would be a read
    out of bounds in a kernel, so files, caches and checkpoints all pass through here.

    Args:
        layout: what to check.
        rows: O.
        in_features: I; of one group in a grouped convolution.
        groups: channel groups of a convolution; no row may leave its group.
        name: the layer's name, for the message.

    Raises:
        ValueError: naming every rule that is broken.
    """
    pattern, index = layout.pattern, layout.vector_index
    wrong = wrong_with_order(layout.output_order, rows, pattern.vector_size, groups)
    kept, padded = pattern.kept(in_features), pattern.padded(in_features)
    if index.shape[1] != kept:
        wrong.append(f"vector_index keeps {index.shape[1]} columns, but the pattern keeps {kept} of {in_features}")
    elif bool((index < 0).any() | (index >= padded).any()):
        wrong.append(f"vector_index has columns outside 0..{padded - 1}")
    else:
        ranked = index.sort(dim=1).values
        if bool((ranked[:, 1:] == ranked[:, :-1]).any()):
            wrong.append("vector_index names a column twice in one tile")
        virtual = (index >= in_features).unflatten(1, (-1, pattern.m)).any(dim=2)  # [T, groups of m]
        if bool((virtual[:, :-1] & ~virtual[:, 1:]).any()):
            wrong.append(f"vector_index has virtual columns (from {in_features} up) before the last groups of a tile")
        start = 0
        for first, last in pattern.runs(in_features):
            stop = start + pattern.kept_of_run(last - first)
            run = index[:, start:stop]
            if bool((run < first).any() | (run >= first + pattern.padded(last - first)).any()):
                wrong.append(
                    f"vector_index positions {start}..{stop - 1} leave their run of columns {first}..{last - 1}"
                )
            start = stop
    if wrong:
        raise ValueError(f"{name}: " + "; ".join(wrong) + ". The layout belongs to another weight or is damaged.")
