"""What is timed: layers of known networks, with the patterns that matter, the most telling ones first."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from lightning_hinm import HiNMPattern


@dataclass(frozen=True)
class Linear:
    """A linear layer of ``rows`` outputs and ``columns`` inputs."""

    name: str
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.name} {self.rows}x{self.columns}"


@dataclass(frozen=True)
class Conv2d:
    """A convolution, on a batch of square images."""

    name: str
    channels: int
    rows: int
    kernel: int
    size: int
    stride: int = 1
    batch: int = 32

    @property
    def columns(self) -> int:
        """Of its weight, seen as a matrix."""
        return self.channels * self.kernel**2

    @property
    def padding(self) -> int:
        """Keeps the size, but for the stride."""
        return self.kernel // 2

    @property
    def tokens(self) -> int:
        """Output pixels of the batch."""
        return self.batch * ((self.size - 1) // self.stride + 1) ** 2

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.name} {self.kernel}x{self.kernel}{stride} {self.channels}-{self.rows} at {self.size}"


Layer = Linear | Conv2d


@dataclass(frozen=True)
class Case:
    """One layer on so many tokens (of a convolution: its own), with one pattern."""

    layer: Layer
    tokens: int
    pattern: HiNMPattern

    def __str__(self) -> str:
        window = "no window" if self.pattern.window is None else f"window {self.pattern.window}"
        return f"{self.layer}, {self.tokens} tokens, V={self.pattern.vector_size} {self.pattern.sparsity:.2%} {window}"


LLAMA = [
    Linear("Llama-7B up", 11008, 4096),
    Linear("Llama-7B down", 4096, 11008),
    Linear("Llama-7B attention", 4096, 4096),
]
BERT = [
    Linear("BERT-base fc1", 3072, 768),
    Linear("BERT-base fc2", 768, 3072),
    Linear("BERT-large fc1", 4096, 1024),
    Linear("BERT-large fc2", 1024, 4096),
    Linear("DeiT-B qkv", 2304, 768),
]
ATTENTION = [
    Linear("BERT-base attention, DeiT-B proj", 768, 768),
    Linear("BERT-large attention", 1024, 1024),
]
RESNET = [
    Conv2d("ResNet-50", 256, 64, 1, 56),
    Conv2d("ResNet-50", 64, 64, 3, 56),
    Conv2d("ResNet-50", 128, 128, 3, 28),
    Conv2d("ResNet-50", 256, 256, 3, 14),
    Conv2d("ResNet-50", 512, 512, 3, 7),
    Conv2d("ResNet-50", 512, 2048, 1, 7),
    Conv2d("ResNet-50", 128, 128, 3, 56, stride=2),
]
# What else is in it, each shape once; not its first convolution, whose three channels leave nothing to prune.
RESNET_REST = [
    Conv2d("ResNet-50", 64, 64, 1, 56),
    Conv2d("ResNet-50", 64, 256, 1, 56),
    Conv2d("ResNet-50", 256, 128, 1, 56),
    Conv2d("ResNet-50", 128, 512, 1, 28),
    Conv2d("ResNet-50", 512, 128, 1, 28),
    Conv2d("ResNet-50", 512, 256, 1, 28),
    Conv2d("ResNet-50", 256, 1024, 1, 14),
    Conv2d("ResNet-50", 1024, 256, 1, 14),
    Conv2d("ResNet-50", 1024, 512, 1, 14),
    Conv2d("ResNet-50", 2048, 512, 1, 7),
    Conv2d("ResNet-50", 256, 256, 3, 28, stride=2),
    Conv2d("ResNet-50", 512, 512, 3, 14, stride=2),
    Conv2d("ResNet-50", 256, 512, 1, 56, stride=2),
    Conv2d("ResNet-50", 512, 1024, 1, 28, stride=2),
    Conv2d("ResNet-50", 1024, 2048, 1, 14, stride=2),
]
TOKENS = (1, 8, 16, 32, 128, 512, 2048, 4096, 8192)
SPARSITIES = (0.75, 0.875, 0.9375)
VECTOR_SIZES = (64, 32, 128)
WINDOWS = (256, None)
LARGE = [*LLAMA, BERT[0]]  # with many tokens: the goals are about Llama's, BERT-base is a step below them


def default_cases() -> list[Case]:
    """The goals' own cases first, then a sample of everything, in the order of what would be missed most."""
    return unique(
        [
            *grid(LLAMA, (1, 16), (64,), SPARSITIES[:2]),
            *grid(LARGE, (4096, 8192), (64,), SPARSITIES[:2]),
            *convolutions(RESNET, (64,), SPARSITIES[:1]),
            *grid(LLAMA, (8,), (64,), SPARSITIES[:2]),
            *grid(BERT, (128, 4096), (64,), SPARSITIES[:2]),
            *grid(LARGE, (4096,), (32, 128), SPARSITIES[:2]),
            *grid(LLAMA, (1, 16), (32, 128), SPARSITIES[:2]),
            *grid(ATTENTION[:1], (128, 4096), (64,), SPARSITIES[:2]),
            *grid(LLAMA[:1], (16, 4096), (32, 128), SPARSITIES[2:]),
            *grid(LLAMA[:1], (16, 4096), (32, 128), SPARSITIES[:1], (None,)),
            *grid(LLAMA[:1], TOKENS, (64,), SPARSITIES),
            *convolutions(RESNET, (64,), SPARSITIES[1:2]),
            *grid(BERT[:2], TOKENS, (64,), SPARSITIES[:2]),
            *grid(LARGE, (16, 4096), (64,), SPARSITIES[:2], (None,)),
        ]
    )


def all_cases() -> list[Case]:
    """The whole grid, the default cases first."""
    return unique(
        [
            *default_cases(),
            *grid([*LLAMA, *BERT, *ATTENTION], TOKENS, VECTOR_SIZES, SPARSITIES, WINDOWS),
            *convolutions([*RESNET, *RESNET_REST], VECTOR_SIZES, SPARSITIES),
        ]
    )


def grid(
    layers: Iterable[Linear],
    tokens: Iterable[int],
    vector_sizes: Iterable[int],
    sparsities: Iterable[float],
    windows: Iterable[int | None] = WINDOWS[:1],
) -> list[Case]:
    """The product, layer by layer and token by token, so that neighbours share their dense rivals."""
    return [
        Case(layer, n, HiNMPattern.from_sparsity(sparsity, v, window=window))
        for layer, n, v, sparsity, window in product(layers, tokens, vector_sizes, sparsities, windows)
    ]


def convolutions(layers: Iterable[Conv2d], vector_sizes: Iterable[int], sparsities: Iterable[float]) -> list[Case]:
    """The product; a window changes nothing for the one kernel that they have."""
    pairs = product(vector_sizes, sparsities)
    patterns = [HiNMPattern.from_sparsity(sparsity, v, window=None) for v, sparsity in pairs]
    return [Case(layer, layer.tokens, pattern) for layer, pattern in product(layers, patterns)]


def unique(cases: Iterable[Case]) -> list[Case]:
    """The same cases, each once, where it came first."""
    return list(dict.fromkeys(cases))
