"""The part of a Lightning checkpoint that says how its layers are pruned, and what can be made of it elsewhere."""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hinm.format.file import FileContents, write_file
from lightning_hinm.format.packing import pack, pack_bits, unpack_bits
from lightning_hinm.format.record import LayerRecord, weight_key
from lightning_hinm.layout import HiNMLayout, check_layout
from lightning_hinm.pattern import HiNMPattern, layer_kind, named_layers, plain_name
from lightning_hinm.prune import PrunableLayer, set_layout

CALLBACK = "HiNMPruning"
UNFINISHED = "Pruning had not reached its target pattern when the checkpoint was written: take a later one."


@dataclass(frozen=True, eq=False)
class LayerState:
    """What a checkpoint knows of one pruned layer: its record, its mask, and its layout where there is one yet."""

    record: LayerRecord
    mask: Tensor
    layout: HiNMLayout | None


def layer_state(
    *,
    kind: str,
    groups: int,
    pattern: HiNMPattern,
    mask: Tensor,
    layout: HiNMLayout | None,
) -> dict[str, Any]:
    """One layer for a checkpoint: tensors and primitives only, so that a ``weights_only`` load takes it.

    Args:
        kind: as ``pattern.layer_kind`` tells.
        groups: channel groups of a convolution, else 1.
        pattern: the pattern that the mask obeys now; the layout's own, where there is a layout.
        mask: bool, in the shape of the module's own weight.
        layout: how the masked weight is packed, or None while that is not known.
    """
    retained = None if layout is None else layout.retained
    return {
        **LayerRecord(kind, groups, tuple(mask.shape), pattern, retained).to_dict(),
        "mask": pack_bits(mask.detach().cpu().flatten()),
        "output_order": None if layout is None else layout.output_order.cpu().to(torch.int32),
        "vector_index": None if layout is None else layout.vector_index.cpu().to(torch.int32),
    }


