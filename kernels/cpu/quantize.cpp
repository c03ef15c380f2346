// FP8 quantisation on a CPU: 1x128 tiles and 128x128 blocks, as kernels/reference/quantize.py specifies, bit for bit.
//
// Plain C ABI, no torch headers. Every operator works on a range [first, last) of independent units, so that the caller
// cuts big arrays for its own threads; nothing here starts one. The inner loops always see a whole tile of 128 numbers:
// a partial tile at the end of a row is padded with zeros in a local buffer (zeros never change an amax). Only three
// loops (amax, encode, decode) exist twice, for AVX2 and portable; `portable` != 0 forces the second, for tests.
//
// No operation here depends on denormal numbers: torch.set_flush_denormal(True) does not change a byte (the smallest
// scale is chosen so that what rounds to a nonzero FP8 number is a normal FP32 number).

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define MEXT_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace {

constexpr int kTile = 128;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint8_t kNaN = 0x7f;  // a NaN in both formats

// `magic` + a rounds a, below the smallest normal number, to a multiple of the smallest subnormal (ties to even).
struct E4M3 {
  static constexpr int shift = 20;         // FP32 has this many more mantissa bits
  static constexpr uint32_t rebias = 120;  // difference of the exponent biases
  static constexpr float largest = 448.f, smallest_scale = 0x1p-116f, magic = 0x1p14f;
};
struct E5M2 {
  static constexpr int shift = 21;
  static constexpr uint32_t rebias = 112;
  static constexpr float largest = 57344.f, smallest_scale = 0x1p-109f, magic = 0x1p7f;
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

// ---- portable loops -----------------------------------------------------------------------------------------------

// The bits of max |x|: as integers NaN > infinity > every finite number, so nothing is lost on the way.
uint32_t amax_portable(const float* x) {
  uint32_t amax = 0;
  for (int i = 0; i < kTile; ++i) amax = std::max(amax, to_bits(x[i]) & 0x7fffffffu);
  return amax;
}

template <class F>
void encode_portable(const float* x, float scale, uint8_t* y) {
  for (int i = 0; i < kTile; ++i) {
    const float v = std::min(std::max(x[i] / scale, -F::largest), F::largest);
    const uint32_t sign = to_bits(v) & 0x80000000u, a = to_bits(v) ^ sign, odd = (a >> F::shift) & 1u;
    const uint32_t normal = (a + odd + ((1u << (F::shift - 1)) - 1u) - (F::rebias << 23)) >> F::shift;
    const uint32_t subnormal = to_bits(from_bits(a) + F::magic) - to_bits(F::magic);
    y[i] = static_cast<uint8_t>((a < ((F::rebias + 1) << 23) ? subnormal : normal) | (sign >> 24));
  }
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

// ---- AVX2 loops ---------------------------------------------------------------------------------------------------

#if defined(__x86_64__)

MEXT_AVX2 uint32_t amax_avx2(const float* x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i amax = _mm256_setzero_si256();
  for (int i = 0; i < kTile; i += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    amax = _mm256_max_epi32(amax, _mm256_and_si256(v, magnitude));
  }
  uint32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), amax);
  return *std::max_element(lanes, lanes + 8);
}

// Eight quotients to eight FP8 numbers, one in the low byte of each 32-bit lane.
template <class F>
MEXT_AVX2 inline __m256i encode_lanes(__m256 v) {
  v = _mm256_max_ps(_mm256_min_ps(v, _mm256_set1_ps(F::largest)), _mm256_set1_ps(-F::largest));
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MIN)), a = _mm256_xor_si256(bits, sign);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(a, F::shift), _mm256_set1_epi32(1));
  const uint32_t offset = ((1u << (F::shift - 1)) - 1u) - (F::rebias << 23);
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(a, odd), _mm256_set1_epi32(static_cast<int>(offset)));
  const __m256i normal = _mm256_srli_epi32(rounded, F::shift);
  const __m256 magic = _mm256_set1_ps(F::magic);
  const __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(a), magic);
  const __m256i subnormal = _mm256_sub_epi32(_mm256_castps_si256(sum), _mm256_castps_si256(magic));
  const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>((F::rebias + 1) << 23)), a);
  return _mm256_or_si256(_mm256_blendv_epi8(normal, subnormal, small), _mm256_srli_epi32(sign, 24));
}

template <class F>
MEXT_AVX2 void encode_avx2(const float* x, float scale, uint8_t* y) {
  const __m256 divisor = _mm256_set1_ps(scale);
  const __m256i unshuffle = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int i = 0; i < kTile; i += 32) {
    __m256i v[4];
    for (int j = 0; j < 4; ++j) v[j] = encode_lanes<F>(_mm256_div_ps(_mm256_loadu_ps(x + i + 8 * j), divisor));
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), _mm256_permutevar8x32_epi32(bytes, unshuffle));
  }
}

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

