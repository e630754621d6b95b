// y = activate(W x + bias) on feature-major storage: x is [columns, tokens], y is [rows, tokens].
//
// One CTA computes one tile for TOKENS tokens. Each kept vector multiplies one column of the input, which is a row of
// this storage: contiguous, wherever it lies, so that the gather is 16-byte asynchronous copies, as of any matrix. The
// output row of each packed row is free for the same reason.
//
// A convolution reads the same way. An image [channels, height, width] is feature-major already; for kernels wider
// than one pixel, planes.cu wrote it `kernel_width` times, shifted and padded, so that the input of one weight is a
// contiguous run at a computed offset. Neither needs im2col.
#include "hinm.cuh"

constexpr int TOKENS = 128;
constexpr int DEPTH = 64;  // kept vectors of a stage
constexpr int STAGES = 3;
constexpr int OUT_PITCH = TOKENS + 8;  // of the output tile, in floats: its rows start 8 banks apart

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * LANES;

// Warps cover a tile in blocks of at most 64 rows, and share the tokens.
template <int VECTOR_SIZE>
struct Shape {
    static constexpr int ROWS = VECTOR_SIZE < 64 ? VECTOR_SIZE : 64;
    static constexpr int ROW_WARPS = VECTOR_SIZE / ROWS;
    static constexpr int WARP_TOKENS = TOKENS / (WARPS / ROW_WARPS);
    static constexpr int VALUES = VECTOR_SIZE * DEPTH;  // bytes of a stage: half of the numbers, two bytes each
    static constexpr int METADATA = VECTOR_SIZE / 32 * DEPTH / 32 * LANES * 4;
    static constexpr int INPUT = DEPTH * TOKENS * 2;
    static constexpr int STAGE = INPUT + VALUES + METADATA;
    static_assert(VECTOR_SIZE <= THREADS);
    static_assert(VALUES % (THREADS * 16) == 0 && METADATA <= THREADS * 16, "copied by all threads, and by some");
    static_assert(VECTOR_SIZE * OUT_PITCH * 4 <= STAGES * STAGE, "the output tile takes the place of the stages");
};

template <typename Type, int VECTOR_SIZE>
__device__ __forceinline__ void gather(
    const uint16_t* __restrict__ x, const uint16_t* __restrict__ values, const uint32_t* __restrict__ metadata,
    const uint16_t* __restrict__ vector_index, const int* __restrict__ rows, const uint16_t* __restrict__ bias,
    uint16_t* __restrict__ out, int tokens, int kept, int64_t x_batch, int64_t out_batch, int out_stride, int plane,
    int pitch, int width, int channels, int tiles_of_group, int kernel_height, int kernel_width, int stride_height,
    int dilation_height, int activation) {
    using S = Shape<VECTOR_SIZE>;
    extern __shared__ __align__(128) uint8_t stages[];  // [STAGES, STAGE], then rows, biases and int offsets[kept]
    int* own_rows = reinterpret_cast<int*>(stages + STAGES * S::STAGE);  // [VECTOR_SIZE]
    float* shifts = reinterpret_cast<float*>(own_rows + VECTOR_SIZE);    // [VECTOR_SIZE]
    int* offsets = reinterpret_cast<int*>(shifts + VECTOR_SIZE);

    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int warp_row = warp % S::ROW_WARPS * S::ROWS, warp_token = warp / S::ROW_WARPS * S::WARP_TOKENS;
    const int tile = blockIdx.x, first_token = blockIdx.y * TOKENS;
    x += blockIdx.z * x_batch;
    out += blockIdx.z * out_batch;

    // Where the input of each kept vector starts. Column (channel * kernel_height + r) * kernel_width + s is row
    // r * dilation of the channel, in the planes shifted by s; with a stride, every stride-th row lies in one plane.
    const int phases = min(stride_height, (kernel_height - 1) * dilation_height + 1);
    const int groups = gridDim.x / tiles_of_group;
    const int first_channel = tile / tiles_of_group * (channels / groups);
    for (int k = threadIdx.x; k < kept; k += THREADS) {
        const int column = vector_index[int64_t(tile) * kept + k];
        const int s = column % kernel_width, r = column / kernel_width % kernel_height * dilation_height;
        const int channel = first_channel + column / (kernel_width * kernel_height);
        offsets[k] = ((s * phases + r % stride_height) * channels + channel) * plane + r / stride_height * pitch;
    }
    if (threadIdx.x < VECTOR_SIZE) {
        const int row = rows[tile * VECTOR_SIZE + threadIdx.x];
        own_rows[threadIdx.x] = row;
        shifts[threadIdx.x] = bias && row >= 0 ? Type::widen(bias[row]) : 0.0f;
    }
    __syncthreads();

    // A thread copies the same 8 tokens of several kept vectors. Where these start it knows one step ahead: a copy that
    // had to ask shared memory first would wait for it, and all copies behind it too.
    constexpr int CHUNKS = TOKENS / 8, AT_ONCE = THREADS / CHUNKS, COPIES = DEPTH / AT_ONCE;
    const int chunk = threadIdx.x % CHUNKS, first_k = threadIdx.x / CHUNKS;
    const int token_of_chunk = first_token + chunk * 8, bytes_of_chunk = max(0, min(8, tokens - token_of_chunk)) * 2;
    const uint16_t* x_of_chunk = x + (bytes_of_chunk ? token_of_chunk : 0);
    int starts[COPIES];
    auto look_up = [&](int step) {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) starts[i] = offsets[step * DEPTH + first_k + i * AT_ONCE];
    };
    auto fetch = [&](int stage, int step) {
        uint8_t* to = stages + stage * S::STAGE;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int k = first_k + i * AT_ONCE;
            // Chunks are exchanged by the row, so that ldmatrix finds the 8 rows of a matrix in 8 different banks.
            copy_async(shared_address(to + k * TOKENS * 2 + ((chunk ^ (k & 7)) << 4)), x_of_chunk + starts[i], bytes_of_chunk);
        }
        const int64_t at = int64_t(tile) * (kept / DEPTH) + step;
        const uint8_t* v = reinterpret_cast<const uint8_t*>(values) + at * S::VALUES;
