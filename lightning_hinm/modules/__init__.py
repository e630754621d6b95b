"""Layers that hold a packed weight and call one op; ``to_hinm`` puts them in a pruned model's place."""

from lightning_hinm.modules.convert import leave_fast_path, pack_layer, pack_weight, take_hooks, to_hinm
from lightning_hinm.modules.layers import PACKED_TENSORS, HiNMConv2d, HiNMLayer, HiNMLinear, Packing

__all__ = [
    "PACKED_TENSORS",
    "HiNMConv2d",
    "HiNMLayer",
    "HiNMLinear",
    "Packing",
    "leave_fast_path",
    "pack_layer",
    "pack_weight",
    "take_hooks",
    "to_hinm",
]