def read_layer_state(name: str, state: Any) -> LayerState:
    """The inverse of ``layer_state``; trusts nothing.

    Raises:
        ValueError: naming the layer and the rule that is broken.
    """
    own = {"mask", "output_order", "vector_index"}
    if not isinstance(state, Mapping) or not own <= set(state):
        raise ValueError(f"{name}: got {_describe(state)}, but its state must hold {', '.join(sorted(own))}.")
    try:
        record = LayerRecord.from_dict({key: value for key, value in state.items() if key not in own})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    mask, order, index = state["mask"], state["output_order"], state["vector_index"]
    count = record.rows * record.in_features
    if not _is_tensor(mask, torch.uint8) or tuple(mask.shape) != (-(-count // 8),):
        raise ValueError(f"{name}: mask is {_describe(mask)}, but must be uint8 [{-(-count // 8)}], one bit a weight.")
    flags = unpack_bits(mask, 8 * len(mask))
    if flags[count:].any():
        raise ValueError(f"{name}: mask has bits set beyond the last of its {count} weights. The state is damaged.")
    layout = None
    if order is not None or index is not None:
        if not _is_tensor(order, torch.int32) or not _is_tensor(index, torch.int32):
            raise ValueError(
                f"{name}: output_order is {_describe(order)} and vector_index {_describe(index)}, but both must be "
                "int32 tensors, or both None."
            )
        try:
            layout = HiNMLayout(record.pattern, order.to(torch.int64), index.to(torch.int64), record.retained)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        check_layout(layout, record.rows, record.in_features, groups=record.groups, name=name)
    return LayerState(record, flags[:count].reshape(record.shape), layout)


def load_layouts(model: nn.Module, ckpt_path: str | os.PathLike[str]) -> nn.Module:
    """Puts the layouts of a Lightning checkpoint back on the layers of ``model``, whose weights were loaded before.

    Args:
        model: the LightningModule, or a network inside it, whose names then lack one common prefix.
        ckpt_path: a checkpoint of a training with ``HiNMPruning``.

    Returns:
        ``model``, for chaining.

    Raises:
        ValueError: if the file is no such checkpoint, or belongs to another model or other weights; all offenders in
            one message, and no layout was written.
    """
    states = read_layers(load_checkpoint(ckpt_path), str(ckpt_path))
    modules = named_layers(model)
    prefix = _common_prefix(list(states), modules)
    found, wrong = [], []
    for name, state in states.items():
        module, record = modules.get(name.removeprefix(prefix)), state.record
        if module is None:
            wrong.append(f"{name}: the model has no Linear, Conv1d, Conv2d or HF Conv1D layer of this name.")
            continue
        layer = PrunableLayer(name.removeprefix(prefix), module, str(layer_kind(module)), record.pattern)
        got = (layer.kind, layer.groups, tuple(layer.weight.shape))
        if got != (record.kind, record.groups, record.shape):
            expected = (record.kind, record.groups, record.shape)
            wrong.append(f"{name}: the model has (kind, groups, shape) {got}, but the checkpoint {expected}.")
        elif state.layout is None:
            wrong.append(f"{name}: it has no layout yet. {UNFINISHED}")
        elif layer.weight.is_meta:
            wrong.append(f"{name}: its weight is on the meta device. Load the checkpoint's weights first.")
        else:
            try:  # the one full check that nothing is left outside the pattern
                pack(record.rows_first(layer.weight), state.layout, groups=record.groups, name=name)
            except ValueError as error:
                wrong.append(f"{error} Were the checkpoint's weights loaded first (`load_state_dict`)?")
            found.append((layer, state.layout))
    if wrong:
        raise ValueError(f"{type(model).__name__} does not fit {ckpt_path}:\n  " + "\n  ".join(wrong))
    for layer, layout in found:
        set_layout(layer, layout, model)
    return model


def export_checkpoint(ckpt_path: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> None:
    """A Lightning checkpoint as a file for ``load_hinm``: its pruned layers packed, all other tensors as they are.

    Needs no model: the callback's state records the kind of each layer. Names stay those of the LightningModule.

    Raises:
        ValueError: if the checkpoint has no layouts, or weights that do not obey them; all offenders in one message,
            and nothing was written.
    """
    checkpoint = load_checkpoint(ckpt_path)
    states = read_layers(checkpoint, str(ckpt_path))
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, Mapping):
        raise ValueError(f"{ckpt_path}: holds no state_dict, but a Lightning checkpoint has one.")
    weights = {plain_name(str(key)): tensor for key, tensor in weights.items()}
    tensors, layers, packed, wrong = dict(weights), {}, {}, []
    for name, state in states.items():
        record, weight = state.record, weights.get(weight_key(name))
        if not isinstance(weight, Tensor) or weight.shape != record.shape:
            wrong.append(f"{name}: its weight is {_describe(weight)}, but its mask {list(record.shape)}.")
        elif state.layout is None:
            wrong.append(f"{name}: it has no layout yet. {UNFINISHED}")
        else:
            try:
                one = pack(record.rows_first(weight), state.layout, groups=record.groups, name=name)
            except ValueError as error:
                wrong.append(str(error))
                continue
            for key, tensor in weights.items():  # tied layers are pruned together, and named once
                if isinstance(tensor, Tensor) and tensor.is_set_to(weight):
                    del tensors[key]
                    tied = key.removesuffix("weight").removesuffix(".")
                    layers[tied], packed[tied] = record, one
    if wrong:
        raise ValueError(f"{ckpt_path}: was not exported:\n  " + "\n  ".join(wrong))
    write_file(FileContents(layers, packed, tensors), out_path)


def load_checkpoint(ckpt_path: str | os.PathLike[str]) -> dict[str, Any]:
    """A Lightning checkpoint, on the CPU, mapped where its format allows; no code in it is run.

    Raises:
        ValueError: if the file is no checkpoint, or holds more than tensors and primitives.
    """
    with open(ckpt_path, "rb"):  # a file that is not there, or not ours to read, stays an OSError
        pass
    try:
        loaded = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(ckpt_path))
    except Exception as error:  # whatever the parser met in a damaged file; OSError, too
        raise ValueError(f"{ckpt_path}: not a checkpoint that `weights_only=True` can load: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{ckpt_path}: holds {_describe(loaded)}, but a Lightning checkpoint is a dict.")
    return loaded


def read_layers(checkpoint: Mapping[str, Any], source: str) -> dict[str, LayerState]:
    """The state of every pruned layer by name, validated.

    Raises:
        ValueError: if ``HiNMPruning`` left no state in the checkpoint, or a damaged one; all offenders in one message.
    """
    callbacks = checkpoint.get("callbacks")
    states = [
        state
        for key, state in (callbacks.items() if isinstance(callbacks, Mapping) else ())
        if isinstance(key, str) and key.startswith(CALLBACK)
    ]
    if len(states) != 1:
        got = "no callback state at all" if not callbacks else f"{len(states)} states of it"
        raise ValueError(
            f"{source}: has {got}, but the layouts are in the state of exactly one {CALLBACK}. Train with it, and save "
            "the whole checkpoint (`save_weights_only=False`)."
        )
    layers = states[0].get("layers") if isinstance(states[0], Mapping) else None
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"{source}: the state of {CALLBACK} lists no layers. {UNFINISHED}")
    read, wrong = {}, []
    for name, state in layers.items():
        try:
            read[str(name)] = read_layer_state(str(name), state)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(f"{source}: the state of {CALLBACK} is damaged:\n  " + "\n  ".join(wrong))
    return read


def _common_prefix(names: list[str], modules: Mapping[str, nn.Module]) -> str:
    """What the checkpoint's names have in front of the model's: nothing, or the one prefix that makes all fit."""
    if all(name in modules for name in names):
        return ""
    parts = names[0].split(".")
    prefixes = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
    fitting = [
        prefix
        for prefix in prefixes
        if all(name.startswith(prefix) and name.removeprefix(prefix) in modules for name in names)
    ]
    return fitting[0] if len(fitting) == 1 else ""


def _is_tensor(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.device.type == "cpu"


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
