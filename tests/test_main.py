import json
import subprocess
import sys
from argparse import ArgumentError
from collections import UserDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hinm import HiNMPattern, HiNMPruning, load_hinm
from lightning_hinm import __main__ as command
from lightning_hinm.ops.figures import estimate

RECIPE = f"""
seed_everything: 0
model:
  class_path: {__name__}.Toy
  init_args:
    learning_rate: 0.1
data:
  class_path: {__name__}.Noise
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_hinm.HiNMPruning
      init_args:
        pattern: {{vector_size: 8, vector_sparsity: 0.5}}
        schedule: {{begin: 0.2, end: 0.6, updates: 2}}
        saliency: magnitude
        include: [net]
"""


class Toy(L.LightningModule):
    """A network small enough for a training of a second.

    Args:
        learning_rate: of SGD.
        fail: raise in the middle of the training.
    """

    def __init__(self, learning_rate: float = 0.1, fail: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        if self.hparams["fail"]:
            raise ValueError("a bug in training_step")
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])


class Other(Toy):
    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)
        self.net = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 16))


class Noise(L.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        numbers = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(numbers), batch_size=self.batch_size)


class Narrow(Noise):
    """What is validated on is set up for ``fit``, and is too narrow for the network."""

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        self.narrow = torch.zeros(4, 16)

    def val_dataloader(self) -> list[DataLoader]:
        return [DataLoader(TensorDataset(self.narrow))]


class Empty(L.LightningDataModule):
    def predict_dataloader(self) -> list[DataLoader]:
        return []


X = torch.zeros(2, 32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command line in a folder of its own, and returns its exit code; 0 where it came to its end."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str, recipe: str = RECIPE) -> int:
        Path("recipe.yaml").write_text(recipe)
        monkeypatch.setattr(sys, "argv", ["lightning_hinm", *args])
        try:
            command.main()
        except SystemExit as stop:
            return stop.code
        return 0

    return call


FIT = ("fit", "--config", "recipe.yaml")


def test_a_recipe_trains_and_its_checkpoint_exports_to_the_same_network(run) -> None:
    assert run(*FIT) == 0
    (checkpoint,) = Path.cwd().rglob("*.ckpt")
    assert run("export", "--ckpt", str(checkpoint), "--out", "packed.safetensors") == 0
    trained = Toy.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    packed = load_hinm(Toy(), "packed.safetensors").eval()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    assert trained.net[0].weight.count_nonzero() == 32 * 32 // 4
    torch.testing.assert_close(packed.net(x), trained.net(x))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_training_resumes_from_its_checkpoint(run) -> None:
    assert run(*FIT) == 0
    (checkpoint,) = Path.cwd().rglob("*.ckpt")
    assert (
        run(*FIT, "--trainer.max_epochs", "3", "--ckpt_path", str(checkpoint), "--trainer.default_root_dir", "resumed")
        == 0
    )
    (resumed,) = Path("resumed").rglob("*.ckpt")
    before, after = (torch.load(path, weights_only=True) for path in (checkpoint, resumed))
    assert (before["global_step"], after["global_step"]) == (16, 24)
    zeros = before["state_dict"]["net.0.weight"] == 0
    assert torch.equal(after["state_dict"]["net.0.weight"] == 0, zeros)


def test_a_checkpoint_without_layouts_is_not_exported(run, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, "plain.ckpt")
    assert run("export", "--ckpt", "plain.ckpt", "--out", "packed.safetensors") == 2
    assert "error: plain.ckpt" in capsys.readouterr().err
    assert not Path("packed.safetensors").exists()


def test_a_missing_checkpoint_is_an_error_that_names_it(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "--ckpt", "nowhere.ckpt", "--out", "packed.safetensors") == 2
    assert "nowhere.ckpt" in capsys.readouterr().err


def trained() -> str:
    """A checkpoint as a training of ``RECIPE`` leaves one, made without a training."""
    model, pruning = Toy(), HiNMPruning(HiNMPattern(8, 0.5), method="identity", saliency="magnitude", include=["net"])
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[pruning], **options)
    trainer.fit(model, Noise())
    trainer.save_checkpoint("trained.ckpt")
    return "trained.ckpt"