#pragma unroll
        for (int part = 0; part < S::VALUES / (THREADS * 16); ++part) {
            const int i = (threadIdx.x + part * THREADS) * 16;
            copy_async(shared_address(to + S::INPUT + i), v + i, 16);
        }
        const uint8_t* e = reinterpret_cast<const uint8_t*>(metadata) + at * S::METADATA;
        if (const int i = threadIdx.x * 16; i < S::METADATA)
            copy_async(shared_address(to + S::INPUT + S::VALUES + i), e + i, 16);
    };

    constexpr int BLOCKS = S::ROWS / 16, N_BLOCKS = S::WARP_TOKENS / 8;
    float sums[BLOCKS][N_BLOCKS][4] = {};
    struct Half {
        uint4 a[BLOCKS];
        uint32_t e[BLOCKS / 2], b[N_BLOCKS][4];
    };
    // What the warp multiplies of half a stage, 32 kept vectors.
    auto load = [&](int stage, int half) {
        Half loaded;
        const uint8_t* from = stages + stage * S::STAGE;
        const uint4* v = reinterpret_cast<const uint4*>(from + S::INPUT) + (half * (VECTOR_SIZE / 16) + warp_row / 16) * LANES + lane;
        const uint32_t* m = reinterpret_cast<const uint32_t*>(from + S::INPUT + S::VALUES) + (half * (VECTOR_SIZE / 32) + warp_row / 32) * LANES + lane;
        const int k = half * 32 + lane;
        const uint32_t row = shared_address(from + k * TOKENS * 2);
#pragma unroll
        for (int n = 0; n < N_BLOCKS; ++n)
            load_matrices_transposed(loaded.b[n], row + (((warp_token / 8 + n) ^ (k & 7)) << 4));
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) loaded.a[i] = v[i * LANES];
#pragma unroll
        for (int i = 0; i < BLOCKS / 2; ++i) loaded.e[i] = m[i * LANES];
        return loaded;
    };
    auto multiply = [&](const Half& loaded) {
#pragma unroll
        for (int n = 0; n < N_BLOCKS; ++n)
#pragma unroll
            for (int i = 0; i < BLOCKS; i += 2) {
                Type::template multiply<0>(sums[i][n], loaded.a[i], loaded.b[n], loaded.e[i / 2]);
                Type::template multiply<1>(sums[i + 1][n], loaded.a[i + 1], loaded.b[n], loaded.e[i / 2]);
            }
    };

    const int steps = kept / DEPTH;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < steps) look_up(stage), fetch(stage, stage);
        commit_copies();
    }
    if (STAGES - 1 < steps) look_up(STAGES - 1);
    for (int step = 0; step < steps; ++step) {
        wait_copies<STAGES - 2>();
        __syncthreads();  // this step has arrived for all warps, and all are done with the stage that is filled next
        const Half loaded = load(step % STAGES, 0);
        if (step + STAGES - 1 < steps) fetch((step + STAGES - 1) % STAGES, step + STAGES - 1);
        commit_copies();  // an empty group too, so that the count of groups is that of steps
        if (step + STAGES < steps) look_up(step + STAGES);
        multiply(loaded);
#pragma unroll
        for (int half = 1; half < DEPTH / 32; ++half) multiply(load(step % STAGES, half));
    }
    __syncthreads();

    // Through shared memory, so that a warp writes 128 contiguous bytes, and the activation stands here once.
    float* tile_out = reinterpret_cast<float*>(stages);  // [VECTOR_SIZE, OUT_PITCH]
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
        for (int n = 0; n < N_BLOCKS; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<float2*>(
                    tile_out + (warp_row + 16 * i + 8 * half + g) * OUT_PITCH + warp_token + 8 * n + 2 * t) =
                    make_float2(sums[i][n][2 * half], sums[i][n][2 * half + 1]);
    __syncthreads();
    const bool pairs = width == pitch && out_stride % 2 == 0 && reinterpret_cast<uint64_t>(out) % 4 == 0;
    const int token = first_token + threadIdx.x % (TOKENS / 2) * 2;
    if (token >= tokens) return;
    by_cost(activation, [&](auto cheap) {
        constexpr bool CHEAP = decltype(cheap)::value;
        constexpr int AT_ONCE = THREADS / (TOKENS / 2), UNROLLED = CHEAP ? 4 : 1;
#pragma unroll UNROLLED
        for (int part = 0; part < VECTOR_SIZE / AT_ONCE; ++part) {
            const int line = threadIdx.x / (TOKENS / 2) + part * AT_ONCE, row = own_rows[line];
            const float2 sum = *reinterpret_cast<const float2*>(tile_out + line * OUT_PITCH + token - first_token);
            const float shift = shifts[line];
            const uint32_t pair = Type::narrow(activate<CHEAP>(sum.x + shift, activation),
                                               activate<CHEAP>(sum.y + shift, activation));
            uint16_t* to = out + int64_t(row) * out_stride;
            if (row < 0) continue;
            if (pairs && token + 1 < tokens) {
                *reinterpret_cast<uint32_t*>(to + token) = pair;
                continue;
            }
            // Pixels beyond the width of the image are there for alignment alone.
            if (token % pitch < width) to[token / pitch * width + token % pitch] = uint16_t(pair);
            if (token + 1 < tokens && (token + 1) % pitch < width)
                to[(token + 1) / pitch * width + (token + 1) % pitch] = uint16_t(pair >> 16);
        }
    });
}

