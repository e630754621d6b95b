// y = activate(W x + bias) for few tokens: the packed weight is read once.
//
// One CTA computes 32 rows of one tile for 8 * N_BLOCKS tokens. Its input, row-major, is held in shared memory whole;
// its 8 warps share the kept vectors out among themselves, 32 at a time, and add up what they found at the end. A B
// fragment is gathered by 2-byte loads: by count of wavefronts, less than the weight takes to arrive.
//
// A cluster of C CTAs computes 32 * C rows, and shares the runs of a windowed pattern out: each CTA multiplies its part
// of them for all these rows. So it holds a part of the input only, which leaves room for more CTAs, whose weights are
// then all on their way at once. In the end each sends the others what they need for their own 32 rows.
#include "cluster.cuh"
#include "hinm.cuh"

constexpr int ROWS = 32;
constexpr int WARPS = 8;
constexpr int CTAS = 3;  // of a multiprocessor that registers leave room for: where shared memory does too

// A warp covers WARP_ROWS rows of one tile, so that one gather serves them all. Others share the same rows with it.
template <int WARP_ROWS>
struct Shape {
    static constexpr int GROUPS = CLUSTER * ROWS / WARP_ROWS, SPLITS = WARPS / GROUPS;
    static constexpr int METADATA = WARP_ROWS * 32, COLUMNS = METADATA + WARP_ROWS / 32 * LANES * 4;
    static constexpr int STEP = COLUMNS + 32 * 2;  // bytes of 32 kept vectors
    // Weights in flight pass through shared memory, for copies can be waited for one by one, but loads into registers
    // only all together. In all 38 KB, where 700 ns at 33 GB/s a multiprocessor of an H200 ask for 23.
    static constexpr int DEPTH = 128 / WARP_ROWS, RING = WARPS * DEPTH * STEP;
    static constexpr int PITCH = WARP_ROWS + 4;  // floats between two tokens: a fragment is stored without conflicts
};

