import json
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_hinm.format import (
    FileContents,
    HiNMWeight,
    LayerRecord,
    check_packed,
    expand,
    export_checkpoint,
    layer_state,
    load_layouts,
    pack,
    pack_bits,
    packing,
    read_contents,
    read_header,
    read_layer_state,
    unpack,
    unpack_bits,
    write_file,
)
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import choose_vectors, hinm_mask
from lightning_hinm.pattern import HiNMPattern, layer_kind
from lightning_hinm.prune import layout_of, prune

SMALL = HiNMPattern(4)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
law = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def random_layout(rows: int, in_features: int, pattern: HiNMPattern, generator: torch.Generator) -> HiNMLayout:
    """Random rows, random vectors, grouped at random as far as windows and virtual columns allow."""
    order = torch.randperm(rows, generator=generator)
    index = choose_vectors(torch.rand(rows, in_features, generator=generator), pattern, order)
    start = 0
    for first, last in pattern.runs(in_features):
        stop = start + pattern.kept_of_run(last - first)
        # virtual columns stay in the last group
        for part in (slice(start, stop - pattern.m), slice(stop - pattern.m, stop)):
            for tile in index:
                tile[part] = tile[part][torch.randperm(len(tile[part]), generator=generator)]
        start = stop
    return HiNMLayout(pattern, order, index)


def masked(weight: Tensor, layout: HiNMLayout, groups: int = 1) -> Tensor:
    """``weight`` with zeros where the layout prunes; every group of a grouped convolution is a matrix of its own."""
    rows, matrix = weight.shape[0] // groups, weight.flatten(1)
    tiles = len(layout.vector_index) // groups
    masks = []
    for group in range(groups):
        order = layout.output_order[group * rows : (group + 1) * rows] - group * rows
        own = HiNMLayout(layout.pattern, order, layout.vector_index[group * tiles : (group + 1) * tiles])
        masks.append(hinm_mask(matrix[group * rows : (group + 1) * rows].abs(), own))
    return weight * torch.cat(masks).reshape(weight.shape)


