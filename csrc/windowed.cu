// y = activate(W x + bias) for many tokens on feature-major storage: x is [columns, tokens], y is [rows, tokens].
//
// The columns of a windowed pattern are cut into runs, and no group of kept vectors crosses a run. So a CTA brings in
// one run of columns at a time, whole and coalesced, whatever was kept of it; in shared memory every tile of the CTA
// gathers its own rows as ldmatrix addresses. How much of the input moves does not depend on the height of a tile. A
// pattern without windows is one run: all columns are held at once.
//
// One CTA computes 256 packed rows for TOKENS tokens, with 8 warps. The next run arrives while one is multiplied.
// Compiled for compute capability 9, a kernel has it brought by bulk copies: asynchronous copies of 16 bytes would keep
// the path to shared memory, that ldmatrix takes too, until they have arrived.
#include "hinm.cuh"
#include "hopper.cuh"

constexpr int ROWS = 256;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * LANES;
// Bulk copies write columns as they come, so those that ldmatrix reads lie 4 banks apart beyond a whole round.
constexpr int PADDING = HOPPER ? 16 : 0;  // bytes
constexpr int OUT_ROWS = 64;  // rows written at a time: their floats take the place of the runs

// A warp covers WARP_ROWS rows of one tile, so that one gather serves them all.
template <int WARP_ROWS, int TOKENS>
struct Shape {
    static constexpr int ROW_WARPS = ROWS / WARP_ROWS;
    static constexpr int WARP_TOKENS = TOKENS / (WARPS / ROW_WARPS);
    static constexpr int OUT_PITCH = TOKENS + 8;  // floats between two rows: they start 8 banks apart
};

