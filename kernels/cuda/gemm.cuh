// One block-scaled product for all kernels: A [rows, K] in 1x128 tiles times B [columns, K] transposed, B in 128x128
// blocks (1D2D) or 1x128 tiles (1D1D). DeepSeek-V3, section 3.3.2.
//
// A block is persistent and has three warpgroups. One thread of the last moves data: TMA brings 128 columns of A and B
// and their scales into a ring of stages. The others multiply (wgmma). Tensor cores keep some 14 bits of a sum of FP8
// products, so after every 128 columns a partial sum is scaled and added to FP32 registers: "promotion".
#pragma once
#include "schedule.h"
#include "sm90.cuh"

namespace mext {

// Where a role is in the ring of stages, and the parity of the barrier's phase there.
template <int kStages>
struct Cursor {
    int stage = 0;
    uint32_t parity = 0;
    MEXT_DEVICE void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// ---- the warpgroup that moves data

// One thread: for each step of each tile, wait until the stage was emptied, say how many bytes will come, fetch them.
// In a pair each block fetches half of A for both, so its empty barriers collect the consumers of both.
template <class T, bool kColumnScales, class Walk>
MEXT_DEVICE void produce(const TensorMap& a, const TensorMap& b, const TensorMap& a_scale, const TensorMap& b_scale,
                         const Problem& p, uint32_t shared, int rank) {
    using S = Shared<T, kColumnScales>;
    Walk walk(block_index() / T::kCluster, block_count() / T::kCluster, rank);
    Cursor<T::kStages> at;
    Work work;
    while (walk.next(p, work)) {
        for (int step = work.step; step < work.step + work.steps; ++step, at.advance()) {
            const uint32_t full = shared + S::kFull + at.stage * 8;
            const uint32_t a_target = shared + S::kA + at.stage * S::kABytes;
            // A fresh barrier has, so to speak, just ended the phase of parity 1: the first round does not wait.
            barrier_wait(shared + S::kEmpty + at.stage * 8, at.parity ^ 1);
            barrier_expect(full, S::kStepBytes);
            if constexpr (T::kCluster == 1) {
                copy_2d(a_target, a, full, step * kBlock, work.row);
            } else {
                copy_2d_to_pair(a_target + rank * (S::kABytes / 2), a, full, step * kBlock, work.row + rank * (T::kM / 2));
            }
            const int matrix = kColumnScales ? 0 : work.group;
            copy_3d(shared + S::kB + at.stage * S::kBBytes, b, full, step * kBlock, work.column, matrix);
            copy_2d(shared + S::kAScale + at.stage * S::kAScaleBytes, a_scale, full, work.row, step);
            if constexpr (kColumnScales)
                copy_2d(shared + S::kBScale + at.stage * S::kBScaleBytes, b_scale, full, work.column, step);
        }
    }
}

// ---- the warpgroups that multiply

// What a thread knows of its place. `group` is the warpgroup, 0 or 1; `thread` is within it.
struct Place {
    int group, thread;
};

// Starts the product of 64 rows of a stage into `d`.
template <class T, bool kColumnScales>
MEXT_DEVICE void start(float (&d)[T::kRegisters], uint32_t shared, int stage, int group, int sub) {
    using S = Shared<T, kColumnScales>;
    const int rows = 64 * (T::kSplitN ? sub : group * T::kSub + sub), columns = T::kSplitN ? group * T::kWidth : 0;
    const uint64_t a = descriptor(shared + S::kA + stage * S::kABytes + rows * kRowBytes);
    const uint64_t b = descriptor(shared + S::kB + stage * S::kBBytes + columns * kRowBytes);
    pin(d);
    multiply_begin();
#pragma unroll
    for (int k = 0; k < kBlock / 32; ++k) multiply(d, a + k * (32 >> 4), b + k * (32 >> 4), k > 0);
    multiply_commit();
    pin(d);
}

// Hands a stage back: each warp once, when all its lanes have read it, to every block that writes into it.
template <class T>
MEXT_DEVICE void release(uint32_t empty, Place place) {
    warp_sync();
    const int lane = place.thread % 32;
    if constexpr (T::kCluster == 1) {
        if (lane == 0) barrier_arrive(empty);
    } else {
        if (lane < T::kCluster) barrier_arrive_at(empty, lane);
    }
}

// The scales of the thread's two rows of a 64-row product.
template <class T, bool kColumnScales>
MEXT_DEVICE float2 row_scales(uint32_t shared, int stage, Place place, int sub) {
    using S = Shared<T, kColumnScales>;
    const int row = 64 * (T::kSplitN ? sub : place.group * T::kSub + sub) + accumulator_row(place.thread, 0);
    const uint32_t address = shared + S::kAScale + stage * S::kAScaleBytes + row * 4;
    return {load_shared(address), load_shared(address + 8 * 4)};
}

// sum += row scale * block scale * d
template <int kCount>
MEXT_DEVICE void promote(float (&sum)[kCount], const float (&d)[kCount], float2 rows, float block) {
    const float low = rows.x * block, high = rows.y * block;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        sum[i] += low * d[i];
        sum[i + 1] += low * d[i + 1];
        sum[i + 2] += high * d[i + 2];
        sum[i + 3] += high * d[i + 3];
    }
}

// sum += row scale * (column scale * d); `columns` is the shared address of the thread's first column scale
template <int kCount>
MEXT_DEVICE void promote_columns(float (&sum)[kCount], const float (&d)[kCount], float2 rows, uint32_t columns) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        const float2 column = load_shared_2(columns + accumulator_column(0, i) * 4);
        sum[i] += rows.x * (column.x * d[i]);
        sum[i + 1] += rows.x * (column.y * d[i + 1]);
        sum[i + 2] += rows.y * (column.x * d[i + 2]);
        sum[i + 3] += rows.y * (column.y * d[i + 3]);
    }
}

