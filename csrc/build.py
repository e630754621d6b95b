"""Compiles the kernels to PTX, and describes them: ``python csrc/build.py`` writes ``lightning_hinm/ptx``.

The same compiler gives the same bytes, in any folder. The ``.version`` line is lowered to what the instructions need,
so that older drivers take the text; ptxas refuses it where that is too low. Where a text multiplies sparse matrices, a
second one says ``mma.sp::ordered_metadata``, the form of PTX ISA 8.5, for GPUs of compute capability 10 and up.
Compiled for compute capability 9, decode.cu gives another kernel, whose blocks share their work (cluster.cuh).
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SOURCES = Path(__file__).resolve().parent
PTX = SOURCES.parent / "lightning_hinm" / "ptx"
FLAGS = ("-ptx", "-std=c++17", "-O3")
# The target, the lowest PTX version that knows the instructions, the driver that first took it (as cuDriverGetVersion
# says it), and the compute capabilities that the text serves.
PLAIN = {"target": "sm_80", "ptx_version": "7.4", "driver": 11040, "capability": [[8, 0], [9, 99]]}
ORDERED = {"target": "sm_80", "ptx_version": "8.5", "driver": 12050, "capability": [[10, 0], [99, 99]]}
ANY = {**PLAIN, "capability": [[8, 0], [99, 99]]}
CLUSTERED = {"target": "sm_90", "ptx_version": "8.0", "driver": 12000, "capability": [[9, 0], [9, 99]]}
CLUSTER = 4  # blocks along x: as in cluster.cuh
NEWEST_TO_11 = "7.8"  # the newest PTX version that CUDA 11's assembler knows
KNOWN_TO_11 = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")  # to CUDA 11's assembler
KNOWN_TO_12 = (*KNOWN_TO_11, "sm_100", "sm_120")  # to that of CUDA 12.8, the first to know any for an ordered text
ARCHITECTURES = (*KNOWN_TO_11, "sm_88", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")

DTYPES = {"f16": "float16", "bf16": "bfloat16"}
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu"]
PACKING = {
    "values": "[tiles, kept / 32, vector_size / 16, 32 lanes, 8]: a0..a7 of the A fragment of mma.sp.m16n8k32; with "
    "g = lane / 4, t = lane % 4, a_i is row g + 8 * (i / 2 % 2) and the kept value 2 * t + i % 2 + 8 * (i / 4) of the "
    "16 that the row has among 32 kept vectors",
    "metadata": "[tiles, kept / 32, vector_size / 32, 32 lanes]: the lanes with t = 0, 1 hold the even block of 16 "
    "rows (sparsity selector 0), those with t = 2, 3 the odd one (selector 1); bits 0-15 are row g, bits 16-31 row "
    "g + 8, of the 16 kept vectors from 16 * (t % 2) on: a nibble (first position | second position << 2) for each "
    "group of four, the lowest first",
    "vector_index": "[tiles, kept]: the column of the input that each kept vector multiplies",
    "rows": "[tiles * vector_size]: the output row of each packed row, each at most once; negative: it has none",
    "kept": "the kept vectors of a tile: those of each run of columns padded to a multiple of 32, all to a multiple of "
    "64 (gather alone needs that), with zero values, metadata nibble 4 and a column of the same run",
    "activation": dict(enumerate(ACTIVATIONS)),
    "grid": "a number, a parameter's value, or [parameter, divisor]: ceil(parameter / divisor); none may be 0",
    "cluster": "blocks along x that share their work, 1 where it is not given; compiled in, so that a plain launch "
    "makes clusters; the x of the grid is rounded up to a multiple of it, and the blocks beyond take part",
    "shared": "dynamic: bytes, and for each parameter in per its value times that many; the static shared memory in "
    "resources comes on top",
    "driver": "as cuDriverGetVersion counts: 1000 * major + 10 * minor; compute capabilities are inclusive",
}


def _pointer(name: str, dtype: str, layout: str, alignment: int = 16) -> dict[str, Any]:
    return {"name": name, "type": "pointer", "dtype": dtype, "layout": layout, "alignment": alignment}


def _numbers(*names: str) -> list[dict[str, Any]]:
    return [{"name": name.removesuffix(":64"), "type": "int64" if name.endswith(":64") else "int32"} for name in names]


def _packed(dtype: str) -> list[dict[str, Any]]:
    return [
        _pointer("values", dtype, "see packing"),
        _pointer("metadata", "uint32", "see packing"),
        _pointer("vector_index", "uint16", "see packing"),
        _pointer("rows", "int32", "see packing"),
    ]


def _weight(dtype: str, x: str, out: str) -> list[dict[str, Any]]:
    return [
        _pointer("x", dtype, x),
        *_packed(dtype),
        _pointer("bias", dtype, "[output rows], or null", 2),
        _pointer("out", dtype, f"{out}; overlaps no input", 2),
    ]


def describe_entries() -> dict[str, dict[str, Any]]:
    """Parameters, block, grid, cluster and dynamic shared memory of every entry, by its name.

    A number of the grid is a parameter's value, or ``ceil(parameter / divisor)`` where it is a pair; shared memory is
    ``bytes`` and, for each parameter in ``per``, its value times that many bytes.
    """
    entries: dict[str, dict[str, Any]] = {}
    for short, dtype in DTYPES.items():
        for (kernel, rows), tokens in product(
            (("decode", 32), ("decode_cluster", 32), ("decode_cluster", 64)), (8, 16)
        ):
            shares = kernel == "decode_cluster"
            entries[f"{kernel}_{short}_{rows}_{tokens}"] = {
                "kernel": kernel,
                "parameters": [
                    *_weight(dtype, "[tokens, columns], rows x_stride apart", "[tokens, rows], out_stride apart"),
                    *_numbers("tokens", "packed_rows", "columns", "x_stride", "pitch", "held", "out_stride"),
                    *_numbers("vector_size", "kept", "window", "kept_of_window", "activation"),
                ],
                "rules": f"vector_size is a multiple of {rows}; columns and x_stride are multiples of 8, pitch of 8 "
                "and at least as many as the columns that a block reads; 8 more than a multiple of 64 avoids bank "
                f"conflicts; held = pitch * min(tokens, {tokens}); packed_rows = tiles * vector_size; "
                + (
                    "run r is columns r * window .. min((r + 1) * window, columns) - 1, and vector_index lists the "
                    "runs in order; the block of rank k reads runs k * runs / 4 .. (k + 1) * runs / 4 - 1, rounded "
                    "down; window is a multiple of 8; kept_of_window is that of each run but the last, a multiple of "
                    "32; "
                    if shares
                    else "a block reads all columns; window and kept_of_window are not used; "
                )
                + f"tokens <= {tokens} * 65535",
                "block": 256,
                "grid": [["packed_rows", 32], ["tokens", tokens], 1],
                **({"cluster": CLUSTER} if shares else {}),
                "shared": {"bytes": 8 * (128 // rows) * (36 * rows + 64), "per": {"held": 2}},
            }
        for rows in (32, 64, 128):
            entries[f"gather_{short}_{rows}"] = {
                "kernel": "gather",
                "parameters": [
                    *_weight(dtype, "[batch, kernel_width, phases, channels, plane]", "[batch, rows, out_stride]"),
                    *_numbers("tokens", "tiles", "batch", "kept", "x_batch:64", "out_batch:64", "out_stride", "plane"),
                    *_numbers("pitch", "width", "channels", "tiles_of_group", "kernel_height", "kernel_width"),
                    *_numbers("stride_height", "dilation_height", "activation"),
                ],
                "rules": f"vector_size is {rows}; plane and x_batch are multiples of 8, pitch too unless "
                "kernel_height is 1; phases = min(stride_height, (kernel_height - 1) * dilation_height + 1); channels "
                "are those of the whole image, all groups together; tiles_of_group = tiles / groups, tile t belongs to "
                "group t / tiles_of_group; vector_index is (channel within the group * kernel_height + r) * "
                "kernel_width + s, and token n of the vector is x[image * x_batch + ((s * phases + r * dilation_height "
                "% stride_height) * channels + channel) * plane + r * dilation_height / stride_height * pitch + n], of "
                "fewer than 2 ** 31 numbers an image; tokens = out_height * pitch <= 128 * 65535, batch <= 65535; "
                "token y * pitch + w goes to out[image * out_batch + row * out_stride + y * width + w], for w < width "
                "only; a matrix [columns, tokens] is one image: batch = kernel_* = stride_* = dilation_* = 1, "
                "tiles_of_group = tiles, channels = columns, plane = its row stride, width = pitch = 8, x_batch and "
                "out_batch are not used",
                "block": 128,
                "grid": ["tiles", ["tokens", 128], "batch"],
                "shared": {"bytes": 3 * (16384 + 72 * rows) + 8 * rows, "per": {"kept": 4}},
            }
    entries["unpack"] = {
        "kernel": "unpack",
        "parameters": [
            *_packed("16 bit"),
            _pointer("out", "16 bit", "[output rows, pitch]; overlaps no input"),
            *_numbers("packed_rows", "vector_size", "kept", "pitch"),
        ],
        "rules": "vector_size is a multiple of 32; pitch is a multiple of 8 and more than any column of vector_index; "
        "packed_rows = tiles * vector_size; every row of out that rows names is written whole: each kept value in its "
        "column, but a value of +0 nowhere, and +0 in the other columns; so what pads is +0, not -0; "
        "pitch <= 1520 * 65535",
        "block": 256,
        "grid": [["packed_rows", 16], ["pitch", 1520], 1],
        "shared": {"bytes": 0, "per": {}},
    }
    entries["transpose"] = {
        "kernel": "transpose",
        "parameters": [
            _pointer("x", "16 bit", "[height, width], rows x_stride apart", 2),
            _pointer("out", "16 bit", "[width, height], rows out_stride apart", 2),
            *_numbers("height", "width", "x_stride", "out_stride"),
        ],
        "rules": "any alignment, but fastest where x, out and both strides are multiples of 16 bytes; height <= 64 * "
        "65535",
        "block": 256,
        "grid": [["width", 64], ["height", 64], 1],
        "shared": {"bytes": 0, "per": {}},
    }
    entries["planes"] = {
        "kernel": "planes",
        "parameters": [
            _pointer("x", "16 bit", "[batch, channels, height, width]", 2),
            _pointer("out", "16 bit", "[batch, kernel_width, phases, channels, plane_height, pitch]"),
            *_numbers("chunks", "batch", "channels", "height", "width", "phases", "plane_height", "pitch"),
            *_numbers("stride_height", "stride_width", "padding_height", "padding_width", "dilation_width"),
        ],
        "rules": "row y of plane (s, phase) holds, for w = 0 .. pitch - 1, x[y * stride_height + phase - "
        "padding_height][w * stride_width + s * dilation_width - padding_width], zero outside; phases as for gather, "
        "whose plane is plane_height * pitch; pitch >= out_width, a multiple of 8; plane_height >= out_height + "
        "(kernel_height - 1) * dilation_height / stride_height; chunks = kernel_width * phases * channels * "
        "plane_height * pitch / 8; batch <= 65535",
        "block": 256,
        "grid": [["chunks", 256], "batch", 1],
        "shared": {"bytes": 0, "per": {}},
    }
    return entries


def build(folder: Path, assemblers: Sequence[str] = ("ptxas",)) -> None:
    """Writes every text and ``manifest.json`` into ``folder``; resources are the most that any assembler uses.

    Raises:
        RuntimeError: if a compiler fails, or an assembler refuses a text or spills registers.
    """
    texts = compile_texts(folder)
    entries = describe_entries()
    resources: dict[str, dict[str, dict[str, int]]] = {name: {} for name in entries}
    for text in (text for kernel in texts.values() for text in kernel):
        lowest, highest = text["capability"]
        for architecture in ARCHITECTURES:
            if not lowest <= list(divmod(int(architecture[3:]), 10)) <= highest:
                continue
            for assembler in assemblers:
                if architecture not in known_to(assembler, text["ptx_version"]):
                    continue
                for name, used in assemble(folder / text["file"], architecture, assembler).items():
                    most = resources[name].setdefault(architecture, used)
                    most["registers"] = max(most["registers"], used["registers"])
    manifest = {
        "format": 1,
        "compiler": _run("nvcc", "--version").strip().splitlines()[-1],
        "packing": PACKING,
        "texts": texts,
        "entries": {name: {**entry, "resources": resources[name]} for name, entry in entries.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def compile_texts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Writes every text into ``folder``; what the manifest says of each, by kernel.

    Raises:
        RuntimeError: if the compiler fails.
    """
    texts: dict[str, list[dict[str, Any]]] = {}
    with TemporaryDirectory() as scratch:
        for kernel in sorted({entry["kernel"] for entry in describe_entries().values()}):
            source = f"csrc/{kernel.removesuffix('_cluster')}.cu"
            first = CLUSTERED if kernel.endswith("_cluster") else PLAIN
            flags = [*FLAGS, f"-arch=compute_{str(first['target'])[3:]}"]
            compiled = Path(scratch) / f"{kernel}.ptx"
            _run("nvcc", *flags, "-o", str(compiled), str(SOURCES.parent / source))
            plain = compiled.read_text()
            sparse = "mma.sp" in plain
            variants = {f"{kernel}.ptx": first if sparse else ANY}
            if sparse and first is PLAIN:
                variants[f"{kernel}.ordered.ptx"] = ORDERED
            for name, variant in variants.items():
                text = re.sub(r"^\.version .*$", f".version {variant['ptx_version']}", plain, count=1, flags=re.M)
                if variant is ORDERED:
                    text = text.replace("mma.sp.sync", "mma.sp::ordered_metadata.sync")
                (folder / name).write_text(text)
                described = {"file": name, **variant, "flags": flags, "sha256": _sha256(text.encode())}
                texts.setdefault(kernel, []).append(
                    {**described, "source": source, "source_sha256": source_sha256(source)}
                )
    return texts


