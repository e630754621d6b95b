"""The networks that people have: compiled and converted, each computes what the masked dense model computes."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends import registry
from torch.profiler import profile

from lightning_hinm import HiNMPattern, prune, to_hinm
from lightning_hinm.modules import HiNMLayer
from lightning_hinm.ops.operands import Conv2dOperands, LinearOperands
from lightning_hinm.prune import PruningReport
from tests.graphs import set_orders
from tests.networks import NETWORKS

PATTERN = HiNMPattern(vector_size=8)

# With a padding mask, eager PyTorch takes nested tensors.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]


def pruned(name: str, mixed: bool = False) -> tuple[Any, PruningReport]:
    """The masked dense network, its rows in order or in any, and what was pruned."""
    model = NETWORKS[name].make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if it had been trained
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight, 0.5)):
                nn.init.uniform_(tensor, low, low + 1)  # type: ignore[arg-type]
    report = prune(model, PATTERN, method="identity")
    if mixed:
        set_orders(model, PATTERN)
    return model.eval(), report


def compiled(name: str, model: nn.Module, inner: str, **options: Any) -> Any:
    fullgraph = name != "lstm"  # Dynamo does not trace one, whatever the backend
    return torch.compile(
        model, backend="hinm", fullgraph=fullgraph, options={"plan": "sparse", "inner": inner}, **options
    )


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def result(function: Any, inputs: dict[str, Any]) -> Tensor:
    """The network's main output, in float64; what stands in place of padding is nobody's."""
    output = function(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    if "src_key_padding_mask" in inputs:
        output = output[~inputs["src_key_padding_mask"]]
    return output.double()


def sparse_calls(function: Any, inputs: dict[str, Any]) -> int:
    with profile() as record:
        function(**inputs)
    return sum(event.count for event in record.key_averages() if event.key in ("hinm::linear", "hinm::conv2d"))


def assert_exact(function: Any, model: nn.Module, inputs: dict[str, Any], tolerance: float) -> None:
    """``function`` computes what ``model``, the masked dense one, computes in float64."""
    expected = result(copy.deepcopy(model).double(), cast(inputs, torch.float64))
    assert expected.norm() > 1e-3
    assert (result(function, inputs) - expected).norm() <= tolerance * expected.norm()


def check_batches(name: str, inner: str, batches: tuple[int, ...], **options: Any) -> None:
    model, report = pruned(name)
    function = compiled(name, model, inner, **options)
    with torch.inference_mode():
        for batch in batches:
            inputs = NETWORKS[name].inputs(batch)
            assert_exact(function, model, inputs, 1e-5)
            assert sparse_calls(function, inputs) == len(report.pruned)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_pruned_or_listed_with_its_reason(name: str) -> None:
    model, report = pruned(name)
    prunable = {name for name, module in model.named_modules() if type(module).__name__ in LAYERS}
    assert {layer.name for layer in report.layers} == prunable
    skipped = {layer.name: layer.reason for layer in report.layers if layer.reason is not None}
    rules = NETWORKS[name].skipped
    assert len(report.pruned) >= 2
    assert all(any(layer.endswith(end) and rules[end] in reason for end in rules) for layer, reason in skipped.items())
    assert all(any(layer.endswith(end) for layer in skipped) for end in rules)


LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv1D", "NonDynamicallyQuantizableLinear")


def only(*names: str) -> list[Any]:
    """All networks, the others slow: they differ from these in little that a test asks for."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]