def test_a_checkpoint_is_explained_on_a_batch_of_its_recipe(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "--config", "recipe.yaml", "--ckpt", trained(), "--json", "plan.json") == 0
    out = capsys.readouterr().out
    assert "Toy, on a batch of Noise.train_dataloader()" in out
    data = json.loads(Path("plan.json").read_text())
    assert [layer["name"] for layer in data["layers"]] == ["net.0", "net.2"]
    assert [layer["pattern"]["vector_size"] for layer in data["layers"]] == [8, 8]
    assert "on 4x32" in data["layers"][0]["reason"]
    assert data["layers"][0]["calls"] == 1
    assert data["seconds"] > 0
    rows = [line for line in out.splitlines() if line.startswith("net.")]
    assert all(layer["reason"] in row for layer, row in zip(data["layers"], rows, strict=True))
    assert sorted(path.name for path in Path.cwd().iterdir() if "plan" in path.name) == ["plan.json"]


def test_a_recipe_without_data_is_explained_without_inputs(run, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPE.replace(f"data:\n  class_path: {__name__}.Noise\n", "")
    assert run("explain", "--config", "recipe.yaml", "--ckpt", trained(), recipe=recipe) == 0
    out = capsys.readouterr().out
    assert "the recipe has no data" in out
    assert "on 128x32" in out


def test_what_is_explained_takes_the_options_of_fit(run, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data.init_args.batch_size", "7")
    assert run("explain", "--config", "recipe.yaml", "--ckpt", trained(), *options) == 0
    assert "on 7x32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("checkpoint", "right", "wrong", "said"),
    [
        ("nowhere.ckpt", "", "", ["nowhere.ckpt"]),
        ("plain.ckpt", "", "", ["plain.ckpt: has no callback state at all"]),
        ("trained.ckpt", "class_path: tests.test_main.Toy", "class_path: tests.test_main.Other", ["size mismatch"]),
        ("trained.ckpt", "class_path: tests.test_main.Noise", "class_path: tests.test_main.Narrow", [
            "Toy.forward failed on a batch of Narrow.val_dataloader(): RuntimeError", "take `data` out of the recipe",
        ]),
        ("trained.ckpt", "class_path: tests.test_main.Noise", "class_path: tests.test_main.Empty", ["none of its"]),
        ("trained.ckpt", "learning_rate", "lerning_rate", ["Did you mean learning_rate?"]),
    ],
)  # fmt: skip
def test_what_cannot_be_explained_is_named_in_a_few_lines(
    run, capsys: pytest.CaptureFixture[str], checkpoint: str, right: str, wrong: str, said: list[str]
) -> None:
    assert right in RECIPE
    trained()
    torch.save({"state_dict": Toy().state_dict()}, "plain.ckpt")
    capsys.readouterr()
    options = ("--json", "plan.json")
    assert (
        run(
            "explain", "--config", "recipe.yaml", "--ckpt", checkpoint, *options, recipe=RECIPE.replace(right, wrong, 1)
        )
        == 2
    )
    message = capsys.readouterr().err.partition("error: ")[2]
    assert message.count("\n") <= 5
    for words in said:
        assert words in message
    assert not Path("plan.json").exists()


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, ((X,), {})),
        ([X, 1], ((X,), {})),
        ((X, 1), ((X,), {})),
        ({"x": X, "label": 1}, ((), {"x": X})),
        (UserDict(x=X, label=1), ((), {"x": X})),
    ],
)
def test_forward_is_given_what_it_takes_of_a_batch(batch: Any, expected: Any) -> None:
    assert command.inputs_of(batch, Toy()) == expected


