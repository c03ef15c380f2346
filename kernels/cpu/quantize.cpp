// FP8 quantisation on a CPU: 1x128 tiles and 128x128 blocks, as kernels/reference/quantize.py specifies, bit for bit.
//
// Plain C ABI, no torch headers. Every operator works on `count` independent units with `threads` threads; which of
// them does what changes no byte. All arrays are row-major. x is FP32, or BF16 where `bf16` != 0; the format is E4M3,
// or E5M2 where `e5m2` != 0; `lanes` as in fp8.h.

#include "columns.h"
#include "parallel.h"

namespace {

// Whether to write an array past the caches: one that they would not hold until it is read. It saves reading what is
// overwritten: 4096x4096 numbers took 0.83 (FP32) and 0.94 (BF16) of the time in tiles, 0.7 in blocks.
bool past_cache(const uint8_t* y, int64_t bytes, int64_t row) {
  constexpr int64_t kHeld = 4 << 20;
  return bytes > kHeld && row % 64 == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
}

template <class Number>
void quantize(const Loops& loops, const Number* x, uint8_t* y, float* scale, int64_t count, int64_t columns,
              bool power_of_two, int threads) {
  const int64_t tiles = (columns + kTile - 1) / kTile, whole = columns / kTile;
  const bool past = past_cache(y, count * columns, columns);
  const auto tiles_from = [&](int64_t row, int64_t tiles_there) {
    loops.of(x).quantize_tiles(x + row * columns, tiles_there, power_of_two, past, y + row * columns,
                               scale + row * tiles);
  };
  mext::in_parallel(count, threads, [&](int64_t first, int64_t last) {
    if (whole == tiles) {
      tiles_from(first, (last - first) * tiles);
      return wait_for_writes();
    }
    float buffer[kTile];
    for (int64_t row = first; row < last; ++row) {
      tiles_from(row, whole);
      const int64_t offset = row * columns + whole * kTile, width = columns % kTile;
      quantize_tile(loops, load_tile(loops, x, sizeof(Number) == 2, offset, width, buffer), power_of_two, y + offset,
                    scale + row * tiles + whole, width);
    }
    wait_for_writes();
  });
}

// Rows of a block that are read, and written, at a time, while as many are on their way. BF16: 0.094 ns a number with 8
// on their way, 0.078 with 32, no less with 64.
constexpr int64_t kSlice = 32;

struct Blocks {  // as mext_quantize_blocks has them
  uint8_t* y;
  float* scale;
  uint8_t* y_t;
  float* scale_t;
  int64_t rows, columns, block_rows, tiles;
  bool power_of_two, past;
};

// One row of blocks; each is written while the next is read.
template <class Number>
class BlockRow {
 public:
  BlockRow(const Loops& loops, const Blocks& to, int64_t unit)
      : loops_(loops), to_(to), matrix_(unit / to.block_rows), row_(unit % to.block_rows * kTile),
        height_(std::min<int64_t>(kTile, to.rows - row_)), offset_((matrix_ * to.rows + row_) * to.columns),
        scale_(to.scale + unit * to.tiles) {}

  void quantize(const Number* x) {
    for (int64_t tile = 0; tile <= to_.tiles; ++tile) {
      uint32_t amax = 0;
      for (int64_t row = 0; row < height_; row += kSlice)
        amax = std::max(amax, loops_.of(x).turn_block(read_of(x + offset_, tile, row), write_of(tile - 1, row)));
      if (tile > 0) finish(tile - 1);
      if (tile < to_.tiles) scale_[tile] = loops_.scale(amax, to_.power_of_two);
    }
  }

 private:
  int64_t width(int64_t tile) const { return std::min<int64_t>(kTile, to_.columns - tile * kTile); }
  bool is_direct(int64_t tile) const { return width(tile) == kTile && !to_.y_t; }
  Number* copy_of(int64_t tile, int64_t row) { return numbers_[tile % 2] + row * kTile; }

  // A slice of a block from `row` on; nothing behind the last block, and nothing to write before the first.
  BlockRead<Number> read_of(const Number* x, int64_t tile, int64_t row) {
    if (tile == to_.tiles) return {};
    const int64_t height = std::min(kSlice, height_ - row), stride = to_.columns, count = width(tile);
    const Number* from = x + row * stride + tile * kTile;
    const Number* after = tile + 1 < to_.tiles ? x + (tile + 1) * kTile : x + kTile * stride;  // the next block
    const Number* next = row + kSlice < height_ ? from + kSlice * stride : after;
    Number* copy = copy_of(tile, row);
    if (count == kTile) return {from, next, stride, height, copy};
    for (int64_t r = 0; r < height; ++r) {
      std::copy(from + r * stride, from + r * stride + count, copy + r * kTile);
      std::fill(copy + r * kTile + count, copy + (r + 1) * kTile, Number{});
    }
    return {copy, copy, kTile, height, copy};
  }

  BlockWrite<Number> write_of(int64_t tile, int64_t row) {
    if (tile < 0) return {};
    const bool direct = is_direct(tile);
    const int64_t stride = direct ? to_.columns : kTile;
    uint8_t* y = direct ? to_.y + offset_ + tile * kTile : bytes_;
    return {copy_of(tile, row), scale_[tile], direct && to_.past, y + row * stride, stride,
            std::min(kSlice, height_ - row)};
  }

