// The instructions of sm_90a that the kernels are made of, one small function each. No torch, no CUTLASS, no CUDA headers.
//
// Shared memory is addressed by its 32-bit shared-window address throughout. Compiled with
// g++ the same names come from an emulation that the tests bring.
#pragma once
#include "layout.h"

namespace mext {

// CUtensorMap: 128 opaque bytes that the driver fills (cuTensorMapEncodeTiled), handed over as a __grid_constant__.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

}  // namespace mext

#ifndef __CUDACC__
#include "emulation.h"
#else

#define MEXT_DEVICE __device__ __forceinline__
#define MEXT_KERNEL(name) extern "C" __global__ void __launch_bounds__(mext::kThreads, 1) name
#define MEXT_PAIR_KERNEL(name) extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(mext::kThreads, 1) name
#define MEXT_MAP const __grid_constant__ mext::TensorMap
#define MEXT_PROBLEM const __grid_constant__ mext::Problem

namespace mext {

MEXT_DEVICE int thread_index() { return threadIdx.x; }
MEXT_DEVICE int block_index() { return blockIdx.x; }
MEXT_DEVICE int block_count() { return gridDim.x; }

MEXT_DEVICE uint32_t dynamic_shared() {
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t address = uint32_t(__cvta_generic_to_shared(memory));
    if (address % 1024) __trap();  // every descriptor would be wrong
    return address;
}

// ---- blocks and clusters

MEXT_DEVICE void block_sync() { __syncthreads(); }

MEXT_DEVICE void warp_sync() { __syncwarp(); }

MEXT_DEVICE int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}

// Of all threads of both blocks. Warps must be whole here, and one may come from a branch that a single lane took.
MEXT_DEVICE void cluster_sync() {
    warp_sync();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A value that all lanes of a warp hold, told to the compiler, so that it lives in a uniform register.
MEXT_DEVICE int uniform(int value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

MEXT_DEVICE float from_neighbour(float value) { return __shfl_xor_sync(0xFFFFFFFFu, value, 1); }

// Moves registers between warpgroups; every warp of the warpgroup must come here.
template <int kCount>
MEXT_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
MEXT_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- mbarriers: a phase ends when all arrivals came and all announced bytes landed

MEXT_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other block; a sync must follow.
MEXT_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

MEXT_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

MEXT_DEVICE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier at the same place in block `rank` of the cluster. The default semantics: `.release.cluster`
// compiles to a membar of the whole GPU for each arrival, and all that must be done before it are reads of shared memory
// whose results are in registers (or that wgmma was waited for).
MEXT_DEVICE void barrier_arrive_at(uint32_t barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier), "r"(rank)
        : "memory");
}

// Waits for the end of the phase of this parity.
MEXT_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}

// ---- TMA: a box of a tensor to shared memory; `barrier` counts its bytes. What lies outside the tensor reads as zero
// and counts too.

MEXT_DEVICE void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

MEXT_DEVICE void copy_2d(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            target),
        "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}

MEXT_DEVICE void copy_3d(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// The same to every block of the pair: to the same place, counted by the barrier at the same place.
MEXT_DEVICE void copy_2d_to_pair(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(uint16_t(3))
        : "memory");
}

// ---- wgmma: products of a warpgroup, in flight until waited for

MEXT_DEVICE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MEXT_DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kInFlight` commits are unfinished.
template <int kInFlight>
MEXT_DEVICE void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// Keeps the compiler from moving reads and writes of accumulators across this point.
template <int kCount>
MEXT_DEVICE void pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define MEXT_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MEXT_16(i) MEXT_4(i), MEXT_4(i + 4), MEXT_4(i + 8), MEXT_4(i + 12)

// [64, 32] x [64, 32]^T in E4M3, added to `d` (or written there, if not `add`).
MEXT_DEVICE void multiply(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, add, 1, 1;\n}"
        : MEXT_16(0), MEXT_16(16)
        : "l"(a), "l"(b), "r"(int(add)));
}

// [64, 32] x [128, 32]^T in E4M3, added to `d` (or written there, if not `add`).
MEXT_DEVICE void multiply(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
        "%59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1;\n}"
        : MEXT_16(0), MEXT_16(16), MEXT_16(32), MEXT_16(48)
        : "l"(a), "l"(b), "r"(int(add)));
}

#undef MEXT_16
#undef MEXT_4

// ---- loads and stores

MEXT_DEVICE float load_shared(uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
    return x;
}

MEXT_DEVICE float2 load_shared_2(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
    return x;
}

MEXT_DEVICE float load_constant(const float* p) { return __ldg(p); }

MEXT_DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

MEXT_DEVICE void store_4(float* p, const float (&v)[4]) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}
MEXT_DEVICE void store_4(uint16_t* p, const float (&v)[4]) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}
MEXT_DEVICE void store_1(float* p, float v) { *p = v; }
MEXT_DEVICE void store_1(uint16_t* p, float v) { *p = uint16_t(pack_bf16(v, v)); }

// Added by L2: nobody waits for the old numbers. Each is added to once a launch, so the result does not depend on order.
// (Rounded as an ordinary FP32 sum, but subnormal sums, below 1.2e-38, become zero.)
MEXT_DEVICE void add_4(float* p, const float (&v)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                 "f"(v[3])
                 : "memory");
}
MEXT_DEVICE void add_1(float* p, float v) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
}

}  // namespace mext
#endif
