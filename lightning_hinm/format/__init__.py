"""Packed weights, and the schema, writer, reader and validation of everything that is stored."""

from lightning_hinm.format.checkpoint import LayerState, layer_state, load_layouts, read_layer_state
from lightning_hinm.format.packing import HiNMWeight, check_packed, expand, pack, pack_bits, unpack, unpack_bits

__all__ = [
    "HiNMWeight",
    "LayerState",
    "check_packed",
    "expand",
    "layer_state",
    "load_layouts",
    "pack",
    "pack_bits",
    "read_layer_state",
    "unpack",
    "unpack_bits",
]
