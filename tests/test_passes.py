"""Graph rewrites, on graphs as Dynamo hands them over."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx, nn

from lightning_hinm import HiNMPattern, hinm_mask, pack, prune, to_hinm, unpack
from lightning_hinm.modules import PACKED_TENSORS, HiNMLayer, pack_layer
from lightning_hinm.passes import (
    absorb_orders_pass,
    find_fused_calls,
    find_layer_calls,
    find_norm_calls,
    fold_norm,
    fold_norms_pass,
    fuse_activations_pass,
    lift_tensors_pass,
    sparsify_layers_pass,
    unfuse_encoder_layers_pass,
)
from lightning_hinm.passes.sparsify import operand
from tests.ptx.device import emulated
from tests.strategies import layouts, saliencies

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


# ---------------------------------------------------------------- absorbed orders and fused activations


class Chain(nn.Module):
    """Layers, and what lies between them, as a function."""

    def __init__(self, layers: list[nn.Module], forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def mlp(hidden: int = 64) -> list[nn.Module]:
    return [nn.Linear(32, hidden), nn.Linear(hidden, 48)]


def convs() -> list[nn.Module]:
    norm = nn.BatchNorm2d(32)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)  # type: ignore[arg-type]
    return [nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 48, 3), norm]


TOKENS, IMAGES = torch.randn(3, 5, 32), torch.randn(2, 8, 12, 12)
ABSORBED: dict[str, tuple[list[nn.Module], Callable[..., Tensor], Tensor]] = {
    "straight": (mlp(), lambda x, a, b: b(a(x)), TOKENS),
    "gelu": (mlp(), lambda x, a, b: b(F.gelu(a(x))), TOKENS),
    "gelu by hand": (mlp(), lambda x, a, b: b((y := a(x)) * 0.5 * (1 + torch.tanh(y + 0.04 * y.pow(3)))), TOKENS),
    "dropout": (mlp(), lambda x, a, b: b(F.dropout(a(x).relu(), 0.1, False)), TOKENS),
    "two readers": ([*mlp(), nn.Linear(64, 16)], lambda x, a, b, c: b(y := torch.tanh(a(x))).sum() + c(y), TOKENS),
    "flattened": (mlp(), lambda x, a, b: b(a(x).view(-1, 64)).view(3, 5, 48), TOKENS),
    "without a bias": ([nn.Linear(32, 64, bias=False), nn.Linear(64, 48)], lambda x, a, b: b(a(x)), TOKENS),
    "odd rows": (mlp(60), lambda x, a, b: b(a(x)), TOKENS),
    "convolutions": (convs(), lambda x, a, b, n: b(F.relu(n(a(x)))), IMAGES),
    "pooling": (convs(), lambda x, a, b, n: b(F.max_pool2d(a(x), 2) * 2.0 + 1.0), IMAGES),
    "average": (convs(), lambda x, a, b, n: b(F.avg_pool2d(a(x), 2).sigmoid()), IMAGES),
    "windows": ([nn.Linear(32, 96), nn.Linear(96, 48)], lambda x, a, b: b(a(x)), TOKENS),
}
RESTORED: dict[str, tuple[list[nn.Module], Callable[..., Tensor], Tensor]] = {
    "residual": ([nn.Linear(32, 32), nn.Linear(32, 32)], lambda x, a, b: b(a(x) + x), TOKENS),
    "result": ([nn.Linear(32, 32), nn.Linear(32, 32)], lambda x, a, b: b(y := a(x)) + y, TOKENS),
    "two orders": ([*mlp(), nn.Linear(32, 64)], lambda x, a, b, c: b(F.silu(a(x)) * c(x)), TOKENS),
    "softmax": (mlp(), lambda x, a, b: b(a(x).softmax(-1)), TOKENS),
    "layer norm": (mlp(), lambda x, a, b: b(F.layer_norm(a(x), (64,))), TOKENS),
    "heads": (mlp(), lambda x, a, b: b(a(x).view(3, 5, 8, 8).transpose(2, 3).reshape(3, 5, 64)), TOKENS),
    "slice": ([nn.Linear(32, 64), nn.Linear(32, 48)], lambda x, a, b: b(a(x)[..., :32]), TOKENS),
    "scale by channel": (mlp(), lambda x, a, b: b(a(x) * torch.arange(64.0)), TOKENS),
    "groups": ([nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3, groups=2)], lambda x, a, b: b(a(x)), IMAGES),
    "training batch norm": (convs(), lambda x, a, b, n: b(F.batch_norm(a(x), None, None, training=True)), IMAGES),
    "active dropout": (mlp(), lambda x, a, b: b(F.dropout(a(x), 0.0, True)), TOKENS),
    "statistics": (mlp(), lambda x, a, b: b(y := a(x)) + y.std(), TOKENS),
    "dense reader": ([nn.Linear(32, 64), nn.Linear(64, 4)], lambda x, a, b: b(a(x)), TOKENS),
}


def sparsified(layers: list[nn.Module], function: Callable[..., Tensor], x: Tensor, window: int | None = 16) -> Any:
    """The sparsified graph of a pruned chain, its inputs, and its result."""
    model = Chain(layers, function).eval()
    prune(model, HiNMPattern(8, window=window), generator=torch.Generator().manual_seed(1))
    gm, inputs = capture(model, x)
    modules = [module for module in layers if getattr(module, "hinm_layout", None) is not None]
    sparsify_layers_pass(gm, packed_by_name(gm, inputs, *modules))
    with torch.no_grad():
        return gm, inputs, gm(*inputs)[0]


@pytest.mark.parametrize("case", ABSORBED.values(), ids=ABSORBED)
def test_an_order_that_all_readers_can_be_told_of_is_absorbed(
    case: tuple[list[nn.Module], Callable[..., Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning_hinm.passes")
    gm, inputs, expected = sparsified(*case)
    absorb_orders_pass(gm)
    assert caplog.messages[-1] == "absorb_orders_pass: 1 orders"
    first = next(node for node in gm.graph.nodes if "hinm." in str(node.target))
    order = getattr(gm, operand(first, "output_order").target)
    assert torch.equal(order, torch.arange(len(order)))
    assert getattr(gm, operand(first, "restore").target).numel() == 0
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", RESTORED.values(), ids=RESTORED)
def test_an_order_that_anything_else_meets_is_restored(
    case: tuple[list[nn.Module], Callable[..., Tensor], Tensor],
) -> None:
    gm, _, _ = sparsified(*case)
    before = str(gm.graph)
    assert str(absorb_orders_pass(gm).graph) == before


def test_orders_are_absorbed_along_a_chain() -> None:
    layers = [*mlp(), nn.Linear(48, 40), nn.Linear(40, 32)]
    gm, inputs, expected = sparsified(layers, lambda x, a, b, c, d: d(F.relu(c(F.relu(b(F.relu(a(x))))))), TOKENS)
    absorb_orders_pass(gm)
    restored = [getattr(gm, operand(node, "restore").target).numel() for node in gm.graph.nodes if ops_of(node)]
    assert [bool(count) for count in restored] == [False, False, False, True]
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_called_twice_absorbs_each_call_by_itself() -> None:
    layers = [nn.Linear(32, 32), nn.Linear(32, 32)]
    gm, inputs, expected = sparsified(layers, lambda x, a, b: b(a(a(x).relu())) + a(x), TOKENS)
    absorb_orders_pass(gm)
    restored = [getattr(gm, operand(node, "restore").target).numel() for node in gm.graph.nodes if ops_of(node)]
    assert sorted(map(bool, restored)) == [False, False, True, True]
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


def ops_of(node: fx.Node) -> bool:
    return "hinm." in str(node.target)


def test_a_reader_on_a_gpu_keeps_its_columns_in_their_runs() -> None:
    pattern = HiNMPattern(32, window=16)
    for window, absorbed in ((16, False), (None, True)):
        model = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64)).half().eval()
        prune(model, replace(pattern, window=window), generator=torch.Generator().manual_seed(1))
        x = torch.randn(5, 32).half()
        with emulated():
            gm, inputs = capture(model, x)
            sparsify_layers_pass(gm, packed_by_name(gm, inputs, model[0], model[2]))
            with torch.no_grad():
                expected = gm(*inputs)[0]
                before = str(gm.graph)
                absorb_orders_pass(gm)
                assert (str(gm.graph) != before) == absorbed
                torch.testing.assert_close(gm(*inputs)[0], expected, rtol=2e-3, atol=2e-3)


ACTIVATED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.relu": ("relu", F.relu),
    "torch.relu": ("relu", torch.relu),
    "relu": ("relu", lambda x: x.relu()),
    "relu in place": ("relu", lambda x: F.relu(x, inplace=True)),
    "gelu": ("gelu", F.gelu),
    "gelu tanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "silu": ("silu", F.silu),
    "tanh": ("none", torch.tanh),
    "read twice": ("none", lambda x: x.relu() + x),
}


@pytest.mark.parametrize("case", ACTIVATED.values(), ids=ACTIVATED)
@pytest.mark.parametrize("layer", [nn.Linear(32, 64), nn.Conv2d(8, 64, 3)], ids=["linear", "conv2d"])
def test_a_kernel_applies_the_activation_that_follows(
    case: tuple[str, Callable[[Tensor], Tensor]], layer: nn.Module
) -> None:
    name, function = case
    model = Chain([layer], lambda x, a: function(a(x))).half().eval()
    prune(model, HiNMPattern(32), method="identity")
    x = (TOKENS if isinstance(layer, nn.Linear) else IMAGES).half()
    with emulated():
        gm, inputs = capture(model, x)
        sparsify_layers_pass(gm, packed_by_name(gm, inputs, layer))
        with torch.no_grad():
            expected = gm(*inputs)[0]
            fuse_activations_pass(gm)
            (op,) = [node for node in gm.graph.nodes if ops_of(node)]
            assert operand(op, "activation", "none") == name
            assert (next(iter(op.users)).op == "output") == (name != "none")
            torch.testing.assert_close(gm(*inputs)[0], expected, rtol=4e-3, atol=4e-3)


def test_on_a_cpu_the_activation_stays_for_inductor_to_fuse() -> None:
    gm, _, _ = sparsified(*ABSORBED["gelu"])
    before = str(gm.graph)
    assert str(fuse_activations_pass(gm).graph) == before


def converted_graph(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[Any], dict[str, Tensor]]:
    """The graph of a converted model, its inputs, and those of them that are packed tensors."""
    gm, inputs = capture(model, x)
    owned = {id(tensor) for tensor in model.buffers()}
    nodes = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    return gm, inputs, {node.name: tensor for node, tensor in nodes if id(tensor) in owned}


def test_lifted_tensors_are_those_of_the_layers_and_what_follows_can_read_them() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).half().eval()
    prune(model, HiNMPattern(32, window=None), generator=torch.Generator().manual_seed(1))
    with emulated():
        converted = to_hinm(model)
        gm, inputs, tensors = converted_graph(converted, torch.randn(5, 32).half())
        with torch.no_grad():
            expected = gm(*inputs)[0]
            before = str(gm.graph)
            assert str(absorb_orders_pass(gm).graph) == before
            lift_tensors_pass(gm, tensors)
            held = {id(tensor) for tensor in gm.buffers()}
            assert held == {id(tensor) for tensor in tensors.values()}
            fuse_activations_pass(absorb_orders_pass(gm))
            first, second = (node for node in gm.graph.nodes if ops_of(node))
            assert operand(first, "activation", "none") == "relu"
            assert torch.equal(getattr(gm, operand(first, "output_order").target), torch.arange(64))
            assert operand(second, "restore").op == "get_attr"
            torch.testing.assert_close(gm(*inputs)[0], expected, rtol=2e-3, atol=2e-3)


def test_a_pass_lets_go_of_tensors_that_nothing_reads_any_more() -> None:
    gm, _, _ = sparsified(*ABSORBED["straight"])
    absorb_orders_pass(gm)
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    assert {name for name, _ in gm.named_buffers()} == read
    assert all(node.users for node in gm.graph.find_nodes(op="get_attr"))


@given(st.data())
def test_a_folded_layer_computes_the_norm_of_the_layer(data: st.DataObject) -> None:
    size = data.draw(saliencies()).shape
    layout = data.draw(layouts(*size))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight, vectors = (torch.randn(n, size[0], generator=generator).double() for n in (size[1], 5))
    weight = weight.t() * hinm_mask(weight.t().abs(), layout)
    mean, var, scale, shift, bias = vectors[0], vectors[1].square(), vectors[2], vectors[3], vectors[4]
    given_ones = data.draw(st.sets(st.sampled_from(["weight", "bias", "layer_bias"])))
    own: dict[str, Any] = {"weight": scale, "bias": shift, "layer_bias": bias}
    own = {name: tensor for name, tensor in own.items() if name in given_ones}
    packed = pack(weight, layout)
    folded, folded_bias = fold_norm(packed, mean, var, **own, eps=0.1)
    x = torch.randn(7, size[1], generator=generator).double()
    y = F.linear(x, weight, own.get("layer_bias"))
    expected = F.batch_norm(y, mean, var, own.get("weight"), own.get("bias"), training=False, eps=0.1)
    torch.testing.assert_close(F.linear(x, unpack(folded), folded_bias), expected)
    assert torch.equal(unpack(packed), weight)  # untouched


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_folded_weight_is_rounded_once(dtype: torch.dtype) -> None:
    layer = pruned(nn.Linear(32, 32)).to(dtype)
    packed = pack_layer(layer).packed
    mean, var, scale = torch.randn(32).to(dtype), torch.rand(32).to(dtype) + 0.5, torch.randn(32).to(dtype)
    folded, bias = fold_norm(packed, mean, var, weight=scale, eps=1e-5)
    exact = scale.double() / (var.double() + 1e-5).sqrt()
    values = packed.values.double() * exact[packed.output_order.long()].unsqueeze(1)
    assert folded.values.dtype == bias.dtype == dtype
    half = torch.finfo(dtype).eps / 2 * (1 if dtype != torch.float32 else 3)  # where wide is no wider, it rounds twice
    assert ((folded.values.double() - values).abs() <= half * values.abs() + torch.finfo(dtype).tiny).all()
    assert ((bias.double() + mean.double() * exact).abs() <= half * (mean.double() * exact).abs()).all()


def test_rows_that_leave_the_range_of_their_dtype_are_refused() -> None:
    packed = pack_layer(pruned(nn.Linear(16, 16)).half(), name="0").packed
    zero, one = torch.zeros(16), torch.ones(16)
    for scale in (1e-6, 1e8):
        with pytest.raises(ValueError, match=r"^a: with the BatchNorm.* 16 of 16 rows leave .*float16.*reset\(\)"):
            fold_norm(packed, zero, one, weight=one * scale, eps=0.0, name="a")
    with pytest.raises(ValueError, match="1 of 16 rows"):
        fold_norm(packed, F.one_hot(torch.tensor(3), 16) * 1e6, one, eps=0.0)
    assert not fold_norm(packed, zero, one, weight=zero, eps=0.0)[0].values.any()  # a channel may be switched off
    wide = replace(packed, values=packed.values.bfloat16())
    assert fold_norm(wide, zero, one, weight=one * 1e-6, eps=0.0)[0].values.isfinite().all()


def norms() -> list[Any]:
    """Of a Conv2d's 32 channels, or of a Conv1d's or a linear layer's, as if they had been trained."""
    made: list[Any] = [nn.BatchNorm2d(32, eps=0.1), nn.BatchNorm1d(32, affine=False), nn.BatchNorm1d(32, momentum=None)]
    for norm in made:
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 2.0)
    return made


