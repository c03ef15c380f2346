// Tiles of 128 numbers to FP8 and back, as kernels/reference/quantize.py specifies, bit for bit: what the kernels in this
// folder are made of. The inner loops exist twice, portable (here) and for AVX2 (fp8_avx2.h), and `Loops` is one set of
// them; a kernel's argument `portable` != 0 forces the first, for tests.
//
// The loops always see a whole tile: a partial one at the end of a row is padded with zeros in a buffer (zeros never
// change an amax). None depends on denormal numbers: torch.set_flush_denormal(True) does not change a byte (the smallest
// scale is chosen so that what rounds to a nonzero FP8 number is a normal FP32 number).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kTile = 128;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint8_t kNaN = 0x7f;  // a NaN in both formats

struct E4M3 {
  static constexpr int shift = 20;         // FP32 has this many more mantissa bits
  static constexpr uint32_t rebias = 120;  // difference of the exponent biases
  static constexpr float largest = 448.f, smallest_scale = 0x1p-116f;
};
struct E5M2 {
  static constexpr int shift = 21;
  static constexpr uint32_t rebias = 112;
  static constexpr float largest = 57344.f, smallest_scale = 0x1p-109f;
};

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float number_of(float x) { return x; }
inline float number_of(uint16_t bf16) { return from_bits(static_cast<uint32_t>(bf16) << 16); }

// NaN for a block that holds NaN or an infinity; else amax / largest, not below the smallest scale, and rounded up to a
// power of two if asked.
inline float scale_of(uint32_t amax, float largest, float smallest_scale, bool power_of_two) {
  if (amax >= kInfinity) return from_bits(0x7fc00000u);
  const float scale = std::max(from_bits(amax) / largest, smallest_scale);
  if (!power_of_two) return scale;
  const uint32_t bits = to_bits(scale);
  return from_bits(((bits >> 23) + ((bits & 0x7fffffu) != 0)) << 23);
}

// ---- portable loops -----------------------------------------------------------------------------------------------

// Rounds a, an FP8 number's magnitude in FP32 that the format can hold, to nearest even. The exponent of a, or of the
// smallest normal number, times 2^shift is a number whose last place is that of the FP8 number: the sum with it rounds.
template <class F>
inline uint32_t round_to(uint32_t a) {
  constexpr uint32_t smallest = (F::rebias + 1) << 23;
  const uint32_t magic = (std::max(a, smallest) & kInfinity) + (F::shift << 23);
  const uint32_t steps = to_bits(from_bits(a) + from_bits(magic)) - magic;
  return steps + ((magic - smallest - (F::shift << 23)) >> F::shift);
}

template <class F>
inline uint8_t encode_one(float x, float scale) {
  const uint32_t bits = to_bits(x / scale), sign = bits & 0x80000000u;
  return static_cast<uint8_t>(round_to<F>(std::min(bits ^ sign, to_bits(F::largest))) | (sign >> 24));
}

// The bits of max |x|: as integers NaN > infinity > every finite number, so nothing is lost on the way.
inline uint32_t amax_portable(const float* x) {
  uint32_t amax = 0;
  for (int i = 0; i < kTile; ++i) amax = std::max(amax, to_bits(x[i]) & 0x7fffffffu);
  return amax;
}

inline void column_amax_portable(const float* x, uint32_t* amax) {
  for (int i = 0; i < kTile; ++i) amax[i] = std::max(amax[i], to_bits(x[i]) & 0x7fffffffu);
}

// The scales of 128 columns, and what fp8_avx2.h divides by (where `fast`).
struct ColumnScales {
  alignas(64) float scale[kTile], high[kTile], low[kTile];
  bool fast;
};

template <class F>
void encode_portable(const float* x, float scale, uint8_t* y) {
  for (int i = 0; i < kTile; ++i) y[i] = encode_one<F>(x[i], scale);
}

// `tiles` whole tiles of FP32 or BF16 numbers, with their scales.
template <class F, class Number>
void quantize_tiles_portable(const Number* x, int64_t tiles, bool power_of_two, uint8_t* y, float* scale) {
  for (int64_t tile = 0; tile < tiles; ++tile, x += kTile, y += kTile) {
    float numbers[kTile];
    for (int i = 0; i < kTile; ++i) numbers[i] = number_of(x[i]);
    const float s = scale[tile] = scale_of(amax_portable(numbers), F::largest, F::smallest_scale, power_of_two);
    if (s != s)
      std::memset(y, kNaN, kTile);
    else
      encode_portable<F>(numbers, s, y);
  }
}

template <class F>
void encode_columns_portable(const float* x, const ColumnScales& columns, uint8_t* y) {
  for (int i = 0; i < kTile; ++i) y[i] = encode_one<F>(x[i], columns.scale[i]);
}

template <class F>
inline float decode_one(uint8_t byte) {
  constexpr uint32_t first_normal = 1u << (23 - F::shift), infinity = 0x7cu;
  const uint32_t a = byte & 0x7fu, sign = static_cast<uint32_t>(byte & 0x80u) << 24;
  uint32_t bits;
  if (F::shift == E4M3::shift ? a == kNaN : a > infinity) {
    bits = 0x7fc00000u;
  } else if (F::shift == E5M2::shift && a == infinity) {
    bits = kInfinity;
  } else if (a < first_normal) {
    bits = to_bits(static_cast<float>(a) * (F::shift == E4M3::shift ? 0x1p-9f : 0x1p-16f));
  } else {
    bits = (a << F::shift) + (F::rebias << 23);
  }
  return from_bits(bits | sign);
}

