// Tiles of 128 numbers to FP8 and back, as kernels/reference/quantize.py specifies, bit for bit: what the kernels in
// this folder are made of. The inner loops exist twice, portable (here) and for vectors (fp8_lanes.h, of two widths),
// and `Loops` is one set of them. A kernel's argument `lanes`, for tests: the most FP32 numbers a vector may have, 16
// for AVX-512, 8 for AVX2, 1 for the portable loops.
//
// The loops always see a whole tile: a partial one at the end of a row is padded with zeros in a buffer (zeros never
// change an amax). None depends on denormal numbers: torch.set_flush_denormal(True) does not change a byte (the
// smallest scale is chosen so that what rounds to a nonzero FP8 number is a normal FP32 number).

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

// The scales of 128 columns, and what vectors are divided by (where `fast`).
struct ColumnScales {
  alignas(64) float scale[kTile], high[kTile], low[kTile];
  bool fast;
};

// `height` rows of 128 numbers that lie `stride` apart, to be copied close together; those from `next` on will be next.
template <class Number>
struct BlockRead {
  const Number *x, *next;
  int64_t stride, height;
  Number* copy;
};

// Such a copy, to be written as bytes in rows `stride` apart.
template <class Number>
struct BlockWrite {
  const Number* x;
  float scale;
  bool past_cache;
  uint8_t* y;
  int64_t stride, height;
};

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

namespace portable {

// The bits of max |x|: as integers NaN > infinity > every finite number, so nothing is lost on the way.
inline void raise_amax(uint32_t& amax, float x) { amax = std::max(amax, to_bits(x) & 0x7fffffffu); }

inline uint32_t amax(const float* x) {
  uint32_t amax = 0;
  for (int i = 0; i < kTile; ++i) raise_amax(amax, x[i]);
  return amax;
}

inline void column_amax(const float* x, uint32_t* amax) {
  for (int i = 0; i < kTile; ++i) raise_amax(amax[i], x[i]);
}

template <class F>
void encode(const float* x, float scale, uint8_t* y) {
  for (int i = 0; i < kTile; ++i) y[i] = encode_one<F>(x[i], scale);
}

template <class F, class Number>
void encode_any(const Number* x, float scale, uint8_t* y) {  // whatever the scale is
  for (int i = 0; i < kTile; ++i) y[i] = scale == scale ? encode_one<F>(number_of(x[i]), scale) : kNaN;
}

inline void prepare(ColumnScales&) {}

template <class F>
void encode_columns(const float* x, const ColumnScales& columns, uint8_t* y) {
  for (int i = 0; i < kTile; ++i) y[i] = encode_one<F>(x[i], columns.scale[i]);
}

template <class F>
void decode(const uint8_t* y, float scale, float* x) {
  for (int i = 0; i < kTile; ++i) x[i] = decode_one<F>(y[i]) * scale;
}

inline void widen(const uint16_t* x, float* y) {
  for (int i = 0; i < kTile; ++i) y[i] = number_of(x[i]);
}

// To BF16 and back, to nearest, ties to even; NaN stays NaN.
inline void round_bf16(float* x) {
  for (int i = 0; i < kTile; ++i) {
    const uint32_t bits = to_bits(x[i]);
    if (x[i] == x[i]) x[i] = from_bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  }
}

inline void transpose(const uint8_t* x, uint8_t* y) {  // [128, 128]
  for (int r = 0; r < kTile; ++r)
    for (int c = 0; c < kTile; ++c) y[c * kTile + r] = x[r * kTile + c];
}

template <class F, class Number>
void write_block(const BlockWrite<Number>& to) {
  for (int64_t r = 0; r < to.height; ++r) encode_any<F>(to.x + r * kTile, to.scale, to.y + r * to.stride);
}

template <class F, class Number>
uint32_t turn_block(const BlockRead<Number>& from, const BlockWrite<Number>& to) {
  uint32_t amax = 0;
  if (from.x)
    for (int64_t r = 0; r < from.height; ++r)
      for (int i = 0; i < kTile; ++i)
        raise_amax(amax, number_of(from.copy[r * kTile + i] = from.x[r * from.stride + i]));
  if (to.y) write_block<F>(to);
  return amax;
}

template <class F, class Number>
void quantize_tiles(const Number* x, int64_t tiles, bool power_of_two, bool, uint8_t* y, float* scale) {
  for (int64_t tile = 0; tile < tiles; ++tile, x += kTile, y += kTile) {
    uint32_t amax = 0;
    for (int i = 0; i < kTile; ++i) raise_amax(amax, number_of(x[i]));
    scale[tile] = scale_of(amax, F::largest, F::smallest_scale, power_of_two);
    encode_any<F>(x, scale[tile], y);
  }
}

}  // namespace portable

}  // namespace

#include "fp8_avx.h"

namespace {

// ---- which loops, which format ------------------------------------------------------------------------------------

// Of whole tiles and blocks. `past_cache`: y is written past the caches, in pieces of 64 bytes at multiples of 64, and
// is there for other threads after wait_for_writes().
template <class Number>
struct TileLoops {
  // `tiles` tiles one after the other, with their scales.
  void (*quantize_tiles)(const Number* x, int64_t tiles, bool power_of_two, bool past_cache, uint8_t* y, float* scale);
  // Reads one block, of which it returns the bits of the largest magnitude, and writes another; either may be absent.
  uint32_t (*turn_block)(const BlockRead<Number>&, const BlockWrite<Number>&);
};

inline void wait_for_writes() {  // once a thread: once a block it made blocks of FP32 take 1.2 times as long
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

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
  TileLoops<float> whole;
  TileLoops<uint16_t> half;
  float largest, smallest_scale;

  float scale(uint32_t amax, bool power_of_two) const {
    return scale_of(amax, largest, smallest_scale, power_of_two);
  }
  const TileLoops<float>& of(const float*) const { return whole; }
  const TileLoops<uint16_t>& of(const uint16_t*) const { return half; }
};

template <class F>
Loops loops_of(int lanes) {
#if defined(__x86_64__)
  if (lanes >= avx512::kLanes && has_avx512()) {
    using namespace avx512;
    return {amax, column_amax, encode<F>, prepare, encode_columns<F>, decode<F>, widen, avx2::round_bf16,
            avx2::transpose, {quantize_tiles<F, float>, turn_block<F, float>},
            {quantize_tiles<F, uint16_t>, turn_block<F, uint16_t>}, F::largest,
            F::smallest_scale};
  }
  if (lanes >= avx2::kLanes && has_avx2()) {
    using namespace avx2;
    return {amax, column_amax, encode<F>, prepare, encode_columns<F>, decode<F>, widen, round_bf16, transpose,
            {quantize_tiles<F, float>, turn_block<F, float>},
            {quantize_tiles<F, uint16_t>, turn_block<F, uint16_t>}, F::largest,
            F::smallest_scale};
  }
#endif
  using namespace portable;
  return {amax, column_amax, encode<F>, prepare, encode_columns<F>, decode<F>, widen, round_bf16, transpose,
          {quantize_tiles<F, float>, turn_block<F, float>},
          {quantize_tiles<F, uint16_t>, turn_block<F, uint16_t>}, F::largest,
          F::smallest_scale};
}

inline Loops loops_of(int e5m2, int lanes) { return e5m2 ? loops_of<E5M2>(lanes) : loops_of<E4M3>(lanes); }

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
