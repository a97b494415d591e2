// Weights of every format into tiles: 512 columns of one row at a time, whose 64 bytes of each step are a row of a tile.
//
// A class of rows has
//   start(row, count)      the rows that `expand` means from now on, at most 256
//   expand(at, out, next)  columns [k, k + 512) of row i of them; columns that are missing, up to a whole pair of steps,
//                          are zeros. A row's blocks of columns are asked for in ascending order. The block at `next` is
//                          fetched ahead: the first of any row, the row's own next, or the one that another row is at.
#pragma once

#include <type_traits>

#include "amx_tiles.h"

namespace wandapp {
namespace {

constexpr int64_t kMostRows = 256;  // of one start

struct Place {
  int64_t i, k;
};

// Calls body(step, whole) for the steps that columns from k on have; unrolled where they are a whole block.
template <class Body>
[[gnu::always_inline]] inline void for_steps(int64_t cols, int64_t k, Body body) {
  if (k + kBlockCols <= cols) {
#pragma GCC unroll 16
    for (int64_t step = 0; step < kBlockSteps; ++step) body(step, std::true_type());
  } else {
    const int64_t steps = ceil_div(cols - k, kPaddedCols) * (kPaddedCols / kStepCols);
    for (int64_t step = 0; step < steps; ++step) body(step, std::false_type());
  }
}

// `size` readable values at p: p itself, or a copy of what is left before `end`, with zeros after it.
inline const Bf16* readable(const Bf16* p, const Bf16* end, int64_t size, Bf16* copy) {
  if (end - p >= size) return p;
  std::memset(static_cast<void*>(copy), 0, static_cast<size_t>(size) * sizeof(Bf16));
  if (end > p) std::memcpy(static_cast<void*>(copy), p, static_cast<size_t>(end - p) * sizeof(Bf16));
  return copy;
}

inline uint32_t mask_of(const uint8_t* bitmap, int64_t step) {
  uint32_t mask;
  std::memcpy(&mask, bitmap + step * (kStepCols / 8), sizeof(mask));
  return mask;
}

class DenseRows {
 public:
  explicit DenseRows(const Matrix& matrix) : values_(static_cast<const Bf16*>(matrix.values)), cols_(matrix.cols) {}

  void start(int64_t row, int64_t) { row_ = row; }

  void expand(Place at, char* out, Place next) const {
    const int64_t k = at.k;
    const Bf16* values = values_ + (row_ + at.i) * cols_ + k;
    const Bf16* ahead = values_ + (row_ + next.i) * cols_ + next.k;
    for_steps(cols_, k, [&](int64_t step, auto whole) {
      const Bf16* from = values + step * kStepCols;
      prefetch_far(ahead + step * kStepCols);
      store_words(out + step * 2 * kTileBytes,
                  whole ? load_words(from) : load_words_masked(low_bits(cols_ - k - step * kStepCols), from));
    });
  }

 private:
  const Bf16* values_;
  int64_t cols_;
  int64_t row_ = 0;
};

// Two positions of 2 bits are a nibble, and that is 4 bits of a bitmap: with it a 2:4 row is expanded as any other.
struct NibbleBitmap {
  alignas(64) uint8_t low[64];
  alignas(64) uint8_t high[64];
  constexpr NibbleBitmap() : low(), high() {
    for (int i = 0; i < 64; ++i) {
      low[i] = static_cast<uint8_t>(1 << (i & 3) | 1 << (i >> 2 & 3));
      high[i] = static_cast<uint8_t>(low[i] << 4);
    }
  }
};
constexpr NibbleBitmap kNibbleBitmap;

// 512 columns.
inline Words bitmap_of_positions(const void* meta) {
  const Words positions = load_words(meta), nibble = broadcast_16(0x0f0f);
  const Words upper = and_words(shift_right_32(positions, broadcast_32(4)), nibble);
  return or_words(shuffle_bytes(load_words(kNibbleBitmap.low), and_words(positions, nibble)),
                  shuffle_bytes(load_words(kNibbleBitmap.high), upper));
}

class NMRows {
 public:
  explicit NMRows(const Matrix& matrix)
      : values_(static_cast<const Bf16*>(matrix.values)),
        meta_(static_cast<const uint8_t*>(matrix.meta)),
        cols_(matrix.cols),
        kept_(kept_per_row(matrix.cols)),
        meta_bytes_(ceil_div(kept_, 4)),
        end_(values_ + matrix.rows * kept_) {}

