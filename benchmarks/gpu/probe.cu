// Roofs of the kernels, each alone: multiply-adds, and rows gathered from L2 into shared memory. The argument names the
// part, since not every GPU has all instructions, and one that goes wrong should cost no other. Prints a line of JSON.
//   mma    mma.sp and mma from registers; rows by cp.async of 16 bytes: compute capability 8.0 and up
//   tma    the same rows by tensor copies, one box for each row: 9.0 and up
//   bulk   rows by bulk copies, to one block and to the four of a cluster at once, as csrc/cluster.cuh: 9.0 alone
//   wgmma  wgmma.sp, its weight from registers and from shared memory: 9.0 alone, compiled for sm_90a
// ORDERED: the GPU wants mma.sp::ordered_metadata (compute capability 10 and up).
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef ORDERED
#define SPARSE "mma.sp::ordered_metadata.sync"
#else
#define SPARSE "mma.sp.sync"
#endif

constexpr int THREADS = 256;
constexpr int CHAINS = 8;  // independent accumulators of a warp: enough to hide the latency of one multiply-add

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "%s\n", cudaGetErrorString(error));
    exit(1);
}

// Two bfloat16 numbers in [1, 2): zeros would take less power, and so run at a higher clock.
__device__ uint32_t number(uint32_t seed) {
    seed = (seed ^ 61) ^ (seed >> 16);
    seed *= 0x9e3779b1;
    seed ^= seed >> 15;
    return 0x3f803f80 | (seed & 0x007f007f);
}

template <bool IS_SPARSE>
__global__ void __launch_bounds__(THREADS) multiply(float* out, int rounds) {
    uint32_t a[4], b[4];
    for (int i = 0; i < 4; ++i) a[i] = number(threadIdx.x * 8 + i), b[i] = number(threadIdx.x * 8 + 4 + i);
    float d[CHAINS][4] = {};
    for (int round = 0; round < rounds; ++round)
#pragma unroll
        for (int i = 0; i < CHAINS; ++i) {
            if constexpr (IS_SPARSE)
                asm volatile(SPARSE ".aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                             "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
                             : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                               "r"(0x44444444));
            else
                asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                             "{%8, %9}, {%0, %1, %2, %3};"
                             : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    float sum = 0;
    for (int i = 0; i < CHAINS; ++i)
        for (int j = 0; j < 4; ++j) sum += d[i][j];
    if (sum == 1.5f) out[threadIdx.x] = sum;  // never: the numbers are all positive, and many
}

// As gather.cu reads: rows of BYTES at random places, 16 bytes a thread, three stages of 16 KiB in flight.
template <int BYTES>
__global__ void __launch_bounds__(128) gather(const uint8_t* from, uint32_t last_row, float* out, int steps) {
    extern __shared__ __align__(128) uint8_t stages[];
    constexpr int STAGE = 16384, CHUNKS = BYTES / 16;
    uint32_t seed = blockIdx.x * 7919 + threadIdx.x / CHUNKS * 104729 + 12345;
    for (int step = 0; step < steps; ++step) {
        for (int i = threadIdx.x; i < STAGE / 16; i += 128) {
            seed = seed * 1664525 + 1013904223;
            const uint8_t* row = from + uint64_t(seed >> 8 & last_row) * BYTES + i % CHUNKS * 16;
            const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(stages + step % 3 * STAGE + i * 16));
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(row) : "memory");
        }
        asm volatile("cp.async.commit_group;\n cp.async.wait_group 2;" ::: "memory");
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    if (stages[threadIdx.x] == 255) out[threadIdx.x] = 1.0f;  // never: the buffer holds smaller bytes
}