template <class F>
void decode_portable(const uint8_t* y, float scale, float* x) {
  for (int i = 0; i < kTile; ++i) x[i] = decode_one<F>(y[i]) * scale;
}

inline void widen_portable(const uint16_t* x, float* y) {
  for (int i = 0; i < kTile; ++i) y[i] = number_of(x[i]);
}

// To BF16 and back, to nearest, ties to even; NaN stays NaN.
inline void round_bf16_portable(float* x) {
  for (int i = 0; i < kTile; ++i) {
    const uint32_t bits = to_bits(x[i]);
    if (x[i] == x[i]) x[i] = from_bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  }
}

inline void prepare_portable(ColumnScales&) {}

inline void transpose_portable(const uint8_t* x, uint8_t* y) {  // [128, 128]
  for (int r = 0; r < kTile; ++r)
    for (int c = 0; c < kTile; ++c) y[c * kTile + r] = x[r * kTile + c];
}

}  // namespace

#include "fp8_avx512.h"

namespace {

// ---- which loops, which format ------------------------------------------------------------------------------------

struct Loops {
  uint32_t (*amax)(const float*);
  void (*column_amax)(const float*, uint32_t*);
  void (*encode)(const float*, float, uint8_t*);
  void (*prepare)(ColumnScales&);
  void (*encode_columns)(const float*, const ColumnScales&, uint8_t*);
  void (*decode)(const uint8_t*, float, float*);
  void (*widen)(const uint16_t*, float*);
  void (*round_bf16)(float*);
  void (*transpose)(const uint8_t*, uint8_t*);
  void (*quantize_tiles)(const float*, int64_t, bool, uint8_t*, float*);
  void (*quantize_tiles_bf16)(const uint16_t*, int64_t, bool, uint8_t*, float*);
  float largest, smallest_scale;

  float scale(uint32_t amax, bool power_of_two) const {
    return scale_of(amax, largest, smallest_scale, power_of_two);
  }
};

template <class F>
Loops loops_of(bool portable) {
#if defined(__x86_64__)
  const bool wide = has_avx512();
  if (!portable && has_avx2())
    return {amax_avx2, column_amax_avx2, encode_avx2<F>, prepare_avx2, encode_columns_avx2<F>, decode_avx2<F>,
            widen_avx2, round_bf16_avx2, transpose_avx2,
            wide ? quantize_tiles_avx512<F, float> : quantize_tiles_avx2<F, float>,
            wide ? quantize_tiles_avx512<F, uint16_t> : quantize_tiles_avx2<F, uint16_t>, F::largest, F::smallest_scale};
#endif
  return {amax_portable, column_amax_portable, encode_portable<F>, prepare_portable, encode_columns_portable<F>,
          decode_portable<F>, widen_portable, round_bf16_portable, transpose_portable,
          quantize_tiles_portable<F, float>, quantize_tiles_portable<F, uint16_t>, F::largest, F::smallest_scale};
}

inline Loops loops_of(int e5m2, int portable) {
  return e5m2 ? loops_of<E5M2>(portable != 0) : loops_of<E4M3>(portable != 0);
}

// ---- tiles of any length ------------------------------------------------------------------------------------------

inline void encode_tile(const Loops& loops, const float* x, float scale, uint8_t* y, int64_t count) {
  uint8_t buffer[kTile];
  uint8_t* bytes = count == kTile ? y : buffer;
  if (scale != scale)
    std::memset(bytes, kNaN, kTile);
  else
    loops.encode(x, scale, bytes);
  if (count != kTile) std::memcpy(y, bytes, count);
}

// A tile, padded with zeros, of which `width` numbers count; with its scale.
inline void quantize_tile(const Loops& loops, const float* x, bool power_of_two, uint8_t* y, float* scale,
                          int64_t width) {
  *scale = loops.scale(loops.amax(x), power_of_two);
  encode_tile(loops, x, *scale, y, width);
}

// A tile of `count` <= 128 numbers as 128 FP32 numbers: in place, or widened and padded with zeros in `buffer`.
inline const float* load_tile(const Loops& loops, const void* x, int bf16, int64_t offset, int64_t count,
                              float* buffer) {
  const float* whole = static_cast<const float*>(x) + offset;
  const uint16_t* half = static_cast<const uint16_t*>(x) + offset;
  if (!bf16 && count == kTile) return whole;
  if (!bf16) {
    std::memcpy(buffer, whole, count * sizeof(float));
    std::fill(buffer + count, buffer + kTile, 0.f);
    return buffer;
  }
  uint16_t padded[kTile] = {};
  if (count != kTile) std::memcpy(padded, half, count * sizeof(uint16_t));
  loops.widen(count == kTile ? half : padded, buffer);
  return buffer;
}

// `count` <= 128 numbers of a tile; what is in `buffer` after them means nothing.
inline const float* decode_tile(const Loops& loops, const uint8_t* y, float scale, int64_t count, float* buffer) {
  uint8_t bytes[kTile] = {};
  if (count != kTile) {
    std::memcpy(bytes, y, count);
    y = bytes;
  }
  loops.decode(y, scale, buffer);
  return buffer;
}

}  // namespace
