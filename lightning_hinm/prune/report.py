"""What became of each layer that could have been pruned."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. ``reason`` is None where it was pruned, else why it was not.

    ``retained`` is None where it is not known: the layer was pruned before, by somebody who left no layout.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float = 0.0
    retained: float | None = 1.0
    seconds: float = 0.0
    ended_by_budget: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class PruningReport:
    """Every layer that could have been pruned, in the model's order; ``str()`` is a table, ``layers`` is data."""

    layers: tuple[LayerReport, ...]

    @property
    def pruned(self) -> tuple[LayerReport, ...]:
        """The layers that were pruned."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    def __str__(self) -> str:
        rows = [("layer", "kind", "shape", "sparsity", "retained", "search", "")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            if layer.reason is None:
                ended = "ended by the time budget" if layer.ended_by_budget else ""
                retained = "-" if layer.retained is None else f"{layer.retained:.4f}"
                numbers = (f"{layer.sparsity:.4f}", retained, f"{layer.seconds:.2f} s")
                rows.append((layer.name, layer.kind, shape, *numbers, ended))
            else:
                rows.append((layer.name, layer.kind, shape, "-", "-", "-", f"skipped: {layer.reason}"))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return "\n".join("  ".join((*map(str.ljust, row, widths), row[6])).rstrip() for row in rows)
