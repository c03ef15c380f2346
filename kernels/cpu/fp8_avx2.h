// The loops of fp8.h for AVX2 (with FMA and F16C).

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#define MEXT_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace {

inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

MEXT_AVX2 inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
MEXT_AVX2 inline __m256i load_bytes(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
MEXT_AVX2 inline void store_bytes(void* x, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(x), v); }
MEXT_AVX2 inline __m256i as_bits(__m256 v) { return _mm256_castps_si256(v); }
MEXT_AVX2 inline __m256 as_numbers(__m256i v) { return _mm256_castsi256_ps(v); }

// ---- largest magnitudes -------------------------------------------------------------------------------------------

MEXT_AVX2 inline uint32_t largest_lane(__m256i v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

MEXT_AVX2 inline uint32_t largest_half(__m256i v) {  // of BF16 numbers, as the bits of an FP32 number
  const __m128i m = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi16(-1)));
  return static_cast<uint32_t>(~_mm_cvtsi128_si32(least) & 0xffff) << 16;
}

MEXT_AVX2 inline uint32_t amax_avx2(const float* x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i amax[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int i = 0; i < kTile; i += 16)
    for (int j = 0; j < 2; ++j)
      amax[j] = _mm256_max_epu32(amax[j], _mm256_and_si256(load_bytes(x + i + 8 * j), magnitude));
  return largest_lane(_mm256_max_epu32(amax[0], amax[1]));
}

MEXT_AVX2 inline uint32_t amax_avx2(const uint16_t* x) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i amax[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int i = 0; i < kTile; i += 32)
    for (int j = 0; j < 2; ++j)
      amax[j] = _mm256_max_epu16(amax[j], _mm256_and_si256(load_bytes(x + i + 16 * j), magnitude));
  return largest_half(_mm256_max_epu16(amax[0], amax[1]));
}

MEXT_AVX2 inline void column_amax_avx2(const float* x, uint32_t* amax) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int i = 0; i < kTile; i += 8)
    store_bytes(amax + i, _mm256_max_epu32(load_bytes(amax + i), _mm256_and_si256(load_bytes(x + i), magnitude)));
}

// ---- division -----------------------------------------------------------------------------------------------------

// x / scale rounded to FP32 as a division rounds it, in two operations: with high = RN(1 / scale) and low what that lacks,
// the FMA of x * high and RN(x * low). For every scale and every x next to a boundary between two FP8 numbers (exponents
// apart: 9.4e8 pairs) this was compared with the division: the one that fails has a scale whose mantissa is all ones.
// Scales above 2^100, whose `low` may be denormal, are left to the division too. With powers of two `low` is 0.
struct Divisor {
  __m256 high, low;
};

inline bool divides_fast(float scale) { return scale <= 0x1p100f && (to_bits(scale) & 0x7fffffu) != 0x7fffffu; }

MEXT_AVX2 inline Divisor divisor_of(__m256 scale) {
  const __m256 one = _mm256_set1_ps(1.f), high = _mm256_div_ps(one, scale);
  return {high, _mm256_mul_ps(_mm256_fnmadd_ps(high, scale, one), high)};
}

MEXT_AVX2 inline __m256 divide(__m256 x, Divisor d) { return _mm256_fmadd_ps(x, d.high, _mm256_mul_ps(x, d.low)); }

struct OneDivisor {
  Divisor divisor;
  MEXT_AVX2 Divisor operator()(int) const { return divisor; }
};

struct ColumnDivisors {
  const float *high, *low;
  MEXT_AVX2 Divisor operator()(int j) const { return {load8(high + 8 * j), load8(low + 8 * j)}; }
};

MEXT_AVX2 inline void prepare_avx2(ColumnScales& columns) {
  columns.fast = true;
  for (int i = 0; i < kTile; ++i) columns.fast &= divides_fast(columns.scale[i]);
  for (int i = 0; i < kTile; i += 8) {
    const Divisor d = divisor_of(load8(columns.scale + i));
    _mm256_store_ps(columns.high + i, d.high);
    _mm256_store_ps(columns.low + i, d.low);
  }
}

// ---- encoding -----------------------------------------------------------------------------------------------------

// As round_to: 8 magnitudes to their codes, plus a constant, times 2^(shift - 16). The upper half of the sum's bits holds
// the exponent of the magic number, the lower the steps; madd adds the one to the other.
template <class F>
MEXT_AVX2 inline __m256i code_lanes(__m256 a) {
  const __m256i smallest = _mm256_set1_epi32(static_cast<int>((F::rebias + 1) << 23));
  const __m256i infinity = _mm256_set1_epi32(static_cast<int>(kInfinity));
  const __m256 exponent = as_numbers(_mm256_and_si256(_mm256_max_epi32(as_bits(a), smallest), infinity));
  const __m256i sum = as_bits(_mm256_fmadd_ps(exponent, _mm256_set1_ps(1 << F::shift), a));
  return _mm256_madd_epi16(sum, _mm256_set1_epi32((1 << 16) | (1 << (F::shift - 16))));
}

