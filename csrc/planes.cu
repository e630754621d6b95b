// The image of a convolution, written once for each column of its kernel: padded, and shifted by that column.
//
// out is [batch, kernel_width, phases, channels, plane_height, pitch]: row y of plane (s, phase) holds, from its start
// on, the pixels x[y * stride_height + phase - padding_height][w * stride_width + s * dilation_width - padding_width]
// for w = 0, 1, .... What one weight of the kernel multiplies is then a run of whole rows, aligned to 16 bytes, and
// gather.cu reads it as any other row. kernel_height times smaller than im2col.
#include "hinm.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) planes(
    const uint16_t* __restrict__ x,  // 16 bit  [batch, channels, height, width], contiguous
    uint16_t* __restrict__ out,      // 16 bit  as above, contiguous, 16-byte aligned; pitch is a multiple of 8
    int chunks,                      // of 8 numbers in one image of out
    int batch, int channels, int height, int width, int phases, int plane_height, int pitch, int stride_height,
    int stride_width, int padding_height, int padding_width, int dilation_width) {
    const int chunk = blockIdx.x * THREADS + threadIdx.x;
    if (chunk >= chunks) return;
    x += int64_t(blockIdx.y) * channels * height * width;
    out += int64_t(blockIdx.y) * chunks * 8;
    const int w = chunk % (pitch / 8) * 8;
    int rest = chunk / (pitch / 8);
    const int y = rest % plane_height * stride_height - padding_height;
    rest /= plane_height;
    const int channel = rest % channels;
    rest /= channels;
    const int row = y + rest % phases, shift = rest / phases * dilation_width - padding_width;
    const uint16_t* line = x + (int64_t(channel) * height + row) * width;
    const bool inside = row >= 0 && row < height;
    uint32_t pairs[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int column = (w + j) * stride_width + shift;
        if (inside && column >= 0 && column < width) pairs[j / 2] |= uint32_t(line[column]) << 16 * (j % 2);
    }
    *reinterpret_cast<uint4*>(out + int64_t(chunk) * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
