"""The texts that are shipped: built from csrc, as their manifest says, and accepted by every assembler."""

import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csrc import build
from lightning_hinm.kernels import host
from tests.ptx.device import shipped

MANIFEST: dict[str, Any] = json.loads((build.PTX / "manifest.json").read_text())
TEXTS = [text for texts in MANIFEST["texts"].values() for text in texts]
# Of a parameter in the manifest, its type in the text.
PARAMETER_TYPES = {"pointer": "u64", "int32": "u32", "int64": "u64", "float32": "f32"}
NEWEST, OLDEST = "nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu11"


def ptxas_of(package: str) -> str:
    """The assembler in a package of the dev extra."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file.locate() for file in files if file.name == "ptxas"]
    if not found:
        pytest.skip(f"needs ptxas of the package {package}, which is not installed: no text was assembled with it")
    return str(found[0])


def served(text: dict[str, Any]) -> list[str]:
    """The architectures that the manifest lists resources for, of those that a text serves."""
    lowest, highest = text["capability"]
    architectures = sorted({name for entry in MANIFEST["entries"].values() for name in entry["resources"]})
    numbers = {name: divmod(int(name[3:]), 10) for name in architectures}
    return [name for name, number in numbers.items() if tuple(lowest) <= number <= tuple(highest)]


def check_assembly(file: str, architecture: str, ptxas: str) -> None:
    used = build.assemble(build.PTX / file, architecture, ptxas)  # raises where it errs or spills
    kernel = file.split(".")[0]
    entries = {name: entry for name, entry in MANIFEST["entries"].items() if entry["kernel"] == kernel}
    assert used.keys() == entries.keys()
    for name, entry in entries.items():
        listed = entry["resources"][architecture]
        assert used[name]["registers"] <= listed["registers"], f"{name} on {architecture}: {used[name]}, not {listed}"
        assert used[name]["shared"] == listed["shared"]


# The others differ from one of these in their limits, hardly in their instructions.
ASSEMBLED = [
    pytest.param(text["file"], name, marks=() if name in (text["target"], "sm_120") else pytest.mark.slow)
    for text in TEXTS
    for name in served(text)
]


@pytest.mark.parametrize(("file", "architecture"), ASSEMBLED)
def test_the_newest_assembler_takes_every_text(file: str, architecture: str) -> None:
    check_assembly(file, architecture, ptxas_of(NEWEST))


@pytest.mark.parametrize(
    "architecture",
    [name if name == "sm_90" else pytest.param(name, marks=pytest.mark.slow) for name in build.KNOWN_TO_11],
)
@pytest.mark.parametrize("file", [text["file"] for text in TEXTS if text["ptx_version"] == "7.4"])
def test_the_oldest_assembler_takes_the_texts_for_old_drivers(file: str, architecture: str) -> None:
    check_assembly(file, architecture, ptxas_of(OLDEST))


def ptxas_12() -> str:
    """The oldest assembler that knows the instructions of the ordered texts."""
    # Of nvidia-cuda-nvcc-cu12, whose files would take the places of those of the oldest.
    found = Path(sys.prefix) / "cuda12" / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
    if not found.exists():
        pytest.skip(f"needs {found}, which `make setup` puts there: no text was assembled with it")
    return str(found)


def test_the_oldest_assembler_for_newer_texts_takes_that_of_clusters() -> None:
    check_assembly("decode_cluster.ptx", "sm_90", ptxas_12())


# On sm_120 it needs more registers than the newest does.
@pytest.mark.parametrize("architecture", ["sm_120", pytest.param("sm_100", marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", [text["file"] for text in TEXTS if text["capability"][1] >= [10, 0]])
def test_the_oldest_assembler_for_newer_gpus_takes_their_texts(file: str, architecture: str) -> None:
    check_assembly(file, architecture, ptxas_12())


@pytest.mark.parametrize(
    ("find", "known"),
    [
        (lambda: ptxas_of(OLDEST), build.KNOWN_TO_11),
        (ptxas_12, build.KNOWN_TO_12),
        (lambda: ptxas_of(NEWEST), build.ARCHITECTURES),
    ],
    ids=["11", "12", "newest"],
)
def test_an_assembler_is_given_the_architectures_that_it_knows(find: Callable[[], str], known: tuple[str, ...]) -> None:
    ptxas = find()
    assert build.known_to(ptxas) == known
    listed = subprocess.run([ptxas, "--help"], capture_output=True, text=True).stdout
    assert not [architecture for architecture in known if f"'{architecture}'" not in listed]


def test_an_assembler_is_given_no_text_of_a_later_version() -> None:
    assert build.known_to(ptxas_of(OLDEST), "7.8") == build.KNOWN_TO_11
    assert build.known_to(ptxas_of(OLDEST), "8.0") == ()
    assert build.known_to(ptxas_12(), "8.5") == build.KNOWN_TO_12


def test_a_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else "no nvcc at all"
    if MANIFEST["compiler"] not in version:
        pytest.skip(f"NOT CHECKED that csrc gives the shipped texts: that takes nvcc, {MANIFEST['compiler']}")
    build.compile_texts(tmp_path)
    for text in TEXTS:
        assert (tmp_path / text["file"]).read_bytes() == (build.PTX / text["file"]).read_bytes(), text["file"]


def test_the_manifest_describes_what_is_there() -> None:
    assert {text["file"] for text in TEXTS} == {path.name for path in build.PTX.glob("*.ptx")}
    for text in TEXTS:
        content = (build.PTX / text["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == text["sha256"], text["file"]
        assert build.source_sha256(text["source"]) == text["source_sha256"], f"{text['source']} changed: run build.py"
        assert re.search(rb"^\.version (.*)$", content, re.M)[1].decode() == text["ptx_version"]  # type: ignore[index]
        assert re.search(rb"^\.target (.*)$", content, re.M)[1].decode() == text["target"]  # type: ignore[index]
        assert (b"mma.sp::ordered" in content) == (".ordered." in text["file"])


def test_every_sparse_text_has_its_ordered_twin_but_those_of_clusters() -> None:
    for kernel, texts in MANIFEST["texts"].items():
        capabilities = [text["capability"] for text in texts]
        sparse = "mma.sp" in (build.PTX / f"{kernel}.ptx").read_text()
        own = [[[8, 0], [9, 99]], [[10, 0], [99, 99]]] if sparse else [[[8, 0], [99, 99]]]
        assert capabilities == ([[[9, 0], [9, 99]]] if kernel.endswith("_cluster") else own)


@pytest.mark.parametrize("file", [text["file"] for text in TEXTS])
def test_the_abi_is_that_of_the_text(file: str) -> None:
    program = shipped(file)
    entries = {name: entry for name, entry in MANIFEST["entries"].items() if entry["kernel"] == file.split(".")[0]}
    assert program.entries.keys() == entries.keys()
    for name, entry in entries.items():
        types = [PARAMETER_TYPES[parameter["type"]] for parameter in entry["parameters"]]
        assert [parameter[1] for parameter in program.entries[name].parameters] == types, name
        assert program.entries[name].max_threads == entry["block"], name
        assert program.entries[name].cluster == entry.get("cluster", 1), name


def test_the_description_of_entries_is_what_the_manifest_says() -> None:
    assert MANIFEST["entries"].keys() == build.describe_entries().keys()
    for name, described in json.loads(json.dumps(build.describe_entries())).items():
        assert {**MANIFEST["entries"][name], **described} == MANIFEST["entries"][name], name


def test_the_wheel_holds_every_text_and_source(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=build.SOURCES.parent)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for text in TEXTS:
            content = archive.read(f"lightning_hinm/ptx/{text['file']}")
            assert hashlib.sha256(content).hexdigest() == text["sha256"]
        assert json.loads(archive.read("lightning_hinm/ptx/manifest.json")) == MANIFEST
        assert archive.read("lightning_hinm/kernels/host.cpp") == host.SOURCE.read_bytes()
