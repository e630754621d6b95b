"""One-shot pruning of any module."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_hinm.gyro import SearchResult, search_shared
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import hinm_mask
from lightning_hinm.pattern import HiNMPattern, layer_kind, plain_name
from lightning_hinm.prune.layers import PrunableLayer, find_layers, find_sets, saliencies
from lightning_hinm.prune.report import LayerReport, PruningReport

__all__ = [
    "LAYOUT_ATTRIBUTE",
    "LayerReport",
    "PrunableLayer",
    "PruningReport",
    "find_layers",
    "find_sets",
    "layout_of",
    "prune",
    "saliencies",
    "set_layout",
]

log = logging.getLogger(__name__)

LAYOUT_ATTRIBUTE = "hinm_layout"


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
    in_order: Sequence[str] = (),
    heads: Mapping[str, int] | None = None,
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
        in_order: layers, in the same dialect, whose rows stay where they are, so that there is nothing to restore
            either: queries and keys that are rotated, for one, or what makes a result of the model. Only their vectors
            are searched, which retains less than an order that is free.
        heads: numbers of attention heads by entries of the same dialect; the first that matches holds. No row leaves
            its head, so that the order of a projection of values is absorbed through the attention by whoever reads
            what comes out. Queries and keys that are not rotated need it too, and one order (``shared_orders``). It
            retains less than an order that is free, and pays only where a head has more rows than a tile.

    Returns:
        The report: name, shape, sparsity and retained saliency of every layer, or the reason why it was skipped.

    Raises:
        ValueError: for an entry that matches nothing, a model with nothing to prune, weights or a saliency that are
            negative or not finite, a parametrised weight, layers that cannot share an order; all offenders in one
            message, and nothing was changed.
        TypeError: for a pattern that is none, or a number of heads that is no int from 1 up.
    """
    layers, skipped = find_layers(model, pattern, include=include, ignore=ignore, in_order=in_order, heads=heads)
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
            groups=together[0].parts,
            method=method,
            generator=generator,
            time_budget=share,
            output_order=together[0].given_order,
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
    paths = (plain_name(path) for path, _ in model.named_modules())
    return PruningReport(tuple(reports[name] for name in paths if name in reports))


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
