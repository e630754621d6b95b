// y = activate(W x + bias) for many tokens: x is [tokens, columns], or feature-major, y is [tokens, rows].
//
// The columns of a windowed pattern are cut into runs, and no group of kept vectors crosses a run. So a CTA brings in
// one run of columns at a time, whole and coalesced, whatever was kept of it; in shared memory every tile of the CTA
// gathers its own rows as ldmatrix addresses. How much of the input moves does not depend on the height of a tile. A
// pattern without windows is one run: all columns are held at once.
//
// One CTA computes 256 packed rows for TOKENS tokens, with 8 warps. Row-major input passes through two buffers of CHUNK
// columns, and is turned on its way from there to the run; feature-major input comes straight into one of two runs.
// Either way the next columns arrive while a run is multiplied. In a cluster each CTA brings in a share of the rows of a
// buffer or a run, for all of them (cluster.cuh).
#include "cluster.cuh"
#include "hinm.cuh"

constexpr int ROWS = 256;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * LANES;
// Columns of a buffer. In a cluster a window of 256 columns is one, so that what all CTAs wait for is one run ahead.
constexpr int CHUNK = CLUSTER > 1 ? 256 : 128;
// Bulk copies write rows as they come, so in a cluster rows that ldmatrix reads lie 4 banks apart beyond a whole round.
constexpr int PADDING = CLUSTER > 1 ? 16 : 0;  // bytes
constexpr int OUT_TOKENS = 32;  // tokens written at a time: their floats take the place of the buffers
constexpr int OUT_PITCH = ROWS + 4;  // floats between two tokens: a fragment is then stored without bank conflicts

// A warp covers WARP_ROWS rows of one tile, so that one gather serves them all.
template <int WARP_ROWS, int TOKENS>
struct Shape {
    static constexpr int ROW_WARPS = ROWS / WARP_ROWS;
    static constexpr int WARP_TOKENS = TOKENS / (WARPS / ROW_WARPS);
    static constexpr int BUFFER_PITCH = CHUNK * 2 + PADDING, BUFFER = TOKENS * BUFFER_PITCH;  // bytes
    static_assert(OUT_TOKENS * OUT_PITCH * 4 <= 2 * BUFFER + TOKENS * 8 * 2, "the output beside the shortest run");
};