__device__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same rows of 128 bytes by the copy engine, swizzled as the kernels read them: each thread asks for one row of the
// 128 of a stage. Stages are waited for as by cp.async.wait_group 2; nobody reads them.
__global__ void __launch_bounds__(128) gather_boxes(const __grid_constant__ CUtensorMap map, uint32_t last_row,
                                                    float* out, int steps) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t full[3];
    constexpr int STAGE = 16384;
    if (threadIdx.x == 0)
        for (int i = 0; i < 3; ++i)
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(full + i)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copies see the barriers
    __syncthreads();
    const auto wait = [&](int step) {
        uint32_t done = 0;
        while (!done)
            asm volatile("{.reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
                         : "=r"(done)
                         : "r"(shared_address(full + step % 3)), "r"(step / 3 & 1)
                         : "memory");
    };
    uint32_t seed = blockIdx.x * 7919 + threadIdx.x * 104729 + 12345;
    for (int step = 0; step < steps; ++step) {
        if (step >= 3) wait(step - 3);
        const uint32_t barrier = shared_address(full + step % 3);
        // Rows may land before their bytes are announced: a phase ends after this arrival in any case.
        if (threadIdx.x == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE) : "memory");
        seed = seed * 1664525 + 1013904223;
        const uint32_t to = shared_address(stages + step % 3 * STAGE + threadIdx.x * 128);
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                     "[%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map), "r"(0), "r"(seed >> 8 & last_row), "r"(barrier)
                     : "memory");
    }
    for (int step = steps - 3; step < steps; ++step) wait(step);
    if (stages[threadIdx.x] == 255) out[threadIdx.x] = 1.0f;  // never: the buffer holds smaller bytes
#else
    __trap();
#endif
}

// Rows of BYTES by bulk copies, two stages of 16 KiB in flight. The BLOCKS of a cluster want the same rows: each copies a
// share of a stage to all of them, once all are done with what it held.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define IN_CLUSTERS(BLOCKS) __cluster_dims__(BLOCKS, 1, 1)
#else
#define IN_CLUSTERS(BLOCKS)
#endif
template <int BYTES, int BLOCKS>
__global__ void IN_CLUSTERS(BLOCKS) __launch_bounds__(128)
    copy_rows(const uint8_t* from, uint32_t last_row, float* out, int steps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t full[2], empty[2];
    constexpr int STAGE = 16384, ROWS = STAGE / BYTES;
    const auto wait = [](uint64_t* barrier, int parity) {
        uint32_t done = 0;
        while (!done)
            asm volatile(
                "{.reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                "selp.u32 %0, 1, 0, p;}"
                : "=r"(done)
                : "r"(shared_address(barrier)), "r"(parity)
                : "memory");
    };
    if (threadIdx.x < 2) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + threadIdx.x)) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(empty + threadIdx.x)), "r"(BLOCKS)
                     : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    uint32_t seed = blockIdx.x * 7919 + threadIdx.x * 104729 + 12345;
    const auto bring = [&](int step) {
        if (step >= 2) wait(empty + step % 2, step / 2 - 1 & 1);
        const uint32_t barrier = shared_address(full + step % 2);
        if (threadIdx.x == 0)
            asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE)
                         : "memory");
        // A few lanes of each warp, because copies leave a warp one by one.
        for (int row = rank + BLOCKS * (threadIdx.x % 32 * 4 + threadIdx.x / 32); row < ROWS; row += BLOCKS * 128) {
            seed = seed * 1664525 + 1013904223;
            const uint32_t to = shared_address(stages + step % 2 * STAGE + row * BYTES);
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, "
                "[%3], %4;" ::"r"(to),
                "l"(from + uint64_t(seed >> 8 & last_row) * BYTES), "r"(BYTES), "r"(barrier),
                "h"(uint16_t((1 << BLOCKS) - 1))
                : "memory");
        }
    };
    bring(0);
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) bring(step + 1);
        wait(full + step % 2, step / 2 & 1);
        __syncthreads();
        if (step + 2 < steps && threadIdx.x < BLOCKS) {
            uint32_t remote;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                         : "=r"(remote)
                         : "r"(shared_address(empty + step % 2)), "r"(threadIdx.x));
            asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
        }
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (stages[threadIdx.x] == 255) out[threadIdx.x] = 1.0f;  // never: the buffer holds smaller bytes
#else
    __trap();
#endif
}

// clang-format off
#define WGMMA "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16 {" \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
    "}, "
