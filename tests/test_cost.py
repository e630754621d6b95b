"""Which kernel takes a call, and what it is predicted to take."""

import json
import math
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.goals import OWN
from benchmarks.gpu.record import RESULTS
from benchmarks.gpu.speed import path_of, seconds_of
from benchmarks.gpu.weights import linear_operands
from lightning_hinm import HiNMPattern, kernels
from lightning_hinm.format import random_weight
from lightning_hinm.ops import cost
from lightning_hinm.ops.cost import Call, Planes, choose_kernel, convolution_call, list_kernels, predict_dense
from lightning_hinm.ops.figures import GPUS, estimate
from lightning_hinm.ops.fragments import padded_kept
from lightning_hinm.ops.gpu import run_linear
from tests.ptx.device import emulated

MANIFEST = json.loads((kernels.FOLDER / "manifest.json").read_text())
MEASURED = json.loads((RESULTS / "gpu-nvidia-h200.json").read_text())
H200, LIMIT = estimate((9, 0)), 227 * 1024
BOUNDLESS = replace(H200, memory=math.inf, l2=math.inf, sparse=math.inf, dense=math.inf)
CALLS = st.builds(
    Call,
    pattern=st.builds(
        HiNMPattern,
        vector_size=st.sampled_from([32, 64, 128, 256]),
        vector_sparsity=st.sampled_from([0.0, 0.5, 0.75, 0.9]),
        window=st.sampled_from([None, 128, 256, 100]),
    ),
    rows=st.integers(1, 20000),
    in_features=st.integers(4, 20000),
    tokens=st.integers(1, 20000),
    feature_major=st.booleans(),
    feature_major_out=st.booleans(),
    activated=st.booleans(),
)


def choices_of(call: Call, gpu: cost.Gpu = H200) -> dict[str, cost.Choice]:
    """What takes the call, but for the dense product."""
    dense, *found = list_kernels(call, LIMIT, gpu)
    assert dense.kernel == "unpack", "a dense product takes every call"
    return {path_of(choice): choice for choice in found}


@given(CALLS)
def test_every_prediction_is_a_time_and_names_its_roof(call: Call) -> None:
    for choice in [*list_kernels(call, LIMIT, H200), predict_dense(call, H200)]:
        assert H200.launch <= choice.seconds < 100
        assert choice.roof in ("memory", "L2", "tensor cores", "latency", "launch")


@given(CALLS)
def test_the_choice_is_the_least_of_those_that_fit(call: Call) -> None:
    fitting = list_kernels(call, LIMIT, H200)
    assert all(choice.shared <= LIMIT for choice in fitting)
    chosen = choose_kernel(call, LIMIT, H200)
    assert chosen == min(fitting, key=lambda choice: choice.seconds)


@given(CALLS, st.integers(1, 1000))
def test_more_tokens_never_take_less_time(call: Call, more: int) -> None:
    """Nor less shared memory: of the input, a block of the decode kernel holds the tokens that there are."""
    few = {path_of(choice): choice for choice in list_kernels(call, LIMIT, H200)}
    for choice in list_kernels(replace(call, tokens=call.tokens + more), 10**9, H200):
        if choice.kernel != "unpack" and path_of(choice) in few:
            assert choice.seconds >= few[path_of(choice)].seconds * (1 - 1e-9)
            assert choice.shared >= few[path_of(choice)].shared


@given(CALLS, st.integers(1, cost.DECODE_TOKENS - 1))
def test_each_token_of_a_few_takes_longer(call: Call, tokens: int) -> None:
    few, more = (choices_of(replace(call, tokens=n)) for n in (tokens, tokens + 1))
    names = [name for name in more if name.startswith("decode")]
    assert "decode_8" in names or call.in_features > 12000
    assert all(few[name].seconds < more[name].seconds for name in names)


