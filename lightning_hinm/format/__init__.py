"""Packed weights, and the schema, writer, reader and validation of everything that is stored."""

from lightning_hinm.format.packing import HiNMWeight, check_packed, expand, pack, unpack

__all__ = ["HiNMWeight", "check_packed", "expand", "pack", "unpack"]
