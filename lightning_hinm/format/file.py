"""The file: packed layers and all other tensors of a model, in one safetensors file that trusts nobody.

A packed layer is stored as ``<layer>.weight.values``, ``.metadata``, ``.vector_index`` and ``.output_order``, every
other tensor under its own name. The header's ``__metadata__`` has one entry, ``lightning_hinm``, a JSON object with

    version         of this schema
    header_crc32    crc32 of the whole header, these 8 hex digits taken as zeros
    crc32           stored tensor -> crc32 of its bytes
    layers          layer -> its record
    aliases         name of a tensor -> name of the equal tensor that is stored in its stead (tied weights)
"""

import io
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_hinm.format.packing import HiNMWeight, check_packed
from lightning_hinm.format.record import LayerRecord, weight_key

VERSION = 1
LARGEST_HEADER = 100_000_000  # safetensors' own limit
ENTRY = "lightning_hinm"
FIELDS = {"version", "header_crc32", "crc32", "layers", "aliases"}
PARTS = ("values", "metadata", "vector_index", "output_order")
SEAL = rb"\"header_crc32\":\""  # a string of JSON inside a string of JSON
UNSEALED = b"0" * 8


@dataclass(frozen=True)
class FileHeader:
    """What a file holds, before any tensor of it is read.

    Args:
        layers: record of every packed layer.
        shapes: of every other tensor that is stored.
        aliases: names that stand for another name; of packed weights, too.
        crc32: of every stored tensor.
    """

    layers: dict[str, LayerRecord]
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    crc32: dict[str, int]


@dataclass(frozen=True, eq=False)
class FileContents:
    """A model on its way to or from a file. Tied tensors are one object under several names, packed ones too."""

    layers: Mapping[str, LayerRecord]
    packed: Mapping[str, HiNMWeight]
    tensors: Mapping[str, Tensor]


