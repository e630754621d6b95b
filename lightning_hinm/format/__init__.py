"""Packed weights, and the schema, writer, reader and validation of everything that is stored."""

from lightning_hinm.format.checkpoint import (
    LayerState,
    export_checkpoint,
    layer_state,
    load_layouts,
    read_layer_state,
)
from lightning_hinm.format.file import FileContents, FileHeader, read_contents, read_header, write_file
from lightning_hinm.format.packing import (
    HiNMWeight,
    blocks,
    check_packed,
    expand,
    pack,
    pack_bits,
    unpack,
    unpack_bits,
    unpack_positions,
)
from lightning_hinm.format.record import LayerRecord, weight_key
from lightning_hinm.format.synthetic import random_weight

__all__ = [
    "FileContents",
    "FileHeader",
    "HiNMWeight",
    "LayerRecord",
    "LayerState",
    "blocks",
    "check_packed",
    "expand",
    "export_checkpoint",
    "layer_state",
    "load_layouts",
    "pack",
    "pack_bits",
    "random_weight",
    "read_contents",
    "read_header",
    "read_layer_state",
    "unpack",
    "unpack_bits",
    "unpack_positions",
    "weight_key",
    "write_file",
]
