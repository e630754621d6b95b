"""Orders of rows are absorbed through whole networks, and every graph computes what it computed before."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lightning_hinm import HiNMPattern, prune
from lightning_hinm.passes import absorb_orders_pass, find_streams, orders_of
from tests import networks
from tests.graphs import (
    Chain,
    capture,
    moved,
    restored,
    result,
    set_orders,
    sparse_graph,
    sparse_ops,
)
from tests.networks import NETWORKS
from tests.ptx.device import emulated

PATTERN = HiNMPattern(8, window=16)
TOKENS, IMAGES, SIGNALS = torch.randn(3, 5, 32), torch.randn(2, 8, 12, 12), torch.randn(2, 8, 12)


@dataclass(frozen=True)
class Case:
    """Layers, and what lies between them.

    Args:
        layers: what is pruned, and norms.
        forward: of an input and the layers.
        x: the input.
        restored: layers whose orders are restored afterwards; the last one's is, where its rows are the result.
        moved: ``index_select`` put in.
        shared: layers that have one order.
        blocks: layers whose rows stay in as many equal blocks.
    """

    layers: list[nn.Module]
    forward: Callable[..., Tensor]
    x: Tensor
    restored: int = 1
    moved: int = 0
    shared: tuple[int, ...] = ()
    blocks: dict[int, int] = field(default_factory=dict)


def mlp(hidden: int = 32, reads: int | None = None) -> list[nn.Module]:
    return [nn.Linear(32, hidden), nn.Linear(hidden if reads is None else reads, 48)]


def three(hidden: int = 32) -> list[nn.Module]:
    """Two layers that write alike, and their reader."""
    return [nn.Linear(32, hidden), nn.Linear(hidden, 48), nn.Linear(32, hidden)]


def convs(*more: nn.Module, reads: int = 32) -> list[nn.Module]:
    return [nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(reads, 48, 3, padding=1), *more]


def pooled(*more: nn.Module, reads: int = 32) -> list[nn.Module]:
    """A convolution, and a linear layer that reads its channels."""
    return [nn.Conv2d(8, 32, 3, padding=1), nn.Linear(reads, 48), *more]


def signals() -> list[nn.Module]:
    return [nn.Conv1d(8, 32, 3, padding=1), nn.Conv1d(32, 48, 3)]


class Scale(nn.Module):
    def __init__(self, *size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)


def norm(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    """With parameters that are not the same for all channels."""
    module = kind(*arguments)
    for tensor in (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.dim())):
        nn.init.uniform_(tensor, 0.5, 2.0)
    return module


def by_hand(y: Tensor, scale: nn.Module) -> Tensor:
    """RMSNorm."""
    wide = y.to(torch.float64)
    return scale.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(y.dtype)


def response_norm(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Of ConvNeXt V2."""
    length = torch.linalg.vector_norm(y, ord=2, dim=(1, 2), keepdim=True)
    return scale * (y * (length / (length.mean(dim=-1, keepdim=True) + 1e-6))) + shift + y


def heads(y: Tensor, count: int = 4) -> Tensor:
    """``[B, T, I]`` -> ``[B, count, T, I / count]``."""
    return y.view(*y.shape[:2], count, -1).transpose(1, 2)


def merged(y: Tensor) -> Tensor:
    """Heads, one after another."""
    return y.transpose(1, 2).contiguous().flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return merged(F.scaled_dot_product_attention(q, k, v, **options))


def by_hand_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merged(F.dropout((q * 0.3 @ k.mT).softmax(-1), 0.1, False) @ v)


def repeated(y: Tensor, times: int) -> Tensor:
    """Of each head so many copies."""
    batch, count, tokens, size = y.shape
    return y[:, :, None, :, :].expand(batch, count, times, tokens, size).reshape(batch, count * times, tokens, size)