template <typename Type, int WARP_ROWS, int TOKENS, bool FEATURE_MAJOR>
__device__ __forceinline__ void windowed(
    const uint16_t* __restrict__ x, const uint16_t* __restrict__ values, const uint32_t* __restrict__ metadata,
    const uint16_t* __restrict__ vector_index, const int* __restrict__ rows, const uint16_t* __restrict__ bias,
    uint16_t* __restrict__ out, int tokens, int packed_rows, int columns, int x_stride, int out_stride,
    int vector_size, int kept, int window, int kept_of_window, int kept_of_last, int activation) {
    using S = Shape<WARP_ROWS, TOKENS>;
    constexpr bool COPIED = CLUSTER > 1 && FEATURE_MAJOR;  // a run lies as a bulk copy left it
    constexpr int RUN_PITCH = TOKENS * 2 + (COPIED ? PADDING : 0);  // bytes between two columns of a run
    // Row-major: buffers [2, TOKENS, CHUNK], then the run [window, TOKENS]. Feature-major: one or two runs.
    extern __shared__ __align__(256) uint8_t memory[];
    auto run_of = [&](int r) { return memory + (FEATURE_MAJOR ? r % 2 * window * RUN_PITCH : 2 * S::BUFFER); };
    __shared__ uint64_t arrived[2], released[2];  // in a cluster: the mbarriers of each buffer, or of each of two runs

    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int warp_row = warp % S::ROW_WARPS * WARP_ROWS, warp_token = warp / S::ROW_WARPS * S::WARP_TOKENS;
    const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    const bool active = first_row + warp_row < packed_rows;
    const int tile = (first_row + warp_row) / vector_size, row_of_tile = (first_row + warp_row) % vector_size;
    const int runs = (columns + window - 1) / window, chunks_of_run = (window + CHUNK - 1) / CHUNK;
    const int existing = min(TOKENS, tokens - first_token);

    // Chunk c of all runs, row-major: 16 bytes are 8 columns of one token. Chunks of 16 bytes are exchanged by the
    // token, so that ldmatrix finds those of 8 tokens in 8 different banks.
    auto fetch = [&](int c) {
        const int first = c / chunks_of_run * window + c % chunks_of_run * CHUNK;
        const int end = min(min((c / chunks_of_run + 1) * window, columns), first + CHUNK);
        uint8_t* to = memory + c % 2 * S::BUFFER;
#pragma unroll 4
        for (int j = 0; j < TOKENS * CHUNK / 8 / THREADS; ++j) {
            const int i = threadIdx.x + j * THREADS;
            const int token = i / (CHUNK / 8), chunk = i % (CHUNK / 8), column = first + chunk * 8;
            const bool exists = first_token + token < tokens && column < end;
            const uint16_t* from = x + (exists ? int64_t(first_token + token) * x_stride + column : 0);
            const int bytes = exists ? min(8, end - column) * 2 : 0;
            copy_async(shared_address(to + token * S::BUFFER_PITCH + ((chunk ^ (token & 7)) << 4)), from, bytes);
        }
    };
    // Turns chunk c into rows of the run: [column, token], 16 bytes are 8 tokens, exchanged by the column.
    auto transpose = [&](int c) {
        const uint32_t from = shared_address(memory + c % 2 * S::BUFFER);
        const int first = c % chunks_of_run * CHUNK;
        int end = min(window, first + CHUNK);
        if constexpr (CLUSTER > 1) end = min(end, columns - c / chunks_of_run * window);
#pragma unroll 2
        for (int block = 0; block < TOKENS / 32 * (CHUNK / 8) / WARPS; ++block) {
            const int i = warp + block * WARPS;
            const int tokens32 = i / (CHUNK / 8) * 32, chunk = i % (CHUNK / 8), column = first + chunk * 8 + g;
            if (first + chunk * 8 >= end) continue;  // the same for the whole warp
            uint32_t pairs[4];  // of column g: tokens 8 j + 2 t and the next
            // In a cluster nothing fills up with zeros: a token that does not exist is another one, and not written.
            const int token = CLUSTER == 1 ? tokens32 + lane : min(tokens32 + lane, existing - 1);
            const int place = CLUSTER == 1 ? chunk ^ (token & 7) : chunk;
            load_matrices_transposed(pairs, from + token * S::BUFFER_PITCH + (place << 4));
            uint8_t* row = run_of(0) + column * TOKENS * 2 + 4 * t;
            if (column < end) {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    *reinterpret_cast<uint32_t*>(row + (((tokens32 / 8 + j) ^ (column & 7)) << 4)) = pairs[j];
            }
        }
    };

    // Run r, feature-major: 16 bytes are 8 tokens of one column, exchanged by the column as above.
    auto fetch_run = [&](int r) {
        const int count = min(window, columns - r * window);
        const int chunk = threadIdx.x % (TOKENS / 8), token = first_token + chunk * 8;
        const int bytes = max(0, min(8, tokens - token)) * 2;
        const uint16_t* from = x + int64_t(r) * window * x_stride + (bytes ? token : 0);
#pragma unroll 4
        for (int column = threadIdx.x / (TOKENS / 8); column < count; column += THREADS / (TOKENS / 8))
            copy_async(shared_address(run_of(r) + column * TOKENS * 2 + ((chunk ^ (column & 7)) << 4)),
                       from + int64_t(column) * x_stride, bytes);
    };

    // In a cluster: unit u of the input, a chunk or a run, into all CTAs at once, as soon as all are done with the one
    // before the last. Each warp issues a few copies: they leave a warp one by one.
    auto bring = [&](int u) {
        const uint32_t mbarrier = shared_address(&arrived[u % 2]);
        const uint8_t* to;
        const uint16_t* from;
        int lines, bytes;
        if constexpr (FEATURE_MAJOR) {
            to = run_of(u), lines = min(window, columns - u * window), bytes = existing * 2;
            from = x + int64_t(u) * window * x_stride + first_token;
        } else {
            const int run = u / chunks_of_run, first = run * window + u % chunks_of_run * CHUNK;
            to = memory + u % 2 * S::BUFFER, lines = existing;
            bytes = (min(min((run + 1) * window, columns), first + CHUNK) - first) * 2;
            from = x + int64_t(first_token) * x_stride + first;
        }
        if (u >= 2) wait_for(shared_address(&released[u % 2]), u / 2 - 1 & 1);
        if (threadIdx.x == 0) arrive_expecting(mbarrier, lines * bytes);
#pragma unroll 1
        for (int line = rank_in_cluster() + CLUSTER * (lane * WARPS + warp); line < lines; line += CLUSTER * THREADS)
            copy_to_all(shared_address(to + line * (FEATURE_MAJOR ? RUN_PITCH : S::BUFFER_PITCH)),
                        from + int64_t(line) * x_stride, bytes, mbarrier);
    };

    constexpr int BLOCKS = WARP_ROWS / 16, N_BLOCKS = S::WARP_TOKENS / 8;
    struct Weights {
        uint4 values[BLOCKS];
        uint32_t metadata[BLOCKS / 2];
        int column;
    };
    auto load = [&](int step) {
        Weights w;
        const int64_t at = int64_t(tile) * (kept / 32) + step;
        const uint4* v = reinterpret_cast<const uint4*>(values) + (at * (vector_size / 16) + row_of_tile / 16) * LANES + lane;
        const uint32_t* e = metadata + (at * (vector_size / 32) + row_of_tile / 32) * LANES + lane;
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) w.values[i] = __ldg(v + i * LANES);
#pragma unroll
        for (int i = 0; i < BLOCKS / 2; ++i) w.metadata[i] = __ldg(e + i * LANES);
        w.column = __ldg(vector_index + at * 32 + lane);
        return w;
    };
    float sums[BLOCKS][N_BLOCKS][4] = {};
    auto multiply = [&](const Weights& w, int r) {
        const int column = w.column - r * window;
        const uint32_t row = shared_address(run_of(r) + column * RUN_PITCH);
#pragma unroll
        for (int n = 0; n < N_BLOCKS; ++n) {
            uint32_t b[4];
            const int chunk = warp_token / 8 + n;  // tokens that do not exist: as above, in whole copies of 16 bytes
            const int place = COPIED ? min(chunk, existing / 8 - 1) : chunk ^ (column & 7);
            load_matrices_transposed(b, row + (place << 4));
#pragma unroll
            for (int i = 0; i < BLOCKS; i += 2) {
                Type::template multiply<0>(sums[i][n], w.values[i], b, w.metadata[i / 2]);
                Type::template multiply<1>(sums[i + 1][n], w.values[i + 1], b, w.metadata[i / 2]);
            }
        }
    };

    int chunks = runs * chunks_of_run;
    if constexpr (CLUSTER > 1) {
        chunks -= chunks_of_run - (columns - (runs - 1) * window + CHUNK - 1) / CHUNK;  // the last run may lack some
        if (threadIdx.x < 2) {
            init_mbarrier(shared_address(&arrived[threadIdx.x]), 1);
            init_mbarrier(shared_address(&released[threadIdx.x]), FEATURE_MAJOR ? CLUSTER * WARPS : CLUSTER);
            publish_mbarriers();
        }
        arrive_at_cluster();
        wait_for_cluster();  // all mbarriers are there, and all CTAs
        bring(0);
    } else if constexpr (FEATURE_MAJOR) {
        fetch_run(0);
        commit_copies();
    } else {
        fetch(0);
        commit_copies();
        if (chunks > 1) fetch(1);
        commit_copies();
    }
    const int steps = ((runs - 1) * kept_of_window + kept_of_last) / 32;
    Weights next{};
    if (active) next = load(0);  // like those of every other run, on their way before the run is there
    for (int r = 0, step = 0; r < runs; ++r) {
        if constexpr (CLUSTER > 1 && FEATURE_MAJOR) {
            if (r + 1 < runs) bring(r + 1);
            wait_for(shared_address(&arrived[r % 2]), r / 2 & 1);
        } else if constexpr (CLUSTER > 1) {
            for (int c = r * chunks_of_run; c < min((r + 1) * chunks_of_run, chunks); ++c) {
                if (c + 1 < chunks) bring(c + 1);
                wait_for(shared_address(&arrived[c % 2]), c / 2 & 1);
                __syncthreads();  // all are done with the run before
                transpose(c);
                __syncthreads();
                if (c + 2 < chunks && threadIdx.x < CLUSTER) arrive_at(shared_address(&released[c % 2]), threadIdx.x);
            }
        } else if constexpr (FEATURE_MAJOR) {
            wait_copies<0>();
            __syncthreads();  // run r is there for all warps, and all are done with the one before
            if (r + 1 < runs) fetch_run(r + 1);
            commit_copies();
        } else {
            for (int c = r * chunks_of_run; c < (r + 1) * chunks_of_run; ++c) {
                wait_copies<1>();
                __syncthreads();  // chunk c is there for all warps, and all are done with the run before
                transpose(c);
                __syncthreads();  // its buffer is free
                if (c + 2 < chunks) fetch(c + 2);
                commit_copies();
            }
        }
        if (CLUSTER == 1 && !active) continue;
        const int end = !active ? 0 : r + 1 < runs ? (r + 1) * kept_of_window / 32 : steps;
        while (step < end) {
            const Weights now = next;
            if (++step < steps) next = load(step);
            multiply(now, r);
        }
        if constexpr (COPIED) {
            __syncwarp();  // this warp is done with the run, which every CTA has to know
            if (r + 2 < runs && lane < CLUSTER) arrive_at(shared_address(&released[r % 2]), lane);
        }
    }
    if constexpr (CLUSTER > 1) arrive_at_cluster();

    // Through shared memory, so that a warp writes contiguous bytes, and the activation stands here once.
    float* block = reinterpret_cast<float*>(memory);  // [OUT_TOKENS, OUT_PITCH]
    const int column = threadIdx.x % (ROWS / 2) * 2;
    const bool exists = first_row + column < packed_rows;
    const int2 to = exists ? *reinterpret_cast<const int2*>(rows + first_row + column) : make_int2(-1, -1);
    const float shift_x = bias && to.x >= 0 ? Type::widen(bias[to.x]) : 0.0f;
    const float shift_y = bias && to.y >= 0 ? Type::widen(bias[to.y]) : 0.0f;
    // In tile order every pair of rows is one of outputs; of restored rows only a few are.
    const bool whole = out_stride % 2 == 0 && reinterpret_cast<uint64_t>(out) % 4 == 0;
    const bool pair_of_outputs = to.x >= 0 && to.x % 2 == 0 && to.y == to.x + 1 && whole;