  void finish(int64_t tile) {
    if (is_direct(tile)) return;
    const int64_t column = tile * kTile;
    for (int64_t r = 0; r < height_; ++r)
      std::memcpy(to_.y + offset_ + r * to_.columns + column, bytes_ + r * kTile, width(tile));
    if (!to_.y_t) return;
    to_.scale_t[(matrix_ * to_.tiles + tile) * to_.block_rows + row_ / kTile] = scale_[tile];
    loops_.transpose(bytes_, transposed_);
    for (int64_t c = 0; c < width(tile); ++c)
      std::memcpy(to_.y_t + (matrix_ * to_.columns + column + c) * to_.rows + row_, transposed_ + c * kTile, height_);
  }

  const Loops& loops_;
  const Blocks& to_;
  const int64_t matrix_, row_, height_, offset_;
  float* const scale_;
  alignas(64) Number numbers_[2][kTile * kTile];
  alignas(64) uint8_t bytes_[kTile * kTile], transposed_[kTile * kTile];
};

}  // namespace

// x, y: [count, columns]; scale: [count, ceil(columns / 128)]. A unit is a row.
extern "C" void mext_quantize(const void* x, int bf16, uint8_t* y, float* scale, int64_t count, int64_t columns,
                              int e5m2, int power_of_two, int lanes, int threads) {
  const Loops loops = loops_of(e5m2, lanes);
  if (bf16)
    quantize(loops, static_cast<const uint16_t*>(x), y, scale, count, columns, power_of_two != 0, threads);
  else
    quantize(loops, static_cast<const float*>(x), y, scale, count, columns, power_of_two != 0, threads);
}

// x, y: [matrices, rows, columns]; scale: [matrices, ceil(rows / 128), ceil(columns / 128)]; y_t and scale_t, unless
// they are null: the transposes of both. A unit is a row of scales.
extern "C" void mext_quantize_blocks(const void* x, int bf16, uint8_t* y, float* scale, uint8_t* y_t, float* scale_t,
                                     int64_t count, int64_t rows, int64_t columns, int e5m2, int power_of_two,
                                     int lanes, int threads) {
  const Loops loops = loops_of(e5m2, lanes);
  const int64_t block_rows = (rows + kTile - 1) / kTile, tiles = (columns + kTile - 1) / kTile;
  const bool past = past_cache(y, count / block_rows * rows * columns, columns);
  const Blocks to{y, scale, y_t, scale_t, rows, columns, block_rows, tiles, power_of_two != 0, past};
  mext::in_parallel(count, threads, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit)
      bf16 ? BlockRow<uint16_t>(loops, to, unit).quantize(static_cast<const uint16_t*>(x))
           : BlockRow<float>(loops, to, unit).quantize(static_cast<const float*>(x));
    wait_for_writes();
  });
}

// y: [matrices, rows, columns] with `y_stride` between rows; scale: [matrices, ceil(rows / block_rows), ..] with
// `scale_stride`; x: [matrices, rows, columns], dense. A unit is one row of y.
extern "C" void mext_dequantize(const uint8_t* y, const float* scale, float* x, int64_t count, int64_t rows,
                                int64_t columns, int64_t block_rows, int64_t y_stride, int64_t scale_stride, int e5m2,
                                int lanes, int threads) {
  const Loops loops = loops_of(e5m2, lanes);
  const int64_t block_count = (rows + block_rows - 1) / block_rows;
  mext::in_parallel(count, threads, [&](int64_t first, int64_t last) {
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
  });
}

// x: [tokens, columns]; y_t, scale_t as in columns.h; y, scale: also x in tiles along its columns, unless they are
// null. `sizes`: [groups], or null where nothing divides the tokens.
extern "C" void mext_quantize_columns(const void* x, int bf16, uint8_t* y, float* scale, uint8_t* y_t, float* scale_t,
                                      int64_t tokens, int64_t columns, const int64_t* sizes, int64_t groups,
                                      int64_t y_stride, int64_t scale_stride, int e5m2, int power_of_two, int lanes,
                                      int threads) {
  const Loops loops = loops_of(e5m2, lanes);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const auto load = [&](int64_t t, int64_t column, int64_t width, float* const* buffers, const float** rows) {
    rows[0] = load_tile(loops, x, bf16, t * columns + column, width, buffers[0]);
    if (y)
      quantize_tile(loops, rows[0], power_of_two != 0, y + t * columns + column, scale + t * tiles + column / kTile,
                    width);
  };
  const Transposed to[1] = {{y_t, scale_t, y_stride, scale_stride, power_of_two != 0}};
  quantize_columns<1>(loops, load, to, tokens, columns, {sizes, groups}, threads);
}

// As mext_quantize_columns with power-of-two scales, from x: [tokens, columns] already in 1x128 tiles with scales
// [tokens, ceil(columns / 128)], both dense.
extern "C" void mext_requantize_columns(const uint8_t* x, const float* x_scale, uint8_t* y_t, float* scale_t,
                                        int64_t tokens, int64_t columns, const int64_t* sizes, int64_t groups,
                                        int64_t y_stride, int64_t scale_stride, int e5m2, int lanes, int threads) {
  const Loops loops = loops_of(e5m2, lanes);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const auto load = [&](int64_t t, int64_t column, int64_t width, float* const* buffers, const float** rows) {
    rows[0] = decode_tile(loops, x + t * columns + column, x_scale[t * tiles + column / kTile], width, buffers[0]);
  };
  const Transposed to[1] = {{y_t, scale_t, y_stride, scale_stride, true}};
  quantize_columns<1>(loops, load, to, tokens, columns, {sizes, groups}, threads);
}
