import copy
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_hinm.gyro import search_shared
from lightning_hinm.layout import check_layout
from lightning_hinm.mask import hinm_mask
from lightning_hinm.pattern import HiNMPattern, to_matrix
from lightning_hinm.prune import LayerReport, PruningReport, find_layers, layout_of, prune
from tests.strategies import patterns

PATTERN = HiNMPattern(4, 0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.block = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        self.line = nn.Conv1d(16, 8, 3)
        self.head = nn.Linear(16, 2)
        self.register_buffer("attn_mask", torch.ones(4, 4))


def reasons(model: nn.Module, **arguments: object) -> dict[str, str | None]:
    return {entry.name: entry.reason for entry in find_layers(model, PATTERN, **arguments)[1]}


def names(model: nn.Module, **arguments: object) -> list[str]:
    return [layer.name for layer in find_layers(model, PATTERN, **arguments)[0]]


# --- prune ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(patterns(), st.integers(1, 20), st.integers(1, 40), st.integers(0, 99))
def test_what_is_left_is_exactly_the_pattern_of_the_layout(pattern, rows, columns, seed):
    model = nn.Linear(columns, rows)
    before = model.weight.detach().clone()
    if (
        rows < pattern.vector_size
        or columns < pattern.m
        or pattern.kept(columns) * pattern.n >= pattern.padded(columns) * pattern.m
    ):
        with pytest.raises(ValueError, match="nothing to prune"):
            prune(model, pattern)
        assert torch.equal(model.weight, before)
        return
    report = prune(model, pattern)
    layout = layout_of(model)
    check_layout(layout, rows, columns)
    mask = hinm_mask(before.abs(), layout)
    assert torch.equal(model.weight, before.masked_fill(~mask, 0))
    assert report.layers[0].sparsity == pytest.approx(1 - mask.float().mean().item())


def test_every_kind_of_layer_is_pruned_to_the_sparsity_and_nothing_else_changes():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    report = prune(model, PATTERN)
    assert [layer.name for layer in report.pruned] == ["conv", "grouped", "block.0", "block.2", "line"]
    for layer in report.pruned:
        weight = model.get_parameter(f"{layer.name}.weight")
        assert (weight == 0).double().mean().item() == pytest.approx(layer.sparsity)
        assert layer.sparsity == pytest.approx(0.75, abs=0.05)
        assert 0 < layer.retained < 1
        assert ((weight == before[f"{layer.name}.weight"]) | (weight == 0)).all()
    untouched = [name for name in before if name.removesuffix(".weight") not in {r.name for r in report.pruned}]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in untouched)
    assert list(model.state_dict()) == list(before)


def test_rows_of_a_grouped_convolution_stay_in_their_group():
    model = Net()
    prune(model, PATTERN)
    check_layout(layout_of(model.grouped), 16, 4 * 9, groups=2)


def test_the_saliency_given_decides_who_survives():
    model = nn.Linear(8, 8)
    saliency = torch.rand(8, 8)
    with torch.no_grad():
        model.weight.fill_(1.0)
    prune(model, PATTERN, saliency={"": saliency})
    assert torch.equal(model.weight != 0, hinm_mask(saliency, layout_of(model)))


@pytest.mark.parametrize(
    ("saliency", "message"),
    [
        ("taylor", "without data only 'magnitude'"),
        ({}, "got nothing, but the weight is"),
        ({"": torch.rand(2, 2)}, r"got \[2, 2\]"),
        ({"": -torch.ones(8, 8)}, "64 of 64 values are negative"),
    ],
)
def test_a_saliency_that_does_not_fit_is_refused_and_nothing_changes(saliency, message):
    model = nn.Linear(8, 8)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        prune(model, PATTERN, saliency=saliency)
    assert torch.equal(model.weight, before)
    assert layout_of(model) is None


def test_the_layout_survives_deepcopy_and_stays_out_of_the_state_dict():
    model = nn.Sequential(nn.Linear(8, 8))
    prune(model, PATTERN)
    assert torch.equal(layout_of(copy.deepcopy(model)[0]).vector_index, layout_of(model[0]).vector_index)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_the_layout_knows_what_the_report_says_that_the_layer_retained():
    model = Net()
    for entry in prune(model, PATTERN).pruned:
        assert layout_of(model.get_submodule(entry.name)).retained == entry.retained < 1


