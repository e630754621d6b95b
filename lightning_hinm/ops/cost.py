"""Which kernel takes a call, and how long it should take: the tightest of a few roofs.

Shapes: O rows, I columns, N tokens, T tiles of V rows, K kept vectors of a tile, padded.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lightning_hinm.ops.fragments import STEP, STEPS, kept_of_runs, tile_rows
from lightning_hinm.pattern import HiNMPattern

DECODE_TOKENS = 32  # beyond, the weight would be read more than twice
DECODE_ROWS, WINDOWED_ROWS, GATHER_TOKENS = 32, 256, 128
ALIGNED = 8  # 16-bit numbers of one 16-byte copy


@dataclass(frozen=True)
class Gpu:
    """What bounds a kernel.

    Args:
        name: for messages.
        memory: bytes a second from its memory.
        l2: bytes a second from its L2 cache to all multiprocessors.
        sparse: FLOP a second of ``mma.sp``, counted on non-zeros.
        dense: FLOP a second of its BLAS.
        multiprocessors: how many blocks run at once, if each has one to itself.
        launch: seconds that a kernel takes at least.
        measured: whether these were measured, or are estimates from data sheets.
    """

    name: str
    memory: float
    l2: float
    sparse: float
    dense: float
    multiprocessors: int
    launch: float = 3e-6
    measured: bool = False


# By compute capability: a newer one that is missing takes the last before it. Estimates, none of them measured.
GPUS = {
    (8, 0): Gpu("A100", 1.4e12, 4.5e12, 300e12, 270e12, 108),
    (8, 6): Gpu("RTX 30", 0.85e12, 2.2e12, 68e12, 68e12, 82),
    (8, 9): Gpu("RTX 40", 0.9e12, 4.5e12, 150e12, 150e12, 128),
    (9, 0): Gpu("H100", 3.0e12, 6.0e12, 440e12, 700e12, 132),
    (10, 0): Gpu("B200", 7.0e12, 10e12, 440e12, 1600e12, 148),
    (12, 0): Gpu("RTX 50", 1.5e12, 5.0e12, 200e12, 200e12, 170),
}
# Of the rate of mma.sp, what is left beside turning and gathering in shared memory: its clocks, counted.
WINDOWED_RATE = 0.7


@dataclass(frozen=True)
class Call:
    """One call of a packed linear layer."""

    pattern: HiNMPattern
    rows: int
    in_features: int
    tokens: int
    feature_major: bool = False

    def __str__(self) -> str:
        return f"{self.tokens} tokens of a {self.rows}x{self.in_features} layer, {self.pattern}"


@dataclass(frozen=True)
class Choice:
    """A kernel, the tokens that one block takes, and the prediction: its seconds, and the roof that binds."""

    kernel: str
    tokens: int
    shared: int
    seconds: float
    roof: str


def gpu_of(device: torch.device) -> Gpu:
    """The figures of a CUDA device."""
    return _gpu(torch.cuda.get_device_capability(device))


@functools.cache
def _gpu(capability: tuple[int, int]) -> Gpu:
    return GPUS[max(known for known in GPUS if known <= max(capability, min(GPUS)))]


@functools.lru_cache(maxsize=4096)
def choose_kernel(call: Call, shared_limit: int, gpu: Gpu) -> Choice | None:
    """The kernel that should be fastest; None if none takes the call.

    Args:
        call: what is computed.
        shared_limit: bytes of shared memory that a block can have.
        gpu: what bounds it.
    """
    return min(list_kernels(call, shared_limit, gpu), key=lambda choice: choice.seconds, default=None)


def list_kernels(call: Call, shared_limit: int, gpu: Gpu) -> list[Choice]:
    """Every kernel that takes the call."""
    return [choice for choice in _choices(call, gpu) if choice.shared <= shared_limit]


def predict_dense(call: Call, gpu: Gpu) -> tuple[float, str]:
    """Seconds of the dense layer, and its roof."""
    o, i, n = call.rows, call.in_features, call.tokens
    return _tightest({"memory": 2 * (o * i + n * (i + o)) / gpu.memory, "tensor cores": 2 * o * i * n / gpu.dense}, gpu)


def _choices(call: Call, gpu: Gpu) -> Iterator[Choice]:
    pattern, n, columns = call.pattern, call.tokens, -(-call.in_features // ALIGNED) * ALIGNED
    height, runs = tile_rows(pattern), pattern.runs(call.in_features)
    rows = -(-call.rows // pattern.vector_size) * pattern.vector_size
    kept = -(-sum(kept_of_runs(pattern, call.in_features)) // (STEP * STEPS)) * STEP * STEPS
    weight = rows * kept * 2 * 9 // 16 + rows // height * kept * 2  # half of the numbers, their metadata, the index
    moved = weight + 2 * n * (call.in_features + call.rows)

    def roofs(l2: float, tokens: int, blocks: int, rate: float = 1.0, memory: float = 0.0, launches: int = 1) -> Choice:
        waves = -(-blocks // gpu.multiprocessors) / (blocks / gpu.multiprocessors) if blocks else 1.0
        seconds, roof = _tightest(
            {
                "memory": (moved + memory) / gpu.memory,
                "L2": l2 / gpu.l2 * waves,
                "tensor cores": rows * kept * tokens / (rate * gpu.sparse) * waves,
            },
            gpu,
        )
        return Choice("", 0, 0, seconds + (launches - 1) * gpu.launch, roof)

    if n <= DECODE_TOKENS:
        pitch = decode_pitch(columns)
        for tokens in (8, 16):
            blocks = -(-n // tokens)
            l2 = blocks * (weight + rows // DECODE_ROWS * tokens * columns * 2)
            found = roofs(l2, blocks * tokens, blocks * rows // DECODE_ROWS)
            yield Choice("decode", tokens, (2 * pitch + 1152) * tokens, found.seconds, found.roof)
    window = columns if len(runs) == 1 else pattern.window or columns
    # What lies feature-major is copied into rows first, and the other way round.
    copied = 4 * n * call.in_features
    rows_copied = (copied, 2) if call.feature_major else (0, 1)
    if window % ALIGNED == 0:
        for tokens in (128, 64):
            blocks, high = -(-n // tokens), -(-rows // WINDOWED_ROWS)
            l2 = blocks * (high * tokens * columns * 2 + weight)
            found = roofs(l2, blocks * tokens, blocks * high, WINDOWED_RATE, *rows_copied)
            yield Choice("windowed", tokens, (512 + 2 * window) * tokens, found.seconds, found.roof)
    blocks = -(-n // GATHER_TOKENS)
    l2 = blocks * (rows // height * GATHER_TOKENS * kept * 2 + weight)
    turned = 4 * n * call.rows
    turned, launches = (turned, 2) if call.feature_major else (turned + copied, 3)
    found = roofs(l2, blocks * GATHER_TOKENS, blocks * rows // height, 1.0, turned, launches)
    yield Choice("gather", GATHER_TOKENS, gather_shared(height, kept), found.seconds, found.roof)


def decode_pitch(columns: int) -> int:
    """Numbers between two tokens in the decode kernel's shared memory: 4 banks more than a whole number of rounds."""
    return -(-columns // 64) * 64 + 8


def gather_shared(height: int, kept: int) -> int:
    """Bytes of shared memory of one block of the gather kernel."""
    return 3 * (16384 + 72 * height) + 4 * kept


def _tightest(roofs: dict[str, float], gpu: Gpu) -> tuple[float, str]:
    roof = max(roofs, key=lambda name: roofs[name])
    return (roofs[roof], roof) if roofs[roof] > gpu.launch else (gpu.launch, "launch")