#endif

// ---- which loops, which format ------------------------------------------------------------------------------------

struct Loops {
  uint32_t (*amax)(const float*);
  void (*encode)(const float*, float, uint8_t*);
  void (*decode)(const uint8_t*, float, float*);
  float largest, smallest_scale;
};

template <class F>
Loops loops_of(bool portable) {
#if defined(__x86_64__)
  if (!portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
    return {amax_avx2, encode_avx2<F>, decode_avx2<F>, F::largest, F::smallest_scale};
#endif
  return {amax_portable, encode_portable<F>, decode_portable<F>, F::largest, F::smallest_scale};
}

Loops loops_of(int e5m2, int portable) {
  return e5m2 ? loops_of<E5M2>(portable != 0) : loops_of<E4M3>(portable != 0);
}

// NaN for a block that holds NaN or an infinity; else amax / largest, not below the smallest scale, and rounded up to a
// power of two if asked.
float scale_of(const Loops& loops, uint32_t amax, bool power_of_two) {
  if (amax >= kInfinity) return from_bits(0x7fc00000u);
  const float scale = std::max(from_bits(amax) / loops.largest, loops.smallest_scale);
  if (!power_of_two) return scale;
  const uint32_t bits = to_bits(scale);
  return from_bits(((bits >> 23) + ((bits & 0x7fffffu) != 0)) << 23);
}

void encode_tile(const Loops& loops, const float* x, float scale, uint8_t* y, int64_t count) {
  uint8_t buffer[kTile];
  uint8_t* bytes = count == kTile ? y : buffer;
  if (scale != scale)
    std::memset(bytes, kNaN, kTile);
  else
    loops.encode(x, scale, bytes);
  if (count != kTile) std::memcpy(y, bytes, count);
}

// A tile of `count` <= 128 numbers as 128 FP32 numbers: in place, or widened and padded with zeros in `buffer`.
const float* load_tile(const void* x, int bf16, int64_t offset, int64_t count, float* buffer) {
  if (!bf16 && count == kTile) return static_cast<const float*>(x) + offset;
  if (bf16) {
    const uint16_t* half = static_cast<const uint16_t*>(x) + offset;
    for (int64_t i = 0; i < count; ++i) buffer[i] = from_bits(static_cast<uint32_t>(half[i]) << 16);
  } else {
    std::memcpy(buffer, static_cast<const float*>(x) + offset, count * sizeof(float));
  }
  std::fill(buffer + count, buffer + kTile, 0.f);
  return buffer;
}

// `count` <= 128 numbers of a tile; what is in `buffer` after them means nothing.
const float* decode_tile(const Loops& loops, const uint8_t* y, float scale, int64_t count, float* buffer) {
  uint8_t bytes[kTile] = {};
  if (count != kTile) {
    std::memcpy(bytes, y, count);
    y = bytes;
  }
  loops.decode(y, scale, buffer);
  return buffer;
}

// Tiles along the tokens of a [T, K] matrix whose rows come from `row(t, column, count, buffer)`; the result is [K, T].
// `first`, `last` count tiles of 128 columns.
template <class Row>
void quantize_columns(const Loops& loops, Row row, uint8_t* y, float* scale, int64_t first, int64_t last,
                      int64_t tokens, int64_t columns, int64_t y_stride, int64_t scale_stride, bool power_of_two) {
  constexpr int stride = kTile + 16;  // not a power of two: the columns must not share cache sets
  alignas(64) float transposed[kTile * stride];
  float buffer[kTile];
  for (int64_t c0 = first * kTile; c0 < std::min(last * kTile, columns); c0 += kTile) {
    const int64_t width = std::min<int64_t>(kTile, columns - c0);
    for (int64_t t0 = 0; t0 < tokens; t0 += kTile) {
      const int64_t height = std::min<int64_t>(kTile, tokens - t0);
      if (height < kTile) std::fill(transposed, transposed + kTile * stride, 0.f);
      for (int64_t t = 0; t < height; ++t) {
        const float* x = row(t0 + t, c0, width, buffer);
        for (int64_t c = 0; c < width; ++c) transposed[c * stride + t] = x[c];
      }
      for (int64_t c = 0; c < width; ++c) {
        const float* tile = transposed + c * stride;
        const float s = scale_of(loops, loops.amax(tile), power_of_two);
        scale[(c0 + c) * scale_stride + t0 / kTile] = s;
        encode_tile(loops, tile, s, y + (c0 + c) * y_stride + t0, height);
      }
    }
  }
}

}  // namespace

