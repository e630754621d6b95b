// What the kernels share: the few PTX instructions they are built from, the two dtypes, and the epilogue.
//
// Every 16-bit tensor is uint16_t here; only Half and Bfloat16 know what its bits mean.
//
// A packed weight reaches every kernel in the order of the mma.sp fragments (PTX ISA, "Matrix fragments for
// mma.m16n8k32 with .f16/.bf16 types" and "Sparse matrix storage"), lane by lane:
//   values    16 bit  [tiles, K / 32, V / 16, 32 lanes, 8]   a0..a7 of each lane
//   metadata  uint32  [tiles, K / 32, V / 32, 32 lanes]      lanes with t = 0, 1 hold the even block of 16 rows
//                                                            (selector 0), lanes with t = 2, 3 the odd one (selector 1)
//   vector_index     uint16  [tiles, K]                             column of the input that each kept vector multiplies
//   rows      int32   [tiles * V]                            output row of each packed row, -1: a virtual row
// K is the number of kept vectors of a tile, each run of columns padded to a multiple of 32 and all to a multiple of
// 64; padding has zero values and points at a column of its own run.
#pragma once

#include <stdint.h>

constexpr int LANES = 32;

enum Activation : int { NONE = 0, RELU = 1, GELU = 2, GELU_TANH = 3, SILU = 4 };

// ---------------------------------------------------------------- the two dtypes

#define MMA_SP(TYPE, SELECTOR)                                                                                        \
    asm volatile("mma.sp.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 "                                    \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, " SELECTOR ";"       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata))

struct Half {
    // d += a @ b for 16 rows, 8 tokens and 32 kept vectors; BLOCK is the parity of the block of 16 rows.
    template <int BLOCK>
    static __device__ __forceinline__ void multiply(float (&d)[4], uint4 a, const uint32_t (&b)[4], uint32_t metadata) {
        if constexpr (BLOCK == 0) MMA_SP("f16", "0x0");
        else MMA_SP("f16", "0x1");
    }
    static __device__ __forceinline__ float widen(uint16_t bits) {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
        return wide;
    }
    static __device__ __forceinline__ uint32_t narrow(float low, float high) {
        uint32_t pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};

struct Bfloat16 {
    template <int BLOCK>
    static __device__ __forceinline__ void multiply(float (&d)[4], uint4 a, const uint32_t (&b)[4], uint32_t metadata) {
        if constexpr (BLOCK == 0) MMA_SP("bf16", "0x0");
        else MMA_SP("bf16", "0x1");
    }
    static __device__ __forceinline__ float widen(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
    static __device__ __forceinline__ uint32_t narrow(float low, float high) {
        uint32_t pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};

// ---------------------------------------------------------------- memory

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, global to shared, without a register; only the first `bytes` are read, the rest is zero.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's committed groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers, transposed; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared)
                 : "memory");
}

// Weights are read once by the whole GPU: they need no place in L1.
__device__ __forceinline__ uint4 stream(const uint4* global) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}
__device__ __forceinline__ uint32_t stream(const uint32_t* global) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(global));
    return v;
}

// ---------------------------------------------------------------- epilogue

__device__ __forceinline__ float activate(float x, int activation) {
    switch (activation) {
        case RELU: return x < 0.0f ? 0.0f : x;  // so that a NaN stays one
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
        case GELU_TANH: {
            // 0.5 x (1 + tanh u) = x sigmoid(2 u)
            const float u = 0.79788456f * x * (1.0f + 0.044715f * x * x);
            return x / (1.0f + __expf(-2.0f * u));
        }
        case SILU: return x / (1.0f + __expf(-x));
        default: return x;
    }
}

// Calls write(TrueType) or write(FalseType): for activations of an instruction or two, a loop may be unrolled; the
// others stand in the text once.
struct TrueType {
    static constexpr bool value = true;
};
struct FalseType {
    static constexpr bool value = false;
};
template <typename Write>
__device__ __forceinline__ void by_cost(int activation, Write write) {
    if (activation <= RELU) write(TrueType{});
    else write(FalseType{});
}
template <bool CHEAP>
__device__ __forceinline__ float activate(float x, int activation) {
    if constexpr (CHEAP) return activation == RELU && x < 0.0f ? 0.0f : x;
    else return activate(x, activation);
}
