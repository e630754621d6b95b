// The dense weight of a packed one, for a dense product where that is faster than any kernel: the pruned numbers are 0.
//
// One CTA writes 16 packed rows of up to COLUMNS columns: it clears them in shared memory, its warps share the kept
// vectors out among themselves and put down those that fall there, and whole rows leave. Numbers that pad the kept
// vectors are +0, which is not put down: they point at a column that another number may have.
#include "hinm.cuh"

constexpr int ROWS = 16;
constexpr int COLUMNS = 1520;  // with ROWS, just below 48 KiB: the most that every GPU gives without being asked
constexpr int PITCH = COLUMNS + 8;  // 4 banks more: rows have the same columns
constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(WARPS* LANES) unpack(
    const uint16_t* __restrict__ values,        // see hinm.cuh
    const uint32_t* __restrict__ metadata,      //
    const uint16_t* __restrict__ vector_index,  //
    const int* __restrict__ rows,               //
    uint16_t* __restrict__ out,                 // 16 bit  [output rows, pitch], 16-byte aligned
    int packed_rows, int vector_size, int kept, int pitch) {
    __shared__ __align__(16) uint16_t dense[ROWS][PITCH];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int blocks_of_tile = vector_size / ROWS, tile = blockIdx.x / blocks_of_tile, block = blockIdx.x % blocks_of_tile;
    const int first_column = blockIdx.y * COLUMNS, steps = kept / 32;

    uint4* const chunks = reinterpret_cast<uint4*>(dense);
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * PITCH / 8; i += WARPS * LANES) chunks[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();

#pragma unroll 2
    for (int step = warp; step < steps; step += WARPS) {
        const int64_t at = int64_t(tile) * steps + step;
        const uint4 a = reinterpret_cast<const uint4*>(values)[(at * blocks_of_tile + block) * LANES + lane];
        // The words of row g (and g + 8) in this block: of its first 16 kept vectors, and of the others.
        const uint2 words = reinterpret_cast<const uint2*>(
            metadata)[(at * (blocks_of_tile / 2) + block / 2) * (LANES / 2) + 2 * g + block % 2];
        const uint16_t* const index = vector_index + at * 32;
        const uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // a pair of row g + 8 (i % 2), of group t of the 16 kept vectors i / 2
            const uint32_t nibble = (i / 2 ? words.y : words.x) >> (16 * (i % 2) + 4 * t) & 15;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint16_t number = pairs[i] >> 16 * j;
                const uint32_t column = index[16 * (i / 2) + 4 * t + (nibble >> 2 * j & 3)] - first_column;
                if (number != 0 && column < COLUMNS) dense[g + 8 * (i % 2)][column] = number;
            }
        }
    }
    __syncthreads();

    const int width = min(COLUMNS, pitch - first_column) / 8;
    for (int i = warp; i < ROWS; i += WARPS) {
        const int row = rows[blockIdx.x * ROWS + i];
        if (row < 0) continue;
        uint4* const to = reinterpret_cast<uint4*>(out + int64_t(row) * pitch + first_column);
        for (int chunk = lane; chunk < width; chunk += LANES) to[chunk] = chunks[i * (PITCH / 8) + chunk];
    }
}
