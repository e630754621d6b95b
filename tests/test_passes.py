"""Graph rewrites, on graphs as Dynamo hands them over."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lightning_hinm import HiNMPattern, prune
from lightning_hinm.modules import HiNMLayer, pack_layer
from lightning_hinm.passes import (
    find_fused_calls,
    find_layer_calls,
    sparsify_layers_pass,
    unfuse_encoder_layers_pass,
)

PATTERN = HiNMPattern(vector_size=8)


class Conv1D(nn.Module):
    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def capture(function: Any, *inputs: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo makes of ``function``, and its inputs."""
    captured: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured.extend((gm, list(example_inputs)))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return captured[0], captured[1]


def packed_by_name(gm: fx.GraphModule, inputs: list[Any], *modules: nn.Module) -> dict[str, HiNMLayer]:
    nodes = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    return {node.name: pack_layer(m) for node, value in nodes.items() for m in modules if value is m.weight}


def pruned(module: nn.Module) -> nn.Module:
    prune(module, PATTERN, method="identity")
    return module.eval()


def ops(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if "hinm." in str(node.target)]


LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Linear(16, 24), (2, 5, 16)),
    (lambda: nn.Linear(16, 24, bias=False), (16,)),
    (lambda: Conv1D(24, 16), (5, 16)),
    (lambda: nn.Conv1d(6, 16, 3, stride=2, padding=1), (2, 6, 11)),
    (lambda: nn.Conv1d(6, 16, 4, padding="same", bias=False), (2, 6, 11)),
    (lambda: nn.Conv2d(3, 16, (3, 4), padding="same", dilation=(1, 3)), (2, 3, 9, 8)),
    (lambda: nn.Conv2d(3, 16, 3, padding="valid"), (3, 9, 8)),
    (lambda: nn.Conv2d(4, 16, 3, padding=1, padding_mode="circular", groups=2), (2, 4, 9, 8)),
    (lambda: nn.Conv2d(16, 32, 1, groups=4, stride=(2, 1)), (2, 16, 5, 5)),
]


@pytest.mark.parametrize(("make", "size"), LAYERS)
def test_the_sparsified_graph_equals_the_graph_before(make: Any, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = pruned(make()), torch.randn(size)
    gm, inputs = capture(layer, x)
    dense = gm(*inputs)
    result = sparsify_layers_pass(gm, packed_by_name(gm, inputs, layer))
    assert result is gm
    assert len(ops(gm)) == 1
    assert len(find_layer_calls(gm)) == 0
    torch.testing.assert_close(gm(*inputs), dense, rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_called_twice_and_feeds_itself_shares_its_buffers() -> None:
    layer = pruned(nn.Linear(16, 16))
    gm, inputs = capture(lambda x: layer(layer(x).relu()), torch.randn(3, 16))
    dense = gm(*inputs)
    sparsify_layers_pass(gm, packed_by_name(gm, inputs, layer))
    assert len(ops(gm)) == 2
    assert len(gm.graph.find_nodes(op="get_attr")) == 7
    torch.testing.assert_close(gm(*inputs), dense, rtol=1e-5, atol=1e-5)


def test_a_layer_may_be_called_by_keyword() -> None:
    layer = pruned(nn.Linear(16, 16))
    gm, inputs = capture(lambda x: F.linear(bias=layer.bias, weight=layer.weight, input=x), torch.randn(3, 16))
    sparsify_layers_pass(gm, packed_by_name(gm, inputs, layer))
    assert len(ops(gm)) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda x, layer: x @ layer.weight.t(),
        lambda x, layer: F.linear(x, layer.weight * 2),
        lambda x, layer: torch.addmm(layer.bias, x, layer.weight, beta=2),
        lambda x, layer: torch.addmm(x, x, layer.weight),
        lambda x, layer: torch.addmm(layer.bias, x, layer.weight),  # as if it were transposed
    ],
)
def test_other_uses_of_a_weight_are_left_alone(use: Any) -> None:
    layer = pruned(nn.Linear(16, 16))
    gm, inputs = capture(lambda x: use(x, layer), torch.randn(16, 16))
    before = str(gm.graph)
    sparsify_layers_pass(gm, packed_by_name(gm, inputs, layer))
    assert str(gm.graph) == before


def test_a_weight_may_be_used_by_its_layer_and_otherwise() -> None:
    layer = pruned(nn.Linear(16, 16))
    gm, inputs = capture(lambda x: layer(x) + layer.weight.sum(), torch.randn(3, 16))
    dense = gm(*inputs)
    sparsify_layers_pass(gm, packed_by_name(gm, inputs, layer))
    assert len(ops(gm)) == 1
    torch.testing.assert_close(gm(*inputs), dense, rtol=1e-5, atol=1e-5)


def test_a_graph_without_packed_layers_stays_as_it_is() -> None:
    gm, _ = capture(pruned(nn.Linear(16, 16)), torch.randn(3, 16))
    before = gm.code
    assert sparsify_layers_pass(gm, {}).code == before


MASKS = {
    "no mask": {},
    "padding": {"src_key_padding_mask": torch.arange(5) >= torch.tensor([[3], [5]])},
    "causal": {"src_mask": nn.Transformer.generate_square_subsequent_mask(5)},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_unfused_encoder_layer_computes_what_the_fused_one_computes(
    masks: Any, norm_first: bool, activation: Any
) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first, activation=activation).eval()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    gm, inputs = capture(lambda x: layer(x, **masks), torch.randn(2, 5, 16))
    assert not find_layer_calls(gm)
    fused = find_fused_calls(gm)
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    assert [id(given[call.weight]) for call in fused] == [id(layer.linear1.weight), id(layer.linear2.weight)]
    with torch.no_grad():
        expected = gm(*inputs)
        unfuse_encoder_layers_pass(gm, {fused[1].weight.name})
        torch.testing.assert_close(gm(*inputs), expected, rtol=1e-5, atol=1e-6)
    assert [(call.weight, call.bias) for call in find_layer_calls(gm)] == [(call.weight, call.bias) for call in fused]
    assert not find_fused_calls(gm)


def test_a_fused_encoder_layer_that_is_not_asked_for_stays() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    gm, _ = capture(layer, torch.randn(2, 5, 16))
    before = str(gm.graph)
    assert str(unfuse_encoder_layers_pass(gm, set()).graph) == before