#pragma unroll 1
    for (int pass = 0; pass < TOKENS / OUT_TOKENS; ++pass) {
        __syncthreads();
#pragma unroll
        for (int n = 0; n < N_BLOCKS; ++n) {
            const int token = warp_token + 8 * n - pass * OUT_TOKENS;
            if (token < 0 || token >= OUT_TOKENS) continue;
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    block[(token + 2 * t + (j & 1)) * OUT_PITCH + warp_row + 16 * i + g + 8 * (j >> 1)] = sums[i][n][j];
        }
        __syncthreads();
        by_cost(activation, [&](auto cheap) {
            constexpr bool CHEAP = decltype(cheap)::value;
            constexpr int AT_ONCE = THREADS / (ROWS / 2), UNROLLED = CHEAP ? 4 : 1;
#pragma unroll UNROLLED
            for (int part = 0; part < OUT_TOKENS / AT_ONCE; ++part) {
                const int line = threadIdx.x / (ROWS / 2) + part * AT_ONCE;
                const int token = first_token + pass * OUT_TOKENS + line;
                const float2 sum = *reinterpret_cast<const float2*>(block + line * OUT_PITCH + column);
                const uint32_t pair = Type::narrow(activate<CHEAP>(sum.x + shift_x, activation),
                                                   activate<CHEAP>(sum.y + shift_y, activation));
                if (token >= tokens) continue;
                uint16_t* outputs = out + int64_t(token) * out_stride;
                if (pair_of_outputs) {
                    *reinterpret_cast<uint32_t*>(outputs + to.x) = pair;
                    continue;
                }
                if (to.x >= 0) outputs[to.x] = uint16_t(pair);
                if (to.y >= 0) outputs[to.y] = uint16_t(pair >> 16);
            }
        });
    }
    if constexpr (CLUSTER > 1) wait_for_cluster();  // no copy of this CTA is on its way to another any more
}

