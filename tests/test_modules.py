"""Packed layers and to_hinm: a converted model computes what the pruned one computes, and stays a proper module."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hinm import HiNMPattern, explain, pack, prune, to_hinm
from lightning_hinm.modules import HiNMConv2d, HiNMLayer, HiNMLinear, pack_layer
from lightning_hinm.prune import layout_of

PATTERN = HiNMPattern(vector_size=8)


class Conv1D(nn.Module):
    """As Hugging Face's: weight ``[in, out]``, known by its qualified name."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Net(nn.Module):
    """A shared layer, two tied ones, convolutions of both kinds, and something that is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, 16, 4, padding="same")
        self.linear = nn.Linear(16, 32)
        self.shared = self.linear
        self.tied = nn.Linear(16, 32, bias=False)
        self.tied.weight = self.linear.weight
        self.hf = Conv1D(24, 32)
        self.conv2 = nn.Conv2d(1, 16, (3, 2), padding=(1, 2), padding_mode="reflect")
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x).transpose(1, 2)
        y = self.hf(self.linear(y) + self.shared(y).relu() * self.tied(y))
        return self.norm(self.conv2(y.unsqueeze(1)))


def pruned(model: nn.Module, pattern: HiNMPattern = PATTERN) -> Any:
    prune(model, pattern, method="identity")
    return model.eval()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return pruned(Net())


X = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))

LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Linear(19, 24), (2, 5, 19)),
    (lambda: nn.Linear(19, 24, bias=False), (19,)),
    (lambda: Conv1D(24, 20), (2, 5, 20)),
    (lambda: nn.Conv1d(6, 16, 3, stride=2, padding=1, dilation=2), (2, 6, 11)),
    (lambda: nn.Conv1d(6, 16, 4, padding="same", bias=False), (6, 11)),
    (lambda: nn.Conv1d(8, 16, 3, padding=2, padding_mode="circular", groups=2), (2, 8, 11)),
    (lambda: nn.Conv2d(3, 16, 3, stride=(1, 2), padding=(0, 1)), (2, 3, 9, 8)),
    (lambda: nn.Conv2d(3, 16, (3, 4), padding="same", dilation=(1, 2)), (3, 9, 8)),
    (lambda: nn.Conv2d(3, 16, (3, 4), padding="same", padding_mode="replicate"), (2, 3, 9, 8)),
    (lambda: nn.Conv2d(3, 16, 3, padding="valid"), (2, 3, 9, 8)),
    (lambda: nn.Conv2d(16, 32, 1, groups=4, stride=2), (2, 16, 5, 5)),
]


@pytest.mark.parametrize(("make", "size"), LAYERS)
def test_a_packed_layer_computes_what_the_pruned_one_computes(make: Any, size: tuple[int, ...]) -> None:
    dense = pruned(make())
    x = torch.randn(size)
    layer = to_hinm(dense)
    assert isinstance(layer, HiNMLayer)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, dense.weight)
    assert isinstance(dense.weight, nn.Parameter)  # untouched


@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 16), lambda: nn.Conv2d(16, 16, 1)])
def test_a_packed_layer_is_called_by_keyword_as_the_dense_one(make: Any) -> None:
    dense, x = pruned(make()), torch.randn(16, 16, 16)
    torch.testing.assert_close(to_hinm(dense)(input=x), dense(input=x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "size"), LAYERS)
def test_a_packed_layer_has_the_geometry_that_users_read(make: Any, size: tuple[int, ...]) -> None:
    dense = pruned(make())
    layer = to_hinm(dense)
    names = ["in_features", "out_features", "nx", "nf", "in_channels", "out_channels", "kernel_size", "stride"]
    for name in [*names, "padding", "dilation", "groups", "padding_mode"]:
        if hasattr(dense, name):
            assert getattr(layer, name) == getattr(dense, name), name
    assert layer.weight.shape == dense.weight.shape
    assert "sparsity=0.75, 2:4" in repr(layer)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_converted_model_equals_the_pruned_one(net: Net, inplace: bool) -> None:
    dense = net(X)
    converted = to_hinm(net, inplace=inplace)
    torch.testing.assert_close(converted(X), dense, rtol=1e-5, atol=1e-5)
    assert (converted is net) == inplace
    assert isinstance(net.linear, nn.Linear) != inplace
    assert isinstance(converted.linear, HiNMLinear)
    assert converted.linear is converted.shared
    assert converted.tied is not converted.linear
    assert isinstance(converted.conv1, HiNMConv2d)
    assert isinstance(converted.hf, HiNMLinear)
    assert sum(isinstance(module, HiNMLayer) for module in converted.modules()) == 5


def test_conversion_copies_no_dense_weight_and_leaves_the_rest_its_own(net: Net) -> None:
    converted = to_hinm(net)
    theirs = {tensor.data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    assert not any(tensor.data_ptr() in theirs for tensor in (*converted.parameters(), *converted.buffers()))
    names = [name for name, _ in converted.named_parameters()]
    assert names == ["conv1.bias", "linear.bias", "hf.bias", "conv2.bias", "norm.weight", "norm.bias"]


def test_conversion_in_place_keeps_the_bias_parameters_that_an_optimizer_may_hold(net: Net) -> None:
    bias = net.linear.bias
    assert to_hinm(net, inplace=True).linear.bias is bias


def test_conversion_keeps_hooks_and_the_training_flag(net: Net) -> None:
    seen = []
    net.linear.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    net.linear.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(kwargs)), with_kwargs=True)
    net.conv1.train()
    converted = to_hinm(net)
    converted(X)
    assert seen == [0, HiNMLinear] * 2  # it is called twice
    assert converted.conv1.training
    assert not converted.linear.training


def living_bytes() -> int:
    """Bytes behind all tensors that anybody still holds; what several tensors share is counted once."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in gc.get_objects() if type(t) in TENSORS}
    return sum(storage.nbytes() for storage in storages.values())


