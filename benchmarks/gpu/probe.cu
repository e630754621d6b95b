// Two roofs of the kernels, each alone: multiply-adds from registers, and rows gathered from L2 into shared memory.
// Prints one line of JSON. ORDERED: the GPU wants mma.sp::ordered_metadata (compute capability 10 and up).
#include <cstdint>
#include <cstdio>
#include <cstdlib>

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

int main() {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0));
    const int processors = properties.multiProcessorCount, rounds = 20000;
    float* out;
    check(cudaMalloc(&out, 4096));
    const double products = double(processors) * 2 * (THREADS / 32) * rounds * CHAINS;
    const double sparse = seconds([&] { multiply<true><<<2 * processors, THREADS>>>(out, rounds); });
    const double dense = seconds([&] { multiply<false><<<2 * processors, THREADS>>>(out, rounds); });
    size_t size = 16 << 20;  // a power of two that L2 holds with room to spare
    while (size * 3 > size_t(properties.l2CacheSize)) size /= 2;
    uint8_t* from;
    check(cudaMalloc(&from, size));
    check(cudaMemset(from, 37, size));
    // 16 x 8 x 16 multiply-adds on non-zeros, in both.
    printf("{\"mma_sp\": %.4g, \"mma\": %.4g, \"l2_rows_256\": %.4g, \"l2_rows_128\": %.4g}\n",
           products * 4096 / sparse, products * 4096 / dense, gathered<256>(from, size, out, processors),
           gathered<128>(from, size, out, processors));
    return 0;
}
