// out = x^T for 16-bit numbers: the way into feature-major storage, and out of it.
//
// One CTA turns 64 x 64 numbers through shared memory: 16 bytes a lane are read along one axis and written along the
// other. Rows that do not start at 16 bytes are read or written number by number.
#include "hinm.cuh"

constexpr int SIDE = 64;
constexpr int PITCH = SIDE + 2;  // numbers: an odd number of banks, so that 8 lanes a row store without conflicts
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) transpose(
    const uint16_t* __restrict__ x,  // 16 bit  [height, width], rows x_stride apart
    uint16_t* __restrict__ out,      // 16 bit  [width, height], rows out_stride apart
    int height, int width, int x_stride, int out_stride) {
    __shared__ uint16_t square[SIDE][PITCH];
    const int top = blockIdx.y * SIDE, left = blockIdx.x * SIDE;
    const int down = threadIdx.x / (SIDE / 8), along = threadIdx.x % (SIDE / 8) * 8;
    const bool read_whole = x_stride % 8 == 0 && reinterpret_cast<uint64_t>(x) % 16 == 0;
    const bool write_whole = out_stride % 8 == 0 && reinterpret_cast<uint64_t>(out) % 16 == 0;

#pragma unroll
    for (int i = down; i < SIDE; i += THREADS / (SIDE / 8)) {
        const uint16_t* from = x + int64_t(top + i) * x_stride + left + along;
        uint32_t pairs[4] = {};
        if (top + i < height) {
            if (read_whole && left + along + 8 <= width) {
                const uint4 v = *reinterpret_cast<const uint4*>(from);
                pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (left + along + j < width) pairs[j / 2] |= uint32_t(from[j]) << 16 * (j % 2);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) *reinterpret_cast<uint32_t*>(&square[i][along + 2 * j]) = pairs[j];
    }
    __syncthreads();
#pragma unroll
    for (int i = down; i < SIDE; i += THREADS / (SIDE / 8)) {
        if (left + i >= width) continue;
        uint16_t* to = out + int64_t(left + i) * out_stride + top + along;
        if (write_whole && top + along + 8 <= height) {
            uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                pairs[j] = square[along + 2 * j][i] | uint32_t(square[along + 2 * j + 1][i]) << 16;
            *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (top + along + j < height) to[j] = square[along + j][i];
        }
    }
}