template <typename Type, int WARP_ROWS, int TOKENS>
__device__ __forceinline__ void windowed(
    const uint16_t* __restrict__ x, const uint16_t* __restrict__ values, const uint32_t* __restrict__ metadata,
    const uint16_t* __restrict__ vector_index, const int* __restrict__ rows, const uint16_t* __restrict__ bias,
    uint16_t* __restrict__ out, int tokens, int packed_rows, int columns, int x_stride, int out_stride,
    int vector_size, int kept, int window, int kept_of_window, int kept_of_last, int activation) {
    using S = Shape<WARP_ROWS, TOKENS>;
    constexpr int RUN_PITCH = TOKENS * 2 + PADDING;  // bytes between two columns of a run
    extern __shared__ __align__(256) uint8_t memory[];  // one or two runs, [window, TOKENS]
    auto run_of = [&](int r) { return memory + r % 2 * window * RUN_PITCH; };
    __shared__ uint64_t arrived[2];  // of bulk copies: the mbarriers of each of two runs

    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int warp_row = warp % S::ROW_WARPS * WARP_ROWS, warp_token = warp / S::ROW_WARPS * S::WARP_TOKENS;
    const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    const bool active = first_row + warp_row < packed_rows;
    const int tile = (first_row + warp_row) / vector_size, row_of_tile = (first_row + warp_row) % vector_size;
    const int runs = (columns + window - 1) / window;
    const int existing = min(TOKENS, tokens - first_token);

    // Run r: 16 bytes are 8 tokens of one column, exchanged by the column, so that ldmatrix finds those of 8 columns in
    // 8 different banks, as far as the columns differ modulo 8.
    auto fetch = [&](int r) {
        const int count = min(window, columns - r * window);
        const int chunk = threadIdx.x % (TOKENS / 8), token = first_token + chunk * 8;
        const int bytes = max(0, min(8, tokens - token)) * 2;
        const uint16_t* from = x + int64_t(r) * window * x_stride + (bytes ? token : 0);
#pragma unroll 4
        for (int column = threadIdx.x / (TOKENS / 8); column < count; column += THREADS / (TOKENS / 8))
            copy_async(shared_address(run_of(r) + column * TOKENS * 2 + ((chunk ^ (column & 7)) << 4)),
                       from + int64_t(column) * x_stride, bytes);
    };

    // The same by bulk copies, one for each column: they leave a warp one by one, so each warp issues a few.
    auto bring = [&](int r) {
        const uint32_t mbarrier = shared_address(&arrived[r % 2]);
        const int count = min(window, columns - r * window), bytes = existing * 2;
        const uint16_t* from = x + int64_t(r) * window * x_stride + first_token;
        if (threadIdx.x == 0) arrive_expecting(mbarrier, count * bytes);
#pragma unroll 1
        for (int column = lane * WARPS + warp; column < count; column += THREADS)
            copy_in_bulk(shared_address(run_of(r) + column * RUN_PITCH), from + int64_t(column) * x_stride, bytes, mbarrier);
    };

    constexpr int BLOCKS = WARP_ROWS / 16, N_BLOCKS = S::WARP_TOKENS / 8;
    struct Weights {
        uint4 values[BLOCKS];
        uint32_t metadata[BLOCKS / 2];
        int column;
    };
    const int64_t first_step = int64_t(tile) * (kept / 32);
    const uint4* v = reinterpret_cast<const uint4*>(values) + (first_step * (vector_size / 16) + row_of_tile / 16) * LANES + lane;
    const uint32_t* e = metadata + (first_step * (vector_size / 32) + row_of_tile / 32) * LANES + lane;
    const uint16_t* own_columns = vector_index + first_step * 32 + lane;
    // Those of the step after the one that was loaded last.
    auto load = [&](Weights& w) {
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) w.values[i] = __ldg(v + i * LANES);
#pragma unroll
        for (int i = 0; i < BLOCKS / 2; ++i) w.metadata[i] = __ldg(e + i * LANES);
        w.column = __ldg(own_columns);
        v += vector_size / 16 * LANES, e += vector_size / 32 * LANES, own_columns += 32;
    };
    float sums[BLOCKS][N_BLOCKS][4] = {};
    auto multiply = [&](const Weights& w, int r) {
        const int column = w.column - r * window;
        const uint32_t row = shared_address(run_of(r) + column * RUN_PITCH);
#pragma unroll
        for (int n = 0; n < N_BLOCKS; ++n) {
            uint32_t b[4];
            // Bulk copies fill up with nothing: tokens that do not exist are others, in whole copies of 16 bytes, and
            // not written.
            const int chunk = warp_token / 8 + n, place = HOPPER ? min(chunk, existing / 8 - 1) : chunk ^ (column & 7);
            load_matrices_transposed(b, row + (place << 4));
#pragma unroll
            for (int i = 0; i < BLOCKS; i += 2) {
                Type::template multiply<0>(sums[i][n], w.values[i], b, w.metadata[i / 2]);
                Type::template multiply<1>(sums[i + 1][n], w.values[i + 1], b, w.metadata[i / 2]);
            }
        }
    };

    if constexpr (HOPPER) {
        if (threadIdx.x < 2) {
            init_mbarrier(shared_address(&arrived[threadIdx.x]), 1);
            publish_mbarriers();
        }
        __syncthreads();
        bring(0);
    } else {
        fetch(0);
        commit_copies();
    }
    const int steps = ((runs - 1) * kept_of_window + kept_of_last) / 32;
    // The next weights are on their way while others are multiplied, the first before their run is there. They come into
    // registers that are free: to move them would be to wait. And no others are on their way then, for a warp that waits
    // for some waits for all.
    Weights even, odd;
    if (active && steps > 0) load(even);
    for (int r = 0, step = 0; r < runs; ++r) {
        if constexpr (HOPPER) wait_for(shared_address(&arrived[r % 2]), r / 2 & 1);
        else wait_copies<0>();
        __syncthreads();  // run r is there for all warps, and all are done with the one before
        if (r + 1 < runs) {
            if constexpr (HOPPER) bring(r + 1);
            else fetch(r + 1), commit_copies();
        }
        auto take = [&](const Weights& w, Weights& next) {
            if (step + 1 < steps) load(next);
            multiply(w, r);
        };
        const int end = !active ? 0 : r + 1 < runs ? (r + 1) * kept_of_window / 32 : steps;
        for (; step < end; ++step) {
            if (step % 2) take(odd, even);
            else take(even, odd);
        }
    }

    // Through shared memory, so that a warp writes 128 contiguous bytes, and the activation stands here once.
    float* block = reinterpret_cast<float*>(memory);  // [OUT_ROWS, OUT_PITCH]
    const int token = threadIdx.x % (TOKENS / 2) * 2, left = tokens - first_token - token;
    const bool whole = left > 1 && out_stride % 2 == 0 && reinterpret_cast<uint64_t>(out) % 4 == 0;
