"""A whole model to and from the HiNM file: ``save_hinm`` and ``load_hinm``."""

import logging
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hinm.format import (
    FileContents,
    FileHeader,
    HiNMWeight,
    LayerRecord,
    pack,
    read_contents,
    read_header,
    weight_key,
    write_file,
)
from lightning_hinm.modules import HiNMLayer, leave_fast_path, pack_layer, take_hooks
from lightning_hinm.pattern import layer_kind, plain_name
from lightning_hinm.prune import layout_of

log = logging.getLogger(__name__)


def save_hinm(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a pruned or a converted model: its sparse layers packed, all else as ``state_dict`` has it.

    Tied weights are stored once. The write is atomic: ``path`` is the old file or the new one, never half of it.

    Args:
        model: a pruned model whose layers carry their layouts, or what ``to_hinm`` made of it; stays as it is.
        path: of the safetensors file.

    Raises:
        ValueError: for a model without any layout, weights that are not zero outside their pattern, or state that a
            file cannot hold; all offenders in one message, and nothing was written.
    """
    state = _state(model)
    layers = {
        name: module
        for name, module in _layers(model).items()
        if isinstance(module, HiNMLayer) or layout_of(module) is not None
    }
    packed_keys = {weight_key(name) for name in layers}
    # A weight that somebody else reads, too, or that is no plain parameter, stays dense.
    elsewhere = {id(tensor) for key, tensor in state.items() if key not in packed_keys}
    layers = {
        name: module
        for name, module in layers.items()
        if isinstance(module, HiNMLayer) or (weight_key(name) in state and id(module.weight) not in elsewhere)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__}: no layer has a layout, but only a pruned model can be saved. Prune it by prune() "
            "or HiNMPruning; in a new process, call load_layouts(model, ckpt_path) after loading the weights."
        )
    records: dict[str, LayerRecord] = {}
    packed: dict[str, HiNMWeight] = {}
    shared: dict[int, HiNMWeight] = {}
    wrong = []
    for name, module in layers.items():
        groups = int(getattr(module, "groups", 1))
        try:
            if isinstance(module, HiNMLayer):
                one = module.packed
                shape = one.shape[::-1] if module.kind == "hf_conv1d" else one.shape
                records[name] = LayerRecord(module.kind, groups, tuple(shape), one.pattern, one.retained)
            else:
                weight, layout = state[weight_key(name)], layout_of(module)
                record = LayerRecord(str(layer_kind(module)), groups, tuple(weight.shape), layout.pattern)  # type: ignore
                if id(weight) not in shared:
                    shared[id(weight)] = pack(record.rows_first(weight), layout, groups=groups, name=name)  # type: ignore
                one = shared[id(weight)]
                records[name] = replace(record, retained=one.retained)
            packed[name] = one
        except ValueError as error:
            message = str(error)
            wrong.append(message if message.startswith(f"{name}: ") else f"{name}: {message}")
    if wrong:
        raise ValueError(f"{path}: was not written:\n  " + "\n  ".join(wrong))
    tensors = {key: tensor for key, tensor in state.items() if key not in {weight_key(name) for name in layers}}
    write_file(FileContents(records, packed, tensors), path)
    log.info("save_hinm: wrote %d packed layers and %d other tensors to %s", len(packed), len(tensors), path)


def load_hinm(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Puts the file's packed layers in the place of the model's dense ones, and all its tensors with them.

    No dense weight is ever built: ``model`` may be on the meta device, and is on the CPU afterwards. Parameters are new
    objects, so make optimizers later. Floating-point tensors take the file's dtype.

    Args:
        model: the architecture, dense, with the names that were saved; changed in place.
        path: a file of ``save_hinm`` or ``export_checkpoint``.

    Returns:
        ``model``; the packed layer, if ``model`` is a single one.

    Raises:
        ValueError: if the file is damaged or belongs to another model; all offenders in one message, and ``model`` is
            unchanged.
    """
    if any(isinstance(module, HiNMLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__}: is packed already, but load_hinm takes the dense architecture.")
    header = read_header(path)
    state, layers = _state(model), _layers(model)
    _raise_all(_misfits(header, model, state, layers), model, path)
    contents = read_contents(path, header)
    wrong = []
    for key, tensor in _by_key(contents).items():
        dtype = state[key].dtype
        if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
            wrong.append(f"{key}: is {tensor.dtype} in the file, but {dtype} in the model.")
    _raise_all(wrong, model, path)

    replaced: dict[nn.Module, HiNMLayer] = {}
    for name in contents.layers:
        module = layers[name]
        if module not in replaced:
            packed = contents.packed[name].to(_device(module.weight))  # type: ignore[arg-type]
            replaced[module] = pack_layer(module, name=name, packed=packed)
    loaded: dict[int, Tensor] = {}  # by the id of the old tensor: what was tied stays tied
    for key, tensor in contents.tensors.items():
        old = state[key]
        if id(old) not in loaded:
            new = tensor.to(_device(old), copy=True)  # tied in the file need not mean tied in the model
            loaded[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        target = replaced.get(module, module)
        slots: list[tuple[dict[str, Any], dict[str, Any]]]
        slots = [(module._parameters, target._parameters), (module._buffers, target._buffers)]
        for own, other in slots:
            other.update({leaf: loaded[id(tensor)] for leaf, tensor in own.items() if id(tensor) in loaded})
    for dense, layer in replaced.items():
        take_hooks(layer, dense)
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child in replaced:
                parent._modules[attribute] = replaced[child]
    model = replaced.get(model, model)
    leave_fast_path(model)
    log.info("load_hinm: read %d packed layers from %s", len(contents.layers), path)
    return model


def _misfits(header: FileHeader, model: nn.Module, state: dict[str, Tensor], layers: dict[str, nn.Module]) -> list[str]:
    """All reasons why the file is not this model's, before any tensor of it is read."""
    wrong = []
    for name, record in header.layers.items():
        layer = layers.get(name)
        if layer is None or weight_key(name) not in state:
            wrong.append(f"{name}: is packed in the file, but the model has no prunable layer of this name.")
            continue
        got = (layer_kind(layer), int(getattr(layer, "groups", 1)), tuple(state[weight_key(name)].shape))
        if got != (record.kind, record.groups, record.shape):
            expected = (record.kind, record.groups, record.shape)
            wrong.append(f"{name}: has (kind, groups, shape) {expected} in the file, but {got} in the model.")
    packed = {weight_key(name) for name in header.layers}
    stored = header.shapes.keys() | header.aliases.keys() | packed
    wrong += [f"{key}: is missing in the file." for key in state if key not in stored]
    wrong += [f"{key}: is unknown to the model." for key in sorted(stored - state.keys() - packed)]
    first_of: dict[int, str] = {}
    for key in (key for key in state if key in stored):
        source = header.aliases.get(key, key)
        if key not in packed and tuple(state[key].shape) != header.shapes[source]:
            got_shape = list(state[key].shape)
            wrong.append(f"{key}: is {list(header.shapes[source])} in the file, but {got_shape} in the model.")
        if first_of.setdefault(id(state[key]), source) != source:
            wrong.append(f"{key}: is tied to another tensor in the model, but the file has two of their own.")
    for name, module in model.named_modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers[leaf]
            if buffer is not None and buffer.is_meta:
                wrong.append(
                    f"{name}.{leaf}: is a buffer on the meta device that no file holds (persistent=False). Compute it "
                    "before load_hinm, or build the model on the CPU."
                )
    return wrong


def _raise_all(wrong: list[str], model: nn.Module, path: str | os.PathLike[str]) -> None:
    if wrong:
        raise ValueError(f"{path} does not fit {type(model).__name__}:\n  " + "\n  ".join(wrong))


def _by_key(contents: FileContents) -> dict[str, Tensor]:
    """One tensor of the dtype that each name of the ``state_dict`` has in the file."""
    return {**contents.tensors, **{weight_key(name): packed.values for name, packed in contents.packed.items()}}


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Prunable and packed layers by every name they have, but for those that ``nn.MultiheadAttention`` reads itself."""
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    own = {id(module) for attention in attentions for module in attention.modules()}
    return {
        plain_name(name): module
        for name, module in model.named_modules(remove_duplicate=False)
        if (layer_kind(module) is not None or isinstance(module, HiNMLayer)) and id(module) not in own
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by every name they have; of a packed layer, what is not packed.

    Raises:
        ValueError: if the ``state_dict`` has anything else.
    """
    state: dict[str, Tensor] = {}
    hidden = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        own: dict[str, Any] = {**module._parameters, **module._buffers}
        for leaf, tensor in own.items():
            if tensor is None or leaf in module._non_persistent_buffers_set:
                continue
            key = f"{prefix}.{leaf}" if prefix else leaf
            if isinstance(module, HiNMLayer) and leaf in module.packed.tensors:
                hidden.add(key)
            else:
                state[key] = tensor
    if strange := sorted(set(model.state_dict()) ^ (state.keys() | hidden)):
        raise ValueError(
            f"{type(model).__name__}: {', '.join(strange)} in its state_dict are not its parameters and buffers, but a "
            "file holds only those. Remove the hook or extra state that makes the difference."
        )
    lazy = [key for key, tensor in state.items() if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ValueError(f"{', '.join(lazy)}: not initialised yet. Run one batch through the model first.")
    return {plain_name(key): tensor for key, tensor in state.items()}