def test_the_gather_kernel_gains_by_feature_major_storage_and_the_decode_kernel_turns_it() -> None:
    rows = Call(HiNMPattern(), 3072, 4096, 16)
    ways = product((False, True), repeat=2)
    calls = [replace(rows, feature_major=given, feature_major_out=wanted) for wanted, given in ways]
    turned_in, turned_out = (4 * 16 * features / H200.memory + H200.launch for features in (4096, 3072))
    plain, *others = (choices_of(call)["decode_16"].seconds for call in calls)
    assert [each - plain for each in others] == pytest.approx([turned_in, turned_out, turned_in + turned_out])
    *others, plain = (choices_of(call)["gather_128"].seconds for call in calls)
    assert [each - plain for each in others] == pytest.approx([turned_in + turned_out, turned_out, turned_in])


def test_decode_is_for_few_tokens() -> None:
    few = Call(HiNMPattern(), 4096, 4096, cost.DECODE_TOKENS)
    assert {"decode_8", "decode_16", "decode_cluster_8", "decode_cluster_16"} <= choices_of(few).keys()
    assert [*choices_of(replace(few, tokens=cost.DECODE_TOKENS + 1))] == ["gather_128"]


@pytest.mark.parametrize(
    ("window", "columns", "shared"),
    [
        *((256, 1025, True), (256, 1300, True), (256, 1024, False), (256, 768, False), (None, 4096, False)),
        *((264, 2048, True), (260, 2048, False), (8, 40, True), (12, 96, False)),
    ],
)
def test_a_cluster_shares_out_the_runs_if_there_are_several_and_each_starts_at_a_whole_copy(
    window: int | None, columns: int, shared: bool
) -> None:
    names = choices_of(Call(HiNMPattern(64, 0.5, window=window), 512, columns, 8))
    assert ("decode_cluster_8" in names, "decode_cluster_16" in names) == (shared, shared)
    assert {"decode_8", "decode_16", "gather_128"} <= names.keys()


def test_a_block_of_a_cluster_holds_the_columns_of_its_runs() -> None:
    call = Call(HiNMPattern(64, 0.5, window=256), 512, 256 * 9, 1)  # of nine runs, one of the four blocks has three
    runs, all_columns = (choices_of(call)[f"{name}_8"].shared for name in ("decode_cluster", "decode"))
    assert runs - cost.decode_weights(64) == 2 * (3 * 256 + 8)
    assert all_columns - cost.decode_weights(32) == 2 * (9 * 256 + 8)
    wide = replace(call, in_features=11008, tokens=16)  # of which a block has no room for all
    assert "decode_cluster_16" in choices_of(wide)
    assert "decode_16" not in choices_of(wide)


def test_what_nothing_overlaps_comes_on_top_of_the_tightest_roof() -> None:
    call = Call(HiNMPattern(64, 0.75), 4096, 4096, 5)
    plain, shared = (
        choices_of(call, BOUNDLESS)[name].seconds - BOUNDLESS.launch for name in ("decode_8", "decode_cluster_8")
    )
    assert plain == pytest.approx(128 * 1024 / 32 * 5 / (cost.GATHERS * 132))  # 128 rows of warps, 1024 kept vectors
    assert shared == pytest.approx(plain / 2 + cost.CLUSTER_SECONDS), "a warp of 64 rows gathers for twice as many"
    # L2 alone: the weight once for all tokens, and then, for each block of rows, the input of those that there are.
    kept = padded_kept(call.pattern, 4096)
    weight = 4096 * kept * 9 // 8 + 64 * kept * 2
    found = choices_of(call, replace(H200, l2=1.0))
    for name, readers in (("decode_8", 128), ("decode_16", 128), ("decode_cluster_8", 32), ("decode_cluster_16", 32)):
        assert found[name].seconds == pytest.approx((weight + readers * 5 * 4096 * 2) * 132 / 128)


@pytest.mark.parametrize(("columns", "steps", "roof"), [(64, 1, "launch"), (1024, 8, "latency"), (4096, 32, "latency")])
def test_a_block_of_the_gather_kernel_takes_its_steps_one_after_the_other(columns: int, steps: int, roof: str) -> None:
    call = Call(HiNMPattern(64, 0.5), 64, columns, 8, feature_major=True, feature_major_out=True)
    found = choices_of(call, BOUNDLESS)["gather_128"]
    assert found.seconds == pytest.approx(BOUNDLESS.launch + steps * cost.STEP_SECONDS)
    assert found.roof == roof
    assert choices_of(call, replace(BOUNDLESS, memory=1e6))["gather_128"].roof == "memory"


