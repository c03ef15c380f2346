// FP8 quantisation on a CPU: 1x128 tiles and 128x128 blocks, as kernels/reference/quantize.py specifies, bit for bit.
//
// Plain C ABI, no torch headers. Every operator works on a range [first, last) of independent units, so that the caller
// cuts big arrays for its own threads; nothing here starts one. All arrays are row-major. x is FP32, or BF16 where `bf16`
// != 0; the format is E4M3, or E5M2 where `e5m2` != 0.

#include "columns.h"

// x, y: [rows, columns]; scale: [rows, ceil(columns / 128)]. A unit is a row.
extern "C" void mext_quantize(const void* x, int bf16, uint8_t* y, float* scale, int64_t first, int64_t last,
                              int64_t columns, int e5m2, int power_of_two, int portable) {
  const Loops loops = loops_of(e5m2, portable);
  const int64_t tiles = (columns + kTile - 1) / kTile, whole = columns / kTile;
  const auto quantize = [&](int64_t row, int64_t count) {
    const int64_t offset = row * columns;
    if (bf16)
      loops.quantize_tiles_bf16(static_cast<const uint16_t*>(x) + offset, count, power_of_two != 0, y + offset,
                                scale + row * tiles);
    else
      loops.quantize_tiles(static_cast<const float*>(x) + offset, count, power_of_two != 0, y + offset,
                           scale + row * tiles);
  };
  if (whole == tiles) return quantize(first, (last - first) * tiles);
  float buffer[kTile];
  for (int64_t row = first; row < last; ++row) {
    quantize(row, whole);
    const int64_t offset = row * columns + whole * kTile, width = columns % kTile;
    quantize_tile(loops, load_tile(loops, x, bf16, offset, width, buffer), power_of_two != 0, y + offset,
                  scale + row * tiles + whole, width);
  }
}

// x, y: [matrices, rows, columns]; scale: [matrices, ceil(rows / 128), ceil(columns / 128)]; y_t and scale_t, unless they
// are null: the transposes of both. A unit is a row of scales.
extern "C" void mext_quantize_blocks(const void* x, int bf16, uint8_t* y, float* scale, uint8_t* y_t, float* scale_t,
                                     int64_t first, int64_t last, int64_t rows, int64_t columns, int e5m2,
                                     int power_of_two, int portable) {
  const Loops loops = loops_of(e5m2, portable);
  const int64_t block_rows = (rows + kTile - 1) / kTile, tiles = (columns + kTile - 1) / kTile;
  alignas(64) float numbers[kTile * kTile];
  alignas(64) uint8_t bytes[kTile * kTile], transposed[kTile * kTile];
  const float* loaded[kTile];
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t matrix = unit / block_rows, row = unit % block_rows * kTile, base = matrix * rows + row;
    const int64_t height = std::min<int64_t>(kTile, rows - row);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = tile * kTile, width = std::min<int64_t>(kTile, columns - column);
      uint32_t amax = 0;
      for (int64_t r = 0; r < height; ++r) {
        loaded[r] = load_tile(loops, x, bf16, (base + r) * columns + column, width, numbers + r * kTile);
        amax = std::max(amax, loops.amax(loaded[r]));
      }
      const float s = scale[unit * tiles + tile] = loops.scale(amax, power_of_two != 0);
      for (int64_t r = 0; r < height; ++r) {
        encode_tile(loops, loaded[r], s, bytes + r * kTile, kTile);
        std::memcpy(y + (base + r) * columns + column, bytes + r * kTile, width);
      }
      if (!y_t) continue;
      scale_t[(matrix * tiles + tile) * block_rows + row / kTile] = s;
      loops.transpose(bytes, transposed);
      for (int64_t c = 0; c < width; ++c)
        std::memcpy(y_t + (matrix * columns + column + c) * rows + row, transposed + c * kTile, height);
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

// x: [tokens, columns]; y_t, scale_t as in columns.h; y, scale: also x in tiles along its columns, unless they are null.
// `sizes`: [groups], or null where nothing divides the tokens. A unit is 128 columns.
extern "C" void mext_quantize_columns(const void* x, int bf16, uint8_t* y, float* scale, uint8_t* y_t, float* scale_t,
                                      int64_t first, int64_t last, int64_t tokens, int64_t columns,
                                      const int64_t* sizes, int64_t groups, int64_t y_stride, int64_t scale_stride,
                                      int e5m2, int power_of_two, int portable) {
  const Loops loops = loops_of(e5m2, portable);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const auto load = [&](int64_t t, int64_t column, int64_t width, float* const* buffers, const float** rows) {
    rows[0] = load_tile(loops, x, bf16, t * columns + column, width, buffers[0]);
    if (y)
      quantize_tile(loops, rows[0], power_of_two != 0, y + t * columns + column, scale + t * tiles + column / kTile,
                    width);
  };
  const Transposed to[1] = {{y_t, scale_t, y_stride, scale_stride, power_of_two != 0}};
  quantize_columns<1>(loops, load, to, first, last, tokens, columns, {sizes, groups});
}

// As mext_quantize_columns with power-of-two scales, from x: [tokens, columns] already in 1x128 tiles with scales
// [tokens, ceil(columns / 128)], both dense.
extern "C" void mext_requantize_columns(const uint8_t* x, const float* x_scale, uint8_t* y_t, float* scale_t,
                                        int64_t first, int64_t last, int64_t tokens, int64_t columns,
                                        const int64_t* sizes, int64_t groups, int64_t y_stride, int64_t scale_stride,
                                        int e5m2, int portable) {
  const Loops loops = loops_of(e5m2, portable);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const auto load = [&](int64_t t, int64_t column, int64_t width, float* const* buffers, const float** rows) {
    rows[0] = decode_tile(loops, x + t * columns + column, x_scale[t * tiles + column / kTile], width, buffers[0]);
  };
  const Transposed to[1] = {{y_t, scale_t, y_stride, scale_stride, true}};
  quantize_columns<1>(loops, load, to, first, last, tokens, columns, {sizes, groups});
}
