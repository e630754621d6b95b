"""What the kernels are meant to reach, and what a record says of it. Pure: a record in, rows out.

``python -m benchmarks.gpu --expect`` prints what estimates expect of the goals; that needs no GPU.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu.cases import Case, Linear
from benchmarks.gpu.speed import Key, path_of, seconds_of
from lightning_hinm.ops import cost

Record = dict[str, Any]
DECODE_TOKENS, DECODE = 16, {0.75: 2.5, 0.875: 4.5}
LEAST_TOKENS, LEAST_SIDE, VECTOR_SIZE = 4096, 3072, 64
MANY = {"row": {0.75: 1.2, 0.875: 1.9}, "feature": {0.75: 1.5, 0.875: 2.5}}
# A kernel reads its columns through an index in any case, so their order should cost nothing. Two medians of one thing
# differ by about this much, for the clock and the temperature of a GPU move; bank conflicts or misses would cost more.
ANY_ORDER = 0.98
OWN = re.compile(r"(decode|gather).*_\d+|unpack")  # paths that the planner chooses between


@dataclass(frozen=True)
class Goal:
    """A ratio of times that is wanted, and the one that was found.

    Args:
        text: what is wanted.
        case: where.
        wanted: the ratio, at least.
        found: with the output in tile order, where the goal is about a kernel's speed.
        restored: with the output in its own order, where ``found`` is not.
        path: the kernel that the planner chose, where the goal is about its choice.
    """

    text: str
    case: str
    wanted: float
    found: float
    restored: float | None = None
    path: str | None = None

    @property
    def where(self) -> str:
        """The case, and what the planner chose there."""
        return f"{self.case}, {self.path}" if self.path else self.case

    @property
    def reached(self) -> bool:
        """Whether it is."""
        return self.found >= self.wanted

    @property
    def row(self) -> Record:
        """For the JSON."""
        return {**asdict(self), "reached": self.reached}


def goals_of(cases: Iterable[Record]) -> list[Goal]:
    """Every goal that the cases of a record speak of."""
    goals = []
    for case in cases:
        if case.get("kind") != "linear" or "times" not in case:
            continue
        for storage in ("row", "feature"):
            goals += _ratios(case, storage)
            speed_up = speed_up_of(case, storage)
            if speed_up is None or not is_chosen(case, storage):
                continue
            name, path = case["case"], case["chosen"][storage]
            goals.append(Goal(f"chosen, so not slower than dense, {storage}-major", name, 1.0, speed_up, path=path))
            rival, own = cusparselt_seconds(case), chosen_seconds(case, storage)
            if rival is not None and own is not None:
                text = f"chosen, so ahead of cuSPARSELt, {storage}-major"
                goals.append(Goal(text, name, 1.0, rival / own, path=path))
        goals += _permutations(case)
    return goals


def _ratios(case: Record, storage: str) -> list[Goal]:
    """What is wanted of a kernel alone, so by tile order: a model has it where the next layer takes up the order."""
    tile, restored = (speed_up_of(case, storage, output=output) for output in ("tile", "restored"))
    if tile is None:
        return []
    name, sparsity, tokens, path = case["case"], case["sparsity"], case["tokens"], case["chosen"][storage]
    goals = []
    if storage == "row" and "Llama" in name and tokens <= DECODE_TOKENS and sparsity in DECODE:
        goals.append(Goal("decode, Llama", name, DECODE[sparsity], tile, restored, path))
    large = tokens >= LEAST_TOKENS and min(case["rows"], case["columns"]) >= LEAST_SIDE
    if large and case["vector_size"] == VECTOR_SIZE and sparsity in MANY[storage]:
        goals.append(Goal(f"many tokens, {storage}-major", name, MANY[storage][sparsity], tile, restored, path))
    return goals


def _permutations(case: Record) -> list[Goal]:
    """That the order of the kept columns costs nothing: each kernel, against itself on ascending columns."""
    goals = []
    for entry in case["times"]:
        permuted = seconds_of(case, entry["path"], entry["input"])
        if entry["index"] == "identity" and permuted and entry.get("seconds"):
            ratio = entry["seconds"] / permuted
            goals.append(Goal(f"any order of columns, {entry['path']}", case["case"], ANY_ORDER, ratio))
    return goals


def speed_up_of(case: Record, storage: str, output: str = "restored") -> float | None:
    """Of the planner's kernel, over the faster of the two dense products."""
    dense, own = dense_seconds(case), chosen_seconds(case, storage, output)
    return None if dense is None or own is None else dense / own


def chosen_seconds(case: Record, storage: str, output: str = "restored") -> float | None:
    """Of the planner's kernel. The product of an unpacked weight has one time, whatever the order of its rows."""
    path = case.get("chosen", {}).get(storage)
    found = seconds_of(case, path, storage, output=output) if path else None
    return seconds_of(case, path, storage) if found is None and path == "unpack" else found


def dense_seconds(case: Record) -> float | None:
    """Of cuBLAS, from the storage it likes better: the harder rival."""
    return _least(seconds_of(case, "dense"), seconds_of(case, "dense", "feature"))


