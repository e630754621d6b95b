"""Which layers are pruned, and one-shot pruning of any module."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_hinm.gyro import SearchResult, search_shared
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import check_saliency, hinm_mask
from lightning_hinm.pattern import HiNMPattern, from_matrix, layer_kind, named_layers, to_matrix
from lightning_hinm.saliency import magnitude

log = logging.getLogger(__name__)

LAYOUT_ATTRIBUTE = "hinm_layout"


@dataclass(frozen=True, eq=False)
class PrunableLayer:
    """A layer that a pattern is meant for: its module, its kind, and its weight as a matrix.

    Args:
        name: the module's qualified name, "" for the model itself.
        module: the layer.
        kind: as ``pattern.layer_kind`` tells.
        pattern: the pattern it shall have.
    """

    name: str
    module: nn.Module
    kind: str
    pattern: HiNMPattern

    @property
    def groups(self) -> int:
        """Channel groups of a convolution, else 1."""
        return int(getattr(self.module, "groups", 1))

    @property
    def weight(self) -> Tensor:
        """The parameter, looked up anew at each call: a strategy may have replaced it."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[O, I]``, detached, a view."""
        return to_matrix(self.weight.detach(), self.kind)

    def to_weight(self, matrix: Tensor) -> Tensor:
        """``[O, I]`` (a mask, say) in the shape of the weight."""
        return from_matrix(matrix, self.kind, tuple(self.weight.shape))


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


def prune(
    model: nn.Module,
    pattern: HiNMPattern | Mapping[str, HiNMPattern],
    *,
    include: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    saliency: str | Mapping[str, Tensor] = "magnitude",
    method: str = "exchange",
    generator: torch.Generator | None = None,
    time_budget: float | None = None,
    shared_orders: Sequence[Sequence[str]] = (),
) -> PruningReport:
    """Prunes the weights of ``model`` in place, one-shot: pruned weights are exactly zero, nothing else changes.

    Each pruned layer remembers its layout, so that ``to_hinm`` and ``torch.compile(model, backend="hinm")`` can pack
    it. Every layer is checked and searched before the first weight is written.

    Args:
        model: any module.
        pattern: one pattern, or one for each entry of the same dialect as ``include``; the first that matches holds.
        include: layers to prune: plain names (a layer, or a container: all layers below it), class names, or ``re:``
            patterns for ``re.match``. None: all that pay.
        ignore: layers to leave out, in the same dialect.
        saliency: ``"magnitude"``, or a tensor of the weight's shape for each layer name.
        method: the search, as for ``gyro_permute``.
        generator: randomness of the search.
        time_budget: seconds for the search of all layers together; None for no limit.
        shared_orders: sets of layers, each a list of entries as in ``include``, that get one ``output_order``: between
            layers that write one residual stream, or whose outputs are multiplied, no order is then restored at run
            time. They are searched together, and retain a little less than with an order each, as the report shows.

    Returns:
        The report: name, shape, sparsity and retained saliency of every layer, or the reason why it was skipped.

    Raises:
        ValueError: for an entry that matches nothing, a model with nothing to prune, weights or a saliency that are
            negative or not finite, a parametrised weight, layers that cannot share an order; all offenders in one
            message, and nothing was changed.
    """
    layers, skipped = find_layers(model, pattern, include=include, ignore=ignore)
    sets = find_sets(model, layers, skipped, shared_orders)
    scores = saliencies(layers, saliency)
    results: dict[str, SearchResult] = {}
    left = sum(layer.matrix.numel() for layer in layers)
    for together in sets:
        share, size = None, sum(layer.matrix.numel() for layer in together)
        if time_budget is not None:
            spent = sum(result.seconds for result in results.values())
            share = max(time_budget - spent, 0.0) * size / left
        left -= size
        names = [layer.name for layer in together]
        found = search_shared(
            [scores[name] for name in names],
            [layer.pattern for layer in together],
            groups=together[0].groups,
            method=method,
            generator=generator,
            time_budget=share,
            progress=partial(log.info, "prune: %s: %s", ", ".join(names)),
        )
        results |= zip(names, found, strict=True)
    masks = {layer.name: hinm_mask(scores[layer.name], results[layer.name].layout) for layer in layers}
    reports = {entry.name: entry for entry in skipped}
    for layer in layers:
        mask, result = masks[layer.name], results[layer.name]
        with torch.no_grad():
            layer.weight.masked_fill_(~layer.to_weight(mask), 0)
        set_layout(layer, result.layout, model)
        reports[layer.name] = LayerReport(
            layer.name,
            layer.kind,
            tuple(layer.weight.shape),
            sparsity=1 - mask.sum().item() / mask.numel(),
            retained=result.retained,
            seconds=result.seconds,
            ended_by_budget=result.ended_by_budget,
        )
    return PruningReport(tuple(reports[name] for name in named_layers(model) if name in reports))


