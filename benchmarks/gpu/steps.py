"""The steps that run on the GPU, each in a process of its own: what they do, and where it is recorded."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from benchmarks.gpu import correctness
from benchmarks.gpu.cases import Case
from benchmarks.gpu.clock import Clock, Machine
from benchmarks.gpu.rates import Rates, peaks_of, prepare, print_row
from benchmarks.gpu.record import Record
from benchmarks.gpu.search import Matrix, line_of, search_matrix, warm_up
from benchmarks.gpu.speed import Speed, run_cases
from lightning_hinm.ops import cost

Say = Callable[[str], None]
CASE_SECONDS = 0.5  # of one comparison


def check(record: Record, device: torch.device, table: correctness.Table, say: Say) -> bool:
    """Right results, and the record of what was checked."""
    findings = correctness.Checker(device, device).run(table)
    record.put("correctness", findings.record)
    return _told(findings, say)


def sanitize(device: torch.device, table: correctness.Table, say: Say) -> bool:
    """A few launches of every kernel, with as little else on the GPU as can be: what a sanitizer watches."""
    prepare(device)
    return _told(correctness.Checker(device, torch.device("cpu")).run(table), say)


def measure(record: Record, machine: Machine, clock: Clock, say: Say, *, scale: int = 1) -> bool:
    """What bounds the kernels, and rows of ``ops.figures.GPUS``: of the peaks, and of what the planner measures."""
    record.put("rates", {})

    def keep(name: str, numbers: dict) -> None:
        record.data["rates"][name] = numbers
        record.save()
        say(f"{name}: {numbers}")

    prepare(machine.device)
    failures = Rates(machine, clock, scale).all(keep)
    on_gpu = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device).removeprefix("NVIDIA ") if on_gpu else machine.gpu.name
    capability = torch.cuda.get_device_capability(machine.device) if on_gpu else (0, 0)
    rows = {"peaks": peaks_of(record.data["rates"], machine, name)}
    if "failed" not in record.data["rates"]["tune"]:
        rows["row"] = replace(cost.Gpu(**record.data["rates"]["tune"]), name=name)
    for part, row in rows.items():
        record.put(part, asdict(row) | {"python": print_row(row, capability)})
        say(f"{part}, for lightning_hinm.ops.figures.GPUS:\n    {record.data[part]['python']}")
    # cuSPARSELt is a rival, not a part: that it cannot run is a fact to record.
    return not [failure for failure in failures if not failure.startswith("cusparselt:")]


def permute(record: Record, device: torch.device, matrices: Sequence[Matrix], seconds: float, say: Say) -> bool:
    """The permutation search on each matrix, until the seconds are spent; what was not searched is listed."""
    record.put("search", [])
    record.put("not_searched", [str(matrix) for matrix in matrices])
    warm_up(device)
    end = time.perf_counter() + seconds
    for matrix in matrices:
        if time.perf_counter() > end:
            say(f"not searched, for the seconds were spent: {'; '.join(record.data['not_searched'])}")
            break
        try:
            found = search_matrix(matrix, device)
        except Exception as error:  # one that fails must not cost the others
            found = {"matrix": str(matrix), "failed": f"{type(error).__name__}: {error}"}
        record.data["not_searched"].remove(str(matrix))
        record.add("search", found)
        say(line_of(found))
    return not [1 for found in record.data["search"] if "failed" in found or found["wrong"]]


def compare(
    record: Record, machine: Machine, clock: Clock, cases: Sequence[Case], seconds: float, say: Say,
    *, case_seconds: float = CASE_SECONDS,
) -> bool:  # fmt: skip
    """The cases, until the seconds are spent; what did not run is listed."""
    row = {name: value for name, value in record.data.get("row", {}).items() if name != "python"}
    known = record.data.get("rates", {}).get("cusparselt", {})
    prepare(machine.device)
    speed = Speed(machine, clock, measured=cost.Gpu(**row) if row else None, seconds=case_seconds,
                  cusparselt=known.get("captured", False))  # fmt: skip
    record.put("cases", [])
    left = run_cases(cases, speed, seconds, lambda case: record.add("cases", case), say)
    record.put("not_run", [str(case) for case in left])
    if left:
        say(f"{len(left)} of {len(cases)} cases did not run: --seconds were spent, or the GPU was lost")
    return not [1 for case in record.data["cases"] if "failed" in case or _has_wrong(case)]


def _has_wrong(case: dict) -> bool:
    """Whether a kernel of ours failed; a rival may."""
    rivals = "dense", "cusparselt", "cusparselt_searched"
    return any("failed" in entry and entry["path"] not in rivals for entry in case["times"])


def _told(findings: correctness.Findings, say: Say) -> bool:
    for text in (*findings.wrong, *findings.failed):
        say(text)
    if findings.left_out:
        say(f"left out, for this GPU has no clusters of blocks: {', '.join(findings.left_out)}")
    say(f"{findings.checks} checks of {len(findings.launched)} entries, {len(findings.wrong)} wrong, "
        f"{len(findings.failed)} failed; worst relative errors {findings.worst}")  # fmt: skip
    return not findings.wrong and not findings.failed
