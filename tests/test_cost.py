"""Which kernel takes a call, and what it is predicted to take."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_hinm import HiNMPattern, kernels
from lightning_hinm.ops import cost
from lightning_hinm.ops.cost import Call, Planes, choose_kernel, convolution_call, list_kernels, predict_dense
from lightning_hinm.ops.figures import GPUS, estimate
from lightning_hinm.ops.fragments import padded_kept

MANIFEST = json.loads((kernels.FOLDER / "manifest.json").read_text())
H100, LIMIT = estimate((9, 0)), 227 * 1024
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


def kernels_of(call: Call, limit: int = LIMIT) -> list[str]:
    dense, *found = list_kernels(call, limit, H100)
    assert dense.kernel == "unpack", "a dense product takes every call"
    return [f"{choice.kernel}_{choice.tokens}" for choice in found]


@given(CALLS)
def test_every_prediction_is_a_time_and_names_its_roof(call: Call) -> None:
    for choice in [*list_kernels(call, LIMIT, H100), predict_dense(call, H100)]:
        assert H100.launch <= choice.seconds < 100
        assert choice.roof in ("memory", "L2", "tensor cores", "launch")


@given(CALLS)
def test_the_choice_is_the_least_of_those_that_fit(call: Call) -> None:
    fitting = list_kernels(call, LIMIT, H100)
    assert all(choice.shared <= LIMIT for choice in fitting)
    chosen = choose_kernel(call, LIMIT, H100)
    assert chosen == min(fitting, key=lambda choice: choice.seconds)


@given(CALLS)
def test_more_tokens_never_take_less_time(call: Call) -> None:
    more = replace(call, tokens=call.tokens + 1000)
    times = {choice.kernel: choice.seconds for choice in list_kernels(call, LIMIT, H100) if choice.kernel != "decode"}
    for choice in list_kernels(more, LIMIT, H100):
        if choice.kernel == "gather":
            assert choice.seconds >= times[choice.kernel] * (1 - 1e-9)


def test_the_gather_kernel_gains_by_feature_major_storage_and_the_others_turn_it() -> None:
    rows = Call(HiNMPattern(), 3072, 4096, 4096)
    features, out = replace(rows, feature_major=True), replace(rows, feature_major_out=True)
    seconds = [
        {choice.kernel: choice.seconds for choice in list_kernels(call, LIMIT, H100) if choice.tokens == 128}
        for call in (rows, features, replace(out, feature_major=True), out)
    ]
    assert seconds[0]["gather"] > seconds[1]["gather"] > seconds[2]["gather"]
    assert seconds[0]["windowed"] < seconds[3]["windowed"]


def test_decode_is_for_few_tokens() -> None:
    few = Call(HiNMPattern(), 4096, 4096, cost.DECODE_TOKENS)
    assert {"decode_8", "decode_16"} <= set(kernels_of(few))
    assert not any(name.startswith("decode") for name in kernels_of(replace(few, tokens=cost.DECODE_TOKENS + 1)))


def test_a_window_that_no_copy_of_16_bytes_starts_at_is_not_for_the_windowed_kernel() -> None:
    for window, taken in ((256, True), (100, False), (104, True)):
        names = kernels_of(Call(HiNMPattern(window=window), 1024, 2048, 512))
        assert any(name.startswith("windowed") for name in names) == taken


def test_without_windows_the_windowed_kernel_holds_all_columns() -> None:
    pattern = HiNMPattern(window=None)
    assert "windowed_64" in kernels_of(Call(pattern, 1024, 1024, 512))
    assert not any(name.startswith("windowed") for name in kernels_of(Call(pattern, 1024, 4096, 512)))


def test_a_convolution_is_for_the_gather_kernel() -> None:
    call = Call(HiNMPattern(), 64, 576, 3136, planes=Planes(64 * 3136, 3136, 0))
    assert kernels_of(call) == ["gather_128"]
    few, many = (replace(call, planes=replace(call.planes, shifted=shifted)) for shifted in (0, 10**9))  # type: ignore[type-var]
    assert list_kernels(few, LIMIT, H100)[1].seconds < list_kernels(many, LIMIT, H100)[1].seconds


def test_a_convolution_reads_its_images_once_and_computes_its_pixels_only() -> None:
    images, pixels = 4 * 64 * 56 * 56, 4 * 56 * 56
    call = Call(HiNMPattern(), 64, 576, 4 * 3200, planes=Planes(images, pixels, 0))
    slow = replace(H100, memory=1.0)
    assert predict_dense(call, slow).seconds == 2 * (64 * 576 + images + 64 * pixels)
    assert predict_dense(call, replace(H100, dense=1.0)).seconds == 2 * 64 * 576 * pixels
    _, sparse = list_kernels(call, LIMIT, slow)
    weight = 64 * padded_kept(call.pattern, 576) * 9 // 8 + padded_kept(call.pattern, 576) * 2
    assert sparse.seconds == weight + 2 * (images + 64 * pixels)
    _, planes = list_kernels(replace(call, planes=Planes(images, pixels, 1000)), LIMIT, slow)
    assert planes.seconds == pytest.approx(sparse.seconds + 2 * 1000, rel=1e-9)  # written, and read again


def test_a_dense_product_pays_for_the_weight_that_it_unpacks_and_for_the_activation_behind_it() -> None:
    call, slow = Call(HiNMPattern(64, 0.5), 256, 515, 40), replace(H100, memory=1.0)
    packed = 256 * padded_kept(call.pattern, 515) * 9 // 8 + 4 * padded_kept(call.pattern, 515) * 2
    unpacked = packed + 2 * 256 * 520  # read, and written in whole copies of 16 bytes
    for each, behind in ((call, 0), (replace(call, activated=True), 4 * 40 * 256)):
        dense = list_kernels(each, LIMIT, slow)[0]
        assert dense.seconds == unpacked + predict_dense(call, slow).seconds + behind
        assert dense.roof == "memory"
    blocks = replace(call, in_features=3000)  # of L2, each block of columns reads all of the weight
    packed = 256 * padded_kept(call.pattern, 3000) * 9 // 8 + 4 * padded_kept(call.pattern, 3000) * 2
    dense = list_kernels(blocks, LIMIT, replace(H100, l2=1.0))[0]
    assert dense.seconds == pytest.approx(2 * packed + 2 * 256 * 3000)
    assert list_kernels(call, LIMIT, replace(H100, dense=1.0))[0].roof == "tensor cores", "that of the product"
    assert list_kernels(replace(call, activated=True), LIMIT, H100)[0].seconds == 3 * H100.launch


def test_each_call_of_a_layer_takes_what_should_be_fastest_for_its_tokens() -> None:
    """Where gathering for tiles of 32 rows costs more than tensor cores win, many tokens are for the dense product."""
    call = Call(HiNMPattern(32, 0.5, window=None), 4096, 4096, 1)
    found = [choose_kernel(replace(call, tokens=tokens), LIMIT, H100).kernel for tokens in (1, 16, 8192)]
    assert found == ["decode", "decode_cluster", "unpack"]


def test_a_tie_is_for_the_dense_product() -> None:
    call = convolution_call(HiNMPattern(32, 0.5), 64, 36, (1, 4, 8, 8), (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    dense, gather = list_kernels(call, LIMIT, H100)
    assert dense.seconds == gather.seconds == 2 * H100.launch, "to unpack and to multiply, or planes and gather"
    assert choose_kernel(call, LIMIT, H100) == dense
    assert choose_kernel(replace(call, activated=True), LIMIT, H100) == gather


def test_the_tokens_of_a_convolution_are_whole_blocks_of_rows_that_start_at_whole_copies() -> None:
    call = convolution_call(HiNMPattern(), 64, 36, (3, 4, 12, 9), (12, 9), (3, 3), (1, 1), (1, 1), (1, 1))
    assert (call.tokens, call.outputs) == (3 * 2 * 128, 3 * 108)  # 12 rows of 16


def test_an_image_beyond_the_counts_of_the_gather_kernel_is_for_the_dense_product() -> None:
    pattern, spatial = HiNMPattern(32, 0.5), ((3, 3), (1, 1), (1, 1), (1, 1))
    pointwise = ((1, 1), (1, 1), (0, 0), (1, 1))
    for side, taken in ((2000, True), (3000, False)):  # more than 65535 blocks of 128 pixels
        found = kernels_of(convolution_call(pattern, 64, 36, (1, 4, side, side), (side, side), *spatial))
        assert (found == ["gather_128"]) == taken
    for channels, taken in ((100, True), (400, False)):  # more than 2 ** 31 numbers of an image
        images = (1, channels, 2400, 2400)
        found = kernels_of(convolution_call(pattern, 64, channels, images, (2400, 2400), *pointwise))
        assert (found == ["gather_128"]) == taken


@pytest.mark.parametrize("vector_size", [32, 64, 128])
def test_shared_memory_is_what_the_manifest_says(vector_size: int) -> None:
    pattern = HiNMPattern(vector_size, 0.5, window=256)
    call = Call(pattern, 512, 2048, 8)
    height, kept = vector_size, padded_kept(pattern, 2048)
    entries = {
        "decode": ("decode_f16_{}", {"pitch": cost.decode_pitch(2048)}),
        "decode_cluster": ("decode_cluster_f16_{}", {"pitch": cost.decode_pitch(2048)}),
        "windowed": (f"windowed_f16_{min(height, 64)}_{{}}", {"held": 256}),
        "windowed_cluster": (f"windowed_cluster_f16_{min(height, 64)}_{{}}", {"held": 256}),
        "gather": (f"gather_f16_{height}", {"kept": kept}),
    }
    static = {"decode": 1152}  # a token's partial sums
    unpacked, *choices = list_kernels(call, 10**9, H100)
    assert unpacked.shared == MANIFEST["entries"]["unpack"]["resources"]["sm_90"]["shared"]
    assert MANIFEST["entries"]["unpack"]["grid"][1] == ["pitch", cost.UNPACKED_COLUMNS]
    assert {choice.kernel for choice in choices} == entries.keys()
    for choice in choices:
        name, sizes = entries[choice.kernel]
        entry = kernels.entries()[name.format(choice.tokens)]
        shared = entry.shared_bytes(sizes)
        assert entry.cluster == (cost.CLUSTER if "cluster" in choice.kernel else 1)
        own = static.get(choice.kernel.removesuffix("_cluster"), 0) * choice.tokens
        mbarriers = cost.MBARRIERS[choice.kernel.removesuffix("_cluster")] if "cluster" in choice.kernel else 0
        assert choice.shared == shared + own + mbarriers
        listed = {name: entry["resources"]["sm_90"]["shared"] for name, entry in MANIFEST["entries"].items()}
        assert mbarriers + own in (0, listed[name.format(choice.tokens)]), "static shared memory"


def test_feature_major_input_takes_the_shared_memory_that_the_manifest_says() -> None:
    call = Call(HiNMPattern(64, 0.5, window=256), 512, 2048, 136, feature_major=True)
    found = {choice.kernel: choice for choice in list_kernels(call, 10**9, H100) if choice.tokens == 128}
    for kernel, padding in (("windowed", 0), ("windowed_cluster", cost.PADDING)):
        held = cost.held_columns(256, 8, 128, padding)
        shared = kernels.entries()[f"{kernel}_f16_64_128_features"].shared_bytes({"held": held})
        assert found[kernel].shared == shared + (cost.MBARRIERS["windowed"] if padding else 0)
        most = kernels.entries()[f"{kernel}_f16_64_128_features"].shared_bytes(
            {"held": cost.held_columns(8, 1, 128, padding)}
        )
        assert most >= 32 * 260 * 4, "the output in its place"


def clustered(call: Call, gpu: cost.Gpu = H100) -> dict[str, cost.Choice]:
    return {f"{choice.kernel}_{choice.tokens}": choice for choice in list_kernels(call, LIMIT, gpu)}


def test_blocks_share_their_input_only_where_the_gpu_has_clusters_of_them() -> None:
    call = Call(HiNMPattern(64, 0.75), 11008, 4096, 16)
    assert "decode_cluster_16" in clustered(call)
    for gpu in (*(gpu for capability, gpu in GPUS.items() if capability != (9, 0)), replace(H100, gpc=2)):
        assert not any("cluster" in name for name in clustered(call, gpu))


def test_a_cluster_reads_its_input_once_and_waves_are_of_whole_clusters() -> None:
    call = Call(HiNMPattern(64, 0.75), 32 * 130, 4096, 16)
    # L2 alone, on a GPU of which a cluster can use 128 of 132 multiprocessors: 130 blocks are 33 clusters.
    found = clustered(call, replace(H100, l2=1.0))
    kept = padded_kept(call.pattern, 4096)
    weight = 4160 * kept * 9 // 8 + 65 * kept * 2
    assert found["decode_16"].seconds == pytest.approx((weight + 130 * 16 * 4096 * 2) * 132 / 130)
    assert found["decode_cluster_16"].seconds == pytest.approx((weight + 33 * 16 * 4096 * 2) * 2 * 132 / 132)


def test_blocks_that_only_fill_up_a_cluster_take_the_place_of_others() -> None:
    pattern = HiNMPattern(64, 0.75, window=256)
    # Tensor cores alone: 5 blocks of rows for each of 26 blocks of tokens are 130, and 52 clusters of which 32 run.
    found = clustered(Call(pattern, 5 * 256, 4096, 26 * 128, feature_major=True), replace(H100, sparse=1.0))
    work = 256 * padded_kept(pattern, 4096) * 128  # of a block
    assert found["windowed_128"].seconds == pytest.approx(work * 132)
    assert found["windowed_cluster_128"].seconds == pytest.approx(2 * work * 132)


def test_where_sharing_gains_nothing_the_other_kernel_is_chosen() -> None:
    chosen = choose_kernel(Call(HiNMPattern(64, 0.75), 64, 64, 3), LIMIT, H100)
    assert (chosen.kernel, chosen.roof) == ("decode", "launch")


def test_a_gpu_without_a_row_of_its_own_takes_the_last_before_it() -> None:
    assert estimate((8, 7)) == GPUS[8, 6]
    assert estimate((9, 9)) == GPUS[9, 0]
    assert estimate((99, 0)) == GPUS[max(GPUS)]
    assert estimate((7, 5)) == GPUS[8, 0]
    assert not any(gpu.measured for gpu in GPUS.values())


@pytest.mark.gpu
def test_the_figures_of_this_gpu_are_found() -> None:
    assert cost.gpu_of(torch.device("cuda")).memory > 0
