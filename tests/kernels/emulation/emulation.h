// The names of kernels/cuda/sm90.cuh for a CPU: the same kernel bodies run here, thread by thread, with the order of
// everything that hardware leaves open drawn at random and what is not yet there poisoned. See emulation.cpp.
#pragma once
#include <cstring>

#define MEXT_DEVICE inline
#define MEXT_KERNEL(name) extern "C" void name
#define MEXT_PAIR_KERNEL(name) extern "C" void name
#define MEXT_MAP const mext::TensorMap&
#define MEXT_PROBLEM const mext::Problem&

struct float2 {
    float x, y;
};

namespace mext {

int thread_index();
int block_index();
int block_count();
int cluster_rank();
uint32_t dynamic_shared();
void block_sync();
void warp_sync();
void cluster_sync();
float from_neighbour(float value);
void barrier_init(uint32_t barrier, int arrivals);
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_arrive(uint32_t barrier);
void barrier_arrive_at(uint32_t barrier, int rank);
void barrier_wait(uint32_t barrier, uint32_t parity);
void copy_2d(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y);
void copy_3d(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y, int z);
void copy_2d_to_pair(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y);
void multiply_begin();
void multiply_commit();
void multiply_wait(int in_flight);
void multiply(float* d, int registers, uint64_t a, uint64_t b, bool add);
float load_shared(uint32_t address);

inline int uniform(int value) { return value; }
inline void barrier_init_done() {}
inline void prefetch(const TensorMap&) {}
template <int kCount>
void take_registers() {}
template <int kCount>
void give_registers() {}
template <int kCount>
void pin(float (&)[kCount]) {}
template <int kInFlight>
void multiply_wait() {
    multiply_wait(kInFlight);
}
template <int kCount>
void multiply(float (&d)[kCount], uint64_t a, uint64_t b, bool add) {
    multiply(d, kCount, a, b, add);
}

inline float2 load_shared_2(uint32_t address) { return {load_shared(address), load_shared(address + 4)}; }
inline float load_constant(const float* p) { return *p; }

inline uint16_t bf16(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void store_1(float* p, float v) { *p = v; }
inline void store_1(uint16_t* p, float v) { *p = bf16(v); }
inline void add_1(float* p, float v) { *p += v; }
void aligned(const void* p, int bytes);
template <class Number>
void store_4(Number* p, const float (&v)[4]) {
    aligned(p, 4 * sizeof(Number));
    for (int i = 0; i < 4; ++i) store_1(p + i, v[i]);
}
inline void add_4(float* p, const float (&v)[4]) {
    aligned(p, 16);
    for (int i = 0; i < 4; ++i) add_1(p + i, v[i]);
}

}  // namespace mext
