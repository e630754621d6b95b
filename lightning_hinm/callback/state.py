"""What the callback remembers: masks, layouts, how far it is; and how a checkpoint holds that, validated when read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_hinm.format import layer_state, read_layer_state
from lightning_hinm.format.record import LayerRecord
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import hinm_mask
from lightning_hinm.pattern import HiNMPattern, to_matrix
from lightning_hinm.prune import LayerReport, PrunableLayer, layout_of
from lightning_hinm.saliency import magnitude
from lightning_hinm.schedule import GradualSchedule

COUNTS = ("update", "total_batches", "max_steps")


@dataclass(eq=False)
class PruningState:
    """One training's pruning, by layer name.

    Args:
        targets: kind, groups, shape and final pattern of every layer that is pruned.
        update: number of the last update that was made.
        total_batches: of the whole training, fixed at its first start; None where not known.
        max_steps: of the trainer at that start; None for no limit.
        retained: kept over total saliency, multiplied over the updates.
        patterns: the pattern that each mask obeys now.
        masks: bool, in the weight's own shape and on its device; True = kept.
        layouts: of the masks, where there is one.
        adopted: layers whose zeros were there before the training, and which no update touches.
        sums: Taylor saliency since the last update, float ``[O, I]``.
        steps: real steps in each sum.
        reports: what became of each layer so far; not in a checkpoint.
    """

    targets: dict[str, LayerRecord]
    update: int = 0
    total_batches: int | None = None
    max_steps: int | None = None
    retained: float = 1.0
    patterns: dict[str, HiNMPattern] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, HiNMLayout] = field(default_factory=dict)
    adopted: list[str] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights in all layers together; those without a mask yet count as dense."""
        total = sum(record.rows * record.in_features for record in self.targets.values())
        return sum((~mask).sum().item() for mask in self.masks.values()) / total if total else 0.0


def fresh_state(layers: Sequence[PrunableLayer]) -> PruningState:
    """The state before the first update, with the masks of layers that were pruned before (see ``adopt``)."""
    state = PruningState(targets_of(layers))
    for layer in layers:
        adopt(state, layer)
    return state


def targets_of(layers: Sequence[PrunableLayer]) -> dict[str, LayerRecord]:
    """Kind, groups, shape and final pattern of every layer, by name."""
    return {
        layer.name: LayerRecord(layer.kind, layer.groups, tuple(layer.weight.shape), layer.pattern) for layer in layers
    }


def adopt(state: PruningState, layer: PrunableLayer) -> None:
    """Takes the zeros of a layer as its mask, if no row keeps more than the target does: it was pruned before.

    An all-zero layer has not been pruned, it has been initialised so (adapters, residual branches).
    """
    matrix, pattern = layer.matrix, layer.pattern
    mask = matrix != 0  # [O, I]
    most = pattern.kept(matrix.shape[1]) * pattern.n // pattern.m
    if not mask.any() or mask.sum(dim=1).max() > most:
        return
    layout = layout_of(layer.module)
    if layout is not None and layout.pattern == pattern:
        whole = hinm_mask(magnitude(matrix), layout)
        if not (mask & ~whole).any():
            mask, state.layouts[layer.name] = whole, layout
    state.masks[layer.name] = layer.to_weight(mask)
    state.patterns[layer.name] = pattern
    state.adopted.append(layer.name)


def report_of(state: PruningState, layer: PrunableLayer) -> LayerReport:
    """What is known of a layer at the start of a fit: a layer that is pruned already, by its mask and its layout."""
    mask, layout = state.masks.get(layer.name), state.layouts.get(layer.name)
    report = LayerReport(layer.name, layer.kind, tuple(layer.weight.shape))
    if mask is None:
        return report
    retained = None if layout is None else layout.retained
    return replace(report, sparsity=1 - mask.sum().item() / mask.numel(), retained=retained)


def fix_totals_(state: PruningState, trainer: Trainer) -> None:
    """Fixes the length of the training at its first start: a longer resume must not move what is due.

    Raises:
        ValueError: if the length is not known.
    """
    if state.total_batches is not None or state.max_steps is not None:
        return
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs not in (None, -1) and batches != float("inf"):
        state.total_batches = int(epochs * batches)
    if trainer.max_steps != -1:
        state.max_steps = trainer.max_steps
    if state.total_batches is None and state.max_steps is None:
        raise ValueError(
            f"HiNMPruning: got max_epochs={epochs}, max_steps={trainer.max_steps} and {batches} batches an epoch, "
            "but a schedule in fractions of the training needs its length. Set `Trainer(max_steps=...)`."
        )