  void start(int64_t row, int64_t) { row_ = row; }

  void expand(Place at, char* out, Place next) const {
    constexpr int64_t kStepValues = kStepCols / 2;
    Bf16 copy[kBlockCols / 2];
    alignas(64) uint8_t bitmap[kBlockCols / 8];
    const int64_t k = at.k, row = row_ + at.i, next_row = row_ + next.i;
    const uint8_t* meta = meta_ + row * meta_bytes_ + k / 8;
    const int64_t left = cols_ - k;
    if (left >= kBlockCols) {
      store_words(bitmap, bitmap_of_positions(meta));
    } else {
      std::memset(bitmap, 0, sizeof(bitmap));
      std::memcpy(bitmap, meta, static_cast<size_t>(meta_bytes_ - k / 8));
      store_words(bitmap, bitmap_of_positions(bitmap));
      // Positions that are not there were taken for zeros.
#pragma GCC unroll 1
      for (int64_t step = 0; step < kBlockSteps; ++step) {
        const uint32_t mask = mask_of(bitmap, step) & low_bits(left - step * kStepCols);
        std::memcpy(bitmap + step * sizeof(mask), &mask, sizeof(mask));
      }
    }
    const Bf16* values = readable(values_ + row * kept_ + k / 2, end_, kBlockCols / 2, copy);
    const Bf16* ahead = values_ + next_row * kept_ + next.k / 2;
    prefetch_far(meta_ + next_row * meta_bytes_ + next.k / 8);
    for_steps(cols_, k, [&](int64_t step, auto) {
      const Bf16* from = values + step * kStepValues;
      if (step % 2 == 0) prefetch_far(ahead + step * kStepValues);
      store_words(out + step * 2 * kTileBytes, expand_words(mask_of(bitmap, step), load_half(from)));
    });
  }

 private:
  const Bf16* values_;
  const uint8_t* meta_;
  int64_t cols_, kept_, meta_bytes_;
  const Bf16* end_;
  int64_t row_ = 0;
};

class BitmapRows {
 public:
  explicit BitmapRows(const Matrix& matrix)
      : matrix_(matrix),
        bitmap_(static_cast<const uint8_t*>(matrix.meta)),
        values_(static_cast<const Bf16*>(matrix.values)),
        end_(values_ + matrix.offsets[matrix.rows]),
        cols_(matrix.cols),
        bytes_(ceil_div(matrix.cols, 8)),
        usual_(matrix.offsets[matrix.rows] * kBlockCols / (matrix.rows * matrix.cols)) {}

  void start(int64_t row, int64_t count) {
    row_ = row;
    for (int64_t i = 0; i < count; ++i) next_[i] = values_ + matrix_.offsets[row + i];
  }

  void expand(Place at, char* out, Place next) {
    Bf16 copy[kBlockCols];
    uint8_t padded[kBlockCols / 8] = {};
    const int64_t k = at.k;
    const uint8_t* bitmap = bitmap_ + (row_ + at.i) * bytes_ + k / 8;
    prefetch_far(bitmap_ + (row_ + next.i) * bytes_ + next.k / 8);
    if (k + kBlockCols > cols_) {
      std::memcpy(padded, bitmap, static_cast<size_t>(bytes_ - k / 8));
      bitmap = padded;
    }
    const Bf16* const first = readable(next_[at.i], end_, kBlockCols, copy);
    const Bf16* values = first;
    const Bf16* const ahead = first_value(at, next);
    for_steps(cols_, k, [&](int64_t step, auto) {
      const uint32_t mask = mask_of(bitmap, step);
      prefetch_far(ahead + (values - first));
      store_words(out + step * 2 * kTileBytes, expand_words(mask, load_words(values)));
      values += __builtin_popcount(mask);
    });
    next_[at.i] += values - first;
  }

 private:
  // How many values a row has up to its next block of columns is not known: as many as usual.
  const Bf16* first_value(Place at, Place next) const {
    if (next.k == 0) return values_ + matrix_.offsets[at_most(row_ + next.i, matrix_.rows)];
    return next.i == at.i ? next_[at.i] + usual_ : next_[next.i];
  }

  const Matrix& matrix_;
  const uint8_t* bitmap_;
  const Bf16* values_;
  const Bf16* end_;
  int64_t cols_, bytes_, usual_;
  int64_t row_ = 0;
  const Bf16* next_[kMostRows] = {};
};

}  // namespace
}  // namespace wandapp
