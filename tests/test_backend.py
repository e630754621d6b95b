"""torch.compile(model, backend="hinm"): the result of the dense masked model, whatever happens to its weights."""

import copy
import functools
import gc
import itertools
import logging
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

import lightning_hinm.backend
import lightning_hinm.twins
from lightning_hinm import HiNMPattern, prune, repack, save_hinm, to_hinm
from lightning_hinm.ops import EXPANDED, warn_once
from lightning_hinm.plan import Decision
from lightning_hinm.prune import layout_of
from lightning_hinm.workload import Workload
from tests.graphs import set_orders
from tests.test_workload import replayed_everywhere

pytestmark = pytest.mark.usefixtures("fresh_compiler")
PATTERN = HiNMPattern(vector_size=8)
ROOT = Path(__file__).parents[1]


def leave(model: nn.Module) -> nn.Module:
    return model


BOTH = pytest.mark.parametrize("convert", [leave, to_hinm])


class Net(nn.Module):
    """A shared layer, two tied ones, convolutions of both kinds, and a head that is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, 16, 3, padding=1)
        self.linear = nn.Linear(16, 32)
        self.shared = self.linear
        self.tied = nn.Linear(16, 32, bias=False)
        self.tied.weight = self.linear.weight
        self.conv2 = nn.Conv2d(1, 16, (3, 4), padding="same", padding_mode="circular")
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x).transpose(1, 2)
        y = self.linear(y) + self.shared(y).relu() * self.tied(y)
        return self.head(self.norm(self.conv2(y.unsqueeze(1))))


def pruned(model: nn.Module, pattern: HiNMPattern = PATTERN) -> Any:
    prune(model, pattern, method="identity")
    return model.eval()


def compiled(model: Any, inner: str = "eager", plan: str = "sparse", **options: Any) -> Any:
    return torch.compile(model, backend="hinm", fullgraph=True, options={"plan": plan, "inner": inner}, **options)


def sparse_calls(function: Any, *inputs: Tensor) -> int:
    """How many sparse ops a call runs, as a profiler counts them."""
    with profile() as record:
        function(*inputs)
    return sum(event.count for event in record.key_averages() if event.key in ("hinm::linear", "hinm::conv2d"))


def assert_same(function: Any, model: Any, *inputs: Tensor, calls: int = 5) -> None:
    torch.testing.assert_close(function(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    assert sparse_calls(function, *inputs) == calls


@pytest.fixture
def net() -> Net:
    return pruned(Net())


X = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_compiled_model_equals_the_pruned_one(net: Net, inner: str, mode: Any) -> None:
    with mode():
        assert_same(compiled(net, inner), net, X)


def mlp() -> Any:
    return pruned(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)))


def test_inductor_compiles_the_rest_and_sees_weights_change() -> None:
    model, x = mlp(), torch.randn(3, 16)
    function = compiled(model, "inductor")
    with torch.inference_mode():
        assert_same(function, model, x, calls=2)
        model[0].weight.mul_(2)
        assert_same(function, model, x, calls=2)


def test_one_graph_serves_all_batch_sizes_above_one() -> None:
    model = mlp()
    function = compiled(model, "aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        for batch in (2, 3, 7, 64, 65):
            assert_same(function, model, torch.randn(batch, 16), calls=2)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert_same(function, model, torch.randn(1, 16), calls=2)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_one_graph_serves_all_sizes_of_unevenly_padded_images_and_signals(inner: str) -> None:
    for layer, sizes in (
        (nn.Conv2d(16, 32, 2, padding="same"), [(2, 16, 5, 6), (3, 16, 7, 9), (5, 16, 11, 8)]),
        (nn.Conv1d(16, 32, 4, padding="same"), [(2, 16, 9), (3, 16, 7), (5, 16, 11)]),
    ):
        model = pruned(layer)
        function = compiled(model, inner, dynamic=True)
        torch._dynamo.utils.counters.clear()
        with torch.inference_mode():
            for size in sizes:
                assert_same(function, model, torch.randn(size), calls=1)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("lower", ["cast", "autocast"])
def test_bfloat16_is_as_close_as_the_dense_model(net: Net, lower: str) -> None:
    exact = net(X)
    if lower == "cast":
        model, x = copy.deepcopy(net).bfloat16(), X.bfloat16()
        with torch.inference_mode():
            out, count = compiled(model, "aot_eager")(x), sparse_calls(compiled(model, "aot_eager"), x)
    else:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            out, count = compiled(net, "aot_eager")(X), sparse_calls(compiled(net, "aot_eager"), X)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() <= 1e-2 * exact.norm()
    assert count == 5


def test_a_function_that_closes_over_the_model_is_compiled_too(net: Net) -> None:
    class Engine:
        def __init__(self, model: nn.Module) -> None:
            self.models = [model]

        def run(self, x: Tensor) -> Tensor:
            return self.models[0](x) + 1

    with torch.inference_mode():
        assert_same(compiled(lambda x: net(x) * 2), lambda x: net(x) * 2, X)
        assert_same(compiled(Engine(net).run), Engine(net).run, X)


def test_a_single_layer_is_a_model() -> None:
    layer = pruned(nn.Linear(16, 32))
    with torch.inference_mode():
        assert_same(compiled(layer), layer, torch.randn(4, 16), calls=1)


def test_a_graph_break_loses_no_layer(net: Net) -> None:
    def forward(x: Tensor) -> Tensor:
        y = net.linear(net.conv1(x).transpose(1, 2))
        torch._dynamo.graph_break()
        return net.tied(y[..., :16])

    function = torch.compile(forward, backend="hinm", options={"plan": "sparse", "inner": "eager"})
    with torch.inference_mode():
        assert_same(function, forward, X, calls=3)


def test_a_converted_model_compiles_to_the_same_ops(net: Net) -> None:
    with torch.inference_mode(), warnings.catch_warnings():
        assert_same(compiled(to_hinm(net), "aot_eager"), net, X)


def double(net: Any) -> None:
    net.linear.weight.mul_(2)


def replace(net: Any) -> None:
    net.linear.weight = nn.Parameter(net.linear.weight * 3)  # and breaks a tie


def load(net: Any) -> None:
    net.load_state_dict({name: tensor / 2 for name, tensor in net.state_dict().items()})


def assign(net: Any) -> None:
    net.load_state_dict({name: tensor / 2 for name, tensor in net.state_dict().items()}, assign=True)


def mask_more(net: Any) -> None:
    net.conv2.weight[:, :, 0] = 0


def swap(net: Any) -> None:
    net.linear.weight, net.tied.weight = nn.Parameter(net.tied.weight / 2), nn.Parameter(net.linear.weight * 2)


@pytest.mark.parametrize(
    ("change", "inner"),
    [(change, "eager") for change in (double, replace, load, assign, mask_more, swap)]
    + [(double, "aot_eager"), (replace, "aot_eager")],
)
def test_a_weight_that_changes_is_packed_anew(net: Net, change: Any, inner: str) -> None:
    function = compiled(net, inner)
    with torch.inference_mode():
        assert_same(function, net, X)
        old = net(X)
    with torch.no_grad():
        change(net)
    with torch.inference_mode():
        assert_same(function, net, X)
        assert not torch.allclose(net(X), old)


def test_inference_tensors_are_known_by_where_they_lie() -> None:
    with torch.inference_mode():
        net = pruned(Net())
        function = compiled(net)
        assert_same(function, net, X)
        net.linear.weight = nn.Parameter(net.linear.weight * 2, requires_grad=False)
        assert_same(function, net, X)


def test_a_write_through_data_needs_repack(net: Net) -> None:
    function = compiled(net)
    with torch.inference_mode():
        function(X)
        net.linear.weight.data.mul_(2)
        assert not torch.allclose(function(X), net(X), rtol=1e-5, atol=1e-5)
        repack(function)
        assert_same(function, net, X)


def test_repack_renews_a_converted_model_too(net: Net) -> None:
    converted = to_hinm(net)
    converted.linear.values.mul_(2)
    net.linear.weight.data.mul_(2)  # and so the tied one: they share their packing as well
    repack(converted)
    torch.testing.assert_close(converted(X), net(X), rtol=1e-5, atol=1e-5)


def test_every_graph_of_a_layer_sees_a_repack(net: Net) -> None:
    function = compiled(net)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            function(X)
    with torch.no_grad():
        double(net)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(function, net, X)


def test_training_between_two_evaluations_is_dense_silent_and_seen(net: Net) -> None:
    function = compiled(net, "aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    masks = {name: parameter != 0 for name, parameter in net.named_parameters() if parameter.dim() > 1}
    for _ in range(2):
        net.train()
        function(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.mul_(masks.get(name, 1))
        with profile() as record:
            function(X)
        assert not any("hinm" in event.key for event in record.key_averages())
        net.eval()
        with torch.inference_mode():
            assert_same(function, net, X)


def test_a_copy_a_second_model_and_compiled_blocks_each_have_their_own_packing() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.outer(self.inner(x).relu())

    # More blocks of one class than Dynamo's limit of recompilations: each has its own layout, and Dynamo would share.
    blocks = [pruned(Block(), HiNMPattern(8, 0.5 if i % 2 else 0.25)) for i in range(10)]
    blocks.append(copy.deepcopy(blocks[0]))
    functions = [compiled(block) for block in blocks]
    x = torch.randn(3, 16)
    with torch.inference_mode():
        for _ in range(2):
            for function, block in zip(functions, blocks, strict=True):
                assert_same(function, block, x, calls=2)
    with torch.no_grad():
        blocks[-1].inner.weight.mul_(2)
    with torch.inference_mode():
        for function, block in zip(functions, blocks, strict=True):
            assert_same(function, block, x, calls=2)


def test_a_layout_that_appears_or_changes_compiles_anew(net: Net) -> None:
    model = Net().eval()
    function = compiled(model)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="none of 6 linear and convolution layers.*load_layouts"):
            function(X)
        assert_same(function, model, X, calls=0)
    for pattern in (PATTERN, HiNMPattern(8, 0.75)):
        pruned(model, pattern)
        with torch.inference_mode():
            assert_same(function, model, X)


def test_a_model_that_changes_dtype_and_back_is_followed(net: Net) -> None:
    function = compiled(net)
    with torch.inference_mode():
        assert_same(function, net, X)
    net.double()
    with torch.inference_mode():
        assert_same(function, net, X.double())
    net.float()
    with torch.inference_mode():
        assert_same(function, net, X)


def test_weights_outside_their_pattern_are_refused_together_before_and_after_compiling(net: Net) -> None:
    function = compiled(net)
    with torch.inference_mode():
        function(X)
    with torch.no_grad():
        net.linear.weight.add_(1)
        net.conv2.weight.add_(1)
    expected = r"(?s)linear: \d+ of 512 weights are not zero outside the pattern.*conv2: \d+ of 192 weights"
    with torch.inference_mode(), pytest.raises(ValueError, match=expected):
        function(X)
    with torch.inference_mode(), pytest.raises(Exception, match=expected):
        compiled(lambda x: net(x))(X)


def test_a_layer_that_is_half_overwritten_is_refused_until_it_is_masked_again() -> None:
    model, x = mlp(), torch.randn(3, 16)
    mask = model[0].weight != 0
    function = compiled(model)
    with torch.inference_mode():
        function(x)
    with torch.no_grad():
        model[0].weight[:16] = torch.randn(16, 16)
    with torch.inference_mode():
        for _ in range(2):
            with pytest.raises(ValueError, match=r"0: \d+ of 512 weights are not zero outside the pattern"):
                function(x)
    with torch.no_grad():
        model[0].weight.mul_(mask)
    with torch.inference_mode():
        assert_same(function, model, x, calls=2)


def test_layers_tied_after_pruning_are_packed_by_the_layout_that_fits_or_refused() -> None:
    model, x = pruned(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))), torch.randn(3, 16)
    function = compiled(model)
    with torch.inference_mode():
        assert_same(function, model, x, calls=2)
    model[1].weight = model[0].weight
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"1: .* of 256 weights are not zero outside the pattern"):
            function(x)
        assert_same(compiled(lambda x: model(x)), model, x, calls=2)
        torch.testing.assert_close(to_hinm(model)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("between", [nn.ReLU, lambda: nn.BatchNorm1d(16)], ids=["relu", "norm"])
def test_a_layer_that_is_copied_with_its_layout_but_not_its_weight_has_its_own_packing(between: Any) -> None:
    layer, module = pruned(nn.Linear(16, 16)), between().eval()
    other = copy.copy(layer)
    other._parameters = {"weight": nn.Parameter(layer.weight.detach() * 2), "bias": layer.bias}
    model = nn.Sequential(layer, module, other, module)
    function = compiled(model)
    with torch.inference_mode():
        for _ in range(2):
            assert_same(function, model, torch.randn(3, 16), calls=2)


def test_a_weight_of_another_shape_is_refused_and_another_layer_runs_dense() -> None:
    model = mlp()
    function = compiled(model)
    with torch.inference_mode():
        function(torch.randn(3, 16))
    model[0].weight = nn.Parameter(torch.randn(32, 24))
    with torch.inference_mode(), pytest.raises(Exception, match=r"0: vector_index keeps 8 columns.*another weight"):
        function(torch.randn(3, 24))
    model[0] = nn.Linear(24, 32)
    with torch.inference_mode():
        assert_same(function, model, torch.randn(3, 24), calls=1)


# meta stands for all other devices: on any machine there is no other.
def test_a_parameter_on_another_device_is_refused_by_name() -> None:
    model, x = mlp(), torch.randn(3, 16)
    function = compiled(model)
    with torch.inference_mode():
        function(x)
    away = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match=r"(?s)0: got torch.float32 \[32, 16\] on meta.*2: got .* on meta"):
        to_hinm(away)
    with torch.inference_mode(), pytest.raises(Exception, match=r"(?s)0: got .* on meta.*2: got .* on meta"):
        compiled(away)(x.to("meta"))
    model[0].to("meta")
    with torch.inference_mode(), pytest.raises(Exception, match=r"(?i)same device|different devices"):
        function(x)
    converted = to_hinm(mlp())
    converted[0].to("meta")
    with pytest.raises(ValueError, match="x is on cpu, but the packed weight is on meta"):
        converted(x)


WRONG_INPUTS = {
    "narrow": torch.randn(3, 15),
    "wide": torch.randn(3, 32),
    "empty": torch.randn(3, 0),
    "a number": torch.tensor(1.0),
    "double": torch.randn(3, 16).double(),
    "integers": torch.ones(3, 16, dtype=torch.int64),
}


@pytest.mark.parametrize("x", WRONG_INPUTS.values(), ids=WRONG_INPUTS)
@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True])
def test_an_input_that_the_dense_model_refuses_is_refused(x: Tensor, dynamic: bool | None) -> None:
    model = mlp()
    function = compiled(model, "aot_eager", dynamic=dynamic)
    with torch.inference_mode():
        function(torch.randn(3, 16))
        with pytest.raises(RuntimeError):
            model(x)
        with pytest.raises(Exception, match=r"(?s)16.*32|float32|at least 1D"):
            function(x)
        with pytest.raises((ValueError, TypeError), match=r"hinm::linear: x (has shape|is torch)"):
            to_hinm(model)(x)


RIGHT_INPUTS = [(16,), (1, 16), (0, 16), (2, 1, 3, 16)]


@pytest.mark.parametrize("size", RIGHT_INPUTS)
def test_an_input_of_any_rank_is_taken_where_the_dense_model_takes_it(size: tuple[int, ...]) -> None:
    model = mlp()
    function = compiled(model, "aot_eager", dynamic=True)
    with torch.inference_mode():
        function(torch.randn(3, 16))
        assert_same(function, model, torch.randn(size), calls=2)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_images_in_either_memory_format_give_the_same(memory: torch.memory_format) -> None:
    model = pruned(nn.Sequential(nn.Conv2d(4, 16, 3, stride=2), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=2)))
    function, x = compiled(model, "aot_eager"), torch.randn(2, 4, 9, 9)
    with torch.inference_mode():
        function(x)
        assert_same(function, model, x.to(memory_format=memory), calls=2)


class Views(nn.Module):
    """Takes views that only the storage has in which dense layers write."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(8, 32, 2, 2), nn.BatchNorm2d(32), nn.Linear(32, 16)
        self.signal = nn.Conv1d(16, 32, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        y = self.norm(self.conv(x.permute(0, 3, 1, 2))).relu().permute(0, 2, 3, 1)
        z = self.linear(y.view(-1, 32)).unflatten(0, (x.shape[0], -1))
        return self.signal(z.mT).view(x.shape[0], -1)


@BOTH
@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_sparse_convolutions_write_in_the_storage_of_dense_ones(convert: Any, inner: str) -> None:
    model = pruned(Views())
    converted = convert(model)
    function = compiled(converted, inner, dynamic=True)
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        for size in ((2, 6, 12, 8), (3, 4, 10, 8)):
            x = torch.randn(size)
            assert_same(function, model, x, calls=3)
            torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def separable() -> nn.Sequential:
    stem, middle = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(32, 32, 3, groups=32)
    model = nn.Sequential(stem, nn.ReLU6(), nn.Conv2d(16, 32, 1), nn.ReLU6(), middle, nn.ReLU6(), nn.Conv2d(32, 16, 1))
    prune(model, HiNMPattern(vector_size=8), include=["2", "6"], method="identity")
    return model


def test_inductor_hands_images_from_convolution_to_convolution_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def record(x: Tensor, *operands: Any) -> Tensor:
        taken.append(x.is_contiguous())
        return linear(x, *operands)

    linear = lightning_hinm.ops.cpu.linear
    monkeypatch.setattr("lightning_hinm.ops.cpu.linear", record)
    model = separable()
    with torch.inference_mode():
        assert_same(compiled(model, "inductor"), model, torch.randn(2, 3, 12, 12), calls=2)
    assert taken[-2:] == [True, True]  # rows of channels, although the images of the dense model are not


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_convolutions_are_timed_on_images_as_the_graph_will_have_them(
    inner: str, memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def decide(*workloads: Workload) -> Decision:
        seen.extend(workload.channels_last for workload in workloads)
        return Decision("sparse", "", 1.0, 1.0)

    monkeypatch.setattr("lightning_hinm.backend.decide", decide)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: gm.forward)
    function, x = torch.compile(separable(), backend="hinm", options={"inner": inner}), torch.randn(2, 3, 12, 12)
    with torch.inference_mode():
        function(x.to(memory_format=memory))
    assert seen == [inner == "inductor" or memory is torch.channels_last] * 2


@pytest.mark.parametrize("assign", [False, True])
def test_a_converted_model_that_is_reloaded_after_compiling_is_followed(net: Net, assign: bool) -> None:
    converted, other = to_hinm(net), to_hinm(pruned(Net()))
    function = compiled(converted, "aot_eager")
    with torch.inference_mode():
        old = function(X)
    converted.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    with torch.inference_mode():
        assert_same(function, other, X)
        assert not torch.allclose(function(X), old)


def chain() -> Any:
    """Layers whose orders are absorbed: each model has orders of its own."""
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)]
    model = nn.Sequential(*layers).eval()
    set_orders(model, PATTERN, seed=int(torch.randint(1 << 30, ())))
    return model


