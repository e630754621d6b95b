"""The launcher, against a driver without a GPU (stub/libcuda.c) that writes down what it is asked.

Functions that begin with an underscore run in a process of their own (stub/zygote.py), where three lambdas play torch's
part and tensors only claim to be on a GPU.
"""

import copy
import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hinm import kernels
from tests.stub.zygote import Zygote, in_a_fork

SOURCE = Path(__file__).parent / "stub" / "libcuda.c"
WIDTHS = {"u64": 8, "u32": 4, "f32": 4}

# x and out are pointers, and the numbers stand between them, so that no slot lies where a packed struct would have it.
PARAMETERS = [
    {"name": "x", "type": "pointer", "dtype": "bfloat16", "layout": "[tokens, columns]", "alignment": 16},
    {"name": "tokens", "type": "int32"},
    {"name": "bias", "type": "pointer", "dtype": "bfloat16", "layout": "[rows], or null", "alignment": 2},
    {"name": "stride", "type": "int64"},
    {"name": "scale", "type": "float32"},
    {"name": "out", "type": "pointer"},
    {"name": "rows", "type": "int32"},
    {"name": "columns", "type": "int32"},
]
SLOTS = "mix=8,4,8,8,4,8,4,4;other=8,4,8,8,4,8,4,4;fixed=8;pack=8,4,8,8,4,8,4,4"
MIX = {
    "kernel": "mix", "parameters": PARAMETERS, "block": 256, "grid": [["rows", 32], ["tokens", 8], 1],
    "shared": {"bytes": 128, "per": {"columns": 16}},
}  # fmt: skip
FIXED = {"kernel": "fixed", "parameters": PARAMETERS[:1], "block": 64, "grid": [3, 1, 1], "shared": {"bytes": 0}}
PACK = {**MIX, "kernel": "pack", "cluster": 4}
ENTRIES = {"mix": MIX, "other": {**MIX, "grid": ["rows", 1, "tokens"]}, "fixed": FIXED, "pack": PACK}
TEXTS: dict[str, list[dict[str, Any]]] = {
    "mix": [
        {"file": "mix.ptx", "driver": 11040, "capability": [[8, 0], [9, 99]]},
        {"file": "mix.ordered.ptx", "driver": 12050, "capability": [[10, 0], [99, 99]]},
    ],
    "fixed": [{"file": "fixed.ptx", "driver": 11040, "capability": [[8, 0], [99, 99]]}],
    "pack": [{"file": "pack.ptx", "driver": 12000, "capability": [[9, 0], [9, 99]]}],
}


def write_folder(folder: Path, **changes: Any) -> Path:
    """The texts and the manifest of four entries; ``changes`` replace parts of the manifest."""
    texts = copy.deepcopy(TEXTS)
    for kernel, several in texts.items():
        for text in several:
            named = [name for name, entry in ENTRIES.items() if entry["kernel"] == kernel]
            data = f"// {text['file']}\n" + "".join(f".visible .entry {name}(\n)\n" for name in named)
            (folder / text["file"]).write_text(data)
            text["sha256"] = hashlib.sha256(data.encode()).hexdigest()
    manifest = {"format": 1, "texts": texts, "entries": ENTRIES, **changes}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler (cc or gcc), to make a libcuda.so.1 without a GPU")
    libraries = tmp_path_factory.mktemp("stub")
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(libraries / "libcuda.so.1"), str(SOURCE)], check=True)
    zygote = Zygote(__name__, libraries, STUB_RECORD=str(libraries / "calls.jsonl"))
    yield zygote
    zygote.close()


class Driver:
    """The stub, for one test."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder, self.record = zygote, folder, folder / "calls.jsonl"

    def run(self, function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
        environment = {"STUB_RECORD": str(self.record), "STUB_PARAMETERS": SLOTS, **environment}
        return self.zygote.call(_play, str(self.folder), function.__name__, *arguments, **environment)

    def calls(self, name: str) -> list[dict[str, Any]]:
        """The calls of one function of the driver, in order."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [call for call in map(json.loads, lines) if call["call"] == name]