#define WINDOWED_ENTRY(SUFFIX, TYPE, WARP_ROWS, TOKENS, FEATURE_MAJOR)                                                \
    extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS) ENTRY(windowed, SUFFIX)(                        \
        const uint16_t* x,        /* 16 bit  [tokens, columns], rows x_stride apart, both multiples of 8; or */       \
                                  /*         feature-major: [columns, tokens], rows x_stride apart, a multiple of 8,*/\
                                  /*         which tokens is too in clusters */                                       \
        const uint16_t* values,   /* 16 bit  fragments, see hinm.cuh */                                               \
        const uint32_t* metadata, /* uint32  fragments */                                                             \
        const uint16_t* vector_index, /* uint16  [tiles, kept] */                                                     \
        const int* rows,          /* int32   [packed_rows = tiles * vector_size] */                                   \
        const uint16_t* bias,     /* 16 bit  [output rows], or null */                                                \
        uint16_t* out,            /* 16 bit  [tokens, output rows], rows out_stride apart */                          \
        int tokens, int packed_rows, int columns, int x_stride, int out_stride, int vector_size, int kept, int window,\
        int held,                 /* columns that shared memory has room for: see the manifest */                     \
        int kept_of_window,       /* of the kept vectors, those of each run but the last, a multiple of 32 */         \
        int kept_of_last, int activation) {                                                                           \
        windowed<TYPE, WARP_ROWS, TOKENS, FEATURE_MAJOR>(x, values, metadata, vector_index, rows, bias, out, tokens,  \
                                                         packed_rows, columns, x_stride, out_stride, vector_size, kept,\
                                                         window, kept_of_window, kept_of_last, activation);           \
    }

