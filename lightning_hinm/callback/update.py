"""One update: the saliency that was gathered, the search shared out over the ranks, and what it chose."""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_hinm.callback.state import PruningState
from lightning_hinm.gyro import SearchResult, search_shared
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import check_saliency
from lightning_hinm.pattern import HiNMPattern, to_matrix
from lightning_hinm.prune import PrunableLayer, saliencies
from lightning_hinm.saliency import magnitude, taylor

SECONDS_BETWEEN_LINES = 5.0  # of the progress of a long search


@dataclass(frozen=True, eq=False)
class Choice:
    """What one update decides for one layer.

    Args:
        mask: bool ``[O, I]``, True = kept; a subset of the mask in force.
        layout: how the masked weight is packed; None for a mask that no pattern describes.
        ended_by_budget: whether the time budget cut the search short.
    """

    mask: Tensor
    layout: HiNMLayout | None = None
    ended_by_budget: bool = False


@dataclass(frozen=True, eq=False)
class Found:
    """A choice and its numbers, as one rank tells the others.

    Args:
        choice: on the CPU.
        kept: saliency that the mask keeps.
        total: saliency of the weights that the mask before it kept.
        seconds: that it took.
    """

    choice: Choice
    kept: float
    total: float
    seconds: float


@torch.no_grad()
def gather_taylor_(state: PruningState, layers: Sequence[PrunableLayer], optimizer: Optimizer) -> None:
    """Adds the Taylor saliency of one step of the optimizer that has these layers.

    A step with a non-finite gradient anywhere is none: it would poison the sums, and GradScaler skips it too.
    """
    grads = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    if not all(bool(grad.isfinite().all()) for grad in grads if grad is not None):
        return
    for layer in layers:
        name, grad = layer.name, layer.weight.grad
        if grad is not None and name not in state.adopted:
            step = taylor(layer.matrix, to_matrix(grad, layer.kind))  # [O, I]
            state.sums[name] = state.sums[name].add_(step) if name in state.sums else step
            state.steps[name] = state.steps.get(name, 0) + 1


def saliency_of(state: PruningState, layer: PrunableLayer, saliency: str | Mapping[str, Tensor]) -> Tensor:
    """The saliency of one layer, ``[O, I]``: what was given, or what was summed, or else the magnitude."""
    if not isinstance(saliency, str):
        return saliencies([layer], saliency)[layer.name]
    return state.sums[layer.name] if layer.name in state.sums else magnitude(layer.matrix)


@torch.no_grad()
def settle_saliency_(
    state: PruningState, layers: Sequence[PrunableLayer], saliency: str | Mapping[str, Tensor], trainer: Trainer
) -> None:
    """Makes the saliency of every layer final, and the same on all ranks.

    Raises:
        ValueError: if any is not finite; all offenders in one message.
    """
    silent, wrong = [], []
    for layer in layers if saliency == "taylor" else ():
        if trainer.world_size > 1:
            own = state.sums.get(layer.name, torch.zeros_like(magnitude(layer.matrix)))
            state.sums[layer.name] = trainer.strategy.reduce(own, reduce_op="mean")
        if layer.name not in state.sums or not state.sums[layer.name].any():
            state.sums.pop(layer.name, None)
            silent.append(layer.name)
    for layer in layers:
        try:
            check_saliency(saliency_of(state, layer, saliency), f"{layer.name}: saliency")
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("HiNMPruning: nothing was pruned:\n  " + "\n  ".join(wrong))
    if silent:
        rank_zero_warn(
            f"HiNMPruning: no gradient has reached {', '.join(silent)}, so magnitude is their saliency. Add frozen "
            "layers to `ignore`, or set `saliency` to 'magnitude'."
        )


