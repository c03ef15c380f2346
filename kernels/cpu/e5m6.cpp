// E5M6 in two planes, as kernels/reference/e5m6.py specifies, bit for bit.
//
// x: [rows, columns] FP32, or BF16 where `bf16` != 0; high: [rows, columns]; low: [rows, ceil(columns / 2)]; scale:
// [rows, ceil(columns / 128)]; `lanes` and `threads` as in quantize.cpp.

#include "fp8.h"
#include "parallel.h"

namespace {

struct E5M6 {
  static constexpr int shift = 17;
  static constexpr uint32_t rebias = 112;
  static constexpr float largest = 65024.f, smallest_scale = 0x1p-105f;
};
constexpr uint32_t kNaNCode = 0x7ff;

// The scale is a power of two, so its reciprocal is exact and the product is the quotient.
void codes_portable(const float* x, float reciprocal, uint32_t* codes) {
  for (int i = 0; i < kTile; ++i) {
    const uint32_t bits = to_bits(x[i] * reciprocal), sign = bits & 0x80000000u;
    codes[i] = round_to<E5M6>(std::min(bits ^ sign, to_bits(E5M6::largest))) | (sign >> 20);
  }
}

void numbers_portable(const uint32_t* codes, float scale, float* x) {
  for (int i = 0; i < kTile; ++i) {
    const uint32_t a = codes[i] & 0x7ffu, sign = (codes[i] & 0x800u) << 20;
    float v;
    if (a >= 0x7c0u)
      v = from_bits(0x7fc00000u);
    else if (a < 0x40u)
      v = static_cast<float>(a) * 0x1p-20f;
    else
      v = from_bits((a << E5M6::shift) + (E5M6::rebias << 23));
    x[i] = from_bits(to_bits(v) | sign) * scale;
  }
}

#if defined(__x86_64__)
using avx2::as_bits, avx2::as_numbers, avx2::load8;

MEXT_AVX2 void codes_avx2(const float* x, float reciprocal, uint32_t* codes) {
  const __m256 factor = _mm256_set1_ps(reciprocal), largest = _mm256_set1_ps(E5M6::largest);
  const __m256i negative = _mm256_set1_epi32(INT32_MIN);
  const __m256i smallest = _mm256_set1_epi32(static_cast<int>((E5M6::rebias + 1) << 23));
  const __m256i infinity = _mm256_set1_epi32(static_cast<int>(kInfinity));
  for (int i = 0; i < kTile; i += 8) {
    const __m256i bits = as_bits(_mm256_mul_ps(load8(x + i), factor)), sign = _mm256_and_si256(bits, negative);
    const __m256 a = _mm256_min_ps(as_numbers(_mm256_xor_si256(bits, sign)), largest);
    const __m256i exponent = _mm256_and_si256(_mm256_max_epi32(as_bits(a), smallest), infinity);
    const __m256i magic = _mm256_add_epi32(exponent, _mm256_set1_epi32(E5M6::shift << 23));
    const __m256i steps = _mm256_sub_epi32(as_bits(_mm256_add_ps(a, as_numbers(magic))), magic);
    const __m256i base = _mm256_srli_epi32(_mm256_sub_epi32(exponent, smallest), E5M6::shift);
    avx2::store(codes + i, _mm256_or_si256(_mm256_add_epi32(steps, base), _mm256_srli_epi32(sign, 20)));
  }
}

// A code shifted by 4 is an FP16 number.
MEXT_AVX2 void numbers_avx2(const uint32_t* codes, float scale, float* x) {
  const __m256 factor = _mm256_set1_ps(scale);
  for (int i = 0; i < kTile; i += 8) {
    const __m256i halves = _mm256_slli_epi32(avx2::load(codes + i), 4);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_cvtph_ps(packed), factor));
  }
}
#endif

// Codes to planes and back; `low` is written two numbers a byte, of which there may be half a byte too many.
void split(const uint32_t* codes, uint8_t* high, uint8_t* low) {
  for (int i = 0; i < kTile; ++i) high[i] = static_cast<uint8_t>(codes[i] >> 4);
  for (int i = 0; i < kTile / 2; ++i)
    low[i] = static_cast<uint8_t>((codes[2 * i] & 0xfu) | ((codes[2 * i + 1] & 0xfu) << 4));
}

void join(const uint8_t* high, const uint8_t* low, uint32_t* codes) {
  for (int i = 0; i < kTile / 2; ++i) {
    codes[2 * i] = (static_cast<uint32_t>(high[2 * i]) << 4) | (low[i] & 0xfu);
    codes[2 * i + 1] = (static_cast<uint32_t>(high[2 * i + 1]) << 4) | (low[i] >> 4);
  }
}

}  // namespace

extern "C" void mext_pack_e5m6(const void* x, int bf16, uint8_t* high, uint8_t* low, float* scale, int64_t rows,
                               int64_t columns, int lanes, int threads) {
  const Loops loops = loops_of(0, lanes);
  auto* encode = codes_portable;
#if defined(__x86_64__)
  if (lanes >= avx2::kLanes && has_avx2()) encode = codes_avx2;
#endif
  const int64_t tiles = (columns + kTile - 1) / kTile, halves = (columns + 1) / 2;
  mext::in_parallel(rows, threads, [&](int64_t first, int64_t last) {
    float buffer[kTile];
    uint32_t codes[kTile];
    uint8_t highs[kTile], lows[kTile / 2];
    for (int64_t row = first; row < last; ++row)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t column = tile * kTile, width = std::min<int64_t>(kTile, columns - column);
        const float* numbers = load_tile(loops, x, bf16, row * columns + column, width, buffer);
        const float s = scale_of(loops.amax(numbers), E5M6::largest, E5M6::smallest_scale, true);
        scale[row * tiles + tile] = s;
        if (s != s)
          for (int64_t i = 0; i < kTile; ++i) codes[i] = i < width ? kNaNCode : 0;
        else
          encode(numbers, 1.f / s, codes);
        split(codes, highs, lows);
        std::memcpy(high + row * columns + column, highs, width);
        std::memcpy(low + row * halves + column / 2, lows, (width + 1) / 2);
      }
  });
}

extern "C" void mext_unpack_e5m6(const uint8_t* high, const uint8_t* low, const float* scale, float* x, int64_t rows,
                                 int64_t columns, int lanes, int threads) {
  auto* decode = numbers_portable;
#if defined(__x86_64__)
  if (lanes >= avx2::kLanes && has_avx2()) decode = numbers_avx2;
#endif
  const int64_t tiles = (columns + kTile - 1) / kTile, halves = (columns + 1) / 2;
  mext::in_parallel(rows, threads, [&](int64_t first, int64_t last) {
    uint32_t codes[kTile];
    float numbers[kTile];
    for (int64_t row = first; row < last; ++row)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t column = tile * kTile, width = std::min<int64_t>(kTile, columns - column);
        uint8_t highs[kTile] = {}, lows[kTile / 2] = {};
        std::memcpy(highs, high + row * columns + column, width);
        std::memcpy(lows, low + row * halves + column / 2, (width + 1) / 2);
        join(highs, lows, codes);
        decode(codes, scale[row * tiles + tile], numbers);
        std::memcpy(x + row * columns + column, numbers, width * sizeof(float));
      }
  });
}