ROWS, SERIES = torch.randn(5, 16), torch.randn(2, 16, 7)
NORMED: dict[str, tuple[Any, Callable[..., Tensor], Tensor]] = {
    "convolution": (nn.Conv2d(8, 32, 3), lambda x, a, n, m, k: n(a(x)), IMAGES),
    "no bias": (nn.Conv2d(8, 32, 3, bias=False), lambda x, a, n, m, k: F.relu(n(a(x))), IMAGES),
    "groups": (nn.Conv2d(8, 32, 3, groups=2), lambda x, a, n, m, k: n(a(x)), IMAGES),
    "affine=False": (nn.Conv1d(16, 32, 3), lambda x, a, n, m, k: m(a(x)), SERIES),
    "momentum=None": (nn.Conv1d(16, 32, 3, bias=False), lambda x, a, n, m, k: k(a(x)), SERIES),
    "even padding": (nn.Conv1d(16, 32, 4, padding="same"), lambda x, a, n, m, k: k(a(x)), SERIES),
    "linear": (nn.Linear(16, 32), lambda x, a, n, m, k: k(a(x)), ROWS),
    "called twice": (nn.Linear(16, 32), lambda x, a, n, m, k: m(a(x)) + k(a(x * 2)), ROWS),
    "by keyword": (
        nn.Linear(16, 32, bias=False),
        lambda x, a, n, m, k: F.batch_norm(running_var=k.running_var, running_mean=k.running_mean, input=a(x)),
        ROWS,
    ),
}
CARRIED: dict[str, tuple[Any, Callable[..., Tensor], Tensor]] = {
    "rows read elsewhere": (nn.Conv2d(8, 32, 3), lambda x, a, n, m, k: n(y := a(x)) + y, IMAGES),
    "rows read elsewhere, squeezed": (nn.Conv1d(16, 32, 3), lambda x, a, n, m, k: m(y := a(x)) + y, SERIES),
    "another dimension": (nn.Linear(16, 32), lambda x, a, n, m, k: k(a(x)), torch.randn(5, 32, 16)),
    "a single image": (nn.Conv2d(8, 32, 3), lambda x, a, n, m, k: k(a(x)), torch.randn(8, 34, 12)),
    "a single series": (nn.Conv1d(16, 32, 3), lambda x, a, n, m, k: k(a(x)), torch.randn(16, 34)),
    "not at once": (nn.Linear(16, 32), lambda x, a, n, m, k: k(a(x).relu()), ROWS),
    "statistics of the batch": (
        nn.Linear(16, 32),
        lambda x, a, n, m, k: F.batch_norm(a(x), None, None, training=True),
        ROWS,
    ),
    "training": (
        nn.Linear(16, 32),
        lambda x, a, n, m, k: F.batch_norm(a(x), k.running_mean.clone(), k.running_var.clone(), training=True),
        ROWS,
    ),
    "a computed weight": (
        nn.Linear(16, 32),
        lambda x, a, n, m, k: F.batch_norm(a(x), k.running_mean, k.running_var, k.weight * 2),
        ROWS,
    ),
    "a computed bias": (
        nn.Linear(16, 32),
        lambda x, a, n, m, k: k(F.linear(x, a.weight, a.bias + 1)),
        ROWS,
    ),
}


