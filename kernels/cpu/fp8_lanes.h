// The loops of fp8.h with vectors of `kLanes` FP32 numbers. No #pragma once: fp8_avx.h includes this once for every
// width, in a namespace and with names of that width (Floats, Ints, Halves; V(operation), H(operation), MEXT_TARGET).

MEXT_TARGET inline Ints as_bits(Floats v) { return reinterpret_cast<Ints>(v); }
MEXT_TARGET inline Floats as_numbers(Ints v) { return reinterpret_cast<Floats>(v); }

template <class Number>
constexpr int kEach = static_cast<int>(sizeof(Ints) / sizeof(Number));  // numbers in a vector

// ---- largest magnitudes -------------------------------------------------------------------------------------------

MEXT_TARGET inline Ints larger(Ints a, Ints x, float) {
  return V(max_epu32)(a, x & V(set1_epi32)(0x7fffffff));
}
MEXT_TARGET inline Ints larger(Ints a, Ints x, uint16_t) {
  return V(max_epu16)(a, x & V(set1_epi16)(0x7fff));
}

template <class Number>
MEXT_TARGET inline uint32_t amax_tile(const Number* x) {
  Ints amax[2] = {};
#pragma GCC unroll 4
  for (int i = 0; i < kTile; i += 2 * kEach<Number>)
    for (int j = 0; j < 2; ++j) amax[j] = larger(amax[j], load(x + i + j * kEach<Number>), Number{});
  return largest(larger(amax[0], amax[1], Number{}), Number{});
}

MEXT_TARGET inline uint32_t amax(const float* x) { return amax_tile(x); }

MEXT_TARGET inline void column_amax(const float* x, uint32_t* amax) {
  for (int i = 0; i < kTile; i += kLanes) store(amax + i, larger(load(amax + i), load(x + i), 0.f));
}

// ---- division -----------------------------------------------------------------------------------------------------

// x / scale rounded to FP32 as a division rounds it, in two operations: with high = RN(1 / scale) and low what that
// lacks, the FMA of x * high and RN(x * low). For every scale and every x next to a boundary between two FP8 numbers
// (exponents apart: 9.4e8 pairs) this was compared with the division: the one that fails has a scale whose mantissa is
// all ones. Scales above 2^100, whose `low` may be denormal, are left to the division too. With powers of two `low` is
// 0.
struct Divisor {
  Floats high, low;
};

MEXT_TARGET inline Divisor divisor_of(Floats scale) {
  const Floats one = V(set1_ps)(1.f), high = one / scale;
  return {high, V(fnmadd_ps)(high, scale, one) * high};
}

MEXT_TARGET inline Floats divide(Floats x, Divisor d) { return V(fmadd_ps)(x, d.high, x * d.low); }

struct OneDivisor {
  Divisor divisor;
  MEXT_TARGET Divisor operator()(int) const { return divisor; }
};

struct ColumnDivisors {
  const float *high, *low;
  MEXT_TARGET Divisor operator()(int j) const {
    return {V(loadu_ps)(high + kLanes * j), V(loadu_ps)(low + kLanes * j)};
  }
};

MEXT_TARGET inline void prepare(ColumnScales& columns) {
  columns.fast = true;
  for (int i = 0; i < kTile; ++i) columns.fast &= divides_fast(columns.scale[i]);
  for (int i = 0; i < kTile; i += kLanes) {
    const Divisor d = divisor_of(V(loadu_ps)(columns.scale + i));
    V(storeu_ps)(columns.high + i, d.high);
    V(storeu_ps)(columns.low + i, d.low);
  }
}

// ---- encoding -----------------------------------------------------------------------------------------------------

// As round_to: magnitudes to their codes, plus a constant, times 2^(shift - 16). The upper half of the sum's bits holds
// the exponent of the magic number, the lower the steps; madd adds the one to the other.
template <class F>
MEXT_TARGET inline Ints code_lanes(Floats a) {
  const Ints smallest = V(set1_epi32)(static_cast<int>((F::rebias + 1) << 23));
  const Ints infinity = V(set1_epi32)(static_cast<int>(kInfinity));
  const Floats exponent = as_numbers(V(max_epi32)(as_bits(a), smallest) & infinity);
  const Ints sum = as_bits(V(fmadd_ps)(exponent, V(set1_ps)(1 << F::shift), a));
  return V(madd_epi16)(sum, V(set1_epi32)((1 << 16) | (1 << (F::shift - 16))));
}

template <class F>
MEXT_TARGET inline Ints finish_codes(Ints codes) {  // halves: without the constant and the factor
  constexpr int constant = static_cast<int>(F::rebias + 1 + F::shift) << 7;
  return V(srli_epi16)(V(sub_epi16)(codes, V(set1_epi16)(constant)), F::shift - 16);
}

