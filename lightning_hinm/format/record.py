"""What files and checkpoints say about a layer, beside its tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_hinm.layout import check_retained
from lightning_hinm.pattern import HiNMPattern

DIMENSIONS = {"linear": 2, "hf_conv1d": 2, "conv1d": 3, "conv2d": 4}  # of the weight of each prunable kind


@dataclass(frozen=True)
class LayerRecord:
    """A pruned layer in primitives: enough to check and unpack its weight without the model.

    Args:
        kind: as ``pattern.layer_kind`` tells.
        groups: channel groups of a convolution, else 1.
        shape: of the module's own weight; ``[in, out]`` for a Hugging Face ``Conv1D``.
        pattern: the pattern that the weight obeys.
        retained: as in a layout; None where it is not known.

    Raises:
        ValueError: if no such layer can have been pruned.
    """

    kind: str
    groups: int
    shape: tuple[int, ...]
    pattern: HiNMPattern
    retained: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in DIMENSIONS:
            raise ValueError(f"kind={self.kind!r}, but it must be one of {', '.join(DIMENSIONS)}.")
        if len(self.shape) != DIMENSIONS[self.kind] or not all(_is_count(size) for size in self.shape):
            raise ValueError(
                f"shape={list(self.shape)}, but the weight of a {self.kind} layer has {DIMENSIONS[self.kind]} positive "
                "dimensions."
            )
        if not _is_count(self.groups) or (self.groups > 1 and not self.kind.startswith("conv")):
            raise ValueError(f"groups={self.groups!r}, but it must be 1, or a positive number for a convolution.")
        check_retained(self.retained, "layer")
        # Beyond this, the padding alone could be made larger than any memory.
        v, m = self.pattern.vector_size, self.pattern.m
        if self.rows % self.groups or self.rows // self.groups < v or self.in_features < m:
            raise ValueError(
                f"shape={list(self.shape)} with groups={self.groups}, but a pruned layer has at least one tile of "
                f"vector_size={v} rows in each group, and m={m} columns."
            )

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """The shape of the weight given to ``pack``: rows first."""
        return self.shape[::-1] if self.kind == "hf_conv1d" else self.shape

    @property
    def rows(self) -> int:
        """O."""
        return self.packed_shape[0]

    @property
    def in_features(self) -> int:
        """I; of one group in a grouped convolution."""
        return math.prod(self.packed_shape[1:])

    def rows_first(self, weight: Tensor) -> Tensor:
        """The module's own weight in the form that ``pack`` takes."""
        return weight.t() if self.kind == "hf_conv1d" else weight

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for files and checkpoints; ``retained`` only where it is known."""
        fields = {
            "kind": self.kind,
            "groups": self.groups,
            "shape": [int(size) for size in self.shape],
            "pattern": self.pattern.to_dict(),
        }
        return fields if self.retained is None else fields | {"retained": self.retained}

    @classmethod
    def from_dict(cls, fields: Any) -> "LayerRecord":
        """The inverse of ``to_dict``.

        Raises:
            ValueError: if ``fields`` are not exactly the fields of a layer that can have been pruned.
        """
        expected = set(cls.__dataclass_fields__) - {"retained"}
        if not isinstance(fields, Mapping) or set(fields) - {"retained"} != expected:
            got = sorted(map(str, fields)) if isinstance(fields, Mapping) else type(fields).__name__
            raise ValueError(f"got fields {got}, but a layer has exactly {sorted(expected)}, and perhaps 'retained'.")
        kind, groups, shape = fields["kind"], fields["groups"], fields["shape"]
        if not isinstance(kind, str) or not isinstance(shape, list):
            raise ValueError(f"kind={kind!r} and shape={shape!r}, but they must be a string and a list.")
        return cls(kind, groups, tuple(shape), HiNMPattern.from_dict(fields["pattern"]), fields.get("retained"))


def weight_key(layer: str) -> str:
    """The name of a layer's weight in the model's ``state_dict``; the model itself is the layer ``""``.

    >>> weight_key("net.0"), weight_key("")
    ('net.0.weight', 'weight')
    """
    return f"{layer}.weight" if layer else "weight"


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