def test_what_is_not_known_is_no_number_in_the_table():
    known, unknown = (LayerReport("fc", "linear", (8, 8), 0.75, retained) for retained in (0.5, None))
    assert [str(PruningReport((entry,))).splitlines()[1].split()[4] for entry in (known, unknown)] == ["0.5000", "-"]


def test_a_shared_weight_is_pruned_once_and_both_layers_know_the_layout():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = prune(model, PATTERN)
    assert [layer.name for layer in report.pruned] == ["0"]
    assert "shares its weight with '0'" in report.layers[1].reason
    assert torch.equal(layout_of(model[1]).vector_index, layout_of(model[0]).vector_index)


class Residual(nn.Module):
    """Two layers that write one stream, two whose outputs are multiplied, and what no set can take."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(16, 32)
        self.down = nn.Conv1d(24, 32, 1)
        self.gate = nn.Linear(32, 24)
        self.up = nn.Linear(32, 24)
        self.grouped = nn.Conv2d(8, 32, 1, groups=2)
        self.tied = nn.Linear(16, 32)
        self.tied.weight = self.attention.weight
        self.head = nn.Linear(32, 2)


SETS = [["attention", "down"], ["re:gate|up"]]


def test_layers_that_share_an_order_have_one_and_the_others_their_own():
    model = Residual()
    before = copy.deepcopy(model)
    report = prune(model, {"down": HiNMPattern(4, 0.75), "re:": PATTERN}, shared_orders=SETS)
    orders = {layer.name: layout_of(model.get_submodule(layer.name)).output_order for layer in report.pruned}
    assert list(orders) == ["attention", "down", "gate", "up", "grouped"]
    assert torch.equal(orders["attention"], orders["down"])
    assert torch.equal(orders["gate"], orders["up"])
    assert not torch.equal(orders["attention"], orders["grouped"])
    for layer in report.pruned:
        module, dense = model.get_submodule(layer.name), before.get_submodule(layer.name)
        matrix, layout = dense.weight.flatten(1).detach(), layout_of(module)
        check_layout(layout, *matrix.shape, groups=getattr(module, "groups", 1))
        assert torch.equal(module.weight.flatten(1), matrix.masked_fill(~hinm_mask(matrix.abs(), layout), 0))
        assert layout.retained == layer.retained < 1
    assert layout_of(model.down).pattern.vector_sparsity == 0.75


def test_a_shared_order_costs_a_little_of_what_is_retained():
    torch.manual_seed(0)
    model = Residual()

    def retained_by(**arguments: object) -> dict[str, float]:
        report = prune(copy.deepcopy(model), PATTERN, ignore=["grouped"], **arguments)
        return {layer.name: layer.retained for layer in report.pruned}

    own, shared, identity = retained_by(), retained_by(shared_orders=SETS), retained_by(method="identity")
    for one, two in [("attention", "down"), ("gate", "up")]:
        assert identity[one] + identity[two] < shared[one] + shared[two] <= own[one] + own[two] + 1e-3


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([["attention", "gate"]], r"shared_orders\[0\]: one order needs one number of rows.*'gate': 24"),
        ([["gate", "up"], ["Linear"]], r"(?s)shared_orders\[1\]: gate is in shared_orders\[0\] too\n.*: up is in"),
        ([["gate", "dwon"]], r"shared_orders\[0\]: 'dwon' matches no"),
        ([["gate", "re:("]], "'re:\\(' is not a regular expression"),
        ([["attention", "grouped"]], r"grouped has groups=2, but no row may leave its group"),
        ([["attention", "tied"]], r"tied is not pruned: shares its weight with 'attention', and is pruned with it"),
        ([["attention", "head"]], r"head is not pruned: 2 rows are less than one tile"),
        ([["attention", "wide"]], r"one order needs one vector_size, but the layers have .*'wide': 8"),
        ([["attention", "left_out"]], r"left_out is not pruned: in `ignore`"),
        ([["attention", "normed"]], r"normed is not pruned: in `ignore`"),
        ([["attention", "grouped"], ["gate", "head"]], r"(?s)shared_orders\[0\]: .*shared_orders\[1\]: "),
    ],
)
def test_layers_that_cannot_share_an_order_are_refused_at_once_and_nothing_changes(sets, message):
    model = Residual()
    model.wide, model.left_out = nn.Linear(16, 32), nn.Linear(16, 32)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 32))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        prune(
            model,
            {"wide": HiNMPattern(8), "re:": PATTERN},
            ignore=["left_out", "normed"],
            shared_orders=sets,
        )
    assert str(error.value).startswith("Nothing was pruned: `shared_orders` does not fit. Correct or remove these:")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_that_shall_stay_in_order_do_and_their_vectors_are_searched():
    torch.manual_seed(0)
    model = Residual()
    entries = ["attention", "re:gate|grouped"]
    free, kept, identity = (
        prune(copy.deepcopy(model), PATTERN, **arguments)
        for arguments in ({}, {"in_order": entries}, {"method": "identity", "in_order": entries})
    )
    prune(model, PATTERN, in_order=entries)
    for one, two, three in zip(free.pruned, kept.pruned, identity.pruned, strict=True):
        order = layout_of(model.get_submodule(two.name)).output_order
        if two.name in ("attention", "gate", "grouped"):
            assert torch.equal(order, torch.arange(len(order)))
            assert three.retained <= two.retained <= one.retained
            assert two.name == "grouped" or three.retained < two.retained < one.retained  # that has one group a tile
        else:
            assert not torch.equal(order, torch.arange(len(order)))
            assert two.retained == one.retained


def test_rows_stay_in_their_heads_and_gain_from_an_order_inside_them():
    torch.manual_seed(0)
    model = Residual()
    heads = {"attention": 4, "re:attention|gate|up": 2}  # the first that matches holds
    free, kept, fixed = (
        prune(copy.deepcopy(model), HiNMPattern(4), **arguments)
        for arguments in ({}, {"heads": heads}, {"in_order": ["attention", "gate"]})
    )
    prune(model, HiNMPattern(4), heads=heads, shared_orders=[["gate", "up"]])
    for name, count in {"attention": 4, "gate": 2, "up": 2}.items():
        order = layout_of(model.get_submodule(name)).output_order
        head = len(order) // count
        assert torch.equal(order // head, torch.arange(len(order)) // head)
        assert not torch.equal(order, torch.arange(len(order)))
    assert torch.equal(layout_of(model.gate).output_order, layout_of(model.up).output_order)
    retained = [{layer.name: layer.retained for layer in report.pruned} for report in (fixed, kept, free)]
    for name in ("attention", "gate"):
        assert retained[0][name] < min(retained[1][name], retained[2][name])
    assert retained[1]["down"] == retained[2]["down"]


def test_heads_of_a_grouped_convolution_are_those_of_each_group():
    model = nn.Sequential(nn.Conv2d(16, 32, 1, groups=2))
    prune(model, HiNMPattern(4), heads={"*": 2})
    order = layout_of(model[0]).output_order
    assert torch.equal(order // 8, torch.arange(32) // 8)
    assert not torch.equal(order, torch.arange(32))


@pytest.mark.parametrize("count", [0, 2.0, True, None])
def test_a_number_of_heads_is_a_number(count):
    with pytest.raises(TypeError, match=r"heads\['gate'\]: got .* must be a number of heads"):
        prune(Residual(), PATTERN, heads={"gate": count})


def test_a_shared_weight_stays_in_order_by_each_of_its_names():
    model = Residual()
    prune(model, PATTERN, in_order=["tied"])
    order = layout_of(model.attention).output_order
    assert torch.equal(order, torch.arange(len(order)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_order": ["gtae"]}, "in_order: 'gtae' matches no"),
        ({"in_order": ["gate"], "shared_orders": SETS}, "gate is in `in_order`, so it takes no order from others"),
        ({"heads": {"gtae": 2}}, "heads: 'gtae' matches no"),
        ({"heads": {"gate": 5}}, "gate has 24 rows, which are no 5 equal parts of whole tiles of vector_size="),
        ({"heads": {"gate": 24}}, "gate has 24 rows, which are no 24 equal parts of whole tiles of vector_size="),
        ({"heads": {"gate": 2}, "in_order": ["gate"]}, "heads: gate is in `in_order` too"),
        ({"heads": {"gate": 2}, "shared_orders": SETS}, "one order needs one number of heads, but the layers have"),
    ],
)
def test_rows_that_cannot_stay_in_order_are_refused_and_nothing_changes(arguments, message):
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, PATTERN, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sets_that_are_no_lists_of_strings_are_refused():
    with pytest.raises(TypeError, match=r"shared_orders\[0\]: got the string 'gate', but it must be a list of strings"):
        prune(Residual(), PATTERN, shared_orders=["gate", "up"])


def test_a_set_counts_as_one_in_the_time_budget_and_in_the_log(monkeypatch, caplog):
    budgets = []

    def instant(scores, patterns, **settings):
        budgets.append(settings["time_budget"])
        settings["time_budget"] = None
        return [replace(result, seconds=0.0) for result in search_shared(scores, patterns, **settings)]

    monkeypatch.setattr(sys.modules["lightning_hinm.prune"], "search_shared", instant)
    monkeypatch.setattr("lightning_hinm.gyro.problem.SECONDS_BETWEEN_REPORTS", 0.0)
    with caplog.at_level("INFO", logger="lightning_hinm"):
        prune(Residual(), PATTERN, ignore=["grouped"], shared_orders=SETS, time_budget=100.0)
    sizes = [16 * 32 + 24 * 32, 2 * 32 * 24]
    assert budgets == [pytest.approx(100 * sizes[0] / sum(sizes)), 100.0]
    assert "prune: attention, down: gap closed" in caplog.text


def test_patterns_by_name_use_the_first_that_matches():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 8))
    two = {"1": HiNMPattern(8, 0.75, 1, 2), "Linear": PATTERN}
    prune(model, two, ignore=["2"])
    assert layout_of(model[0]).pattern == PATTERN
    assert layout_of(model[1]).pattern == two["1"]
    assert layout_of(model[2]) is None


def test_a_budget_of_zero_says_that_it_ended_the_search():
    report = prune(nn.Sequential(nn.Linear(16, 16)), PATTERN, time_budget=0)
    assert report.layers[0].ended_by_budget
    assert "ended by the time budget" in str(report)


def test_the_report_is_a_table_of_every_layer_with_its_numbers_or_its_reason():
    lines = str(prune(Net(), PATTERN)).splitlines()
    assert [line.split()[0] for line in lines] == [
        "layer", "conv", "grouped", "depthwise", "block.0", "block.2", "line", "head",
    ]  # fmt: skip
    assert "8x4x3x3" in lines[1]
    assert "skipped: depthwise convolution" in lines[3]
    assert "skipped: 2 rows are less than one tile of vector_size=4" in lines[7]


# --- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (["conv"], ["conv"]),
        (["block"], ["block.0", "block.2"]),
        (["block.2", "line"], ["block.2", "line"]),
        (["Linear"], ["block.0", "block.2"]),
        (["re:.*conv|block\\.0"], ["conv", "block.0"]),
    ],
)
def test_include_takes_names_containers_classes_and_expressions(include, expected):
    assert names(Net(), include=include) == expected


def test_ignore_speaks_the_same_dialect():
    assert names(Net(), ignore=["Conv2d", "block.0"]) == ["block.2", "line"]
    assert reasons(Net(), ignore=["conv"])["conv"] == "in `ignore`"


def test_layers_that_cannot_be_read_are_listed_too():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight - self.weight.mean())

    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    model = nn.Sequential(Standardised(4, 8, 3), nn.Linear(16, 16), parametrised)
    report = prune(model, PATTERN, ignore=["2"])
    assert [(entry.name, entry.kind) for entry in report.layers] == [("0", "conv2d"), ("1", "linear"), ("2", "linear")]
    assert report.layers[0].reason == (
        "Standardised has a forward of its own: what it does with its weight is not known"
    )
    assert report.layers[2].reason == "in `ignore`"
    assert reasons(model, include=["1"])["2"] == "not in `include`"


def test_all_entries_that_match_nothing_stand_in_one_message():
    with pytest.raises(ValueError, match=r"(?s)include: 'fc9' matches no.*ignore: 're:x\.' matches no") as error:
        find_layers(Net(), PATTERN, include=["fc9"], ignore=["re:x."])
    assert "Its layers are conv, grouped" in str(error.value)


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"'re:\(' is not a regular expression"):
        find_layers(Net(), PATTERN, include=["re:("])


def test_a_string_instead_of_a_list_is_refused():
    with pytest.raises(TypeError, match="must be a list of strings"):
        find_layers(Net(), PATTERN, include="conv")


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"pattern: got 0\.75"):
        find_layers(Net(), 0.75)


def test_a_model_with_nothing_prunable_is_refused_with_every_reason():
    with pytest.raises(ValueError, match=r"(?s)nothing to prune.*0: 2 rows are less than one tile"):
        find_layers(nn.Sequential(nn.Linear(8, 2), nn.ReLU()), PATTERN)


def test_all_layers_with_nan_or_infinite_weights_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
        model[2].weight[:, 0] = float("inf")
    with pytest.raises(ValueError, match=r"(?s)0: 1 of 64 weights.*2: 8 of 64 weights"):
        prune(model, PATTERN)
    assert not (model[1].weight == 0).any()


def test_a_parametrised_weight_is_refused_unless_it_is_ignored():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="0: its weight is parametrised"):
        find_layers(model, PATTERN)
    assert names(model, ignore=["0"]) == ["1"]
    assert names(model, include=["1"]) == ["1"]


def test_weights_that_are_not_there_yet_are_refused():
    with pytest.raises(ValueError, match="not initialised"):
        find_layers(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)), PATTERN)
    with pytest.raises(ValueError, match="meta device"):
        find_layers(nn.Linear(8, 8, device="meta"), PATTERN)


def test_a_head_tied_to_an_embedding_is_left_out_and_says_so():
    model = nn.ModuleDict({"emb": nn.Embedding(16, 8), "fc": nn.Linear(8, 8), "head": nn.Linear(8, 16, bias=False)})
    model["head"].weight = model["emb"].weight
    assert reasons(model) == {"head": "its weight is that of the embedding 'emb'"}


def test_the_projection_inside_multihead_attention_is_left_out_and_says_so():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    assert "reads the projection's weight by itself" in reasons(model)["attn.out_proj"]


def test_groups_that_are_no_multiple_of_a_tile_are_left_out():
    assert (
        "6 rows a group are no multiple of vector_size=4"
        in reasons(nn.Sequential(nn.Conv2d(8, 12, 1, groups=2), nn.Linear(8, 8)))["0"]
    )


def test_a_matrix_seen_by_the_core_is_a_view_of_the_weight():
    layer = find_layers(nn.Conv2d(4, 8, 3), PATTERN)[0][0]
    assert layer.matrix.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(layer.to_weight(layer.matrix), layer.weight)
    assert torch.equal(to_matrix(layer.weight, "conv2d"), layer.matrix)


def test_an_interrupt_during_the_search_leaves_every_weight_as_it_was(monkeypatch):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    before, searched = copy.deepcopy(model.state_dict()), []

    def interrupted(*args, **settings):
        if searched:
            raise KeyboardInterrupt
        searched.append(search_shared(*args, **settings))
        return searched[0]

    monkeypatch.setattr(sys.modules["lightning_hinm.prune"], "search_shared", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(model, HiNMPattern(8))
    assert len(searched) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(layout_of(layer) is None for layer in model)


def test_a_long_search_is_logged_by_the_name_of_its_layer(monkeypatch, caplog):
    monkeypatch.setattr("lightning_hinm.gyro.problem.SECONDS_BETWEEN_REPORTS", 0.0)
    with caplog.at_level("INFO", logger="lightning_hinm"):
        prune(nn.Sequential(nn.Linear(32, 32)), HiNMPattern(8))
    assert "prune: 0: gap closed 0." in caplog.text
