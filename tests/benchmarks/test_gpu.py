"""The benchmark of the GPU kernels, on a CPU that emulates one."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import correctness, goals, rates, record, sanitizer, speed, steps
from benchmarks.gpu.cases import LLAMA, Case, Conv2d, Linear, all_cases, default_cases
from benchmarks.gpu.clock import PASS, Clock, Machine, eager_pass
from benchmarks.gpu.plot import work_of
from benchmarks.gpu.weights import random_fragments
from lightning_hinm import HiNMPattern, kernels, unpack
from lightning_hinm.format import check_packed, random_weight
from lightning_hinm.ops import cost
from lightning_hinm.ops.figures import estimate
from tests.ptx.device import emulated
from tests.test_fragments import PATTERNS, read_back

CPU = torch.device("cpu")
TOY = Case(Linear("Llama-7B toy", 32, 64), 8, HiNMPattern(32))
TOY_CONV = Case(Conv2d("ResNet-50", 8, 32, 3, 4, batch=1), 16, HiNMPattern(32, window=None))
TINY_TABLE = correctness.Table(
    [correctness.Matrix(HiNMPattern(32, window=8), 40, 40, (9,))],
    [correctness.Image(HiNMPattern(32), 4, 32, (3, 3), (3, 4), padding=(1, 1))],
    [correctness.Matrix(HiNMPattern(32), 32, 20, (2,))],
)
PYTHON = [sys.executable, "-S", "-c"]
CLEAN = "========= ERROR SUMMARY: 0 errors"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (70, 150), (300, 37)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_random_fragments_obey_a_pattern(pattern: HiNMPattern, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = random_weight(shape, pattern, dtype, seeded())
    check_packed(packed)
    dense = unpack(packed)
    assert torch.equal(read_back(random_fragments(*shape, pattern, dtype, seeded()), shape), dense)
    assert dense.count_nonzero() > 0.9 * shape[0] * pattern.kept(shape[1]) / 2 - 2 * shape[0]


def test_random_weights_of_one_seed_differ_in_their_orders_alone() -> None:
    shape, pattern = (70, 152), HiNMPattern(64, window=32)
    base = random_weight(shape, pattern, torch.float16, seeded())
    plain = random_weight(shape, pattern, torch.float16, seeded(), permuted=False, restored=False)
    assert torch.equal(base.values, plain.values)
    assert torch.equal(base.metadata, plain.metadata)
    assert plain.output_order.tolist() == list(range(70))
    assert base.output_order.tolist() != plain.output_order.tolist()
    columns, ascending = base.layout.vector_index, plain.layout.vector_index
    assert not torch.equal(columns, ascending)
    assert torch.equal(columns.sort(dim=1).values, ascending)


def test_a_grouped_convolution_keeps_its_random_rows_in_their_groups() -> None:
    check_packed(random_weight((64, 3, 3, 3), HiNMPattern(32), torch.float16, seeded(), groups=2), groups=2)


def test_the_default_cases_are_those_of_the_goals_first_and_lead_the_whole_grid() -> None:
    cases, everything = default_cases(), all_cases()
    assert everything[: len(cases)] == cases
    assert len(set(everything)) == len(everything) > 1000 > 2 * len(cases)
    assert {case.layer for case in cases[:12]} == set(LLAMA)
    assert {case.tokens for case in cases[:28]} == {1, 16, 4096, 8192}
    assert {case.pattern.sparsity for case in cases[:28]} == {0.75, 0.875}
    assert {8 * 56 * 56 * 4, 32 * 28 * 28} <= {case.tokens for case in cases if isinstance(case.layer, Conv2d)}
    kinds = {(case.pattern.vector_size, case.pattern.sparsity, case.pattern.window) for case in cases}
    assert {(v, 0.9375, 256) for v in (32, 64, 128)} | {(v, 0.75, None) for v in (32, 64, 128)} <= kinds
    assert (768, 768) in {(case.layer.rows, case.layer.columns) for case in cases if case.tokens == 4096}


def test_the_whole_grid_has_every_convolution_of_resnet_50_but_the_first() -> None:
    layers = {case.layer for case in all_cases() if isinstance(case.layer, Conv2d)}
    wanted = set()
    for width, size, before in ((64, 56, 64), (128, 28, 256), (256, 14, 512), (512, 7, 1024)):
        wide, stride, entry = 4 * width, 1 if width == 64 else 2, size if width == 64 else 2 * size
        wanted |= {(before, width, 1, entry, 1), (width, width, 3, entry, stride), (before, wide, 1, entry, stride)}
        wanted |= {(wide, width, 1, size, 1), (width, width, 3, size, 1), (width, wide, 1, size, 1)}
    assert {(each.channels, each.rows, each.kernel, each.size, each.stride) for each in layers} == wanted


def test_the_correctness_step_runs_every_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(correctness, "_forms", lambda x: {"rows 3 apart": torch.nn.functional.pad(x, (0, 3))[:, :-3]})
    found, said = record.Record(tmp_path / "gpu.json"), []
    with emulated(clusters=False):
        assert steps.check(found, CPU, TINY_TABLE, said.append)
    assert re.match("left out, for this GPU has no clusters of blocks: decode_cluster_f16_32_8, ", said[0])
    written = json.loads((tmp_path / "gpu.json").read_text())["correctness"]
    assert not written["wrong"] + written["failed"]
    assert set(written["worst"]) == {"float16", "bfloat16"}
    assert all(0 < error < 5e-3 for error in written["worst"].values())
    own = {"decode_f16_32_8", "decode_f16_32_16", "gather_f16_32"}
    own |= {name.replace("f16", "bf16") for name in own}
    assert set(written["launched"]) == own | {"transpose", "planes", "unpack"}


def test_what_sanitizers_watch_has_a_weight_of_several_blocks_of_columns() -> None:
    (wide,) = (matrix for matrix in correctness.SUBSET.matrices if matrix.columns > cost.UNPACKED_COLUMNS)
    with emulated():
        findings = correctness.Checker(CPU, CPU).run(correctness.Table([wide], [], []))
    assert not findings.wrong + findings.failed
    assert findings.launched["unpack"] >= 1


def test_the_correctness_step_runs_images_of_each_form_on_a_kernel_and_on_the_dense_product() -> None:
    with emulated():
        findings = correctness.Checker(CPU, CPU).run(correctness.Table([], [correctness.IMAGES[0]], []))
    assert not findings.wrong + findings.failed
    assert findings.launched == {"unpack": 8 + 2, "planes": 8, "gather_f16_64": 4, "gather_bf16_64": 4}


def test_the_correctness_step_runs_what_only_some_gpus_have(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    matrix = dataclasses.replace(TINY_TABLE.matrices[0], pattern=HiNMPattern(32, 0.5, window=8), tokens=(8,))
    monkeypatch.setattr(correctness, "TOLERANCES", {torch.float16: 2e-3})
    every = cost.list_kernels
    monkeypatch.setattr(
        cost, "list_kernels", lambda *call: [each for each in every(*call) if each.kernel == "decode_cluster"]
    )
    with emulated() as emulator:
        assert steps.sanitize(CPU, correctness.Table([matrix], [], []), said.append)
    launched = set(emulator.launched) - {"decode_f16_32_8"}  # by the op itself
    assert launched == {"decode_cluster_f16_32_8", "decode_cluster_f16_32_16"}
    assert not any("left out" in line for line in said)


@pytest.mark.parametrize("shape", [(5, 16), (8, 7), (1, 8), (3, 1)], ids=str)
def test_inputs_of_every_form_hold_the_same_numbers(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=seeded()).half()
    forms = correctness._forms(x)
    assert forms.pop("one row for all").equal(x[:1].repeat(shape[0], 1))
    assert all(form.equal(x) for form in forms.values())
    if min(shape) > 1:
        assert len({(form.stride(), form.data_ptr() % 16) for form in forms.values()}) == len(forms)


def test_the_correctness_step_fails_on_an_output_that_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    matrix = dataclasses.replace(TINY_TABLE.matrices[0], tokens=(3,))
    with emulated():
        monkeypatch.setattr(kernels, "launch", lambda *_: None)
        monkeypatch.setattr(correctness, "MOST_FAILURES", 1000)
        assert not steps.sanitize(CPU, correctness.Table([matrix], [], [], complete=True), said.append)
        assert kernels.launch.__name__ == "<lambda>"
    assert any("decode_f16_32_8, none, restored: relative error inf" in line for line in said)
    assert any("the table did not reach" in line for line in said)


def test_every_entry_that_a_choice_launches_is_in_the_manifest() -> None:
    entries = {entry for entry in kernels.entries() if entry not in ("transpose", "planes")}
    with emulated():
        checker = correctness.Checker(CPU, CPU)
        calls = [(m.pattern, *way) for m in correctness.FULL.matrices for n in m.tokens for way in checker._ways(m, n)]
    kinds = [(call, dtype) for call in calls for dtype in correctness.TOLERANCES]
    named = {correctness.entry_of(choice, pattern, dtype) for (pattern, choice, _), dtype in kinds}
    assert named == entries


def test_measurements_and_comparisons_end_in_one_json_and_one_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    found = record.Record(tmp_path / "gpu.json")
    found.put("facts", record.facts(CPU))
    with emulated(clusters=False):
        machine, clock = dataclasses.replace(Machine.of(CPU), l2=1), Clock(CPU, least_rounds=1)
        assert steps.measure(found, machine, clock, print, scale=1000)
        assert steps.compare(found, machine, clock, [TOY, TOY_CONV], 60.0, print, case_seconds=0.0)
    gpu.conclude(found, None)
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert written == json.loads((tmp_path / "gpu.json").read_text())
    assert written["not_run"] == []
    assert written["row"]["measured"]
    assert re.fullmatch(r'\(0, 0\): Gpu\("H200", ([\d.e+-]+, )+measured=True\),', written["row"]["python"])
    linear, conv = written["cases"]
    times = {(entry["path"], entry["input"], entry["output"], entry["index"]): entry for entry in linear["times"]}
    assert times["decode_8", "row", "restored", "permuted"]["seconds"] > 0
    assert times["decode_8", "row", "tile", "permuted"]["error"] < 1e-2
    assert times["decode_8", "row", "restored", "identity"]["error"] < 1e-2
    assert times["gather_128", "feature", "restored", "permuted"]["predicted"] > 0
    assert times["gather_128", "feature", "tile", "permuted"]["seconds"] > 0
    assert "failed" in times["cusparselt", "row", "restored", "permuted"]
    assert linear["chosen"]["row"].startswith("decode")
    assert linear["decided"]["path"] in ("dense", "sparse")
    assert linear["predicted_dense"] > 0 < conv["predicted"]["sparse"]
    assert {entry["path"] for entry in conv["times"]} == {"dense", "op"}
    assert any(goal["text"] == "decode, Llama" and not goal["reached"] for goal in written["goals"])
    assert (tmp_path / "out" / "gpu.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert re.search(r"decode_8 [\d.]+x \([\d.]+x in tile order\)(.|\n)*MISSED", said)
    assert f", op ({linear['chosen']['row']}) " in said
    assert f", op feature ({linear['chosen']['feature']}) " in said
    assert f", op ({conv['chosen']['row']}) " in said


def test_a_row_for_the_table_says_what_a_cluster_of_blocks_has() -> None:
    with emulated():
        row = rates.peaks_of({}, Machine.of(CPU), "H200")
    assert row == dataclasses.replace(estimate((9, 0)), measured=True)
    assert rates.print_row(row, (9, 0)).endswith("gpc=16, measured=True),")


def test_the_memory_is_measured_by_a_kernel_and_not_by_a_memcpy(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = rates.Rates(mock.Mock(device=CPU), mock.Mock(), scale=2**20)
    seen: list[str] = []

    def seconds(call: Callable[[], Any]) -> float:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call()
        seen.extend(event.key for event in profiled.key_averages())
        return 2.0

    monkeypatch.setattr(measured, "_seconds", seconds)
    assert measured.memory() == {"copy": 2 * 2 * 2**9 / 2.0}
    assert seen == ["aten::neg"]


def test_what_estimates_expect_of_the_goals_is_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--expect"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("by the figures of an H200 in the table: ")
    assert all(
        re.match(r"(above|BELOW) +[\d.]+x of [\d.]+x  (decode, Llama|many tokens, (row|feature)-major): ", line)
        for line in lines
    )
    (line,) = (
        line for line in lines if "feature-major: Llama-7B up 11008x4096, 8192 tokens, V=64 87.50% window 256" in line
    )
    call = cost.Call(HiNMPattern.from_sparsity(0.875, 64, window=256), 11008, 4096, 8192, feature_major=True)
    best = cost.choose_kernel(call, gpu.SHARED_LIMIT, estimate((9, 0)))
    assert best is not None
    ratio = cost.predict_dense(call, estimate((9, 0))).seconds / best.seconds
    assert line[5:].startswith(f"  {ratio:.2f}x of 2.5x  many")
    assert line.endswith(f"{best.kernel}_{best.tokens} ({best.roof})")


def test_a_kernel_with_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = record.Record(tmp_path / "gpu.json")
    with emulated(clusters=False):
        machine, clock = dataclasses.replace(Machine.of(CPU), l2=1), Clock(CPU, least_rounds=1)
        monkeypatch.setattr(kernels, "launch", lambda *_: None)
        assert not steps.compare(found, machine, clock, [TOY], 60.0, print, case_seconds=0.0)
    (case,) = found.data["cases"]
    failed = {entry["path"] for entry in case["times"] if "wrong result" in entry.get("failed", "")}
    assert failed == {"unpack", "decode_8", "decode_16", "gather_128", "op", "bare"}
    assert not any("seconds" in entry for entry in case["times"] if entry["path"] in failed)


def test_cases_beyond_the_time_are_listed_and_five_failures_in_a_row_end_it() -> None:
    kept: list[dict[str, Any]] = []
    broken = mock.Mock(run=mock.Mock(side_effect=RuntimeError("an illegal memory access was encountered")))
    assert len(speed.run_cases([TOY] * 8, broken, 60.0, kept.append, print)) == 3
    assert all("illegal memory access" in case["failed"] for case in kept)
    assert speed.run_cases([TOY] * 8, broken, -1.0, kept.append, print) == [TOY] * 8


def test_on_a_gpu_a_pass_is_captured_once_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "stream", "default_stream", "CUDAGraph", "Event", "_sleep", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())  # what a clock can see of a GPU
    torch.cuda.Event.return_value.elapsed_time.return_value = 12.0  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    clock, calls = Clock(torch.device("cuda", 0)), []
    one = clock.capture([lambda: calls.append(0)] * 3, expected=PASS / 10)
    assert (one.calls, len(calls)) == (12, 1 + 12)
    times = clock.in_turn({"a": one}, 0.0)
    assert len(calls) == 1 + 12
    assert times["a"].seconds == pytest.approx(0.012 / 12)
    assert times["a"].rounds == 5
    first = clock.pool
    fails = mock.Mock(side_effect=RuntimeError("operation not permitted when stream is capturing"))
    with pytest.raises(RuntimeError, match="not permitted"):
        clock.capture([fails])
    assert clock.pool is first  # it failed before its capture began
    calls.clear()
    with pytest.raises(RuntimeError, match="not permitted"):
        clock.capture([lambda: fails() if calls else calls.append(0)])
    assert clock.pool is not first


def test_calls_of_a_host_are_timed_in_turn() -> None:
    order: list[str] = []
    passes = {name: eager_pass([lambda name=name: order.append(name)] * 2) for name in "ab"}
    times = Clock(CPU, least_rounds=2).in_turn(passes, 0.0, eager=True)
    assert "".join(order) == "aabb" * 3
    assert times["a"].low <= times["a"].seconds <= times["a"].high


def test_a_record_is_whole_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OUT", raising=False)
    one = record.Record(tmp_path / "new" / "gpu.json")
    one.put("facts", {"gpu": "toy"})
    one.add("cases", {"case": 1})
    record.Record(one.path).add("cases", {"case": 2})
    assert json.loads(one.path.read_text()) == {"facts": {"gpu": "toy"}, "cases": [{"case": 1}, {"case": 2}]}
    assert [path.name for path in one.path.parent.iterdir()] == ["gpu.json"]
    assert record.Record(one.path, fresh=True).data == {}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        one.put("facts", {})
    assert len(record.Record(one.path).data["cases"]) == 2


def test_a_step_ends_with_its_process_and_never_later_than_its_limit() -> None:
    passed = gpu.run_process("rates", [*PYTHON, "print('fine')"], 60.0)
    assert (passed.outcome, passed.said) == ("passed", "")
    failed = gpu.run_process("rates", [*PYTHON, "import sys; print('first'); sys.exit('the kernel is gone')"], 60.0)
    assert (failed.outcome, failed.said) == ("failed", "exit code 1\nfirst\nthe kernel is gone\n")
    sleeper = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('hangs', flush=True); time.sleep(60)"
    late = gpu.run_process("rates", [*PYTHON, sleeper], 0.5)
    assert (late.outcome, late.said) == ("failed", "no end after 0 s\nhangs\n")
    assert late.seconds < 30


@pytest.mark.parametrize("wrong", [[], ["decode_8: relative error inf"]], ids=["right", "wrong"])
def test_wrong_results_alone_stop_timings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: list[str]) -> None:
    ran = []

    def run_process(step: str, command: list[str], limit: float, environment: Any = None) -> gpu.Outcome:
        ran.append(step)
        if step == "correctness":
            record.Record(tmp_path / "gpu.json").put("correctness", {"wrong": wrong})
        if "--seconds" in command:
            assert 20 < float(command[command.index("--seconds") + 1]) < limit
        return gpu.Outcome(step, "failed", 1.0, "exit code 1\n")

    monkeypatch.setattr(gpu, "run_process", run_process)
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None if wrong else Path("compute-sanitizer"))
    steps_of_all = [outcome.step for outcome in gpu.run_steps(record.Record(tmp_path / "gpu.json"), 100.0)]
    assert steps_of_all == ["correctness", "memcheck", "racecheck", "rates", "search", "speed"]
    assert ran == (["correctness", "rates", "search"] if wrong else steps_of_all)
    written = {step["step"]: step for step in json.loads((tmp_path / "gpu.json").read_text())["steps"]}
    assert written["speed"]["outcome"] == ("skipped" if wrong else "failed")
    assert ("is not installed" in written["racecheck"]["said"]) == bool(wrong)


def test_the_default_run_ends_within_eight_minutes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_process = mock.Mock(return_value=gpu.Outcome("", "failed", 0.0))
    monkeypatch.setattr(gpu, "run_process", run_process)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(sanitizer, "find_tool", lambda: Path("compute-sanitizer"))
    gpu.run_steps(record.Record(tmp_path / "gpu.json"), gpu.SECONDS)
    *before, after_none = [call.args[2] for call in run_process.call_args_list]
    after_all = sum(before) + gpu.LEAST_SPEED_SECONDS + gpu.GRACE
    assert len(before) == 5
    assert gpu.SECONDS < max(after_none, after_all) <= 480 - gpu.OWN


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (0, CLEAN, ""),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", ""),
        (86, "========= ERROR SUMMARY: 3 errors", "it found errors: SUMMARY: 3 errors"),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", "it found errors"),
        (1, CLEAN, "exit code 1"),
        (86, CLEAN, "exit code 86"),
        (0, "Device not supported", "no summary"),
        (None, "", "did not end in time"),
    ],
)
def test_a_sanitizer_that_did_not_check_is_no_clean_bill(code: int | None, said: str, wrong: str) -> None:
    passed, found = sanitizer.verdict(code, f"{said}\n")
    assert passed == (not wrong)
    assert wrong in found


RACE = """\
========= Error: Race reported between Write access at decode_cluster_f16_32_8+0x1c20
=========     and Read access at decode_cluster_f16_32_8+0x2170 [640 hazards]
=========
"""


def test_all_that_a_sanitizer_says_is_judged_and_its_end_is_kept() -> None:
    said = RACE + "400 checks of 39 entries\n" * 100 + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error)"
    ended = gpu.run_process("racecheck", [*PYTHON, f"import sys; print({said!r}); sys.exit({sanitizer.EXIT})"], 60.0)
    verdict, *end = ended.said.splitlines()
    assert ended.outcome == "failed"
    assert re.fullmatch("it found errors: SUMMARY: .*, races in decode_cluster_f16_32_8", verdict)
    assert len(end) == gpu.TAIL


def test_the_sanitizer_is_found_where_cuda_home_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / sanitizer.NAME
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho NVIDIA\necho Version 2025.1.0.0 $1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizer.find_tool() == tool
    assert sanitizer.command(tool, "racecheck", ["python3"])[1:3] == ["--tool", "racecheck"]
    assert record.sanitizer_version() == "Version 2025.1.0.0 --version"


def synthetic_case(case: Case, dense: float, sparse: float, rival: float) -> dict[str, Any]:
    """A record in which every predicted time is the true one."""
    first, tile, identity = speed.VARIANTS
    entries = [("dense", "row", first, dense), ("dense", "feature", first, dense), ("cusparselt", "row", first, rival)]
    entries += [("decode_8", "row", first, sparse), ("decode_16", "row", first, 2 * sparse)]
    entries += [("gather_128", "feature", first, sparse), ("gather_128", "feature", tile, sparse / 2)]
    entries += [("decode_8", "row", tile, sparse * 0.8), ("decode_8", "row", identity, sparse * 0.975)]
    return {
        "case": str(case), "layer": str(case.layer), "kind": "linear", "rows": case.layer.rows,
        "columns": case.layer.columns, "tokens": case.tokens, "vector_size": case.pattern.vector_size,
        "sparsity": case.pattern.sparsity, "window": case.pattern.window,
        "chosen": {"row": "decode_8", "feature": "gather_128"}, "predicted": {"row": sparse, "feature": sparse},
        "predicted_dense": dense, "remeasured": {"dense": dense, "decode_8": sparse, "decode_16": sparse / 2},
        "times": [{"path": path, "input": storage, "output": output, "index": index, "seconds": each}
                  for path, storage, (output, index), each in entries],
    }  # fmt: skip


def test_goals_are_judged_by_the_planners_kernel_in_tile_order_and_the_faster_dense_product() -> None:
    decode, many = (next(case for case in default_cases() if case.tokens == n) for n in (1, 4096))
    cases = [synthetic_case(decode, 20e-6, 10e-6, 12e-6), synthetic_case(many, 24e-5, 20e-5, 10e-5)]
    found = {(goal.text, goal.case): goal for goal in goals.goals_of(cases)}
    assert found["decode, Llama", str(decode)].reached
    assert found["many tokens, row-major", str(many)].found == pytest.approx(1.5)
    assert found["many tokens, row-major", str(many)].restored == pytest.approx(1.2)
    assert found["many tokens, feature-major", str(many)].found == pytest.approx(2.4)
    assert not found["any order of columns, decode_8", str(many)].reached
    assert found["chosen, so not slower than dense, row-major", str(many)].reached
    assert not found["chosen, so ahead of cuSPARSELt, row-major", str(many)].reached
    table = goals.table_of({"cases": cases})
    assert f"reached   2.50x (2.00x) of 2.5x  decode, Llama: {decode}, decode_8\n" in table
    missed = f"chosen, so ahead of cuSPARSELt, row-major: 0.500x or more of 1x\n           0.500x {many}, decode_8\n"
    assert f"MISSED   1 of 2  {missed}" in table
    assert "MISSED   0 of 2  any order of columns, decode_8: 0.975x or more of 0.98x" in table
    assert "planner, as it is: the fastest kernel in 2 of 2" in table
    assert "with this machine's figures: the fastest kernel in 0 of 2; at worst 2.00 times slower" in table
    slow = synthetic_case(decode, 10e-6, 20e-6, 30e-6)
    assert not [goal for goal in goals.goals_of([slow]) if goal.text.startswith("chosen")]


def test_a_goal_is_missed_where_the_planner_leaves_it_to_the_dense_product() -> None:
    many = next(case for case in default_cases() if case.tokens == 4096)
    case = synthetic_case(many, 24e-5, 20e-5, 10e-5) | {"chosen": {"row": "unpack"}}
    case["times"].append({**case["times"][0], "path": "unpack", "seconds": 25e-5})
    (goal,) = (goal for goal in goals.goals_of([case]) if goal.text == "many tokens, row-major")
    assert (goal.found, goal.restored, goal.reached) == (pytest.approx(0.96), pytest.approx(0.96), False)


def test_a_plot_needs_no_gpu_and_no_more_than_a_json(tmp_path: Path) -> None:
    cases = [synthetic_case(case, 25e-6, 10e-6, 12e-6) for case in default_cases() if isinstance(case.layer, Linear)]
    (tmp_path / "gpu.json").write_text(json.dumps({"facts": {"gpu": "toy"}, "cases": cases[:12]}))
    assert gpu.main(["--plot", str(tmp_path / "gpu.json")]) == 0
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_work_of_a_layer_is_that_of_its_non_zeros() -> None:
    case = synthetic_case(Case(LLAMA[2], 1, HiNMPattern.from_sparsity(0.75, 64)), 1.0, 1.0, 1.0)
    flop, nbytes = work_of(case)
    assert flop == 2 * 4096 * 4096 / 4
    assert nbytes == pytest.approx(4096 * 4096 / 4 * 2 * 9 / 8 + 64 * 2048 * 2 + 2 * 8192)


def test_no_gpu_no_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_it_imports_no_more_than_a_machine_for_kernels_has() -> None:
    program = [sys.executable, "-c", "import sys, benchmarks.gpu.__main__; print(*sys.modules)"]
    modules = set(subprocess.run(program, check=True, capture_output=True, text=True, cwd=record.ROOT).stdout.split())
    assert "torch" in modules
    assert not modules & {"lightning", "transformers", "matplotlib", "recipes"}


@pytest.mark.parametrize("capability", [(9, 0), *(pytest.param(c, marks=pytest.mark.slow) for c in ((8, 0), (12, 0)))])
def test_the_probe_compiles_with_the_instructions_of_each_gpu(capability: tuple[int, int], tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    command = ["nvcc", "-ptx", *rates.probe_flags(capability), "-o", str(tmp_path / "probe.ptx"), str(rates.PROBE)]
    assert b"warning" not in subprocess.run(command, check=True, capture_output=True).stderr
    text = (tmp_path / "probe.ptx").read_text()
    assert ("mma.sp::ordered_metadata" if capability >= (10, 0) else "mma.sp.sync") in text
    assert ("cp.async.bulk.tensor.2d" in text) == (capability >= (9, 0))
    wgmma = re.findall(r"wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16 {[^}]*}, ({?)", text)
    assert ("multicast::cluster" in text) == (capability == (9, 0))
    assert set(wgmma) == ({"{", ""} if capability == (9, 0) else set())


PARTS_OF_GPUS: list[tuple[tuple[int, int], set[str]]] = [
    ((8, 9), {"tma", "bulk", "wgmma"}),
    ((9, 0), set()),
    ((12, 0), {"bulk", "wgmma"}),
]


@pytest.mark.parametrize(("capability", "skipped"), PARTS_OF_GPUS)
def test_a_part_costs_no_other(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], skipped: set[str]) -> None:
    def run(command: list[str], **_: Any) -> Any:
        return mock.Mock(returncode=command[-1] == "wgmma", stdout=f'{{"{command[-1]}_rate": 1}}', stderr="trap")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(rates, "MEASUREMENTS", ("probe",))
    found: dict[str, Any] = {}
    failures = rates.Rates(mock.Mock(device=CPU), mock.Mock(on_gpu=True)).all(lambda _, numbers: found.update(numbers))
    assert {name for name, value in found.items() if isinstance(value, dict) and "skipped" in value} == skipped
    assert [("wgmma" in failure, "trap" in failure) for failure in failures] == [(True, True)] * (
        "wgmma" not in skipped
    )
    assert {name for name in found if name.endswith("_rate")} == {
        f"{part}_rate" for part in {"mma", "tma", "bulk"} - skipped
    }