def test_a_convolution_is_for_the_gather_kernel() -> None:
    call = Call(HiNMPattern(), 64, 576, 3136, planes=Planes(64 * 3136, 3136, 0))
    assert [*choices_of(call)] == ["gather_128"]
    few, many = (replace(call, planes=replace(call.planes, shifted=shifted)) for shifted in (0, 10**9))  # type: ignore[type-var]
    assert list_kernels(few, LIMIT, H200)[1].seconds < list_kernels(many, LIMIT, H200)[1].seconds


def test_a_convolution_reads_its_images_once_and_computes_its_pixels_only() -> None:
    images, pixels = 4 * 64 * 56 * 56, 4 * 56 * 56
    call = Call(HiNMPattern(), 64, 576, 4 * 3200, planes=Planes(images, pixels, 0))
    slow = replace(H200, memory=1.0, launch=0.0)
    assert predict_dense(call, slow).seconds == 2 * (64 * 576 + images + 64 * pixels)
    assert predict_dense(call, replace(H200, dense=1.0, launch=0.0)).seconds == 2 * 64 * 576 * pixels
    _, sparse = list_kernels(call, LIMIT, slow)
    weight = 64 * padded_kept(call.pattern, 576) * 9 // 8 + padded_kept(call.pattern, 576) * 2
    assert sparse.seconds == weight + 2 * (images + 64 * pixels)
    _, planes = list_kernels(replace(call, planes=Planes(images, pixels, 1000)), LIMIT, slow)
    assert planes.seconds == sparse.seconds + 2 * 1000  # written, and read again


def test_a_dense_product_pays_for_the_weight_that_it_unpacks_and_for_the_activation_behind_it() -> None:
    call, slow = Call(HiNMPattern(64, 0.5), 256, 515, 40), replace(H200, memory=1.0, launch=0.0)
    packed = 256 * padded_kept(call.pattern, 515) * 9 // 8 + 4 * padded_kept(call.pattern, 515) * 2
    unpacked = packed + 2 * 256 * 520  # read, and written in whole copies of 16 bytes
    for each, behind in ((call, 0), (replace(call, activated=True), 4 * 40 * 256)):
        dense = list_kernels(each, LIMIT, slow)[0]
        assert dense.seconds == unpacked + predict_dense(call, slow).seconds + behind
        assert dense.roof == "memory"
    blocks = replace(call, in_features=3000)  # of L2, each block of columns reads all of the weight
    packed = 256 * padded_kept(call.pattern, 3000) * 9 // 8 + 4 * padded_kept(call.pattern, 3000) * 2
    dense = list_kernels(blocks, LIMIT, replace(H200, l2=1.0))[0]
    assert dense.seconds == pytest.approx(2 * packed + 2 * 256 * 3000)
    assert list_kernels(call, LIMIT, replace(H200, dense=1.0))[0].roof == "tensor cores", "that of the product"
    assert list_kernels(replace(call, activated=True), LIMIT, BOUNDLESS)[0].seconds == 3 * H200.launch


@pytest.mark.parametrize(
    ("sparsity", "kernels_by_tokens"),
    [
        (0.5, {1: "decode", 16: "decode_cluster", 8192: "unpack"}),
        (0.75, {1: "decode", 16: "decode_cluster", 512: "gather", 8192: "unpack"}),
    ],
)
def test_each_call_of_a_layer_takes_what_should_be_fastest_for_its_tokens(
    sparsity: float, kernels_by_tokens: dict[int, str]
) -> None:
    """Where gathering for tiles of 32 rows costs more than tensor cores win, many tokens are for the dense product."""
    call = Call(HiNMPattern(32, sparsity), 4096, 4096, 1)
    found = {tokens: choose_kernel(replace(call, tokens=tokens), LIMIT, H200).kernel for tokens in kernels_by_tokens}
    assert found == kernels_by_tokens


def llama_calls() -> list[Any]:
    """The calls that a model makes, of which an H200 timed every kernel."""
    cases = [case for case in MEASURED["cases"] if "Llama" in case["case"] and case["tokens"] in (1, 16, 4096)]
    return [pytest.param(case, way, id=f"{case['case']}, {way}") for case in cases for way in ("row", "feature")]