// ---- the C ABI ----------------------------------------------------------------------------------------------------
// x is FP32, or BF16 where `bf16` != 0; the format is E4M3, or E5M2 where `e5m2` != 0. All arrays are row-major.

// x, y: [matrices, rows, columns]; scale: [matrices, ceil(rows / block_rows), ceil(columns / 128)]; block_rows 1 or 128.
// A unit is one row of scales.
extern "C" void mext_quantize(const void* x, int bf16, uint8_t* y, float* scale, int64_t first, int64_t last,
                              int64_t rows, int64_t columns, int64_t block_rows, int e5m2, int power_of_two,
                              int portable) {
  const Loops loops = loops_of(e5m2, portable);
  const int64_t block_count = (rows + block_rows - 1) / block_rows, tiles = (columns + kTile - 1) / kTile;
  float buffer[kTile];
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t first_row = unit % block_count * block_rows, base = unit / block_count * rows + first_row;
    const int64_t height = std::min(block_rows, rows - first_row);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = tile * kTile, width = std::min<int64_t>(kTile, columns - column);
      const float* numbers = nullptr;
      uint32_t amax = 0;
      for (int64_t r = 0; r < height; ++r) {
        numbers = load_tile(x, bf16, (base + r) * columns + column, width, buffer);
        amax = std::max(amax, loops.amax(numbers));
      }
      const float s = scale_of(loops, amax, power_of_two != 0);
      scale[unit * tiles + tile] = s;
      for (int64_t r = 0; r < height; ++r) {
        const int64_t offset = (base + r) * columns + column;
        if (height > 1) numbers = load_tile(x, bf16, offset, width, buffer);
        encode_tile(loops, numbers, s, y + offset, width);
      }
    }
  }
}

// y: [matrices, rows, columns] with `y_stride` between rows; scale: [matrices, ceil(rows / block_rows), ..] with
// `scale_stride`; x: [matrices, rows, columns], dense. A unit is one row of y.
extern "C" void mext_dequantize(const uint8_t* y, const float* scale, float* x, int64_t first, int64_t last,
                                int64_t rows, int64_t columns, int64_t block_rows, int64_t y_stride,
                                int64_t scale_stride, int e5m2, int portable) {
  const Loops loops = loops_of(e5m2, portable);
  const int64_t block_count = (rows + block_rows - 1) / block_rows;
  float buffer[kTile];
  for (int64_t unit = first; unit < last; ++unit) {
    const float* row_scale = scale + (unit / rows * block_count + unit % rows / block_rows) * scale_stride;
    const uint8_t* bytes = y + unit * y_stride;
    float* out = x + unit * columns;
    for (int64_t column = 0; column < columns; column += kTile) {
      const int64_t width = std::min<int64_t>(kTile, columns - column);
      if (width == kTile)
        loops.decode(bytes + column, row_scale[column / kTile], out + column);
      else
        std::memcpy(out + column, decode_tile(loops, bytes + column, row_scale[column / kTile], width, buffer),
                    width * sizeof(float));
    }
  }
}

// x: [tokens, columns]; y: [columns, tokens] with `y_stride`; scale: [columns, ceil(tokens / 128)] with `scale_stride`.
// A unit is 128 columns.
extern "C" void mext_quantize_transposed(const void* x, int bf16, uint8_t* y, float* scale, int64_t first,
                                         int64_t last, int64_t tokens, int64_t columns, int64_t y_stride,
                                         int64_t scale_stride, int e5m2, int power_of_two, int portable) {
  const auto row = [=](int64_t t, int64_t column, int64_t width, float* buffer) {
    return load_tile(x, bf16, t * columns + column, width, buffer);
  };
  quantize_columns(loops_of(e5m2, portable), row, y, scale, first, last, tokens, columns, y_stride, scale_stride,
                   power_of_two != 0);
}

// As mext_quantize_transposed with power-of-two scales, from x: [tokens, columns] already in 1x128 tiles with scales
// [tokens, ceil(columns / 128)], both dense.
extern "C" void mext_requantize_transposed(const uint8_t* x, const float* x_scale, uint8_t* y, float* scale,
                                           int64_t first, int64_t last, int64_t tokens, int64_t columns,
                                           int64_t y_stride, int64_t scale_stride, int e5m2, int portable) {
  const Loops loops = loops_of(e5m2, portable);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const auto row = [=, &loops](int64_t t, int64_t column, int64_t width, float* buffer) {
    return decode_tile(loops, x + t * columns + column, x_scale[t * tiles + column / kTile], width, buffer);
  };
  quantize_columns(loops, row, y, scale, first, last, tokens, columns, y_stride, scale_stride, true);
}
