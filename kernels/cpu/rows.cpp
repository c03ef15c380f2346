// Rows of tokens gathered, quantised and combined, as kernels/reference/rows.py specifies, bit for bit.
//
// Row-major tensors; formats, `bf16`, `lanes` and `threads` as in quantize.cpp.

#include "fp8.h"
#include "parallel.h"

#include <vector>

namespace {

// A row of `columns` numbers to bytes and scales; `row` < 0 is padding: zeros.
void quantize_row(const Loops& loops, const void* x, int bf16, int64_t row, int64_t columns, bool power_of_two,
                  uint8_t* y, float* scale) {
  const int64_t whole = columns / kTile, rest = columns % kTile, offset = row * columns;
  if (row < 0) {
    std::memset(y, 0, columns);
    std::fill(scale, scale + whole + (rest != 0), 0.f);
    return;
  }
  if (bf16)
    loops.half.quantize_tiles(static_cast<const uint16_t*>(x) + offset, whole, power_of_two, false, y, scale);
  else
    loops.whole.quantize_tiles(static_cast<const float*>(x) + offset, whole, power_of_two, false, y, scale);
  if (!rest) return;
  float buffer[kTile];
  quantize_tile(loops, load_tile(loops, x, bf16, offset + whole * kTile, rest, buffer), power_of_two,
                y + whole * kTile, scale + whole, rest);
}

// total += weight * row, the product rounded; 128 numbers.
void add_portable(const float* row, float weight, float* total) {
  for (int i = 0; i < kTile; ++i) total[i] += weight * row[i];
}

#if defined(__x86_64__)
MEXT_AVX2 void add_avx2(const float* row, float weight, float* total) {
  const __m256 factor = _mm256_set1_ps(weight);
  for (int i = 0; i < kTile; i += 8)
    _mm256_storeu_ps(total + i, _mm256_add_ps(avx2::load8(total + i), _mm256_mul_ps(factor, avx2::load8(row + i))));
}
#endif

}  // namespace

// x: [tokens, columns]; source: rows of x; y: [rows, columns]; scale: [rows, ceil(columns / 128)].
extern "C" void mext_permute_quantize(const void* x, int bf16, const int64_t* source, uint8_t* y, float* scale,
                                      int64_t rows, int64_t columns, int e5m2, int power_of_two, int lanes,
                                      int threads) {
  const Loops loops = loops_of(e5m2, lanes);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  mext::in_parallel(rows, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      quantize_row(loops, x, bf16, source[row], columns, power_of_two != 0, y + row * columns, scale + row * tiles);
  });
}

// As mext_permute_quantize to E4M3 with powers of two; y: [rows, y_stride] bytes, numbers and then a byte for each
// scale, its exponent.
extern "C" void mext_quantize_rows(const void* x, int bf16, const int64_t* source, uint8_t* y, int64_t rows,
                                   int64_t columns, int64_t y_stride, int lanes, int threads) {
  const Loops loops = loops_of(0, lanes);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  mext::in_parallel(rows, threads, [&](int64_t first, int64_t last) {
    std::vector<float> scales(tiles);
    for (int64_t row = first; row < last; ++row) {
      uint8_t* bytes = y + row * y_stride;
      quantize_row(loops, x, bf16, source[row], columns, true, bytes, scales.data());
      for (int64_t tile = 0; tile < tiles; ++tile)
        bytes[columns + tile] = static_cast<uint8_t>((to_bits(scales[tile]) >> 23) & 0xffu);
    }
  });
}

// y: [.., columns]; weights: [..]; rows: [tokens, k] rows of y; out: [tokens, columns], in the dtype of y.
extern "C" void mext_unpermute_combine(const void* y, int bf16, const float* weights, const int64_t* rows, void* out,
                                       int64_t tokens, int64_t columns, int64_t k, int lanes, int threads) {
  const Loops loops = loops_of(0, lanes);
  auto* add = add_portable;
#if defined(__x86_64__)
  if (lanes >= avx2::kLanes && has_avx2()) add = add_avx2;
#endif
  mext::in_parallel(tokens, threads, [&](int64_t first, int64_t last) {
    float buffer[kTile], total[kTile];
    for (int64_t t = first; t < last; ++t)
      for (int64_t column = 0; column < columns; column += kTile) {
        const int64_t width = std::min<int64_t>(kTile, columns - column), offset = t * columns + column;
        std::fill(total, total + kTile, 0.f);
        for (const int64_t* row = rows + t * k; row < rows + (t + 1) * k; ++row)
          if (*row >= 0)
            add(load_tile(loops, y, bf16, *row * columns + column, width, buffer), weights[*row], total);
        if (!bf16) {
          std::memcpy(static_cast<float*>(out) + offset, total, width * sizeof(float));
          continue;
        }
        loops.round_bf16(total);
        uint16_t* halves = static_cast<uint16_t*>(out) + offset;
        for (int64_t i = 0; i < width; ++i)
          halves[i] = total[i] == total[i] ? static_cast<uint16_t>(to_bits(total[i]) >> 16) : 0x7fc0u;
      }
  });
}
