// 128x128 squares of FP32 numbers quantised along their columns into the transpose: what the weight gradient reads.
//
// A column's scale comes from vertical maxima, rows are encoded with a scale for every number, and only the bytes are
// transposed: a quarter of the traffic of transposing numbers first.

#pragma once

#include "fp8.h"
#include "parallel.h"

namespace {

// Groups of tokens; `sizes` null: one undivided matrix, in which no tile is padded.
struct Groups {
  const int64_t* sizes;
  int64_t count;
};

// A transposed result, [columns, y_stride] and [columns, scale_stride].
struct Transposed {
  uint8_t* y;
  float* scale;
  int64_t y_stride, scale_stride;
  bool power_of_two;
};

// One square of up to 128 tokens: `rows` are whole tiles, `amax` the bits of their columns' largest magnitudes.
struct Square {
  const float* rows[kTile];
  uint32_t amax[kTile];
  alignas(64) float numbers[kTile * kTile];
};

inline void write_columns(const Loops& loops, const Square& square, int64_t height, int64_t width, int64_t column,
                          int64_t y_column, const Transposed& to) {
  alignas(64) uint8_t bytes[kTile * kTile], transposed[kTile * kTile];
  ColumnScales columns;
  for (int c = 0; c < kTile; ++c) columns.scale[c] = loops.scale(square.amax[c], to.power_of_two);
  loops.prepare(columns);
  for (int64_t t = 0; t < height; ++t) loops.encode_columns(square.rows[t], columns, bytes + t * kTile);
  loops.transpose(bytes, transposed);
  for (int64_t c = 0; c < width; ++c) {
    const float scale = columns.scale[c];
    uint8_t* y = to.y + (column + c) * to.y_stride + y_column;
    to.scale[(column + c) * to.scale_stride + y_column / kTile] = scale;
    if (scale != scale)
      std::memset(y, kNaN, height);
    else
      std::memcpy(y, transposed + c * kTile, height);
  }
}

// The columns of `to` from `begin` to `end`, multiples of 128 apart from `begin`, hold no token.
inline void write_nothing(const Transposed& to, int64_t column, int64_t width, int64_t begin, int64_t end) {
  const int64_t tile = (begin + kTile - 1) / kTile;
  for (int64_t c = column; c < column + width; ++c) {
    std::memset(to.y + c * to.y_stride + begin, 0, end - begin);
    std::fill(to.scale + c * to.scale_stride + tile, to.scale + c * to.scale_stride + end / kTile, 0.f);
  }
}

// `width` <= 128 columns of what quantize_columns does, in the room of `squares`.
template <int N, class Load>
void quantize_column(const Loops& loops, Load load, const Transposed (&to)[N], int64_t column, int64_t width,
                     int64_t tokens, Groups groups, Square (&squares)[N]) {
  int64_t begin = 0;
  for (int64_t e = 0; e < groups.count; ++e) {
    const int64_t end = begin + (groups.sizes ? groups.sizes[e] : tokens);
    const int64_t origin = groups.sizes ? (begin / kTile + e) * kTile : 0;
    for (int64_t t0 = begin; t0 < end; t0 += kTile) {
      const int64_t height = std::min<int64_t>(kTile, end - t0);
      for (Square& square : squares) std::fill(square.amax, square.amax + kTile, 0u);
      for (int64_t t = 0; t < height; ++t) {
        float* buffers[N];
        const float* rows[N];
        for (int n = 0; n < N; ++n) buffers[n] = squares[n].numbers + t * kTile;
        load(t0 + t, column, width, buffers, rows);
        for (int n = 0; n < N; ++n) {
          squares[n].rows[t] = rows[n];
          loops.column_amax(rows[n], squares[n].amax);
        }
      }
      for (int n = 0; n < N; ++n)
        write_columns(loops, squares[n], height, width, column, origin + t0 - begin, to[n]);
    }
    if (groups.sizes)
      for (const Transposed& result : to)
        write_nothing(result, column, width, origin + end - begin, (end / kTile + e + 1) * kTile);
    begin = end;
  }
}

// Quantises `N` matrices [tokens, columns] along their columns. `load(token, column, width, buffers, rows)` points
// rows[n] at 128 numbers of the n-th matrix, for which there is room at buffers[n]; several threads call it at once.
template <int N, class Load>
void quantize_columns(const Loops& loops, Load load, const Transposed (&to)[N], int64_t tokens, int64_t columns,
                      Groups groups, int threads) {
  mext::in_parallel((columns + kTile - 1) / kTile, threads, [&](int64_t first, int64_t last) {
    alignas(64) Square squares[N];
    for (int64_t column = first * kTile; column < std::min(last * kTile, columns); column += kTile)
      quantize_column(loops, load, to, column, std::min<int64_t>(kTile, columns - column), tokens, groups, squares);
  });
}

}  // namespace
