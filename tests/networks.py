"""The networks that people have, small and with random weights: the vocabulary of a family, not its size.

BERT, GPT-2 and Llama come from ``transformers``; the rest is written down here.

Shapes: B batch, C channels, H height, W width, L tokens, D features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolution(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, then BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out)
    )


class BasicBlock(nn.Module):
    """ResNet-18's block: two 3x3 convolutions, added to the input or its downsampled version."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if stride == 1 and c_in == width else convolution(c_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """ResNet-50's block: 1x1, 3x3 (that strides), 1x1 to four times the width."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if stride == 1 and c_in == c_out else convolution(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Stem with maximum pooling, two stages, average pooling, head."""

    def __init__(self, block: Any, depths: tuple[int, int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(block, 16, 16, depths[0], 1)
        self.layer2 = self._stage(block, 16 * block.expansion, 24, depths[1], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(24 * block.expansion, 10)

    @staticmethod
    def _stage(block: Any, c_in: int, width: int, depth: int, stride: int) -> nn.Sequential:
        rest = [block(width * block.expansion, width, 1) for _ in range(depth - 1)]
        return nn.Sequential(block(c_in, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channel means."""

    def __init__(self, channels: int, squeezed: int, activation: Any, gate: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return self.gate(self.fc2(self.activation(self.fc1(scale)))) * x


class InvertedResidual(nn.Module):
    """MobileNet's and EfficientNet's block: widen, depthwise, squeeze-excite, narrow."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int, expand: int, squeezed: int, activation: Any, gate: Any
    ) -> None:
        super().__init__()
        wide = c_in * expand
        self.act = activation()
        self.conv_pw = convolution(c_in, wide, 1)
        self.conv_dw = convolution(wide, wide, kernel, stride, groups=wide)
        self.se = SqueezeExcite(wide, squeezed, activation, gate) if squeezed else nn.Identity()
        self.conv_pwl = convolution(wide, c_out, 1)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv_dw(self.act(self.conv_pw(x))))
        y = self.conv_pwl(self.se(y))
        return x + y if self.residual else y


def mobile_net(activation: Any, gate: Any, squeezed: int) -> nn.Sequential:
    return nn.Sequential(
        convolution(3, 16, 3, 2),
        activation(),
        InvertedResidual(16, 24, 5, 2, 3, squeezed, activation, gate),
        InvertedResidual(24, 24, 3, 1, 3, squeezed, activation, gate),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(24, 10),
    )


class UNet(nn.Module):
    """Two levels down, two up: one by a transposed convolution, one by interpolation; skips are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self._double(3, 8), self._double(8, 16), self._double(16, 32)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, 2)
        self.merge2, self.merge1 = self._double(32, 16), self._double(24, 8)
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def _double(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(convolution(c_in, c_out, 3), nn.ReLU(), convolution(c_out, c_out, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        y = self.up2(self.bottom(self.pool(second)))
        y = self.merge2(torch.cat([second, y], dim=1))
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(self.merge1(torch.cat([first, y], dim=1)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then an MLP over channels that stand last, scaled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.act = nn.Linear(channels, 4 * channels), nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # [B, H, W, C]
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


def conv_next() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4),
        ChannelNorm(16, eps=1e-6),
        ConvNeXtBlock(16),
        nn.Sequential(ChannelNorm(16, eps=1e-6), nn.Conv2d(16, 24, 2, 2)),
        ConvNeXtBlock(24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(24),
        nn.Linear(24, 10),
    )


class Attention(nn.Module):
    """One projection gives queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each [B, heads, L, D]
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches as tokens, a class token; with ``distilled``, DeiT's second token and second head."""

    def __init__(self, distilled: bool = False) -> None:
        super().__init__()
        width, extra = 32, 1 + distilled
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.tokens = nn.Parameter(torch.randn(1, extra, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 16 + extra, width))
        self.blocks = nn.Sequential(ViTBlock(width, 4))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(extra))

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch_embed(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.tokens.expand(x.shape[0], -1, -1), y], dim=1) + self.pos_embed
        y = self.norm(self.blocks(y))
        return sum(head(y[:, i]) for i, head in enumerate(self.heads)) / len(self.heads)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(48, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x).relu())