def progress_of(state: PruningState, trainer: Trainer, this_batch: int = 0) -> Fraction:
    """The part of the training that is done, exactly."""
    progress = Fraction(0)
    # Batches, not steps: GradScaler skips steps, and two manual optimizers make two of them a batch.
    if state.total_batches:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed + this_batch
        progress = Fraction(done, state.total_batches)
    if state.max_steps:
        progress = max(progress, Fraction(trainer.global_step, state.max_steps))
    return progress


def describe_adopted(state: PruningState, name: str, sets: Sequence[Sequence[PrunableLayer]]) -> str:
    """What is known, and what is not, of a layer that was pruned before."""
    layout = "with its layout"
    if name not in state.layouts:
        layout = "without a layout: weights do not hold it, `load_layouts` reads it from a whole checkpoint"
    sparsity = 1 - state.masks[name].float().mean()
    others = next(together for together in sets if any(layer.name == name for layer in together))
    order = "" if len(others) == 1 else "; its rows keep their own order, whatever it was to share one with"
    return f"{name} is pruned already (sparsity {sparsity:.4f}) and stays so, {layout}{order}"


def dump_state(state: PruningState, schedule: GradualSchedule) -> dict[str, Any]:
    """Tensors and primitives only, so that the default ``weights_only`` resume takes it; bits and int32, so small."""
    return {
        "schedule": asdict(schedule),
        **{name: getattr(state, name) for name in COUNTS},
        "retained": state.retained,
        "targets": {name: record.to_dict() for name, record in state.targets.items()},
        "layers": {
            name: layer_state(
                kind=state.targets[name].kind,
                groups=state.targets[name].groups,
                pattern=state.patterns[name],
                mask=mask,
                layout=state.layouts.get(name),
            )
            for name, mask in state.masks.items()
        },
        "adopted": list(state.adopted),
        "sums": {name: total.cpu().clone() for name, total in state.sums.items()},
        "steps": dict(state.steps),
    }


def read_state(stored: Mapping[str, Any], schedule: GradualSchedule) -> PruningState:
    """The inverse of ``dump_state``; trusts nothing.

    Raises:
        ValueError: if the state is damaged, or was half way through another schedule; all offenders in one message.
    """
    expected = {"schedule", *COUNTS, "retained", "targets", "layers", "adopted", "sums", "steps"}
    if not isinstance(stored, Mapping) or set(stored) != expected:
        got = sorted(map(str, stored)) if isinstance(stored, Mapping) else type(stored).__name__
        raise ValueError(f"The state of HiNMPruning holds {got}, but must hold exactly {sorted(expected)}.")
    wrong: list[str] = []
    for name, kind in {"targets": dict, "layers": dict, "sums": dict, "steps": dict, "adopted": list}.items():
        if not isinstance(stored[name], kind):
            wrong.append(f"{name} is {type(stored[name]).__name__}, but must be a {kind.__name__}")
    for name in COUNTS:
        optional = stored[name] is None and name != "update"
        if not optional and (type(stored[name]) is not int or stored[name] < 0):
            wrong.append(f"{name}={stored[name]!r}, but it must be a number from 0 up")
    if type(stored["retained"]) is not float or not 0 <= stored["retained"] <= 1:
        wrong.append(f"retained={stored['retained']!r}, but it must be in [0, 1]")
    if wrong:
        raise _damaged(wrong)
    try:
        before = GradualSchedule(**stored["schedule"])
    except (TypeError, ValueError) as error:
        raise _damaged([f"schedule={stored['schedule']!r} ({error})"]) from None
    if stored["update"] > before.last:
        raise _damaged([f"update={stored['update']}, but the schedule has {before.last}"])
    if before != schedule and stored["update"] < before.last:
        raise ValueError(
            f"The checkpoint was written after update {stored['update']} of {before}, but the callback has {schedule}, "
            "and masks must nest. Resume with the schedule of the checkpoint, or start a new fit from its weights."
        )
    state = PruningState(
        {},
        update=schedule.last if stored["update"] == before.last else stored["update"],
        total_batches=stored["total_batches"],
        max_steps=stored["max_steps"],
        retained=stored["retained"],
        adopted=stored["adopted"],
    )
    for name, target in stored["targets"].items():
        try:
            state.targets[name] = LayerRecord.from_dict(target)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    for name, layer in stored["layers"].items():
        try:
            _read_layer(state, name, layer)
        except ValueError as error:
            wrong.append(str(error))
    wrong += [f"adopted: {name!r} has no mask" for name in state.adopted if name not in stored["layers"]]
    for name, total in stored["sums"].items():
        record = state.targets.get(name)
        shape = None if record is None else (record.rows, record.in_features)
        if not isinstance(total, Tensor) or not total.is_floating_point() or tuple(total.shape) != shape:
            wrong.append(f"{name}: its saliency sum must be a floating-point tensor {shape}")
        elif not total.isfinite().all() or (total < 0).any():
            wrong.append(f"{name}: its saliency sum is negative or not finite")
        steps = stored["steps"].get(name)
        if type(steps) is not int or steps < 1:
            wrong.append(f"{name}: a saliency sum over steps={steps!r}, but it must be a number from 1 up")
    if wrong:
        raise _damaged(wrong)
    state.sums, state.steps = dict(stored["sums"]), {name: stored["steps"][name] for name in stored["sums"]}
    return state


