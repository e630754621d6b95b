"""What ``torch.compile(model, backend="hinm")`` is told, and the backend that compiles the rest."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

CHOICES = {"plan": ("auto", "sparse", "dense"), "inner": ("inductor", "aot_eager", "eager")}


class Options(NamedTuple):
    """How a graph is compiled.

    Args:
        plan: ``"auto"`` leaves a layer dense where that is faster, ``"sparse"`` never and ``"dense"`` always.
        inner: the backend that compiles the rest.
        mode: of Inductor, as ``torch.compile`` knows them.
    """

    plan: str = "auto"
    inner: str = "inductor"
    mode: str = "default"

    @property
    def replays(self) -> bool:
        """Whether what runs on a GPU is captured in CUDA graphs: the mode decides, else how Inductor is configured."""
        if self.inner != "inductor":
            return False
        from torch._inductor import config, list_mode_options

        return bool(list_mode_options(self.mode).get("triton.cudagraphs", config.triton.cudagraphs))

    def inner_backend(self) -> Callable[..., Any]:
        """What compiles the rest, in its mode."""
        if self.inner == "inductor":  # as torch.compile calls it, with all that it sets for CUDA graphs
            return torch._TorchCompileInductorWrapper(self.mode, None, None)
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend(self.inner)


def read_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """The options of ``torch.compile``, which takes only one of ``mode`` and ``options``.

    Raises:
        ValueError: for what is unknown, or a mode of a backend that has none; all offenders in one message.
    """
    from torch._inductor import list_mode_options

    given = {"mode": mode or "default", **(options or {})}
    choices = {**CHOICES, "mode": tuple(list_mode_options())}
    wrong = [
        f"{name}={value!r} must be one of {', '.join(choices[name])}"
        if name in choices
        else f"{name!r} is unknown, only {', '.join(choices)} are options"
        for name, value in given.items()
        if name not in choices or value not in choices[name]
    ]
    if given["mode"] != "default" and given.get("inner", "inductor") != "inductor":
        wrong.append(f"mode={given['mode']!r} must be default where inner={given['inner']!r}, which has no modes")
    if wrong:
        raise ValueError(f"torch.compile(backend='hinm'): {'; '.join(wrong)}.")
    return Options(**given)
