"""The main job on real weights and data: train dense, prune one-shot to 75 %, fine-tune, compile, compare.

    python -m benchmarks.demo minilm            one seed (`make demo`)
    python -m benchmarks.demo resnet --seeds 3  mean and spread (`make demo-cnn ARGS="--seeds 3"`)

Every variant starts from the same dense weights, is pruned at the same step and trains for as long. Exit code 1 if
a compiled model's output differs from that of the masked dense model.
"""

import argparse
import copy
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.timing import alternate
from lightning_hinm import GradualSchedule, HiNMPattern, HiNMPruning, save_hinm, to_hinm
from lightning_hinm.callback.update import Choice
from lightning_hinm.mask import keep_top
from recipes.minilm import MiniLMClassifier, RottenTomatoes
from recipes.resnet import MNIST5k, ResNetClassifier

log = logging.getLogger("demo")

SALIENCY_STEPS = 10  # few, because they are taken from a short training
TOLERANCE = 1e-5  # relative difference allowed between the compiled and the masked dense output, fp32


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and what its inputs for the timing are."""

    data: Callable[[int, int], Any]  # (seed, 0 for the dense training or 1 for the pruned ones) -> data module
    model: Callable[[], Any]
    pattern: HiNMPattern
    dense_epochs: int
    dense_rate: float
    sparse_epochs: int
    sparse_rate: float
    precision: Any
    budget: float  # seconds for one search


TASKS = {
    "minilm": Task(
        data=lambda seed, part: RottenTomatoes(
            (3200, 2560)[part], val_samples=1500, batch_size=(32, 16)[part], seed=seed
        ),
        model=MiniLMClassifier,
        pattern=HiNMPattern.from_sparsity(0.75, vector_size=64),
        dense_epochs=1,
        dense_rate=2e-4,
        sparse_epochs=1,
        sparse_rate=2e-4,
        precision="bf16-mixed",
        budget=120.0,
    ),
    "resnet": Task(
        data=lambda seed, part: MNIST5k(seed=seed),
        model=ResNetClassifier,
        pattern=HiNMPattern.from_sparsity(0.75, vector_size=32),
        dense_epochs=4,
        dense_rate=2e-3,
        sparse_epochs=2,
        sparse_rate=1e-3,
        precision="32-true",
        budget=120.0,
    ),
}


class Unstructured(HiNMPruning):
    """The upper bound: the largest weights of each matrix, wherever they stand."""

    def choose_mask(self, layer: Any, saliency: Tensor, pattern: HiNMPattern, **_: Any) -> Choice:
        kept = round(saliency.numel() * (1 - pattern.sparsity))
        return Choice(keep_top(saliency.flatten(), kept).unflatten(0, tuple(saliency.shape)))


# name -> callback class and what differs from its defaults
VARIANTS: dict[str, tuple[type[HiNMPruning], dict[str, Any]]] = {
    "unstructured, Taylor": (Unstructured, {}),
    "HiNM, no permutation, Taylor": (HiNMPruning, {"method": "identity"}),
    "HiNM, gyro, Taylor": (HiNMPruning, {"method": "gyro"}),
    "HiNM, exchange, Taylor": (HiNMPruning, {}),
    "HiNM, exchange, magnitude": (HiNMPruning, {"saliency": "magnitude"}),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; None where it does not apply."""

    variant: str
    accuracy_pruned: float | None
    accuracy: float
    retained: float | None
    search_seconds: float | None
    ended_by_budget: bool | None
    file_bytes: int
    dense_ms: float | None
    compiled_ms: float | None
    equal: bool | None


class Progress(L.Callback):
    """One line every few seconds, on a terminal and in a log alike."""

    def __init__(self, title: str) -> None:
        self.title, self.told = title, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if time.monotonic() - self.told > 5:
            self.told = time.monotonic()
            total = int(trainer.max_epochs or 1) * int(trainer.num_training_batches)
            loss = trainer.callback_metrics["train_loss"].item()
            log.info("%s: step %d of %d, loss %.3f", self.title, trainer.global_step, total, loss)


class StraightAfterPruning(L.Callback):
    """Measures the accuracy between the pruning and the first step that follows it; stands behind the pruning."""

    def __init__(self, pruning: HiNMPruning, batches: Any) -> None:
        self.pruning, self.batches = pruning, batches
        self.accuracy: float | None = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.accuracy is None and self.pruning.masks:
            self.accuracy = accuracy(pl_module.net, self.batches, str(trainer.precision))