def test_a_forward_that_takes_all_names_is_given_all() -> None:
    class Open(nn.Module):
        def forward(self, **named: Tensor) -> None: ...

    assert command.inputs_of({"x": X, "y": X}, Open()) == ((), {"x": X, "y": X})


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("learning_rate", "lerning_rate", ["model", "'lerning_rate' is not accepted", "Did you mean learning_rate?"]),
        ("0.1\n", "fast\n", ["model", "learning_rate", "expected float", "fast"]),
        ("max_epochs", "max_epoch", ["'trainer.max_epoch'", "Did you mean trainer.max_epochs?"]),
        ("max_epochs: 2", "max_epochs: two", ["trainer.max_epochs", "expected int", "two"]),
        ("trainer:", "trainr:", ["'trainr.", "Did you mean trainer."]),
        ("Noise", "Noize", ["Noize", "Did you mean Noise?"]),
        ("HiNMPruning", "HiNMPrunning", ["HiNMPrunning", "Did you mean HiNMPruning?"]),
        ("vector_sparsity", "vector_sparsiti", ["pattern", "'vector_sparsiti'", "Did you mean vector_sparsity?"]),
        ("vector_size: 8", "vector_size: big", ["pattern", "vector_size", "expected int", "big"]),
        ("vector_size: 8", "vector_size: 0", ["vector_size", "0"]),
        ("vector_sparsity: 0.5", "vector_sparsity: 1", ["vector_sparsity", "1"]),
        ("begin", "begn", ["schedule", "'begn'", "Did you mean begin?"]),
        ("updates: 2", "updates: 0", ["updates", "0"]),
        ("magnitude", "magnitud", ["saliency", "'magnitude'", "Got value: magnitud"]),
        ("saliency", "salience", ["'salience'", "Did you mean saliency?"]),
        ("[net]", "[nett]", ["nett"]),
        ("[net]", "[net]\n        shared_orders: [[net.0, nett]]", ["shared_orders[0]: 'nett' matches no"]),
        ("[net]", "[net]\n        shared_orders: 7", ["shared_orders", "7"]),
    ],
)
def test_a_mistake_in_a_recipe_is_named_in_a_few_lines(
    run, capsys: pytest.CaptureFixture[str], right: str, wrong: str, said: list[str]
) -> None:
    assert right in RECIPE
    assert run(*FIT, recipe=RECIPE.replace(right, wrong, 1)) == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert message.count("\n") <= 4
    for words in said:
        assert words in message


def test_a_recipe_that_is_not_there_is_named(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--config", "nowhere.yaml") == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_a_misspelt_subcommand_is_named(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fitt") == 2
    assert "Did you mean fit?" in capsys.readouterr().err


def test_on_request_a_mistake_shows_its_traceback(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ArgumentError, match="nett"):
        run(*FIT, recipe=RECIPE.replace("[net]", "[nett]"))


def test_a_failure_inside_the_training_keeps_its_traceback(run) -> None:
    with pytest.raises(ValueError, match="a bug in training_step"):
        run(*FIT, "--model.init_args.fail", "true")


def test_without_jsonargparse_the_error_names_the_extra(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "pip install 'lightning-hinm[cli]'" in run(*FIT)


def test_the_module_is_a_program() -> None:
    result = subprocess.run([sys.executable, "-m", "lightning_hinm", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ("fit", "validate", "test", "predict", "export"))


def test_of_a_union_the_reason_given_by_a_class_wins() -> None:
    message = """Does not validate against any of the Union subtypes
Subtypes: [<class 'Pattern'>, dict[str, Pattern]]
Errors:
  - vector_size: got 0
  - Expected a <class 'dict'>
Given value type: <class 'dict'>
Given value: {'vector_size': 0}"""
    assert command.condense_message(message) == "vector_size: got 0"


def test_a_message_that_is_not_a_tree_stays_as_it_is() -> None:
    message = "2 layers cannot be pruned:\n  a: too small\n  b: too odd"
    assert command.condense_message(message) == message


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("bogus", "error: --device=bogus: torch knows no such device. Pass a CUDA device, e.g. cuda:1.\n"),
        ("cuda:x", "error: --device=cuda:x: torch knows no such device. Pass a CUDA device, e.g. cuda:1.\n"),
        ("cpu", "error: cpu: is no CUDA device, but the kernels are PTX for NVIDIA GPUs; move the model to one.\n"),
    ],
)
def test_tune_says_what_is_wrong_with_a_device(device: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.tune(["--device", device])
    assert capsys.readouterr().err == said


def test_tune_says_what_it_measured_and_that_it_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("LIGHTNING_HINM_GPUS", str(tmp_path))
    monkeypatch.setattr(command, "refusal", lambda device: None)
    monkeypatch.setattr(command, "measure_gpu", lambda device: estimate((9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    with pytest.raises(SystemExit, match="2"):
        command.tune([])
    said = capsys.readouterr()
    assert said.out == f"{estimate((9, 0))}\n"
    assert "error: not kept: " in said.err
    assert "others than you may write there" in said.err