TENSORS = (Tensor, nn.Parameter)


@pytest.mark.parametrize("method", ["identity", "exchange"])
def test_conversion_in_place_frees_the_bytes_that_the_report_says(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda workload: (1.0, 1.0))
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.Conv1d(5, 64, 3)).eval()
    prune(model, HiNMPattern(64, 0.75), method=method)
    weight, before = weakref.ref(model[0].weight), living_bytes()
    to_hinm(model, inplace=True)
    freed = before - living_bytes()
    assert weight() is None
    layers = explain(model).layers
    expected = sum(layer.dense_bytes - layer.bytes for layer in layers)
    assert expected > sum(layer.dense_bytes for layer in layers) / 2
    # Each dense layer takes its layout along, which no report counts.
    layouts = sum(8 * (layer.shape[0] + converted.vector_index.numel()) for layer, converted in _packed(model, layers))
    assert freed == pytest.approx(expected + layouts, rel=0.001)


def _packed(model: Any, layers: Any) -> list[tuple[Any, HiNMLayer]]:
    return [(layer, model.get_submodule(layer.name)) for layer in layers]


def test_converting_twice_changes_nothing_more(net: Net) -> None:
    once = to_hinm(net)
    twice = to_hinm(once)
    assert torch.equal(once(X), twice(X))


def test_a_plan_says_which_layers_are_converted(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sparse "wins" on everything of 32 rows: no test may hang on a clock.
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda w: (1.0, 0.5 if w.shape[0] == 32 else 1.0))
    for plan in ("auto", explain(net), explain(net, X)):
        converted = to_hinm(net, plan=plan)
        packed = {name for name, module in converted.named_modules() if isinstance(module, HiNMLayer)}
        assert packed == {"linear", "tied"}
    assert not any(isinstance(module, HiNMLayer) for module in to_hinm(net, plan="dense").modules())
    with pytest.raises(ValueError, match="plan='fast' must be 'sparse', 'auto', 'dense'"):
        to_hinm(net, plan="fast")


def test_a_model_without_layouts_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"Sequential: no layer has a layout.*prune\(\).*load_layouts"):
        to_hinm(nn.Sequential(nn.Linear(16, 16)))