def source_sha256(source: str) -> str:
    """Of a kernel's source and what it includes, in that order."""
    text = (SOURCES.parent / source).read_bytes()
    included = re.findall(rb'^#include "(.*)"$', text, re.M)
    return _sha256(text + b"".join((SOURCES / name.decode()).read_bytes() for name in included))


def assemble(text: Path, architecture: str, ptxas: str = "ptxas") -> dict[str, dict[str, int]]:
    """Registers and static shared memory of each entry of a text, as ptxas reports them for an architecture.

    Raises:
        RuntimeError: if ptxas refuses the text, or spills registers.
    """
    report = _run(ptxas, "-v", f"-arch={architecture}", "-o", "/dev/null", str(text))
    used = {}
    for part in report.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        if not re.search(r"\b0 bytes spill stores, 0 bytes spill loads", part):
            raise RuntimeError(f"{text.name}: {name} spills registers on {architecture}. Make it smaller.")
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        if registers is None:
            raise RuntimeError(f"{text.name}: ptxas did not say how many registers {name} uses: {part!r}")
        used[name] = {"registers": int(registers[1]), "shared": int(shared[1]) if shared else 0}
    return used


def known_to(ptxas: str, ptx_version: str = "7.4") -> tuple[str, ...]:
    """The architectures that an assembler knows, if it knows that version of PTX."""
    version = _run(ptxas, "--version")
    if "V11." in version and _numbered(ptx_version) > _numbered(NEWEST_TO_11):
        return ()
    return KNOWN_TO_11 if "V11." in version else KNOWN_TO_12 if "V12." in version else ARCHITECTURES


def _numbered(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout + result.stderr


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PTX, help="folder of the texts and the manifest")
    parser.add_argument("--ptxas", nargs="+", default=["ptxas"], help="assemblers: the manifest lists the most of all")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    build(folder, arguments.ptxas)
    sys.stdout.write(f"{len(list(folder.glob('*.ptx')))} texts in {folder}\n")