template <class F>
MEXT_AVX2 inline __m256i finish_codes(__m256i codes) {  // of 16 numbers: without the constant and the factor
  constexpr int constant = static_cast<int>(F::rebias + 1 + F::shift) << 7;
  return _mm256_srli_epi16(_mm256_sub_epi16(codes, _mm256_set1_epi16(constant)), F::shift - 16);
}

MEXT_AVX2 inline __m256i with_signs(__m256i bytes, __m256i signs) {
  return _mm256_or_si256(bytes, _mm256_and_si256(signs, _mm256_set1_epi8(-128)));
}

// 32 numbers to 32 bytes; `divisor(j)` is that of the j-th 8 numbers. Packing keeps signs, for it saturates.
template <class F, class Divisors>
MEXT_AVX2 inline __m256i encode_32(const float* x, const Divisors& divisor) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i bits[4], codes[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    bits[j] = load_bytes(x + 8 * j);
    codes[j] = code_lanes<F>(divide(as_numbers(_mm256_and_si256(bits[j], magnitude)), divisor(j)));
  }
  const __m256i bytes = _mm256_packus_epi16(finish_codes<F>(_mm256_packus_epi32(codes[0], codes[1])),
                                            finish_codes<F>(_mm256_packus_epi32(codes[2], codes[3])));
  const __m256i signs = _mm256_packs_epi16(_mm256_packs_epi32(bits[0], bits[1]), _mm256_packs_epi32(bits[2], bits[3]));
  return _mm256_permutevar8x32_epi32(with_signs(bytes, signs), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// The same for BF16 numbers, which are the upper halves of FP32 numbers; one divisor for all.
template <class F>
MEXT_AVX2 inline __m256i encode_32(const uint16_t* x, const OneDivisor& divisor) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff), zero = _mm256_setzero_si256();
  __m256i bits[2], codes[2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    bits[j] = load_bytes(x + 16 * j);
    const __m256i a = _mm256_and_si256(bits[j], magnitude);
    const __m256i first = code_lanes<F>(divide(as_numbers(_mm256_unpacklo_epi16(zero, a)), divisor(0)));
    const __m256i second = code_lanes<F>(divide(as_numbers(_mm256_unpackhi_epi16(zero, a)), divisor(0)));
    codes[j] = finish_codes<F>(_mm256_packus_epi32(first, second));
  }
  const __m256i bytes = _mm256_packus_epi16(codes[0], codes[1]), signs = _mm256_packs_epi16(bits[0], bits[1]);
  return _mm256_permute4x64_epi64(with_signs(bytes, signs), 0xd8);
}

template <class F>
MEXT_AVX2 void encode_avx2(const float* x, float scale, uint8_t* y) {
  if (!divides_fast(scale)) return encode_portable<F>(x, scale, y);
  const OneDivisor divisor{divisor_of(_mm256_set1_ps(scale))};
  for (int i = 0; i < kTile; i += 32) store_bytes(y + i, encode_32<F>(x + i, divisor));
}

template <class F>
MEXT_AVX2 void encode_columns_avx2(const float* x, const ColumnScales& columns, uint8_t* y) {
  if (!columns.fast) return encode_columns_portable<F>(x, columns, y);
  for (int i = 0; i < kTile; i += 32)
    store_bytes(y + i, encode_32<F>(x + i, ColumnDivisors{columns.high + i, columns.low + i}));
}

// ---- whole tiles of FP32 or BF16 numbers --------------------------------------------------------------------------

// Tiles are taken eight at a time, in two passes: maxima and scales, then numbers. A tile's numbers wait for its maximum
// and two divisions, and with the passes mixed the processor waits too (0.24 ns a number, where this takes 0.17).
constexpr int kTilesAtOnce = 8;

struct SomeTiles {
  alignas(32) uint32_t amax[kTilesAtOnce];
  alignas(32) float scale[kTilesAtOnce], high[kTilesAtOnce], low[kTilesAtOnce];

  template <class F>
  MEXT_AVX2 void prepare(bool power_of_two) {  // scale_of, eight times, and the divisors
    const __m256 largest = _mm256_set1_ps(F::largest), smallest = _mm256_set1_ps(F::smallest_scale);
    const __m256i bits = load_bytes(amax), mantissa = _mm256_set1_epi32(0x7fffff);
    __m256i scales = as_bits(_mm256_max_ps(_mm256_div_ps(as_numbers(bits), largest), smallest));
    if (power_of_two) scales = _mm256_andnot_si256(mantissa, _mm256_add_epi32(scales, mantissa));
    const __m256i nan = _mm256_cmpgt_epi32(bits, _mm256_set1_epi32(static_cast<int>(kInfinity) - 1));
    scales = _mm256_blendv_epi8(scales, _mm256_set1_epi32(0x7fc00000), nan);
    store_bytes(scale, scales);
    const Divisor d = divisor_of(as_numbers(scales));
    _mm256_store_ps(high, d.high);
    _mm256_store_ps(low, d.low);
  }
};

