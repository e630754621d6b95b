// What compute capability 9 brings: clusters of blocks that reach into each other's shared memory, and bulk copies with
// the mbarriers that say what has arrived. Compiled for any other, CLUSTER is 1, and none of this is used.
#pragma once

#include <stdint.h>

#if __CUDA_ARCH__ >= 900
constexpr bool HOPPER = true;
constexpr int CLUSTER = 4;
#else
constexpr bool HOPPER = false;
constexpr int CLUSTER = 1;
#endif

// ---------------------------------------------------------------- clusters

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

// ---------------------------------------------------------------- bulk copies

// An mbarrier completes a phase when so many threads have arrived, and all bytes that were announced are there.
__device__ __forceinline__ void init_mbarrier(uint32_t mbarrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}
// What this thread initialised can be reached by copies.
__device__ __forceinline__ void publish_mbarriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive_expecting(uint32_t mbarrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}
// Until the phase of that parity is complete; the first has parity 0.
__device__ __forceinline__ void wait_for(uint32_t mbarrier, int parity) {
    uint32_t complete;
    do {
        asm volatile(
            "{\n\t.reg .pred complete;\n\t"
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 complete, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, complete;\n\t}"
            : "=r"(complete)
            : "r"(mbarrier), "r"(parity)
            : "memory");
    } while (!complete);
}

// Global to shared memory, completing bytes at the mbarrier. Addresses and bytes are multiples of 16.
__device__ __forceinline__ void copy_in_bulk(uint32_t shared, const void* global, int bytes, uint32_t mbarrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(mbarrier)
                 : "memory");
}