def test_each_of_the_llama_layers_was_measured_on_one_token_on_a_few_and_on_many() -> None:
    met = {(case["rows"], case["columns"], case["tokens"]) for case, _ in (call.values for call in llama_calls())}
    assert met == {(*shape, n) for shape in ((11008, 4096), (4096, 11008), (4096, 4096)) for n in (1, 16, 4096)}


@pytest.mark.parametrize(("case", "storage"), llama_calls())
def test_what_is_chosen_for_an_h200_is_hardly_slower_than_the_fastest_and_about_as_predicted(
    case: dict[str, Any], storage: str
) -> None:
    pattern = HiNMPattern.from_sparsity(case["sparsity"], case["vector_size"], window=case["window"])
    call = Call(pattern, case["rows"], case["columns"], case["tokens"], feature_major=storage == "feature")
    paths = {time["path"] for time in case["times"] if OWN.fullmatch(time["path"])}
    times = {path: seconds for path in paths if (seconds := seconds_of(case, path, storage)) is not None}
    assert times.keys() == {path_of(choice) for choice in list_kernels(call, LIMIT, H200)}
    chosen = choose_kernel(call, LIMIT, H200)
    assert times[path_of(chosen)] <= 1.2 * min(times.values())
    assert times[path_of(chosen)] / 2 <= chosen.seconds <= 1.2 * times[path_of(chosen)]