// clang-format on
#define ACCUMULATORS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACCUMULATORS16(i) \
    ACCUMULATORS4(i), ACCUMULATORS4(i + 4), ACCUMULATORS4(i + 8), ACCUMULATORS4(i + 12)
#define ACCUMULATORS ACCUMULATORS16(0), ACCUMULATORS16(16), ACCUMULATORS16(32), ACCUMULATORS16(48)

// Two warpgroups multiply one stage of 128 columns again and again: a weight of 64 rows, 64 kept of their columns, and
// 128 tokens, whose columns are rows of 64 tokens as the gather leaves them. Both lie in rows of 128 swizzled bytes.
template <bool FROM_REGISTERS>
__global__ void __launch_bounds__(THREADS) multiply_groups(float* out, int rounds) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int WEIGHT = 64 * 128, HALF = 128 * 128;  // bytes: of the weight, and of the columns of 64 tokens
    __shared__ __align__(1024) uint8_t stage[WEIGHT + 2 * HALF];
    for (int i = threadIdx.x; i < sizeof(stage) / 4; i += THREADS) reinterpret_cast<uint32_t*>(stage)[i] = number(i);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    // Addresses count 16 bytes: of the first one, to the next 64 tokens, to the next 8 rows; the swizzle of 128 bytes.
    const auto describe = [](uint32_t address, uint64_t leading) {
        return uint64_t(address >> 4 & 0x3fff) | leading / 16 << 16 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 62;
    };
    const uint32_t base = shared_address(stage);
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = number(threadIdx.x * 4 + i);
    float d[64] = {};
    for (int round = 0; round < rounds; ++round) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // 32 columns, 16 of them kept
            const uint64_t tokens = describe(base + WEIGHT + k * 32 * 128, HALF);
            if constexpr (FROM_REGISTERS)
                asm volatile(WGMMA "{%64, %65, %66, %67}, %68, %69, 0, 1, 1, 1, 1;"
                             : ACCUMULATORS
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(0x44444444));
            else
                asm volatile(WGMMA "%64, %65, %66, 0, 1, 1, 1, 0, 1;"
                             : ACCUMULATORS
                             : "l"(describe(base + k * 32, 16)), "l"(tokens), "r"(0x44444444));
        }
        asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float sum = 0;
    for (int i = 0; i < 64; ++i) sum += d[i];
    if (sum == 1.5f) out[threadIdx.x] = sum;  // never, as above
#else
    __trap();
#endif
}

template <typename Launch>
double seconds(Launch launch) {
    cudaEvent_t start, end;
    check(cudaEventCreate(&start));
    check(cudaEventCreate(&end));
    double best = 1e9;
    for (int i = 0; i < 8; ++i) {  // the first ones warm up
        check(cudaEventRecord(start));
        launch();
        check(cudaGetLastError());
        check(cudaEventRecord(end));
        check(cudaEventSynchronize(end));
        float milliseconds;
        check(cudaEventElapsedTime(&milliseconds, start, end));
        if (i > 1 && milliseconds * 1e-3 < best) best = milliseconds * 1e-3;
    }
    return best;
}

template <int BYTES>
double gathered(const uint8_t* from, size_t size, float* out, int processors) {
    constexpr int STEPS = 2000, SHARED = 3 * 16384, BLOCKS = 4;
    check(cudaFuncSetAttribute(gather<BYTES>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    int resident = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, gather<BYTES>, 128, SHARED));
    const int blocks = processors * (resident < BLOCKS ? resident : BLOCKS);
    const double time = seconds([&] { gather<BYTES><<<blocks, 128, SHARED>>>(from, size / BYTES - 1, out, STEPS); });
    return double(blocks) * STEPS * 16384 / time;
}

// Rows of 128 bytes as a tensor whose boxes are single rows. The driver's function is asked for, so that no library of
// the driver is needed to link this.
CUtensorMap map_of_rows(uint8_t* from, size_t size) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    CUtensorMap map;
    const cuuint64_t sizes[] = {64, size / 128}, strides[] = {128};
    const cuuint32_t box[] = {64, 1}, steps[] = {1, 1};
    if (found != cudaDriverEntryPointSuccess ||
        reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
            &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, from, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
            CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)) {
        fprintf(stderr, "the driver makes no tensor map\n");
        exit(1);
    }
    return map;
}