template <typename Type, int WARP_ROWS, int N_BLOCKS>
__device__ __forceinline__ void decode(
    const uint16_t* __restrict__ x, const uint16_t* __restrict__ values, const uint32_t* __restrict__ metadata,
    const uint16_t* __restrict__ vector_index, const int* __restrict__ rows, const uint16_t* __restrict__ bias,
    uint16_t* __restrict__ out, int tokens, int packed_rows, int columns, int x_stride, int pitch, int out_stride,
    int vector_size, int kept, int window, int kept_of_window, int activation) {
    using S = Shape<WARP_ROWS>;
    // [WARPS, DEPTH, STEP] bytes of weights, then the input: [existing, pitch]. In the end the sums take their place.
    extern __shared__ __align__(16) uint8_t memory[];
    uint16_t* x_shared = reinterpret_cast<uint16_t*>(memory + S::RING);
    auto partial = reinterpret_cast<float(*)[8][S::PITCH]>(memory);                          // [WARPS], of 8 tokens
    auto received = reinterpret_cast<float(*)[N_BLOCKS][8][ROWS]>(partial + WARPS);  // [CLUSTER]: from each of its CTAs
    static_assert(sizeof(*partial) * WARPS + sizeof(*received) * CLUSTER <= S::RING, "the sums where the weights were");

    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int first_token = blockIdx.y * 8 * N_BLOCKS, existing = min(8 * N_BLOCKS, tokens - first_token);
    // The steps and the columns of this CTA: all, or those of its runs.
    int begin = 0, end = kept / 32, first_column = 0, end_column = columns;
    if constexpr (CLUSTER > 1) {
        const int rank = rank_in_cluster(), runs = (columns + window - 1) / window;
        const int first_run = rank * runs / CLUSTER, end_run = (rank + 1) * runs / CLUSTER;
        begin = first_run * kept_of_window / 32, end = min(end_run * kept_of_window, kept) / 32;
        first_column = first_run * window, end_column = min(end_run * window, columns);
    }
    // The rows of this warp, which in a cluster those of the same number have too, in every CTA.
    const int group = warp % S::GROUPS, split = warp / S::GROUPS;
    const int first_row = blockIdx.x / CLUSTER * CLUSTER * ROWS + group * WARP_ROWS;
    if (first_row >= packed_rows) end = begin;  // they only fill up the cluster

    for (int token = 0; token < existing; ++token) {
        const uint16_t* from = x + int64_t(first_token + token) * x_stride + first_column;
        uint16_t* to = x_shared + token * pitch;
        const int first = (warp + token) % WARPS * LANES * 8 + lane * 8;  // no warp has more to do than another
        for (int column = first; column < end_column - first_column; column += WARPS * LANES * 8)
            copy_async(shared_address(to + column), from + column, 16);
    }
    commit_copies();

    const int64_t first_step = int64_t(first_row / vector_size) * (kept / 32);
    const int row_of_tile = first_row % vector_size;
    uint8_t* ring = memory + warp * S::DEPTH * S::STEP;
    // What the warp multiplies in one step, behind the others; an empty group too, so that groups count steps.
    auto fetch = [&](int step, int slot) {
        if (step < end) {
            const int64_t at = first_step + step;
            const uint32_t to = shared_address(ring + slot * S::STEP) + lane * 16;
            const uint16_t* v = values + (at * vector_size + row_of_tile) * 16 + lane * 8;
#pragma unroll
            for (int i = 0; i < WARP_ROWS / 16; ++i) copy_async(to + i * LANES * 16, v + i * LANES * 8, 16);
            constexpr int CHUNKS = WARP_ROWS / 4;  // of 16 bytes, of the metadata; the columns are four more
            const void* rest = lane < CHUNKS ? static_cast<const void*>(metadata + at * vector_size + row_of_tile + lane * 4)
                                             : vector_index + at * 32 + (lane - CHUNKS) * 8;
            if (lane < CHUNKS + 4) copy_async(to + S::METADATA, rest, 16);
        }
        commit_copies();
    };
#pragma unroll
    for (int i = 0; i < S::DEPTH; ++i) fetch(begin + split + i * S::SPLITS, i);
    wait_copies<S::DEPTH>();
    __syncthreads();  // the input is there

    constexpr int BLOCKS = WARP_ROWS / 16;
    float sums[N_BLOCKS][BLOCKS][4] = {};
    const uint16_t* own_tokens[N_BLOCKS];  // a token that does not exist is another one, and not written
#pragma unroll
    for (int n = 0; n < N_BLOCKS; ++n) own_tokens[n] = x_shared + min(8 * n + g, existing - 1) * pitch - first_column;
    for (int step = begin + split, slot = 0; step < end; step += S::SPLITS, slot = (slot + 1) % S::DEPTH) {
        wait_copies<S::DEPTH - 1>();
        __syncwarp();
        const uint8_t* from = ring + slot * S::STEP;
        uint4 v[BLOCKS];
        uint32_t e[BLOCKS / 2], pairs[4];  // pairs: k = 8 i + 2 t and its neighbour, as the B fragment holds them
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) v[i] = reinterpret_cast<const uint4*>(from)[i * LANES + lane];
#pragma unroll
        for (int i = 0; i < BLOCKS / 2; ++i) e[i] = reinterpret_cast<const uint32_t*>(from + S::METADATA)[i * LANES + lane];
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = reinterpret_cast<const uint32_t*>(from + S::COLUMNS)[4 * i + t];
        __syncwarp();  // all lanes have what was there
        fetch(step + S::DEPTH * S::SPLITS, slot);
#pragma unroll
        for (int n = 0; n < N_BLOCKS; ++n) {
            uint32_t b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                b[i] = own_tokens[n][pairs[i] & 0xffff] | uint32_t(own_tokens[n][pairs[i] >> 16]) << 16;
#pragma unroll
            for (int i = 0; i < BLOCKS; i += 2) {
                Type::template multiply<0>(sums[n][i], v[i], b, e[i / 2]);
                Type::template multiply<1>(sums[n][i + 1], v[i + 1], b, e[i / 2]);
            }
        }
    }
    wait_copies<0>();
    __syncthreads();  // nothing is on its way any more, and all warps are done with what came

    // Neighbours in a warp are neighbours among the rows, and each warp has a token of eight.
    float found[N_BLOCKS] = {};
    if constexpr (CLUSTER > 1) arrive_at_cluster();