def fold_all(gm: fx.GraphModule, inputs: list[Any]) -> int:
    """How many norms of a sparsified graph were folded."""
    given_ones = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    layers = {}
    with torch.no_grad():
        for call in find_norm_calls(gm):
            held = {name: getattr(gm, operand(call.op, name).target) for name in PACKED_TENSORS}
            (layer,) = [each for each in MADE if each.values is held["values"]]
            tensors: dict[str, Any] = {name: given_ones[node] for name, node in call.tensors.items()}
            packed, bias = fold_norm(layer.packed, **tensors, eps=call.eps)
            layers[call.op.name] = HiNMLayer(packed, nn.Parameter(bias), kind=layer.kind, groups=layer.groups)
    fold_norms_pass(gm, layers)
    return len(layers)


MADE: list[HiNMLayer] = []


def normed(case: tuple[Any, Callable[..., Tensor], Tensor]) -> tuple[fx.GraphModule, list[Any]]:
    torch.manual_seed(0)
    layer, function, x = case
    model = Chain([layer, *norms()], function).eval()
    prune(model, PATTERN, generator=torch.Generator().manual_seed(1))
    gm, inputs = capture(model, x)
    packed = packed_by_name(gm, inputs, layer)
    MADE[:] = packed.values()
    return sparsify_layers_pass(gm, packed), inputs


