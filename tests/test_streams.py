"""Which layers have to share an order, said before anything is pruned."""

import pytest
import torch
from torch import Tensor, nn

from lightning_hinm import HiNMPattern, prune, shared_orders
from lightning_hinm.passes import absorb_orders_pass
from tests.graphs import moved, restored, result, set_orders, sparse_graph
from tests.networks import NETWORKS

PATTERN = HiNMPattern(8)
pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Block(nn.Module):
    """A residual block of a stream that the caller passes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 64), nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Tower(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(blocks))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for block in self.blocks:
            y = block(y)
        return self.head(y)


TEXT = torch.arange(6).view(2, 3)


def pairs(count: int) -> list[list[str]]:
    return [[f"blocks.{i}.gate", f"blocks.{i}.up"] for i in range(count)]


def test_a_stream_is_listed_where_one_order_spares_more_restores_than_copies() -> None:
    assert shared_orders(Tower(2), TEXT, pattern=PATTERN) == pairs(2)  # one copy in, one out
    residual = [f"blocks.{i}.down" for i in range(3)]
    assert shared_orders(Tower(3), TEXT, pattern=PATTERN) == [pairs(3)[0], residual, *pairs(3)[1:]]


def test_only_layers_that_will_be_pruned_are_listed() -> None:
    model = Tower(3)
    assert shared_orders(model, TEXT, pattern=PATTERN, include=["re:.*(gate|up)$"]) == pairs(3)
    assert shared_orders(model, TEXT, pattern=PATTERN, ignore=["re:.*up$", "blocks.0.down"]) == []
    patterns = {"re:.*gate$": HiNMPattern(16), "*": PATTERN}
    assert shared_orders(model, TEXT, pattern=patterns) == [[f"blocks.{i}.down" for i in range(3)]]
    with pytest.raises(ValueError, match="'nothing' matches no Linear"):
        shared_orders(model, TEXT, ignore=["nothing"])


def test_a_layer_that_is_called_twice_joins_what_it_writes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.a(x) + self.b(x)) + self.d(self.a(x).relu() * self.c(x))

    assert shared_orders(Twice(), torch.randn(3, 32), pattern=PATTERN) == [["a", "b", "c"]]


def test_the_model_its_modes_and_what_was_compiled_of_it_stay_as_they_are() -> None:
    model = Tower(2)
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(TEXT)
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(recompile_limit=3):
            for _ in range(4):
                assert shared_orders(model, TEXT, pattern=PATTERN) == pairs(2)
        assert [module.training for module in model.modules()] == before
        torch._dynamo.utils.counters.clear()
        compiled(TEXT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


class Broken(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks[0](self.embed(x))
        torch._dynamo.graph_break()
        return self.head(self.blocks[1](y))


def test_a_model_whose_graph_breaks_is_followed_in_pieces() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList([Broken(2), Broken(2)])

        def forward(self, x: Tensor) -> Tensor:
            return self.towers[0](x) + self.towers[1](x)

    model = Both()
    names = [f"towers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]
    for _ in range(2):
        torch._dynamo.utils.counters.clear()
        assert shared_orders(model, TEXT, pattern=PATTERN) == [[f"{name}.gate", f"{name}.up"] for name in names]
    # Of what Dynamo compiles of a model only so often, a second tracing needs nothing.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert shared_orders(model, TEXT, pattern=PATTERN, include=["towers.1.blocks.0"]) == [
        ["towers.1.blocks.0.gate", "towers.1.blocks.0.up"]
    ]


@pytest.mark.parametrize(
    "name",
    ["resnet18", "convnext", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "mobilenet-v3", "vit"))],
)
def test_layers_that_share_the_orders_that_are_listed_restore_less(name: str) -> None:
    model, inputs = NETWORKS[name].make(), NETWORKS[name].inputs(2)
    sets = shared_orders(model, *inputs.values(), pattern=PATTERN)
    assert sets
    left = []
    for shared in ([], sets):
        set_orders(model, PATTERN, shared)
        gm, _ = sparse_graph(model, **inputs)
        absorb_orders_pass(gm)
        left.append(sum(restored(gm)))
    assert left[1] < left[0]


@pytest.mark.parametrize(
    ("name", "in_order"),
    [
        ("bert", ["re:.*(query|key|value|output.dense|pooler.dense)$"]),
        pytest.param("gpt2", ["re:.*(c_attn|c_proj)$"], marks=pytest.mark.slow),
        ("llama", ["re:.*([qkvo]|down)_proj$"]),
        ("vit", ["re:.*qkv$", "heads"]),
    ],
)
def test_a_transformer_restores_nothing_if_rows_stay_in_order_where_they_are_read_so(
    name: str, in_order: list[str]
) -> None:
    model, inputs = NETWORKS[name].make(), NETWORKS[name].inputs(2)
    sets = shared_orders(model, pattern=PATTERN, **inputs)  # inputs by name
    report = prune(model, PATTERN, shared_orders=sets, in_order=in_order)
    gm, _ = sparse_graph(model, **inputs)
    before = sum(restored(gm))
    absorb_orders_pass(gm)
    assert before > 0 == sum(restored(gm))
    assert len(restored(gm)) == len(report.pruned)
    assert len(moved(gm)) == (name == "vit")  # whose class token enters the stream


@pytest.mark.parametrize(
    ("name", "in_order", "heads", "shared"),
    [
        ("bert", ["re:.*(output.dense|pooler.dense)$"], {"re:.*(query|key|value)$": 4}, [["re:.*(query|key)$"]]),
        ("llama", ["re:.*([qko]|down)_proj$"], {"re:.*v_proj$": 2}, [["re:.*(gate|up)_proj$"]]),
    ],
)
def test_a_transformer_restores_nothing_if_rows_stay_in_their_heads(
    name: str, in_order: list[str], heads: dict[str, int], shared: list[list[str]]
) -> None:
    model, inputs = NETWORKS[name].make(), NETWORKS[name].inputs(2)
    report = prune(model, HiNMPattern(4), shared_orders=shared, in_order=in_order, heads=heads)
    gm, values = sparse_graph(model, **inputs)
    before, expected = sum(restored(gm)), result(gm, values)
    absorb_orders_pass(gm)
    assert before > 0 == sum(restored(gm))
    assert len(restored(gm)) == len(report.pruned)
    assert not moved(gm)
    torch.testing.assert_close(result(gm, values), expected)


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("resnet18", "inductor"),
        *(pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in ("vit", "llama")),
    ],
)
def test_a_network_with_shared_orders_compiles_to_what_the_masked_model_computes(name: str, inner: str) -> None:
    network = NETWORKS[name]
    model = network.make().eval()
    set_orders(model, PATTERN, shared_orders(model, *network.inputs(2).values(), pattern=PATTERN))
    options = {"plan": "sparse", "inner": inner}
    function = torch.compile(model, backend="hinm", fullgraph=True, dynamic=inner == "aot_eager", options=options)
    with torch.inference_mode():
        for batch in (2, 3) if inner == "aot_eager" else (2,):
            inputs = network.inputs(batch)
            actual, expected = function(**inputs), model(**inputs)
            actual, expected = (out if isinstance(out, Tensor) else out[0] for out in (actual, expected))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
