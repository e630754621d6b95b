// y = activate(W x + bias) for few tokens: the packed weight is read once.
//
// One CTA computes 32 rows of one tile for 8 * N_BLOCKS tokens. Its input, row-major, is held in shared memory whole;
// its 8 warps share the kept vectors out among themselves, 32 at a time, and add up what they found at the end. A B
// fragment is gathered by 2-byte loads: by count of wavefronts, less than the weight takes to arrive. In a cluster each
// CTA brings in a share of the columns, for all of them (cluster.cuh).
#include "cluster.cuh"
#include "hinm.cuh"

constexpr int ROWS = 32;  // two blocks of 16: the metadata of both is one word a lane
constexpr int WARPS = 8;
constexpr int DEPTH = 4;  // weights in flight: 8 warps * 4 * 1.1 KiB, twice what 700 ns at 23 GB/s a multiprocessor ask for
constexpr int PARTIAL = 36;  // floats between two tokens: ROWS + 4, so that a fragment is stored without bank conflicts

template <typename Type, int N_BLOCKS>
__device__ __forceinline__ void decode(
    const uint16_t* __restrict__ x, const uint16_t* __restrict__ values, const uint32_t* __restrict__ metadata,
    const uint16_t* __restrict__ vector_index, const int* __restrict__ rows, const uint16_t* __restrict__ bias,
    uint16_t* __restrict__ out, int tokens, int columns, int x_stride, int pitch, int out_stride, int vector_size,
    int kept, int activation) {
    extern __shared__ __align__(16) uint16_t x_shared[];  // [8 * N_BLOCKS, pitch]
    __shared__ float partial[WARPS][N_BLOCKS][8][PARTIAL];
    __shared__ uint64_t arrived;  // in a cluster: the mbarrier of the input

    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int first_token = blockIdx.y * 8 * N_BLOCKS;
    const int blocks_of_tile = vector_size / ROWS, tile = blockIdx.x / blocks_of_tile, block = blockIdx.x % blocks_of_tile;
    const int steps = kept / 32;
    const int existing = min(8 * N_BLOCKS, tokens - first_token);
    if constexpr (CLUSTER > 1) {
        if (threadIdx.x == 0) {
            init_mbarrier(shared_address(&arrived), 1);
            publish_mbarriers();
        }
        arrive_at_cluster();
    }

    struct Weights {
        uint4 values[2];
        uint32_t metadata, columns[4];
    };
    // What the warp multiplies in one step; columns holds k = 8 i + 2 t and its neighbour, as the B fragment does.
    auto fetch = [&](int step) {
        Weights w;
        const int64_t at = int64_t(tile) * steps + step;
        const uint4* v = reinterpret_cast<const uint4*>(values) + (at * (2 * blocks_of_tile) + 2 * block) * LANES + lane;
        w.values[0] = stream(v);
        w.values[1] = stream(v + LANES);
        w.metadata = stream(metadata + (at * blocks_of_tile + block) * LANES + lane);
        const uint32_t* pairs = reinterpret_cast<const uint32_t*>(vector_index + at * 32) + t;
#pragma unroll
        for (int i = 0; i < 4; ++i) w.columns[i] = pairs[4 * i];
        return w;
    };

    // The first weights are on their way while the input is staged.
    Weights ahead[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (warp + i * WARPS < steps) ahead[i] = fetch(warp + i * WARPS);

    const int chunks = columns / 8;
    if constexpr (CLUSTER == 1) {
        for (int i = threadIdx.x; i < 8 * N_BLOCKS * chunks; i += WARPS * LANES) {
            const int token = i / chunks, chunk = i % chunks;
            const bool exists = first_token + token < tokens;
            const uint16_t* from = x + (exists ? int64_t(first_token + token) * x_stride + chunk * 8 : 0);
            copy_async(shared_address(x_shared + token * pitch + chunk * 8), from, exists ? 16 : 0);
        }
        commit_copies();
        wait_copies<0>();
        __syncthreads();
    } else {
        wait_for_cluster();  // all mbarriers are there, and all CTAs
        if (threadIdx.x == 0) arrive_expecting(shared_address(&arrived), existing * columns * 2);
        const int rank = rank_in_cluster();
        const int first = rank * chunks / CLUSTER, end = (rank + 1) * chunks / CLUSTER;
        if (threadIdx.x < existing && first < end) {
            const uint16_t* from = x + int64_t(first_token + threadIdx.x) * x_stride + first * 8;
            copy_to_all(shared_address(x_shared + threadIdx.x * pitch + first * 8), from, (end - first) * 16,
                        shared_address(&arrived));
        }
        wait_for(shared_address(&arrived), 0);
        arrive_at_cluster();
    }

    float sums[N_BLOCKS][2][4] = {};
    auto multiply = [&](const Weights& w) {
#pragma unroll
        for (int n = 0; n < N_BLOCKS; ++n) {
            // In a cluster nothing fills up with zeros: a token that does not exist is another one, and not written.
            const uint16_t* token = x_shared + (CLUSTER == 1 ? 8 * n + g : min(8 * n + g, existing - 1)) * pitch;
            uint32_t b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                b[i] = token[w.columns[i] & 0xffff] | uint32_t(token[w.columns[i] >> 16]) << 16;
            Type::template multiply<0>(sums[n][0], w.values[0], b, w.metadata);
            Type::template multiply<1>(sums[n][1], w.values[1], b, w.metadata);
        }
    };
    for (int first = warp; first < steps; first += DEPTH * WARPS) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int step = first + i * WARPS;
            if (step >= steps) break;
            const Weights now = ahead[i];
            if (step + DEPTH * WARPS < steps) ahead[i] = fetch(step + DEPTH * WARPS);
            multiply(now);
        }
    }

