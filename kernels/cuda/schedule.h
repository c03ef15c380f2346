// Which tiles a block works on: a walk in steps of the grid over all tiles, the same in every role of a block, with no
// word from the host about group sizes. Host and device: the tests compile it with g++.
#pragma once
#include "layout.h"

namespace mext {

// What the kernels are told besides tensor maps. Passed by value; the launcher fills the same fields in this order.
struct Problem {
    void* out;                   // FP32 or BF16 [rows, N], or [E, rows, N]
    const float* b_scale;        // 128x128 blocks [E, ceil(N/128), ceil(K/128)]; null where B has 1x128 tiles
    const int64_t* group_sizes;  // [E]; null for a dense product
    int64_t out_row;             // numbers from one row of `out` to the next
    int64_t out_group;           // ... from one matrix of `out` to the next
    int64_t b_scale_group;       // numbers from one matrix of `b_scale` to the next
    int b_scale_row;             // ... from one row of blocks to the next
    int m, n, k;                 // rows of A, rows of B, contracted columns (per group: see the walks)
    int groups;                  // E, or 1
    int output;                  // an `Output`
    int aligned;                 // whether four neighbours in a row of `out` may be written at once
};

enum Output { kFloat = 0, kBFloat16 = 1, kAdd = 2 };  // write FP32, write BF16, add to FP32

// One tile of the output and the steps that make it.
struct Work {
    int row, row_end;  // first row of the tile in A and `out`; rows from row_end on are somebody else's
    int column;        // first column of the tile
    int group;         // matrix of B and of the scales (1D2D) or of `out` (weight gradient)
    int step, steps;   // first 128 columns to contract, and how many times 128
};

// Tile `index` of rows x columns of tiles: down 8 rows of tiles, then one column further. The tiles at work at one time
// form a rather square patch, whose rows of A and B are read from DRAM once and from L2 by everybody else.
MEXT_BOTH void raster(int index, int rows, int columns, int& row, int& column) {
    const int kBand = 8;
    const int band = index / (kBand * columns), first = band * kBand;
    const int height = rows - first < kBand ? rows - first : kBand;
    const int inside = index - band * kBand * columns;
    row = first + inside % height;
    column = inside / height;
}

// One product. Tiles are given out in units of `kCluster` neighbours along N; `rank` is the block's place in its unit.
template <class T>
struct DenseWalk {
    static constexpr bool kOnlyAdds = false;
    int index, stride, rank;
    MEXT_BOTH DenseWalk(int unit, int units, int rank) : index(unit), stride(units), rank(rank) {}

    MEXT_BOTH bool next(const Problem& p, Work& work) {
        const int rows = ceil_div(p.m, T::kM), columns = ceil_div(p.n, T::kN * T::kCluster);
        if (index >= rows * columns) return false;
        int row, column;
        raster(index, rows, columns, row, column);
        work = {row * T::kM, p.m, (column * T::kCluster + rank) * T::kN, 0, 0, ceil_div(p.k, kBlock)};
        index += stride;
        return true;
    }
};

// Rows sorted by group, each group times its own B: a group's tiles begin at its first row, wherever that is, and the
// last one reaches into the next group, whose rows are left alone when storing.
template <class T>
struct GroupedWalk {
    static constexpr bool kOnlyAdds = false;
    int index, stride, rank;
    int group = 0, first_row = 0, first_index = 0;
    MEXT_BOTH GroupedWalk(int unit, int units, int rank) : index(unit), stride(units), rank(rank) {}

    MEXT_BOTH bool next(const Problem& p, Work& work) {
        const int columns = ceil_div(p.n, T::kN * T::kCluster);
        for (; group < p.groups; ++group) {
            const int size = int(p.group_sizes[group]), rows = ceil_div(size, T::kM);
            if (index < first_index + rows * columns) {
                int row, column;
                raster(index - first_index, rows, columns, row, column);
                work = {first_row + row * T::kM, first_row + size, (column * T::kCluster + rank) * T::kN, group, 0,
                        ceil_div(p.k, kBlock)};
                index += stride;
                return true;
            }
            first_index += rows * columns;
            first_row += size;
        }
        return false;
    }
};

// Weight gradients: every group has its own m x n output and contracts its own tokens, which begin at 128-column tile
// offset // 128 + e (kernels/README.md). A group without tokens has no work: it adds nothing.
template <class T>
struct ContractedWalk {
    static constexpr bool kOnlyAdds = true;  // whatever `Problem::output` says
    int index, stride, rank;
    int group = 0, offset = 0;
    MEXT_BOTH ContractedWalk(int unit, int units, int rank) : index(unit), stride(units), rank(rank) {}

    MEXT_BOTH bool next(const Problem& p, Work& work) {
        const int rows = ceil_div(p.m, T::kM), columns = ceil_div(p.n, T::kN * T::kCluster), each = rows * columns;
        for (; index < each * p.groups; index += stride) {
            for (; group < index / each; ++group) offset += int(p.group_sizes[group]);
            const int size = int(p.group_sizes[group]);
            if (size == 0) continue;
            int row, column;
            raster(index - group * each, rows, columns, row, column);
            work = {row * T::kM, p.m, (column * T::kCluster + rank) * T::kN, group, offset / kBlock + group,
                    ceil_div(size, kBlock)};
            index += stride;
            return true;
        }
        return false;
    }
};

}  // namespace mext
