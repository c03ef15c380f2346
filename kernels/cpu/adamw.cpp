// One AdamW step on a CPU, as kernels/reference/adamw.py specifies, bit for bit.
//
// Plain C ABI, no torch headers. Parameters, gradients and moments are each FP32 or BF16; the arithmetic is FP32 with
// one rounding an operation: no fused multiply-add, which is why the AVX2 loop does not ask for "fma". `lanes` below 8
// forces the other loop, for tests.

#include "parallel.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define MEXT_AVX2 __attribute__((target("avx2")))
#endif

namespace {

struct BF16 {
  uint16_t bits;
};

struct Scalars {  // names as in kernels/reference/adamw.py
  float beta1, new1, beta2, new2, eps, decay, l2, step_size, rescale;
};

// ---- portable loop ------------------------------------------------------------------------------------------------

inline float load(const float* x) { return *x; }

inline float load(const BF16* x) {
  const uint32_t bits = static_cast<uint32_t>(x->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void store(float* x, float value) { *x = value; }

inline void store(BF16* x, float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  x->bits = nan ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class P, class G, class M>
void step_portable(P* param, const G* grad, M* exp_avg, M* exp_avg_sq, int64_t first, int64_t last, const Scalars& s) {
  for (int64_t i = first; i < last; ++i) {
    const float p = load(param + i);
    float g = load(grad + i);
    if (s.l2 != 0.f) g = g + p * s.l2;
    const float m = load(exp_avg + i) * s.beta1 + g * s.new1;
    const float v = load(exp_avg_sq + i) * s.beta2 + (g * g) * s.new2;
    const float denominator = std::sqrt(v) * s.rescale + s.eps;
    store(param + i, p * s.decay - (m / denominator) * s.step_size);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
  }
}

// ---- AVX2 loop ----------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
MEXT_AVX2 inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }

MEXT_AVX2 inline __m256 load8(const BF16* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

MEXT_AVX2 inline void store8(float* x, __m256 value) { _mm256_storeu_ps(x, value); }

MEXT_AVX2 inline void store8(BF16* x, __m256 value) {
  const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(packed));
}

template <class P, class G, class M>
MEXT_AVX2 void step_avx2(P* param, const G* grad, M* exp_avg, M* exp_avg_sq, int64_t first, int64_t last,
                         const Scalars& s) {
  const __m256 beta1 = _mm256_set1_ps(s.beta1), new1 = _mm256_set1_ps(s.new1);
  const __m256 beta2 = _mm256_set1_ps(s.beta2), new2 = _mm256_set1_ps(s.new2);
  const __m256 eps = _mm256_set1_ps(s.eps), decay = _mm256_set1_ps(s.decay), l2 = _mm256_set1_ps(s.l2);
  const __m256 step_size = _mm256_set1_ps(s.step_size), rescale = _mm256_set1_ps(s.rescale);
  int64_t i = first;
  for (; i + 8 <= last; i += 8) {
    const __m256 p = load8(param + i);
    __m256 g = load8(grad + i);
    if (s.l2 != 0.f) g = _mm256_add_ps(g, _mm256_mul_ps(p, l2));
    const __m256 m = _mm256_add_ps(_mm256_mul_ps(load8(exp_avg + i), beta1), _mm256_mul_ps(g, new1));
    const __m256 v = _mm256_add_ps(_mm256_mul_ps(load8(exp_avg_sq + i), beta2),
                                   _mm256_mul_ps(_mm256_mul_ps(g, g), new2));
    const __m256 denominator = _mm256_add_ps(_mm256_mul_ps(_mm256_sqrt_ps(v), rescale), eps);
    const __m256 update = _mm256_mul_ps(_mm256_div_ps(m, denominator), step_size);
    store8(param + i, _mm256_sub_ps(_mm256_mul_ps(p, decay), update));
    store8(exp_avg + i, m);
    store8(exp_avg_sq + i, v);
  }
  step_portable(param, grad, exp_avg, exp_avg_sq, i, last, s);
}
#endif

template <class P, class G, class M>
void step(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, int64_t first, int64_t last,
          const Scalars& s, int lanes) {
  auto* p = static_cast<P*>(param);
  auto* g = static_cast<const G*>(grad);
  auto *m = static_cast<M*>(exp_avg), *v = static_cast<M*>(exp_avg_sq);
#if defined(__x86_64__)
  if (lanes >= 8 && __builtin_cpu_supports("avx2")) return step_avx2(p, g, m, v, first, last, s);
#endif
  step_portable(p, g, m, v, first, last, s);
}

template <class P, class G, class... Rest>
void choose_moments(int moments_bf16, Rest... rest) {
  moments_bf16 ? step<P, G, BF16>(rest...) : step<P, G, float>(rest...);
}

template <class P, class... Rest>
void choose_grad(int grad_bf16, int moments_bf16, Rest... rest) {
  grad_bf16 ? choose_moments<P, BF16>(moments_bf16, rest...) : choose_moments<P, float>(moments_bf16, rest...);
}

}  // namespace

// param, grad, exp_avg, exp_avg_sq: dense arrays of `count` numbers, updated in place on `threads` threads.
extern "C" void mext_adamw(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, int64_t count,
                           int param_bf16, int grad_bf16, int moments_bf16, float beta1, float new1, float beta2,
                           float new2, float eps, float decay, float l2, float step_size, float rescale,
                           int lanes, int threads) {
  const Scalars s{beta1, new1, beta2, new2, eps, decay, l2, step_size, rescale};
  mext::in_parallel(count, threads, [&](int64_t first, int64_t last) {
    if (param_bf16)
      choose_grad<BF16>(grad_bf16, moments_bf16, param, grad, exp_avg, exp_avg_sq, first, last, s, lanes);
    else
      choose_grad<float>(grad_bf16, moments_bf16, param, grad, exp_avg, exp_avg_sq, first, last, s, lanes);
  });
}