def test_a_converted_model_that_takes_another_layout_is_compiled_anew() -> None:
    converted, x = to_hinm(chain()), torch.randn(3, 16)
    function = compiled(converted)
    with torch.inference_mode():
        function(x)
    for assign in (False, True, False):
        other = chain()
        converted.load_state_dict(to_hinm(other).state_dict(), assign=assign)
        with torch.inference_mode():
            assert_same(function, other, x, calls=3)
    for i in (0, 2, 4):
        converted[i].repack(to_hinm(chain())[i].packed)
        with torch.inference_mode():
            assert_same(function, converted, x, calls=3)


def test_values_of_a_converted_model_that_change_in_place_compile_nothing_anew() -> None:
    model, x = chain(), torch.randn(3, 16)
    converted = to_hinm(model)
    function = compiled(converted)
    with torch.inference_mode():
        old = function(x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        model[2].weight.mul_(2)
        converted[2].values.mul_(2)
    repack(function)
    with torch.inference_mode():
        assert_same(function, model, x, calls=3)
        assert not torch.allclose(function(x), old)
    converted[2].repack(to_hinm(model)[2].packed)
    with torch.inference_mode():
        assert_same(function, model, x, calls=3)
    for _ in range(10):
        with torch.no_grad():
            model[2].weight.mul_(0.5)
        converted.load_state_dict(to_hinm(model).state_dict())
        with torch.inference_mode():
            assert_same(function, model, x, calls=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_converted_model_that_changes_dtype_and_back_is_followed() -> None:
    model, x = chain(), torch.randn(3, 16)
    converted = to_hinm(model)
    function = compiled(converted)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype), converted.to(dtype)  # type: ignore[func-returns-value]
        with torch.inference_mode():
            assert_same(function, model, x.to(dtype), calls=3)


def test_converted_models_of_one_class_each_have_their_own_graph() -> None:
    models, x = [chain() for _ in range(4)], torch.randn(3, 16)  # more than the limit
    functions = [compiled(to_hinm(model)) for model in models]
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(2):
            for function, model in zip(functions, models, strict=True):
                assert_same(function, model, x, calls=3)


@pytest.mark.parametrize("converted", [False, True])
def test_a_forward_behind_a_decorator_is_compiled_once(converted: bool) -> None:
    def decorated(*args: Any, **kwargs: Any) -> Tensor:
        return nn.Sequential.forward(*args, **kwargs)

    class Decorated(nn.Sequential):
        forward = functools.wraps(nn.Sequential.forward)(decorated)

    model, x = pruned(Decorated(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))), torch.randn(3, 16)
    function = compiled(to_hinm(model) if converted else model)
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        for _ in range(3):
            assert_same(function, model, x, calls=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_copy_of_a_compiled_converted_model_is_a_model_of_its_own() -> None:
    model, other, x = chain(), chain(), torch.randn(3, 16)
    function = compiled(to_hinm(model))
    with torch.inference_mode():
        function(x)
    copied = copy.deepcopy(function)
    copied.load_state_dict({f"_orig_mod.{name}": tensor for name, tensor in to_hinm(other).state_dict().items()})
    with torch.inference_mode():
        for _ in range(2):
            assert_same(copied, other, x, calls=3)
            assert_same(function, model, x, calls=3)


def test_a_model_may_be_converted_in_part(net: Net) -> None:
    half = copy.deepcopy(net)
    half.conv2, half.linear = to_hinm(half.conv2), to_hinm(half.linear)
    with torch.inference_mode():
        assert_same(compiled(half), net, X)


def test_a_graph_holds_no_packed_tensor_that_its_layer_has_let_go() -> None:
    converted, x = to_hinm(chain()), torch.randn(3, 16)
    function = compiled(converted)
    with torch.inference_mode():
        function(x)
    held = [weakref.ref(layer._buffers[name]) for layer in converted[::2] for name in EXPANDED[:1]]
    converted.load_state_dict(to_hinm(chain()).state_dict())
    gc.collect()
    assert not any(tensor() is not None for tensor in held)


@pytest.mark.parametrize("grad", [False, True])
def test_a_mask_written_in_place_compiles_nothing_anew(net: Net, grad: bool) -> None:
    net.train(grad)
    function = compiled(net, "eager")
    with torch.set_grad_enabled(grad):
        function(X)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch.no_grad():
            mask_more(net)
        torch.testing.assert_close(function(X), net(X), rtol=1e-5, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_gradients_in_eval_mode_run_dense_and_name_the_remedy_once(net: Net) -> None:
    with pytest.warns(UserWarning, match=r"gradients are enabled, so 3 pruned layers run dense .*inference_mode\(\)"):
        out = compiled(net, "aot_eager")(X)
    assert out.requires_grad
    torch.compiler.reset()
    compiled(net, "aot_eager")(X)  # warnings are errors here


def test_a_frozen_model_runs_sparse_with_gradients_enabled(net: Net) -> None:
    net.requires_grad_(False)
    assert_same(compiled(net, "aot_eager"), net, X)


def test_auto_leaves_a_losing_layer_dense_with_the_reason_on_record(
    net: Net, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda w: (1.0, 0.5 if len(w.shape) == 2 else 2.0))
    with torch.inference_mode(), caplog.at_level(logging.INFO, logger="lightning_hinm"):
        assert_same(compiled(net, plan="auto", dynamic=True), net, X, calls=3)
    assert "conv1 runs dense: sparse 2000.000 ms, dense 1000.000 ms on 3x6x1x10" in caplog.text
    assert "linear runs sparse: sparse 1500.000 ms, dense 3000.000 ms on 3 calls of 3x10x16" in caplog.text


def test_plan_dense_runs_dense(net: Net) -> None:
    with torch.inference_mode():
        assert_same(compiled(net, plan="dense"), net, X, calls=0)


def test_wrong_options_are_refused_where_the_model_is_compiled(net: Net) -> None:
    with pytest.raises(Exception, match=r"mode='fast' must be one of default.*; plan='fast' must be one of auto"):
        torch.compile(net, backend="hinm", options={"plan": "fast", "mode": "fast"})(X)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Inductor is told of its mode, graph by graph; nothing is compiled."""
    found = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any = None, **_: Any) -> Any:
        found.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return found


@pytest.mark.parametrize("path", ["sparse", "dense", "gradients", "no layout"])
def test_a_mode_reaches_inductor_on_every_path(path: str, modes: list[Any]) -> None:
    model = nn.Sequential(nn.ReLU()) if path == "no layout" else mlp()
    grad, plan, calls = path == "gradients", "dense" if path == "dense" else "sparse", 2 if path == "sparse" else 0
    function = torch.compile(model.train(grad), backend="hinm", options={"plan": plan, "mode": "max-autotune"})
    with torch.set_grad_enabled(grad):
        assert_same(function, model, torch.randn(3, 16), calls=calls)
    assert modes == [torch._inductor.list_mode_options("max-autotune")]


@pytest.mark.parametrize("mode", torch._inductor.list_mode_options())
def test_every_mode_of_inductor_is_taken_as_torch_compile_takes_it(
    mode: str, modes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda workload: (2.0, 1.0))
    model, x = mlp(), torch.randn(3, 16)
    with torch.inference_mode():
        torch.compile(model, mode=mode)(x)
        assert_same(torch.compile(model, backend="hinm", mode=mode), model, x, calls=2)
    assert modes == [torch._inductor.list_mode_options(mode)] * 2


@pytest.mark.parametrize(
    ("mode", "configured", "calls"),
    [
        ("default", False, 0),
        ("default", True, 2),
        ("reduce-overhead", False, 2),
        ("max-autotune-no-cudagraphs", False, 0),
    ],
)
def test_auto_decides_by_the_times_of_cuda_graphs_where_the_model_will_run_in_them(
    mode: str, configured: bool, calls: int, modes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed_everywhere(monkeypatch)
    monkeypatch.setattr("lightning_hinm.plan.measure", lambda workload: (2.0, 1.0 if workload.replayed else 3.0))
    model, x = mlp(), torch.randn(3, 16)
    with torch.inference_mode(), torch._inductor.config.patch({"triton.cudagraphs": configured}):
        assert_same(torch.compile(model, backend="hinm", mode=mode), model, x, calls=calls)


@BOTH
def test_of_all_that_a_graph_reads_cuda_graphs_copy_its_input_alone(
    convert: Any, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights, dense and packed, count as static: read where they lie, at each call."""
    from torch._inductor import compile_fx

    compile_all, compile_inner, copied = compile_fx.compile_fx, compile_fx.compile_fx_inner, []

    def record(gm: Any, inputs: Any, **given: Any) -> Any:
        copied.extend(tuple(x.shape) for i, x in enumerate(inputs) if i not in given["static_input_idxs"])
        assert given["cudagraphs"]
        return compile_inner(gm, inputs, **given)

    monkeypatch.setattr(compile_fx, "compile_fx", functools.partial(compile_all, inner_compile=record))
    function = torch.compile(convert(net), backend="hinm", options={"plan": "sparse", "mode": "reduce-overhead"})
    with torch.inference_mode(), torch._functorch.config.patch(enable_autograd_cache=False):
        assert_same(function, net, X)
    assert copied == [tuple(X.shape)]


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(128)], ids=["plain", "folded"])
def test_a_model_in_cuda_graphs_follows_its_weights_at_every_batch_size(convert: Any, norm: Any) -> None:
    layers = [nn.Linear(64, 128), norm(), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 5)]
    model = convert(pruned(nn.Sequential(*layers), HiNMPattern(vector_size=32)).half().cuda())
    function = torch.compile(model, backend="hinm", options={"plan": "sparse", "mode": "reduce-overhead"})
    counters = torch._dynamo.utils.counters["inductor"]
    counters.clear()
    with torch.inference_mode():
        for batch in (4, 9):
            for factor in (1.0, 2.0, 0.5):  # the first as it was packed, then packed anew into what a graph reads
                for layer in (model[0], model[3]):
                    (layer.values if convert is to_hinm else layer.weight).mul_(factor)
                if convert is to_hinm:
                    repack(model)
                for _ in range(4):  # warm-up, capture, replays
                    x = torch.randn(batch, 64, dtype=torch.float16, device="cuda")
                    torch.testing.assert_close(function(x), model(x), rtol=1e-2, atol=1e-2)
                if batch == 4:
                    assert counters["cudagraph_recorded_non_static_inputs"] == 1, "captured once; x alone is copied"
    assert counters["cudagraph_recorded_non_static_inputs"] > 1
    assert not counters["cudagraph_skips"]


