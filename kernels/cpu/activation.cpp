// SwiGLU and RMSNorm with the quantisation of their results, as kernels/reference/activation.py specifies, bit for bit:
// FP32, one rounding an operation (the file is compiled without contraction), exp spelled out.
//
// FP32 and BF16 tensors, row-major; `.._bf16` != 0 says which a tensor is, and `bf16` what results are rounded to
// before they are quantised. Formats, units, `lanes` and `threads` as in quantize.cpp.

#include "columns.h"

namespace {

constexpr float kLowest = -87.f, kHighest = 87.f, kLog2E = 1.44269504f, kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kPolynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// ---- portable loops -----------------------------------------------------------------------------------------------

inline float exp_one(float x) {
  if (x != x) return x;
  x = std::min(std::max(x, kLowest), kHighest);
  const float n = (x * kLog2E + 0x1.8p23f) - 0x1.8p23f;  // the nearest integer, half to even
  float r = x - n * kLn2High;
  r = r - n * kLn2Low;
  float p = kPolynomial[0];
  for (int i = 1; i < 6; ++i) p = p * r + kPolynomial[i];
  const float e = p * (r * r) + r + 1.f;
  return from_bits(to_bits(e) + (static_cast<uint32_t>(static_cast<int>(n)) << 23));
}

inline float sigmoid_one(float x) { return 1.f / (1.f + exp_one(-x)); }

void swiglu_portable(const float* gate, const float* up, float* h) {
  for (int i = 0; i < kTile; ++i) h[i] = (gate[i] * sigmoid_one(gate[i])) * up[i];
}

void swiglu_backward_portable(const float* dh, const float* gate, const float* up, float* dgate, float* dup) {
  for (int i = 0; i < kTile; ++i) {
    const float s = sigmoid_one(gate[i]), d = dh[i], u = up[i];
    dup[i] = d * (gate[i] * s);
    dgate[i] = (d * u) * (s * (1.f + gate[i] * (1.f - s)));
  }
}

double squares_portable(const float* x) {
  double sum = 0;
  for (int i = 0; i < kTile; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

void normalise_portable(const float* x, float rstd, const float* weight, bool bf16, float* y) {
  for (int i = 0; i < kTile; ++i) y[i] = x[i] * rstd;
  if (bf16) portable::round_bf16(y);
  for (int i = 0; i < kTile; ++i) y[i] = weight[i] * y[i];
}

// ---- AVX2 loops ---------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
using avx2::as_bits, avx2::as_numbers, avx2::load8;

MEXT_AVX2 inline __m256 exp_lanes(__m256 x) {
  // min and max return their second operand where one is NaN.
  x = _mm256_min_ps(_mm256_set1_ps(kHighest), _mm256_max_ps(_mm256_set1_ps(kLowest), x));
  const __m256 scaled = _mm256_mul_ps(x, _mm256_set1_ps(kLog2E));
  const __m256 n = _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_sub_ps(x, _mm256_mul_ps(n, _mm256_set1_ps(kLn2High)));
  r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(kLn2Low)));
  __m256 p = _mm256_set1_ps(kPolynomial[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(kPolynomial[i]));
  const __m256 e = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r), _mm256_set1_ps(1.f));
  // NaN converts to INT_MIN, which shifts to 0.
  return as_numbers(_mm256_add_epi32(as_bits(e), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

MEXT_AVX2 inline __m256 sigmoid_lanes(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.f), negative = _mm256_xor_ps(x, _mm256_set1_ps(-0.f));
  return _mm256_div_ps(one, _mm256_add_ps(one, exp_lanes(negative)));
}

MEXT_AVX2 void swiglu_avx2(const float* gate, const float* up, float* h) {
  for (int i = 0; i < kTile; i += 8) {
    const __m256 g = load8(gate + i);
    _mm256_storeu_ps(h + i, _mm256_mul_ps(_mm256_mul_ps(g, sigmoid_lanes(g)), load8(up + i)));
  }
}

MEXT_AVX2 void swiglu_backward_avx2(const float* dh, const float* gate, const float* up, float* dgate, float* dup) {
  const __m256 one = _mm256_set1_ps(1.f);
  for (int i = 0; i < kTile; i += 8) {
    const __m256 g = load8(gate + i), d = load8(dh + i), u = load8(up + i), s = sigmoid_lanes(g);
    _mm256_storeu_ps(dup + i, _mm256_mul_ps(d, _mm256_mul_ps(g, s)));
    const __m256 slope = _mm256_mul_ps(s, _mm256_add_ps(one, _mm256_mul_ps(g, _mm256_sub_ps(one, s))));
    _mm256_storeu_ps(dgate + i, _mm256_mul_ps(_mm256_mul_ps(d, u), slope));
  }
}

MEXT_AVX2 double squares_avx2(const float* x) {
  __m256d sum[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
  for (int i = 0; i < kTile; i += 16)
    for (int j = 0; j < 4; ++j) {
      const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * j));
      sum[j] = _mm256_fmadd_pd(v, v, sum[j]);
    }
  double lanes[4];
  _mm256_storeu_pd(lanes, _mm256_add_pd(_mm256_add_pd(sum[0], sum[1]), _mm256_add_pd(sum[2], sum[3])));
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

MEXT_AVX2 void normalise_avx2(const float* x, float rstd, const float* weight, bool bf16, float* y) {
  const __m256 factor = _mm256_set1_ps(rstd);
  for (int i = 0; i < kTile; i += 8) _mm256_storeu_ps(y + i, _mm256_mul_ps(load8(x + i), factor));
  if (bf16) avx2::round_bf16(y);
  for (int i = 0; i < kTile; i += 8) _mm256_storeu_ps(y + i, _mm256_mul_ps(load8(weight + i), load8(y + i)));
}

#endif

struct Activations {
  void (*swiglu)(const float*, const float*, float*);
  void (*swiglu_backward)(const float*, const float*, const float*, float*, float*);
  double (*squares)(const float*);
  void (*normalise)(const float*, float, const float*, bool, float*);
};

Activations activations_of(int lanes) {
#if defined(__x86_64__)
  if (lanes >= avx2::kLanes && has_avx2()) return {swiglu_avx2, swiglu_backward_avx2, squares_avx2, normalise_avx2};
#endif
  return {swiglu_portable, swiglu_backward_portable, squares_portable, normalise_portable};
}

}  // namespace

// gate, up, y: [tokens, columns]; scale: [tokens, ceil(columns / 128)].
extern "C" void mext_swiglu_quantize(const void* gate, const void* up, int gate_bf16, int up_bf16, uint8_t* y,
                                     float* scale, int64_t tokens, int64_t columns, int e5m2, int power_of_two,
                                     int lanes, int threads) {
  const Loops loops = loops_of(e5m2, lanes);
  const Activations activations = activations_of(lanes);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  mext::in_parallel(tokens, threads, [&](int64_t first, int64_t last) {
    float gates[kTile], ups[kTile], h[kTile];
    for (int64_t t = first; t < last; ++t)
      for (int64_t column = 0; column < columns; column += kTile) {
        const int64_t width = std::min<int64_t>(kTile, columns - column), offset = t * columns + column;
        activations.swiglu(load_tile(loops, gate, gate_bf16, offset, width, gates),
                           load_tile(loops, up, up_bf16, offset, width, ups), h);
        if (gate_bf16) loops.round_bf16(h);
        quantize_tile(loops, h, power_of_two != 0, y + offset, scale + t * tiles + column / kTile, width);
      }
  });
}

// dh, gate, up: [tokens, columns]; outputs of dgate and dup as those of mext_quantize_columns.
extern "C" void mext_swiglu_backward_quantize(
    const void* dh, const void* gate, const void* up, int dh_bf16, int gate_bf16, int up_bf16, uint8_t* dgate,
    float* dgate_scale, uint8_t* dgate_t, float* dgate_scale_t, uint8_t* dup, float* dup_scale, uint8_t* dup_t,
    float* dup_scale_t, int64_t tokens, int64_t columns, const int64_t* sizes, int64_t groups, int64_t y_stride,
    int64_t scale_stride, int e5m2, int power_of_two, int lanes, int threads) {
  const Loops loops = loops_of(e5m2, lanes);
  const Activations activations = activations_of(lanes);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const auto load = [&](int64_t t, int64_t column, int64_t width, float* const* buffers, const float** rows) {
    const int64_t offset = t * columns + column, tile = t * tiles + column / kTile;
    float dhs[kTile], gates[kTile], ups[kTile];
    activations.swiglu_backward(load_tile(loops, dh, dh_bf16, offset, width, dhs),
                                load_tile(loops, gate, gate_bf16, offset, width, gates),
                                load_tile(loops, up, up_bf16, offset, width, ups), buffers[0], buffers[1]);
    for (int n = 0; n < 2; ++n) {
      if (dh_bf16) loops.round_bf16(buffers[n]);
      rows[n] = buffers[n];
    }
    quantize_tile(loops, rows[0], power_of_two != 0, dgate + offset, dgate_scale + tile, width);
    quantize_tile(loops, rows[1], power_of_two != 0, dup + offset, dup_scale + tile, width);
  };
  const Transposed to[2] = {{dgate_t, dgate_scale_t, y_stride, scale_stride, power_of_two != 0},
                            {dup_t, dup_scale_t, y_stride, scale_stride, power_of_two != 0}};
  quantize_columns<2>(loops, load, to, tokens, columns, {sizes, groups}, threads);
}

// x, y: [rows, columns]; weight: [columns] FP32; scale: [rows, ceil(columns / 128)]; rstd: [rows].
extern "C" void mext_rms_norm_quantize(const void* x, int bf16, const float* weight, float eps, uint8_t* y,
                                       float* scale, float* rstd, int64_t rows, int64_t columns, int e5m2,
                                       int power_of_two, int lanes, int threads) {
  const Loops loops = loops_of(e5m2, lanes);
  const Activations activations = activations_of(lanes);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  mext::in_parallel(rows, threads, [&](int64_t first, int64_t last) {
    float numbers[kTile], weights[kTile], normed[kTile];
    for (int64_t row = first; row < last; ++row) {
      double sum = 0;
      for (int64_t column = 0; column < columns; column += kTile) {
        const int64_t width = std::min<int64_t>(kTile, columns - column);
        sum += activations.squares(load_tile(loops, x, bf16, row * columns + column, width, numbers));
      }
      const float mean = static_cast<float>(sum / static_cast<double>(columns));
      rstd[row] = 1.f / std::sqrt(mean + eps);
      for (int64_t column = 0; column < columns; column += kTile) {
        const int64_t width = std::min<int64_t>(kTile, columns - column), offset = row * columns + column;
        activations.normalise(load_tile(loops, x, bf16, offset, width, numbers), rstd[row],
                              load_tile(loops, weight, 0, column, width, weights), bf16 != 0, normed);
        if (bf16) loops.round_bf16(normed);
        quantize_tile(loops, normed, power_of_two != 0, y + offset, scale + row * tiles + column / kTile, width);
      }
    }
  });
}
