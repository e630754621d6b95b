"""The product for CPUs: compiled once on the user's machine, kept, and checked before it is loaded."""

import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_hinm import HiNMPattern
from lightning_hinm.format import random_weight, unpack
from lightning_hinm.kernels import host
from lightning_hinm.modules import HiNMLinear

ROOT = Path(__file__).parents[1]
PATTERN = HiNMPattern(vector_size=8)


def script(path: Path, text: str) -> str:
    """A program of that text."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that has its result at hand."""
    folder = tmp_path_factory.mktemp("compiler")
    made = folder / "made.so"
    compiler = next(found for name in host.COMPILERS if (found := shutil.which(name)))
    subprocess.run([compiler, *host.FLAGS, "-O0", str(host.SOURCE), "-o", str(made)], check=True)
    return script(folder / "compiler", f'for last; do :; done; cp {made} "$last"')


@pytest.fixture
def place(quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for what is compiled, and a process that has compiled nothing."""
    monkeypatch.setenv("CXX", quick)
    monkeypatch.setenv(host.SWITCH, str(tmp_path / "host"))
    host._library.cache_clear()
    yield tmp_path / "host"
    monkeypatch.undo()
    host._library.cache_clear()


def kept(place: Path) -> list[Path]:
    return sorted(place.iterdir())


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    host._library.cache_clear()


def test_what_was_compiled_once_takes_no_compiler_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.refusal() is None
    (path,) = kept(place)
    assert path.stat().st_mode & 0o077 == 0
    no_compiler(monkeypatch)
    assert host.refusal() is None
    assert kept(place) == [path]


def test_another_source_is_compiled_anew(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "host.cpp"
    source.write_text(host.SOURCE.read_text() + "\n")
    assert host.refusal() is None
    monkeypatch.setattr(host, "SOURCE", source)
    host._library.cache_clear()
    assert host.refusal() is None
    assert len(kept(place)) == 2


def test_a_damaged_file_is_not_loaded(place: Path, quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.refusal() is None
    (path,) = kept(place)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    no_compiler(monkeypatch)
    for damaged in (bytes(data), bytes(data[:100]), b""):
        path.unlink()  # this process has the first one in use
        path.write_bytes(damaged)
        path.chmod(0o600)
        host._library.cache_clear()
        assert host.refusal() == "there is no C++ compiler (no-such-compiler)"
    monkeypatch.setenv("CXX", quick)
    host._library.cache_clear()
    assert host.refusal() is None, "the next one that is made takes its place"


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_not_loaded(
    mode: int, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert host.refusal() is None
    kept(place)[0].chmod(mode)
    no_compiler(monkeypatch)
    with caplog.at_level(logging.WARNING, host.log.name):
        assert host.refusal() == "there is no C++ compiler (no-such-compiler)"
    assert "others than you may write it" in caplog.text


def test_a_folder_that_others_may_write_is_not_used(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place.mkdir()
    place.chmod(0o777)
    with caplog.at_level(logging.WARNING, host.log.name):
        assert host.refusal() is None
    assert "others than you may write there" in caplog.text
    assert kept(place) == []


def test_a_compiler_that_fails_is_quoted(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path / "compiler", "echo 'unknown option -fopenmp' >&2; exit 1")
    monkeypatch.setenv("CXX", compiler)
    reason = host.refusal()
    assert reason is not None
    assert f"{compiler} does not compile host.cpp with -O3" in reason
    assert reason.endswith(": unknown option -fopenmp")
    assert kept(place) == [], "nothing half done is left"


def test_the_compiler_may_have_arguments(place: Path, quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"/usr/bin/env {quick}")
    assert host.refusal() is None


def test_a_compiler_that_makes_no_library_is_said(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", "exit 0"))
    assert str(host.refusal()).startswith("host.cpp cannot be compiled and loaded: ")


def test_a_disk_that_takes_nothing_costs_a_compilation_in_each_process(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(host.SWITCH, str(tmp_path / "file" / "host"))
    with caplog.at_level(logging.WARNING, host.log.name):
        assert host.refusal() is None
    assert "takes no file" in caplog.text


def test_elsewhere_than_on_linux_and_macos_it_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    reason = host.refusal()
    monkeypatch.undo()
    assert reason is not None
    assert reason.startswith("the product for CPUs is compiled on Linux and macOS only")


def layer() -> HiNMLinear:
    packed = random_weight((24, 32), PATTERN, torch.float32, torch.Generator().manual_seed(0))
    return HiNMLinear(packed, None)


@pytest.mark.usefixtures("fresh_compiler")
def test_without_a_compiler_layers_run_by_torch_and_one_warning_says_why(
    place: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    no_compiler(monkeypatch)
    with pytest.warns(UserWarning, match="there is no C\\+\\+ compiler .* Install a C\\+\\+ compiler with OpenMP"):
        model = layer()
    assert model.expansion.dtype == torch.float32
    x = torch.randn(5, 32)
    torch.testing.assert_close(model(x), F.linear(x, unpack(model.packed)))
    layer()
    assert len(recwarn) == 0, "one of them is enough"


@pytest.mark.usefixtures("fresh_compiler")
def test_who_switches_it_off_is_not_warned(
    place: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv(host.SWITCH, "off")
    assert host.refusal() == f"{host.SWITCH} is off"
    assert layer().expansion.dtype == torch.float32
    assert len(recwarn) == 0
    assert not place.exists()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_layer_that_was_decoded_for_it_runs_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layer(), torch.randn(5, 32)
    assert model.expansion.dtype == torch.uint8
    expected = model(x)
    with monkeypatch.context() as context:
        context.setenv(host.SWITCH, "off")
        torch.testing.assert_close(model(x), expected)
    monkeypatch.setattr(host, "_library", lambda: "there is no C++ compiler")
    with pytest.warns(UserWarning, match="decoded anew at each call, because there is no C\\+\\+ compiler"):
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)  # and says so once
    with pytest.raises(RuntimeError, match="there is no C\\+\\+ compiler"):
        host.launch(x)


def test_a_forked_child_computes_and_does_not_wait_for_threads_that_are_gone() -> None:
    code = """
import os, signal, torch
from lightning_hinm import HiNMPattern
from lightning_hinm.format import random_weight
from lightning_hinm.modules import HiNMLinear
torch.set_num_threads(2)
packed = random_weight((24, 32), HiNMPattern(vector_size=8), torch.float32, torch.Generator().manual_seed(0))
model, x = HiNMLinear(packed, None), torch.ones(5, 32)
with torch.inference_mode():
    expected = model(x)
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if torch.equal(model(x), expected) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code) == "0\n"