@pytest.mark.parametrize("name", only(*NETWORKS.keys() - {"resnet18", "mobilenet-v2", "deit", "encoder-causal"}))
def test_one_dynamic_graph_computes_the_masked_model_for_all_batch_sizes_above_one(name: str) -> None:
    if name.startswith("encoder") and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 itself does not compile nn.TransformerEncoderLayer for dynamic sizes")
    torch._dynamo.utils.counters.clear()
    check_batches(name, "eager", (2, 3, 5), dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (2 if name == "lstm" else 1)  # what stands before the LSTM, and behind it


@pytest.mark.parametrize("name", only("bert", "unet", "convnext"))
def test_a_single_sample_is_as_exact(name: str) -> None:
    check_batches(name, "aot_eager", (1,))


@pytest.mark.parametrize("name", only("llama", "efficientnet", "vit"))
def test_bfloat16_is_as_close_as_its_precision(name: str) -> None:
    model, report = pruned(name)
    inputs = cast(NETWORKS[name].inputs(4), torch.bfloat16)
    model.bfloat16()
    function = compiled(name, model, "aot_eager")
    with torch.inference_mode():
        assert_exact(function, model, inputs, 1e-2)
        assert sparse_calls(function, inputs) == len(report.pruned)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_aot_autograd_takes_the_dynamic_graph(name: str) -> None:
    check_batches(name, "aot_eager", (2, 5), dynamic=True)


@pytest.mark.parametrize("name", only("encoder-padded"))
def test_inductor_compiles_the_rest(name: str) -> None:
    check_batches(name, "inductor", (2,))


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights.*during export:UserWarning")
@pytest.mark.parametrize("name", only("unet", "gpt2", "encoder-padded"))
def test_a_converted_network_is_copied_reloaded_exported_and_saved(name: str) -> None:
    model, report = pruned(name)
    converted = to_hinm(model)
    assert {n for n, m in converted.named_modules() if isinstance(m, HiNMLayer)} == {x.name for x in report.pruned}
    network = NETWORKS[name]
    inputs = network.inputs(3)
    with torch.no_grad():
        assert_exact(converted, model, inputs, 1e-5)
        assert sparse_calls(converted, inputs) == len(report.pruned)
        expected = result(converted, inputs)
        assert torch.equal(result(copy.deepcopy(converted), inputs), expected)

        other = to_hinm(pruned(name)[0])
        assert not torch.allclose(result(other, inputs), expected)
        other.load_state_dict(converted.state_dict())
        assert torch.equal(result(other, inputs), expected)

        shapes = {key: None if key in network.constant else {0: torch.export.Dim.DYNAMIC} for key in inputs}
        program = torch.export.export(converted, (), inputs, dynamic_shapes=shapes)
        assert sum("hinm." in str(node.target) for node in program.graph.nodes) == len(report.pruned)
        stream = io.BytesIO()
        torch.export.save(program, stream)
        stream.seek(0)
        assert_exact(torch.export.load(stream).module(), model, network.inputs(5), 1e-5)


@pytest.mark.parametrize("name", only("gpt2", "resnet18"))
def test_a_compiled_network_is_copied_with_a_packing_of_its_own(name: str) -> None:
    model, report = pruned(name)
    function, inputs = compiled(name, model, "eager"), NETWORKS[name].inputs(3)
    with torch.inference_mode():
        before = result(function, inputs)
    other = copy.deepcopy(function)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    with torch.inference_mode():
        assert_exact(other, other._orig_mod, inputs, 1e-5)
        assert sparse_calls(other, inputs) == len(report.pruned)
        assert torch.equal(result(function, inputs), before)
        assert not torch.allclose(result(other, inputs), before)


OPERANDS = {
    "hinm.linear.default": ("op", *LinearOperands._fields),
    "hinm.conv2d.default": ("op", *Conv2dOperands._fields),
}


def sparse_ops(name: str, model: nn.Module, dense: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Every sparse op of the graphs that the inner backend gets, in order: its name, its tensors, its numbers."""
    graphs: list[fx.GraphModule] = []
    lookup, inputs = registry.lookup_backend, NETWORKS[name].inputs(2)

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    with monkeypatch.context() as patch:
        patch.setattr(registry, "lookup_backend", lambda name: record if name == "eager" else lookup(name))
        torch.compiler.reset()
        with torch.inference_mode():
            assert_exact(compiled(name, model, "eager"), dense, inputs, 1e-5)
    return [
        [str(node.target), *(held_by(gm, each) for each in node.args[1:])]
        for gm in graphs
        for node in gm.graph.nodes
        if str(node.target).startswith("hinm.")
    ]


def held_by(gm: fx.GraphModule, argument: Any) -> Any:
    """The tensor that a node stands for, where the graph holds it; else what the node is."""
    if not isinstance(argument, fx.Node):
        return argument
    return getattr(gm, str(argument.target)) if argument.op == "get_attr" else (argument.op, str(argument.target))


@pytest.mark.parametrize("name", only("bert", "efficientnet"))
def test_a_dense_and_a_converted_network_compile_to_the_same_sparse_ops(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, report = pruned(name, mixed=True)
    dense = sparse_ops(name, model, model, monkeypatch)
    converted = sparse_ops(name, to_hinm(model), model, monkeypatch)
    assert len(dense) == len(converted) == len(report.pruned)
    for one, other in zip(dense, converted, strict=True):
        for operand, (each, its) in zip(OPERANDS[one[0]], zip(one, other, strict=True), strict=False):
            same = torch.equal(each, its) if isinstance(each, Tensor) else each == its
            assert same, operand
    restored = [op[OPERANDS[op[0]].index("restore")].numel() > 0 for op in converted]
    if name != "llama":  # whose product of two layers has two orders
        assert not all(restored), "what is absorbed in neither would be the same, too"


def test_an_lstm_breaks_the_graph_where_it_breaks_the_dense_one_and_nowhere_if_dynamo_may_trace_it() -> None:
    model, report = pruned("lstm")
    inputs, graphs = NETWORKS["lstm"].inputs(3), []
    with torch.inference_mode():
        for function in (torch.compile(model, backend="eager"), compiled("lstm", model, "eager")):
            torch._dynamo.utils.counters.clear()
            function(**inputs)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1]
        with torch._dynamo.config.patch(allow_rnn=True):
            torch.compiler.reset()
            whole = compiled("", model, "aot_eager")  # fullgraph
            assert_exact(whole, model, inputs, 1e-5)
            assert sparse_calls(whole, inputs) == len(report.pruned)
