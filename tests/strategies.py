"""What the property tests draw: patterns, matrices and layouts of odd shapes."""

import torch
from hypothesis import strategies as st

from lightning_hinm.layout import HiNMLayout
from lightning_hinm.pattern import HiNMPattern

N_M = [(2, 4), (1, 2), (1, 4), (2, 8), (4, 8), (3, 4), (1, 1), (4, 4)]
VECTOR_SPARSITIES = [0.0, 0.25, 0.5, 0.6, 0.75, 0.875]


@st.composite
def patterns(draw: st.DrawFn) -> HiNMPattern:
    n, m = draw(st.sampled_from(N_M))
    window = draw(st.sampled_from([None, m, 2 * m, 4 * m]))
    return HiNMPattern(draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from(VECTOR_SPARSITIES)), n, m, window)


@st.composite
def saliencies(draw: st.DrawFn, rows: int = 24, columns: int = 48) -> torch.Tensor:
    """Matrices with ties, zeros, heavy tails or constants, as well as plain ones."""
    shape = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    kind = draw(st.sampled_from(["uniform", "integers", "constant", "heavy", "sparse", "zero"]))
    return {
        "uniform": noise,
        "integers": (noise * 4).floor(),
        "constant": torch.ones(shape),
        "heavy": (noise + 1e-3) ** -4,
        "sparse": noise * (noise > 0.7),
        "zero": torch.zeros(shape),
    }[kind]


@st.composite
def layouts(draw: st.DrawFn, rows: int, in_features: int, pattern: HiNMPattern | None = None) -> HiNMLayout:
    """A random legal layout, virtual columns in the last groups."""
    pattern = draw(patterns()) if pattern is None else pattern
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    index = []
    for _ in range(-(-rows // pattern.vector_size)):
        tile = []
        for first, last in pattern.runs(in_features):
            kept = pattern.kept_of_run(last - first)
            real = torch.randperm(last - first, generator=generator)[: min(kept, last - first)] + first
            tile += [real, torch.arange(last, last + kept - len(real))]
        index.append(torch.cat(tile))
    return HiNMLayout(pattern, torch.randperm(rows, generator=generator), torch.stack(index))