def accuracy(net: nn.Module, batches: Any, precision: str) -> float:
    """Fraction of the samples whose largest logit is the label's; the network comes back in the mode it was in."""
    training = net.training
    net.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision):
        right = [(net(inputs).argmax(dim=1) == labels).float() for inputs, labels in batches]
    net.train(training)
    return torch.cat(right).mean().item()


def fit(task: Task, model: Any, data: Any, epochs: int, title: str, callbacks: list[L.Callback]) -> None:
    """One training without files, bars or warnings about this machine."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision=task.precision,
        callbacks=[*callbacks, Progress(title)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)


def run(name: str, seed: int) -> list[Row]:
    """All rows of one seed."""
    task = TASKS[name]
    L.seed_everything(seed, verbose=False)
    data = task.data(seed, 0)
    data.prepare_data()
    dense = task.model()
    dense.learning_rate = task.dense_rate
    fit(task, dense, data, task.dense_epochs, "dense", [])
    weights = copy.deepcopy(dense.state_dict())
    batches = data.val_dataloader()
    dense_accuracy = accuracy(dense.net, batches, task.precision)
    inputs = next(iter(batches))[0][:16]
    log.info("dense: accuracy %.4f", dense_accuracy)
    rows = [Row("dense", None, dense_accuracy, None, None, None, dense_bytes(dense.net), None, None, None)]
    for title, (kind, arguments) in VARIANTS.items():
        rows.append(run_variant(task, seed, title, kind, arguments, weights, inputs))
        log.info("%s: %.4f after fine-tuning", title, rows[-1].accuracy)
    torch.compiler.reset()
    return rows


def run_variant(
    task: Task, seed: int, title: str, kind: type[HiNMPruning], arguments: dict[str, Any], weights: Any, inputs: Tensor
) -> Row:
    """Prunes and fine-tunes from the dense weights, then packs, compiles and measures."""
    L.seed_everything(seed, verbose=False)
    data = task.data(seed, 1)
    data.setup("fit")
    model = task.model()
    model.load_state_dict(weights)
    model.learning_rate = task.sparse_rate
    # Magnitude could prune at once; it waits for the step at which Taylor has gathered enough, so that all train alike.
    begin = (SALIENCY_STEPS - 1) / (len(data.train_dataloader()) * task.sparse_epochs)
    pruning = kind(
        task.pattern,
        GradualSchedule(begin=begin, end=begin, updates=1),
        saliency_steps=SALIENCY_STEPS,
        seed=seed,
        time_budget=task.budget,
        **arguments,
    )
    after = StraightAfterPruning(pruning, data.val_dataloader())
    fit(task, model, data, task.sparse_epochs, title, [pruning, after])
    net = model.net.eval()
    report = pruning.report.pruned
    final = accuracy(net, data.val_dataloader(), task.precision)
    row = Row(
        variant=title,
        accuracy_pruned=after.accuracy,
        accuracy=final,
        retained=statistics.fmean(layer.retained for layer in report if layer.retained is not None),
        search_seconds=sum(layer.seconds for layer in report),
        ended_by_budget=any(layer.ended_by_budget for layer in report),
        file_bytes=dense_bytes(net),
        dense_ms=None,
        compiled_ms=None,
        equal=None,
    )
    if kind is Unstructured:
        return row
    with tempfile.TemporaryDirectory() as folder:
        save_hinm(net, Path(folder) / "net.safetensors")
        size = (Path(folder) / "net.safetensors").stat().st_size
    log.info("%s: compiling", title)
    compiled = torch.compile(net, backend="hinm", options={"plan": "auto"})
    reference = torch.compile(net)
    with torch.inference_mode():
        wanted = net(inputs)
        # The packed layers too: `plan="auto"` may have left layers dense, where equality would prove nothing.
        outputs = [compiled(inputs), to_hinm(net)(inputs)]
        equal = all((output - wanted).norm() <= TOLERANCE * wanted.norm() for output in outputs)
        dense_ms, compiled_ms = alternate(lambda: reference(inputs), lambda: compiled(inputs), seconds=4.0)
    return replace(row, file_bytes=size, dense_ms=dense_ms * 1e3, compiled_ms=compiled_ms * 1e3, equal=equal)


def dense_bytes(net: nn.Module) -> int:
    """Bytes of the plain safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, f"{folder}/net.safetensors")
        return Path(folder, "net.safetensors").stat().st_size


