"""``python -m lightning_hinm``: Lightning's command line for recipes, and what can be done with a checkpoint.

A mistake in a recipe ends in a few lines that name the wrong key or value, without usage text or traceback.
"""

import argparse
import difflib
import importlib
import inspect
import json
import os
import re
import sys
import traceback
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_hinm.explain import explain as explain_model
from lightning_hinm.format import export_checkpoint, load_layouts
from lightning_hinm.format.checkpoint import load_checkpoint
from lightning_hinm.kernels import refusal
from lightning_hinm.ops.figures import save_gpu
from lightning_hinm.ops.tune import measure_gpu

DESCRIPTION = """Train from a recipe: python -m lightning_hinm fit --config recipes/NAME.yaml.
Pack what was trained: python -m lightning_hinm export --ckpt X --out Y.
See what runs sparse, and why: python -m lightning_hinm explain --config recipes/NAME.yaml --ckpt X.
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


class ExplainCLI(RecipeCLI):
    """Builds what ``fit`` would train, and leaves it at that."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


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
    name = parser.parse_args(args).device
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.exit(2, f"error: --device={name}: torch knows no such device. Pass a CUDA device, e.g. cuda:1.\n")
    if reason := refusal(device):
        parser.exit(2, f"error: {reason}.\n")
    found = measure_gpu(device)
    sys.stdout.write(f"{found}\n")
    try:
        path = save_gpu(found, torch.cuda.get_device_name(device))
    except OSError as error:
        parser.exit(2, f"error: not kept: {error}\n")
    sys.stdout.write(f"{path or 'Not kept: LIGHTNING_HINM_GPUS is off.'}\n")


def explain(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m lightning_hinm explain",
        description="What becomes of every layer of a trained checkpoint, and why, on a batch of the recipe's data.",
        epilog="All other options are those of `python -m lightning_hinm fit`, --config for one.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint that a training of the recipe wrote")
    parser.add_argument("--json", type=Path, help="file to write the same to, as data")
    parsed, recipe = parser.parse_known_args(args)
    try:
        checkpoint = load_checkpoint(parsed.ckpt)
        sys.argv[1:] = ["fit", *recipe]  # LightningCLI wants no other place for its arguments
        cli = ExplainCLI()
        load_trained(cli.model, checkpoint, parsed.ckpt)
        batch, source = (None, None) if cli.datamodule is None else first_batch(cli.datamodule)
        precision, device = cli.trainer.precision_plugin, cli.trainer.strategy.root_device
        model = precision.convert_module(cli.model).to(device).eval()
        inputs: tuple[Any, ...] = ()
        named_inputs: dict[str, Any] = {}
        if source is not None:
            batch = precision.convert_input(move_data_to_device(batch, device))
            inputs, named_inputs = inputs_of(batch, model)
            check_forward(model, inputs, named_inputs, source)
        plan = explain_model(model, *inputs, **named_inputs)
        if parsed.json is not None:
            write_json(plan.to_dict(), parsed.json)
    except (ValueError, OSError, MisconfigurationException) as error:
        parser.exit(2, f"error: {error}\n")
    where = f"on a batch of {source}" if source else "on small inputs, and not inside the model: the recipe has no data"
    sys.stdout.write(f"{type(model).__name__}, {where}\n{plan}\n")


def load_trained(model: L.LightningModule, checkpoint: dict[str, Any], source: str) -> None:
    """Gives a model the weights and the layouts of a checkpoint.

    Raises:
        ValueError: if the checkpoint is not that of a training of this model with ``HiNMPruning``.
    """
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, Mapping):
        raise ValueError(f"{source}: holds no state_dict, but a Lightning checkpoint has one.")
    try:
        model.load_state_dict(weights, strict=model.strict_loading)
    except RuntimeError as error:
        raise ValueError(f"{source}: its weights are not those of the recipe's model. {error}") from error
    load_layouts(model, source)


def first_batch(datamodule: L.LightningDataModule) -> tuple[Any, str]:
    """A batch for validation, else of the next best kind that there is, and where it is from.

    Raises:
        ValueError: if the data has no batch at all.
    """
    datamodule.prepare_data()
    # What `fit` sets up is validated on, too.
    for stage, kind in (("fit", "val"), ("test", "test"), ("predict", "predict"), ("fit", "train")):
        if not is_overridden(f"{kind}_dataloader", datamodule):
            continue
        datamodule.setup(stage)
        loader = getattr(datamodule, f"{kind}_dataloader")()
        while isinstance(loader, (list, tuple, Mapping)) and loader:
            loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader))
        for batch in loader:
            return batch, f"{type(datamodule).__name__}.{kind}_dataloader()"
    raise ValueError(
        f"{type(datamodule).__name__}: none of its dataloaders gives a batch, but the inputs are taken from there. "
        "Take `data` out of the recipe to explain without inputs."
    )


def inputs_of(batch: Any, model: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What of a batch is given to ``forward``: a tensor itself, the first of several, of a dict what it names."""
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return (), {str(name): value for name, value in batch.items() if takes_all or name in parameters}
    return (batch[0] if isinstance(batch, (list, tuple)) else batch,), {}


def check_forward(
    model: torch.nn.Module, inputs: tuple[Any, ...], named_inputs: Mapping[str, Any], source: str
) -> None:
    """Runs the model once, so that a failure of its own is told from any other.

    Raises:
        ValueError: if it does not take the inputs.
    """
    try:
        with torch.inference_mode():
            model(*inputs, **named_inputs)
    except Exception as error:
        given = ", ".join(named_inputs) or "the batch, of a tuple or list its first element"
        raise ValueError(
            f"{type(model).__name__}.forward failed on a batch of {source}: {type(error).__name__}: {error}\n"
            f"It was given {given}; of a dict it is given what it names. Write a forward that takes that, call "
            "lightning_hinm.explain(model, ...) from Python, or take `data` out of the recipe."
        ) from error


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Writes a file, atomically."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


COMMANDS = {"export": export, "tune": tune, "explain": explain}


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    missing = any(find_spec(name) is None for name in ("jsonargparse", "docstring_parser", "typeshed_client"))
    if missing and command not in ("export", "tune"):
        sys.exit("error: recipes need jsonargparse. Install it with: pip install 'lightning-hinm[cli]'")
    if command in COMMANDS:
        COMMANDS[command](sys.argv[2:])
    else:
        RecipeCLI()


if __name__ == "__main__":
    main()