def cusparselt_seconds(case: Record) -> float | None:
    """Of cuSPARSELt, with torch's algorithm or with the one that its search found.

    Where it could not be captured, as Python calls it, but only on so many tokens that the host keeps ahead.
    """
    found = _least(seconds_of(case, "cusparselt"), seconds_of(case, "cusparselt_searched"))
    if found is None and case["tokens"] >= LEAST_TOKENS:
        entries = (entry for entry in case["times"] if entry["path"].startswith("cusparselt"))
        return _least(*(entry.get("eager") for entry in entries))
    return found


def is_chosen(case: Record, storage: str) -> bool:
    """Whether a model would run HiNM: as the library timed it, and where it did not, as it predicts."""
    if storage == "row" and "decided" in case:
        return case["decided"]["path"] == "sparse"
    predicted = case.get("predicted", {}).get(storage)
    return predicted is not None and predicted < case["predicted_dense"]


def regret_of(case: Record, *, remeasured: bool = False) -> float | None:
    """How many times slower the planner's kernel is than the fastest one, on a row-major input; 1 at best.

    Args:
        case: a record of it.
        remeasured: with the figures that this machine measured of itself.
    """
    found = {entry["path"]: seconds_of(case, entry["path"]) for entry in case.get("times", ())
             if entry["input"] == "row" and OWN.fullmatch(entry["path"])}  # fmt: skip
    times = {path: seconds for path, seconds in found.items() if seconds is not None}
    path = case.get("chosen", {}).get("row")
    if remeasured:
        predicted = {path: seconds for path, seconds in case.get("remeasured", {}).items() if path in times}
        path = min(predicted, key=lambda name: predicted[name], default=None)
    return times[path] / min(times.values()) if path in times else None


def expect(cases: Iterable[Case], figures: cost.Gpu, shared_limit: int) -> list[Record]:
    """What a record of the cases would say if every time were the predicted one: kernels and BLAS, nothing else."""
    records = []
    for case in cases:
        if not isinstance(case.layer, Linear):
            continue
        call = cost.Call(case.pattern, case.layer.rows, case.layer.columns, case.tokens)
        record: Record = {"case": str(case), "kind": "linear", "rows": call.rows, "columns": call.in_features}
        record |= {"tokens": call.tokens, "sparsity": case.pattern.sparsity, "vector_size": case.pattern.vector_size}
        times = [asdict(Key("dense")) | {"seconds": cost.predict_dense(call, figures).seconds}]
        chosen: dict[str, str] = {}
        for storage in ("row", "feature"):
            stored = cost.Call(call.pattern, call.rows, call.in_features, call.tokens, storage == "feature")
            best = cost.choose_kernel(stored, shared_limit, figures)
            chosen[storage] = path_of(best)
            times.append(asdict(Key(path_of(best), storage, "tile")) | {"seconds": best.seconds, "roof": best.roof})
        records.append(record | {"times": times, "chosen": chosen})
    return records


def expected_table(records: Iterable[Record]) -> str:
    """The goals of kernels alone, with the kernel that is expected to run and the roof that should bind it."""
    lines = []
    for record in records:
        for storage in ("row", "feature"):
            for goal in _ratios(record, storage):
                path, word = record["chosen"][storage], "above" if goal.reached else "BELOW"
                (roof,) = (time["roof"] for time in record["times"] if (time["path"], time["input"]) == (path, storage))
                lines.append(f"{word} {goal.found:5.2f}x of {goal.wanted:.1f}x  {goal.text}: {goal.where} ({roof})")
    return "\n".join(lines)


def table_of(data: Record) -> str:
    """The goals as text: gains case by case; the others counted, with the least found and all that was missed."""
    cases = [case for case in data.get("cases", ()) if case.get("kind") == "linear"]
    goals = goals_of(cases)
    lines = []
    gains = [goal for goal in goals if goal.wanted > 1.0]
    if gains:
        lines.append("         found (restored output) of wanted, output in tile order")
    for goal in gains:
        restored = "" if goal.restored is None else f"({goal.restored:.2f}x) "
        lines.append(f"{'reached' if goal.reached else 'MISSED':8} {goal.found:5.2f}x {restored}of {goal.wanted:.1f}x  "
                     f"{goal.text}: {goal.where}")  # fmt: skip
    for text in dict.fromkeys(goal.text for goal in goals if goal.wanted <= 1.0):
        same = [goal for goal in goals if goal.text == text]
        missed, least = [goal for goal in same if not goal.reached], min(goal.found for goal in same)
        word, wanted = "MISSED" if missed else "reached", same[0].wanted
        lines.append(f"{word:8} {len(same) - len(missed)} of {len(same)}  {text}: {least:.3f}x or more of {wanted:g}x")
        lines += [f"           {goal.found:5.3f}x {goal.where}" for goal in missed]
    for text, remeasured in (("as it is", False), ("with this machine's figures", True)):
        regrets = [(regret, case["case"]) for case in cases if (regret := regret_of(case, remeasured=remeasured))]
        if regrets:
            best, (worst, name) = sum(regret == 1.0 for regret, _ in regrets), max(regrets)
            lines.append(f"planner, {text}: the fastest kernel in {best} of {len(regrets)}; at worst {worst:.2f} times "
                         f"slower, {name}")  # fmt: skip
    return "\n".join(lines or ["no case speaks of a goal"])


def _least(*values: float | None) -> float | None:
    return min((value for value in values if value is not None), default=None)