def norms_in(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=F.batch_norm))


@pytest.mark.parametrize("case", NORMED.values(), ids=NORMED)
def test_a_norm_that_alone_reads_the_rows_is_folded(case: tuple[Any, Callable[..., Tensor], Tensor]) -> None:
    gm, inputs = normed(case)
    count = norms_in(gm)
    with torch.no_grad():
        expected = gm(*inputs)[0]
        assert fold_all(gm, inputs) == count
        assert norms_in(gm) == 0
        assert len(list(gm.buffers())) == 8 * count  # nothing of the unfolded layer is held
        torch.testing.assert_close(gm(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CARRIED.values(), ids=CARRIED)
def test_a_norm_that_anything_else_could_tell_from_its_layer_stays(
    case: tuple[Any, Callable[..., Tensor], Tensor],
) -> None:
    gm, inputs = normed(case)
    before = str(gm.graph)
    assert fold_all(gm, inputs) == 0
    assert str(gm.graph) == before


def test_behind_a_folded_norm_orders_are_absorbed_and_activations_applied() -> None:
    first, second, norm = nn.Conv2d(8, 64, 1), nn.Conv2d(64, 32, 1), nn.BatchNorm2d(64)
    nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
    model = Chain([first, second, norm], lambda x, a, b, n: b(F.relu(n(a(x))))).half().eval()
    prune(model, HiNMPattern(32), generator=torch.Generator().manual_seed(1))
    with emulated():
        gm, inputs = capture(model, IMAGES.half())
        packed = packed_by_name(gm, inputs, first, second)
        MADE[:] = packed.values()
        sparsify_layers_pass(gm, packed)
        with torch.no_grad():
            expected = gm(*inputs)[0]
            assert fold_all(gm, inputs) == 1
            fuse_activations_pass(absorb_orders_pass(gm))
            one, other = (node for node in gm.graph.nodes if ops_of(node))
            assert operand(one, "activation") == "relu"
            assert other.args[0] is one
            assert torch.equal(getattr(gm, operand(one, "output_order").target), torch.arange(64))
            torch.testing.assert_close(gm(*inputs)[0], expected, rtol=4e-3, atol=4e-3)
