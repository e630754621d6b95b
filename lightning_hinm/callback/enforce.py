"""Pruned weights stay exactly zero: in gradients, weights, optimizer state and averaged copies.

Everything here is in place, and ``masked_fill_``, never ``mul_``: 0 * inf is NaN. Writes go to the parameter itself,
never through ``.data``, so that its version counter tells a compiled graph that its packed copy is stale.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_hinm.prune import PrunableLayer


def check_strategy(trainer: Trainer) -> None:
    """Refuses a strategy that cuts weights into parts: there is no mask of a part.

    Raises:
        MisconfigurationException: for any but a single device and DDP.
    """
    strategy, whole = trainer.strategy, (SingleDeviceStrategy, DDPStrategy)
    if not isinstance(strategy, whole) or isinstance(strategy, (DeepSpeedStrategy, XLAStrategy)):
        raise MisconfigurationException(
            f"HiNMPruning: got {type(strategy).__name__}, but weights must be whole on every device. "
            "Use a single device or DDP."
        )


def owned_by(optimizer: Optimizer, layers: Iterable[PrunableLayer]) -> list[PrunableLayer]:
    """The layers whose weight this optimizer steps."""
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [layer for layer in layers if id(layer.weight) in ids]


@torch.no_grad()
def mask_gradients_(layers: Iterable[PrunableLayer], masks: Mapping[str, Tensor]) -> None:
    """Zeroes the gradients of pruned weights, so that a clipping norm counts kept weights only."""
    for layer in layers:
        if layer.name in masks and layer.weight.grad is not None:
            layer.weight.grad.masked_fill_(~masks[layer.name], 0)


@torch.no_grad()
def mask_weights_(
    layers: Iterable[PrunableLayer], masks: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
) -> None:
    """Zeroes pruned weights, and all that the optimizers remember of them: momentum would revive them."""
    for layer in layers:
        if layer.name not in masks:
            continue
        pruned = ~masks[layer.name]
        layer.weight.masked_fill_(pruned, 0)
        for optimizer in optimizers:
            # `get`: a plain look-up in this defaultdict would leave an empty entry behind
            for value in optimizer.state.get(layer.weight, {}).values():
                if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                    value.masked_fill_(pruned.to(value.device), 0)


@torch.no_grad()
def mask_averages_(
    callbacks: Iterable[Callback], model: nn.Module, layers: Iterable[PrunableLayer], masks: Mapping[str, Tensor]
) -> None:
    """Zeroes pruned weights in every averaged copy that a callback holds: an average remembers the past too."""
    paths = {id(module): path for path, module in model.named_modules()}
    for copy in averaged_copies(callbacks):
        prefix = _path_of_original(copy, model)
        if prefix is None:
            continue
        for layer in layers:
            path = f"{paths[id(layer.module)]}.weight".lstrip(".")
            if layer.name in masks and path.startswith(prefix):
                weight = copy.get_parameter(path.removeprefix(prefix))
                weight.masked_fill_(~masks[layer.name].to(weight.device), 0)


def averaged_copies(callbacks: Iterable[Callback]) -> list[nn.Module]:
    """The averaged models that callbacks hold. Not every module of a callback: a teacher shall stay dense."""
    copies = []
    for callback in callbacks:
        for value in vars(callback).values():
            if isinstance(value, AveragedModel):
                copies.append(value.module)
            elif isinstance(callback, StochasticWeightAveraging) and value is callback._average_model:
                copies.extend([value] if isinstance(value, nn.Module) else [])
    return copies


def _path_of_original(copy: nn.Module, model: nn.Module) -> str | None:
    """Where in ``model`` the module stands that ``copy`` is an average of, as a prefix of names; None if nowhere."""
    shapes = {name: parameter.shape for name, parameter in copy.named_parameters()}
    for path, module in model.named_modules():
        if {name: parameter.shape for name, parameter in module.named_parameters()} == shapes:
            return f"{path}." if path else ""
    return None
