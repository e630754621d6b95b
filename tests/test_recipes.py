import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_hinm import HiNMPattern, HiNMPruning
from lightning_hinm.__main__ import main
from recipes import minilm, resnet
from recipes.assets import read_member

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 30522, shape, generator=torch.Generator().manual_seed(seed))


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def assets() -> None:
    try:
        for member in (minilm.MODEL, minilm.REVIEWS, resnet.DIGITS):
            read_member(*member)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_there_are_recipes() -> None:
    assert RECIPES


@each_recipe
def test_a_recipe_parses(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning_hinm", "fit", "--config", str(recipe), "--print_config"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    (pruning,) = [c for c in parsed["trainer"]["callbacks"] if c["class_path"].endswith("HiNMPruning")]
    assert HiNMPattern(**pruning["init_args"]["pattern"]).sparsity >= 0.75


@each_recipe
def test_the_header_of_a_recipe_gives_its_launch_line_and_its_result(recipe: Path) -> None:
    header = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"python -m lightning_hinm fit --config recipes/{recipe.name}\n" in header
    for word in ("hardware", "result", "val_acc", "sparsity", "torch 2.", "lightning 2."):
        assert word in header.lower()


@pytest.mark.slow
@each_recipe
def test_a_recipe_runs(recipe: Path, assets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {
        "max_epochs": "1",
        "limit_train_batches": "30",
        "limit_val_batches": "2",
        "default_root_dir": str(tmp_path),
        "enable_progress_bar": "false",
        "enable_model_summary": "false",
    }
    # The search is tested elsewhere, and takes longer than everything else.
    flags = [f"--trainer.{name}={value}" for name, value in options.items()] + ["--trainer.callbacks.method=identity"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_hinm", "fit", "--config", str(recipe), *flags])
    main()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert any((weight == 0).float().mean() == 0.75 for weight in weights.values())


def pruned_by_a_short_training(model: L.LightningModule, inputs: Tensor, classes: int, pattern: HiNMPattern) -> float:
    labels = torch.arange(len(inputs)) % classes
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[HiNMPruning(pattern, saliency_steps=1, method="identity")],
    )
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=4)
    trainer.fit(model, loader, loader)
    assert 0 <= trainer.callback_metrics["val_acc"] <= 1
    assert trainer.callback_metrics["train_loss"] > 0
    return trainer.callback_metrics["hinm/sparsity"].item()


def test_minilm_trains_and_is_pruned_without_its_data() -> None:
    model = minilm.MiniLMClassifier(pretrained=False, layers=1)
    pattern = HiNMPattern(vector_size=64, vector_sparsity=0.5)
    assert pruned_by_a_short_training(model, random_tokens(8, 6), 2, pattern) == 0.75
    query = model.net.get_submodule("encoder.layer.0.attention.self.query")
    assert query.weight.count_nonzero() == 384 * 384 // 4


def test_resnet_trains_and_is_pruned_without_its_data() -> None:
    model = resnet.ResNetClassifier(width=32)
    pattern = HiNMPattern(vector_size=32, vector_sparsity=0.5)
    assert pruned_by_a_short_training(model, random_images(8, 1, 28, 28), 10, pattern) == pytest.approx(0.75, abs=0.01)


def test_frozen_embeddings_do_not_move() -> None:
    model = minilm.MiniLMClassifier(pretrained=False, layers=1)
    before = model.net.embeddings.word_embeddings.weight.clone()
    pruned_by_a_short_training(model, random_tokens(8, 6), 2, HiNMPattern())
    assert torch.equal(model.net.embeddings.word_embeddings.weight, before)


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (minilm.MiniLM(hidden=64, layers=2, heads=2), random_tokens(3, 7)),
        (resnet.ResNet(width=16), random_images(3, 1, 28, 28)),
    ],
    ids=["minilm", "resnet"],
)
def test_a_network_compiles_as_one_graph(net: torch.nn.Module, inputs: Tensor) -> None:
    net.eval()
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(inputs), net(inputs))


def test_padding_changes_nothing() -> None:
    net = minilm.MiniLM(hidden=64, layers=2, heads=2).eval()
    tokens = random_tokens(3, 7)
    padded = torch.nn.functional.pad(tokens, (0, 5), value=minilm.PADDING)
    torch.testing.assert_close(net(padded), net(tokens))


def test_sentences_of_a_batch_do_not_see_each_other() -> None:
    net = minilm.MiniLM(hidden=64, layers=2, heads=2).eval()
    tokens = random_tokens(3, 7)
    torch.testing.assert_close(net(tokens)[1:2], net(tokens[1:2]))


VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "good", "film", "!", "'", "t", "don", "cafe",
    "$", "5", "中",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Unaffable film!", ["un", "##aff", "##able", "film", "!"]),
        ("good  \tCafé", ["good", "cafe"]),
        ("don't", ["don", "'", "t"]),
        ("un$5", ["un", "$", "5"]),
        ("中中", ["中", "中"]),
        ("goodfilm film", ["[UNK]", "film"]),
        ("una" + "a" * 100, ["[UNK]"]),
        ("", []),
    ],
)
def test_a_text_becomes_the_longest_known_pieces(text: str, pieces: list[str]) -> None:
    ids = minilm.WordPiece(VOCABULARY).encode(text, 10)
    expected = ["[CLS]", *pieces, "[SEP]"]
    assert [VOCABULARY[i] for i in ids] == expected + ["[PAD]"] * (10 - len(expected))


def test_a_long_text_is_cut_and_still_closed() -> None:
    ids = minilm.WordPiece(VOCABULARY).encode("good film good film", 4)
    assert [VOCABULARY[i] for i in ids] == ["[CLS]", "good", "film", "[SEP]"]


def test_no_group_is_on_both_sides_of_the_split() -> None:
    groups = [f"movie {i % 7}" for i in range(40)]
    train, held_out = minilm.split_by_group(groups, held_out=10, seed=0)
    assert sorted(train + held_out) == list(range(40))
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    assert 10 <= len(held_out) < 10 + 6
    assert (train, held_out) == minilm.split_by_group(groups, held_out=10, seed=0)
    assert held_out != minilm.split_by_group(groups, held_out=10, seed=1)[1]


@pytest.mark.slow
def test_the_pretrained_encoder_gives_the_published_similarity(assets: None) -> None:
    # What sentence-transformers gives for this model and this pair, to three digits.
    net = minilm.MiniLM().eval()
    net.load_pretrained()
    tokenizer = minilm.WordPiece(read_member(*minilm.VOCABULARY).decode().splitlines())
    texts = ("A man is eating food.", "A man is eating a piece of bread.")
    with torch.inference_mode():
        first, second = net.embed(torch.tensor([tokenizer.encode(text, 16) for text in texts]))
    assert torch.cosine_similarity(first, second, dim=0).item() == pytest.approx(0.755, abs=1e-3)


@pytest.mark.slow
def test_the_reviews_are_split_into_known_numbers(assets: None) -> None:
    data = minilm.RottenTomatoes()
    data.setup("fit")
    assert (len(data.train), len(data.val)) == (5000, 2714)


@pytest.mark.slow
def test_the_digits_are_split_class_by_class(assets: None) -> None:
    data = resnet.MNIST5k()
    data.setup("fit")
    assert data.train.tensors[1].bincount().tolist() == [400] * 10
    assert data.val.tensors[1].bincount().tolist() == [100] * 10
    both = torch.cat([data.train.tensors[0], data.val.tensors[0]])
    assert len(both.flatten(1).unique(dim=0)) == 5000
