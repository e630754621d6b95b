"""Which kernel takes a call, and how long it should take: the tightest of a few roofs, and what nothing overlaps.

Shapes: O rows, I columns, N tokens, T tiles of V rows, K kept vectors of a tile, padded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from lightning_hinm.ops.figures import Gpu, gpu_of
from lightning_hinm.ops.fragments import padded_kept, tile_rows
from lightning_hinm.pattern import HiNMPattern

__all__ = ["Call", "Choice", "Gpu", "choose_kernel", "convolution_call", "gpu_of", "list_kernels", "predict_dense"]

DECODE_TOKENS = 32  # beyond, the weight would be read more than twice
DECODE_ROWS, GATHER_TOKENS = 32, 128
UNPACKED_COLUMNS, UNPACKED_SHARED = 1520, 48896
MOST_NUMBERS = 1 << 31  # of one image: the gather kernel counts them in 32 bits
MOST_BLOCKS = 65535  # along y and z of a grid
# Blocks that share their work, in the kernels that do; more would leave more of a processing cluster's 16 or 18
# multiprocessors idle.
CLUSTER = 4
ALIGNED = 8  # 16-bit numbers of one 16-byte copy
# Fitted to the times of an H200 (benchmarks/results/gpu-nvidia-h200.json).
STEP_SECONDS = 0.64e-6  # that a block of the gather kernel takes for 64 kept vectors, if nothing else delays it
CLUSTER_SECONDS = 1e-6  # that blocks of a cluster wait for each other
GATHERS = 0.6e9  # of 32 kept vectors for one token, a second and multiprocessor: the decode kernel's 2-byte loads


@dataclass(frozen=True)
class Planes:
    """The images of a convolution.

    Args:
        numbers: of all images that come in.
        pixels: of all that come out, without what pads the kernel's tokens.
        shifted: bytes of the shifted planes that are made of them, 0 where the images are read as they lie.
        gathered: whether the gather kernel can count the pixels of an image.
    """

    numbers: int
    pixels: int
    shifted: int
    gathered: bool = True


@dataclass(frozen=True)
class Call:
    """One call of a packed layer.

    Args:
        pattern: of the weight.
        rows: of the weight.
        in_features: columns of the weight, of one group in a grouped convolution.
        tokens: of a linear layer; of a convolution, the pixels of all its output images, as the kernel pads them.
        feature_major: whether a linear layer's input lies so.
        feature_major_out: whether its result shall.
        planes: of a convolution; None: linear.
        activated: whether an activation follows, which BLAS leaves to a kernel of its own.
    """

    pattern: HiNMPattern
    rows: int
    in_features: int
    tokens: int
    feature_major: bool = False
    feature_major_out: bool = False
    planes: Planes | None = field(default=None, kw_only=True)
    activated: bool = field(default=False, kw_only=True)

    @property
    def outputs(self) -> int:
        """N without padding."""
        return self.tokens if self.planes is None else self.planes.pixels

    @property
    def moved(self) -> int:
        """Bytes that any kernel reads of the input and writes of the result, each once."""
        numbers = self.tokens * self.in_features if self.planes is None else self.planes.numbers
        return 2 * (numbers + self.outputs * self.rows)

    def __str__(self) -> str:
        return f"{self.tokens} tokens of a {self.rows}x{self.in_features} layer, {self.pattern}"


@dataclass(frozen=True)
class Choice:
    """A kernel, the tokens and shared memory of a block, and the prediction: its seconds, and the roof that binds.

    ``"unpack"`` stands for the dense product: the weight is unpacked at each call, for BLAS.
    """

    kernel: str
    tokens: int
    shared: int
    seconds: float
    roof: str


class PlanesSize(NamedTuple):
    """The shifted planes of an image (planes.cu): how many of a channel for each column of the kernel, and of what."""

    phases: int
    height: int
    pitch: int


def planes_size(
    height: int, wide: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int],
) -> PlanesSize:  # fmt: skip
    """Of an image of that height, of which the output is so wide: with a stride, as many phases as the kernel meets."""
    phases = min(stride[0], (kernel[0] - 1) * dilation[0] + 1)
    return PlanesSize(phases, -(-(height + 2 * padding[0]) // stride[0]), -(-wide // ALIGNED) * ALIGNED)


def is_read_as_it_lies(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], pixels: int) -> bool:
    """Whether an image of so many pixels is a matrix of channels and pixels: each weight of its kernel meets each."""
    return kernel == stride == (1, 1) and padding == (0, 0) and pixels % ALIGNED == 0


def convolution_call(
    pattern: HiNMPattern, rows: int, in_features: int, images: tuple[int, int, int, int], size: tuple[int, int],
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    *, activated: bool = False,
) -> Call:  # fmt: skip
    """One call of a packed convolution.

    Args:
        pattern: of the weight.
        rows: of the weight.
        in_features: columns of the weight, ``C / groups * kh * kw``.
        images: ``B, C, H, W``.
        size: height and width of the output.
        kernel: height and width, and so on, as for ``F.conv2d``.
        stride: likewise.
        padding: likewise.
        dilation: likewise.
        activated: whether an activation follows.
    """
    batch, channels, height, _ = images
    high, wide = size
    pixels = plane = high * wide
    shifted, gathered = 0, channels * pixels < MOST_NUMBERS
    if not is_read_as_it_lies(kernel, stride, padding, pixels):
        planes = planes_size(height, wide, kernel, stride, padding, dilation)
        numbers = kernel[1] * planes.phases * channels * planes.height * planes.pitch
        plane, shifted, gathered = high * planes.pitch, 2 * batch * numbers, numbers < MOST_NUMBERS
    gathered = gathered and plane <= MOST_BLOCKS * GATHER_TOKENS
    tokens = batch * -(-plane // GATHER_TOKENS) * GATHER_TOKENS  # a block takes pixels of one image
    moved = Planes(math.prod(images), batch * pixels, shifted, gathered)
    return Call(pattern, rows, in_features, tokens, planes=moved, activated=activated)


def choose_kernel(call: Call, shared_limit: int, gpu: Gpu) -> Choice:
    """The kernel that should be fastest, or ``"unpack"``; of several that should be, the first in the list.

    Args:
        call: what is computed.
        shared_limit: bytes of shared memory that a block can have.
        gpu: what bounds it.
    """
    return min(list_kernels(call, shared_limit, gpu), key=lambda choice: choice.seconds)


def list_kernels(call: Call, shared_limit: int, gpu: Gpu) -> list[Choice]:
    """The dense product, and every kernel that takes the call."""
    return [choice for choice in _choices(call, gpu) if choice.shared <= shared_limit]


def predict_dense(call: Call, gpu: Gpu) -> Choice:
    """The dense layer on the GPU's BLAS."""
    weight = call.rows * call.in_features
    roofs = {
        "memory": (2 * weight + call.moved) / gpu.memory,
        "tensor cores": 2 * weight * call.outputs / gpu.dense,
    }
    return Choice("BLAS", 0, 0, *_tightest(roofs, gpu))