# --- what is shown ----------------------------------------------------------------------------------------------------


def mean_spread(values: list[Any], form: str) -> str:
    """``mean ± standard deviation``; the value alone for one seed, - where there is none."""
    if values[0] is None:
        return "-"
    if len(values) == 1:
        return form % values[0]
    return f"{form % statistics.fmean(values)} ± {form % statistics.stdev(values)}"


def table(runs: list[list[Row]]) -> str:
    """A Markdown table, one line for each variant, over all seeds."""
    head = ("variant", "acc. pruned", "acc. tuned", "retained", "search s", "file MB", "dense ms", "hinm ms", "equal")
    lines = [head, tuple("---" for _ in head)]
    for same in zip(*runs, strict=True):
        ended = any(row.ended_by_budget for row in same)
        equal = "-" if same[0].equal is None else "yes" if all(row.equal for row in same) else "NO"
        lines.append(
            (
                same[0].variant,
                mean_spread([row.accuracy_pruned for row in same], "%.3f"),
                mean_spread([row.accuracy for row in same], "%.3f"),
                mean_spread([row.retained for row in same], "%.4f"),
                mean_spread([row.search_seconds for row in same], "%.1f") + " (budget)" * ended,
                f"{same[0].file_bytes / 1e6:.2f}",
                mean_spread([row.dense_ms for row in same], "%.2f"),
                mean_spread([row.compiled_ms for row in same], "%.2f"),
                equal,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def plot(name: str, runs: list[list[Row]], path: Path) -> None:
    """Accuracy straight after pruning and after fine-tuning, one pair of bars for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dense, *variants = zip(*runs, strict=True)
    titles = [same[0].variant.replace(", ", ",\n") for same in variants]
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for shift, colour, label, key in (
        (-0.2, "#b8c4d6", "straight after pruning", "accuracy_pruned"),
        (0.2, "#2f5d9b", "after fine-tuning", "accuracy"),
    ):
        values = [[getattr(row, key) for row in same] for same in variants]
        means = [statistics.fmean(one) for one in values]
        spread = [statistics.stdev(one) if len(one) > 1 else 0.0 for one in values]
        places = [i + shift for i in range(len(variants))]
        bars = axes.bar(places, means, 0.38, color=colour, label=label, yerr=spread if any(spread) else None, capsize=3)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
    level = statistics.fmean(row.accuracy for row in dense)
    axes.axhline(level, color="#444444", linestyle="--", linewidth=1, label=f"dense, {level:.3f}")
    axes.set_xticks(range(len(variants)), titles, fontsize=8)
    axes.set_ylabel("accuracy on held-out data")
    axes.set_ylim(0, 1.08)
    axes.set_title(f"{name}: 75 % sparsity, one-shot, {len(runs)} seed{'s' * (len(runs) > 1)}")
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def provenance() -> dict[str, str]:
    """Commit, versions and device, to stand beside every number."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    threads = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {"commit": commit, "torch": torch.__version__, "lightning": L.__version__, "device": threads}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 up")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for the JSON and the PNG")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # Lightning greets at every fit; of what it and the callback tell, only the pruning belongs here.
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning.addFilter(lambda record: record.getMessage().startswith("HiNMPruning"))
    logging.getLogger("lightning_hinm").setLevel(logging.WARNING)  # it tells of every layer; `explain` does, too
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    os.environ["LIGHTNING_HINM_LAYOUTS"] = "off"  # every search is timed
    facts = provenance()  # now: a commit made while this runs is not what runs
    start, runs = time.monotonic(), []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        runs.append(run(arguments.task, seed))
        # after every seed: a run that is cut short has shown what it found
        data = {
            "task": arguments.task,
            "pattern": TASKS[arguments.task].pattern.to_dict(),
            "seconds": round(time.monotonic() - start, 1),
            **facts,
            "seeds": [[asdict(row) for row in rows] for rows in runs],
        }
        (arguments.out / f"{arguments.task}.json").write_text(json.dumps(data, indent=1) + "\n")
        plot(arguments.task, runs, arguments.out / f"{arguments.task}.png")
    print(table(runs))
    print(f"\nwritten: {arguments.out}/{arguments.task}.json and .png, in {data['seconds']:.0f} s")
    return 0 if all(row.equal is not False for rows in runs for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