@st.composite
def packables(draw: st.DrawFn) -> tuple[Tensor, HiNMLayout, int]:
    n, m = draw(st.sampled_from([(1, 2), (1, 4), (2, 4), (2, 8), (4, 8), (3, 4), (3, 5), (4, 4), (1, 1)]))
    v = draw(st.integers(1, 6))
    window = draw(st.sampled_from([None, m, 2 * m, 64 * m]))
    pattern = HiNMPattern(v, draw(st.sampled_from([0, 0.25, 0.5, 0.7])), n, m, window)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    rows = draw(st.integers(1, 20)) if groups == 1 else v * draw(st.integers(1, 3))
    kernel = draw(st.sampled_from([(), (1,), (3,), (1, 1), (2, 3)])) if groups == 1 else (3,)
    channels = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    parts = [random_layout(rows, channels * torch.Size(kernel).numel(), pattern, generator) for _ in range(groups)]
    layout = HiNMLayout(
        pattern,
        torch.cat([part.output_order + rows * group for group, part in enumerate(parts)]),
        torch.cat([part.vector_index for part in parts]),
    )
    weight = torch.randn(rows * groups, channels, *kernel, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < draw(st.sampled_from([1.0, 0.5]))  # rows may hold less
    return masked(weight, layout, groups).to(draw(st.sampled_from(DTYPES))), layout, groups


def example(
    rows: int = 12, in_features: int = 20, pattern: HiNMPattern = SMALL, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, HiNMLayout]:
    generator = torch.Generator().manual_seed(rows * in_features)
    layout = random_layout(rows, in_features, pattern, generator)
    return masked(torch.randn(rows, in_features, generator=generator), layout).to(dtype), layout


# ---------------------------------------------------------------- packing


@law
@given(packables())
def test_unpack_is_the_exact_inverse_of_pack(case: tuple[Tensor, HiNMLayout, int]) -> None:
    weight, layout, groups = case
    packed = pack(weight, layout, groups=groups)
    check_packed(packed, groups=groups)
    back = unpack(packed)
    assert (back.shape, back.dtype) == (weight.shape, weight.dtype)
    assert torch.equal(back, weight)
    assert torch.equal(packed.layout.output_order, layout.output_order)
    assert torch.equal(packed.layout.vector_index, layout.vector_index)


@law
@given(packables())
def test_expand_shows_the_kept_vectors_of_each_tile(case: tuple[Tensor, HiNMLayout, int]) -> None:
    weight, layout, groups = case
    v, matrix = layout.pattern.vector_size, weight.flatten(1)
    expanded = expand(pack(weight, layout, groups=groups))
    expected = torch.zeros(len(layout.vector_index), v, layout.vector_index.shape[1], dtype=weight.dtype)
    for position, row in enumerate(layout.output_order):
        for p, column in enumerate(layout.vector_index[position // v]):
            if column < matrix.shape[1]:
                expected[position // v, position % v, p] = matrix[row, column]
    assert torch.equal(expanded, expected)


@settings(max_examples=25)
@given(packables())
def test_values_and_metadata_are_those_of_a_loop_over_the_definition(case: tuple[Tensor, HiNMLayout, int]) -> None:
    weight, layout, groups = case
    pattern, matrix = layout.pattern, weight.flatten(1)
    packed = pack(weight, layout, groups=groups)
    bits = 0 if pattern.n == pattern.m else (pattern.m - 1).bit_length()
    for position, row in enumerate(layout.output_order.tolist()):
        values, word, shift = [], 0, 0
        for group in layout.vector_index[position // pattern.vector_size].split(pattern.m):
            content = [matrix[row, c].item() if c < matrix.shape[1] else 0.0 for c in group.tolist()]
            taken = [i for i, x in enumerate(content) if x != 0]
            taken += [i for i in range(pattern.m) if i not in taken][: pattern.n - len(taken)]
            for i in sorted(taken):
                values.append(content[i])
                word |= i << shift
                shift += bits
        assert packed.values[position].tolist() == values
        expected = list(word.to_bytes(-(-shift // 8), "little")) if bits else []
        assert packed.metadata[position].tolist() == expected


@given(st.lists(st.booleans(), max_size=40))
def test_unpack_bits_is_the_inverse_of_pack_bits(flags: list[bool]) -> None:
    packed = pack_bits(torch.tensor(flags, dtype=torch.bool))
    assert packed.shape == (-(-len(flags) // 8),)
    assert unpack_bits(packed, len(flags)).tolist() == flags


def test_two_of_four_takes_one_nibble_a_group_lowest_first() -> None:
    layout = HiNMLayout(HiNMPattern(1, 0.0), torch.tensor([0]), torch.arange(12)[None])
    weight = torch.tensor([[0, 1.0, 0, 2, 3, 4, 0, 0, 0, 0, 5, 6]])
    packed = pack(weight, layout)
    assert packed.values.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert packed.metadata.tolist() == [[0b0100_1101, 0b0000_1110]]


@pytest.mark.parametrize(("zeros", "positions"), [([0, 1, 2, 3], [0, 1]), ([1, 2, 3], [0, 1]), ([0, 1, 2], [0, 3])])
def test_missing_values_fill_the_lowest_free_positions(zeros: list[int], positions: list[int]) -> None:
    layout = HiNMLayout(HiNMPattern(1, 0.0), torch.tensor([0]), torch.tensor([[2, 0, 3, 1]]))
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    weight[0, layout.vector_index[0, zeros]] = 0
    packed = pack(weight, layout)
    assert packing.unpack_positions(packed).flatten().tolist() == positions
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (1, 1)])
def test_no_metadata_where_every_weight_of_a_group_is_kept(n: int, m: int) -> None:
    weight, layout = example(pattern=HiNMPattern(4, 0.5, n, m))
    assert pack(weight, layout).metadata.shape == (12, 0)


@pytest.mark.parametrize(
    ("in_features", "dtype"), [(256, torch.uint8), (257, torch.uint16), (65536, torch.uint16), (65537, torch.uint32)]
)
def test_an_index_takes_the_smallest_unsigned_type_that_fits(in_features: int, dtype: torch.dtype) -> None:
    weight, layout = example(2, in_features, HiNMPattern(2, window=None))
    packed = pack(weight, layout)
    check_packed(packed)
    assert (packed.vector_index.dtype, packed.output_order.dtype) == (dtype, torch.uint8)
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize(("rows", "in_features"), [(64, 384), (384, 1536), (128, 4608)])
def test_a_half_precision_layer_at_75_percent_takes_at_most_30_percent_of_its_dense_bytes(
    rows: int, in_features: int
) -> None:
    weight, layout = example(rows, in_features, HiNMPattern(), torch.float16)
    assert pack(weight, layout).nbytes <= 0.3 * weight.nbytes


def test_large_weights_are_packed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, layout = example(22, 50, HiNMPattern(4, 0.5, 2, 4, 8))
    whole = pack(weight, layout)
    monkeypatch.setattr(packing, "BLOCK", 100)
    assert len(packing.blocks(layout, 52)) == 6
    packed = pack(weight, layout)
    check_packed(packed)
    assert all(torch.equal(a, b) for a, b in zip(packed.tensors.values(), whole.tensors.values(), strict=True))
    assert torch.equal(unpack(packed), weight)
    assert torch.equal(expand(packed), expand(whole))


def test_pack_refuses_whatever_is_not_zero_outside_the_pattern() -> None:
    weight, layout = example()
    dropped = next(c for c in range(20) if c not in layout.vector_index[0])
    weight[layout.output_order[0], dropped] = 1.0
    full = layout.vector_index[0, :3]
    weight[layout.output_order[1], full] = 1.0
    with pytest.raises(ValueError, match=r"encoder\.fc: 2 of 240 weights are not zero outside the pattern"):
        pack(weight, layout, name="encoder.fc")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-45])
def test_whatever_is_not_zero_counts_as_a_weight(value: float) -> None:
    weight, layout = example()
    weight[layout.output_order[0]] = 0
    inside = weight.clone()
    inside[layout.output_order[0], layout.vector_index[0, 3]] = value
    assert torch.equal(unpack(pack(inside, layout)).nan_to_num(7), inside.nan_to_num(7))
    dropped = next(c for c in range(20) if c not in layout.vector_index[0])
    weight[layout.output_order[0], dropped] = value
    with pytest.raises(ValueError, match="1 of 240 weights"):
        pack(weight, layout)


def test_negative_zeros_count_as_zeros() -> None:
    weight, layout = example()
    weight[weight == 0] = -0.0
    assert torch.equal(unpack(pack(weight, layout)), weight)


def test_inputs_are_untouched_and_a_parameter_packs_without_a_graph() -> None:
    weight, layout = example()
    parameter = nn.Parameter(weight.clone())
    assert not pack(parameter, layout).values.requires_grad
    assert torch.equal(parameter, weight)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(12, 20, dtype=torch.int32),
        torch.zeros(240),
        torch.zeros(12, 0),
        torch.zeros(12, 20, device="meta"),
    ],
)
def test_pack_refuses_what_is_no_weight(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"fc: got .* can be packed"):
        pack(weight, example()[1], name="fc")


def test_pack_refuses_the_layout_of_another_weight() -> None:
    with pytest.raises(ValueError, match="fc: output_order has 12 entries, but the weight has 13 rows"):
        pack(torch.zeros(13, 20), example()[1], name="fc")


def test_a_packed_weight_moves_between_devices() -> None:
    weight, layout = example()
    packed = pack(weight, replace(layout, retained=0.3)).to("meta")
    assert {tensor.device.type for tensor in packed.tensors.values()} == {"meta"}
    assert (packed.shape, packed.pattern, packed.retained) == ((12, 20), layout.pattern, 0.3)


def change(packed: HiNMWeight, **fields: Any) -> HiNMWeight:
    return HiNMWeight(**{**packed.tensors, "shape": packed.shape, "pattern": packed.pattern, **fields})


def put(tensor: Tensor, at: Any, value: Any) -> Tensor:
    """A copy with one entry changed; uint16 and uint32 can be indexed only as int64."""
    changed = tensor.to(torch.int64) if tensor.dtype in (torch.uint16, torch.uint32) else tensor.clone()
    changed[at] = value
    return changed.to(tensor.dtype)


DAMAGES: dict[str, tuple[Callable[[HiNMWeight], HiNMWeight], str]] = {
    "values of int": (lambda p: change(p, values=p.values.int()), "values are torch.int32"),
    "values too short": (lambda p: change(p, values=p.values[:, 1:]), r"values is .* but must be torch.float32 \[12,"),
    "metadata too short": (lambda p: change(p, metadata=p.metadata[1:]), "metadata is .* but must be torch.uint8"),
    "index too wide a type": (lambda p: change(p, vector_index=p.vector_index.to(torch.int64)), "vector_index is"),
    "order too short": (lambda p: change(p, output_order=p.output_order[1:]), "output_order is"),
    "another shape": (lambda p: change(p, shape=(12, 400)), "values is"),
    "negative shape": (lambda p: change(p, shape=(12, -20)), "all positive"),
    "huge shape": (lambda p: change(p, shape=(12, 10**18)), "too few columns"),
    "one dimension": (lambda p: change(p, shape=(12,)), "at least two dimensions"),
    "another pattern": (lambda p: change(p, pattern=HiNMPattern(4, 0.75)), "values is"),
    "row twice": (lambda p: change(p, output_order=put(p.output_order, 0, p.output_order[1])), "not a permutation"),
    "row out of range": (lambda p: change(p, output_order=put(p.output_order, 0, 200)), "not a permutation"),
    "column twice": (lambda p: change(p, vector_index=put(p.vector_index, (0, 0), p.vector_index[0, 1])), "twice"),
    "column out of range": (lambda p: change(p, vector_index=put(p.vector_index, (0, 0), 255)), "outside 0..23"),
    "positions out of order": (lambda p: change(p, metadata=put(p.metadata, (0, 0), 0b0001)), "does not rise"),
    "position twice": (lambda p: change(p, metadata=put(p.metadata, (0, 0), 0b0101)), "does not rise"),
    "padding bits": (lambda p: change(p, metadata=put(p.metadata, (0, -1), 0xF4)), "padding of a row"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_packed_weight_is_refused_by_name(damage: str) -> None:
    weight, layout = example(12, 21, HiNMPattern(4, 0.5))  # 3 groups a row: the last nibble is padding
    packed = pack(weight, layout)
    check_packed(packed, "fc")
    edit, message = DAMAGES[damage]
    with pytest.raises(ValueError, match=f"^fc: .*{message}"):
        check_packed(edit(packed), "fc")


def test_a_position_that_m_does_not_reach_is_refused() -> None:
    weight, layout = example(4, 10, HiNMPattern(4, 0.0, 3, 5, window=None))
    packed = pack(weight, layout)
    with pytest.raises(ValueError, match="or reaches m=5"):
        check_packed(change(packed, metadata=put(packed.metadata, (0, 0), 0b11_010_001)))


def test_a_value_in_a_virtual_column_is_refused() -> None:
    layout = HiNMLayout(HiNMPattern(1, 0.0), torch.tensor([0]), torch.arange(8)[None])
    packed = pack(torch.ones(1, 6) * torch.tensor([1, 1, 0, 0, 0, 1]), layout)
    assert packed.values.tolist() == [[1, 1, 0, 1]]
    damaged = change(packed, metadata=torch.tensor([[0b1001_0100]], dtype=torch.uint8))  # from column 5 to column 6
    with pytest.raises(ValueError, match="virtual columns"):
        check_packed(damaged)
    full = HiNMLayout(HiNMPattern(1, 0.0, 4, 4), torch.tensor([0]), torch.arange(8)[None])
    packed = pack(torch.ones(1, 6), full)
    check_packed(packed)
    with pytest.raises(ValueError, match="virtual columns"):
        check_packed(change(packed, values=torch.ones(1, 8)))


def test_a_column_that_leaves_its_window_is_refused() -> None:
    weight, layout = example(4, 40, HiNMPattern(4, 0.5, 2, 4, 8))
    packed = pack(weight, layout)
    index = packed.vector_index.clone()
    index[0, [0, -1]] = index[0, [-1, 0]]
    with pytest.raises(ValueError, match="leave their run"):
        check_packed(change(packed, vector_index=index))


def test_rows_that_leave_their_group_are_refused() -> None:
    weight, layout = example(8, 20)
    packed = pack(weight, HiNMLayout(layout.pattern, layout.output_order, layout.vector_index))
    with pytest.raises(ValueError, match="between the 2 groups"):
        check_packed(packed, groups=2)


# ---------------------------------------------------------------- records


@pytest.mark.parametrize(
    "record",
    [
        LayerRecord("linear", 1, (12, 20), HiNMPattern(4)),
        LayerRecord("hf_conv1d", 1, (20, 12), HiNMPattern(12, window=None)),
        LayerRecord("conv1d", 3, (12, 5, 3), HiNMPattern(4, 0.25)),
        LayerRecord("conv2d", 1, (12, 5, 3, 3), HiNMPattern(5, 0.0, 1, 4)),
        LayerRecord("linear", 1, (12, 20), HiNMPattern(4), retained=1 / 3),
    ],
)
def test_a_record_survives_json(record: LayerRecord) -> None:
    assert LayerRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


RECORD = LayerRecord("linear", 1, (12, 20), HiNMPattern(4)).to_dict()
BAD_RECORDS = {
    "no object": [],
    "missing field": {"kind": "linear"},
    "unknown field": {**RECORD, "code": "x"},
    "unknown kind": {**RECORD, "kind": "linear2"},
    "kind of another type": {**RECORD, "kind": ["linear"]},
    "negative shape": {**RECORD, "shape": [12, -20]},
    "float shape": {**RECORD, "shape": [12, 20.0]},
    "bool shape": {**RECORD, "shape": [True, True]},
    "no list": {**RECORD, "shape": "12"},
    "three dimensions": {**RECORD, "shape": [12, 20, 1]},
    "groups of a linear": {**RECORD, "groups": 2},
    "groups of zero": {**RECORD, "groups": 0},
    "groups that do not divide": {**RECORD, "kind": "conv1d", "shape": [13, 20, 1], "groups": 2},
    "tiles beyond the rows": {**RECORD, "pattern": {**RECORD["pattern"], "vector_size": 10**12}},
    "groups beyond the columns": {**RECORD, "pattern": {**RECORD["pattern"], "m": 10**12, "window": None}},
    "impossible pattern": {**RECORD, "pattern": {**RECORD["pattern"], "n": 5}},
    "infinite sparsity": {**RECORD, "pattern": {**RECORD["pattern"], "vector_sparsity": float("inf")}},
    "pattern of strings": {**RECORD, "pattern": {**RECORD["pattern"], "n": "2"}},
    "more than all retained": {**RECORD, "retained": 1.01},
    "less than nothing retained": {**RECORD, "retained": -0.01},
    "no number retained": {**RECORD, "retained": float("nan")},
    "retained as a string": {**RECORD, "retained": "0.5"},
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_record_of_no_possible_layer_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"must be|has exactly|has \w+ positive|has at least|must be between"):
        LayerRecord.from_dict(BAD_RECORDS[case])


# ---------------------------------------------------------------- the file


def contents(dtype: torch.dtype = torch.float32) -> FileContents:
    """Two tied layers, tied biases, and every awkward tensor."""
    weight, layout = example(dtype=dtype)
    packed, record = (
        pack(weight, replace(layout, retained=0.3)),
        LayerRecord("linear", 1, (12, 20), layout.pattern, 0.3),
    )
    grouped, order = example(8, 12, HiNMPattern(4))[0], torch.arange(8)
    grouped_layout = HiNMLayout(HiNMPattern(4), order, torch.arange(8).expand(2, -1).contiguous())
    grouped = masked(grouped.reshape(8, 4, 3), grouped_layout, 2).to(dtype)
    bias = torch.randn(12, dtype=dtype)
    return FileContents(
        {"a": record, "b": record, "conv": LayerRecord("conv1d", 2, (8, 4, 3), HiNMPattern(4))},
        {"a": packed, "b": packed, "conv": pack(grouped, grouped_layout, groups=2)},
        {
            "a.bias": bias,
            "b.bias": bias,
            "slice": bias[2:5],
            "transposed": torch.randn(3, 4).t(),
            "scalar": torch.tensor(3),
            "empty": torch.zeros(0, 2),
            "flags": torch.tensor([True, False]),
            "complex": torch.ones(2, dtype=torch.complex64),
        },
    )


def read(path: Path) -> FileContents:
    return read_contents(path, read_header(path))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    written = contents(dtype)
    write_file(written, tmp_path / "x")
    back = read(tmp_path / "x")
    assert back.layers == written.layers
    assert set(back.packed) == set(written.packed)
    assert set(back.tensors) == set(written.tensors)
    for layer, packed in written.packed.items():
        assert torch.equal(unpack(back.packed[layer]), unpack(packed))
        assert back.packed[layer].values.dtype == dtype
        assert back.packed[layer].retained == packed.retained == (None if layer == "conv" else 0.3)
    for name, tensor in written.tensors.items():
        assert torch.equal(back.tensors[name], tensor)
        assert back.tensors[name].dtype == tensor.dtype


def test_tied_tensors_are_stored_once_and_read_as_one(tmp_path: Path) -> None:
    write_file(contents(), tmp_path / "x")
    assert read_header(tmp_path / "x").aliases == {"b.bias": "a.bias", "b.weight": "a.weight"}
    back = read(tmp_path / "x")
    assert back.tensors["a.bias"] is back.tensors["b.bias"]
    assert back.packed["a"] is back.packed["b"]


def test_equal_contents_make_equal_bytes_with_the_rights_of_any_new_file(tmp_path: Path) -> None:
    for name in "xy":
        torch.manual_seed(0)
        write_file(contents(), tmp_path / name)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    (tmp_path / "z").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "z").stat().st_mode


def test_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    written = contents()
    write_file(written, tmp_path / "x")
    plain = safetensors.torch.load_file(tmp_path / "x")
    assert torch.equal(plain["a.bias"], written.tensors["a.bias"])
    assert torch.equal(plain["conv.weight.values"], written.packed["conv"].values)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_file(contents(), tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    for length in [*range(0, len(data), 8), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut: "):
            read(tmp_path / "cut")
    (tmp_path / "longer").write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="longer: "):
        read(tmp_path / "longer")


def test_a_file_with_any_byte_changed_is_refused(tmp_path: Path) -> None:
    write_file(contents(), tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for at in [*range(end), *range(end, len(data), 3), len(data) - 1]:
        # a space at the header's end that becomes another blank is valid JSON still
        flip = 0x2A if data[at] == 0x20 else 1 << at % 8
        (tmp_path / "flipped").write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        with pytest.raises(ValueError, match="flipped: "):
            read(tmp_path / "flipped")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10**6, 0, 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{}" * 100)
    with pytest.raises(ValueError, match=f"x: claims a header of {length} bytes"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 100_000, "no valid JSON"),
        (b"\xff\xfe", "x: "),
        (b'{"a":1,"a":2}', "a name twice"),
        (b"[1]", "no JSON object"),
        (b"{}", "no entry 'lightning_hinm'"),
        (b'{"__metadata__":{"lightning_hinm":"{}"}}', "names its own crc32 0 times"),
        (b'{"__metadata__":{"lightning_hinm":{}}}', "no entry"),
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "x")


def test_a_safetensors_file_of_another_program_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "x", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"x: the header has no entry 'lightning_hinm'\. Files for load_hinm"):
        read_header(tmp_path / "x")


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "x")


def forge(path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Rewrites a file with every crc32 right, as an attacker would."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()["lightning_hinm"])
    edit(tensors, entry)
    for name, tensor in tensors.items():
        if isinstance(entry["crc32"], dict) and name in entry["crc32"]:
            entry["crc32"][name] = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)
    entry["header_crc32"] = "0" * 8
    data = safetensors.torch.save(tensors, {"lightning_hinm": json.dumps(entry, separators=(",", ":"))})
    end = 8 + int.from_bytes(data[:8], "little")
    at = data.index(rb"header_crc32\":\"") + len(rb"header_crc32\":\"")
    path.write_bytes(data[:at] + f"{zlib.crc32(data[8:end]):08x}".encode() + data[at + 8 :])


def test_a_forged_file_is_read_where_nothing_was_forged(tmp_path: Path) -> None:
    write_file(contents(), tmp_path / "x")
    forge(tmp_path / "x", lambda tensors, entry: None)
    read(tmp_path / "x")


Edit = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def forge_part(part: str, change: Callable[[Tensor], Tensor]) -> Edit:
    name = f"a.weight.{part}"
    return lambda tensors, entry: tensors.update({name: change(tensors[name])})


FORGERIES: dict[str, tuple[Edit, str]] = {
    "version": (lambda t, e: e.update(version=2), "has format version 2, but this lightning_hinm reads version 1"),
    "version of another type": (lambda t, e: e.update(version="1"), "format version '1'"),
    "unknown field": (lambda t, e: e.update(code="x"), "has fields"),
    "missing field": (lambda t, e: e.pop("aliases"), "has fields"),
    "layers as a list": (lambda t, e: e.update(layers=[]), "has fields"),
    "duplicate column": (forge_part("vector_index", lambda x: put(x, (0, 0), x[0, 1])), "a: .* a column twice"),
    "column out of range": (forge_part("vector_index", lambda x: put(x, (0, 0), 255)), "a: .* has columns outside"),
    "row twice": (lambda t, e: t["conv.weight.output_order"].zero_(), "conv: .*permutation"),
    "metadata out of order": (forge_part("metadata", torch.zeros_like), "a: metadata does not rise"),
    "values of another type": (forge_part("values", lambda x: x.view(torch.int32)), "a: values are torch.int32"),
    "values of another shape": (forge_part("values", lambda x: x[1:]), "a: values is"),
    "negative shape": (lambda t, e: e["layers"]["conv"].update(shape=[8, -4, 3]), "conv: shape"),
    "huge shape": (lambda t, e: e["layers"]["conv"].update(shape=[8, 10**18, 3]), "conv: shape"),
    "huge tiles": (lambda t, e: e["layers"]["conv"]["pattern"].update(vector_size=10**15), "conv: shape"),
    "other groups": (lambda t, e: e["layers"]["conv"].update(groups=4), "conv: shape"),
    "layer that is not there": (lambda t, e: e["layers"].update(c=e["layers"]["a"]), r"c\.weight\.values: is missing"),
    "tensor that is not there": (lambda t, e: t.pop("scalar"), "scalar: is missing"),
    "tensor without crc32": (lambda t, e: t.update(new=torch.ones(1)), "new: is stored without a crc32"),
    "packed and dense": (
        lambda t, e: (t.update({"a.weight": torch.ones(1)}), e["crc32"].update({"a.weight": 0})),
        "a.weight: is both packed and stored dense",
    ),
    "stored and alias": (lambda t, e: e["aliases"].update({"scalar": "a.bias"}), "scalar: is both stored and an alias"),
    "alias of nothing": (lambda t, e: e["aliases"].update({"b.bias": "c.bias"}), "b.bias: is an alias of 'c.bias'"),
    "alias of a list": (lambda t, e: e["aliases"].update({"b.bias": ["a.bias"]}), "b.bias: is an alias of .*no name"),
    "alias of itself": (lambda t, e: e["aliases"].update({"b.weight": "b.weight"}), "no equal packed weight"),
    "alias of a dense tensor": (lambda t, e: e["aliases"].update({"b.weight": "a.bias"}), "no equal packed weight"),
    "alias of another layer": (lambda t, e: e["aliases"].update({"b.weight": "conv.weight"}), "no equal packed weight"),
    "dense alias of a packed weight": (lambda t, e: e["aliases"].update({"b.bias": "a.weight"}), "is not stored"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_hostile_file_is_refused_whatever_its_checksums_say(tmp_path: Path, forgery: str) -> None:
    write_file(contents(), tmp_path / "x")
    edit, message = FORGERIES[forgery]
    forge(tmp_path / "x", edit)
    with pytest.raises(ValueError, match=f"x: .*{message}"):
        read(tmp_path / "x")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_header_with_any_of_its_numbers_and_words_replaced_never_crashes(tmp_path: Path, data: st.DataObject) -> None:
    write_file(contents(), tmp_path / "x")
    strange = st.sampled_from([-1, 0, 2, 5, 10**20, 1.5, 1e300, True, None, "", "x", [], [1], {}, {"a": 1}])

    def edit(tensors: dict[str, Tensor], entry: dict[str, Any]) -> None:
        place: Any = entry
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 4)) == 0:
                break
            place = place[key]
        place[key] = data.draw(strange.filter(lambda value: value != place[key]))

    forge(tmp_path / "x", edit)
    try:
        back = read(tmp_path / "x")
    except ValueError:
        return
    for layer, packed in back.packed.items():  # what is accepted can be used
        check_packed(packed, layer, groups=back.layers[layer].groups)
        unpack(packed)


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open" if step == "open" else f"os.{step}", fail)
        with pytest.raises(OSError, match="disk full"):
            write_file(contents(), tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_an_interrupted_write_leaves_the_old_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(contents(), tmp_path / "x")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


def test_what_a_file_cannot_hold_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    written = contents()
    strange = {
        "ghost": torch.ones(2, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "object": {"a": 1},
        "scalar": torch.tensor(1),
    }
    damaged = change(written.packed["a"], shape=(12, 400))
    with pytest.raises(
        ValueError, match=r"x: was not written:\n  a: values is.*\n  ghost: .*\n  sparse: .*\n  object:"
    ):
        write_file(FileContents({"a": written.layers["a"]}, {"a": damaged}, strange), tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: was not written: .*complex128, as in wide\."):
        write_file(FileContents({}, {}, {"wide": torch.ones(2, dtype=torch.complex128)}), tmp_path / "x")
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------- the checkpoint


class Conv1D(nn.Module):
    """What Hugging Face's layer of this name computes, known by the name below."""

    def __init__(self, out: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


Conv1D.__module__ = "transformers.pytorch_utils"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, groups=2)
        self.up = nn.Linear(16, 24)
        self.tied = nn.Linear(16, 24, bias=False)
        self.tied.weight = self.up.weight
        self.hf = Conv1D(12, 24)
        self.norm = nn.BatchNorm1d(12)


class Lit(nn.Module):
    """Stands for a LightningModule, whose names have a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


def trained(folder: Path, edit: Callable[[dict[str, Any]], Any] = lambda checkpoint: None) -> tuple[Lit, Path]:
    """A pruned model, and its checkpoint as the callback writes it."""
    torch.manual_seed(0)
    model = Lit()
    prune(model, HiNMPattern(4), method="identity")
    layers = {}
    for name in ("net.conv", "net.up", "net.hf"):
        module = model.get_submodule(name)
        layout, kind = layout_of(module), layer_kind(module)
        assert layout is not None
        assert kind is not None
        layers[name] = layer_state(
            kind=kind,
            groups=getattr(module, "groups", 1),
            pattern=layout.pattern,
            mask=module.weight != 0,
            layout=layout,
        )
    checkpoint = {
        "state_dict": model.state_dict(),
        "callbacks": {"ModelCheckpoint{}": {}, "HiNMPruning": {"layers": layers}},
    }
    edit(checkpoint)
    torch.save(checkpoint, folder / "last.ckpt")
    return model, folder / "last.ckpt"


@law
@given(packables(), st.booleans(), st.none() | st.floats(0, 1))
def test_read_layer_state_is_the_inverse_of_layer_state(
    case: tuple[Tensor, HiNMLayout, int], known: bool, retained: float | None
) -> None:
    weight, layout, groups = case
    layout = replace(layout, retained=retained)
    kind = {2: "linear", 3: "conv1d", 4: "conv2d"}[weight.dim()]
    fits = weight[0].numel() >= layout.pattern.m and len(weight) // groups >= layout.pattern.vector_size
    arguments = {"kind": kind, "groups": groups, "pattern": layout.pattern, "mask": weight != 0}
    if not fits:  # no such layer is ever pruned
        with pytest.raises(ValueError, match="has at least one tile"):
            layer_state(**arguments, layout=layout)
        return
    state = layer_state(**arguments, layout=layout if known else None)
    back = read_layer_state("fc", state)
    assert back.record == LayerRecord(kind, groups, tuple(weight.shape), layout.pattern, retained if known else None)
    assert torch.equal(back.mask, weight != 0)
    assert (back.layout is None) != known
    if back.layout is not None:
        assert torch.equal(back.layout.output_order, layout.output_order)
        assert torch.equal(back.layout.vector_index, layout.vector_index)
        assert back.layout.retained == retained


def test_a_layer_state_holds_tensors_and_primitives_only(tmp_path: Path) -> None:
    weight, layout = example()
    state = layer_state(kind="linear", groups=1, pattern=layout.pattern, mask=weight != 0, layout=layout)
    torch.save(state, tmp_path / "x")
    back = torch.load(tmp_path / "x", weights_only=True)
    assert torch.equal(read_layer_state("fc", back).mask, weight != 0)


STATE_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no mask": (lambda s: s.pop("mask"), "must hold"),
    "mask of bool": (lambda s: s.update(mask=s["mask"].bool()), "mask is torch.bool"),
    "mask too short": (lambda s: s.update(mask=s["mask"][1:]), "mask is"),
    "mask of None": (lambda s: s.update(mask=None), "mask is NoneType"),
    "mask too long": (lambda s: s["mask"][-1:].fill_(255), "bits set beyond"),
    "shape": (lambda s: s.update(shape=[12, 10**12]), "mask is"),
    "unknown kind": (lambda s: s.update(kind="x"), "kind='x'"),
    "unknown field": (lambda s: s.update(x=1), "got fields"),
    "order of int64": (lambda s: s.update(output_order=s["output_order"].long()), "must be int32"),
    "half a layout": (lambda s: s.update(output_order=None), "both None"),
    "order of two dimensions": (lambda s: s.update(output_order=s["output_order"][None]), r"must be int64 \[O\]"),
    "row twice": (lambda s: s["output_order"].fill_(0), "not a permutation"),
    "column out of range": (lambda s: s["vector_index"].fill_(-1), "has columns outside"),
    "column twice": (lambda s: s["vector_index"].fill_(1), "twice in one tile"),
    "pattern": (lambda s: s["pattern"].update(vector_sparsity=0.75), "the pattern keeps"),
    "retained": (lambda s: s.update(retained=2.0), "retained=2.0"),
}


@pytest.mark.parametrize("damage", STATE_DAMAGES)
def test_a_damaged_layer_state_is_refused_by_name(damage: str) -> None:
    weight, layout = example(13, 21)  # 273 weights: seven spare bits
    state = layer_state(kind="linear", groups=1, pattern=layout.pattern, mask=weight != 0, layout=layout)
    edit, message = STATE_DAMAGES[damage]
    edit(state)
    with pytest.raises(ValueError, match=f"fc: .*{message}"):
        read_layer_state("fc", state)
    with pytest.raises(ValueError, match="fc: got list"):
        read_layer_state("fc", [])


@pytest.mark.parametrize("inner", [False, True])
def test_layouts_come_back_from_a_checkpoint(tmp_path: Path, inner: bool) -> None:
    model, path = trained(tmp_path)
    fresh = Lit()
    fresh.load_state_dict(model.state_dict())
    target: nn.Module = fresh.net if inner else fresh
    assert load_layouts(target, path) is target
    for name in ("conv", "up", "tied", "hf"):
        layout, expected = layout_of(fresh.net.get_submodule(name)), layout_of(model.net.get_submodule(name))
        assert layout is not None
        assert expected is not None
        assert layout.pattern == expected.pattern
        assert torch.equal(layout.output_order, expected.output_order)
        assert torch.equal(layout.vector_index, expected.vector_index)


def test_layouts_for_weights_that_were_not_loaded_are_refused_with_every_name(tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    fresh = Lit()
    with pytest.raises(ValueError, match=r"(?s)net\.conv: .* net\.up: .* weights loaded first .*net\.hf: "):
        load_layouts(fresh, path)
    assert all(layout_of(module) is None for module in fresh.modules())
    with pytest.raises(ValueError, match=r"net\.conv: .*meta device. Load the checkpoint's weights first"):
        load_layouts(Lit().to("meta"), path)


def test_layouts_of_another_model_are_refused(tmp_path: Path) -> None:
    model, path = trained(tmp_path)
    model.net.up = nn.Linear(16, 20)
    with pytest.raises(ValueError, match=r"net\.up: the model has .* but the checkpoint"):
        load_layouts(model, path)
    with pytest.raises(ValueError, match=r"net\.conv: the model has no Linear"):
        load_layouts(nn.Sequential(nn.Linear(3, 3)), path)


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "weights only": (lambda c: c.pop("callbacks"), "no callback state at all, .*save_weights_only=False"),
    "another callback": (lambda c: c["callbacks"].pop("HiNMPruning"), "0 states of it"),
    "two callbacks": (lambda c: c["callbacks"].update({"HiNMPruning2": {}}), "2 states of it"),
    "callbacks as a list": (lambda c: c.update(callbacks=["HiNMPruning"]), "0 states of it"),
    "nothing pruned": (lambda c: c["callbacks"]["HiNMPruning"].update(layers={}), "lists no layers"),
    "no layers": (lambda c: c["callbacks"].update(HiNMPruning=3), "lists no layers"),
    "damaged layer": (lambda c: c["callbacks"]["HiNMPruning"]["layers"].update(x={}), r"damaged:\n  x: got dict"),
    "no layout yet": (
        lambda c: c["callbacks"]["HiNMPruning"]["layers"]["net.up"].update(output_order=None, vector_index=None),
        r"net\.up: it has no layout yet\. .*take a later one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_without_usable_layouts_is_refused(tmp_path: Path, case: str) -> None:
    edit, message = CHECKPOINTS[case]
    model, path = trained(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        load_layouts(model, path)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_damaged_checkpoint_is_a_value_error(tmp_path: Path) -> None:
    model, path = trained(tmp_path)
    data = path.read_bytes()
    for damaged in (b"", b"\x80\x02.", b"PK\x03\x04", data[:1000], data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.ckpt: "):
            load_layouts(model, path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds list"):
        load_layouts(model, path)
    with pytest.raises(FileNotFoundError):
        load_layouts(model, tmp_path / "none.ckpt")


def test_an_exported_checkpoint_holds_the_packed_layers_and_everything_else(tmp_path: Path) -> None:
    model, path = trained(tmp_path)
    export_checkpoint(path, tmp_path / "out")
    back, state = read(tmp_path / "out"), model.state_dict()
    assert set(back.layers) == {"net.conv", "net.up", "net.tied", "net.hf"}
    assert back.packed["net.up"] is back.packed["net.tied"]
    assert {record.kind for record in back.layers.values()} == {"conv2d", "linear", "hf_conv1d"}
    for layer, packed in back.packed.items():
        weight = state.pop(f"{layer}.weight")
        assert torch.equal(unpack(packed), back.layers[layer].rows_first(weight))
    assert set(back.tensors) == set(state)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in state.items())


def test_an_export_of_weights_outside_the_pattern_is_refused(tmp_path: Path) -> None:
    def revive(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {**checkpoint["state_dict"], "net.hf.weight": torch.ones(24, 12)}
        del checkpoint["state_dict"]["net.up.weight"]

    _, path = trained(tmp_path, revive)
    with pytest.raises(ValueError, match=r"(?s)net\.up: its weight is NoneType.*net\.hf: 216 of 288 weights"):
        export_checkpoint(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["last.ckpt"]