def test_a_path_or_a_compiler_that_makes_no_sense_is_a_reason_and_no_crash(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", 'g++ "-DX')
    assert str(host.refusal()).startswith("host.cpp cannot be compiled and loaded: ")
    monkeypatch.setattr(host, "SOURCE", place / "missing.cpp")
    host._library.cache_clear()
    assert str(host.refusal()).startswith("missing.cpp cannot be compiled and loaded: ")


def test_a_layer_keeps_its_form_when_its_values_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for first, then in (("off", ""), ("", "off")):
        monkeypatch.setenv(host.SWITCH, first)
        model = layer()
        held = model.expansion
        monkeypatch.setenv(host.SWITCH, then)
        other = random_weight((24, 32), PATTERN, torch.float32, torch.Generator().manual_seed(0))
        other.values.mul_(2)
        model.repack(other)
        assert model.expansion is held, "graphs hold it"
        monkeypatch.setenv(host.SWITCH, first)
        x = torch.randn(5, 32)
        torch.testing.assert_close(model(x), F.linear(x, unpack(other)))


@pytest.mark.parametrize("m", [2, 3, 4, 8, 48, 64, 80, 128, 256])
def test_whole_groups_are_gathered_as_many_as_a_byte_can_number(m: int) -> None:
    held = host.held(m)
    assert held % m == 0
    assert m <= held <= max(host.HELD, m) <= host.POSITIONS


def test_groups_that_a_byte_cannot_number_are_not_taken() -> None:
    assert host.held(257) == 0


def run(code: str, **variables: str) -> str:
    """What a new process prints; other arguments are its environment's."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CHECK = "from tests.test_cpu import check_many; check_many(); print('equal')"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_every_instruction_set_computes_the_same(capability: str, tmp_path: Path) -> None:
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    variables = {"ATEN_CPU_CAPABILITY": capability, host.SWITCH: str(tmp_path)}
    assert run(CHECK, **variables) == "equal\n"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_compiler_warns_of_nothing(tmp_path: Path) -> None:
    flags = (*host.FLAGS, *host.MACHINES.get(torch.backends.cpu.get_cpu_capability(), ()), "-Wall", "-Wextra")
    command = ["g++", *flags, str(host.SOURCE), "-o", str(tmp_path / "host.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_two_processes_compile_at_once(tmp_path: Path) -> None:
    code = "from lightning_hinm.kernels import host; print(host.refusal())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), host.SWITCH: str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0] for process in started] == ["None\n"] * 2
    assert all(path.suffix == ".so" for path in tmp_path.iterdir())


def sanitizer(name: str) -> str | None:
    """The runtime of a sanitizer of GCC, if it is there."""
    if shutil.which("g++") is None:
        return None
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.slow
@pytest.mark.skipif(sanitizer("libasan.so") is None, reason="needs g++ with AddressSanitizer")
def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    flags = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    compiler = script(tmp_path / "compiler", f'exec g++ "$@" {flags}')
    runtime = f"{sanitizer('libasan.so')} {sanitizer('libubsan.so')} {sanitizer('libstdc++.so')}"
    variables = {"CXX": compiler, host.SWITCH: str(tmp_path / "host"), "LD_PRELOAD": runtime}
    assert run(CHECK, **variables, ASAN_OPTIONS="detect_leaks=0") == "equal\n"