class Tagger(nn.Module):
    """An LSTM beside linear layers: Dynamo does not trace it, but what stands before it and in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lstm = nn.Linear(12, 16), nn.LSTM(16, 24, batch_first=True, bidirectional=True)
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).relu()
        y, _ = self.lstm(y)
        return self.head(y)


def encoder(layers: int = 1, norm_first: bool = False, activation: Any = "relu") -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first, activation=activation)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel(transformers.BertConfig(**_SIZES, intermediate_size=64, max_position_embeddings=16))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    )


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    groups = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, **groups, intermediate_size=48, use_cache=False)
    )


_SIZES: Any = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def images(batch: int, size: int = 16) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, size, size)}


def input_images(batch: int) -> dict[str, Tensor]:
    """As ``nn.Sequential`` calls them."""
    return {"input": torch.randn(batch, 3, 16, 16)}


def sequences(batch: int) -> dict[str, Tensor]:
    return {"src": torch.randn(batch, 7, 32)}


def padding(batch: int) -> Tensor:
    """True where a token is padding, not for the same tokens in each row."""
    return torch.arange(7) >= 7 - torch.arange(batch).unsqueeze(1) % 4


def padded_sequences(batch: int) -> dict[str, Tensor]:
    return sequences(batch) | {"src_key_padding_mask": padding(batch)}


def causal_sequences(batch: int) -> dict[str, Any]:
    """``is_causal`` told, because an export cannot look into the mask."""
    return sequences(batch) | {"mask": nn.Transformer.generate_square_subsequent_mask(7), "is_causal": True}


def padded_texts(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (batch, 7)), "attention_mask": (~padding(batch)).long()}


def texts(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (batch, 7))}


@dataclass(frozen=True)
class Network:
    """How to make a network and its inputs; ``skipped`` says why which layers are not pruned, by ends of their names.

    Args:
        make: the network, with random weights.
        inputs: by name, for a batch size; each has the batch first, but for ``constant`` ones.
        skipped: the end of a layer's name -> what its reason says.
        constant: inputs that do not depend on the batch.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    skipped: Mapping[str, str] = field(default_factory=dict)
    constant: tuple[str, ...] = ()


_DEPTHWISE, _SMALL, _TIED = "depthwise convolution", "less than one tile", "its weight is that of the embedding"
_ATTENTION = {"self_attn.out_proj": "reads the projection's weight by itself"}

NETWORKS: dict[str, Network] = {
    "bert": Network(bert, padded_texts),
    "gpt2": Network(gpt2, texts, {"lm_head": _TIED}),
    "llama": Network(llama, padded_texts, {"lm_head": _TIED}),
    "resnet18": Network(partial(ResNet, BasicBlock, (1, 1)), partial(images, size=32)),
    "resnet50": Network(partial(ResNet, Bottleneck, (2, 1)), partial(images, size=32)),
    "mobilenet-v2": Network(partial(mobile_net, nn.ReLU6, None, 0), input_images, {"conv_dw.0": _DEPTHWISE}),
    "mobilenet-v3": Network(
        partial(mobile_net, nn.Hardswish, nn.Hardsigmoid, 8), input_images, {"conv_dw.0": _DEPTHWISE}
    ),
    "efficientnet": Network(
        partial(mobile_net, nn.SiLU, nn.Sigmoid, 4), input_images, {"conv_dw.0": _DEPTHWISE, "fc1": _SMALL}
    ),
    "unet": Network(UNet, images, {"head": _SMALL}),
    "convnext": Network(conv_next, input_images, {"dwconv": _DEPTHWISE}),
    "vit": Network(ViT, images),
    "deit": Network(partial(ViT, True), images),
    "encoder": Network(partial(encoder, 2), sequences, _ATTENTION),
    "encoder-padded": Network(partial(encoder, activation="gelu"), padded_sequences, _ATTENTION),
    "encoder-causal": Network(partial(encoder, norm_first=True), causal_sequences, _ATTENTION, ("mask", "is_causal")),
    "lstm": Network(Tagger, lambda batch: {"x": torch.randn(batch, 5, 12)}),
}