#define GATHER(NAME, TYPE, VECTOR_SIZE)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(                                                       \
        const uint16_t* x,        /* 16 bit  [batch, planes and channels, plane], 16-byte aligned */                  \
        const uint16_t* values,   /* 16 bit  fragments, see hinm.cuh */                                               \
        const uint32_t* metadata, /* uint32  fragments */                                                             \
        const uint16_t* vector_index,    /* uint16  [tiles, kept] */                                                         \
        const int* rows,          /* int32   [tiles * VECTOR_SIZE] */                                                 \
        const uint16_t* bias,     /* 16 bit  [output rows], or null */                                                \
        uint16_t* out,            /* 16 bit  [batch, output rows, out_stride] */                                      \
        int tokens,               /* of one image: pitch times the height of its output */                            \
        int tiles, int batch, int kept,                                                                               \
        int64_t x_batch,          /* numbers between two images, a multiple of 8 */                                   \
        int64_t out_batch, int out_stride,                                                                            \
        int plane,                /* numbers between two channels, a multiple of 8 */                                 \
        int pitch,                /* tokens between two rows of an image, a multiple of 8 where rows are shifted */   \
        int width,                /* tokens of a row that are written */                                              \
        int channels, int tiles_of_group, int kernel_height, int kernel_width, int stride_height,                     \
        int dilation_height, int activation) {                                                                        \
        gather<TYPE, VECTOR_SIZE>(x, values, metadata, vector_index, rows, bias, out, tokens, kept, x_batch, out_batch,      \
                                  out_stride, plane, pitch, width, channels, tiles_of_group, kernel_height,           \
                                  kernel_width, stride_height, dilation_height, activation);                          \
    }

GATHER(gather_f16_32, Half, 32)
GATHER(gather_f16_64, Half, 64)
GATHER(gather_f16_128, Half, 128)
GATHER(gather_bf16_32, Bfloat16, 32)
GATHER(gather_bf16_64, Bfloat16, 64)
GATHER(gather_bf16_128, Bfloat16, 128)