// Tiles of 32 rows have warps of their own; 64 tokens where 128 would not fit into shared memory, or fill a GPU: there
// blocks have few others to share with.
#if __CUDA_ARCH__ >= 900
#define WINDOWED_64_TOKENS(SUFFIX, TYPE, WARP_ROWS, FEATURE_MAJOR)
#else
#define WINDOWED_64_TOKENS(SUFFIX, TYPE, WARP_ROWS, FEATURE_MAJOR) \
    WINDOWED_ENTRY(SUFFIX, TYPE, WARP_ROWS, 64, FEATURE_MAJOR)
#endif
#define WINDOWED(SHORT, TYPE)                                      \
    WINDOWED_ENTRY(SHORT##_32_128, TYPE, 32, 128, false)           \
    WINDOWED_ENTRY(SHORT##_64_128, TYPE, 64, 128, false)           \
    WINDOWED_64_TOKENS(SHORT##_32_64, TYPE, 32, false)             \
    WINDOWED_64_TOKENS(SHORT##_64_64, TYPE, 64, false)             \
    WINDOWED_ENTRY(SHORT##_32_128_features, TYPE, 32, 128, true)   \
    WINDOWED_ENTRY(SHORT##_64_128_features, TYPE, 64, 128, true)   \
    WINDOWED_64_TOKENS(SHORT##_32_64_features, TYPE, 32, true)     \
    WINDOWED_64_TOKENS(SHORT##_64_64_features, TYPE, 64, true)

WINDOWED(f16, Half)
WINDOWED(bf16, Bfloat16)
