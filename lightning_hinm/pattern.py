"""The HiNM pattern, and the weight of every prunable layer seen as a matrix.

Shapes: O rows (output channels), I columns, T = ceil(O / V) tiles, P kept columns of a tile.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import groupby
from typing import Any

from torch import Tensor, nn

# By qualified name: transformers is not imported.
_KINDS = {
    "torch.nn.modules.linear.Linear": "linear",
    "torch.nn.modules.conv.Conv1d": "conv1d",
    "torch.nn.modules.conv.Conv2d": "conv2d",
    "transformers.pytorch_utils.Conv1D": "hf_conv1d",
}


@dataclass(frozen=True)
class HiNMPattern:
    """Tiles of ``vector_size`` rows drop whole columns; the kept columns carry ``n`` of ``m``.

    Total sparsity is ``1 - (1 - vector_sparsity) * n / m``. ``n = m`` is pure vector sparsity, ``vector_sparsity = 0``
    pure N:M. Pattern of arXiv 2407.20496, section 3, with the windows of a shared-memory kernel added.

    Args:
        vector_size: rows of a tile, the V of the paper; at least 1.
        vector_sparsity: fraction of the columns that each tile drops, in ``[0, 1)``.
        n: weights that each row keeps in a group, ``1 <= n <= m``.
        m: columns of a group.
        window: layers of more than ``4 * window`` columns are cut into runs of ``window`` columns (a multiple of
            ``m``), and each tile keeps its share of every run. ``None`` is the paper's free choice.

    Raises:
        ValueError: if no such pattern can exist; every offending field is named.
        TypeError: if a field has the wrong type.

    >>> HiNMPattern().sparsity
    0.75
    >>> HiNMPattern.from_sparsity(0.875).vector_sparsity
    0.75
    """

    vector_size: int = 64
    vector_sparsity: float = 0.5
    n: int = 2
    m: int = 4
    window: int | None = 256

    def __post_init__(self) -> None:
        for field in ("vector_size", "n", "m", "window"):
            value = getattr(self, field)
            if field == "window" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"HiNMPattern: {field}={value!r} must be an int{' or None' * (field == 'window')}.")
        if isinstance(self.vector_sparsity, bool) or not isinstance(self.vector_sparsity, (int, float)):
            raise TypeError(f"HiNMPattern: vector_sparsity={self.vector_sparsity!r} must be a float.")
        wrong = []
        if self.vector_size < 1:
            wrong.append(f"vector_size={self.vector_size} must be at least 1, e.g. 64")
        if not 0 <= self.vector_sparsity < 1:
            wrong.append(f"vector_sparsity={self.vector_sparsity} must be in [0, 1), e.g. 0.5")
        if self.m < 1:
            wrong.append(f"m={self.m} must be at least 1, e.g. 4")
        if not 1 <= self.n <= self.m:
            wrong.append(f"n={self.n} must be between 1 and m={self.m}, e.g. n=2, m=4")
        if self.window is not None and (self.window < 1 or self.m < 1 or self.window % self.m):
            wrong.append(f"window={self.window} must be a positive multiple of m={self.m}, or None")
        if wrong:
            raise ValueError("HiNMPattern: " + "; ".join(wrong) + ".")

    @classmethod
    def from_sparsity(
        cls, sparsity: float, vector_size: int = 64, n: int = 2, m: int = 4, window: int | None = 256
    ) -> "HiNMPattern":
        """The pattern whose total sparsity is ``sparsity``: N:M first, whole vectors for the rest.

        Raises:
            ValueError: if ``sparsity`` is below what ``n:m`` alone prunes, or not below 1.
        """
        cls(vector_size, 0.0, n, m, window)  # the other fields have their say first
        lowest = 1 - Fraction(n, m)
        if not lowest <= sparsity < 1:
            raise ValueError(
                f"HiNMPattern.from_sparsity: sparsity={sparsity} must be in [{float(lowest):g}, 1): "
                f"{n}:{m} alone prunes {float(lowest):g}. Choose another n and m for less."
            )
        return cls(vector_size, float(1 - (1 - exact(sparsity)) / Fraction(n, m)), n, m, window)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "HiNMPattern":
        """The inverse of ``to_dict``.

        Raises:
            ValueError: if ``fields`` are not exactly the fields of a pattern that can exist.
        """
        expected = set(cls.__dataclass_fields__)
        if not isinstance(fields, Mapping) or set(fields) != expected:
            got = sorted(map(str, fields)) if isinstance(fields, Mapping) else type(fields).__name__
            raise ValueError(f"HiNMPattern: got fields {got}, but a pattern has exactly {sorted(expected)}.")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as primitives, for files and checkpoints."""
        return asdict(self)

    @property
    def fields(self) -> tuple[int, float, int, int, int | None]:
        """The fields in their order: what the ops take of a pattern."""
        return self.vector_size, self.vector_sparsity, self.n, self.m, self.window

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that the pattern prunes, before any rounding to whole groups."""
        return float(1 - (1 - exact(self.vector_sparsity)) * Fraction(self.n, self.m))

    def runs(self, in_features: int) -> list[tuple[int, int]]:
        """``(first, last + 1)`` of each run of columns; a single run unless there are more than ``4 * window``."""
        if self.window is None or in_features <= 4 * self.window:
            return [(0, in_features)]
        return [(first, min(first + self.window, in_features)) for first in range(0, in_features, self.window)]

    def equal_runs(self, in_features: int) -> list[tuple[int, int, int]]:
        """``(first, columns, count)`` of runs side by side that have as many columns: all but the last, and the last.

        >>> HiNMPattern(window=256).equal_runs(1100)
        [(0, 256, 4), (1024, 76, 1)]
        """
        alike = [list(runs) for _, runs in groupby(self.runs(in_features), key=lambda run: run[1] - run[0])]
        return [(runs[0][0], runs[0][1] - runs[0][0], len(runs)) for runs in alike]

    def kept(self, in_features: int) -> int:
        """Kept columns of each tile, P: the one place that rounds. A multiple of ``m``, virtual columns included.

        >>> HiNMPattern(vector_sparsity=0.8).kept(640)
        128
        """
        return sum(self.kept_of_run(last - first) for first, last in self.runs(in_features))

    def kept_of_run(self, columns: int) -> int:
        """Kept columns of one run: the multiple of ``m`` nearest to the share wanted, ties up, at least one group."""
        most = -(-columns // self.m)
        if self.vector_sparsity == 0:
            return most * self.m
        wanted = columns * (1 - exact(self.vector_sparsity)) / self.m
        return min(max((wanted + Fraction(1, 2)).__floor__(), 1), most) * self.m

    def padded(self, in_features: int) -> int:
        """Columns with the virtual ones that fill the last group: ``ceil(I / m) * m``."""
        return -(-in_features // self.m) * self.m


def exact(x: float | Fraction) -> Fraction:
    """The rational number that a person meant by the float: 0.8 is 4/5, not 0.8000000000000000444."""
    return Fraction(str(x))


def plain_name(name: str) -> str:
    """The name without what ``torch.compile`` puts into it.

    >>> plain_name("net._orig_mod.0.weight")
    'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The prunable layers of a model by name; ``torch.compile`` inside the model leaves no trace in the names.

    >>> import torch
    >>> list(named_layers(nn.Sequential(nn.ReLU(), torch.compile(nn.Sequential(nn.Linear(4, 4))))))
    ['1.0']
    """
    return {plain_name(path): module for path, module in model.named_modules() if layer_kind(module) is not None}


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a prunable layer, ``"linear"``, ``"conv1d"``, ``"conv2d"`` or ``"hf_conv1d"``; None for any other.

    A subclass counts where it computes what its parent computes, that is, with the parent's own ``forward``.
    Hugging Face's ``Conv1D`` (weight ``[in, out]``, addmm) is known by its qualified name: nothing is imported.
    """
    parent, kind = _parent(module)
    return kind if parent is not None and type(module).forward is vars(parent).get("forward") else None


def other_kind(module: nn.Module) -> str | None:
    """The kind that a subclass with a ``forward`` of its own would have without it; None for any other module."""
    weighs = isinstance(getattr(module, "weight", None), Tensor)
    return _parent(module)[1] if weighs and layer_kind(module) is None else None


def _parent(module: nn.Module) -> tuple[type | None, str | None]:
    """The class of prunable layers that a module is, or derives from, and its kind."""
    for base in type(module).__mro__:
        kind = _KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return base, kind
    return None, None


def to_matrix(weight: Tensor, kind: str) -> Tensor:
    """The ``[O, I]`` matrix of a weight, a view; a convolution's column is (channel, kh, kw)."""
    return weight.t() if kind == "hf_conv1d" else weight.flatten(1)


def from_matrix(matrix: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``to_matrix``: ``[O, I]`` back to the weight's own ``shape``."""
    return (matrix.t() if kind == "hf_conv1d" else matrix).reshape(shape)