def test_a_tie_is_for_the_dense_product() -> None:
    call = convolution_call(HiNMPattern(32, 0.5), 64, 36, (1, 4, 8, 8), (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    with mock.patch.object(cost, "STEP_SECONDS", 0.0):
        dense, gather = list_kernels(call, LIMIT, BOUNDLESS)
        assert dense.seconds == gather.seconds == 2 * H200.launch, "to unpack and to multiply, or planes and gather"
        assert choose_kernel(call, LIMIT, BOUNDLESS) == dense
        assert choose_kernel(replace(call, activated=True), LIMIT, BOUNDLESS) == gather


def test_the_tokens_of_a_convolution_are_whole_blocks_of_rows_that_start_at_whole_copies() -> None:
    call = convolution_call(HiNMPattern(), 64, 36, (3, 4, 12, 9), (12, 9), (3, 3), (1, 1), (1, 1), (1, 1))
    assert (call.tokens, call.outputs) == (3 * 2 * 128, 3 * 108)  # 12 rows of 16


def test_an_image_beyond_the_counts_of_the_gather_kernel_is_for_the_dense_product() -> None:
    pattern, spatial = HiNMPattern(32, 0.5), ((3, 3), (1, 1), (1, 1), (1, 1))
    pointwise = ((1, 1), (1, 1), (0, 0), (1, 1))
    for side, taken in ((2000, True), (3000, False)):  # more than 65535 blocks of 128 pixels
        found = choices_of(convolution_call(pattern, 64, 36, (1, 4, side, side), (side, side), *spatial))
        assert ([*found] == ["gather_128"]) == taken
    for channels, taken in ((100, True), (400, False)):  # more than 2 ** 31 numbers of an image
        images = (1, channels, 2400, 2400)
        found = choices_of(convolution_call(pattern, 64, channels, images, (2400, 2400), *pointwise))
        assert ([*found] == ["gather_128"]) == taken


@pytest.mark.parametrize("tokens", [*range(1, 17), 32])
@pytest.mark.parametrize("vector_size", [32, 64, 128])
def test_shared_memory_is_what_a_launch_takes_as_the_manifest_says(vector_size: int, tokens: int) -> None:
    call = Call(HiNMPattern(vector_size, 0.5, window=104), 128, 520, tokens)  # five runs: no block has more than two
    taken: dict[str, int] = {}

    def launch(name: str, *arguments: Any) -> None:
        entry, recorded = kernels.entries()[name], MANIFEST["entries"][name]
        sizes = {parameter.name: given for parameter, given in zip(entry.parameters, arguments, strict=True)}
        taken[entry.kernel] = entry.shared_bytes(sizes) + recorded["resources"]["sm_90"]["shared"]
        assert entry.cluster == (cost.CLUSTER if "cluster" in entry.kernel else 1)

    with emulated(), mock.patch.object(kernels, "launch", launch):
        packed = random_weight((call.rows, 520), call.pattern, torch.float16, torch.Generator().manual_seed(0))
        operands, x = linear_operands(packed), torch.zeros(tokens, 520, dtype=torch.float16)
        choices = list_kernels(call, LIMIT, H200)
        assert {choice.kernel for choice in choices} == {"unpack", "decode", "decode_cluster", "gather"}
        for choice in choices:
            run_linear(x, x.new_empty(tokens, call.rows), operands, choice)
            assert choice.shared == taken[choice.kernel]
    assert MANIFEST["entries"]["unpack"]["grid"][1] == ["pitch", cost.UNPACKED_COLUMNS]


def test_blocks_share_their_work_only_where_the_gpu_has_clusters_of_them() -> None:
    call = Call(HiNMPattern(64, 0.75), 11008, 4096, 16)
    assert "decode_cluster_16" in choices_of(call)
    for other in (*(row for capability, row in GPUS.items() if capability != (9, 0)), replace(H200, gpc=2)):
        assert not any("cluster" in name for name in choices_of(call, other))


def test_a_cluster_brings_its_input_in_once_and_waves_are_of_whole_clusters() -> None:
    call = Call(HiNMPattern(64, 0.75), 32 * 130, 4096, 16)
    # L2 alone, on a GPU of which a cluster can use 128 of 132 multiprocessors: 130 blocks are 33 clusters.
    found = choices_of(call, replace(H200, l2=1.0))
    kept = padded_kept(call.pattern, 4096)
    weight = 4160 * kept * 9 // 8 + 65 * kept * 2
    assert found["decode_16"].seconds == pytest.approx((weight + 130 * 16 * 4096 * 2) * 132 / 130)
    assert found["decode_cluster_16"].seconds == pytest.approx((weight + 33 * 16 * 4096 * 2) * 2 * 132 / 132)


def test_blocks_that_only_fill_up_a_cluster_take_the_place_of_others() -> None:
    pattern = HiNMPattern(32, 0.75)
    # Tensor cores alone: 42 blocks of rows for each of 3 blocks of tokens are 126, and 33 clusters of which 32 run.
    found = choices_of(Call(pattern, 42 * 32, 4096, 24), replace(H200, sparse=1.0))
    work = 32 * padded_kept(pattern, 4096) * 8  # of a block
    assert found["decode_8"].seconds == pytest.approx(work * 132)
    assert found["decode_cluster_8"].seconds == pytest.approx(2 * work * 132)


def test_where_sharing_gains_nothing_the_other_kernel_is_chosen() -> None:
    call = Call(HiNMPattern(64, 0.75), 64, 2048, 3)
    assert {"decode_cluster_8", "decode_cluster_16"} <= choices_of(call).keys()
    chosen = choose_kernel(call, LIMIT, H200)
    assert (path_of(chosen), chosen.roof) == ("decode_8", "launch")


def test_a_gpu_without_a_row_of_its_own_takes_the_last_before_it() -> None:
    assert estimate((8, 7)) == GPUS[8, 6]
    assert estimate((9, 9)) == GPUS[9, 0]
    assert estimate((99, 0)) == GPUS[max(GPUS)]
    assert estimate((7, 5)) == GPUS[8, 0]


def test_the_figures_of_an_h200_are_measured_and_those_of_others_are_not() -> None:
    assert [capability for capability, row in GPUS.items() if row.measured] == [(9, 0)]
    assert H200.name == MEASURED["row"]["name"]
    for name in ("memory", "l2", "sparse", "dense"):
        assert getattr(H200, name) == pytest.approx(MEASURED["row"][name], rel=0.1)
    assert H200.launch == pytest.approx(MEASURED["rates"]["launch"]["kernel"]["graph"], rel=0.1)
    assert (H200.multiprocessors, H200.gpc) == (MEASURED["facts"]["multiprocessors"], MEASURED["row"]["gpc"])


@pytest.mark.gpu
def test_the_figures_of_this_gpu_are_found() -> None:
    assert cost.gpu_of(torch.device("cuda")).memory > 0
