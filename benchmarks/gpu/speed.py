"""Times of one case: dense, cuSPARSELt's 2:4 and every HiNM kernel that takes it, in turn, each result checked.

Weights rotate over enough copies that the L2 cache has forgotten one before its next turn. No bias, no activation.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases import Case, Conv2d, Linear
from benchmarks.gpu.clock import PASS, Call, Clock, Machine, Pass, Time, eager_pass
from benchmarks.gpu.rivals import CONV_COPIES, TOLERANCE, Rivals
from benchmarks.gpu.weights import conv2d_operands, fragments_of, linear_operands
from lightning_hinm import HiNMWeight, plan, unpack
from lightning_hinm.format import random_weight
from lightning_hinm.ops import cost, gpu, hinm_conv2d, hinm_linear
from lightning_hinm.ops.operands import LinearOperands
from lightning_hinm.workload import Workload

Record = dict[str, Any]
DTYPE = torch.bfloat16
# Of the kept columns and of the rows: (output, index). The first is how a pruned layer stands in a model.
VARIANTS = (("restored", "permuted"), ("tile", "permuted"), ("restored", "identity"))


@dataclass(frozen=True)
class Key:
    """What was timed: ``path`` is dense, cusparselt, op, bare, or a kernel and the tokens of its blocks."""

    path: str
    input: str = "row"
    output: str = "restored"
    index: str = "permuted"


@dataclass
class Contender:
    """Calls over all copies of a weight, and how to know that they are right.

    Args:
        key: its name.
        calls: one for each copy.
        expected: the result of the first call; None: not checked.
        out: where that result is, if the call returns none.
        predicted: seconds, if anything predicts them.
        eager: also timed as Python calls it.
        captured: timed in a graph; else only as Python calls it.
    """

    key: Key
    calls: Sequence[Call]
    expected: Tensor | None = None
    out: Tensor | None = None
    predicted: float | None = None
    eager: bool = False
    captured: bool = True

    def error(self) -> float | None:
        """The relative error of the first call."""
        if self.out is not None:
            self.out.fill_(float("nan"))
        found = self.calls[0]()
        if self.expected is None:
            return None
        found = self.out if self.out is not None else found
        expected = self.expected.float()
        return float((found.float() - expected).norm() / expected.norm())


class Speed:
    """Times cases on a machine.

    Args:
        machine: where, with the figures that the planner works with.
        clock: of that machine.
        measured: the figures of the machine itself, if it was measured.
        seconds: of one comparison.
        cusparselt: whether cuSPARSELt may be captured in a graph.
    """

    def __init__(
        self, machine: Machine, clock: Clock, *, measured: cost.Gpu | None = None, seconds: float, cusparselt: bool
    ) -> None:
        self.machine, self.clock, self.measured, self.seconds = machine, clock, measured, seconds
        self.generator, self.kind = torch.Generator(machine.device).manual_seed(0), (DTYPE, machine.device)
        self.rivals = Rivals(machine, DTYPE, self.generator, captured=cusparselt)

    def run(self, case: Case) -> Record:
        """Everything about a case, for the record."""
        start = time.perf_counter()
        self.clock.renew()
        layer, pattern = case.layer, case.pattern
        record: Record = {"layer": str(layer), "kind": type(layer).__name__.lower(), "rows": layer.rows}
        record |= {"columns": layer.columns, "tokens": case.tokens, "vector_size": pattern.vector_size}
        record |= {"sparsity": pattern.sparsity, "window": pattern.window}
        parts = self._linear(layer, case) if isinstance(layer, Linear) else self._conv2d(layer, case)
        record |= parts[1]
        with torch.inference_mode():
            record["times"] = self._time(parts[0]) + parts[2]
        record["wall"] = round(time.perf_counter() - start, 2)
        return record

    def _time(self, contenders: list[Contender]) -> list[Record]:
        """One record for each contender: its times, or why there are none."""
        records: dict[Key, Record] = {contender.key: asdict(contender.key) for contender in contenders}
        passes: dict[Key, Pass] = {}
        eager: dict[Key, Pass] = {}
        for contender in contenders:
            record = records[contender.key]
            try:
                error = contender.error()
                if error is not None and not error < TOLERANCE:
                    raise ArithmeticError(f"wrong result: relative error {error:.2e}")
                record |= {"error": error, "predicted": contender.predicted, "copies": len(contender.calls)}
                if contender.captured:
                    passes[contender.key] = self.clock.capture(contender.calls, contender.predicted or PASS)
                if contender.eager or not contender.captured:
                    eager[contender.key] = eager_pass(contender.calls)
            except Exception as failure:
                record |= {"failed": f"{type(failure).__name__}: {failure}"}
        for key, found in self._in_turn(passes, eager=False).items():
            records[key] |= asdict(found)
        for key, found in self._in_turn(eager, eager=True).items():
            records[key]["eager"] = found.seconds
        return list(records.values())

    def _in_turn(self, passes: dict[Key, Pass], *, eager: bool) -> dict[Key, Time]:
        seconds = self.seconds / 3 if eager else self.seconds
        return self.clock.in_turn(passes, seconds, eager=eager) if passes else {}

    # ------------------------------------------------------------------------------------------------------- linear

    def _linear(self, layer: Linear, case: Case) -> tuple[list[Contender], Record, list[Record]]:
        rivals = self.rivals.linear(layer, case.tokens)
        x, feature = rivals.x, rivals.feature
        out = x.new_empty(case.tokens, layer.rows)
        calls = {
            "row": cost.Call(case.pattern, layer.rows, layer.columns, case.tokens),
            "feature": cost.Call(case.pattern, layer.rows, layer.columns, case.tokens, feature_major=True),
        }
        figures = self.machine.shared_limit, self.machine.gpu
        dense = cost.predict_dense(calls["row"], self.machine.gpu).seconds
        contenders = [
            Contender(Key("dense"), rivals.dense, predicted=dense, eager=True),
            Contender(Key("dense", "feature"), rivals.dense_feature, predicted=dense),
        ]
        for path, rival in rivals.cusparselt.items():
            captured = self.rivals.captured
            contenders.append(Contender(Key(path), rival, predicted=dense, eager=True, captured=captured))

        chosen = {storage: cost.choose_kernel(call, *figures) for storage, call in calls.items()}
        packed, copies = self._variants(case)
        for variant in VARIANTS:
            expected = F.linear(x, unpack(packed[variant]))
            for storage, tokens in (("row", x), ("feature", feature)):
                if storage == "feature" and "identity" in variant:
                    continue  # the kernels read columns by the same index, and rows show it
                for choice in cost.list_kernels(calls[storage], *figures):
                    if choice.kernel == "unpack" and variant != VARIANTS[0]:
                        continue  # neither order reaches the product
                    key = Key(path_of(choice), storage, *variant)
                    runs = [partial(gpu.run_linear, tokens, out, operands, choice) for operands in copies[variant]]
                    contenders.append(Contender(key, runs, expected, out, choice.seconds))
                if variant == VARIANTS[0]:
                    ops = [partial(hinm_linear, tokens, *operands) for operands in copies[variant]]
                    best = chosen[storage]
                    contenders.append(Contender(Key("op", storage), ops, expected, predicted=best.seconds, eager=True))
            if variant == VARIANTS[0]:
                contenders += self._bare_gather(feature, copies[variant], expected)

        facts: Record = {"chosen": {storage: path_of(choice) for storage, choice in chosen.items()}}
        facts["predicted"] = {storage: choice.seconds for storage, choice in chosen.items()}
        facts["roof"] = {storage: choice.roof for storage, choice in chosen.items()}
        facts["predicted_dense"] = dense
        facts |= self._decide(Workload((layer.rows, layer.columns), case.pattern, tuple(x.shape), *self.kind))
        if self.measured:
            known = self.machine.shared_limit, self.measured
            facts["remeasured"] = {
                "dense": cost.predict_dense(calls["row"], self.measured).seconds,
                **{path_of(choice): choice.seconds for choice in cost.list_kernels(calls["row"], *known)},
            }
        return contenders, facts, [{**asdict(Key(path)), "failed": why} for path, why in rivals.unavailable.items()]

    def _variants(
        self, case: Case
    ) -> tuple[dict[tuple[str, str], HiNMWeight], dict[tuple[str, str], list[LinearOperands]]]:
        """The weight in every variant, packed, and its copies, each arranged by its own index."""
        packed, copies = {}, {}
        seed = int(torch.randint(2**31, (), generator=self.generator, device=self.machine.device))
        shape = case.layer.rows, case.layer.columns
        for output, index in VARIANTS:
            flags = {"permuted": index == "permuted", "restored": output == "restored"}
            self.generator.manual_seed(seed)
            one = packed[output, index] = random_weight(shape, case.pattern, DTYPE, self.generator, **flags)
            operands = linear_operands(one)
            count = self.machine.copies(sum(tensor.nbytes for tensor in fragments_of(operands)))
            copies[output, index] = [operands, *(copy_weight(operands) for _ in range(count - 1))]
        return packed, copies

    def _bare_gather(self, feature: Tensor, copies: list[LinearOperands], expected: Tensor) -> list[Contender]:
        """The gather kernel between feature-major tensors, without any transpose."""
        n, columns = feature.shape
        shared = cost.gather_shared(copies[0].expansion.shape[2] * 16, copies[0].columns.shape[1])  # type: ignore
        if n % cost.ALIGNED or shared > self.machine.shared_limit:
            return []
        rows = feature.new_empty(expected.shape[1], n)
        image = gpu.Image(n, n, columns)
        runs = [partial(gpu._launch_gather, feature.t(), rows, operands, image) for operands in copies]
        return [Contender(Key("bare", "feature"), runs, expected, rows.t())]

    # -------------------------------------------------------------------------------------------------- convolution

    def _conv2d(self, layer: Conv2d, case: Case) -> tuple[list[Contender], Record, list[Record]]:
        rivals = self.rivals.conv2d(layer)
        stride, padding = (layer.stride,) * 2, (layer.padding,) * 2
        shape = layer.rows, layer.channels, layer.kernel, layer.kernel
        packed = random_weight(shape, case.pattern, DTYPE, self.generator)
        operands = conv2d_operands(packed, None, stride=stride, padding=padding)
        count = min(self.machine.copies(sum(tensor.nbytes for tensor in fragments_of(operands))), CONV_COPIES)
        copies = [operands, *(copy_weight(operands) for _ in range(count - 1))]
        expected = F.conv2d(rivals.x, unpack(packed), None, stride, padding)
        contenders = [
            Contender(Key("dense"), rivals.dense, eager=True),
            Contender(Key("dense", "channels_last"), rivals.channels_last),
            Contender(Key("op"), [partial(hinm_conv2d, rivals.x, *each) for each in copies], expected, eager=True),
        ]
        dilation = 1, 1
        workload = Workload(shape, case.pattern, tuple(rivals.x.shape), *self.kind, stride, padding, dilation)
        predicted = plan.predict(workload)
        facts: Record = {"chosen": {"row": path_of(predicted["sparse"])}}
        facts |= {"predicted": {path: choice.seconds for path, choice in predicted.items()}}
        return contenders, facts | self._decide(workload), []

    def _decide(self, workload: Workload) -> Record:
        """What a model with this layer would do with it in a CUDA graph: decided by timing both, as a model does."""
        decision = plan.decide(replace(workload, replayed=self.clock.on_gpu))
        times = {"dense": decision.dense_seconds, "sparse": decision.sparse_seconds}
        return {"decided": {"path": decision.path, **times}}


def copy_weight(operands: Any) -> Any:
    """The same weight elsewhere in memory."""
    names = "expansion", "expansion_metadata", "columns", "restore"
    return operands._replace(**{name: getattr(operands, name).clone() for name in names})


def path_of(choice: cost.Choice) -> str:
    """The name of a kernel and the tokens of its blocks; ``"unpack"`` has none."""
    return f"{choice.kernel}_{choice.tokens}" if choice.tokens else choice.kernel


def run_cases(
    cases: Sequence[Case], speed: Speed, seconds: float, keep: Callable[[Record], None], say: Callable[[str], None]
) -> list[Case]:
    """Times cases until the seconds are spent, each handed to ``keep`` at once; those that did not run come back.

    A case that fails is kept with its error; after five in a row the GPU is taken for lost.
    """
    end, failed = time.perf_counter() + seconds, 0
    for i, case in enumerate(cases):
        if time.perf_counter() > end or failed == 5:
            return list(cases[i:])
        try:
            record, failed = speed.run(case), 0
        except Exception as error:
            record, failed = {"failed": f"{type(error).__name__}: {error}"}, failed + 1
            speed.rivals.last = None  # if memory was short, the next case starts with all of it
        keep({"case": str(case), **record})
        say(line_of(str(case), record))
    return []


def line_of(name: str, record: Record) -> str:
    """A case on one line: the dense time, and how many times faster the others are; of the op, also what it runs."""
    if "failed" in record:
        return f"{name}: failed, {record['failed']}"
    dense = seconds_of(record, "dense")
    if dense is None:
        return f"{name}: no dense time"
    parts = [f"{name}: dense {dense * 1e6:.1f} us"]
    for entry in record["times"]:
        if entry["path"] == "dense" or (entry["output"], entry["index"]) != VARIANTS[0]:
            continue
        storage = "" if entry["input"] == "row" else f" {entry['input']}"
        found, tile = entry.get("seconds"), seconds_of(record, entry["path"], entry["input"], output="tile")
        ratio = f"{dense / found:.2f}x" if found else "failed" if "failed" in entry else "not in a graph"
        ratio += f" ({dense / tile:.2f}x in tile order)" if tile else ""
        kernel = f" ({record['chosen'][entry['input']]})" if entry["path"] == "op" else ""
        parts.append(f"{entry['path']}{storage}{kernel} {ratio}")
    return ", ".join(parts)


def seconds_of(record: Record, path: str, storage: str = "row", **variant: str) -> float | None:
    """Of one contender, in a graph; None if there is no such time."""
    wanted = asdict(replace(Key(path, storage), **variant))
    for entry in record.get("times", ()):
        if all(entry[name] == value for name, value in wanted.items()):
            return entry.get("seconds")
    return None
