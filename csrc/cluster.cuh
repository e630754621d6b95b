// What compute capability 9 brings: clusters of blocks that reach into each other's shared memory. Compiled for any
// other, CLUSTER is 1, and none of this is used.
#pragma once

#include <stdint.h>

#if __CUDA_ARCH__ >= 900
constexpr int CLUSTER = 4;
#else
constexpr int CLUSTER = 1;
#endif

__device__ __forceinline__ int rank_in_cluster() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of the cluster arrive, go on, and wait later: nobody passes before all have arrived.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// To the same place in the shared memory of the block of that rank, which must have begun and must not have ended.
__device__ __forceinline__ void store_at(uint32_t shared, int rank, float value) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}