// As many numbers as a vector has bytes; `divisor(j)` is that of the j-th kLanes. Packing keeps signs, for it
// saturates.
template <class F, class Divisors>
MEXT_TARGET inline Ints encode_vector(const float* x, const Divisors& divisor) {
  const Ints magnitude = V(set1_epi32)(0x7fffffff);
  Ints bits[4], codes[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    bits[j] = load(x + kLanes * j);
    codes[j] = code_lanes<F>(divide(as_numbers(bits[j] & magnitude), divisor(j)));
  }
  const Ints bytes = V(packus_epi16)(finish_codes<F>(V(packus_epi32)(codes[0], codes[1])),
                                     finish_codes<F>(V(packus_epi32)(codes[2], codes[3])));
  const Ints signs = V(packs_epi16)(V(packs_epi32)(bits[0], bits[1]), V(packs_epi32)(bits[2], bits[3]));
  return in_order_of_floats(bytes | (signs & V(set1_epi8)(-128)));
}

// The same for BF16 numbers, which are the upper halves of FP32 numbers; one divisor for all.
template <class F>
MEXT_TARGET inline Ints encode_vector(const uint16_t* x, const OneDivisor& divisor) {
  const Ints magnitude = V(set1_epi16)(0x7fff), zero = {};
  Ints bits[2], codes[2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    bits[j] = load(x + 2 * kLanes * j);
    const Ints a = bits[j] & magnitude;
    const Ints first = code_lanes<F>(divide(as_numbers(V(unpacklo_epi16)(zero, a)), divisor(0)));
    const Ints second = code_lanes<F>(divide(as_numbers(V(unpackhi_epi16)(zero, a)), divisor(0)));
    codes[j] = finish_codes<F>(V(packus_epi32)(first, second));
  }
  const Ints bytes = V(packus_epi16)(codes[0], codes[1]), signs = V(packs_epi16)(bits[0], bits[1]);
  return in_order_of_halves(bytes | (signs & V(set1_epi8)(-128)));
}

template <class F, class Number>
MEXT_TARGET inline void encode_tile_by(const Number* x, const OneDivisor& divisor, bool past_cache, uint8_t* y) {
#pragma GCC unroll 4
  for (int i = 0; i < kTile; i += 4 * kLanes) {
    const Ints bytes = encode_vector<F>(x + i, divisor);
    past_cache ? stream(y + i, bytes) : store(y + i, bytes);
  }
}

template <class F>
MEXT_TARGET void encode(const float* x, float scale, uint8_t* y) {
  if (!divides_fast(scale)) return portable::encode<F>(x, scale, y);
  encode_tile_by<F>(x, OneDivisor{divisor_of(V(set1_ps)(scale))}, false, y);
}

template <class F>
MEXT_TARGET void encode_columns(const float* x, const ColumnScales& columns, uint8_t* y) {
  if (!columns.fast) return portable::encode_columns<F>(x, columns, y);
  for (int i = 0; i < kTile; i += 4 * kLanes)
    store(y + i, encode_vector<F>(x + i, ColumnDivisors{columns.high + i, columns.low + i}));
}

// ---- whole tiles and blocks of FP32 or BF16 numbers ---------------------------------------------------------------

// As many tiles at a time as a vector has lanes: their maxima and scales first, then their numbers, for a tile's
// numbers wait for its maximum and two divisions.
struct SomeTiles {
  alignas(64) uint32_t amax[kLanes];
  alignas(64) float scale[kLanes], high[kLanes], low[kLanes];
  int count;

  // The first `most` tiles of x at most: scale_of, for all of them, and the divisors.
  template <class F, class Number>
  MEXT_TARGET void read(const Number* x, int64_t most, bool power_of_two, float* scales_to) {
    count = static_cast<int>(std::min<int64_t>(kLanes, most));
    for (int i = 0; i < kLanes; ++i) amax[i] = i < count ? amax_tile(x + i * kTile) : 0;
    const Ints bits = load(amax), mantissa = V(set1_epi32)(0x7fffff);
    const Floats smallest = V(set1_ps)(F::smallest_scale);
    Ints scales = as_bits(V(max_ps)(as_numbers(bits) / V(set1_ps)(F::largest), smallest));
    if (power_of_two) scales = V(add_epi32)(scales, mantissa) & ~mantissa;
    scales = nan_where_not_finite(bits, scales);
    store(scale, scales);
    const Divisor d = divisor_of(as_numbers(scales));
    V(storeu_ps)(high, d.high);
    V(storeu_ps)(low, d.low);
    std::memcpy(scales_to, scale, count * sizeof(float));
  }
};