def set_layout(layer: PrunableLayer, layout: HiNMLayout | None, model: nn.Module) -> None:
    """Writes (or, with None, removes) the layout on the layer and on every module that shares its weight."""
    for module in model.modules():
        if module is layer.module or (layer_kind(module) and module.weight is layer.weight):
            module.__dict__.pop(LAYOUT_ATTRIBUTE, None)
            if layout is not None:
                module.__dict__[LAYOUT_ATTRIBUTE] = layout.to("cpu")


def layout_of(module: nn.Module) -> HiNMLayout | None:
    """The layout that a pruned layer carries, or None."""
    return module.__dict__.get(LAYOUT_ATTRIBUTE)


def find_layers(
    model: nn.Module,
    pattern: HiNMPattern | Mapping[str, HiNMPattern],
    *,
    include: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> tuple[list[PrunableLayer], list[LayerReport]]:
    """The layers to prune, and a report of those that are not, each with its reason. A shared weight comes once.

    Raises:
        ValueError: for entries that match nothing, parametrised, uninitialised or non-finite weights, or nothing to
            prune; all offenders in one message.
    """
    prunable = named_layers(model)
    wrong: list[str] = []
    chosen = _match(model, prunable, include, "include", wrong)
    left_out = _match(model, prunable, ignore, "ignore", wrong) or set()
    patterns: dict[str, HiNMPattern] = {}
    for entry, value in pattern.items() if isinstance(pattern, Mapping) else [(None, pattern)]:
        if not isinstance(value, HiNMPattern):
            raise TypeError(
                f"pattern{'' if entry is None else f'[{entry!r}]'}: got {value!r}, but it must be a HiNMPattern."
            )
        names = prunable if entry is None else _match(model, prunable, [entry], "pattern", wrong)
        patterns = dict.fromkeys(names or (), value) | patterns
    layers, skipped = [], []
    seen: dict[int, str] = {}
    embeddings = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    attention = {
        id(child): name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    for name, module in prunable.items():
        kind = str(layer_kind(module))
        if parametrize.is_parametrized(module, "weight") or "weight" not in module._parameters:
            wanted = (chosen is None or name in chosen) and name not in left_out
            if wanted:
                wrong.append(
                    f"{name}: its weight is parametrised or not a plain parameter, but masks are written into the "
                    "weight itself. Remove the parametrisation first, or add the layer to `ignore`"
                )
            continue
        weight: Tensor = module.weight  # type: ignore[assignment]
        if isinstance(weight, nn.parameter.UninitializedParameter):
            wrong.append(f"{name}: its weight is not initialised yet. Run one batch through the model first")
            continue
        reason = None
        if chosen is not None and name not in chosen:
            reason = "not in `include`"
        elif name in left_out:
            reason = "in `ignore`"
        elif name not in patterns:
            reason = "no entry of `pattern` matches it"
        elif id(weight) in embeddings:
            reason = f"its weight is that of the embedding {embeddings[id(weight)]!r}"
        elif id(module) in attention:
            reason = f"nn.MultiheadAttention {attention[id(module)]!r} reads the projection's weight by itself"
        elif id(weight) in seen:
            reason = f"shares its weight with {seen[id(weight)]!r}, and is pruned with it"
        else:
            layer = PrunableLayer(name, module, kind, patterns[name])
            reason = _does_not_pay(layer)
        if reason is not None:
            skipped.append(LayerReport(name, kind, tuple(weight.shape), reason=reason))
            continue
        seen[id(weight)] = name
        layers.append(layer)
        if weight.is_meta:
            wrong.append(f"{name}: its weight is on the meta device. Load or initialise it first")
        elif not weight.detach().isfinite().all():
            bad = (~weight.detach().isfinite()).sum().item()
            wrong.append(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite. Load or initialise it again")
    if wrong:
        raise ValueError("Nothing was pruned:\n  " + "\n  ".join(wrong))
    if not layers:
        reasons = "".join(f"\n  {entry.name}: {entry.reason}" for entry in skipped)
        raise ValueError(
            f"{type(model).__name__} has nothing to prune: of {len(skipped)} Linear, Conv1d, Conv2d and HF Conv1D "
            f"layers every one is skipped. Choose another `pattern`, `include` or `ignore`.{reasons}"
        )
    return layers, skipped


def find_sets(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    skipped: Sequence[LayerReport],
    shared_orders: Sequence[Sequence[str]],
) -> list[list[PrunableLayer]]:
    """All layers that ``find_layers`` found, those of a set of ``shared_orders`` together, every other by itself.

    Raises:
        ValueError: for entries that match nothing, layers that are not pruned, that are grouped convolutions or in two
            sets, and sets with different numbers of rows or tiles of different sizes; all offenders in one message.
    """
    prunable, by_name = named_layers(model), {layer.name: layer for layer in layers}
    reasons = {entry.name: entry.reason for entry in skipped}
    wrong: list[str] = []
    set_of: dict[str, int] = {}
    for i, entries in enumerate(shared_orders):
        argument, members = f"shared_orders[{i}]", []
        for name in sorted(_match(model, prunable, entries, argument, wrong) or ()):
            layer = by_name.get(name)
            if layer is None:
                wrong.append(f"{argument}: {name} is not pruned: {reasons.get(name, 'its weight is parametrised')}")
                continue
            members.append(layer)
            if layer.groups > 1:
                wrong.append(f"{argument}: {name} has groups={layer.groups}, but no row may leave its group")
            if set_of.setdefault(name, i) != i:
                wrong.append(f"{argument}: {name} is in shared_orders[{set_of[name]}] too")
        rows = {layer.name: layer.matrix.shape[0] for layer in members}
        sizes = {layer.name: layer.pattern.vector_size for layer in members}
        for what, numbers in {"number of rows": rows, "vector_size": sizes}.items():
            if len(set(numbers.values())) > 1:
                wrong.append(f"{argument}: one order needs one {what}, but the layers have {numbers}")
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(f"Nothing was pruned: `shared_orders` does not fit. Correct or remove these:\n  {listed}")
    sets: dict[int | str, list[PrunableLayer]] = {}
    for layer in layers:
        sets.setdefault(set_of.get(layer.name, layer.name), []).append(layer)
    return list(sets.values())


def _does_not_pay(layer: PrunableLayer) -> str | None:
    """Why a layer cannot be pruned usefully, or None."""
    (rows, in_features), pattern, groups = layer.matrix.shape, layer.pattern, layer.groups
    if groups > 1 and layer.weight.shape[1] == 1:
        return "depthwise convolution: one input channel a group"
    if rows < pattern.vector_size:
        return f"{rows} rows are less than one tile of vector_size={pattern.vector_size}"
    if in_features < pattern.m:
        return f"{in_features} columns are less than one group of m={pattern.m}"
    if groups > 1 and (rows // groups) % pattern.vector_size:
        return f"{rows // groups} rows a group are no multiple of vector_size={pattern.vector_size}"
    if pattern.kept(in_features) * pattern.n >= pattern.padded(in_features) * pattern.m:
        return f"the pattern keeps all of its {in_features} columns"
    return None


def _match(
    model: nn.Module, prunable: Mapping[str, nn.Module], entries: Sequence[str] | None, argument: str, wrong: list[str]
) -> set[str] | None:
    """Names of the prunable layers that the entries match; an entry that matches none is added to ``wrong``."""
    if entries is None:
        return None
    if isinstance(entries, str):
        raise TypeError(f"{argument}: got the string {entries!r}, but it must be a list of strings.")
    matched: set[str] = set()
    for entry in entries:
        if entry.startswith("re:"):
            try:
                expression = re.compile(entry.removeprefix("re:"))
            except re.error as error:
                wrong.append(f"{argument}: {entry!r} is not a regular expression ({error})")
                continue
            found = {name for name in prunable if expression.match(name)}
        else:
            found = {name for name in prunable if name == entry or name.startswith(f"{entry}.")}
            found |= {name for name, module in prunable.items() if entry in (type(module).__name__, "*")}
        if not found:
            wrong.append(
                f"{argument}: {entry!r} matches no Linear, Conv1d, Conv2d or HF Conv1D layer of "
                f"{type(model).__name__}. Its layers are {', '.join(list(prunable)[:8]) or 'none'}"
                + (" ..." if len(prunable) > 8 else "")
            )
        matched |= found
    return matched


def saliencies(layers: Sequence[PrunableLayer], saliency: str | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saliency matrix of every layer, all checked.

    Raises:
        ValueError: for one that is missing, of another shape, negative or not finite; all offenders in one message.
    """
    if isinstance(saliency, str):
        if saliency != "magnitude":
            raise ValueError(
                f"saliency={saliency!r}: without data only 'magnitude' is known. Use HiNMPruning for 'taylor', or pass "
                "a mapping from layer name to tensor."
            )
        return {layer.name: magnitude(layer.matrix) for layer in layers}
    scores, wrong = {}, []
    for layer in layers:
        given = saliency.get(layer.name)
        if given is None or given.shape != layer.weight.shape:
            got = "nothing" if given is None else list(given.shape)
            wrong.append(f"saliency[{layer.name!r}]: got {got}, but the weight is {list(layer.weight.shape)}")
            continue
        scores[layer.name] = to_matrix(given.detach().to(layer.weight.device), layer.kind)
        try:
            check_saliency(scores[layer.name], f"saliency[{layer.name!r}]")
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("Nothing was pruned:\n  " + "\n  ".join(wrong))
    return scores
