"""torch.compile(model, backend="hinm"): the result of the dense masked model, whatever happens to its weights."""

import copy
import gc
import logging
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

import lightning_hinm.backend
from lightning_hinm import HiNMPattern, prune, repack, save_hinm, to_hinm
from lightning_hinm.prune import layout_of

PATTERN = HiNMPattern(vector_size=8)
ROOT = Path(__file__).parents[1]


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


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    lightning_hinm.backend._warn_once.cache_clear()
    yield
    torch.compiler.reset()


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
    assert "linear runs sparse: sparse 500.000 ms, dense 1000.000 ms on 3x10x16" in caplog.text


def test_plan_dense_runs_dense(net: Net) -> None:
    with torch.inference_mode():
        assert_same(compiled(net, plan="dense"), net, X, calls=0)


def test_the_default_options_are_auto_and_inductor(net: Net) -> None:
    assert lightning_hinm.backend._read_options({}) == ("auto", "inductor")


def test_unknown_options_are_refused_together(net: Net) -> None:
    expected = r"(?s)plan='fast' must be one of auto, sparse, dense.*'mode' is unknown, only plan and inner"
    with pytest.raises(Exception, match=expected):
        torch.compile(net, backend="hinm", options={"plan": "fast", "mode": "x"})(X)


def test_a_fused_transformer_layer_is_named_with_the_remedy() -> None:
    encoder = pruned(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        expected = r"2 pruned layers run dense \(linear1, linear2\), because _transformer_encoder_layer_fwd.*to_hinm"
        with pytest.warns(UserWarning, match=expected):
            compiled(encoder)(x)
        assert_same(compiled(to_hinm(encoder)), encoder, x, calls=2)


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
    assert all(layout() in lightning_hinm.backend._twins for layout in layouts)
    net.conv1 = nn.Conv1d(6, 16, 3, padding=1)
    gc.collect()
    assert layouts[0]() is None
    assert layouts[1]() in lightning_hinm.backend._twins


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