def check_belongs(state: PruningState, sets: Sequence[Sequence[PrunableLayer]]) -> None:
    """Refuses the state of another model or another pattern, or of other layers that share their orders.

    Raises:
        ValueError: naming every layer that differs.
    """
    targets = targets_of([layer for together in sets for layer in together])
    wrong = [f"{name}: only in the checkpoint" for name in state.targets if name not in targets]
    wrong += [f"{name}: only in the model" for name in targets if name not in state.targets]
    for name, target in targets.items():
        stored = state.targets.get(name)
        if stored is None or stored == target:
            continue
        if stored.pattern != target.pattern:
            wrong.append(f"{name}: the checkpoint has {stored.pattern}, the callback {target.pattern}")
        if (stored.kind, stored.groups, stored.shape) != (target.kind, target.groups, target.shape):
            wrong.append(
                f"{name}: the checkpoint has a {stored.kind} weight {list(stored.shape)} with groups={stored.groups}, "
                f"the model a {target.kind} weight {list(target.shape)} with groups={target.groups}"
            )
    for names in ([layer.name for layer in together if layer.name not in state.adopted] for together in sets):
        orders = [state.layouts[name].output_order for name in names if name in state.layouts]
        if not all(torch.equal(order, orders[0]) for order in orders):
            wrong.append(f"{', '.join(names)}: the callback lets them share one order, but the checkpoint has several")
    if wrong:
        raise ValueError(
            "The state of HiNMPruning in the checkpoint belongs to another model or pattern, but a training resumes "
            "only with its own. Give the callback the arguments of the first run, or start a new fit from the weights."
            + "".join(f"\n  {one}" for one in wrong)
        )


def _read_layer(state: PruningState, name: str, stored: Any) -> None:
    """Adds one layer of a checkpoint to ``state``, validated against its target and its own layout."""
    layer = read_layer_state(name, stored)
    record, target = layer.record, state.targets.get(name)
    if target is None or (record.kind, record.groups, record.shape) != (target.kind, target.groups, target.shape):
        raise ValueError(f"{name}: its mask has a {record.kind} weight {list(record.shape)}, its target another one")
    if layer.layout is not None:
        matrix = to_matrix(layer.mask, record.kind)
        # the layout's own mask of a 0-1 saliency is that saliency, exactly if it is a mask of the layout
        if not torch.equal(hinm_mask(matrix.float(), layer.layout), matrix):
            raise ValueError(f"{name}: its mask does not obey its layout")
        state.layouts[name] = layer.layout
    state.patterns[name], state.masks[name] = record.pattern, layer.mask


def _damaged(wrong: list[str]) -> ValueError:
    listed = "\n  ".join(wrong)
    return ValueError(f"The state of HiNMPruning in the checkpoint is damaged. Use another one.\n  {listed}")