@pytest.mark.gpu
def test_auto_decides_for_cuda_graphs_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    model = pruned(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), HiNMPattern(vector_size=32))
    model, x = model.half().cuda(), torch.randn(4, 64, dtype=torch.float16, device="cuda")
    before = copy.deepcopy(model.state_dict())
    function = torch.compile(model, backend="hinm", mode="reduce-overhead")
    with torch.inference_mode(), caplog.at_level(logging.INFO, logger="lightning_hinm"):
        for _ in range(4):
            torch.testing.assert_close(function(x), model(x), rtol=1e-2, atol=1e-2)
    assert caplog.text.count("in a CUDA graph") == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def fused_encoder() -> Any:
    return pruned(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))


def test_a_fused_transformer_layer_is_taken_apart_without_a_global_switch() -> None:
    encoder, x = fused_encoder(), torch.randn(2, 5, 32)
    with torch.inference_mode():
        assert_same(compiled(encoder), encoder, x, calls=2)
        assert_same(compiled(to_hinm(encoder)), encoder, x, calls=2)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("wins", [0, 1, 2])
def test_auto_takes_a_fused_transformer_layer_apart_where_one_of_its_layers_pays(
    monkeypatch: pytest.MonkeyPatch, wins: int
) -> None:
    encoder, x = fused_encoder(), torch.randn(2, 5, 32)
    rows = {64: wins > 0, 32: wins > 1}  # of linear1 and linear2
    seen = []

    def measure(workload: Any) -> tuple[float, float]:
        seen.append((workload.shape, workload.input_shape))
        return (2.0, 1.0) if rows[workload.shape[0]] else (1.0, 2.0)

    monkeypatch.setattr("lightning_hinm.plan.measure", measure)
    with torch.inference_mode():
        assert_same(compiled(encoder, plan="auto"), encoder, x, calls=wins)
    assert seen == [((64, 32), (2, 5, 32)), ((32, 64), (2, 5, 64))]