template <class F, class Number>
void encode_slow(const Number* x, float scale, uint8_t* y) {
  for (int i = 0; i < kTile; ++i) y[i] = scale == scale ? encode_one<F>(number_of(x[i]), scale) : kNaN;
}

// From a big array numbers come late if nobody asks for them early: 0.28 ns a number without, 0.17 with.
template <class Number>
inline void prefetch_tile(const Number* x) {
  for (int i = 0; i < kTile; i += 64 / sizeof(Number)) __builtin_prefetch(x + i);
}

template <class F, class Number>
MEXT_AVX2 void quantize_tiles_avx2(const Number* x, int64_t tiles, bool power_of_two, uint8_t* y, float* scale) {
  for (int64_t tile = 0; tile < tiles; tile += kTilesAtOnce) {
    const int count = static_cast<int>(std::min<int64_t>(kTilesAtOnce, tiles - tile));
    SomeTiles some = {};
    for (int i = 0; i < count; ++i) some.amax[i] = amax_avx2(x + (tile + i) * kTile);
    some.prepare<F>(power_of_two);
    std::memcpy(scale + tile, some.scale, count * sizeof(float));
    for (int i = 0; i < count; ++i) {
      const Number* numbers = x + (tile + i) * kTile;
      uint8_t* bytes = y + (tile + i) * kTile;
      prefetch_tile(numbers + 2 * kTilesAtOnce * kTile);
      if (!divides_fast(some.scale[i])) {
        encode_slow<F>(numbers, some.scale[i], bytes);
        continue;
      }
      const OneDivisor divisor{{_mm256_set1_ps(some.high[i]), _mm256_set1_ps(some.low[i])}};
#pragma GCC unroll 4
      for (int j = 0; j < kTile; j += 32) store_bytes(bytes + j, encode_32<F>(numbers + j, divisor));
    }
  }
}

// ---- decoding, BF16, transposition --------------------------------------------------------------------------------

// Both formats are the upper part of an FP16 number: E5M2 is its upper byte, E4M3 has one exponent bit less and so
// comes out 2^8 too small. The factor is undone before the scale, whose product with 2^8 could overflow.
template <class F>
MEXT_AVX2 void decode_avx2(const uint8_t* y, float scale, float* x) {
  const __m256 factor = _mm256_set1_ps(scale);
  for (int i = 0; i < kTile; i += 8) {
    const __m128i byte = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(y + i)));
    __m256 v;
    if (F::shift == E4M3::shift) {
      const __m128i a = _mm_and_si128(byte, _mm_set1_epi16(0x7f));
      const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(a, _mm_set1_epi16(kNaN)), _mm_set1_epi16(0x7c00));
      const __m128i sign = _mm_slli_epi16(_mm_and_si128(byte, _mm_set1_epi16(0x80)), 8);
      v = _mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(_mm_slli_epi16(a, 7), nan), sign));
      v = _mm256_mul_ps(v, _mm256_set1_ps(256.f));
    } else {
      v = _mm256_cvtph_ps(_mm_slli_epi16(byte, 8));
    }
    _mm256_storeu_ps(x + i, _mm256_mul_ps(v, factor));
  }
}

MEXT_AVX2 inline void widen_avx2(const uint16_t* x, float* y) {
  for (int i = 0; i < kTile; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    store_bytes(y + i, _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

MEXT_AVX2 inline void round_bf16_avx2(float* x) {
  for (int i = 0; i < kTile; i += 8) {
    const __m256 v = load8(x + i);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(as_bits(v), 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(as_bits(v), _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 rounded = as_numbers(_mm256_and_si256(sum, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    _mm256_storeu_ps(x + i, _mm256_blendv_ps(rounded, v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
}

// [128, 128] bytes in squares of 16, two beside each other at a time: four rounds of the perfect shuffle of 16 rows.
MEXT_AVX2 inline void transpose_avx2(const uint8_t* x, uint8_t* y) {
  for (int r = 0; r < kTile; r += 16)
    for (int c = 0; c < kTile; c += 32) {
      __m256i a[16], b[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) a[i] = load_bytes(x + (r + i) * kTile + c);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm256_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm256_unpackhi_epi8(a[i], a[i + 8]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm256_unpacklo_epi8(b[i], b[i + 8]);
        a[2 * i + 1] = _mm256_unpackhi_epi8(b[i], b[i + 8]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm256_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm256_unpackhi_epi8(a[i], a[i + 8]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm256_unpacklo_epi8(b[i], b[i + 8]);
        a[2 * i + 1] = _mm256_unpackhi_epi8(b[i], b[i + 8]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + (c + i) * kTile + r), _mm256_castsi256_si128(a[i]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + (c + 16 + i) * kTile + r), _mm256_extracti128_si256(a[i], 1));
      }
    }
}

}  // namespace
#endif
