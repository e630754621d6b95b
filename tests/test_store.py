import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hinm.format import layer_state, unpack
from lightning_hinm.format.checkpoint import export_checkpoint
from lightning_hinm.modules import HiNMConv2d, HiNMLayer, HiNMLinear, to_hinm
from lightning_hinm.pattern import HiNMPattern, layer_kind
from lightning_hinm.prune import layout_of, prune
from lightning_hinm.store import load_hinm, save_hinm


class Conv1D(nn.Module):
    """What Hugging Face's layer of this name computes, known by the name below."""

    def __init__(self, out: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, out) / size)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


Conv1D.__module__ = "transformers.pytorch_utils"


class Net(nn.Module):
    """Every prunable kind, a tied pair of layers, a tied pair of others, a buffer, and a layer that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.conv1 = nn.Conv1d(8, 9, 3, bias=False)
        self.norm = nn.BatchNorm1d(9)
        self.up = nn.Linear(9 * 14, 24)
        self.left = nn.Linear(24, 24)
        self.right = nn.Linear(24, 24)
        self.right.weight = self.left.weight
        self.right.bias = self.left.bias
        self.hf = Conv1D(12, 24)
        self.head = nn.Linear(12, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().flatten(2)
        x = self.norm(self.conv1(x)).relu().flatten(1)
        x = self.right(self.left(self.up(x)).relu())
        return self.head(self.hf(x)) * self.scale


def pruned(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    net = Net().to(dtype).eval()
    prune(net, HiNMPattern(4), method="identity", ignore=["head"])
    return net


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def meta_net() -> Net:
    with torch.device("meta"):
        return Net().eval()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Objects and contents: what a failed load must leave alone."""
    return {
        name: (id(module), {key: (id(t), t.clone()) for key, t in module.state_dict(keep_vars=True).items()})
        for name, module in model.named_modules()
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (module, state) in before.items():
        assert after[name][0] == module
        for key, (identity, value) in state.items():
            assert after[name][1][key][0] == identity
            assert value.is_meta or torch.equal(after[name][1][key][1], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_a_saved_model_comes_back_packed_and_computes_the_same(
    path: Path, dtype: torch.dtype, convert: bool, meta: bool
) -> None:
    net = pruned(dtype)
    save_hinm(to_hinm(net) if convert else net, path)
    dense = meta_net() if meta else Net().eval()
    loaded = load_hinm(dense, path)
    assert loaded is dense
    for name in ("conv", "conv1", "up", "left", "right", "hf"):
        layer, original = loaded.get_submodule(name), net.get_submodule(name)
        assert isinstance(layer, HiNMConv2d if name.startswith("conv") else HiNMLinear)
        assert torch.equal(layer.weight, original.weight)
        assert layer.retained == layout_of(original).retained < 1
        assert not layer.training
    assert type(loaded.head) is nn.Linear
    assert {tensor.dtype for key, tensor in loaded.state_dict().items() if tensor.is_floating_point()} == {dtype}
    expected = to_hinm(net)(images(dtype))
    assert torch.equal(loaded(images(dtype)), expected)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_a_loaded_model_can_be_saved_again_to_the_same_bytes(path: Path, tmp_path: Path) -> None:
    save_hinm(pruned(), path)
    save_hinm(load_hinm(meta_net(), path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_saving_leaves_the_model_as_it_is(path: Path) -> None:
    net = pruned()
    before = snapshot(net)
    save_hinm(net, path)
    assert_unchanged(net, before)


def test_tied_tensors_stay_tied(path: Path) -> None:
    save_hinm(pruned(), path)
    loaded = load_hinm(meta_net(), path)
    assert loaded.left.bias is loaded.right.bias
    assert loaded.left.values.data_ptr() == loaded.right.values.data_ptr()


def test_what_is_tied_in_the_file_only_is_not_tied_by_loading(path: Path) -> None:
    save_hinm(pruned(), path)
    free = Net()
    free.right = nn.Linear(24, 24)
    loaded = load_hinm(free, path)
    assert loaded.left.bias is not loaded.right.bias
    assert loaded.left.bias.data_ptr() != loaded.right.bias.data_ptr()
    assert torch.equal(loaded.left.bias, loaded.right.bias)


def test_a_module_in_two_places_is_one_module_afterwards(path: Path) -> None:
    layer = nn.Linear(16, 16)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    prune(net, HiNMPattern(4), method="identity")
    save_hinm(net, path)
    again = nn.Linear(16, 16)
    loaded = load_hinm(nn.Sequential(again, nn.ReLU(), again), path)
    assert loaded[0] is loaded[2]
    assert isinstance(loaded[0], HiNMLinear)


def test_a_single_layer_is_a_model_too(path: Path) -> None:
    layer = nn.Linear(16, 8)
    prune(layer, HiNMPattern(4), method="identity")
    save_hinm(layer, path)
    loaded = load_hinm(nn.Linear(16, 8), path)
    assert isinstance(loaded, HiNMLinear)
    assert torch.equal(loaded.weight, layer.weight)


def test_parameters_keep_whether_they_are_trained(path: Path) -> None:
    save_hinm(pruned(), path)
    frozen = Net()
    frozen.head.requires_grad_(False)
    frozen.up.bias.requires_grad_(False)
    loaded = load_hinm(frozen, path)
    assert not loaded.head.weight.requires_grad
    assert not loaded.up.bias.requires_grad
    assert loaded.norm.weight.requires_grad


def test_hooks_of_a_dense_layer_live_on(path: Path) -> None:
    save_hinm(pruned(), path)
    net, seen = Net().eval(), []
    net.up.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    load_hinm(net, path)(images())
    assert seen == [HiNMLinear]


def test_a_compiled_model_is_saved_under_its_own_names(path: Path) -> None:
    save_hinm(torch.compile(pruned(), backend="eager"), path)  # type: ignore[arg-type]
    load_hinm(meta_net(), path)
    load_hinm(torch.compile(Net(), backend="eager"), path)  # type: ignore[arg-type]


class Sizes(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_no_tensor_as_large_as_a_dense_weight_is_made_by_loading(path: Path) -> None:
    net = nn.Sequential(nn.Linear(512, 1024))
    prune(net, HiNMPattern(), method="identity")
    save_hinm(net, path)
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(512, 1024))
    with Sizes() as sizes:
        load_hinm(net, path)
    assert 0 < sizes.largest < 512 * 1024 * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_is_at_most_30_percent_of_the_dense_weights(path: Path, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(384, 1536, bias=False), nn.Linear(1536, 384, bias=False)).to(dtype)
    prune(net, HiNMPattern(), method="identity")
    save_hinm(net, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - 8 - header <= 0.3 * sum(weight.nbytes for weight in net.parameters())


def test_saving_refuses_a_model_without_layouts(path: Path) -> None:
    with pytest.raises(ValueError, match=r"Net: no layer has a layout, .*load_layouts"):
        save_hinm(Net(), path)


def test_saving_names_every_layer_that_left_its_pattern(path: Path) -> None:
    net = pruned()
    with torch.no_grad():
        net.up.weight.fill_(1)
        net.hf.weight.fill_(1)
    with pytest.raises(ValueError, match=r"(?s)was not written:.*up: 2256 of 3024 weights.*hf: 216 of 288 weights"):
        save_hinm(net, path)
    assert not path.exists()


def test_saving_refuses_state_that_is_no_tensor(path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    net = nn.Sequential(nn.Linear(16, 16), Stateful(16, 2))
    prune(net, HiNMPattern(4), method="identity", include=["0"])
    with pytest.raises(ValueError, match=r"1\._extra_state in its state_dict"):
        save_hinm(net, path)


def test_a_weight_that_another_module_reads_stays_dense(path: Path) -> None:
    net = pruned()
    net.reader = nn.Module()
    net.reader.w = net.up.weight
    save_hinm(net, path)
    other = Net()
    other.reader = nn.Module()
    other.reader.w = other.up.weight
    loaded = load_hinm(other, path)
    assert type(loaded.up) is nn.Linear
    assert loaded.up.weight is loaded.reader.w
    assert torch.equal(loaded.up.weight, net.up.weight)


def test_a_parametrised_weight_stays_dense(path: Path) -> None:
    net = pruned()
    nn.utils.parametrizations.weight_norm(net.up)
    save_hinm(net, path)
    other = Net()
    nn.utils.parametrizations.weight_norm(other.up)
    load_hinm(other, path)
    assert torch.equal(other.up.weight, net.up.weight)


def replace(name: str, make: Callable[[], nn.Module]) -> Callable[[Net], None]:
    return lambda net: setattr(net, name, make())


MISFITS: dict[str, tuple[Callable[[Net], Any], str]] = {
    "another shape": (replace("up", lambda: nn.Linear(126, 28)), r"up: has .*\(24, 126\)\) in the file, but .*28"),
    "another kind": (replace("conv1", lambda: nn.Conv2d(8, 9, 3)), "conv1: has .*'conv1d'.*'conv2d'"),
    "other groups": (replace("conv", lambda: nn.Conv2d(3, 8, 3)), "conv: has .*'conv2d', 2,.*'conv2d', 1,"),
    "no such layer": (lambda net: net.__delattr__("hf"), "hf: is packed in the file, but the model has no prunable"),
    "not prunable": (replace("hf", lambda: nn.Embedding(24, 12)), "hf: is packed in the file, but the model has no"),
    "missing": (replace("more", lambda: nn.Linear(2, 2)), r"more\.weight: is missing in the file"),
    "unknown": (lambda net: net.__delattr__("norm"), r"norm\.running_mean: is unknown to the model"),
    "no bias": (replace("head", lambda: nn.Linear(12, 3, bias=False)), r"head\.bias: is unknown to the model"),
    "shape of a dense tensor": (replace("head", lambda: nn.Linear(12, 4)), r"head\.bias: is \[3\] in the file, but"),
    "type of a buffer": (lambda net: setattr(net, "scale", torch.tensor(2)), "scale: is torch.float32 in the file"),
    "tied in the model": (lambda net: setattr(net.norm, "bias", net.norm.weight), r"norm\.bias: is tied to another"),
    "parametrised": (
        lambda net: nn.utils.parametrizations.weight_norm(net.up),
        "up: is packed in the file, but the model has no",
    ),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_the_file_of_another_model_is_refused_and_the_model_unchanged(path: Path, misfit: str) -> None:
    save_hinm(pruned(), path)
    edit, message = MISFITS[misfit]
    net = Net()
    edit(net)
    before = snapshot(net)
    with pytest.raises(ValueError, match=rf"does not fit Net:\n(?s:.*){message}"):
        load_hinm(net, path)
    assert_unchanged(net, before)


def test_all_that_does_not_fit_is_in_one_message(path: Path) -> None:
    save_hinm(pruned(), path)
    net = Net()
    net.up, net.more = nn.Linear(3, 4), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"(?s)up: .*more\.weight: .*more\.bias: .*up\.bias: "):
        load_hinm(net, path)


def test_a_damaged_file_leaves_the_model_unchanged(path: Path) -> None:
    save_hinm(pruned(), path)
    data = path.read_bytes()
    for at in (3, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        net = Net()
        before = snapshot(net)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            load_hinm(net, path)
        assert_unchanged(net, before)


def test_a_buffer_that_would_stay_on_the_meta_device_is_an_error(path: Path) -> None:
    net = pruned()
    net.up.register_buffer("cache", torch.zeros(2), persistent=False)
    save_hinm(net, path)
    load_hinm(Net(), path)
    with torch.device("meta"):
        ghost = Net()
        ghost.norm.register_buffer("cache", torch.zeros(2), persistent=False)
    with pytest.raises(ValueError, match=r"norm\.cache: is a buffer on the meta device .* Compute it before load_hinm"):
        load_hinm(ghost, path)


def test_a_converted_model_is_no_architecture_to_load_into(path: Path) -> None:
    net = pruned()
    save_hinm(net, path)
    with pytest.raises(ValueError, match="Net: is packed already"):
        load_hinm(to_hinm(net), path)


def test_a_copy_of_a_pruned_model_can_be_saved(path: Path) -> None:
    save_hinm(copy.deepcopy(pruned()), path)
    assert isinstance(load_hinm(meta_net(), path).up, HiNMLayer)


def test_an_exported_checkpoint_loads_like_a_saved_model(path: Path, tmp_path: Path) -> None:
    net = pruned()
    layers = {}
    for name, module in net.named_modules():
        layout, kind = layout_of(module), layer_kind(module)
        if layout is not None and kind is not None and name != "right":  # a shared weight is named once
            groups = getattr(module, "groups", 1)
            mask = module.weight != 0
            layers[name] = layer_state(kind=kind, groups=groups, pattern=layout.pattern, mask=mask, layout=layout)
    checkpoint = {"state_dict": net.state_dict(), "callbacks": {"HiNMPruning": {"layers": layers}}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    export_checkpoint(tmp_path / "last.ckpt", path)
    loaded = load_hinm(meta_net(), path)
    assert torch.equal(loaded(images()), to_hinm(net)(images()))
    assert torch.equal(unpack(loaded.right.packed), net.right.weight)
    assert loaded.right.retained == layout_of(net.right).retained < 1
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "model.safetensors"]