// The sums of one tile in one thread. Reads stages through two cursors: `ahead` starts products, `behind` promotes.
template <class T, bool kColumnScales>
struct Sums {
    using S = Shared<T, kColumnScales>;
    using Products = float[T::kRegisters];

    const uint32_t shared;
    const Place place;
    Cursor<T::kStages> ahead, behind;
    const float* block_scales = nullptr;
    float block = 0;  // of the next step to promote: fetched one step early, for it comes from L2
    int blocks_left = 0;

    MEXT_DEVICE Sums(uint32_t shared, Place place) : shared(shared), place(place) {}

    MEXT_DEVICE void begin(const Problem& p, const Work& work) {
        if constexpr (!kColumnScales) {
            // The second tile of a pair may lie beyond N altogether; it is computed from zeros and not stored.
            const int last = ceil_div(p.n, kBlock) - 1, row = work.column / kBlock < last ? work.column / kBlock : last;
            block_scales = p.b_scale + work.group * p.b_scale_group + int64_t(row) * p.b_scale_row;
            blocks_left = work.steps;
            block = load_constant(block_scales);
        }
    }

    MEXT_DEVICE float next_block() {
        const float now = block;
        if (--blocks_left > 0) block = load_constant(++block_scales);
        return now;
    }

    MEXT_DEVICE void wait_full() { barrier_wait(shared + S::kFull + ahead.stage * 8, ahead.parity); }

    MEXT_DEVICE void promote_step(Products& sum, const Products& d, float2 rows, float block) {
        if constexpr (kColumnScales) {
            const int first = (T::kSplitN ? place.group * T::kWidth : 0) + accumulator_column(place.thread, 0);
            promote_columns(sum, d, rows, shared + S::kBScale + behind.stage * S::kBScaleBytes + first * 4);
        } else {
            promote(sum, d, rows, block);
        }
    }

    MEXT_DEVICE void release_step() {
        release<T>(shared + S::kEmpty + behind.stage * 8, place);
        behind.advance();
    }

    // Starts the next step's product.
    MEXT_DEVICE void start_next(Products& d) {
        wait_full();
        start<T, kColumnScales>(d, shared, ahead.stage, place.group, 0);
        ahead.advance();
    }

    // Waits for the oldest product in flight and promotes it. Row scales are read first, so a stage without column
    // scales can go back before the arithmetic.
    template <int kInFlight>
    MEXT_DEVICE void finish(Products& sum, Products& d) {
        const float2 rows = row_scales<T, kColumnScales>(shared, behind.stage, place, 0);
        const float scale = kColumnScales ? 0 : next_block();
        multiply_wait<kInFlight>();
        pin(d);
        if constexpr (kColumnScales) {
            promote_step(sum, d, rows, scale);
            release_step();
        } else {
            release_step();
            promote_step(sum, d, rows, scale);
        }
    }

    // One 64-row product per step: two sets of accumulators take turns, so the tensor cores work while one is promoted.
    MEXT_DEVICE void contract(Products (&sum)[1], int steps) {
        Products even, odd;
        start_next(even);
        for (; steps > 2; steps -= 2) {
            start_next(odd);
            finish<1>(sum[0], even);
            start_next(even);
            finish<1>(sum[0], odd);
        }
        if (steps == 2) {
            start_next(odd);
            finish<1>(sum[0], even);
            finish<0>(sum[0], odd);
        } else {
            finish<0>(sum[0], even);
        }
    }

    // Two 64-row products per step: registers for one set of accumulators only. While this warpgroup promotes, the
    // other one's products keep the tensor cores busy.
    MEXT_DEVICE void contract(Products (&sum)[2], int steps) {
        for (; steps > 0; --steps) {
            const float scale = kColumnScales ? 0 : next_block();
            wait_full();
            ahead.advance();
            multiply_and_promote<0>(sum[0], scale);
            multiply_and_promote<1>(sum[1], scale);
            release_step();
        }
    }

    template <int kSub>
    MEXT_DEVICE void multiply_and_promote(Products& sum, float scale) {
        Products d;
        const float2 rows = row_scales<T, kColumnScales>(shared, behind.stage, place, kSub);
        start<T, kColumnScales>(d, shared, behind.stage, place.group, kSub);
        multiply_wait<0>();
        pin(d);
        promote_step(sum, d, rows, scale);
    }
};

