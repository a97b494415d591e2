// One row of a compressed weight as dense values, in portable C++: bits are kept, or widened exactly.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "types.h"

namespace wandapp {
namespace {

constexpr int64_t kGroup = 4;            // columns of a 2:4 group
constexpr int64_t kPairsChunk = 16;      // nm_pairs: columns of a chunk
constexpr int64_t kPairsTile = 128;      // nm_pairs: columns that share one 32-bit word of positions
constexpr int64_t kPairsRows = 4;        // nm_pairs: rows of a block

[[maybe_unused]] inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The size of parts of `total`, as equal as multiples of `multiple` can be, none of more than `most` (a multiple too).
[[maybe_unused]] inline int64_t even_part(int64_t total, int64_t most, int64_t multiple) {
  return ceil_div(ceil_div(total, ceil_div(total, most)), multiple) * multiple;
}

[[maybe_unused]] inline int64_t kept_per_row(int64_t cols) {
  const int64_t tail = cols % kGroup;
  return cols / kGroup * 2 + (tail < 2 ? tail : 2);
}

template <class T, class Out>
void put(Out* row, int64_t column, T value);
template <>
[[maybe_unused]] inline void put(float* row, int64_t column, Bf16 value) { row[column] = widen(value); }
template <>
[[maybe_unused]] inline void put(float* row, int64_t column, Fp16 value) { row[column] = widen(value); }
template <>
[[maybe_unused]] inline void put(float* row, int64_t column, float value) { row[column] = value; }
template <>
[[maybe_unused]] inline void put(Bf16* row, int64_t column, Bf16 value) { row[column] = value; }
template <>
[[maybe_unused]] inline void put(Fp16* row, int64_t column, Fp16 value) { row[column] = value; }

// Zeros from column `from` on. Each function below writes the columns of row r from `from` on, a multiple of 4, 16 or 8,
// and none after the last, whatever positions or bits it finds.
template <class Out>
void clear(const Matrix& matrix, Out* row, int64_t from) {
  std::memset(static_cast<void*>(row + from), 0, static_cast<size_t>(matrix.cols - from) * sizeof(Out));
}

template <class T, class Out>
void expand_nm(const Matrix& matrix, int64_t r, Out* row, int64_t from) {
  clear(matrix, row, from);
  const int64_t kept = kept_per_row(matrix.cols);
  const T* values = static_cast<const T*>(matrix.values) + r * kept;
  const uint8_t* meta = static_cast<const uint8_t*>(matrix.meta) + r * ceil_div(kept, 4);
  const auto column = [&](int64_t i) { return i / 2 * kGroup + (meta[i / 4] >> (i % 4 * 2) & 3); };
  int64_t i = from / kGroup * 2;
  for (; i < matrix.cols / kGroup * 2; ++i) put(row, column(i), values[i]);
  for (; i < kept; ++i) {
    if (column(i) < matrix.cols) put(row, column(i), values[i]);
  }
}

// Value (chunk c, pair p, half h, lane l): row 2p + l % 4 / 2 of the block, group c * 4 + h * 2 + l / 4, the l % 2-th kept
// column of it; its position is bits [4 (c % 8) + 2h, +2) of meta word (tile c / 8, p, l). bf16 stores the halves of a
// lane side by side, so that one 32-bit element holds both.
template <class T, class Out>
void expand_nm_pairs(const Matrix& matrix, int64_t r, Out* row, int64_t from) {
  clear(matrix, row, from);
  const int64_t chunks = ceil_div(matrix.cols, kPairsChunk);
  const int64_t tiles = ceil_div(matrix.cols, kPairsTile);
  const int64_t block = r / kPairsRows;
  const int64_t pair = r % kPairsRows / 2;
  const T* values = static_cast<const T*>(matrix.values) + block * chunks * 32;
  const uint32_t* meta = static_cast<const uint32_t*>(matrix.meta) + block * tiles * 16;
  constexpr bool side_by_side = sizeof(T) == 2 && !std::is_same_v<T, Fp16>;
  for (int64_t c = from / kPairsChunk; c < chunks; ++c) {
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t g = 0; g < 2; ++g) {
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t lane = g * 4 + r % 2 * 2 + i;
          const uint32_t word = meta[(c / 8 * 2 + pair) * 8 + lane];
          const int64_t column = c * kPairsChunk + h * 8 + g * kGroup + (word >> (c % 8 * 4 + h * 2) & 3u);
          const T value = values[(c * 2 + pair) * 16 + (side_by_side ? lane * 2 + h : h * 8 + lane)];
          if (column < matrix.cols) put(row, column, value);
        }
      }
    }
  }
}

// `values`: the first kept value at or after column `from`.
template <class T, class Out>
void expand_bitmap(const Matrix& matrix, int64_t r, Out* row, int64_t from, const T* values) {
  clear(matrix, row, from);
  const int64_t bytes = ceil_div(matrix.cols, 8);
  const uint8_t* bitmap = static_cast<const uint8_t*>(matrix.meta) + r * bytes;
  const T* end = static_cast<const T*>(matrix.values) + matrix.offsets[matrix.rows];
  const auto spread = [&](int64_t b, auto safe) {
    for (uint32_t bits = bitmap[b]; bits != 0; bits &= bits - 1) {
      const int64_t column = b * 8 + __builtin_ctz(bits);
      if (!safe && (column >= matrix.cols || values == end)) return;
      put(row, column, *values++);
    }
  };
  int64_t b = from / 8;
  for (; b < matrix.cols / 8 && end - values >= 8; ++b) spread(b, std::true_type());
  for (; b < bytes; ++b) spread(b, std::false_type());
}

}  // namespace
}  // namespace wandapp