def test_all_layers_outside_their_pattern_are_refused_at_once_and_nothing_is_done(net: Net) -> None:
    with torch.no_grad():
        net.linear.weight.add_(1)
        net.conv2.weight[0] = 1
    with pytest.raises(ValueError, match=r"(?s)Nothing was converted.*linear: \d+ of 512 weights.*conv2: \d+ of 96"):
        to_hinm(net, inplace=True)
    assert not any(isinstance(module, HiNMLayer) for module in net.modules())


def test_the_state_dict_loads_again_and_is_validated(net: Net) -> None:
    converted, other = to_hinm(net), to_hinm(pruned(Net()))
    state = converted.state_dict()
    assert not any("expansion" in key for key in state)
    other.load_state_dict({}, strict=False)
    assert 0 < other.linear.retained < 1  # type: ignore[operator]
    other.load_state_dict(state)
    assert other.linear.retained is None  # of another layout now
    torch.testing.assert_close(other(X), converted(X))
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    other = to_hinm(pruned(Net()))
    other.load_state_dict(torch.load(stream, weights_only=True), assign=True)
    torch.testing.assert_close(other(X), converted(X))

    before = copy.deepcopy(other.state_dict())
    state["linear.vector_index"] = torch.full_like(state["linear.vector_index"], 255)
    with pytest.raises(RuntimeError, match=r"linear: vector_index has columns outside 0\.\.15"):
        other.load_state_dict(state)
    assert torch.equal(other.linear.vector_index, before["linear.vector_index"])


def test_a_layer_has_another_packing_with_other_tensors_or_another_layout_only() -> None:
    layer, other = (to_hinm(pruned_by_search(nn.Linear(32, 32))) for _ in range(2))
    state, packing = copy.deepcopy(layer.state_dict()), layer.packing
    changes: list[tuple[Any, bool]] = [
        (lambda: layer.repack(layer.packed), False),
        (lambda: layer.load_state_dict(state), False),
        (lambda: layer.to(torch.float32), False),
        (lambda: layer.train(), False),
        (lambda: layer.repack(other.packed), True),
        (lambda: layer.load_state_dict(state), True),
        (lambda: layer.load_state_dict(copy.deepcopy(state), assign=True), True),
        (lambda: layer.to(torch.float64), True),
        (lambda: layer._apply(torch.clone), True),
    ]
    x = torch.randn(3, 32)
    for i, (change, another) in enumerate(changes):
        change()
        assert (layer.packing is not packing) == another, i
        packing = layer.packing
        dense = nn.functional.linear(x.to(layer.values.dtype), layer.weight, layer.bias)
        torch.testing.assert_close(layer(x.to(layer.values.dtype)), dense, rtol=1e-5, atol=1e-5)
    assert copy.deepcopy(layer).packing is not packing
    assert pickle.loads(pickle.dumps(layer)).packing is not packing  # noqa: S301


def pruned_by_search(model: nn.Module) -> Any:
    prune(model, PATTERN)
    return model.eval()


def test_a_damaged_packed_weight_is_refused() -> None:
    dense = pruned(nn.Linear(16, 16))
    packed = pack(dense.weight, layout_of(dense))  # type: ignore[arg-type]
    packed.vector_index.fill_(3)
    with pytest.raises(ValueError, match="HiNMLinear: vector_index names a column twice"):
        HiNMLinear.from_packed(dense, packed)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda packed: packed.vector_index.fill_(3), "HiNMLinear: vector_index names a column twice"),
        (lambda packed: packed.vector_index.fill_(99), "HiNMLinear: vector_index has columns outside 0..15"),
        (lambda packed: packed.output_order.fill_(3), "HiNMLinear: output_order is not a permutation"),
        (lambda packed: packed.metadata.fill_(0), "HiNMLinear: metadata does not rise inside each group"),
    ],
)
def test_a_layer_repacks_no_damaged_weight_and_stays_as_it_was(damage: Any, why: str) -> None:
    layer, x = to_hinm(pruned(nn.Linear(16, 16))), torch.randn(3, 16)
    expected, packed = layer(x), copy.deepcopy(layer).packed
    damage(packed)
    with pytest.raises(ValueError, match=why):
        layer.repack(packed)
    assert torch.equal(layer(x), expected)