def added(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "gelu": F.gelu,
    "gelu by hand": lambda y: y * 0.5 * (1 + torch.tanh(y + 0.04 * y.pow(3))),
    "in place": lambda y: F.relu(y, inplace=True).mul_(2.0),
    "dropout": lambda y: F.dropout(y.relu(), 0.1, False),
    "types": lambda y: y.to(torch.float32).double().contiguous(),
    "where": lambda y: torch.where(y > 0, y, y.exp()),
    "its mean": lambda y: y - y.mean(-1, keepdim=True),
    "its deviation": lambda y: y / (1 + y.std()),
    "its mean over tokens": lambda y: y + y.mean(1, keepdim=True),
    "its sum over tokens, spread": lambda y: y + y.sum(1, keepdim=True).expand(-1, 5, -1),
    "its largest": lambda y: y * y.amax(dim=1, keepdim=True) + y.amax((0, 1)),
    "flattened": lambda y: y.view(-1, 32).view(3, 5, 32),
    "a dimension more": lambda y: y.unsqueeze(2).squeeze(2),
    "transposed": lambda y: (
        y.transpose(1, 2).softmax(1).transpose(1, 2) if False else y.transpose(1, 2).permute(0, 2, 1)
    ),
    "pooled over tokens": lambda y: F.avg_pool1d(y.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "padded": lambda y: F.pad(y, (0, 0, 1, 1)),
    "some tokens": lambda y: y[:, 1:3][..., None, :][:, -1],
    "split tokens": lambda y: torch.cat(list(y.split([2, 3], dim=1))[::-1], dim=1),
    "stacked tokens": lambda y: torch.cat([y, y.relu()], 1),
    "another's shape": lambda y: y.flatten(0, 1).reshape_as(y).view(5, 3, 32).view_as(y),
    "spread to another's shape": lambda y: y + y.mean(1, keepdim=True).expand_as(y),
    "another's type": lambda y: y.float().type_as(y).to(y),
    "repeated": lambda y: (
        y.mean(1, keepdim=True).repeat(1, 5, 1) + y[:, :1].tile(5, 1) * y[:, :1].broadcast_to(3, 5, 32)
    ),
    "axes swapped": lambda y: torch.swapdims(y.swapaxes(1, 2), 2, 1),
    "dimensions moved": lambda y: torch.moveaxis(y.movedim(-1, 0), (1, 0), (0, -1)),
    "transposed as a matrix": lambda y: y.mT.mul(2.0).mT + torch.t(y[0].T.t().t()),
    "products added": lambda y: torch.addcmul(y, y, y.tanh(), value=0.5).addcdiv(y.sin(), y.exp()),
    "between two": lambda y: torch.lerp(y, y.relu(), 0.3).lerp(y.tanh(), y.sigmoid()),
    "stacked": lambda y: torch.stack([y, y.relu()], 1).sum(1) + torch.stack([y, y.tanh()], -1).amax(-1),
    "stacked, then flattened": lambda y: torch.stack([y, y.exp()], dim=2).flatten(1, 2),
    "weights of tokens": lambda y: y.softmax(1) + F.log_softmax(y, dim=-2) + F.softmin(y, dim=0),
    "its length": lambda y: y / (1 + torch.linalg.vector_norm(y, dim=-1, keepdim=True) + y.norm(2, 2)[..., None]),
    "its length over tokens": lambda y: y / torch.linalg.norm(y, dim=1, keepdim=True) + y.norm(dim=(0, 1)),
    "its whole length": lambda y: y / y.norm(),
    "normalized": lambda y: F.normalize(y, dim=-1) + F.normalize(y, p=1.0, dim=1),
    "its largest of two": lambda y: torch.max(y, y.neg()).min(y.exp()),
    "its largest and where": lambda y: y * y.max(1, keepdim=True).values + (lambda a, b: a * b)(*y.min(dim=1)).mean(0),
    "its largest of all": lambda y: y / y.max() + y.max(-1, keepdim=True).values + torch.min(y, 2)[0].unsqueeze(2),
    "tokens one by one": lambda y: torch.stack([*y.unbind(1)][::-1], 1) + torch.stack(y.unbind(), 0),
    "one token": lambda y: y + y.select(1, 2).unsqueeze(1) + y.narrow(1, 0, 2).sum(1, keepdim=True),
    "sums of tokens": lambda y: y.cumsum(1) + torch.cumsum(y, dim=0),
    "tokens reversed": lambda y: y.flip(0, 1) + torch.flip(y, [-2]),
    "tokens rolled": lambda y: y.roll(1, 1) + torch.roll(y, shifts=(1, 2), dims=(0, 1)),
    "products and sums": lambda y: (
        y.tanh().prod(1, keepdim=True) + y.logsumexp(1, keepdim=True) + y / y.logsumexp((1, 2))[0]
    ),
    "one slope": lambda y: F.prelu(y, torch.full((1,), 0.25, dtype=y.dtype)),
    "a slope for each token": lambda y: F.prelu(y, torch.linspace(0.1, 0.5, 5, dtype=y.dtype)),
}
ABSORBED: dict[str, Case] = {
    **{name: Case(mlp(), lambda x, a, b, f=f: b(f(a(x))), TOKENS) for name, f in NUMBERS.items()},
    "two readers": Case([*mlp(), nn.Linear(32, 48)], lambda x, a, b, c: b(y := a(x).tanh()).sum() + c(y), TOKENS, 1),
    "without a bias": Case([nn.Linear(32, 64, bias=False), nn.Linear(64, 48)], lambda x, a, b: b(a(x)), TOKENS),
    "odd rows": Case(mlp(60), lambda x, a, b: b(a(x)), TOKENS),
    "windows": Case(mlp(96), lambda x, a, b: b(a(x)), TOKENS),
    "scale": Case([*mlp(), Scale(32)], lambda x, a, b, s: b(s.weight * a(x)), TOKENS),
    "layer norm": Case([*mlp(), norm(nn.LayerNorm, 32)], lambda x, a, b, n: b(n(a(x))), TOKENS),
    "rms norm": Case([*mlp(), norm(nn.RMSNorm, 32)], lambda x, a, b, n: b(n(a(x))), TOKENS),
    "rms norm by hand": Case([*mlp(), Scale(32)], lambda x, a, b, s: b(by_hand(a(x), s)), TOKENS),
    "slopes": Case([*mlp(), norm(nn.PReLU, 32)], lambda x, a, b, p: b(p(a(x).flatten(0, 1)).view(3, 5, 32)), TOKENS),
    "linear and batch norm": Case(
        [*mlp(), norm(nn.BatchNorm1d, 32)], lambda x, a, b, n: b(n((y := a(x)).flatten(0, 1)).reshape_as(y)), TOKENS
    ),
    "type of another": Case(mlp(), lambda x, a, b: b(a(x).type_as(x).to(x)) + x.type_as(a(x))[..., :1], TOKENS),
    "shape of another": Case(mlp(), lambda x, a, b: b((y := a(x)) * x.flatten(0, 1).view_as(y)[..., :1]), TOKENS),
    "stacked with what is there": Case(
        [*three(), nn.Linear(32, 32)],
        lambda x, a, b, c, d: b(torch.stack([a(x), c(x), d(x), x], 1).sum(1)),
        *(TOKENS, 1, 1, (0, 2, 3)),
    ),
    "response norm": Case(
        [*mlp(), Scale(1, 1, 1, 32), Scale(32)],
        lambda x, a, b, s, t: b(response_norm(a(x), s.weight, t.weight)),
        torch.randn(2, 4, 5, 32),
    ),
    # two writers
    "residual": Case(three(), lambda x, a, b, c: b(a(x) + c(x)), TOKENS, shared=(0, 2)),
    "residual in place": Case(three(), lambda x, a, b, c: b(added(a(x), c(x))), TOKENS, shared=(0, 2)),
    "swiglu": Case(three(), lambda x, a, b, c: b(F.silu(a(x)) * c(x)), TOKENS, shared=(0, 2)),
    "two orders, one restored": Case(three(), lambda x, a, b, c: b(F.silu(a(x)) * c(x)), TOKENS, 2),
    "a layer called twice": Case(
        [nn.Linear(32, 32), nn.Linear(32, 32)], lambda x, a, b: b(a(a(x).relu())).sum() + a(x), TOKENS, 1
    ),
    # edges
    "entered": Case(three(), lambda x, a, b, c: b(a(x) + c(x) + x), TOKENS, 1, 1, shared=(0, 2)),
    "left": Case(three(), lambda x, a, b, c: b(y := a(x) + c(x)).sum() + y.softmax(-1), TOKENS, 0, 1, shared=(0, 2)),
    "left by a dense reader": Case(
        [*three(), nn.Linear(32, 4)],
        lambda x, a, b, c, d: d(y := a(x) + c(x)).sum() + b(y),
        TOKENS,
        1,
        1,
        shared=(0, 2),
    ),
    "left once for two": Case(
        [*three(), nn.Linear(32, 4), nn.Linear(32, 4)],
        lambda x, a, b, c, d, e: d(y := a(x) + c(x)).sum() + e(y).sum() + b(y),
        *(TOKENS, 1, 1, (0, 2)),
    ),
    "left before and after it is written": Case(
        [*three(), nn.Linear(32, 32)],
        lambda x, a, b, c, d: (
            (first := (y := a(x) + c(x) + d(x)).softmax(-1)),
            y.mul_(3.0),
            b(y) + first[..., :1] + y.softmax(-1)[..., :1],
        )[2],
        *(TOKENS, 1, 2, (0, 2, 3)),
    ),
    "left for what is written elsewhere": Case(
        three(), lambda x, a, b, c: (y := x.clone(), added(y, a(x) + c(x)), b(y))[2], TOKENS, 1, 1, shared=(0, 2)
    ),
    # images
    "batch norm": Case(convs(norm(nn.BatchNorm2d, 32)), lambda x, a, b, n: b(F.relu(n(a(x)))), IMAGES),
    "group norm, one group": Case(convs(norm(nn.GroupNorm, 1, 32)), lambda x, a, b, n: b(n(a(x))), IMAGES),
    "group norm, each channel": Case(convs(norm(nn.GroupNorm, 32, 32)), lambda x, a, b, n: b(n(a(x))), IMAGES),
    "group norm, within groups": Case(
        convs(norm(nn.GroupNorm, 4, 32)), lambda x, a, b, n: b(n(a(x))), IMAGES, blocks={0: 4}
    ),
    "instance norm": Case(convs(norm(nn.InstanceNorm2d, 32)), lambda x, a, b, n: b(n(a(x))), IMAGES),
    "instance norm, affine": Case(
        convs(norm(nn.InstanceNorm2d, 32, 1e-5, 0.1, True)), lambda x, a, b, n: b(n(a(x))), IMAGES
    ),
    "instance norm, frozen": Case(
        convs(norm(nn.InstanceNorm2d, 32, 1e-5, 0.1, True, True)), lambda x, a, b, n: b(n(a(x))), IMAGES
    ),
    "slopes of images": Case(convs(norm(nn.PReLU, 32)), lambda x, a, b, p: b(p(a(x))), IMAGES),
    "response norm of images": Case(
        convs(Scale(32), Scale(32)),
        lambda x, a, b, s, t: b(
            (y := a(x))
            + torch.addcmul(
                t.weight.view(1, -1, 1, 1),
                s.weight.view(1, -1, 1, 1),
                y * ((length := y.norm(p=2, dim=(2, 3), keepdim=True)) / (length.mean(dim=1, keepdim=True) + 1e-6)),
            )
        ),
        *(IMAGES, 1, 2),  # the parameters, as they are viewed
    ),
    "attention over pixels": Case(
        convs(),
        lambda x, a, b: b((y := a(x)) * torch.cat([y.max(1, True)[0], y.mean(1, True)], 1).amax(1, True)),
        IMAGES,
    ),
    "maximum": Case(convs(), lambda x, a, b: b(F.max_pool2d(a(x), 2) * 2.0 + 1.0), IMAGES),
    "average": Case(convs(), lambda x, a, b: b(F.avg_pool2d(a(x), 2).sigmoid()), IMAGES),
    "interpolated": Case(convs(), lambda x, a, b: b(F.interpolate(a(x), scale_factor=2.0)), IMAGES),
    "padded images": Case(convs(), lambda x, a, b: b(F.pad(a(x), (1, 2, 3, 0), mode="reflect")), IMAGES),
    "channel norm": Case(
        convs(norm(nn.LayerNorm, 32)), lambda x, a, b, n: b(n(a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), IMAGES
    ),
    "norm over images": Case(convs(norm(nn.LayerNorm, (32, 12, 12))), lambda x, a, b, n: b(n(a(x))), IMAGES, 2),
    "a bias": Case(
        [nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(32, 32), nn.Linear(32, 32)],
        lambda x, a, b, c, d: b(F.linear(x, a.weight, c(x[0, 0]) + d(x[0, 1]))),
        *(TOKENS, 1, 2, (2, 3)),
    ),
    "means": Case(pooled(), lambda x, a, b: b(a(x).mean([2, 3])), IMAGES),
    "pooled to one pixel": Case(pooled(), lambda x, a, b: b(F.adaptive_avg_pool2d(a(x), 1).flatten(1)), IMAGES),
    "pixels as columns": Case(
        pooled(reads=128), lambda x, a, b: b(torch.flatten(F.adaptive_max_pool2d(a(x), 2), 1)), IMAGES
    ),
    "pixels as tokens": Case(pooled(), lambda x, a, b: b(a(x).flatten(2).transpose(1, 2)), IMAGES),
    "depthwise": Case(convs(nn.Conv2d(32, 32, 3, groups=32)), lambda x, a, b, d: b(d(a(x))), IMAGES),
    "squeezed and excited": Case(
        [nn.Conv2d(8, 32, 1), nn.Conv2d(32, 48, 1), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 1)],
        lambda x, a, b, c, d: b((y := a(x)) * d(c(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid()),
        IMAGES,
        shared=(0, 3),
    ),
    "stored otherwise, then viewed": Case(
        [nn.Conv2d(8, 32, 3), nn.Linear(3200, 48), nn.Conv2d(8, 32, 3)],
        lambda x, a, b, c: b((a(x) + c(x)).flatten(2).mT.mH.view(2, -1)),
        *(IMAGES, 1, 1, (0, 2)),
    ),
    "added to what is stored otherwise, then viewed": Case(
        [nn.Linear(8, 32), nn.Linear(4608, 48), nn.Linear(8, 32), nn.ConvTranspose2d(8, 32, 1)],
        lambda x, a, b, c, d: b(
            (d(x).permute(0, 2, 3, 1) + a(y := x.permute(0, 2, 3, 1)) * c(y)).permute(0, 3, 1, 2).view(2, -1)
        ),
        *(IMAGES, 1, 1, (0, 2)),
    ),
    "signals": Case(signals(), lambda x, a, b: b(F.max_pool1d(a(x).relu(), 2)), SIGNALS),
    # parts
    "concatenated": Case(
        [nn.Conv2d(8, 32, 1), nn.Conv2d(48, 48, 1), nn.Conv2d(8, 16, 1)],
        lambda x, a, b, c: b(torch.cat([a(x), c(x).relu()], dim=1)),
        IMAGES,
    ),
    "concatenated with what was there": Case(
        convs(reads=40), lambda x, a, b: b(torch.cat([x, a(x)], dim=1).relu()), IMAGES
    ),
    "halves": Case(
        [nn.Linear(32, 64), *mlp()[1:], nn.Linear(32, 16)],
        lambda x, a, b, c: b((y := a(x).chunk(2, dim=-1))[0]).sum() + c(y[1]),
        *(TOKENS, 1, 0, (), {0: 2}),
    ),
    "thirds of a fused layer": Case(
        [nn.Linear(32, 96), *mlp()[1:], nn.Linear(64, 16)],
        lambda x, a, b, c: b((y := a(x).split(32, 2))[1]).sum() + c(torch.cat([y[2], y[0]], -1)),
        *(TOKENS, 1, 0, (), {0: 3}),
    ),
    "no channels between blocks": Case(
        [*three(), nn.Linear(32, 32)],
        lambda x, a, b, c, d: b(y := a(x) + c(x) + d(x)) + y[..., 24:16].sum(-1, keepdim=True),
        *(TOKENS, 2, 1, (2, 3), {0: 2}),
    ),
    "groups of tokens": Case(
        [*three(), nn.Linear(32, 32)],
        lambda x, a, b, c, d: b(y := a(x) + c(x) + d(x)) + F.group_norm(y[:, :4], 2)[:, :1, :1],
        *(TOKENS, 2, 1, (2, 3), {0: 2}),
    ),
    "no channels of two": Case(
        three(),
        lambda x, a, b, c: b(x) + torch.cat([a(x), c(x)], -1)[..., 48:16].sum(-1, keepdim=True),
        *(TOKENS, 1, 1),
    ),
    "a slice": Case([nn.Linear(32, 64), *mlp()[1:]], lambda x, a, b: b(a(x)[..., 16:48]), TOKENS, blocks={0: 4}),
    "tokens and channels": Case(mlp(reads=160), lambda x, a, b: b(a(x).flatten(1)), TOKENS),
    "values": Case(mlp(), lambda x, a, b: b(attention(heads(x), heads(2 * x), heads(a(x)))), TOKENS, blocks={0: 4}),
    "values, masked": Case(
        mlp(),
        lambda x, a, b: b(attention(heads(x), heads(x), heads(a(x).relu()), attn_mask=x[:1, :, :5] > 0)),
        TOKENS,
        blocks={0: 4},
    ),
    "values, by hand": Case(
        mlp(),
        lambda x, a, b: b(by_hand_attention(heads(x), heads(2 * x), heads(a(x)).float().double())),
        TOKENS,
        blocks={0: 4},
    ),
    "values of grouped queries": Case(
        [nn.Linear(32, 16), mlp()[1]],
        lambda x, a, b: b(attention(heads(x), heads(x[..., :16], 2), heads(a(x), 2), enable_gqa=True)),
        TOKENS,
        blocks={0: 2},
    ),
    "values that are repeated": Case(
        [nn.Linear(32, 16), mlp()[1]],
        lambda x, a, b: b(attention(heads(x), heads(2 * x), repeated(heads(a(x), 2), 2))),
        TOKENS,
        blocks={0: 2},
    ),
    "values of all heads": Case(
        [nn.Linear(32, 8), mlp()[1]],
        lambda x, a, b: b(attention(heads(x), heads(2 * x), heads(a(x), 1).expand(-1, 4, -1, -1))),
        TOKENS,
    ),
    "values, but no queries": Case(
        three(),
        lambda x, a, b, c: b(attention(heads(c(x)), heads(x), heads(a(x)))),
        TOKENS,
        restored=2,
        blocks={0: 4, 2: 4},
    ),
    "values of all heads, but no keys": Case(
        [nn.Linear(32, 8), mlp()[1], nn.Linear(32, 8)],
        lambda x, a, b, c: b(attention(heads(x), *(heads(y, 1).expand(-1, 4, -1, -1) for y in (c(x), a(x))))),
        TOKENS,
        restored=2,
    ),
    "values, but no weights": Case(
        [*mlp(), nn.Linear(32, 8)],
        lambda x, a, b, c: b(attention(heads(x), heads(x), heads(a(x)), attn_mask=c(x)[:, None])),
        torch.randn(3, 8, 32),
        restored=2,
        blocks={0: 4},
    ),
    "values, but no weights, by hand": Case(
        [*mlp(), nn.Linear(32, 8)],
        lambda x, a, b, c: b(merged(c(x)[:, None] @ heads(a(x)))),
        torch.randn(3, 8, 32),
        restored=2,
        blocks={0: 4},
    ),
    "queries and keys of two orders": Case(
        three(),
        lambda x, a, b, c: b(attention(heads(a(x)), heads(c(x)), heads(x))),
        TOKENS,
        restored=2,
        blocks={0: 4, 2: 4},
    ),
    "queries and keys of two orders, by hand": Case(
        three(),
        lambda x, a, b, c: b(by_hand_attention(heads(a(x)), heads(c(x)), heads(x))),
        TOKENS,
        restored=2,
        blocks={0: 4, 2: 4},
    ),
    "queries and keys": Case(
        three(), lambda x, a, b, c: b(attention(heads(a(x)), heads(c(x)), heads(x))), TOKENS, 1, 0, (0, 2), {0: 4, 2: 4}
    ),
    "queries and keys, by hand": Case(
        three(),
        lambda x, a, b, c: b(by_hand_attention(heads(a(x)), heads(c(x)), heads(x))),
        TOKENS,
        shared=(0, 2),
        blocks={0: 4, 2: 4},
    ),
    "heads that come back": Case(
        mlp(),
        lambda x, a, b: b(a(x).view(3, 5, 4, 8).relu().reshape(15, 4, 8).flatten(1).view(3, 5, 32)),
        TOKENS,
        blocks={0: 4},
    ),
}
RESTORED: dict[str, Case] = {
    "residual": Case(mlp(), lambda x, a, b: b(a(x) + x), TOKENS),
    "result": Case([nn.Linear(32, 32), nn.Linear(32, 32)], lambda x, a, b: b(y := a(x)) + y, TOKENS),
    "softmax": Case(mlp(), lambda x, a, b: b(a(x).softmax(-1)), TOKENS),
    "sums": Case(mlp(), lambda x, a, b: b(a(x).cumsum(-1)), TOKENS),
    "reversed": Case(mlp(), lambda x, a, b: b(a(x).flip(-1)), TOKENS),
    "rolled": Case(mlp(), lambda x, a, b: b(a(x).roll(1, -1)), TOKENS),
    "reversed twice": Case(mlp(), lambda x, a, b: b(a(x).flip(1, 2)), TOKENS),
    "rolled as one": Case(mlp(), lambda x, a, b: b(a(x).roll(1)), TOKENS),
    "largest, and where among the channels": Case(
        mlp(), lambda x, a, b: b(x * (m := a(x).max(-1, keepdim=True)).values) + m.indices, TOKENS
    ),
    "channels one by one": Case(mlp(), lambda x, a, b: b(torch.stack(a(x).unbind(-1)[::-1], -1)), TOKENS),
    "one channel of all": Case(mlp(), lambda x, a, b: b(x * a(x).select(-1, 3).unsqueeze(-1)), TOKENS),
    "some channels": Case(mlp(reads=16), lambda x, a, b: b(a(x).narrow(-1, 3, 16)), TOKENS),
    "repeated channels": Case(mlp(reads=64), lambda x, a, b: b(a(x).repeat(1, 1, 2)), TOKENS),
    "no channels": Case(
        mlp(), lambda x, a, b: b(y := a(x)) + y[..., 16:0].sum(-1, keepdim=True), TOKENS, blocks={0: 2}
    ),
    "stacked in another order": Case(
        mlp(), lambda x, a, b: b(torch.stack([y := a(x[:, :1].expand(3, 32, 32)), y.mT], 1)), TOKENS
    ),
    "written as a result": Case(
        three(),
        lambda x, a, b, c: (
            (z := (y := a(x) + c(x)) * 2.0, torch.cat([x[:, :2], x[:, 2:]], 1, out=z)),
            b(z + y),
        )[-1],
        TOKENS,
        shared=(0, 2),
    ),
    "written as a result, with channels": Case(
        [*three(), nn.Linear(32, 32)],
        lambda x, a, b, c, d: (
            (z := d(x) * 2.0, y := a(x) + c(x), torch.cat([y[:, 2:], y[:, :2]], 1, out=z)),
            b(z),
        )[-1],
        TOKENS,
        shared=(0, 2),
    ),
    "written as results": Case(
        three(),
        lambda x, a, b, c: (
            (y := a(x) + c(x), z := y[:, 0] * 2.0, torch.max(x, 1, out=(z, z.long()))),
            b(y * z[:, None]),
        )[-1],
        TOKENS,
        shared=(0, 2),
    ),
    "slopes that are computed": Case(
        mlp(), lambda x, a, b: b(F.prelu(y := a(x[:, :1].expand(3, 32, 32)), y[0, 0])), TOKENS
    ),
    "slopes of a layer": Case(mlp(), lambda x, a, b: b(F.prelu(x.flatten(0, 1), a(x[0, 0]))), TOKENS),
    "instance norm of tokens": Case([*mlp(), norm(nn.InstanceNorm1d, 5)], lambda x, a, b, n: b(n(a(x))), TOKENS),
    "instance norm, changing statistics": Case(
        convs(), lambda x, a, b: b(F.instance_norm(a(x), x.new_zeros(32), x.new_ones(32))), IMAGES
    ),
    "heads": Case(mlp(), lambda x, a, b: b(a(x).view(3, 5, 8, 4).transpose(2, 3).reshape(3, 5, 32)), TOKENS),
    "heads, mixed": Case(
        mlp(), lambda x, a, b: b(a(x).view(3, 5, 4, 8).transpose(2, 3).reshape(3, 5, 32)), TOKENS, blocks={0: 4}
    ),
    "heads, tokens regrouped between them": Case(
        mlp(),
        lambda x, a, b: b(
            a(x).view(3, 5, 4, 8).permute(0, 3, 1, 2).reshape(5, 8, 3, 4).permute(0, 2, 3, 1).reshape(5, 3, 32)
        ),
        TOKENS,
        blocks={0: 4},
    ),
    "values in an order that mixes heads": Case(
        mlp(), lambda x, a, b: b(attention(heads(x), heads(x), heads(a(x)))), TOKENS
    ),
    "values of smaller heads": Case(
        mlp(), lambda x, a, b: b(attention(heads(x, 8), heads(x, 8), heads(a(x), 8))), TOKENS, blocks={0: 4}
    ),
    "values that rotate": Case(
        mlp(), lambda x, a, b: b(attention(heads(x), heads(x), heads(a(x)).roll(1, -1))), TOKENS, blocks={0: 4}
    ),
    "values, with others": Case(
        mlp(), lambda x, a, b: b(attention(heads(x), heads(x), heads(a(x)) + heads(x))), TOKENS, blocks={0: 4}
    ),
    "values that are kept": Case(
        [nn.Linear(32, 32), nn.Linear(32, 32)],
        lambda x, a, b: b(attention(heads(x), heads(x), v := heads(a(x)))) + merged(v),
        TOKENS,
        blocks={0: 4},
    ),
    "queries": Case(mlp(), lambda x, a, b: b(attention(heads(a(x)), heads(x), heads(x))), TOKENS, blocks={0: 4}),
    "keys": Case(mlp(), lambda x, a, b: b(by_hand_attention(heads(x), heads(a(x)), heads(x))), TOKENS, blocks={0: 4}),
    "queries as weights": Case(
        mlp(),
        lambda x, a, b: b(merged(heads(a(x)) @ heads(x)[:, :, :, :8].mT.mT[:, :, :1].expand(-1, -1, 8, -1))),
        TOKENS,
        blocks={0: 4},
    ),
    "weights": Case(
        mlp(),
        lambda x, a, b: b(attention(heads(x), heads(x), heads(x), attn_mask=heads(a(x))[..., :5])),
        TOKENS,
        blocks={0: 4},
    ),
    "added transposed": Case(mlp(), lambda x, a, b: b((y := a(x[:, :1].expand(3, 32, 32))) + y.mT), TOKENS),
    "outer product": Case(mlp(), lambda x, a, b: b((y := a(x))[..., None] * y[..., None, :]), TOKENS),
    "halves of one order": Case(mlp(64, 32), lambda x, a, b: b(a(x).chunk(2, dim=-1)[0]), TOKENS),
    "a slice": Case(mlp(64, 32), lambda x, a, b: b(a(x)[..., 16:48]), TOKENS),
    "every other": Case(mlp(64, 32), lambda x, a, b: b(a(x)[..., ::2]), TOKENS),
    "one channel": Case(mlp(), lambda x, a, b: b((y := a(x)) * y[..., :1]), TOKENS),
    "chosen channels": Case(mlp(reads=8), lambda x, a, b: b(a(x)[..., torch.arange(8)]), TOKENS),
    "pooled over channels": Case(mlp(reads=16), lambda x, a, b: b(F.avg_pool1d(a(x), 2)), TOKENS),
    "interpolated channels": Case(mlp(reads=64), lambda x, a, b: b(F.interpolate(a(x), scale_factor=2.0)), TOKENS),
    "padded tokens and channels": Case(mlp(reads=34), lambda x, a, b: b(F.pad(a(x), (0, 2, 1, 1))), TOKENS),
    "padded channels": Case(mlp(reads=34), lambda x, a, b: b(F.pad(a(x), (1, 1))), TOKENS),
    "tokens as channels": Case(mlp(reads=16), lambda x, a, b: b(a(x).transpose(1, 2)), torch.randn(3, 16, 32)),
    "written elsewhere": Case(mlp(), lambda x, a, b: b(added(x.clone(), a(x))), TOKENS),
    "written by index": Case(mlp(), lambda x, a, b: b(a(x).index_fill_(2, torch.tensor([1]), 0.0)), TOKENS),
    "written through a view": Case(
        three(), lambda x, a, b, c: ((y := a(x) + c(x)).unfold(2, 8, 8).mul_(2.0), b(y))[1], TOKENS, shared=(0, 2)
    ),
    "viewed, then written": Case(
        three(),
        lambda x, a, b, c: ((z := (y := a(x) + c(x)).unfold(2, 8, 8)), y.mul_(2.0), b(y) + z.sum())[2],
        TOKENS,
        shared=(0, 2),
    ),
    "groups": Case([nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3, groups=2)], lambda x, a, b: b(a(x)), IMAGES),
    "group norm": Case(convs(norm(nn.GroupNorm, 4, 32)), lambda x, a, b, n: b(n(a(x))), IMAGES),
    "training batch norm": Case(convs(), lambda x, a, b: b(F.batch_norm(a(x), None, None, training=True)), IMAGES),
    "active dropout": Case(mlp(), lambda x, a, b: b(F.dropout(a(x), 0.0, True)), TOKENS),
    "grouped, not depthwise": Case(convs(nn.Conv2d(32, 32, 3, groups=16)), lambda x, a, b, d: b(d(a(x))), IMAGES),
    "depthwise, but over tokens": Case(
        [*mlp(), nn.Conv1d(32, 32, 3, padding=1, groups=32)], lambda x, a, b, d: b(d(a(x))), torch.randn(32, 32)
    ),
    "dense reader": Case([nn.Linear(32, 64), nn.Linear(64, 4)], lambda x, a, b: b(a(x)), TOKENS),
    "as many edges as writers": Case(
        three(), lambda x, a, b, c: b(y := a(x) + c(x) + x) + y.softmax(-1)[..., :1], TOKENS, shared=(0, 2)
    ),
}


def graph_of(case: Case) -> tuple[fx.GraphModule, list[Any]]:
    model = Chain(case.layers, case.forward).double()
    shared = [[f"layers.{i}" for i in case.shared]] if case.shared else []
    set_orders(model, PATTERN, shared, {f"layers.{i}": count for i, count in case.blocks.items()})
    return sparse_graph(model, case.x.double())


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ABSORBED.values(), ids=ABSORBED)
def test_an_order_that_all_can_be_told_of_is_absorbed(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning_hinm.passes")
    gm, values = graph_of(case)
    expected, before = result(gm, values), sum(restored(gm))
    fates = orders_of(gm)
    assert absorb_orders_pass(gm) is gm
    if case.restored < before:
        assert caplog.messages[-1] == f"absorb_orders_pass: {before - case.restored} orders"
    assert (sum(restored(gm)), len(moved(gm))) == (case.restored, case.moved)
    assert [fates[node].kind == "restored" for node in sparse_ops(gm)] == restored(gm)
    assert_same(result(gm, values), expected)
    after = str(gm.graph)
    assert str(absorb_orders_pass(gm).graph) == after


@pytest.mark.parametrize("case", RESTORED.values(), ids=RESTORED)
def test_an_order_that_anything_else_meets_is_restored(case: Case) -> None:
    gm, _ = graph_of(case)
    before, fates = str(gm.graph), orders_of(gm)
    assert str(absorb_orders_pass(gm).graph) == before
    assert all(fate.kind == "restored" and fate.because is not None and fate.reason for fate in fates.values())


def test_orders_are_absorbed_along_a_chain() -> None:
    layers = [*mlp(64), nn.Linear(48, 40), nn.Linear(40, 32)]
    gm, values = graph_of(Case(layers, lambda x, a, b, c, d: d(F.relu(c(F.relu(b(F.relu(a(x))))))), TOKENS))
    expected = result(gm, values)
    absorb_orders_pass(gm)
    assert restored(gm) == [False, False, False, True]
    assert_same(result(gm, values), expected)


def test_a_writer_in_another_order_writes_into_the_order_of_most() -> None:
    layers = [nn.Linear(32, 32) for _ in range(3)] + [nn.Linear(32, 48)]
    gm, values = graph_of(Case(layers, lambda x, a, b, c, d: d(a(x) + b(x) * c(x)), TOKENS, shared=(0, 2)))
    expected = result(gm, values)
    fates = orders_of(gm)
    absorb_orders_pass(gm)
    first, other, third, last = sparse_ops(gm)
    assert restored(gm) == [False, True, False, True]
    assert [fates[node].kind for node in (first, other, third)] == ["absorbed", "restored", "absorbed"]
    assert fates[first].readers == (last,)
    assert (fates[other].because, fates[other].reason) == (first, "writes the same channels in another order")
    assert_same(result(gm, values), expected)


REASONS: dict[str, tuple[Case, str, str]] = {
    "result": (Case(mlp()[:1], lambda x, a: a(x), TOKENS), "output", "is the result of the graph"),
    "dense": (RESTORED["dense reader"], "linear_1", "is dense"),
    "entering": (RESTORED["residual"], "l_x_", "comes in the original order"),
    "unknown": (RESTORED["softmax"], "softmax", "is not known to treat all channels alike"),
    "groups": (RESTORED["groups"], "conv2d_default_1", "reads each group of its channels by itself"),
}


@pytest.mark.parametrize("case", REASONS.values(), ids=REASONS)
def test_who_makes_an_order_be_restored_is_named_with_the_reason(case: tuple[Case, str, str]) -> None:
    gm, _ = graph_of(case[0])
    fate = orders_of(gm)[sparse_ops(gm)[0]]
    assert fate.because is not None
    assert (fate.kind, fate.because.name, fate.reason) == ("restored", *case[1:])


def test_a_writer_in_another_order_is_named_only_where_one_order_would_pay() -> None:
    def forward(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
        return d(x + a(x) + b(x) + c(x))

    layers = [nn.Linear(32, 32) for _ in range(3)] + [nn.Linear(32, 48)]
    gm, _ = graph_of(Case(layers, forward, TOKENS))
    fates, (first, second, third, _) = orders_of(gm), sparse_ops(gm)
    assert [fates[node].because for node in (first, second, third)] == [second, first, first]
    assert {fates[node].reason for node in (first, second, third)} == {"writes the same channels in another order"}
    gm, _ = graph_of(Case(layers[1:], lambda x, a, b, c: c((x + a(x) + b(x)).softmax(dim=-1)), TOKENS))
    fates, (first, second, _) = orders_of(gm), sparse_ops(gm)
    assert {fates[node].reason for node in (first, second)} == {"is not known to treat all channels alike"}


def test_rows_that_are_packed_in_order_are_in_order() -> None:
    model = Chain(mlp(), lambda x, a, b: b(a(x)))
    prune(model, PATTERN, method="identity")
    gm, _ = sparse_graph(model, TOKENS)
    assert {fate.kind for fate in orders_of(gm).values()} == {"in order"}


def test_a_reader_on_a_gpu_keeps_its_columns_in_their_runs() -> None:
    pattern = HiNMPattern(32, window=16)
    for window, absorbed in ((16, False), (None, True)):
        model = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64)).half().eval()
        set_orders(model, replace(pattern, window=window))
        with emulated():
            gm, values = sparse_graph(model, torch.randn(5, 32).half())
            expected, before, fates = result(gm, values), str(gm.graph), orders_of(gm)
            first, second = sparse_ops(gm)
            absorb_orders_pass(gm)
            assert (str(gm.graph) != before) == absorbed
            if absorbed:
                assert fates[first].readers == (second,)
            else:
                assert (fates[first].because, fates[first].reason[:21]) == (second, "reads its columns in ")
            torch.testing.assert_close(result(gm, values), expected, rtol=2e-3, atol=2e-3)


def test_kernels_write_into_the_order_of_most_and_read_windows_through_one_copy() -> None:
    layers = [nn.Linear(32, 96) for _ in range(3)] + [nn.Linear(96, 64)]
    model = Chain(layers, lambda x, a, b, c, d: d(a(x) + b(x) * c(x))).half()
    set_orders(model, HiNMPattern(32, window=16), [["layers.0", "layers.2"]])
    with emulated():
        gm, values = sparse_graph(model, TOKENS.half())
        expected = result(gm, values)
        absorb_orders_pass(gm)
        assert moved(gm) == ["add"]
        torch.testing.assert_close(result(gm, values), expected, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------- whole networks

# The layers that write one stream; then, of all that are pruned, those whose orders are restored, and copies.
STREAMS: dict[str, tuple[str, dict[str, Any], list[list[str]], int, int]] = {
    "bert": (
        "bert",
        {"num_hidden_layers": 2},
        [["encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"]],
        # queries, keys and values of both layers, and the pooler
        *(7, 2),
    ),
    "llama": (
        "llama",
        {"num_hidden_layers": 2},
        [
            ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"],
            *([f"model.layers.{i}.mlp.gate_proj", f"model.layers.{i}.mlp.up_proj"] for i in range(2)),
        ],
        *(6, 2),
    ),
}


def expanded(sets: list[list[str]], count: int) -> list[list[str]]:
    return [[n for name in names for n in dict.fromkeys(name.format(i) for i in range(count))] for names in sets]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=pytest.mark.slow if name == "bert" else ()) for name, case in STREAMS.items()],
)
def test_a_transformer_whose_layers_share_an_order_restores_only_what_attention_reads(
    case: tuple[str, dict[str, Any], list[list[str]], int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sizes, sets, count, copies = case
    monkeypatch.setattr("tests.networks._SIZES", networks._SIZES | sizes)
    model = NETWORKS[name].make().double()
    set_orders(model, HiNMPattern(8), expanded(sets, 2))
    gm, values = sparse_graph(model, **NETWORKS[name].inputs(2))
    expected = result(gm, values)
    absorb_orders_pass(gm)
    assert (sum(restored(gm)), len(moved(gm))) == (count, copies)
    # Llama's norms compute in float32.
    torch.testing.assert_close(result(gm, values), expected, rtol=1e-4, atol=1e-6)


IMAGE_STREAMS: dict[str, tuple[list[list[str]], int]] = {
    "resnet18": ([["conv1", "layer1.0.conv2"], ["layer2.0.conv2", "layer2.0.downsample.0"]], 1),
    "mobilenet-v3": (
        [["2.conv_pw.0", "2.se.fc2"], ["2.conv_pwl.0", "3.conv_pwl.0"], ["3.conv_pw.0", "3.se.fc2"]],
        1,
    ),
    "convnext": ([["0", "2.pwconv2"], ["3.1", "4.pwconv2"]], 1),
    "unet": ([], 2),  # a transposed convolution and the head are dense
}


@pytest.mark.parametrize("name", ["mobilenet-v3", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_dynamic_graph_restores_what_a_static_one_does(name: str) -> None:
    model, inputs, left = NETWORKS[name].make(), NETWORKS[name].inputs(2), []
    set_orders(model, PATTERN)
    for dynamic in (False, True):
        gm, _ = sparse_graph(model, dynamic=dynamic, **inputs)
        absorb_orders_pass(gm)
        left.append(restored(gm))
    assert left[0] == left[1]
    assert not all(left[1])


@pytest.mark.parametrize("name", IMAGE_STREAMS)
def test_a_network_of_convolutions_restores_only_what_dense_layers_read(name: str) -> None:
    sets, count = IMAGE_STREAMS[name]
    model = NETWORKS[name].make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
    set_orders(model, HiNMPattern(8), sets)
    inputs = {key: x.double() for key, x in NETWORKS[name].inputs(2).items()}
    gm, values = sparse_graph(model, **inputs)
    expected = result(gm, values)
    absorb_orders_pass(gm)
    assert (sum(restored(gm)), moved(gm)) == (count, [])
    assert_same(result(gm, values), expected)


# ---------------------------------------------------------------- streams of layers without a common order


def test_layers_that_write_one_stream_are_found_whether_sparse_or_not() -> None:
    case = Case([*three(), nn.Linear(32, 32)], lambda x, a, b, c, d: b(a(x) + c(x) * d(x)), TOKENS)
    gm, _ = graph_of(case)
    assert find_streams(gm) == [set(sparse_ops(gm)[:3])]
    model = Chain(case.layers, case.forward).double()
    dense, _ = capture(model, TOKENS.double())
    weights = {node.name for node in dense.graph.find_nodes(op="placeholder") if "weight" in node.name}
    assert [{node.name for node in stream} for stream in find_streams(dense, weights)] == [
        {"linear", "linear_1", "linear_2"}
    ]
    assert find_streams(dense) == []


@pytest.mark.parametrize(
    "case",
    [
        Case(three(), lambda x, a, b, c: b(a(x) + c(x)), TOKENS, shared=(0, 2)),
        Case(three(), lambda x, a, b, c: b(a(x)) + b(c(x)), TOKENS),
        RESTORED["written through a view"],
        replace(RESTORED["as many edges as writers"], shared=()),
    ],
    ids=["one order", "two streams", "a view", "edges"],
)
def test_layers_are_found_only_where_one_order_would_spare_something(case: Case) -> None:
    assert find_streams(graph_of(case)[0]) == []