#pragma unroll
    for (int n = 0; n < N_BLOCKS; ++n) {
        if (n > 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) partial[warp][2 * t + (j & 1)][16 * i + g + 8 * (j >> 1)] = sums[n][i][j];
        __syncthreads();
        if (CLUSTER > 1 && n == 0) wait_for_cluster();  // all CTAs are done with what was there before
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) {  // the rows of each CTA
            float sum = 0.0f;
#pragma unroll
            for (int s = 0; s < S::SPLITS; ++s)
                sum += partial[s * S::GROUPS + rank * ROWS / WARP_ROWS][warp][rank * ROWS % WARP_ROWS + lane];
            if constexpr (CLUSTER > 1) store_at(shared_address(&received[rank_in_cluster()][n][warp][lane]), rank, sum);
            else found[n] = sum;
        }
    }
    if constexpr (CLUSTER > 1) {
        arrive_at_cluster();
        wait_for_cluster();  // all that this CTA needs is here
#pragma unroll
        for (int n = 0; n < N_BLOCKS; ++n)
#pragma unroll
            for (int rank = 0; rank < CLUSTER; ++rank) found[n] += received[rank][n][warp][lane];
    }
    const int packed_row = blockIdx.x * ROWS + lane, row = packed_row < packed_rows ? rows[packed_row] : -1;
#pragma unroll
    for (int n = 0; n < N_BLOCKS; ++n) {
        const int token = first_token + 8 * n + warp;
        if (row < 0 || token >= tokens) continue;
        const float sum = bias ? found[n] + Type::widen(bias[row]) : found[n];
        out[int64_t(token) * out_stride + row] = uint16_t(Type::narrow(activate(sum, activation), 0.0f));
    }
}

#if __CUDA_ARCH__ >= 900
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#define ENTRY(SUFFIX) decode_cluster_##SUFFIX
#else
#define IN_CLUSTERS
#define ENTRY(SUFFIX) decode_##SUFFIX
#endif
#define DECODE_ENTRY(SUFFIX, TYPE, WARP_ROWS, N_BLOCKS)                                                               \
    extern "C" __global__ void IN_CLUSTERS __launch_bounds__(WARPS * LANES, CTAS) ENTRY(SUFFIX)(                      \
        const uint16_t* x,        /* 16 bit  [tokens, columns], row-major, rows x_stride apart, 16-byte aligned */    \
        const uint16_t* values,   /* 16 bit  fragments, see hinm.cuh */                                               \
        const uint32_t* metadata, /* uint32  fragments */                                                             \
        const uint16_t* vector_index, /* uint16  [tiles, kept] */                                                     \
        const int* rows,          /* int32   [tiles * vector_size] */                                                 \
        const uint16_t* bias,     /* 16 bit  [output rows], or null */                                                \
        uint16_t* out,            /* 16 bit  [tokens, output rows], row-major, rows out_stride apart */               \
        int tokens, int packed_rows, int columns, int x_stride,                                                       \
        int pitch,                /* numbers between two tokens in shared memory, for the columns of one CTA */       \
        int held,                 /* numbers of the input there: pitch for each token of a CTA */                     \
        int out_stride, int vector_size, int kept,                                                                    \
        int window,               /* columns of a run, a multiple of 8; only a cluster shares runs out */             \
        int kept_of_window,       /* of the kept vectors, those of each run but the last, a multiple of 32 */         \
        int activation) {                                                                                             \
        decode<TYPE, WARP_ROWS, N_BLOCKS>(x, values, metadata, vector_index, rows, bias, out, tokens, packed_rows,    \
                                          columns, x_stride, pitch, out_stride, vector_size, kept, window,            \
                                          kept_of_window, activation);                                                \
    }

// A CTA without a cluster has 32 rows, so its warps have no more.
#if __CUDA_ARCH__ >= 900
#define DECODE(SHORT, TYPE)                  \
    DECODE_ENTRY(SHORT##_32_8, TYPE, 32, 1)  \
    DECODE_ENTRY(SHORT##_32_16, TYPE, 32, 2) \
    DECODE_ENTRY(SHORT##_64_8, TYPE, 64, 1)  \
    DECODE_ENTRY(SHORT##_64_16, TYPE, 64, 2)
#else
#define DECODE(SHORT, TYPE)                 \
    DECODE_ENTRY(SHORT##_32_8, TYPE, 32, 1) \
    DECODE_ENTRY(SHORT##_32_16, TYPE, 32, 2)
#endif

DECODE(f16, Half)
DECODE(bf16, Bfloat16)
