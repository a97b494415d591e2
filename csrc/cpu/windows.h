// bitmap_windows, the derived layout of unstructured weights: a step multiplies 8 kept weights, 2 of each of 4 rows, with
// activations out of one window of 8 columns, so that one permutation of 8 activations (vpermps) serves 4 rows and no
// weight is spread. Its time goes with the weights that are kept, not with the columns.
//
//   block  4 rows; steps offsets[block] to offsets[block + 1], an even number
//   step   a 32-bit word: bits [3l, +3) the column of slot l in the window, bits [24, +8) how many columns the window
//          moves on from that of the step before (the first: from column 0). Slots 2i and 2i + 1 belong to row i:
//          ascending columns are two kept weights, equal ones a single weight and a zero, descending ones two zeros.
//   value  (step s, slot l) at s * 8 + l; bf16 stores two steps side by side, s / 2 * 16 + 2 * l + s % 2, so that one
//          32-bit element holds both.
//
// A window lies inside the row unless that has fewer than 8 columns.
#pragma once

#include <type_traits>

#include "expand.h"

namespace wandapp {
namespace {

constexpr int64_t kWindow = 8;
constexpr int64_t kWindowRows = 4;
constexpr int64_t kSlots = 8;
constexpr uint32_t kNothing = 1 | 1 << 6 | 1 << 12 | 1 << 18;  // the columns of every row: 1, 0
constexpr int64_t kFarthest = 255;                             // columns that a window moves on at most

[[maybe_unused]] inline int64_t move_of(const uint32_t* word) {
  return reinterpret_cast<const uint8_t*>(word)[3];  // little-endian
}
[[maybe_unused]] inline int64_t column_of(uint32_t word, int64_t slot) { return word >> (3 * slot) & 7; }
// Kept weights of a row of the block in this step.
[[maybe_unused]] inline int kept_of(uint32_t word, int64_t row) {
  const int64_t first = column_of(word, 2 * row), second = column_of(word, 2 * row + 1);
  return first < second ? 2 : first == second ? 1 : 0;
}

template <class T>
int64_t value_at(int64_t step, int64_t slot) {
  if constexpr (std::is_same_v<T, Bf16>) return step / 2 * 16 + 2 * slot + step % 2;
  return step * kSlots + slot;
}

// Calls body(column, value) for every kept weight of row r, from left to right.
template <class T, class Body>
void for_windows_row(const Matrix& matrix, int64_t r, Body body) {
  const T* values = static_cast<const T*>(matrix.values);
  const uint32_t* words = static_cast<const uint32_t*>(matrix.meta);
  const int64_t block = r / kWindowRows, row = r % kWindowRows;
  int64_t base = 0;
  for (int64_t s = matrix.offsets[block]; s < matrix.offsets[block + 1]; ++s) {
    base += move_of(words + s);
    const int kept = kept_of(words[s], row);
    for (int64_t slot = 2 * row; slot < 2 * row + kept; ++slot) {
      body(base + column_of(words[s], slot), values[value_at<T>(s, slot)]);
    }
  }
}

template <class T, class Out>
void expand_windows(const Matrix& matrix, int64_t r, Out* row) {
  clear(matrix, row, 0);
  for_windows_row<T>(matrix, r, [&](int64_t column, T value) { put(row, column, value); });
}

// The 4 rows of a block at once. Backwards and without a branch: a zero that is no weight lies in a column that the row
// does not keep, or where an earlier step's weight is written after it.
template <class T, class Out>
void expand_windows_block(const Matrix& matrix, int64_t block, Out* rows) {
  const T* values = static_cast<const T*>(matrix.values);
  const uint32_t* words = static_cast<const uint32_t*>(matrix.meta);
  const int64_t first = matrix.offsets[block], last = matrix.offsets[block + 1];
  std::memset(static_cast<void*>(rows), 0, static_cast<size_t>(kWindowRows * matrix.cols) * sizeof(Out));
  int64_t base = 0;
  for (int64_t s = first; s < last; ++s) base += move_of(words + s);
  for (int64_t s = last - 1; s >= first; --s) {
    const uint32_t word = words[s];
    for (int64_t row = 0; row < kWindowRows; ++row) {
      Out* out = rows + row * matrix.cols + base;
      put(out, column_of(word, 2 * row + 1), values[value_at<T>(s, 2 * row + 1)]);
      put(out, column_of(word, 2 * row), values[value_at<T>(s, 2 * row)]);
    }
    base -= move_of(words + s);
  }
}

// Rows [first, last) into `out`.
template <class T, class Out>
void expand_windows_rows(const Matrix& matrix, int64_t first, int64_t last, Out* out) {
  for (int64_t r = first; r < last;) {
    Out* row = out + (r - first) * matrix.cols;
    if (r % kWindowRows == 0 && r + kWindowRows <= last && matrix.cols >= kWindow) {
      expand_windows_block<T>(matrix, r / kWindowRows, row);
      r += kWindowRows;
    } else {
      expand_windows<T>(matrix, r, row);
      r += 1;
    }
  }
}

}  // namespace
}  // namespace wandapp
