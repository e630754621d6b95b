"""The kernels on a GPU: ``benchmarks/gpu.sh``, or ``python -m benchmarks.gpu``.

Steps, each in a process of its own:

correctness   every kernel against float64, on shapes, storages and surroundings of all kinds
memcheck      a part of that under compute-sanitizer, reads and writes out of bounds
racecheck     the same, races in shared memory
rates         what bounds the kernels here, and a row for the planner's table of GPUs
search        the permutation search on the GPU: the same laws as on a CPU, its time, and what it sends to the host
speed         layers of known networks against cuBLAS, cuDNN and cuSPARSELt; not after a wrong result

A step that fails does not stop the others, but the exit code says so. All numbers go into one JSON, written after every
case, and a PNG beside it where matplotlib is installed; both go to the folder $OUT as well, if that is set.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import correctness, goals, sanitizer, steps
from benchmarks.gpu.cases import all_cases, default_cases
from benchmarks.gpu.clock import Clock, Machine
from benchmarks.gpu.plot import draw_plot
from benchmarks.gpu.record import ROOT, Record, copies_of, facts, nvidia_smi, path_for
from benchmarks.gpu.search import MATRICES
from lightning_hinm.ops.figures import estimate

NEEDS_GPU = 2  # exit code
SHARED_LIMIT = 227 * 1024  # bytes of shared memory of a block, of compute capability 9
# The default run ends within eight minutes even if every step is killed at its limit: the limits leave
# LEAST_SPEED_SECONDS of SECONDS, then comes GRACE; OWN is for the imports before all steps and the picture after them.
SECONDS, FULL_SECONDS = 420.0, 3600.0
LEAST_SPEED_SECONDS = 60.0  # whatever the steps before it took
START = 15.0  # that a process takes before its first case
LIMITS = {"correctness": 120.0, "memcheck": 70.0, "racecheck": 75.0, "rates": 50.0, "search": 45.0}
GRACE = 25.0  # that the last step has beyond its own limit, to come to its end
OWN = 30.0
TAIL = 60  # lines of a step's output that the record keeps
SANITIZED = ("memcheck", "racecheck")


@dataclass(frozen=True)
class Outcome:
    """What became of a step, passed, failed or skipped, and what is to be said of it."""

    step: str
    outcome: str
    seconds: float
    said: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--full", action="store_true", help="the whole grid of cases, not a choice of them")
    parser.add_argument("--seconds", type=float, help=f"of it all; {SECONDS:g}, with --full {FULL_SECONDS:g}")
    parser.add_argument("--out", type=Path, help="the JSON; benchmarks/results/gpu-<name of the GPU>.json")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the PNG of a JSON; needs no GPU")
    parser.add_argument(
        "--expect",
        action="store_true",
        help="only print what the library's figures of an H200 expect of the goals; needs no GPU",
    )
    parser.add_argument("--step", choices=("correctness", "sanitize", "rates", "search", "speed"),
                        help="only that, in this process, into the JSON that is there; sanitize: what the two "
                        "sanitizers watch")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.expect:
        figures = estimate((9, 0))
        print(f"by the figures of an {figures.name} in the table: speed-up over BLAS, output in tile order")
        print(goals.expected_table(goals.expect(default_cases(), figures, SHARED_LIMIT)))
        return 0
    if options.plot:
        draw_plot(Record(options.plot).data, options.plot.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        print(f"benchmarks.gpu needs an NVIDIA GPU, but {why} (torch {torch.__version__}).", file=sys.stderr)
        return NEEDS_GPU
    device = torch.device("cuda", 0)
    path = (options.out or path_for(device)).resolve()  # the steps run in the repository's root
    seconds = options.seconds or (FULL_SECONDS if options.full else SECONDS)
    if options.step:
        return 0 if run_step(options.step, path, device, seconds, full=options.full) else 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no step outlives this process
    record = Record(path, fresh=True)
    record.put("facts", facts(device) | {"arguments": sys.argv[1:]})
    outcomes = run_steps(record, seconds, ["--full"] if options.full else [])
    conclude(Record(path), nvidia_smi())
    return 0 if all(outcome.outcome == "passed" for outcome in outcomes) else 1


def run_step(step: str, path: Path, device: torch.device, seconds: float, *, full: bool = False) -> bool:
    """One step in this process; whether it passed."""
    record, say = Record(path), lambda line: print(line, flush=True)
    if step == "correctness":
        return steps.check(record, device, correctness.FULL, say)
    if step == "sanitize":
        return steps.sanitize(device, correctness.SUBSET, say)
    if step == "search":
        return steps.permute(record, device, MATRICES, seconds, say)
    machine, clock = Machine.of(device), Clock(device)
    if step == "rates":
        return steps.measure(record, machine, clock, say)
    return steps.compare(record, machine, clock, all_cases() if full else default_cases(), seconds, say)


def run_steps(record: Record, seconds: float, flags: Sequence[str] = ()) -> list[Outcome]:
    """All steps in turn, each in a process of its own, the last one with the time that the others left."""
    end, outcomes = time.monotonic() + seconds, []
    own = [sys.executable, "-m", "benchmarks.gpu", "--out", str(record.path), *flags]
    for step in ("correctness", *SANITIZED, "rates", "search", "speed"):
        left = max(end - time.monotonic(), LEAST_SPEED_SECONDS)
        wrong = Record(record.path).data.get("correctness", {}).get("wrong", [])
        if step == "speed" and wrong:
            outcome = Outcome(step, "skipped", 0.0, f"{len(wrong)} results are wrong: their speed means nothing")
            print(f"speed: skipped, {outcome.said}")
        elif step in SANITIZED:
            tool, program = sanitizer.find_tool(), [*own, "--step", "sanitize"]
            if tool is None:
                outcome = Outcome(step, "failed", 0.0, f"{sanitizer.NAME} is not installed: nothing was checked")
            else:
                call = sanitizer.command(tool, step, program)
                outcome = run_process(step, call, LIMITS[step], sanitizer.environment(step))
        else:
            # A case that has begun comes to its end, and the kernels are loaded before the first.
            limit = LIMITS.get(step, left + GRACE)
            call = [*own, "--step", step, "--seconds", f"{min(left, limit) - START:.0f}"]
            outcome = run_process(step, call, limit)
        found = f": {outcome.said}" if outcome.outcome == "passed" and outcome.said else ""
        print(f"{step}: {outcome.outcome} in {outcome.seconds:.0f} s{found}", flush=True)
        outcomes.append(outcome)
        record = Record(record.path)  # the step wrote into it
        record.add("steps", vars(outcome))
    return outcomes


def run_process(
    step: str, command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
) -> Outcome:
    """A step's process, its output passed through; one that does not end in time is killed with all its children."""
    print(f"---- {step}: {' '.join(command)}", flush=True)
    start, late = time.monotonic(), threading.Event()
    output: list[str] = []
    process = subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        env={**os.environ, **(environment or {})}, preexec_fn=os.setpgrp,
    )  # fmt: skip

    def kill() -> None:
        late.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, kill)
    timer.start()
    try:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                print(line, end="", flush=True)
                output.append(line)
        code: int | None = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    code = None if late.is_set() else code
    if step in SANITIZED:
        passed, found = sanitizer.verdict(code, "".join(output))
    else:
        passed = code == 0
        found = "" if passed else f"no end after {limit:.0f} s" if code is None else f"exit code {code}"
    said = found if passed else "\n".join((found, "".join(output[-TAIL:])))
    return Outcome(step, "passed" if passed else "failed", round(time.monotonic() - start, 1), said)


def conclude(record: Record, state: Any) -> None:
    """Goals and picture of a record, and the summary."""
    record.data["nvidia_smi_after"] = state
    record.put("goals", [goal.row for goal in goals.goals_of(record.data.get("cases", ()))])
    picture = record.path.with_suffix(".png")
    try:
        draw_plot(record.data, picture)
        for copy in copies_of(picture):
            copy.write_bytes(picture.read_bytes())
        record.put("plot", picture.name)
    except (ImportError, ValueError) as error:
        record.put("plot", f"none: {error}")
    print(goals.table_of(record.data))
    if row := record.data.get("row"):
        print(f"for lightning_hinm.ops.figures.GPUS:\n    {row['python']}")
    for step in record.data.get("steps", ()):
        print(f"{step['step']}: {step['outcome']}" + (f", {step['said'].splitlines()[0]}" if step["said"] else ""))
    print(f"{record.path}\nplot: {record.data['plot']}")


if __name__ == "__main__":
    sys.exit(main())
