"""What torch.compile(backend="hinm") is told: read as it is meant, or refused."""

from typing import Any

import pytest
import torch
from torch._inductor import config, list_mode_options

from lightning_hinm.options import Options, read_options

GRAPHS = {"reduce-overhead": True, "max-autotune": True, "default": False, "max-autotune-no-cudagraphs": False}


def test_the_default_options_are_auto_and_inductor_in_its_default_mode() -> None:
    assert read_options(None, None) == read_options(None, {}) == Options() == ("auto", "inductor", "default")


@pytest.mark.parametrize("mode", list_mode_options())
def test_a_mode_is_the_same_in_either_place(mode: str) -> None:
    assert read_options(mode, None) == read_options(None, {"mode": mode}) == Options(mode=mode)
    assert read_options(None, {"plan": "sparse", "mode": mode}) == Options("sparse", "inductor", mode)


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        ("fast", None, "mode='fast' must be one of default, .*reduce-overhead"),
        (None, {"mode": "fast"}, "mode='fast' must be one of default, .*reduce-overhead"),
        (None, {"inner": "eager", "mode": "max-autotune"}, "mode='max-autotune' must be default where inner='eager'"),
        (
            None,
            {"plan": "fast", "speed": 9},
            r"plan='fast' must be one of auto.*; 'speed' is unknown, only plan, inner",
        ),
        (None, {"plan": None, "mode": ["default"]}, r"mode=\['default'\] must be .*; plan=None must be"),
    ],
)
def test_what_is_unknown_or_does_not_go_together_is_refused_in_one_message(
    mode: str | None, options: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        read_options(mode, options)


@pytest.mark.parametrize(("mode", "replays"), GRAPHS.items())
def test_a_mode_says_whether_a_gpu_runs_in_cuda_graphs(mode: str, replays: bool) -> None:
    assert Options(mode=mode).replays == replays


def test_what_inductor_is_set_to_counts_where_the_mode_says_nothing() -> None:
    with config.patch({"triton.cudagraphs": True}):
        assert all(Options(mode=mode).replays for mode in GRAPHS)
        assert not Options(inner="aot_eager").replays, "only Inductor captures"


def test_every_other_backend_is_that_of_torch() -> None:
    for inner in ("aot_eager", "eager"):
        assert Options(inner=inner).inner_backend() is torch._dynamo.lookup_backend(inner)
