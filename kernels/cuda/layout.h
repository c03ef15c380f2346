// Where every number of a tile lies: registers, shared memory, output. Host and device: the tests compile it with g++.
//
// A tile of the output is BM x BN; two consumer warpgroups of 128 threads share it. One step contracts 128 columns of
// A and B, a row of which is 128 bytes: exactly one row of TMA's 128-byte swizzle.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define MEXT_BOTH __host__ __device__ __forceinline__
#else
#define MEXT_BOTH inline
#endif

namespace mext {

constexpr int kBlock = 128;       // numbers per scale, and columns contracted per step
constexpr int kRowBytes = 128;    // a row of A or B in shared memory
constexpr int kConsumers = 2;     // warpgroups that multiply
constexpr int kThreads = 128 * (kConsumers + 1);

MEXT_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How a tile is cut between the two consumers, and how deep the pipeline is.
//
//   kSub      64-row products that one warpgroup keeps: 1 or 2
//   kWidth    columns of one product: 64 or 128
//   kSplitN   whether the warpgroups sit side by side along N (few rows) instead of one below the other
//   kCluster  blocks that work on neighbouring tiles along N and share each row of A they load
//   kStages   steps that can be in flight
template <int kSub_, int kWidth_, bool kSplitN_, int kCluster_, int kStages_>
struct Tile {
    static constexpr int kSub = kSub_, kWidth = kWidth_, kCluster = kCluster_, kStages = kStages_;
    static constexpr bool kSplitN = kSplitN_;
    static constexpr int kM = 64 * kSub * (kSplitN ? 1 : kConsumers);
    static constexpr int kN = kWidth * (kSplitN ? kConsumers : 1);
    static constexpr int kRegisters = kWidth / 2;  // accumulators of one product in one thread
    // One product in flight while another is scaled and added, where registers allow two sets of accumulators.
    static constexpr bool kTwoInFlight = kSub == 1;
    static_assert(kN == kBlock, "one 128x128 scale block per tile along N");
    static_assert(kM <= 256, "a TMA box has at most 256 rows");
};

using Large = Tile<2, 128, false, 1, 4>;        // 256x128: least traffic from L2, 128 + 64 accumulators
using LargePair = Tile<2, 128, false, 2, 4>;    // the same, two blocks sharing A
using Medium = Tile<1, 128, false, 1, 6>;       // 128x128: 64 + 2x64 accumulators
using MediumPair = Tile<1, 128, false, 2, 6>;
using Small = Tile<1, 64, true, 1, 8>;          // 64x128: few rows, deep pipeline

// Shared memory of a block: stages of A, stages of B, stages of scales, barriers. A and B begin at multiples of 1024
// bytes (the period of the swizzle), scales at multiples of 128 (TMA).
template <class T, bool kColumnScales>
struct Shared {
    static constexpr int kABytes = T::kM * kRowBytes;
    static constexpr int kBBytes = T::kN * kRowBytes;
    static constexpr int kAScaleBytes = T::kM * 4;
    static constexpr int kBScaleBytes = kColumnScales ? T::kN * 4 : 0;
    static constexpr int kA = 0;
    static constexpr int kB = kA + T::kStages * kABytes;
    static constexpr int kAScale = kB + T::kStages * kBBytes;
    static constexpr int kBScale = kAScale + T::kStages * kAScaleBytes;
    static constexpr int kFull = kBScale + T::kStages * kBScaleBytes;
    static constexpr int kEmpty = kFull + T::kStages * 8;
    static constexpr int kBytes = kEmpty + T::kStages * 8;
    static constexpr int kStepBytes = kABytes + kBBytes + kAScaleBytes + kBScaleBytes;  // what one step's TMA brings
    static_assert(kABytes % 1024 == 0 && kBBytes % 1024 == 0 && kAScaleBytes % 128 == 0, "swizzle and TMA alignment");
    static_assert(kBytes <= 227 * 1024, "shared memory of a block on sm_90");
};

// Byte of column `column` (0..127) of row `row` in a 128-byte-swizzled tile: 16-byte units of a row are permuted by the
// row's number in its group of 8. TMA writes so and wgmma reads so.
MEXT_BOTH constexpr int swizzled(int row, int column) {
    return row * kRowBytes + ((((column >> 4) ^ (row & 7)) << 4) | (column & 15));
}

// Descriptor of a K-major operand in a swizzled tile at shared address `address` (PTX ISA, "Matrix descriptor format"):
// bits 0-13 address / 16, 16-29 leading offset / 16 (unused when swizzled along K), 32-45 offset between groups of 8
// rows / 16, 62-63 the swizzle (1 = 128 bytes). Tiles begin at multiples of 1024, so the base offset (49-51) is 0, and
// 32 columns further is 32 bytes further.
MEXT_BOTH constexpr uint64_t descriptor(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | (uint64_t(1) << 16) | (uint64_t(8 * kRowBytes >> 4) << 32) |
           (uint64_t(1) << 62);
}

// Row (of 64) and column of accumulator `i` of thread `thread` (of 128) in an m64nN product.
MEXT_BOTH constexpr int accumulator_row(int thread, int i) {
    return 16 * (thread / 32) + (thread % 32) / 4 + 8 * ((i >> 1) & 1);
}
MEXT_BOTH constexpr int accumulator_column(int thread, int i) { return 8 * (i >> 2) + 2 * (thread % 4) + (i & 1); }

// After lanes 2i and 2i+1 have swapped halves (gemm.cuh, `store`), a thread holds four neighbouring columns of one of
// two 8-column blocks `pair`, `pair + 1`; this is the first of them.
MEXT_BOTH constexpr int quad_column(int lane, int pair) { return 8 * (pair + (lane & 1)) + 4 * ((lane >> 1) & 1); }

}  // namespace mext