#pragma unroll 1
    for (int first = 0; first < ROWS; first += OUT_ROWS) {
        __syncthreads();
        if (warp_row / OUT_ROWS * OUT_ROWS == first) {
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
                for (int n = 0; n < N_BLOCKS; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        *reinterpret_cast<float2*>(block + (warp_row - first + 16 * i + 8 * half + g) * S::OUT_PITCH +
                                                   warp_token + 8 * n + 2 * t) =
                            make_float2(sums[i][n][2 * half], sums[i][n][2 * half + 1]);
        }
        __syncthreads();
        by_cost(activation, [&](auto cheap) {
            constexpr bool CHEAP = decltype(cheap)::value;
            constexpr int AT_ONCE = THREADS / (TOKENS / 2), UNROLLED = CHEAP ? 4 : 1;
#pragma unroll UNROLLED
            for (int part = 0; part < OUT_ROWS / AT_ONCE; ++part) {
                const int line = threadIdx.x / (TOKENS / 2) + part * AT_ONCE, packed_row = first_row + first + line;
                const int row = packed_row < packed_rows ? __ldg(rows + packed_row) : -1;
                if (row < 0 || left <= 0) continue;
                const float2 sum = *reinterpret_cast<const float2*>(block + line * S::OUT_PITCH + token);
                const float shift = bias ? Type::widen(bias[row]) : 0.0f;
                const uint32_t pair = Type::narrow(activate<CHEAP>(sum.x + shift, activation),
                                                   activate<CHEAP>(sum.y + shift, activation));
                uint16_t* to = out + int64_t(row) * out_stride + first_token + token;
                if (whole) {
                    *reinterpret_cast<uint32_t*>(to) = pair;
                } else {
                    to[0] = uint16_t(pair);
                    if (left > 1) to[1] = uint16_t(pair >> 16);
                }
            }
        });
    }
}

#define WINDOWED_ENTRY(SUFFIX, TYPE, WARP_ROWS, TOKENS)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(SUFFIX)(                                              \
        const uint16_t* x,        /* 16 bit  [columns, tokens], rows x_stride apart, a multiple of 8, */              \
                                  /*         which tokens is too for bulk copies */                                   \
        const uint16_t* values,   /* 16 bit  fragments, see hinm.cuh */                                               \
        const uint32_t* metadata, /* uint32  fragments */                                                             \
        const uint16_t* vector_index, /* uint16  [tiles, kept] */                                                     \
        const int* rows,          /* int32   [packed_rows = tiles * vector_size] */                                   \
        const uint16_t* bias,     /* 16 bit  [output rows], or null */                                                \
        uint16_t* out,            /* 16 bit  [output rows, tokens], rows out_stride apart */                          \
        int tokens, int packed_rows, int columns, int x_stride, int out_stride, int vector_size, int kept, int window,\
        int held,                 /* columns that shared memory has room for: see the manifest */                     \
        int kept_of_window,       /* of the kept vectors, those of each run but the last, a multiple of 32 */         \
        int kept_of_last, int activation) {                                                                           \
        windowed<TYPE, WARP_ROWS, TOKENS>(x, values, metadata, vector_index, rows, bias, out, tokens, packed_rows,    \
                                          columns, x_stride, out_stride, vector_size, kept, window, kept_of_window,   \
                                          kept_of_last, activation);                                                  \
    }

// Tiles of 32 rows have warps of their own; 64 tokens where 128 would not fit into shared memory, or fill a GPU: there
// blocks have few others to share with.
#if __CUDA_ARCH__ >= 900
#define ENTRY(SUFFIX) windowed_bulk_##SUFFIX
#define WINDOWED_64_TOKENS(SUFFIX, TYPE, WARP_ROWS)
#else
#define ENTRY(SUFFIX) windowed_##SUFFIX
#define WINDOWED_64_TOKENS(SUFFIX, TYPE, WARP_ROWS) WINDOWED_ENTRY(SUFFIX, TYPE, WARP_ROWS, 64)
#endif
#define WINDOWED(SHORT, TYPE)                     \
    WINDOWED_ENTRY(SHORT##_32_128, TYPE, 32, 128) \
    WINDOWED_ENTRY(SHORT##_64_128, TYPE, 64, 128) \
    WINDOWED_64_TOKENS(SHORT##_32_64, TYPE, 32)   \
    WINDOWED_64_TOKENS(SHORT##_64_64, TYPE, 64)

WINDOWED(f16, Half)
WINDOWED(bf16, Bfloat16)