// ---- the output

// Writes four neighbours, or those of them that are within the row.
template <bool kOnlyAdds>
MEXT_DEVICE void write(const Problem& p, int64_t at, int columns_left, const float (&v)[4]) {
    const int output = kOnlyAdds ? int(kAdd) : p.output;
    float* const single = static_cast<float*>(p.out) + at;
    uint16_t* const half = static_cast<uint16_t*>(p.out) + at;
    if (p.aligned && columns_left >= 4) {
        if (output == kAdd) add_4(single, v);
        else if (output == kFloat) store_4(single, v);
        else store_4(half, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i >= columns_left) return;
        if (output == kAdd) add_1(single + i, v[i]);
        else if (output == kFloat) store_1(single + i, v[i]);
        else store_1(half + i, v[i]);
    }
}

// Writes 64 rows. wgmma leaves a thread two neighbouring columns of each 8-column block; lanes 2i and 2i+1 swap, so
// that one has four of a block and the other four of the next: 16-byte stores, and whole 32-byte sectors in BF16 too.
template <bool kOnlyAdds, int kCount>
MEXT_DEVICE void store(const float (&sum)[kCount], const Problem& p, const Work& work, int row, int column, int thread) {
    const bool odd = thread & 1;
    const int64_t matrix = p.out_group ? work.group * p.out_group : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = row + accumulator_row(thread, 2 * half);
#pragma unroll
        for (int pair = 0; pair < kCount / 4; pair += 2) {
            const float* x = sum + 4 * pair + 2 * half;
            const float* y = x + 4;
            const float low = from_neighbour(odd ? x[0] : y[0]), high = from_neighbour(odd ? x[1] : y[1]);
            const float v[4] = {odd ? low : x[0], odd ? high : x[1], odd ? y[0] : low, odd ? y[1] : high};
            const int c = column + quad_column(thread % 32, pair);
            if (at < work.row_end) write<kOnlyAdds>(p, matrix + at * p.out_row + c, p.n - c, v);
        }
    }
}

template <bool kOnlyAdds, class T>
MEXT_DEVICE void store_tile(const float (&sum)[T::kSub][T::kRegisters], const Problem& p, const Work& work,
                            Place place) {
    const int row = work.row + 64 * (T::kSplitN ? 0 : place.group * T::kSub);
    const int column = work.column + (T::kSplitN ? place.group * T::kWidth : 0);
    store<kOnlyAdds>(sum[0], p, work, row, column, place.thread);
    if constexpr (T::kSub == 2) store<kOnlyAdds>(sum[1], p, work, row + 64, column, place.thread);
}

template <class T, bool kColumnScales, class Walk>
MEXT_DEVICE void consume(const Problem& p, uint32_t shared, int rank) {
    const Place place{uniform(thread_index() / 128), thread_index() % 128};
    Walk walk(block_index() / T::kCluster, block_count() / T::kCluster, rank);
    Sums<T, kColumnScales> sums(shared, place);
    Work work;
    while (walk.next(p, work)) {
        float sum[T::kSub][T::kRegisters];
#pragma unroll
        for (int sub = 0; sub < T::kSub; ++sub) {
#pragma unroll
            for (int i = 0; i < T::kRegisters; ++i) sum[sub][i] = 0;
        }
        sums.begin(p, work);
        sums.contract(sum, work.steps);
        store_tile<Walk::kOnlyAdds, T>(sum, p, work, place);
    }
}

// ---- a whole block

// Registers: 168 a thread at launch (65536 / 384). The mover gives up all but 40, which lets the others have 232.
template <class T, bool kColumnScales, class Walk>
MEXT_DEVICE void gemm(const TensorMap& a, const TensorMap& b, const TensorMap& a_scale, const TensorMap& b_scale,
                      const Problem& p) {
    using S = Shared<T, kColumnScales>;
    const uint32_t shared = dynamic_shared();
    const int rank = T::kCluster > 1 ? cluster_rank() : 0;
    const int warp = uniform(thread_index() / 32);
    if (thread_index() == 0) {
        for (int stage = 0; stage < T::kStages; ++stage) {
            barrier_init(shared + S::kFull + stage * 8, 1);
            barrier_init(shared + S::kEmpty + stage * 8, kConsumers * 4 * T::kCluster);
        }
        barrier_init_done();
    }
    if constexpr (T::kCluster > 1) cluster_sync(); else block_sync();

    if (warp >= kConsumers * 4) {
        give_registers<40>();
        if (thread_index() == kConsumers * 128) {
            prefetch(a), prefetch(b), prefetch(a_scale);
            if constexpr (kColumnScales) prefetch(b_scale);
            produce<T, kColumnScales, Walk>(a, b, a_scale, b_scale, p, shared, rank);
        }
    } else {
        take_registers<232>();
        consume<T, kColumnScales, Walk>(p, shared, rank);
    }
    // Until both blocks are done, one may still write into the other's memory or arrive at its barriers.
    if constexpr (T::kCluster > 1) cluster_sync();
}

}  // namespace mext