@pytest.fixture
def driver(stub: Zygote, folder: Path) -> Driver:
    return Driver(stub, folder)


# ---- in a process of their own


class OnGPU(torch.Tensor):
    """Memory of the CPU that claims to be on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    index = 0
    device = property(lambda self: torch.device("cuda", self.index))  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.index


def on_gpu(index: int = 0, *, start: int = 0) -> OnGPU:
    tensor = torch.zeros(64, dtype=torch.bfloat16)[start:].as_subclass(OnGPU)
    tensor.index = index
    return tensor


def numbers(**changes: Any) -> dict[str, Any]:
    """Arguments that fit the parameters of ``mix``."""
    tensors = {"x": on_gpu(), "bias": None, "out": on_gpu()}
    values = {**tensors, "tokens": 9, "stride": 64, "scale": 1.5, "rows": 33, "columns": 64, **changes}
    return {parameter["name"]: values[parameter["name"]] for parameter in PARAMETERS}


def gpu(index: int = 0) -> torch.device:
    return torch.device("cuda", index)


def _play(folder: str, function: str, *arguments: Any) -> Any:
    kernels.FOLDER = Path(folder)
    kernels._torch_has_cuda = lambda: True
    kernels._is_capturing = lambda: False
    kernels._current_stream = lambda index: 1000 + index
    return globals()[function](*arguments)


def _refusals(*devices: str) -> list[str | None]:
    return [kernels.refusal(torch.device(device)) for device in devices]


def _refuse_for_torch() -> list[str | None]:
    kernels._torch_has_cuda = lambda: False
    return _refusals("cuda:0")


def _error_of(function: Callable[..., Any], *arguments: Any) -> str:
    """The RuntimeError that the call ends in, or nothing."""
    try:
        function(*arguments)
    except RuntimeError as error:
        return str(error)
    return ""


def _all_errors() -> list[str]:
    """What each function says, twice, on a device that the kernels do not run on."""
    calls = [(kernels.prepare, gpu()), (kernels.shared_limit, gpu()), (kernels.launch, "fixed", on_gpu())]
    return [str(kernels.refusal(gpu())), *(_error_of(*call) for call in calls * 2), str(kernels.refusal(gpu()))]


def _all_errors_after_cuda_core() -> list[str]:
    from cuda.core import ObjectCode

    with pytest.raises(SystemError):
        ObjectCode.from_ptx(b"//").get_kernel("name")
    return _all_errors()


def _state_of_a_fresh_process() -> list[Any]:
    # Torch itself imports the bindings, where there are any.
    loaded = {name.split(".")[0] for name in os.environ["LOADED_AFTER_TORCH"].split()}
    return ["lightning_hinm" in loaded, "cuda" in loaded, torch.cuda.is_initialized(), kernels._started]


def _shared_limits() -> list[int]:
    return [kernels.shared_limit(gpu(index)) for index in (0, 1, 0)]


def _prepare(*indices: int) -> str:
    return _error_of(lambda: [kernels.prepare(gpu(index)) for index in indices])


def _prepare_after_a_failure() -> list[str]:
    first = _prepare(0)
    os.environ["STUB_JIT"] = "0"
    return [first, _prepare(0)]


def _launch(*several: dict[str, Any]) -> list[dict[str, int]]:
    """Launches of ``mix``, one for each change of its arguments; the addresses of their tensors."""
    addresses = []
    for changes in several:
        arguments = numbers(**changes)
        kernels.launch("mix", *arguments.values())
        addresses.append({name: t.data_ptr() for name, t in arguments.items() if isinstance(t, torch.Tensor)})
    return addresses


def _launch_extremes() -> list[dict[str, int]]:
    extremes = {"stride": -(2**63), "scale": float("-inf"), "tokens": 1, "rows": 2**31 - 1, "columns": 1}
    return _launch({"bias": on_gpu()}, extremes)


def _launch_fixed() -> str:
    return _error_of(kernels.launch, "fixed", on_gpu())


def _launch_clusters() -> str:
    try:
        kernels.launch("pack", *numbers().values())
    except ValueError as error:
        return str(error)
    return ""


def _launch_on_streams(*streams: int) -> None:
    for stream in streams:
        kernels._current_stream = lambda index, stream=stream: stream
        kernels.launch("fixed", on_gpu())


# What is wrong with the arguments of a launch, and what the error says.
WRONG: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "an entry that is not there": (lambda: ("nix",), "nix: is not in the manifest, which has mix, other, fixed, pack"),
    "an argument too few": (
        lambda: ("mix", *list(numbers().values())[:-1]),
        "mix: got 7 arguments, but takes 8: x, tokens, bias, stride, scale, out, rows, columns",
    ),
    "an argument too many": (lambda: ("fixed", on_gpu(), 3), "fixed: got 2 arguments, but takes 1: x"),
    "a number for a pointer": (lambda: mix(x=3), "mix: x is 3, but must be a tensor or None"),
    "no tensor": (lambda: ("fixed", None), "fixed: got no tensor, but is launched where its tensors are"),
    "a tensor of the CPU": (lambda: mix(x=torch.zeros(8)), "mix: x is on cpu, but must be on a CUDA device"),
    "a tensor of another GPU": (
        lambda: mix(out=on_gpu(1)),
        "mix: out is on cuda:1, but must be on cuda:0, where the tensors before it are",
    ),
    "tensors of GPU and CPU": (lambda: mix(out=torch.zeros(8)), "mix: out is on cpu, but must be on cuda:0, where"),
    "a tensor that is not aligned": (
        lambda: mix(x=on_gpu(start=1)),
        "mix: x is at address 0x[0-9a-f]*2, but must be aligned to 16 bytes",
    ),
    "an int32 that overflows": (
        lambda: mix(tokens=2**31),
        "mix: got tokens=2147483648, .*but takes tokens int32, stride int64, scale float32, rows int32",
    ),
    "a float32 that overflows": (lambda: mix(scale=1e40), "mix: got .*scale=1e[+]40.*scale float32"),
    "a fraction for an integer": (lambda: mix(rows=1.5), "mix: got .*rows=1.5.*rows int32"),
    "None for a number": (lambda: mix(rows=None), "mix: got .*rows=None.*rows int32"),
    "a negative size": (lambda: mix(rows=-64), "mix: .*'rows': -64.* but CUDA takes 0 to"),
    "too many blocks along y": (
        lambda: mix(tokens=8 * 65536),
        r"mix: .*'tokens': 524288.* make a grid of \(2, 65536, 1\), but CUDA takes 0 to \(2147483647, 65535, 65535\)",
    ),
    "too many blocks along z": (lambda: ("other", *mix(tokens=65536)[1:]), r"other: .* \(33, 1, 65536\)"),
    "too much shared memory": (
        lambda: mix(columns=14457),
        "mix: takes 231440 bytes of shared memory with .*columns=14457, but cuda:0 has 231424 for it. Run this layer d",
    ),
}


def mix(**changes: Any) -> tuple[Any, ...]:
    return ("mix", *numbers(**changes).values())


def _launch_wrongly(case: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the test knows its text
        kernels.launch(*WRONG[case][0]())
    return str(error.value)


def _launch_empty() -> bool:
    _launch({"rows": 0}, {"tokens": 0})
    return bool(kernels._loaded)


def _launch_from_contexts() -> list[int]:
    """Launches on both GPUs from no context, then from that of each GPU; whose context is current after each launch."""
    from cuda.bindings import driver

    _prepare(0, 1)
    contexts = [kernels._loaded[os.getpid(), index][1] for index in (0, 1)]
    after = []
    for current in (None, *contexts):
        if current is not None:
            driver.cuCtxSetCurrent(current)
        for index in (0, 1):
            kernels.launch("fixed", on_gpu(index))
            now = driver.cuCtxGetCurrent()[1]
            after.append(contexts.index(now) if int(now) else -1)
    return after


def _launch_from_threads(threads: int, times: int) -> None:
    def launch_all(number: int) -> None:
        for _ in range(times):
            _launch({"tokens": number, "stride": number, "rows": number, "columns": number})

    several = [threading.Thread(target=launch_all, args=(number + 1,)) for number in range(threads)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()


def _capture() -> list[str]:
    kernels._is_capturing = lambda: True
    errors = [_launch_fixed(), _prepare(0)]
    kernels._is_capturing = lambda: False
    errors.append(_prepare(0))
    kernels._is_capturing = lambda: True
    return [*errors, _launch_fixed()]


def _use_after_fork(how: str) -> list[Any]:
    if how == "prepared":
        kernels.prepare(gpu())
    elif how == "prepared in vain":
        _prepare(0)
    elif how == "preparing":
        kernels.refusal(gpu())
        kernels._lock.acquire()  # as another thread holds it while it loads
    elif how == "torch":
        from cuda.bindings import driver

        driver.cuInit(0)
    return [in_a_fork(kernels.refusal, gpu()), in_a_fork(_launch_fixed)]


# ---- tests


def test_the_shipped_manifest_says_what_the_shipped_texts_take() -> None:
    if not (kernels.FOLDER / "manifest.json").exists():
        pytest.skip(f"needs {kernels.FOLDER}/manifest.json")
    texts, entries = kernels.read_manifest(kernels.FOLDER)
    for name, entry in entries.items():
        widths = [8 if parameter.type in ("pointer", "int64") else 4 for parameter in entry.parameters]
        for text in texts[entry.kernel]:
            ptx = kernels.read_text(kernels.FOLDER / text.file, text.sha256).decode()
            found = re.search(rf"\.entry {name}\((.*?)\)", ptx, re.DOTALL)
            assert found is not None, f"{text.file} has no {name}"
            assert [WIDTHS[kind] for kind in re.findall(r"\.param \.(\w+)", found[1])] == widths


@pytest.mark.parametrize(
    ("sizes", "grid", "shared"),
    [
        ({"rows": 32, "tokens": 8, "columns": 0}, (1, 1, 1), 128),
        ({"rows": 33, "tokens": 7, "columns": 3}, (2, 1, 1), 176),
        ({"rows": 0, "tokens": 9, "columns": 1}, (0, 2, 1), 144),
    ],
)
def test_an_entry_knows_its_grid_and_shared_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], grid: tuple[int, ...], shared: int
) -> None:
    monkeypatch.setattr(kernels, "FOLDER", folder)
    entry = kernels.entries()["mix"]
    assert entry.grid(sizes) == grid
    assert entry.shared_bytes(sizes) == shared
    assert kernels.entries()["other"].grid(sizes) == (sizes["rows"], 1, sizes["tokens"])
    assert kernels.entries()["fixed"].grid({}) == (3, 1, 1)
    assert kernels.entries()["fixed"].shared_bytes({}) == 0
    assert kernels.entries()["pack"].grid(sizes) == (-(-grid[0] // 4) * 4, *grid[1:]), "whole clusters"
    assert (kernels.entries()["pack"].cluster, entry.cluster) == (4, 1)


def test_entries_are_what_the_manifest_says_and_cannot_be_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "FOLDER", folder)
    entries = kernels.entries()
    assert list(entries) == ["mix", "other", "fixed", "pack"]
    assert [dataclasses.asdict(parameter) for parameter in entries["mix"].parameters] == [
        {"dtype": "", "layout": "", "alignment": 1, **parameter} for parameter in PARAMETERS
    ]
    with pytest.raises(TypeError):
        entries["mix"] = entries["other"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        entries["mix"].block = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "manifest.json: format is 2, but this lightning_hinm reads 1"),
        (
            {"entries": {"mix": {**MIX, "kernel": "nix"}}},
            r"mix: kernel is 'nix', but must be one of \['mix', 'fixed', 'pack'\]",
        ),
        ({"entries": {"mix": {**MIX, "block": 0}}}, "mix: block is 0, but must be an integer of at least 1"),
        ({"entries": {"mix": {**MIX, "cluster": 0}}}, "mix: cluster is 0, but must be an integer of at least 1"),
        ({"entries": {"mix": {**MIX, "block": "8"}}}, "mix: block is '8', but must be an integer of at least 1"),
        ({"entries": {"mix": {**MIX, "grid": [1, 1]}}}, "mix: grid has 2 dimensions, but must have 3"),
        ({"entries": {"mix": {**MIX, "grid": [["rows", 0], 1, 1]}}}, "mix: grid is 0, but must be an integer of at le"),
        ({"entries": {"mix": {**MIX, "grid": ["x", 1, "z"]}}}, r"mix: .* depend on \['x', 'z'\], but may only on"),
        ({"entries": {"mix": {**MIX, "shared": {"bytes": 0, "per": {"scale": 4}}}}}, r"mix: .* depend on \['scale'\]"),
        ({"entries": {"mix": {**MIX, "shared": {"bytes": -1}}}}, "mix: shared is -1, but must be an integer of at lea"),
        (
            {"entries": {"mix": {**MIX, "parameters": PARAMETERS[:1] * 2}}},
            "mix: its parameters are .*, but must differ",
        ),
        ({"entries": {"mix": {"kernel": "mix"}}}, r"mix: is malformed, KeyError\('parameters'\)"),
        ({"entries": {"mix": 3}}, "mix: is malformed, TypeError"),
        (
            {"entries": {"f": {**FIXED, "parameters": [{"name": "x", "type": "half"}]}}},
            r"f: x is of type 'half', but must be one of \['pointer', 'int32', 'int64', 'float32'\]",
        ),
        (
            {"entries": {"f": {**FIXED, "parameters": [{"name": "x", "type": "pointer", "alignment": 12}]}}},
            "f: x is aligned to 12, but must be to a power of 2",
        ),
        ({"texts": {"mix": []}}, "mix: has no text, but a kernel needs one"),
        (
            {"texts": {"mix": [{**TEXTS["mix"][0], "sha256": "", "file": "../mix.ptx"}]}},
            "mix: file is '../mix.ptx', but",
        ),
        (
            {"texts": {"mix": [{**TEXTS["mix"][0], "sha256": "", "capability": [[8], [9]]}]}},
            "mix: capability is .* pairs",
        ),
        ({"texts": {"mix": [{**TEXTS["mix"][0], "sha256": "", "driver": None}]}}, "mix: driver is None, but must be"),
    ],
)
def test_a_malformed_manifest_says_where_and_what(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(kernels, "FOLDER", write_folder(folder, **changes))
    with pytest.raises(ValueError, match=f"{message}.*Reinstall lightning-hinm"):
        kernels.entries()


@pytest.mark.parametrize("text", [None, "{", "[]", "\udc80"])
def test_a_manifest_that_is_no_manifest_is_a_value_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json: .*Reinstall lightning-hinm"):
        kernels.entries()


def test_other_devices_than_gpus_are_refused_by_name() -> None:
    for name in ("cpu", "meta"):
        reason = f"{name}: is no CUDA device, but the kernels are PTX for NVIDIA GPUs; move the model to one"
        assert kernels.refusal(torch.device(name)) == reason
        with pytest.raises(RuntimeError, match=reason):
            kernels.prepare(torch.device(name))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    try:
        ctypes.CDLL(kernels.LIBRARY)
    except OSError:
        zygote = Zygote(__name__, tmp_path_factory.mktemp("nothing"))
        yield zygote
        zygote.close()
    else:
        pytest.skip("needs a machine without NVIDIA's driver")


NO_DRIVER = r"cuda:0: no NVIDIA driver was found \(libcuda.so.1: .*\), but a GPU needs one; install it"


def test_without_a_driver_every_function_says_so_as_often_as_it_is_asked(bare: Zygote, folder: Path) -> None:
    for answer in bare.call(_play, str(folder), "_all_errors"):
        assert re.fullmatch(NO_DRIVER, answer)


def test_without_a_driver_nothing_hangs_after_cuda_core_has(bare: Zygote, folder: Path) -> None:
    if importlib.util.find_spec("cuda.core") is None:
        pytest.skip("needs cuda.core")
    for answer in bare.call(_play, str(folder), "_all_errors_after_cuda_core"):
        assert re.fullmatch(NO_DRIVER, answer)


def test_importing_the_package_loads_no_bindings_and_calls_no_driver(stub: Zygote) -> None:
    assert stub.call(_state_of_a_fresh_process) == [True, False, False, None]
    assert not (stub.libraries / "calls.jsonl").exists()


@pytest.mark.parametrize("capability", ["80", "86", "90", "100", "120"])
def test_ampere_and_everything_after_it_is_accepted(driver: Driver, capability: str) -> None:
    assert driver.run(_refusals, "cuda", "cuda:0", "cuda:1", STUB_CAPABILITY=capability) == [None] * 3


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"STUB_INIT": "100"},
            r"cuInit failed with CUDA_ERROR_STUB_100 \(the words of error 100\), but must find a GPU",
        ),
        ({"STUB_DRIVER": "11080"}, "its driver takes CUDA up to 11.8, but cuda.bindings needs 12.0; install a newer"),
        (
            {"STUB_DRIVER": "12040", "STUB_CAPABILITY": "120"},
            "its driver takes CUDA up to 12.4, but mix.ordered.ptx needs 12.5; install a newer driver",
        ),
        (
            {"STUB_CAPABILITY": "75"},
            "its compute capability is 7.5, but mix takes 8.0 to 9.99, 10.0 to 99.99; run the layers dense",
        ),
        ({"STUB_DEVICES": "1"}, "only 1 GPUs are visible, counted from 0; compare nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ({"STUB_MISSING": "cuDeviceGetCount"}, "function cuDeviceGetCount is not found"),
    ],
)
def test_a_gpu_is_refused_with_name_value_rule_and_remedy(
    driver: Driver, environment: dict[str, str], reason: str
) -> None:
    first, second = driver.run(_refusals, "cuda:1", "cuda:1", **environment)
    assert first == second
    assert re.match(f"cuda:1: {reason}", first)
    assert not first.endswith(".")
    assert len(driver.calls("cuInit")) == (0 if environment.get("STUB_DRIVER") == "11080" else 1)
    assert driver.run(_prepare, 1, **environment) == first


@pytest.mark.parametrize(
    ("file", "data", "reason"),
    [
        (
            "fixed.ptx",
            b"// fixed.ptx, but of another build\n",
            "fixed.ptx has the sha256 [0-9a-f]{64}, but the manifest ",
        ),
        ("fixed.ptx", None, "fixed.ptx is in the manifest, but cannot be read; reinstall lightning-hinm$"),
    ],
)
def test_texts_that_are_not_those_of_the_manifest_never_reach_the_driver(
    driver: Driver, file: str, data: bytes | None, reason: str
) -> None:
    if data is None:
        (driver.folder / file).unlink()
    else:
        (driver.folder / file).write_bytes(data)
    answers = driver.run(_all_errors)
    assert re.search(reason, answers[0])
    assert set(answers) == {answers[0]}
    assert driver.calls("cuModuleLoadDataEx") == []


def test_a_malformed_manifest_is_a_reason_to_refuse(driver: Driver) -> None:
    write_folder(driver.folder, format=2)
    (reason,) = driver.run(_refusals, "cuda:0")
    assert re.fullmatch(r"cuda:0: .*manifest\.json: format is 2, but .*\. Reinstall lightning-hinm", reason)


def test_a_torch_without_cuda_is_refused(driver: Driver) -> None:
    assert "is built without CUDA" in driver.run(_refuse_for_torch)[0]


def test_the_limit_of_shared_memory_is_the_devices_own(driver: Driver) -> None:
    assert driver.run(_shared_limits, STUB_OPTIN="101376") == [101376] * 3


@pytest.mark.parametrize(
    ("capability", "file", "clusters"),
    [("80", "mix.ptx", []), ("90", "mix.ptx", ["pack"]), ("120", "mix.ordered.ptx", [])],
)
def test_preparing_loads_each_text_and_function_once(
    driver: Driver, capability: str, file: str, clusters: list[str]
) -> None:
    driver.run(_prepare, 0, 1, 0, STUB_CAPABILITY=capability)
    there = [name for name in ENTRIES if name != "pack" or clusters]
    sizes = [(driver.folder / name).stat().st_size for name in (file, "fixed.ptx", *(f"{c}.ptx" for c in clusters))]
    loads = [(call["device"], call["bytes"]) for call in driver.calls("cuModuleLoadDataEx")]
    assert loads == [(device, size) for device in (0, 1) for size in sizes]
    # All that the static memory of the function leaves of the device's limit.
    attributes = [(call["function"], call["attribute"], call["value"]) for call in driver.calls("cuFuncSetAttribute")]
    assert attributes == [(name, 8, 232448 - 1024) for name in there] * 2
    assert [call["function"] for call in driver.calls("cuFuncLoad")] == there * 2


def test_an_entry_of_clusters_is_launched_in_whole_ones_where_they_are_and_refused_elsewhere(driver: Driver) -> None:
    assert driver.run(_launch_clusters) == ""
    (call,) = driver.calls("cuLaunchKernel")
    assert (call["function"], call["grid"]) == ("pack", [4, 2, 1])
    for capability in ("80", "120"):
        assert driver.run(_refusals, "cuda:0", STUB_CAPABILITY=capability) == [None]
        error = driver.run(_launch_clusters, STUB_CAPABILITY=capability)
        got = f"its compute capability is {capability[:-1]}.0, but pack takes 9.0 to 9.99"
        assert error == f"pack: {got}. Launch an entry of another kernel."
    assert len(driver.calls("cuLaunchKernel")) == 1


def test_a_driver_that_cannot_force_a_load_is_enough(driver: Driver) -> None:
    assert driver.run(_prepare, 0, STUB_MISSING="cuFuncLoad") == ""


def test_a_text_that_does_not_compile_is_an_error_with_the_compilers_log(driver: Driver) -> None:
    log = "ptxas application ptx input, line 9; fatal: Unresolved extern"
    first, second = driver.run(_prepare_after_a_failure, STUB_JIT="218", STUB_JIT_LOG=log)
    assert first.startswith(
        "mix.ptx: the driver failed to compile it with CUDA_ERROR_STUB_218 (the words of error 218)"
    )
    assert first.endswith(log)
    assert second == ""


def test_a_launch_passes_each_argument_in_its_own_size(driver: Driver) -> None:
    addresses = driver.run(_launch_extremes)
    first, second = driver.calls("cuLaunchKernel")
    assert (first["function"], first["device"]) == ("mix", 0)
    assert (first["grid"], first["block"], first["shared"]) == ([2, 2, 1], [256, 1, 1], 128 + 16 * 64)
    x, bias, out = (addresses[0][name] for name in ("x", "bias", "out"))
    assert first["parameters"] == packed(x, 9, bias, 64, 1.5, out, 33, 64)
    # The slots are written anew, the null pointer too.
    assert second["grid"] == [2**26, 1, 1]
    x, out = (addresses[1][name] for name in ("x", "out"))
    assert second["parameters"] == packed(x, 1, 0, -(2**63), float("-inf"), out, 2**31 - 1, 1)


def packed(*values: Any) -> str:
    return " ".join(struct.pack(f"<{code}", value).hex() for code, value in zip("QiQqfQii", values, strict=True))


def test_a_launch_is_on_torchs_stream_and_its_default_is_the_legacy_one(driver: Driver) -> None:
    driver.run(_launch_on_streams, 0, 7, 2**47)
    assert [call["stream"] for call in driver.calls("cuLaunchKernel")] == [1, 7, 2**47]


def test_an_empty_grid_is_no_launch_and_loads_nothing(driver: Driver) -> None:
    assert driver.run(_launch_empty) is False
    assert driver.calls("cuLaunchKernel") == []


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named_and_not_launched(driver: Driver, case: str) -> None:
    assert re.match(WRONG[case][1], driver.run(_launch_wrongly, case))
    assert driver.calls("cuLaunchKernel") == []


def test_a_failed_launch_names_entry_sizes_and_cudas_error(driver: Driver) -> None:
    error = driver.run(_launch_fixed, STUB_LAUNCH="719")
    assert error.startswith("fixed: the launch on cuda:0 failed with CUDA_ERROR_STUB_719 (the words of error 719);")
    assert "grid (3, 1, 1), block 64, 0 bytes of shared memory" in error


def test_a_launch_makes_the_context_of_its_tensors_current_only_where_it_is_not(driver: Driver) -> None:
    assert driver.run(_launch_from_contexts) == [-1, -1, 0, 0, 1, 1]
    launches = driver.calls("cuLaunchKernel")
    assert [call["device"] for call in launches] == [0, 1] * 3
    assert [call["stream"] for call in launches] == [1000, 1001] * 3
    # Two for the loading; then both from no context, and one from each.
    assert [call["device"] for call in driver.calls("cuCtxPushCurrent")] == [0, 1, 0, 1, 1, 0]
    assert len(driver.calls("cuCtxPopCurrent")) == 6


def test_threads_do_not_mix_their_arguments_and_load_once(driver: Driver) -> None:
    driver.run(_launch_from_threads, 8, 40, STUB_JIT_TIME="50")
    assert len(driver.calls("cuModuleLoadDataEx")) == 3
    launches = driver.calls("cuLaunchKernel")
    assert len(launches) == 320
    for call in launches:
        _, tokens, _, stride, _, _, rows, columns = call["parameters"].split()
        assert tokens == rows == columns == stride[:8]
        assert call["shared"] == 128 + 16 * struct.unpack("<i", bytes.fromhex(columns))[0]


def test_a_capture_loads_nothing_but_launches_what_was_prepared(driver: Driver) -> None:
    launched, prepared, *rest = driver.run(_capture)
    assert re.match("cuda:0: its kernels are not loaded, and cannot be while a CUDA graph is captured", launched)
    assert "Call lightning_hinm.kernels.prepare(device), or run the layer once, before the capture" in launched
    assert prepared == launched
    assert rest == ["", ""]
    assert len(driver.calls("cuLaunchKernel")) == 1


@pytest.mark.parametrize(("how", "inits"), [("prepared", 1), ("preparing", 1), ("torch", 3)])
def test_a_fork_of_a_process_that_uses_cuda_is_told_to_spawn(driver: Driver, how: str, inits: int) -> None:
    for answer in driver.run(_use_after_fork, how):
        assert answer == {"value": f"cuda:0: {kernels.FORKED}"}
    # What this package has begun, a fork does not touch; that torch has begun, only the driver knows.
    assert len(driver.calls("cuInit")) == inits
    assert driver.calls("cuLaunchKernel") == []


def test_a_fork_of_a_process_that_could_not_use_cuda_is_told_why(driver: Driver) -> None:
    for answer in driver.run(_use_after_fork, "prepared in vain", STUB_INIT="100"):
        assert answer["value"].startswith("cuda:0: cuInit failed with CUDA_ERROR_STUB_100")


def test_a_fork_of_a_process_that_has_not_used_cuda_is_free_to(driver: Driver) -> None:
    assert driver.run(_use_after_fork, "untouched") == [{"value": None}, {"value": ""}]


@pytest.mark.gpu
def test_a_gpu_runs_a_shipped_kernel_and_replays_it_from_a_graph() -> None:
    x = torch.randn(72, 64, dtype=torch.float16, device="cuda")
    eager, replayed = torch.zeros(2, 64, 72, dtype=torch.float16, device="cuda")
    sizes = (72, 64, 64, 72)  # height, width, and the strides of x and out
    kernels.launch("transpose", x, eager, *sizes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.launch("transpose", x, replayed, *sizes)
    assert torch.equal(eager, x.t())
    assert not replayed.any()
    graph.replay()
    assert torch.equal(replayed, x.t())
