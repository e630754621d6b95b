// What blocks of a cluster share: copies that go to all of them at once, and the mbarriers that say what has arrived.
//
// Each block of a cluster computes other rows for the same tokens, so all want the same input. Compiled for compute
// capability 9, a kernel brings it in once for the whole cluster: each block copies a share of it to the same place in
// the shared memory of all. Compiled for any other, CLUSTER is 1, and none of this is used.
#pragma once

#include <stdint.h>

#if __CUDA_ARCH__ >= 900
// With 2 blocks, L2 would still bind many tokens at 87.5 % sparsity, and decoding; with 4 something else does, and 8
// would leave more of an H100's processing clusters idle: of their 16 or 18 multiprocessors a cluster takes a whole
// multiple, and rows fill whole clusters only.
constexpr int CLUSTER = 4;
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#define ENTRY(KERNEL, SUFFIX) KERNEL##_cluster_##SUFFIX
#else
constexpr int CLUSTER = 1;
#define IN_CLUSTERS
#define ENTRY(KERNEL, SUFFIX) KERNEL##_##SUFFIX
#endif

__device__ __forceinline__ int rank_in_cluster() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of the cluster arrive, go on, and wait later: nobody passes before all have arrived.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// An mbarrier completes a phase when so many threads have arrived, and all bytes that were announced are there.
__device__ __forceinline__ void init_mbarrier(uint32_t mbarrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}
// What this thread initialised can be reached by the cluster, once it has passed its barrier.
__device__ __forceinline__ void publish_mbarriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive_expecting(uint32_t mbarrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}
// The same mbarrier, in the block of that rank.
__device__ __forceinline__ void arrive_at(uint32_t mbarrier, int rank) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(mbarrier), "r"(rank));
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}
// Until the phase of that parity is complete; the first has parity 0.
__device__ __forceinline__ void wait_for(uint32_t mbarrier, int parity) {
    uint32_t complete;
    do {
        asm volatile(
            "{\n\t.reg .pred complete;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, complete;\n\t}"
            : "=r"(complete)
            : "r"(mbarrier), "r"(parity)
            : "memory");
    } while (!complete);
}

// Global to the same place in the shared memory of every block, completing bytes at its own mbarrier. Addresses and
// bytes are multiples of 16.
__device__ __forceinline__ void copy_to_all(uint32_t shared, const void* global, int bytes, uint32_t mbarrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
            shared),
        "l"(global), "r"(bytes), "r"(mbarrier), "h"(uint16_t((1 << CLUSTER) - 1))
        : "memory");
}
