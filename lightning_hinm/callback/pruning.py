"""The Lightning callback. It says when and where; which weights survive is decided in ``mask`` and ``gyro``."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_hinm.callback.enforce import check_strategy, mask_averages_, mask_gradients_, mask_weights_, owned_by
from lightning_hinm.callback.state import (
    PruningState,
    check_belongs,
    describe_adopted,
    dump_state,
    fix_totals_,
    fresh_state,
    progress_of,
    read_state,
    report_of,
    targets_of,
)
from lightning_hinm.callback.update import (
    Choice,
    gather_taylor_,
    generator_of,
    record_,
    saliency_of,
    search_layers,
    settle_saliency_,
    share_order,
)
from lightning_hinm.gyro import METHODS, search
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import choose_vectors, hinm_mask
from lightning_hinm.pattern import HiNMPattern, to_matrix
from lightning_hinm.prune import (
    LayerReport,
    PrunableLayer,
    PruningReport,
    find_layers,
    find_sets,
    saliencies,
    set_layout,
)
from lightning_hinm.schedule import GradualSchedule


class HiNMPruning(Callback):
    """Prunes to the HiNM pattern during ``trainer.fit``, and keeps pruned weights at exactly zero from then on.

    The model, its ``state_dict`` and its optimizer stay ordinary: a checkpoint is a plain dense one with zeros in it.
    When a layer has its target pattern, its module remembers the layout, ready for ``to_hinm`` and ``torch.compile``.

    Args:
        pattern: one pattern, or one for each entry of the same dialect as ``include``; the first that matches holds.
        schedule: when, and in how many updates, the sparsity rises.
        include: layers to prune: plain names (a layer, or a container: all layers below it), class names, or ``re:``
            patterns for ``re.match``. None: all that pay.
        ignore: layers to leave out, in the same dialect.
        saliency: ``"taylor"`` (sums of ``|w * grad|`` over real steps), ``"magnitude"``, or a tensor of the weight's
            shape for each layer name.
        saliency_steps: real steps that Taylor sums before the first update.
        method: the search: ``"exchange"``, ``"gyro"`` (the paper's) or ``"identity"`` (none).
        seed: of the search; the global random state is neither read nor set.
        time_budget: seconds that the search of one update may take, for all layers together; None for no limit.
        shared_orders: sets of layers, each a list of entries as in ``include``, that get one ``output_order``, as in
            ``prune``. A layer that was pruned before the training keeps its own.
        in_order: layers whose rows stay where they are, as in ``prune``.
        heads: layers whose rows stay in their heads, as in ``prune``.

    Raises:
        ValueError: if an argument has no meaning; all offenders in one message.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[HiNMPruning(HiNMPattern.from_sparsity(0.75))])
    """

    def __init__(
        self,
        pattern: HiNMPattern | dict[str, HiNMPattern] = HiNMPattern(),  # noqa: B008 - frozen
        schedule: GradualSchedule = GradualSchedule(),  # noqa: B008 - frozen
        include: list[str] | None = None,
        ignore: list[str] | None = None,
        saliency: Literal["taylor", "magnitude"] | dict[str, Tensor] = "taylor",
        saliency_steps: int = 20,
        method: Literal["exchange", "gyro", "identity"] = "exchange",
        seed: int = 0,
        time_budget: float | None = None,
        shared_orders: Sequence[Sequence[str]] = (),
        in_order: Sequence[str] = (),
        heads: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        wrong = []
        if isinstance(saliency, str) and saliency not in ("taylor", "magnitude"):
            wrong.append(f"saliency={saliency!r} must be 'taylor', 'magnitude' or a tensor for each layer name")
        if saliency_steps < 1:
            wrong.append(f"saliency_steps={saliency_steps} must be at least 1, e.g. 20")
        if method not in METHODS:
            wrong.append(f"method={method!r} must be one of {', '.join(METHODS)}")
        if time_budget is not None and not time_budget > 0:
            wrong.append(f"time_budget={time_budget} must be a number of seconds, or None for no limit")
        if wrong:
            raise ValueError("HiNMPruning: " + "; ".join(wrong) + ".")
        self.pattern = pattern
        self.schedule = schedule
        self.include = include
        self.ignore = ignore
        self.saliency = saliency
        self.saliency_steps = saliency_steps
        self.method = method
        self.seed = seed
        self.time_budget = time_budget
        self.shared_orders = shared_orders
        self.in_order = in_order
        self.heads = heads
        self._state = PruningState({})
        self._restored = False  # the state came from a checkpoint, and has not been compared with a model yet
        self._stage: str | None = None
        self._skipped: list[LayerReport] = []
        self._metrics: dict[str, float] = {}
        self._forget_model()

    def _forget_model(self) -> None:
        """Sets what belongs to one model in one process, and is neither copied nor pickled."""
        self._model: Callable[[], Any] = lambda: None  # later a weakref.ref: a callback keeps no model alive
        self._sets: list[list[PrunableLayer]] = []  # those that share their order together, every other by itself
        self._hooks: list[Any] = []
        self._changed = False  # masks were changed, but are not in force everywhere yet

    @property
    def _layers(self) -> list[PrunableLayer]:
        return [layer for together in self._sets for layer in together]

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks in force by layer name: bool, in the weight's own shape, True = kept."""
        return dict(self._state.masks)

    @property
    def layouts(self) -> dict[str, HiNMLayout]:
        """The layouts of these masks; a layer has its target when ``layout.pattern`` is its pattern."""
        return dict(self._state.layouts)

    @property
    def report(self) -> PruningReport:
        """What became of every layer that could be pruned; ``str()`` is a table."""
        return PruningReport((*self._state.reports.values(), *self._skipped))

    def choose_mask(
        self,
        layer: PrunableLayer,
        saliency: Tensor,
        pattern: HiNMPattern,
        *,
        layout: HiNMLayout | None,
        within: Tensor | None,
        generator: torch.Generator,
        time_budget: float | None,
    ) -> Choice:
        """The next mask of one layer: the one decision that a subclass may take in another way.

        ``output_order`` is searched once, at the first update, for the target; the arrangement of the vectors when
        ``n`` first falls below ``m``. Searched anew each time, the masks would not nest.

        Args:
            layer: ``layer.pattern`` is the target.
            saliency: non-negative, ``[O, I]``.
            pattern: the pattern that is due.
            layout: of the mask in force. Before the first update None, or what was found for the target of a layer
                that shares its order: the order then stands.
            within: bool ``[O, I]``, the mask in force; None before the first update.
            generator: randomness of this layer in this update.
            time_budget: seconds for this layer, or None.
        """
        ended = False
        if layout is None or pattern.n < pattern.m == layout.pattern.n:
            found = search(
                saliency,
                layer.pattern,
                groups=layer.parts,
                method=self.method,
                generator=generator,
                time_budget=time_budget,
                output_order=layer.given_order if layout is None else layout.output_order,
                within=within,
                progress=lambda so_far: rank_zero_info(f"HiNMPruning: {layer.name}: {so_far}"),
            )
            layout, ended = found.layout, found.ended_by_budget
        order, whole = layout.output_order, pattern.n == pattern.m  # whole vectors: their order has no meaning yet
        index = choose_vectors(saliency, pattern, order, within=within) if whole else layout.vector_index
        layout = HiNMLayout(pattern, order, index).to("cpu")
        return Choice(hinm_mask(saliency, layout, within=within), layout, ended)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if stage != "fit":
            return
        check_strategy(trainer)
        if self._model() is not pl_module and not self._restored:
            self._state = PruningState({})  # another model: anew
        self._model = weakref.ref(pl_module)

    # Layers are looked up here and not in `setup`: `configure_model` and a LightningModule's own `setup` run after the
    # callback's, and so does the loading of a checkpoint.
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, False
        layers, self._skipped = find_layers(
            pl_module,
            self.pattern,
            include=self.include,
            ignore=self.ignore,
            in_order=self.in_order,
            heads=self.heads,
        )
        sets = find_sets(pl_module, layers, self._skipped, self.shared_orders)
        if not isinstance(self.saliency, str):
            saliencies(layers, self.saliency)
        if restored:
            check_belongs(self._state, sets)
        elif self._state.targets != targets_of(layers):
            self._state = fresh_state(layers)
            for name in self._state.adopted:
                rank_zero_info(f"HiNMPruning: {describe_adopted(self._state, name, sets)}")
            if len(self._state.adopted) == len(layers):
                self._state.update = self.schedule.last
        self._sets, state = sets, self._state
        for layer in layers:
            state.reports.setdefault(layer.name, report_of(state, layer))
            for tensors in (state.masks, state.sums):
                if layer.name in tensors:
                    tensors[layer.name] = tensors[layer.name].to(layer.weight.device)
        self._measure()
        self._write_layouts(pl_module)
        reasons = "".join(f"\n  {entry.name}: {entry.reason}" for entry in self._skipped)
        rank_zero_info(f"HiNMPruning: {len(layers)} layers to prune, {len(self._skipped)} skipped{reasons}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._state.update < self.schedule.last:
            fix_totals_(self._state, trainer)
        self._remove_hooks()
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]
        self._apply(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        owned = owned_by(optimizer, self._layers)
        if self._state.update < self.schedule.last:
            if self.saliency == "taylor":
                gather_taylor_(self._state, owned, optimizer)
            update = self._due(trainer)
            if update > self._state.update:
                self._update(trainer, update)
                # Only what this optimizer steps anyway: under manual optimization, weights of the others may stand in
                # a graph whose backward is still to come. They follow at the end of the batch.
                mask_weights_(owned, self._state.masks, trainer.optimizers)
        mask_gradients_(owned, self._state.masks)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # After the step, not before: momentum and weight decay of the step itself revive pruned weights.
        mask_weights_(owned_by(optimizer, self._layers), self._state.masks, (optimizer,))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if progress_of(self._state, trainer, this_batch=1) >= 1:
            self._finish(trainer)  # not only in `on_train_end`: the last validation and checkpoint come before that
        if self._changed:
            self._apply(trainer, pl_module)
            self._log(trainer)
        if self._state.masks and not trainer.barebones:
            pl_module.log_dict(self._metrics, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    # An averaging callback swaps weights through `.data`, which no version counter sees: touch them, so that a compiled
    # graph packs anew. At the first batch, because every `on_validation_epoch_start` has run by then.
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0:
            mask_weights_(self._layers, self._state.masks, ())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mask_weights_(self._layers, self._state.masks, ())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)
        if self._changed:
            self._log(trainer)
        # Also without a change: an averaging callback may just have copied its weights over.
        self._apply(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()  # Lightning calls no `teardown` then

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_hooks()
        self._sets, self._stage = [], None

    def state_dict(self) -> dict[str, Any]:
        return dump_state(self._state, self.schedule) if self._state.targets else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # `trainer.test(ckpt_path="best")` loads callbacks too, but must not turn a training back.
        if self._stage in (None, "fit"):
            self._state, self._restored = read_state(state_dict, self.schedule), True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_model", "_sets", "_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_model()
        vars(self).update(state)

    def _due(self, trainer: Trainer) -> int:
        """Number of the update that is due before this step, perhaps one that was made already."""
        due = self.schedule.due(progress_of(self._state, trainer))
        if due and not self._state.update and self.saliency == "taylor":
            ready = max(self._state.steps.values(), default=0) >= self.saliency_steps
            # All ranks or none: without synchronised gradients they may have skipped different steps.
            if not trainer.strategy.reduce_boolean_decision(ready):
                return 0
        return due

    @torch.no_grad()
    def _update(self, trainer: Trainer, update: int) -> None:
        """Decides the masks of one update for all layers; no weight is touched."""
        state = self._state
        due = {layer.name: self.schedule.pattern(update, layer.pattern) for layer in self._layers}
        changing = {name for name in due if name not in state.adopted and due[name] != state.patterns.get(name)}
        sets = [[layer for layer in together if layer.name in changing] for together in self._sets]
        layers = [layer for together in sets for layer in together]
        if state.update:  # orders stand from the first update on, and nothing else is shared
            sets = [[layer] for layer in layers]

        def choose(layer: PrunableLayer, layout: HiNMLayout | None, time_budget: float | None) -> Choice:
            within = state.masks.get(layer.name)
            return self.choose_mask(
                layer,
                saliency_of(state, layer, self.saliency),
                due[layer.name],
                layout=layout,
                within=None if within is None else to_matrix(within, layer.kind),
                generator=generator_of(self.seed, layer.name, update),
                time_budget=time_budget,
            )

        settle_saliency_(state, layers, self.saliency, trainer)
        share = partial(share_order, method=self.method, seed=self.seed, update=update)
        found = search_layers(list(filter(None, sets)), share, choose, state, self.saliency, trainer, self.time_budget)
        state.update, state.sums, state.steps = update, {}, {}
        for layer in layers:
            record_(state, layer, due[layer.name], found[layer.name])
        if found:
            kept, total = sum(one.kept for one in found.values()), sum(one.total for one in found.values())
            state.retained *= min(kept / total, 1.0) if total else 1.0
            self._measure()
            self._changed = True
            rank_zero_info(
                f"HiNMPruning: update {update} of {self.schedule.last} at step {trainer.global_step}: "
                f"sparsity {self._metrics['hinm/sparsity']:.4f}, retained saliency {state.retained:.4f}, "
                f"{len(layers)} layers searched in {sum(one.seconds for one in found.values()):.1f} s"
            )

    def _finish(self, trainer: Trainer) -> None:
        """Makes the updates that the training had no step left for: it always ends with the target in force."""
        if self._state.update == self.schedule.last:
            return
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"HiNMPruning: the training ended at update {self._state.update} of {self.schedule.last}; the rest is "
                "pruned now, and nothing trains after it. Train longer, or lower `schedule.end` or `saliency_steps` "
                f"({self.saliency_steps})."
            )
        self._update(trainer, self.schedule.last)

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the masks in force everywhere: weights, optimizer state, averaged copies, and layouts on the modules."""
        mask_weights_(self._layers, self._state.masks, trainer.optimizers)
        mask_averages_(trainer.callbacks, pl_module, self._layers, self._state.masks)  # type: ignore[attr-defined]
        self._write_layouts(pl_module)
        self._changed = False

    def _write_layouts(self, pl_module: LightningModule) -> None:
        for layer in self._layers:
            layout = self._state.layouts.get(layer.name)
            final = layout is not None and layout.pattern == layer.pattern
            set_layout(layer, layout if final else None, pl_module)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _measure(self) -> None:
        # Once for each change of the masks: counting waits for the device.
        self._metrics = {"hinm/sparsity": self._state.sparsity, "hinm/retained": self._state.retained}

    def _log(self, trainer: Trainer) -> None:
        # Straight to the loggers: what is logged through the module waits for `log_every_n_steps`.
        for logger in trainer.loggers:
            logger.log_metrics(self._metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