def _choices(call: Call, gpu: Gpu) -> Iterator[Choice]:
    pattern, n, columns = call.pattern, call.tokens, -(-call.in_features // ALIGNED) * ALIGNED
    height, runs = tile_rows(pattern), pattern.runs(call.in_features)
    rows = -(-call.rows // pattern.vector_size) * pattern.vector_size
    kept = padded_kept(pattern, call.in_features)
    weight = rows * kept * 2 * 9 // 16 + rows // height * kept * 2  # half of the numbers, their metadata, the index

    unpacked = {
        "memory": (weight + 2 * call.rows * columns) / gpu.memory,
        "L2": (-(-columns // UNPACKED_COLUMNS) * weight + 2 * call.rows * columns) / gpu.l2,
    }
    activated = 4 * call.outputs * call.rows / gpu.memory + gpu.launch if call.activated else 0.0
    dense = predict_dense(call, gpu)
    seconds = _tightest(unpacked, gpu)[0] + dense.seconds + activated
    yield Choice("unpack", 0, UNPACKED_SHARED, seconds, dense.roof)

    def predict(
        kernel: str, tokens: int, high: int, shared: int, read: int, beside: Sequence[int], *, cluster: int = 1,
        more: float = 0.0, **other: float,
    ) -> Choice:  # fmt: skip
        """For blocks of ``tokens`` tokens and ``high`` rows that read so many columns; ``beside``: the bytes that each
        kernel moves that runs before or after; ``more``: seconds that nothing overlaps; ``other`` roofs."""
        wide = -(-n // tokens)
        blocks = wide * -(-rows // high)
        filled, waves = fill(wide, high, cluster)
        roofs = {
            "memory": (weight + call.moved) / gpu.memory,
            "L2": (wide * weight + filled * tokens * read * 2 / cluster) / gpu.l2 * waves / max(filled, 1),
            "tensor cores": rows * kept * wide * tokens / gpu.sparse * waves / max(blocks, 1),
            **other,
        }
        seconds, roof = _tightest(roofs, gpu)
        seconds += more + sum(moved / gpu.memory + gpu.launch for moved in beside)
        return Choice(kernel, tokens, shared, seconds, roof)

    def fill(wide: int, high: int, cluster: int) -> tuple[int, int]:
        """Blocks, with those that only fill up a cluster, and the same in whole waves: the last one takes as long."""
        filled = wide * -(-rows // (high * cluster)) * cluster
        at_once = gpu.multiprocessors
        if cluster > 1:  # no cluster spans two processing clusters of the GPU
            at_once = max(gpu.multiprocessors // gpu.gpc, 1) * (gpu.gpc // cluster) * cluster
        return filled, -(-filled // at_once) * gpu.multiprocessors

    clusters = (1, CLUSTER) if gpu.gpc >= CLUSTER else (1,)  # where it gains nothing, the first one is chosen
    if call.planes is None:
        ways = ((4 * n * call.in_features, call.feature_major), (4 * n * call.rows, call.feature_major_out))
        window = call.in_features if len(runs) == 1 else pattern.window or columns
        # The decode kernel wants rows, and writes them: what lies feature-major is copied into rows first.
        if n <= DECODE_TOKENS:
            turns = [turned for turned, feature_major in ways if feature_major]
            for cluster, tokens in product(clusters, (8, 16)):
                if cluster > 1 and (len(runs) < cluster or window % ALIGNED):  # it is runs that they share out
                    continue
                held = columns if cluster == 1 else -(-len(runs) // cluster) * window
                name, rows_of_warp = ("decode", 32) if cluster == 1 else ("decode_cluster", min(height, 64))
                shared = decode_weights(rows_of_warp) + 2 * decode_pitch(held) * min(n, tokens)
                # Only once the input is there are weights multiplied.
                filled, waves = fill(-(-n // tokens), DECODE_ROWS, cluster)
                more = filled * min(n, tokens) * columns * 2 / cluster / gpu.l2 * waves / max(filled, 1)
                more += rows / rows_of_warp * kept / 32 * n / (GATHERS * gpu.multiprocessors)
                more += CLUSTER_SECONDS if cluster > 1 else 0.0
                yield predict(name, tokens, DECODE_ROWS, shared, 0, turns, cluster=cluster, more=more)
        # The gather kernel wants columns, and columns come out.
        beside = [turned for turned, feature_major in ways if not feature_major]
    elif not call.planes.gathered:
        return
    else:
        beside = [2 * call.planes.shifted] if call.planes.shifted else []
    yield predict("gather", GATHER_TOKENS, height, gather_shared(height, kept), kept, beside,
                  latency=kept / 64 * STEP_SECONDS)  # fmt: skip


def decode_weights(rows: int) -> int:
    """Bytes of shared memory through which the decode kernel's weights come, of warps of so many rows."""
    return 8 * (128 // rows) * (36 * rows + 64)


def decode_pitch(columns: int) -> int:
    """Numbers between two tokens in the shared memory of a block of the decode kernel that reads so many columns: 4
    banks more than a whole number of rounds."""
    return -(-columns // 64) * 64 + 8


def gather_shared(height: int, kept: int) -> int:
    """Bytes of shared memory of one block of the gather kernel."""
    return 3 * (16384 + 72 * height) + 8 * height + 4 * kept


def _tightest(roofs: dict[str, float], gpu: Gpu) -> tuple[float, str]:
    """The seconds of a kernel, its launch with them, and what most of them are."""
    roof = max(roofs, key=lambda name: roofs[name])
    return roofs[roof] + gpu.launch, roof if roofs[roof] > gpu.launch else "launch"