def test_a_weight_that_is_used_in_another_way_runs_dense_and_is_named() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed, self.called = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(torch.matmul(x, self.mixed.weight))

    model, x = pruned(Free()), torch.randn(3, 16)
    with torch.inference_mode():
        with pytest.warns(
            UserWarning, match=r"1 pruned layers run dense \(mixed\), because matmul takes their weights"
        ):
            compiled(model)(x)
        assert_same(compiled(model), model, x, calls=1)


def test_a_weight_that_is_reached_by_another_name_runs_dense_and_is_named() -> None:
    class Aliased(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.own, self.called = nn.Linear(16, 16), nn.Linear(16, 16)
            self.weights = [self.own.weight]
            if tied:
                self.tied = self.own.weight

        def forward(self, x: Tensor) -> Tensor:
            weight = self.tied if hasattr(self, "tied") else self.weights[0]
            return self.called(nn.functional.linear(x, weight))

    x = torch.randn(3, 16)
    for tied in (True, False):
        warn_once.cache_clear()
        model = pruned(Aliased(tied))
        with torch.inference_mode():
            with pytest.warns(UserWarning, match=r"1 pruned layers run dense \(own\), because .* another way"):
                compiled(model)(x)
            assert_same(compiled(model), model, x, calls=1)
    warn_once.cache_clear()
    del model.called.hinm_layout  # now no layer in the graph has one
    with torch.inference_mode(), pytest.warns(UserWarning, match="another way") as record:
        compiled(model)(x)
    assert len(record) == 1


def test_the_backend_works_as_a_function_where_no_entry_point_is_installed(net: Net) -> None:
    function = torch.compile(
        net, backend=lightning_hinm.backend.hinm_backend, options={"plan": "sparse", "inner": "eager"}
    )
    with torch.inference_mode():
        assert_same(function, net, X)


def test_a_packing_dies_with_its_layer(net: Net) -> None:
    with torch.inference_mode():
        compiled(net)(X)
    layouts = [weakref.ref(layout_of(layer)) for layer in (net.conv1, net.linear)]  # type: ignore[arg-type]
    assert all(layout() in lightning_hinm.twins._twins for layout in layouts)
    net.conv1 = nn.Conv1d(6, 16, 3, padding=1)
    gc.collect()
    assert layouts[0]() is None
    assert layouts[1]() in lightning_hinm.twins._twins


class Normed(nn.Module):
    """BatchNorm behind layers of every kind, with and without parameters; one layer is called before two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, groups=2), nn.BatchNorm2d(32, affine=False)
        self.conv3, self.bn3 = nn.Conv1d(32, 16, 1), nn.BatchNorm1d(16, momentum=None)
        self.linear, self.bn4, self.bn5 = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        y = self.bn3(self.conv3(y.flatten(2))).mean(-1)
        return self.bn4(self.linear(y)) * self.bn5(self.linear(y.tanh()))


IMAGES = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def normed(dtype: torch.dtype = torch.float32) -> Any:
    model = Normed()
    set_orders(model, PATTERN, seed=int(torch.randint(1 << 30, ())))
    train_norms(model)
    return model.to(dtype).eval()


def train_norms(model: Any) -> None:
    """As a training in eager mode does: the statistics change, and autograd counts no version of them."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 9, 9).to(next(model.parameters()).dtype) * 2)
    model.eval()


def run_norms(function: Any, *inputs: Tensor) -> int:
    """How many norms a call runs, what compiling takes not counted."""
    function(*inputs)
    with profile() as record:
        function(*inputs)
    return sum(event.count for event in record.key_averages() if event.key == "aten::batch_norm")


def assert_folded(function: Any, model: Any, norms: int = 0) -> None:
    assert_same(function, model, IMAGES.to(next(model.parameters()).dtype), calls=5)
    assert run_norms(function, IMAGES.to(next(model.parameters()).dtype)) == norms


@BOTH
@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_frozen_norms_are_folded_into_their_layers(convert: Any, inner: str) -> None:
    model = normed()
    with torch.inference_mode():
        assert run_norms(compiled(convert(model), "eager", "dense"), IMAGES) == 5
        assert_folded(compiled(convert(model), inner), model)


def test_a_folded_bfloat16_model_is_as_close_as_the_dense_one() -> None:
    exact = normed().double()
    model, expected = copy.deepcopy(exact).bfloat16(), exact(IMAGES.double())
    for convert in (lambda model: model, to_hinm):
        with torch.inference_mode():
            function = compiled(convert(model), "aot_eager")
            error, dense = ((each(IMAGES.bfloat16()) - expected).norm() for each in (function, model))
            assert error <= 2 * dense
            assert run_norms(function, IMAGES.bfloat16()) == 0


def train(model: Any) -> None:
    model.train()
    parameters = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model(IMAGES * 3 + 1).square().mean().backward()
    optimizer.step()
    model.zero_grad()
    model.eval()


def replace_norm(model: Any) -> None:
    model.bn1 = copy.deepcopy(model.bn4)
    model.bn1.__class__ = nn.BatchNorm2d
    train_norms(model)  # what is replaced must be seen to be trained, too


def replace_statistics(model: Any) -> None:
    model.bn1.running_mean = torch.randn(16)


def reset(model: Any) -> None:
    model.bn2.reset_running_stats()


def load_norms(model: Any) -> None:
    train_norms(other := copy.deepcopy(model))
    model.load_state_dict(other.state_dict())


def assign_norms(model: Any) -> None:
    train_norms(other := copy.deepcopy(model))
    model.load_state_dict(other.state_dict(), assign=True)
    train_norms(model)


def assign_inference_norms(model: Any) -> None:
    with torch.inference_mode():
        assign_norms(model)


def shift_bias(model: Any) -> None:
    with torch.no_grad():
        model.conv2.bias.add_(1)


def change_eps(model: Any) -> None:
    model.bn3.eps = 1.0


def scale_all(model: Any) -> None:
    with torch.no_grad():
        for module in (model.bn1, model.bn3):
            module.weight.mul_(-2)
            module.bias.sub_(1)


CHANGES = (train_norms, train, replace_norm, replace_statistics, reset, load_norms, assign_norms, shift_bias)


# Inference tensors count no versions; a number that has changed once is an input of the graph from then on.
STAYING = {assign_inference_norms: 5, change_eps: 1}


ALL_CHANGES = (*CHANGES, assign_inference_norms, change_eps, scale_all)


@pytest.mark.parametrize(
    ("change", "convert"),
    [
        *zip(ALL_CHANGES, itertools.cycle((leave, to_hinm)), strict=False),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in zip(ALL_CHANGES, itertools.cycle((to_hinm, leave)), strict=False)
        ),
    ],
)
def test_a_folded_norm_that_changes_is_folded_anew(change: Any, convert: Any) -> None:
    model = convert(normed())
    function = compiled(model)
    with torch.inference_mode():
        assert_folded(function, model)
    for again in range(2):
        with torch.inference_mode():
            old = model(IMAGES)
        change(model)
        with torch.inference_mode():
            torch.testing.assert_close(function(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
            assert again or not torch.allclose(model(IMAGES), old)
            assert run_norms(function, IMAGES) <= STAYING.get(change, 0)


def test_a_weight_that_changes_behind_a_folded_norm_is_packed_anew() -> None:
    model = normed()
    function = compiled(model)
    with torch.inference_mode():
        assert_folded(function, model)
        for change in (lambda: model.conv1.weight.mul_(2), lambda: model.linear.weight.neg_()):
            change()
            assert_folded(function, model)
    with torch.no_grad():
        model.conv2.weight.add_(1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"conv2: \d+ of 2304 weights are not zero outside"):
        function(IMAGES)


def test_a_converted_layer_that_is_repacked_behind_a_folded_norm_is_folded_anew() -> None:
    model, other = to_hinm(normed()), to_hinm(normed())
    function = compiled(model)
    with torch.inference_mode():
        assert_folded(function, model)
    with torch.no_grad():
        model.conv1.values.mul_(2)
    repack(function)
    with torch.inference_mode():
        assert_folded(function, model)
    model.conv1.repack(other.conv1.packed)  # by another layout
    with torch.inference_mode():
        assert_folded(function, model)
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert_folded(function, other)


@BOTH
def test_a_norm_that_is_written_through_data_needs_repack(convert: Any) -> None:
    model = convert(normed())
    function = compiled(model)
    with torch.inference_mode():
        function(IMAGES)
        model.bn1.running_mean.data.add_(1)
        model.bn5.weight.data.mul_(2)
        repack(function)
        assert_folded(function, model)


def test_all_graphs_of_a_layer_share_what_is_folded_and_the_unfolded_weight_is_let_go() -> None:
    model = normed()
    function = compiled(model)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert_folded(function, model)
    twins = [lightning_hinm.twins.twins_of(layout_of(m)) for m in (model.conv1, model.conv2, model.conv3, model.linear)]
    assert [len(each) for each in twins] == [1, 1, 1, 2]
    train_norms(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_folded(function, model)


def test_a_weight_with_two_biases_before_one_norm_is_folded_with_each() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bias, self.norm = nn.Linear(32, 32), nn.Parameter(torch.ones(32)), nn.BatchNorm1d(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x)) + self.norm(nn.functional.linear(x.exp(), self.linear.weight, self.bias))

    model = Biased().eval()
    set_orders(model, PATTERN)
    function = compiled(model)
    with torch.inference_mode():
        assert_same(function, model, torch.randn(4, 32), calls=2)
        assert run_norms(function, torch.randn(4, 32)) == 0


def test_a_norm_whose_training_could_not_be_seen_stays() -> None:
    class Silent(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            training = (self.training, 0.5, self.eps)
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, *training)

    model = normed()
    model.bn1.__class__ = Silent
    model.bn2.num_batches_tracked = None
    function = compiled(model)
    for _ in range(2):
        with torch.inference_mode():
            assert_folded(function, model, norms=2)
        train_norms(model)
    with torch.inference_mode():
        model = normed()  # whose tensors count no versions
        assert_folded(compiled(model), model, norms=5)
        train_norms(model)
        assert_folded(compiled(model), model, norms=5)


def test_a_norm_with_a_forward_of_its_own_is_folded_where_a_training_of_it_is_counted() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.num_batches_tracked = self.num_batches_tracked + 1  # another tensor
            tensors = (self.running_mean, self.running_var, self.weight, self.bias)
            return nn.functional.batch_norm(x, *tensors, self.training, 0.5, self.eps).relu()

    class Failing(Activated):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("not for training")
            return super().forward(x)

    model = normed()
    model.bn1.__class__, model.bn2.__class__ = Activated, Failing
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    function, state = compiled(model), torch.random.get_rng_state()
    with torch.inference_mode():
        assert_folded(function, model, norms=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.bn2.__class__ = nn.BatchNorm2d
    train_norms(model)
    with torch.inference_mode():
        assert_folded(function, model, norms=0)


def test_a_norm_without_statistics_and_a_model_in_training_keep_their_norms() -> None:
    model = normed()
    model.bn1, model.bn3.momentum = nn.BatchNorm2d(16, track_running_stats=False), 0.1
    with torch.inference_mode():
        assert_folded(compiled(model), model, norms=1)
        model.train()
        assert run_norms(compiled(model), IMAGES) == 5
    model = to_hinm(normed())
    assert run_norms(compiled(model), IMAGES) == 5  # gradients are enabled, and biases take them


def test_a_float16_norm_that_leaves_the_range_stays_or_is_refused_with_the_remedy() -> None:
    model = normed(torch.float16)
    x = IMAGES.half()
    function = compiled(model)
    with torch.inference_mode():
        assert run_norms(function, x) == 0
        model.bn1.running_var.fill_(1e-3)
        model.bn1.weight.fill_(6e4)
        with pytest.raises(
            ValueError, match=r"conv1: with the BatchNorm after it, .* leave the range of torch.float16"
        ):
            function(x)
        torch.compiler.reset()
        assert run_norms(function, x) == 1


PROGRAM = """
import sys, torch
from torch import nn
import lightning_hinm
assert "torch._dynamo" not in sys.modules, "importing the package must not cost what compiling costs"
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
model = lightning_hinm.load_hinm(model, sys.argv[1])
x, expected = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    out = torch.compile(model, backend="hinm", fullgraph=True, options={"inner": "eager"})(x)
torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
"""


def test_a_new_process_loads_and_compiles_what_was_saved(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(3, 16)
    save_hinm(model, tmp_path / "model.hinm")
    torch.save((x, model(x).detach()), tmp_path / "result.pt")
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "model.hinm"), str(tmp_path / "result.pt")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
