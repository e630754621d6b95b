"""``python -m lightning_hinm``: Lightning's command line for recipes, and the export of a checkpoint.

A mistake in a recipe ends in a few lines that name the wrong key or value, without usage text or traceback.
"""

import argparse
import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from importlib.util import find_spec
from typing import NoReturn

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_hinm.format import export_checkpoint
from lightning_hinm.kernels import refusal
from lightning_hinm.ops.figures import save_gpu
from lightning_hinm.ops.tune import measure_gpu

DESCRIPTION = """Train from a recipe: python -m lightning_hinm fit --config recipes/NAME.yaml.
Pack what was trained: python -m lightning_hinm export --ckpt X --out Y.
Measure the GPU, so that kernels are chosen by its own figures: python -m lightning_hinm tune."""

# The scaffolding of jsonargparse's messages; what is left are the keys on the way to a mistake, and the mistake.
SCAFFOLDING = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value|Expected a <class 'NoneType'>$"
    r"|Not a valid subclass of \w+$|Subclass types expect|a (class path|dict) "
)


class RecipeParser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # A parser inside a parser raises instead, and the outer one gets here with the whole story.
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        hint = suggest_name(message, sorted(self._known_names(message)))
        self.exit(2, "\n".join(["error: " + condense_message(message), *hint, ""]))

    def _known_names(self, message: str) -> set[str]:
        """Every name that could be meant: this parser's own, and those in the classes and modules of the message."""
        subcommands = getattr(self._subcommands_action, "choices", None) or {}
        parsers = [self, *subcommands.values()]
        names = {action.dest for parser in parsers for action in parser._actions} | set(subcommands)
        for path in re.findall(r"class_path '([\w.]+)'", message):
            module, _, name = path.rpartition(".")
            try:
                found = getattr(importlib.import_module(module), name, None)
            except ImportError:
                continue
            parser = LightningArgumentParser()
            if inspect.isclass(found):
                parser.add_class_arguments(found)
                names |= {part for action in parser._actions for part in action.dest.split(".")}
            # `dir` does not know what a module loads lazily, `__all__` does.
            names |= {*dir(sys.modules[module]), *getattr(sys.modules[module], "__all__", ())}
        return names


class RecipeCLI(LightningCLI):
    """LightningCLI whose complaints about a recipe are short, wherever they come up before the training starts."""

    def __init__(self) -> None:
        super().__init__(
            parser_class=RecipeParser,
            parser_kwargs={"description": DESCRIPTION, "prog": "python -m lightning_hinm"},
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
        )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, MisconfigurationException) as error:
            self.parser.error(str(error), error)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (ValueError, OSError, MisconfigurationException) as error:
            # After these hooks it is a failure of the training, and its traceback is wanted.
            frames = traceback.extract_tb(error.__traceback__)
            if not {"prepare_data", "setup", "on_fit_start"} & {frame.name for frame in frames}:
                raise
            self.parser.error(f"{error}\n(JSONARGPARSE_DEBUG=true shows the traceback.)", error)


def condense_message(message: str) -> str:
    """The mistake at the bottom of jsonargparse's tree of reasons, after the keys and classes that lead to it."""
    if not any(SCAFFOLDING.match(line.lstrip(" -")) for line in message.splitlines()):
        return _shorten(message)
    trail: list[tuple[int, str]] = []
    causes: list[list[str]] = []
    for line in message.splitlines():
        text = line.lstrip(" -")
        if given := re.match("Given value: (.*)", text):
            causes = [[*cause[:-1], _add_value(cause[-1], given[1])] for cause in causes]
        elif text and not SCAFFOLDING.match(text):
            depth = len(line) - len(text)
            trail = [(above, key) for above, key in trail if above < depth] + [(depth, _shorten(text))]
            causes.append([key for _, key in trail])
    deepest = max(len(cause) for cause in causes)
    chosen = [cause for cause in causes if len(cause) == deepest]
    # The reason that a class gives is better than the types that other members of a Union would have taken.
    chosen = [cause for cause in chosen if not cause[-1].startswith("expected")] or chosen
    return "\n  ".join(dict.fromkeys(": ".join(cause) for cause in chosen))


def _shorten(text: str) -> str:
    text = re.sub(r"^Parser key \"([\w.]+)\":", r"\1:", text)
    text = re.sub(r"^Problem with given class_path '([\w.]+)':$", r"\1", text)
    text = re.sub(r"^Expected an? (?:<class '(\w+)'>|(?:typing\.)?(\S))", r"expected \1\2", text)
    return text.removesuffix(":")


def _add_value(cause: str, value: str) -> str:
    known = not cause.startswith("expected") or " value" in cause
    return cause if known else f"{cause}. Got value: {value}"


def suggest_name(message: str, names: list[str]) -> list[str]:
    """A line with the known name closest to the one that the message complains about, if there is one."""
    found = re.search(r"(?:[Oo]ption|[Kk]ey) '([\w.]+)'|no attribute '(\w+)'|invalid choice: '(\w+)'", message)
    close = difflib.get_close_matches(next(filter(None, found.groups())), names, n=1) if found else []
    return [f"  Did you mean {name}?" for name in close]


def export(args: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m lightning_hinm export", description="Pack a trained checkpoint.")
    parser.add_argument("--ckpt", required=True, help="checkpoint that a training with HiNMPruning wrote")
    parser.add_argument("--out", required=True, help="safetensors file to write, for lightning_hinm.load_hinm")
    parsed = parser.parse_args(args)
    try:
        export_checkpoint(parsed.ckpt, parsed.out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


def tune(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m lightning_hinm tune", description="Measure what bounds the GPU kernels."
    )
    parser.add_argument("--device", default="cuda", help="a CUDA device, e.g. cuda:1")
    device = torch.device(parser.parse_args(args).device)
    if reason := refusal(device):
        parser.exit(2, f"error: {reason}.\n")
    found = measure_gpu(device)
    path = save_gpu(found, torch.cuda.get_device_name(device))
    sys.stdout.write(f"{found}\n{path or 'Not kept: LIGHTNING_HINM_GPUS is off.'}\n")


def main() -> None:
    if sys.argv[1:2] == ["export"]:
        export(sys.argv[2:])
    elif sys.argv[1:2] == ["tune"]:
        tune(sys.argv[2:])
    elif any(find_spec(name) is None for name in ("jsonargparse", "docstring_parser", "typeshed_client")):
        sys.exit("error: recipes need jsonargparse. Install it with: pip install 'lightning-hinm[cli]'")
    else:
        RecipeCLI()


if __name__ == "__main__":
    main()
