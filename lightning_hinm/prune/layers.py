"""Which layers are pruned, by their names, and the saliency of each."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_hinm.mask import check_saliency
from lightning_hinm.pattern import (
    HiNMPattern,
    from_matrix,
    layer_kind,
    named_layers,
    other_kind,
    plain_name,
    to_matrix,
)
from lightning_hinm.prune.report import LayerReport
from lightning_hinm.saliency import magnitude


@dataclass(frozen=True, eq=False)
class PrunableLayer:
    """A layer that a pattern is meant for: its module, its kind, and its weight as a matrix.

    Args:
        name: the module's qualified name, "" for the model itself.
        module: the layer.
        kind: as ``pattern.layer_kind`` tells.
        pattern: the pattern it shall have.
        in_order: whether its rows stay where they are, and only the vectors are searched.
        heads: equal parts of its rows, or of those of each channel group, that no row leaves.
    """

    name: str
    module: nn.Module
    kind: str
    pattern: HiNMPattern
    in_order: bool = False
    heads: int = 1

    @property
    def parts(self) -> int:
        """Equal parts of all rows that no row leaves."""
        return self.groups * self.heads

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

    @property
    def given_order(self) -> Tensor | None:
        """The ``output_order`` that the search has to take, int64 ``[O]``, or None."""
        return torch.arange(len(self.matrix)) if self.in_order else None

    def to_weight(self, matrix: Tensor) -> Tensor:
        """``[O, I]`` (a mask, say) in the shape of the weight."""
        return from_matrix(matrix, self.kind, tuple(self.weight.shape))


def find_layers(
    model: nn.Module,
    pattern: HiNMPattern | Mapping[str, HiNMPattern],
    *,
    include: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    in_order: Sequence[str] = (),
    heads: Mapping[str, int] | None = None,
) -> tuple[list[PrunableLayer], list[LayerReport]]:
    """The layers to prune, and a report of those that are not, each with its reason. A shared weight comes once.

    Raises:
        ValueError: for entries that match nothing, parametrised, uninitialised or non-finite weights, heads that are
            not whole tiles, or nothing to prune; all offenders in one message.
    """
    prunable = named_layers(model)
    wrong: list[str] = []
    chosen = _match(model, prunable, include, "include", wrong)
    left_out = _match(model, prunable, ignore, "ignore", wrong) or set()
    fixed = {id(prunable[name].weight) for name in _match(model, prunable, in_order, "in_order", wrong) or ()}
    heads_of: dict[int, int] = {}
    for of_heads, count in (heads or {}).items():
        if type(count) is not int or count < 1:
            raise TypeError(f"heads[{of_heads!r}]: got {count!r}, but it must be a number of heads.")
        for name in _match(model, prunable, [of_heads], "heads", wrong) or ():
            heads_of.setdefault(id(prunable[name].weight), count)
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
            told = "in `ignore`" if name in left_out else "not in `include`"
            skipped.append(LayerReport(name, kind, tuple(module.weight.shape), reason=told))  # type: ignore[arg-type]
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
            layer = PrunableLayer(name, module, kind, patterns[name], id(weight) in fixed, heads_of.get(id(weight), 1))
            reason = _does_not_pay(layer)
        if reason is not None:
            skipped.append(LayerReport(name, kind, tuple(weight.shape), reason=reason))
            continue
        seen[id(weight)] = name
        layers.append(layer)
        rows, size = len(layer.matrix), layer.pattern.vector_size
        if layer.heads > 1 and rows % (layer.parts * size):
            wrong.append(
                f"heads: {name} has {rows} rows, which are no {layer.parts} equal parts of whole tiles of "
                f"vector_size={size}. Name it in `in_order` instead, or lower its vector_size"
            )
        if layer.heads > 1 and layer.in_order:
            wrong.append(f"heads: {name} is in `in_order` too, but its rows either stay where they are or do not")
        if weight.is_meta:
            wrong.append(f"{name}: its weight is on the meta device. Load or initialise it first")
        elif not weight.detach().isfinite().all():
            bad = (~weight.detach().isfinite()).sum().item()
            wrong.append(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite. Load or initialise it again")
    for path, module in model.named_modules():
        other = other_kind(module)
        if other is not None:
            told = f"{type(module).__name__} has a forward of its own: what it does with its weight is not known"
            skipped.append(LayerReport(plain_name(path), other, tuple(module.weight.shape), reason=told))
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
        ValueError: for entries that match nothing, layers that are not pruned, whose rows stay in order, that are
            grouped convolutions or in two sets, and sets with different numbers of rows or heads, or tiles of
            different sizes; all offenders in one message.
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
                wrong.append(f"{argument}: {name} is not pruned: {reasons[name]}")
                continue
            members.append(layer)
            if layer.groups > 1:
                wrong.append(f"{argument}: {name} has groups={layer.groups}, but no row may leave its group")
            if layer.in_order:
                wrong.append(f"{argument}: {name} is in `in_order`, so it takes no order from others")
            if set_of.setdefault(name, i) != i:
                wrong.append(f"{argument}: {name} is in shared_orders[{set_of[name]}] too")
        rows = {layer.name: layer.matrix.shape[0] for layer in members}
        sizes = {layer.name: layer.pattern.vector_size for layer in members}
        heads = {layer.name: layer.heads for layer in members}
        for what, numbers in {"number of rows": rows, "vector_size": sizes, "number of heads": heads}.items():
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