def write_file(contents: FileContents, path: str | os.PathLike[str]) -> None:
    """Writes the file, atomically: ``path`` is the old file or the new one, never half of it.

    Raises:
        ValueError: for whatever could not be read again; all offenders in one message, and nothing was written.
    """
    path = Path(path)
    stored, aliases = _collect(contents, path)
    entry = {
        "version": VERSION,
        "header_crc32": UNSEALED.decode(),
        "crc32": {name: zlib.crc32(_bytes(tensor).numpy().data) for name, tensor in stored.items()},
        "layers": {layer: record.to_dict() for layer, record in contents.layers.items()},
        "aliases": aliases,
    }
    try:
        data = save(stored, metadata={ENTRY: json.dumps(entry, separators=(",", ":"))})
    except KeyError as error:  # safetensors' answer to a dtype that it does not know
        names = [name for name, tensor in stored.items() if tensor.dtype == error.args[0]]
        raise ValueError(f"{path}: was not written: a file cannot hold {error}, as in {', '.join(names)}.") from None
    raw = _read_raw_header(io.BytesIO(data), len(data))
    at, seal = _seal(raw)
    # In the same folder, so that the last step is a rename; under a new name, so that two writers do not meet.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data[: 8 + at] + seal)
            file.write(memoryview(data)[8 + at + len(seal) :])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _collect(contents: FileContents, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to store under which name, and the names that are only aliases."""
    wanted = {name: {name: tensor} for name, tensor in contents.tensors.items()}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    wrong = []
    for layer, packed in contents.packed.items():
        key = weight_key(layer)
        wanted[key] = {f"{key}.{part}": tensor for part, tensor in packed.tensors.items()}
        try:
            check_packed(packed, layer, groups=contents.layers[layer].groups)
        except ValueError as error:
            wrong.append(str(error))
    first_names: dict[Any, str] = {}
    storages = set()
    for key, parts in wanted.items():
        for name, tensor in parts.items():
            tensor = tensor.detach() if isinstance(tensor, Tensor) else tensor
            if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta:
                got = f"{tensor.layout} on {tensor.device}" if type(tensor) is Tensor else type(tensor).__name__
                wrong.append(f"{name}: is {got}, but only plain dense tensors with data can be stored.")
                break
            identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if name in (key, f"{key}.values") and tensor.numel():
                first = first_names.setdefault(identity, key)
                if first != key:
                    aliases[key] = first
                    break
            tensor = tensor.cpu().contiguous()
            if tensor.untyped_storage().data_ptr() in storages:  # safetensors refuses two views of one storage
                tensor = tensor.clone()
            storages.add(tensor.untyped_storage().data_ptr())
            stored[name] = tensor
    if wrong:
        raise ValueError(f"{path}: was not written:\n  " + "\n  ".join(wrong))
    return stored, aliases


def read_header(path: str | os.PathLike[str]) -> FileHeader:
    """What the file holds, checked against itself; allocates the header only.

    Raises:
        ValueError: if the file is damaged, or not written by ``write_file``.
    """
    with _naming(path):
        with open(path, "rb") as file:
            raw = _read_raw_header(file, os.fstat(file.fileno()).st_size)
        header = _parse(raw.decode(), "header")
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not isinstance(metadata.get(ENTRY), str):
            raise ValueError(f"the header has no entry {ENTRY!r}. Files for load_hinm are written by save_hinm.")
        entry = _parse(metadata[ENTRY], f"header's entry {ENTRY!r}")
        at, seal = _seal(raw)
        if raw[at : at + len(seal)] != seal:
            raise ValueError("the header does not have the crc32 that was written. The file is damaged.")
        if entry.get("version") != VERSION:
            raise ValueError(
                f"has format version {entry.get('version')!r}, but this lightning_hinm reads version {VERSION}. "
                "Read it with the version that wrote it."
            )
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return _check_header(entry, shapes)


def read_contents(path: str | os.PathLike[str], header: FileHeader) -> FileContents:
    """The tensors of the file, every one validated; allocates what the file holds, never a dense weight.

    Raises:
        ValueError: naming every tensor that is damaged.
    """
    stored, packed, wrong = {}, {}, []
    with _naming(path):
        with safe_open(path, framework="pt") as file:
            for name, crc32 in header.crc32.items():
                mapped = file.get_tensor(name)
                # A copy, because the file is mapped: what was checked must be what is used. Of bytes, because a copy
                # of bools would turn every damaged byte into a one.
                data = _bytes(mapped).clone()
                flat = data != 0 if mapped.dtype == torch.bool else data.view(mapped.dtype)
                stored[name] = flat.reshape(mapped.shape)
                if zlib.crc32(data.numpy().data) != crc32:
                    wrong.append(f"{name}: does not have the crc32 that was written. The file is damaged.")
        if not wrong:
            for layer, record in header.layers.items():
                key = weight_key(layer)
                if key not in header.aliases:
                    parts = {part: stored[f"{key}.{part}"] for part in PARTS}
                    packed[key] = HiNMWeight(
                        **parts, shape=record.packed_shape, pattern=record.pattern, retained=record.retained
                    )
                    try:
                        check_packed(packed[key], layer, groups=record.groups)
                    except ValueError as error:
                        wrong.append(str(error))
        if wrong:
            raise ValueError("\n  ".join(wrong))
    tensors = {name: stored[name] for name in header.shapes}
    tensors |= {name: stored[first] for name, first in header.aliases.items() if first in header.shapes}
    keys = {layer: weight_key(layer) for layer in header.layers}
    return FileContents(
        header.layers, {layer: packed[header.aliases.get(key, key)] for layer, key in keys.items()}, tensors
    )


def _read_raw_header(file: BinaryIO, size: int) -> bytes:
    """The header's bytes, if their number can be true."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
        raise ValueError(
            f"claims a header of {length} bytes in a file of {size} bytes, of which at most {LARGEST_HEADER} may be "
            "header. It is damaged, or no safetensors file."
        )
    return file.read(length)


def _seal(raw: bytes) -> tuple[int, bytes]:
    """Where the header's own crc32 stands in its bytes, and what it must be."""
    at = raw.find(SEAL) + len(SEAL)
    if raw.count(SEAL) != 1:
        raise ValueError(f"the header names its own crc32 {raw.count(SEAL)} times. It is damaged, or another format.")
    return at, f"{zlib.crc32(raw[:at] + UNSEALED + raw[at + len(UNSEALED) :]):08x}".encode()


def _parse(text: str, what: str) -> dict[str, Any]:
    """A JSON object, no name in it twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(names := dict(pairs)) != len(pairs):
            raise ValueError("a name twice in one object")
        return names

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {what} is no valid JSON ({error}). The file is damaged.") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"the {what} is no JSON object. The file is damaged.")
    return parsed


def _check_header(entry: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> FileHeader:
    """The entry as a ``FileHeader``, if it accounts for every tensor of ``shapes`` once."""
    crc32, records, aliases = entry.get("crc32"), entry.get("layers"), entry.get("aliases")
    if set(entry) != FIELDS or not (
        isinstance(crc32, dict) and isinstance(records, dict) and isinstance(aliases, dict)
    ):
        raise ValueError(f"the header's entry has fields {sorted(entry)}, but it has exactly {sorted(FIELDS)}.")
    wrong, layers = [], {}
    for layer, fields in records.items():
        try:
            layers[layer] = LayerRecord.from_dict(fields)
        except ValueError as error:
            wrong.append(f"{layer}: {error}")
    by_key = {weight_key(layer): record for layer, record in layers.items()}
    parts = {f"{key}.{part}" for key in by_key if key not in aliases for part in PARTS}
    plain = {name: shape for name, shape in shapes.items() if name not in parts}
    wrong += [f"{name}: is stored without a crc32." for name in shapes if name not in crc32]
    wrong += [f"{name}: is missing." for name in {*crc32, *parts} if name not in shapes]
    wrong += [f"{name}: is both packed and stored dense." for name in by_key if name in plain]
    for name, first in aliases.items():
        if not isinstance(first, str):
            wrong.append(f"{name}: is an alias of {first!r}, which is no name.")
            continue
        if name in plain:
            wrong.append(f"{name}: is both stored and an alias.")
        if name in by_key and (first not in by_key or first in aliases or by_key[first] != by_key[name]):
            wrong.append(f"{name}: is an alias of {first!r}, which is no equal packed weight.")
        if name not in by_key and first not in plain:
            wrong.append(f"{name}: is an alias of {first!r}, which is not stored.")
    if wrong:
        raise ValueError(" ".join(wrong) + " The file is damaged.")
    return FileHeader(layers, plain, aliases, crc32)


def _bytes(tensor: Tensor) -> Tensor:
    """uint8, flat; a view where the tensor is contiguous."""
    return tensor.flatten().view(torch.uint8)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever is wrong inside is a ``ValueError`` that names the file."""
    try:
        yield
    except (ValueError, SafetensorError, RuntimeError) as error:  # the last from a dtype that torch cannot copy
        raise ValueError(f"{path}: {error}") from error