// Scales are made one turn before they are used, so that nothing waits for them: 0.074 ns a number for 0.083 (BF16 in
// a cache, AVX-512), 0.135 for 0.157 (AVX2).
template <class F, class Number>
MEXT_TARGET void quantize_tiles(const Number* x, int64_t tiles, bool power_of_two, bool past_cache, uint8_t* y,
                                float* scale) {
  SomeTiles turns[2];
  turns[0].read<F>(x, tiles, power_of_two, scale);
  for (int64_t tile = 0; tile < tiles; tile += kLanes) {
    const SomeTiles& some = turns[tile / kLanes % 2];
    const int64_t after = tile + kLanes;
    if (after < tiles) turns[after / kLanes % 2].read<F>(x + after * kTile, tiles - after, power_of_two, scale + after);
    for (int i = 0; i < some.count; ++i) {
      const Number* numbers = x + (tile + i) * kTile;
      uint8_t* bytes = y + (tile + i) * kTile;
      prefetch_tile(numbers + kTilesAhead * kTile);
      if (divides_fast(some.scale[i]))
        encode_tile_by<F>(numbers, OneDivisor{{V(set1_ps)(some.high[i]), V(set1_ps)(some.low[i])}}, past_cache, bytes);
      else
        portable::encode_any<F>(numbers, some.scale[i], bytes);
    }
  }
}

template <class Number>
MEXT_TARGET inline void read_row(const Number* x, Number* copy, Ints (&amax)[4]) {
#pragma GCC unroll 16
  for (int i = 0; i < kTile / kEach<Number>; ++i) {
    const Ints bits = load(x + i * kEach<Number>);
    amax[i % 4] = larger(amax[i % 4], bits, Number{});
    store(copy + i * kEach<Number>, bits);
  }
}

// In turns, row by row: memory is read while the processor computes, and every line once. Rows whose distance is a
// power of two share so few sets of the cache that a block of FP32 does not stay in it until a second pass: two passes
// over memory took 0.18 ns a number, and this takes 0.14.
template <class F, class Number>
MEXT_TARGET uint32_t turn_block(const BlockRead<Number>& from, const BlockWrite<Number>& to) {
  Ints amax[4] = {};
  const bool fast = to.y && divides_fast(to.scale);
  const OneDivisor divisor{divisor_of(V(set1_ps)(fast ? to.scale : 1.f))};
  const int64_t reads = from.x ? from.height : 0, writes = fast ? to.height : 0;
  for (int64_t r = 0; r < std::max(reads, writes); ++r) {
    if (r < reads) {
      prefetch_tile(from.next + r * from.stride);
      read_row(from.x + r * from.stride, from.copy + r * kTile, amax);
    }
    if (r < writes) encode_tile_by<F>(to.x + r * kTile, divisor, to.past_cache, to.y + r * to.stride);
  }
  if (to.y && !fast) portable::write_block<F>(to);
  const Ints most[2] = {larger(amax[0], amax[1], Number{}), larger(amax[2], amax[3], Number{})};
  return largest(larger(most[0], most[1], Number{}), Number{});
}

// ---- decoding, BF16 -----------------------------------------------------------------------------------------------

// Both formats are the upper part of an FP16 number: E5M2 is its upper byte, E4M3 has one exponent bit less and so
// comes out 2^8 too small. The factor is undone before the scale, whose product with 2^8 could overflow.
template <class F>
MEXT_TARGET void decode(const uint8_t* y, float scale, float* x) {
  const Floats factor = V(set1_ps)(scale);
  for (int i = 0; i < kTile; i += kLanes) {
    const Halves byte = load_widened(y + i);
    Floats v;
    if (F::shift == E4M3::shift) {
      const Halves a = byte & H(set1_epi16)(0x7f);
      const Halves nan = H(cmpeq_epi16)(a, H(set1_epi16)(kNaN)) & H(set1_epi16)(0x7c00);
      const Halves sign = H(slli_epi16)(byte & H(set1_epi16)(0x80), 8);
      v = V(cvtph_ps)(H(slli_epi16)(a, 7) | nan | sign) * V(set1_ps)(256.f);
    } else {
      v = V(cvtph_ps)(H(slli_epi16)(byte, 8));
    }
    V(storeu_ps)(x + i, v * factor);
  }
}

MEXT_TARGET inline void widen(const uint16_t* x, float* y) {
  for (int i = 0; i < kTile; i += kLanes) store(y + i, V(slli_epi32)(V(cvtepu16_epi32)(load_halves(x + i)), 16));
}
