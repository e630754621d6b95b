"""``ptx/manifest.json``: what each entry takes, and which text suits which GPU and driver; validated as it is read."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

FORMAT = 1
SLOTS = {"pointer": "Q", "int32": "i4x", "int64": "q", "float32": "f4x"}  # struct codes, each padded to 8 bytes


@dataclass(frozen=True)
class Parameter:
    """One parameter of an entry; dtype and layout are for the reader, the alignment (in bytes) is checked."""

    name: str
    type: str
    dtype: str = ""
    layout: str = ""
    alignment: int = 1


@dataclass(frozen=True)
class Text:
    """One PTX file, for compute capabilities ``lowest .. highest`` and for drivers of at least version ``driver``."""

    file: str
    sha256: str
    driver: int
    lowest: tuple[int, ...]
    highest: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One kernel as it is launched.

    Args:
        name: its name in the text.
        kernel: the texts that hold it.
        parameters: in the order of ``launch``.
        block: threads of a block.
        grid_rules: for x, y and z a parameter's name and its divisor, or None and the number itself.
        shared: bytes of dynamic shared memory, whatever the arguments.
        shared_rules: a parameter's name, and the bytes that each of it adds.
        cluster: blocks along x that run together and share their work; 1: none do.
    """

    name: str
    kernel: str
    parameters: tuple[Parameter, ...]
    block: int
    grid_rules: tuple[tuple[str | None, int], ...]
    shared: int
    shared_rules: tuple[tuple[str, int], ...]
    cluster: int = 1

    def grid(self, arguments: Mapping[str, int]) -> tuple[int, int, int]:
        """Blocks along x, y and z: ceil(value / divisor), or the number itself; whole clusters along x."""
        x, y, z = (number if name is None else -(-arguments[name] // number) for name, number in self.grid_rules)
        return -(-x // self.cluster) * self.cluster, y, z

    def shared_bytes(self, arguments: Mapping[str, int]) -> int:
        """Dynamic shared memory of one block."""
        return self.shared + sum(number * arguments[name] for name, number in self.shared_rules)


@functools.cache
def read_manifest(folder: Path) -> tuple[Mapping[str, tuple[Text, ...]], Mapping[str, Entry]]:
    texts, known, place = {}, {}, "manifest.json"
    try:
        given = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        must(given["format"] == FORMAT, f"format is {given['format']!r}, but this lightning_hinm reads {FORMAT}.")
        for place, several in given["texts"].items():
            texts[place] = tuple(map(_text_of, several))
            must(len(several) > 0, "has no text, but a kernel needs one.")
        for place, record in given["entries"].items():
            known[place] = _entry_of(place, record)
            must(known[place].kernel in texts, f"kernel is {known[place].kernel!r}, but must be one of {list(texts)}.")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        fact = error if isinstance(error, (OSError, ValueError)) else f"is malformed, {error!r}."
        raise ValueError(f"{folder}: {place}: {fact} Reinstall lightning-hinm.") from error
    return MappingProxyType(texts), MappingProxyType(known)


def _text_of(given: dict[str, Any]) -> Text:
    lowest, highest = (tuple(_natural("capability", number) for number in pair) for pair in given["capability"])
    must(len(lowest) == len(highest) == 2, f"capability is {given['capability']}, but must be two pairs.")
    file = given["file"]
    must(Path(file).name == file, f"file is {file!r}, but must be in the manifest's own folder.")
    return Text(file, given["sha256"], _natural("driver", given["driver"]), lowest, highest)


def _parameter_of(given: dict[str, Any]) -> Parameter:
    name, kind, power = given["name"], given["type"], _natural("alignment", given.get("alignment", 1), 1)
    must(kind in SLOTS, f"{name} is of type {kind!r}, but must be one of {list(SLOTS)}.")
    must(power.bit_count() == 1, f"{name} is aligned to {power}, but must be to a power of 2.")
    return Parameter(name, kind, given.get("dtype", ""), given.get("layout", ""), power)


def _entry_of(name: str, given: dict[str, Any]) -> Entry:
    parameters = tuple(map(_parameter_of, given["parameters"]))
    rules = [{int: (None, rule), str: (rule, 1)}.get(type(rule), rule) for rule in given["grid"]]
    grid = tuple((key, _natural("grid", number, 1)) for key, number in rules)
    per = tuple((key, _natural("shared", number)) for key, number in given["shared"].get("per", {}).items())
    names = [parameter.name for parameter in parameters]
    must(len(grid) == 3, f"grid has {len(grid)} dimensions, but must have 3.")
    must(len(set(names)) == len(names), f"its parameters are {names}, but must differ.")
    integers = {each.name for each in parameters if each.type.startswith("int")}
    unknown = {key for key, _ in (*grid, *per)} - {None} - integers
    must(not unknown, f"grid or shared memory depend on {sorted(unknown)}, but may only on {sorted(integers)}.")
    block, shared = _natural("block", given["block"], 1), _natural("shared", given["shared"]["bytes"])
    cluster = _natural("cluster", given.get("cluster", 1), 1)
    return Entry(name, given["kernel"], parameters, block, grid, shared, per, cluster)


def _natural(what: str, value: Any, least: int = 0) -> int:
    must(type(value) is int and value >= least, f"{what} is {value!r}, but must be an integer of at least {least}.")
    return value


def must(holds: bool, fact: str) -> None:
    if not holds:
        raise ValueError(fact)


@functools.cache
def read_text(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} is in the manifest, but cannot be read; reinstall lightning-hinm") from error
    got = hashlib.sha256(data).hexdigest()
    must(got == sha256, f"{path} has the sha256 {got}, but the manifest {sha256}; reinstall lightning-hinm")
    return data