def generator_of(seed: int, name: str, update: int) -> torch.Generator:
    """The randomness of one layer in one update; not the next numbers of a stream: the same on one rank and on many."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {zlib.crc32(name.encode())} {update}".encode()))


def share_order(
    layers: Sequence[PrunableLayer],
    scores: Sequence[Tensor],
    time_budget: float | None,
    *,
    method: str,
    seed: int,
    update: int,
) -> list[SearchResult]:
    """One ``output_order`` for several layers, searched for their targets."""
    names = [layer.name for layer in layers]
    return search_shared(
        scores,
        [layer.pattern for layer in layers],
        groups=layers[0].parts,
        method=method,
        generator=generator_of(seed, names[0], update),
        time_budget=time_budget,
        progress=lambda so_far: rank_zero_info(f"HiNMPruning: {', '.join(names)}: {so_far}"),
    )


def search_layers(
    sets: Sequence[Sequence[PrunableLayer]],
    share: Callable[[Sequence[PrunableLayer], Sequence[Tensor], float | None], Sequence[SearchResult]],
    choose: Callable[[PrunableLayer, HiNMLayout | None, float | None], Choice],
    state: PruningState,
    saliency: str | Mapping[str, Tensor],
    trainer: Trainer,
    time_budget: float | None,
) -> dict[str, Found]:
    """The choices for all layers by name, the work shared out over the ranks, the result the same on each.

    Args:
        sets: layers whose masks change, those that are to share their order in one list.
        share: finds that order for the layers of one list and their saliencies, in a number of seconds.
        choose: decides for one layer, given a layout to go on from, in a number of seconds.
        state: with the masks before.
        saliency: name, or a tensor for each layer.
        trainer: of the ranks.
        time_budget: seconds for all layers together, shared out by their sizes; None for no limit.
    """
    sizes = {together[0].name: sum(layer.weight.numel() for layer in together) for together in sets}
    owners = share_out(sizes, trainer.world_size)
    own = [together for together in sets if owners[together[0].name] == trainer.global_rank]
    count, left = sum(map(len, own)), sum(sizes[together[0].name] for together in own)
    found: dict[str, Found] = {}
    begin = told = time.monotonic()
    for together in own:
        start, size = time.monotonic(), sizes[together[0].name]
        budget = None
        if time_budget is not None:
            budget = max(time_budget - (start - begin), 0.0) * size / left
        left -= size
        layouts, ended = state.layouts, False
        if len(together) > 1:
            shared = share(together, [saliency_of(state, layer, saliency) for layer in together], budget)
            layouts = {layer.name: result.layout for layer, result in zip(together, shared, strict=True)}
            ended = shared[0].ended_by_budget
            if budget is not None:
                budget = max(budget - (time.monotonic() - start), 0.0)
        choices = [choose(layer, layouts.get(layer.name), budget) for layer in together]
        seconds = (time.monotonic() - start) / size
        for layer, choice in zip(together, choices, strict=True):
            scores, before = saliency_of(state, layer, saliency), state.masks.get(layer.name)
            if before is not None:
                scores = torch.where(to_matrix(before, layer.kind), scores, 0)
            kept = torch.where(choice.mask, scores, 0).sum(dtype=torch.float64).item()
            total = scores.sum(dtype=torch.float64).item()
            choice = replace(choice, mask=choice.mask.cpu(), ended_by_budget=choice.ended_by_budget or ended)
            found[layer.name] = Found(choice, kept, total, seconds * layer.weight.numel())
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            rank_zero_info(f"HiNMPruning: searched {len(found)} of {count} layers in {told - begin:.0f} s")
    if trainer.world_size > 1:
        sources = {layer.name: owners[together[0].name] for together in sets for layer in together}
        broadcast = trainer.strategy.broadcast
        found = {name: broadcast(found.get(name), src=source) for name, source in sources.items()}  # type: ignore[misc]
    return found


def record_(state: PruningState, layer: PrunableLayer, pattern: HiNMPattern, found: Found) -> None:
    """Puts what was found for one layer in force; its weight is not touched yet."""
    choice, name, before = found.choice, layer.name, state.reports[layer.name]
    retained = before.retained
    if retained is not None:  # of the weights that the mask before kept, hence the product over the updates
        retained *= min(found.kept / found.total, 1.0) if found.total else 1.0
    state.masks[name] = layer.to_weight(choice.mask.to(layer.weight.device))
    state.patterns[name] = pattern
    state.layouts.pop(name, None)
    if choice.layout is not None:
        state.layouts[name] = replace(choice.layout, retained=retained)
    state.reports[name] = replace(
        before,
        sparsity=1 - choice.mask.sum().item() / choice.mask.numel(),
        retained=retained,
        seconds=before.seconds + found.seconds,
        ended_by_budget=before.ended_by_budget or choice.ended_by_budget,
    )


def share_out(costs: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Name -> rank: the dearest first, each to the rank with the least so far.

    >>> share_out({"a": 4, "b": 3, "c": 2, "d": 1}, ranks=2)
    {'a': 0, 'b': 1, 'c': 1, 'd': 0}
    """
    loads, owners = [0] * ranks, {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners
