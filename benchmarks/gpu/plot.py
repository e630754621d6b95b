"""A record as a picture: speed-ups over tokens, layer by layer; speed-ups of convolutions; the roofline."""

import math
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import chosen_seconds, cusparselt_seconds, dense_seconds, speed_up_of
from benchmarks.gpu.speed import seconds_of
from lightning_hinm import HiNMPattern
from lightning_hinm.ops.figures import estimate

Record = dict[str, Any]
COLOURS = {32: "#d08a2e", 64: "#2f5d9b", 128: "#3f8f5a"}
MARKERS = {0.75: "o", 0.875: "s", 0.9375: "^"}
ACROSS = 3


def draw_plot(data: Record, path: Path) -> None:
    """Writes the PNG.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no case of the record has times.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in data.get("cases", ()) if case.get("times")]
    linear = [case for case in cases if case["kind"] == "linear"]
    others = [case for case in cases if case["kind"] == "conv2d"]
    if not cases:
        raise ValueError(f"{path}: the record has no case with times, but a plot needs one.")
    layers = list(dict.fromkeys(case["layer"] for case in linear))
    panels = len(layers) + bool(others) + bool(linear)
    down = math.ceil(panels / ACROSS)
    figure, grid = plt.subplots(down, ACROSS, figsize=(5.2 * ACROSS, 3.8 * down), layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for layer, one in zip(layers, axes, strict=False):
        _draw_layer(one, layer, [case for case in linear if case["layer"] == layer])
    rest = axes[len(layers) :]
    if others:
        _draw_convolutions(rest.pop(0), others)
    if linear:
        _draw_roofline(rest.pop(0), linear, data)
    for one in rest:
        one.set_visible(False)
    about = data.get("facts", {})
    figure.suptitle(
        f"{about.get('gpu', 'unknown GPU')}, torch {about.get('torch', '?')}, commit {str(about.get('commit'))[:12]}: "
        "HiNM over cuBLAS in bfloat16, row-major input, restored output, inside a CUDA graph"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_layer(axes: Any, layer: str, cases: list[Record]) -> None:
    kinds = {(case["vector_size"], case["sparsity"], case["window"]) for case in cases}
    for v, sparsity, window in sorted(kinds, key=lambda kind: (kind[0], kind[1], kind[2] or 0)):
        same = [
            case for case in cases if (case["vector_size"], case["sparsity"], case["window"]) == (v, sparsity, window)
        ]
        style = {"color": COLOURS.get(v, "#777777"), "marker": MARKERS.get(sparsity, "x"), "markersize": 4}
        found = [(case["tokens"], speed_up_of(case, "row")) for case in same]
        label = f"V={v} {sparsity:.2%}" + (", no window" if window is None else "")
        _line(axes, found, label=label, fillstyle="none" if window is None else "full", **style)
        predicted = [(case["tokens"], _predicted(case)) for case in same]
        _line(axes, predicted, color=style["color"], linestyle="--", linewidth=0.8)
    rivals = {case["tokens"]: _over_dense(case) for case in cases}
    _line(axes, list(rivals.items()), label="cuSPARSELt 2:4", color="black", linestyle=":", marker=".")
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sorted({case["tokens"] for case in cases}))
    for one in (axes.xaxis, axes.yaxis):
        one.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(labelsize=7)
    axes.set_title(layer, fontsize=10)
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed-up over cuBLAS (predicted: dashed)")
    axes.legend(fontsize=6)


def _draw_convolutions(axes: Any, cases: list[Record]) -> None:
    names, height = [], 0
    for case in cases:
        dense, own = seconds_of(case, "dense"), seconds_of(case, "op")
        if dense is None or own is None:
            continue
        axes.barh(height, dense / own, color=COLOURS.get(case["vector_size"], "#777777"))
        names.append(f"{case['layer'].removeprefix('ResNet-50 ')}, V={case['vector_size']} {case['sparsity']:.1%}")
        height += 1
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.axvline(1.0, color="#999999", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over cuDNN, channels first")
    axes.set_title("ResNet-50 convolutions", fontsize=10)


def _draw_roofline(axes: Any, cases: list[Record], data: Record) -> None:
    for case in cases:
        own = chosen_seconds(case, "row")
        if own is None:
            continue
        flop, nbytes = work_of(case)
        colour, marker = COLOURS.get(case["vector_size"], "#777777"), MARKERS.get(case["sparsity"], "x")
        axes.scatter(flop / nbytes, flop / own * 1e-12, color=colour, marker=marker, s=12)
    major, minor = data.get("facts", {}).get("capability", (9, 0))
    assumed, row = estimate((major, minor)), data.get("peaks") or {}
    memory, sparse, dense = (row.get(name) or getattr(assumed, name) for name in ("memory", "sparse", "dense"))
    intensities = [2.0**i for i in range(-1, 13)]
    axes.plot(intensities, [min(i * memory, sparse) * 1e-12 for i in intensities], color="black", linewidth=0.8,
              label=f"memory {memory * 1e-12:.2f} TB/s, mma.sp {sparse * 1e-12:.0f} TFLOP/s")  # fmt: skip
    axes.axhline(dense * 1e-12, color="black", linestyle=":", label=f"cuBLAS {dense * 1e-12:.0f} TFLOP/s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_title("roofline of the chosen kernels: colour V, shape sparsity", fontsize=10)
    axes.set_xlabel("FLOP on non-zeros for each byte of weight, input and output")
    axes.set_ylabel("TFLOP/s on non-zeros")
    axes.legend(fontsize=7)


def work_of(case: Record) -> tuple[float, float]:
    """FLOP on non-zeros, and the fewest bytes that memory must move, of a linear layer."""
    pattern = HiNMPattern.from_sparsity(case["sparsity"], case["vector_size"], window=case["window"])
    rows, kept = case["rows"], pattern.kept(case["columns"])
    weight = rows * kept // 2 * 2 * 9 / 8 + rows / pattern.vector_size * kept * 2  # values, metadata, index
    return rows * kept * case["tokens"], weight + 2 * case["tokens"] * (rows + case["columns"])


def _predicted(case: Record) -> float | None:
    seconds = case.get("predicted", {}).get("row")
    return case["predicted_dense"] / seconds if seconds else None


def _over_dense(case: Record) -> float | None:
    dense, rival = dense_seconds(case), cusparselt_seconds(case)
    return None if dense is None or rival is None else dense / rival


def _line(axes: Any, points: list[tuple[int, float | None]], **style: Any) -> None:
    known = sorted((x, y) for x, y in points if y is not None)
    if known:
        axes.plot(*zip(*known, strict=True), **style)