def test_a_layer_repacks_no_weight_of_another_shape_or_pattern() -> None:
    layer = to_hinm(pruned(nn.Linear(16, 16)))
    for other in (pruned(nn.Linear(16, 32)), pruned(nn.Linear(16, 16), HiNMPattern(8, 0.0))):
        with pytest.raises(
            ValueError, match=r"HiNMLinear: the packed weight is \[\d+, 16\] of .* Make a new layer of it"
        ):
            layer.repack(to_hinm(other).packed)


def test_a_packed_weight_of_another_layer_is_refused() -> None:
    dense = pruned(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"weight is \[16, 32\].*packed weight is \[16, 16\]"):
        HiNMLinear.from_packed(nn.Linear(32, 16), pack_layer(dense).packed)
    with pytest.raises(ValueError, match="got a Linear, but it takes only conv1d and conv2d"):
        HiNMConv2d.from_packed(dense, pack_layer(dense).packed)


def test_the_dense_weight_can_be_read_but_not_set(net: Net) -> None:
    converted = to_hinm(net)
    assert torch.equal(converted.conv1.weight, net.conv1.weight)
    with pytest.raises(AttributeError):
        converted.conv1.weight = torch.zeros(1)
    with pytest.raises(KeyError):
        converted.conv1.weight = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_converted_model_can_be_copied_and_pickled(net: Net, clone: Any) -> None:
    if clone is not copy.deepcopy:
        net.hf = nn.Linear(32, 24)  # the stand-in for Hugging Face's class cannot be found by its name
    converted = to_hinm(net)
    again = clone(converted)
    assert torch.equal(again(X), converted(X))
    assert again.linear is again.shared
    assert again.linear.values.data_ptr() != converted.linear.values.data_ptr()
    assert again.linear.retained == layout_of(net.linear).retained < 1  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_converted_model_follows_to(net: Net, dtype: torch.dtype) -> None:
    converted = to_hinm(net).to(dtype)
    assert converted.linear.values.dtype == dtype
    assert converted.linear.expansion.dtype == (torch.uint8 if dtype == torch.bfloat16 else dtype)
    assert converted.linear.vector_index.dtype == torch.uint8
    reference = copy.deepcopy(net).to(dtype)(X.to(dtype))
    assert (converted(X.to(dtype)) - reference).norm() <= 1e-2 * reference.norm()


def test_frozen_sparse_layers_let_gradients_through_to_what_stands_before_them(net: Net) -> None:
    model = nn.Sequential(nn.Linear(10, 10), to_hinm(net))
    model(X).square().sum().backward()
    dense = nn.Sequential(model[0], net)
    expected = torch.autograd.grad(dense(X).square().sum(), model[0].weight)[0]
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-4, atol=1e-4)
    assert model[1].linear.bias.grad is not None


def test_layers_packed_under_inference_mode_serve_a_training_too(net: Net) -> None:
    with torch.inference_mode():
        converted = to_hinm(net)
    x = X.clone().requires_grad_()
    converted(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("grad", [False, True])
def test_a_converted_model_compiles_whole_and_dynamic(net: Net, grad: bool) -> None:
    converted = to_hinm(net)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(grad):
        for batch in (3, 2, 5):
            x = torch.randn(batch, 6, 10)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_a_converted_model_exports_with_any_batch(net: Net, strict: bool) -> None:
    converted = to_hinm(net)
    program = torch.export.export(converted, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("hinm.linear.default") == 4
    assert targets.count("hinm.conv2d.default") == 2
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    x = torch.randn(7, 6, 10)
    torch.testing.assert_close(torch.export.load(stream).module()(x), net(x), rtol=1e-5, atol=1e-5)


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    return pruned(nn.TransformerEncoder(layer, 2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_transformer_encoder_leaves_its_fused_path_and_attention_stays_dense(mode: Any) -> None:
    model = encoder()
    converted = to_hinm(model)
    x, padding = torch.randn(3, 5, 32), torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    with mode():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
        sparse, dense = (each(x, src_key_padding_mask=padding)[~padding] for each in (converted, model))
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    assert isinstance(converted.layers[0].linear1, HiNMLinear)
    assert not isinstance(converted.layers[0].self_attn.out_proj, HiNMLayer)
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.layers[0].activation_relu_or_gelu  # the dense model keeps its own
    assert model.use_nested_tensor
