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
from tests.graphs import Chain, capture, packed_by_name, set_orders, sparse_graph, sparse_ops
from tests.ptx.device import emulated
from tests.strategies import layouts, saliencies

PATTERN = HiNMPattern(vector_size=8)
IMAGES = torch.randn(2, 8, 12, 12)


class Conv1D(nn.Module):
    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


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
    x = (torch.randn(3, 5, 32) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 12, 12)).half()
    with emulated():
        gm, inputs = capture(model, x)
        sparsify_layers_pass(gm, packed_by_name(gm, inputs, layer))
        with torch.no_grad():
            expected = gm(*inputs)[0]
            fuse_activations_pass(gm)
            (op,) = sparse_ops(gm)
            assert operand(op, "activation", "none") == name
            assert (next(iter(op.users)).op == "output") == (name != "none")
            torch.testing.assert_close(gm(*inputs)[0], expected, rtol=4e-3, atol=4e-3)


def test_on_a_cpu_the_activation_stays_for_inductor_to_fuse() -> None:
    model = pruned(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)))
    gm, _ = sparse_graph(model, torch.randn(3, 32))
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
    set_orders(model, HiNMPattern(32, window=None))
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
            first, second = sparse_ops(gm)
            assert operand(first, "activation", "none") == "relu"
            assert torch.equal(getattr(gm, operand(first, "output_order").target), torch.arange(64))
            assert operand(second, "restore").op == "get_attr"
            torch.testing.assert_close(gm(*inputs)[0], expected, rtol=2e-3, atol=2e-3)


def test_a_pass_lets_go_of_tensors_that_nothing_reads_any_more() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    set_orders(model, PATTERN)
    gm, _ = sparse_graph(model, torch.randn(3, 16))
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
    set_orders(model, PATTERN)
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
    set_orders(model, HiNMPattern(32))
    with emulated():
        gm, inputs = capture(model, IMAGES.half())
        packed = packed_by_name(gm, inputs, first, second)
        MADE[:] = packed.values()
        sparsify_layers_pass(gm, packed)
        with torch.no_grad():
            expected = gm(*inputs)[0]
            assert fold_all(gm, inputs) == 1
            fuse_activations_pass(absorb_orders_pass(gm))
            one, other = sparse_ops(gm)
            assert operand(one, "activation") == "relu"
            assert other.args[0] is one
            assert torch.equal(getattr(gm, operand(one, "output_order").target), torch.arange(64))
            torch.testing.assert_close(gm(*inputs)[0], expected, rtol=4e-3, atol=4e-3)