double gathered_boxes(uint8_t* from, size_t size, float* out, int processors) {
    constexpr int STEPS = 2000, SHARED = 3 * 16384, BLOCKS = 4;
    const CUtensorMap map = map_of_rows(from, size);
    check(cudaFuncSetAttribute(gather_boxes, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    int resident = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, gather_boxes, 128, SHARED));
    const int blocks = processors * (resident < BLOCKS ? resident : BLOCKS);
    const double time = seconds([&] { gather_boxes<<<blocks, 128, SHARED>>>(map, size / 128 - 1, out, STEPS); });
    return double(blocks) * STEPS * 16384 / time;
}

// Bytes a second that arrive in all blocks together.
template <int BYTES, int BLOCKS>
double copied(const uint8_t* from, size_t size, float* out, int processors) {
    constexpr int STEPS = 2000, SHARED = 2 * 16384, RESIDENT = 4;
    check(cudaFuncSetAttribute(copy_rows<BYTES, BLOCKS>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    const int blocks = processors * RESIDENT / BLOCKS * BLOCKS;
    const double time = seconds(
        [&] { copy_rows<BYTES, BLOCKS><<<blocks, 128, SHARED>>>(from, size / BYTES - 1, out, STEPS); });
    return double(blocks) * STEPS * 16384 / time;
}

int main(int count, char** arguments) {
    const char* part = count > 1 ? arguments[1] : "";
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0));
    const int processors = properties.multiProcessorCount, rounds = 20000;
    float* out;
    check(cudaMalloc(&out, 4096));
    size_t size = 16 << 20;  // a power of two that L2 holds with room to spare
    while (size * 3 > size_t(properties.l2CacheSize)) size /= 2;
    uint8_t* from;
    check(cudaMalloc(&from, size));
    check(cudaMemset(from, 37, size));
    if (!strcmp(part, "mma")) {
        const double products = double(processors) * 2 * (THREADS / 32) * rounds * CHAINS;
        const double sparse = seconds([&] { multiply<true><<<2 * processors, THREADS>>>(out, rounds); });
        const double dense = seconds([&] { multiply<false><<<2 * processors, THREADS>>>(out, rounds); });
        // 16 x 8 x 16 multiply-adds on non-zeros, in both.
        printf("{\"mma_sp\": %.4g, \"mma\": %.4g, \"l2_rows_256\": %.4g, \"l2_rows_128\": %.4g}\n",
               products * 4096 / sparse, products * 4096 / dense, gathered<256>(from, size, out, processors),
               gathered<128>(from, size, out, processors));
    } else if (!strcmp(part, "tma")) {
        printf("{\"tma_rows_128\": %.4g}\n", gathered_boxes(from, size, out, processors));
    } else if (!strcmp(part, "bulk")) {
        printf("{\"bulk_rows_256\": %.4g, \"bulk_rows_512\": %.4g, \"shared_rows_256\": %.4g, \"shared_rows_512\": %.4g}\n",
               copied<256, 1>(from, size, out, processors), copied<512, 1>(from, size, out, processors),
               copied<256, 4>(from, size, out, processors), copied<512, 4>(from, size, out, processors));
    } else if (!strcmp(part, "wgmma")) {
        // 64 x 128 x 16 multiply-adds on non-zeros, of two warpgroups in each of two blocks.
        const double flop = double(processors) * 2 * (THREADS / 128) * rounds * 4 * 262144;
        const double registers = seconds([&] { multiply_groups<true><<<2 * processors, THREADS>>>(out, rounds); });
        const double shared = seconds([&] { multiply_groups<false><<<2 * processors, THREADS>>>(out, rounds); });
        printf("{\"wgmma_sp_rs\": %.4g, \"wgmma_sp_ss\": %.4g}\n", flop / registers, flop / shared);
    } else {
        fprintf(stderr, "there is no part %s\n", part);
        return 1;
    }
    return 0;
}