#pragma unroll
    for (int n = 0; n < N_BLOCKS; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                partial[warp][n][2 * t + (i & 1)][16 * half + g + 8 * (i >> 1)] = sums[n][half][i];
    __syncthreads();

    // Neighbours in a warp are neighbours among the rows.
    const int row = CLUSTER > 1 && kept == 0 ? -1 : rows[blockIdx.x * ROWS + lane];
#pragma unroll
    for (int n = 0; n < N_BLOCKS; ++n) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += partial[w][n][warp][lane];
        const int token = first_token + 8 * n + warp;
        if (row < 0 || token >= tokens) continue;
        if (bias) sum += Type::widen(bias[row]);
        out[int64_t(token) * out_stride + row] = uint16_t(Type::narrow(activate(sum, activation), 0.0f));
    }
    if constexpr (CLUSTER > 1) wait_for_cluster();  // no copy of this CTA is on its way to another any more
}

// A CTA that only fills up a cluster has no rows: nothing is kept for it.
#define DECODE(SUFFIX, TYPE, N_BLOCKS)                                                                                \
    extern "C" __global__ void IN_CLUSTERS __launch_bounds__(WARPS * LANES) ENTRY(decode, SUFFIX)(                    \
        const uint16_t* x,        /* 16 bit  [tokens, columns], row-major, rows x_stride apart, 16-byte aligned */    \
        const uint16_t* values,   /* 16 bit  fragments, see hinm.cuh */                                               \
        const uint32_t* metadata, /* uint32  fragments */                                                             \
        const uint16_t* vector_index,    /* uint16  [tiles, kept] */                                                  \
        const int* rows,          /* int32   [tiles * vector_size] */                                                 \
        const uint16_t* bias,     /* 16 bit  [output rows], or null */                                                \
        uint16_t* out,            /* 16 bit  [tokens, output rows], row-major, rows out_stride apart */               \
        int tokens, int packed_rows, int columns, int x_stride, int pitch, int out_stride, int vector_size, int kept, \
        int activation) {                                                                                             \
        const bool has_rows = CLUSTER == 1 || blockIdx.x * ROWS < packed_rows;                                        \
        decode<TYPE, N_BLOCKS>(x, values, metadata, vector_index, rows, bias, out, tokens, columns, x_stride, pitch,  \
                               out_stride, vector_size, has_rows ? kept : 0, activation);                             \
    }

DECODE(f16_8, Half, 1)
DECODE(f16_16, Half, 2)
DECODE(bf16_8, Bfloat16, 1)
DECODE(bf16_16, Bfloat16, 2)
