// bitmap_windows, the derived layout of unstructured weights: a step multiplies 32 kept weights, 2 of each of 16 rows,
// with activations out of one window of 16 columns. A byte shuffle (vpshufb) picks any of 16 bytes, so one for each byte
// of an element permutes the activations of all 32, and no weight is spread. Its time goes with the weights that are
// kept, not with the columns.
//
//   block  16 rows; steps offsets[block] to offsets[block + 1], an even number
//   meta   36 bytes for two steps: 32 of columns, the low half of a byte for the first step and the high half for the
//          second, then the first column of each one's window, uint16, which never decreases. Slot l is in byte_of(l):
//          unpacking bytes inside 128-bit lanes brings them into the order of the values.
//   slot   2i and 2i + 1 belong to row i, as columns of the window: ascending ones are two kept weights, equal ones a
//          single weight and a zero, descending ones two zeros
//   value  (step s, slot l) at s * 32 + l
//
// A window lies inside the row unless that has fewer than 16 columns.
#pragma once

#include "expand.h"

namespace wandapp {
namespace {

constexpr int64_t kWindow = 16;
constexpr int64_t kWindowRows = 16;
constexpr int64_t kSlots = 32;
constexpr int64_t kPair = 2;          // steps that share their meta
constexpr int64_t kColumnBytes = 32;  // of a pair's meta
constexpr int64_t kPairBytes = kColumnBytes + 2 * kPair;
constexpr uint32_t kNothing[2] = {1, 0};  // the columns of a row without a weight in the window

constexpr int64_t byte_of(int64_t slot) {
  const int64_t eight = slot / 8;
  return slot + (eight == 1 ? 8 : eight == 2 ? -8 : 0);
}

// The meta of the pair that step s is in.
[[maybe_unused]] inline const uint8_t* pair_meta(const Matrix& matrix, int64_t s) {
  return static_cast<const uint8_t*>(matrix.meta) + s / kPair * kPairBytes;
}
[[maybe_unused]] inline int64_t window_of(const uint8_t* pair, int64_t step) {
  uint16_t column;
  std::memcpy(&column, pair + kColumnBytes + 2 * step, sizeof(column));
  return column;
}
[[maybe_unused]] inline uint32_t column_of(const uint8_t* pair, int64_t step, int64_t slot) {
  return pair[byte_of(slot)] >> (4 * step) & 15u;
}
// Kept weights of a row of the block in this step.
[[maybe_unused]] inline int kept_of(const uint8_t* pair, int64_t step, int64_t row) {
  const uint32_t first = column_of(pair, step, 2 * row), second = column_of(pair, step, 2 * row + 1);
  return first < second ? 2 : first == second ? 1 : 0;
}

// Calls body(column, value) for every kept weight of row r, from left to right.
template <class T, class Body>
void for_windows_row(const Matrix& matrix, int64_t r, Body body) {
  const T* values = static_cast<const T*>(matrix.values);
  const int64_t block = r / kWindowRows, row = r % kWindowRows;
  for (int64_t s = matrix.offsets[block]; s < matrix.offsets[block + 1]; ++s) {
    const uint8_t* pair = pair_meta(matrix, s);
    const int kept = kept_of(pair, s % kPair, row);
    for (int64_t slot = 2 * row; slot < 2 * row + kept; ++slot) {
      body(window_of(pair, s % kPair) + column_of(pair, s % kPair, slot), values[s * kSlots + slot]);
    }
  }
}

template <class T, class Out>
void expand_windows(const Matrix& matrix, int64_t r, Out* row) {
  clear(matrix, row, 0);
  for_windows_row<T>(matrix, r, [&](int64_t column, T value) { put(row, column, value); });
}

constexpr int64_t kQuarterRows = 4;  // whose slots lie in 8 bytes side by side

// 4 rows from r on, a multiple of 4. Backwards and without a branch: a zero that is no weight lies in a column that the
// row does not keep, or where a weight is written after it, of an earlier step or of this one: the second slot goes first.
template <class T, class Out>
void expand_windows_quarter(const Matrix& matrix, int64_t r, Out* rows) {
  const T* values = static_cast<const T*>(matrix.values);
  const int64_t block = r / kWindowRows, first = matrix.offsets[block], slots = r % kWindowRows * 2;
  std::memset(static_cast<void*>(rows), 0, static_cast<size_t>(kQuarterRows * matrix.cols) * sizeof(Out));
  for (int64_t s = matrix.offsets[block + 1] - 1; s >= first; --s) {
    const uint8_t* pair = pair_meta(matrix, s);
    uint64_t columns;
    std::memcpy(&columns, pair + byte_of(slots), sizeof(columns));
    columns >>= 4 * (s % kPair);
    const T* value = values + s * kSlots + slots;
    Out* out = rows + window_of(pair, s % kPair);
    for (int64_t i = 0; i < kQuarterRows; ++i, out += matrix.cols) {
      put(out, static_cast<int64_t>(columns >> (16 * i + 8) & 15), value[2 * i + 1]);
      put(out, static_cast<int64_t>(columns >> (16 * i) & 15), value[2 * i]);
    }
  }
}

// Rows [first, last) into `out`.
template <class T, class Out>
void expand_windows_rows(const Matrix& matrix, int64_t first, int64_t last, Out* out) {
  for (int64_t r = first; r < last;) {
    Out* row = out + (r - first) * matrix.cols;
    if (r % kQuarterRows == 0 && r + kQuarterRows <= last && matrix.cols >= kWindow) {
      expand_windows_quarter<T>(matrix, r, row);
      r += kQuarterRows;
    } else {
      expand_windows<T>(matrix, r, row);
      r += 1;
    }
  }
}

}  // namespace
}  // namespace wandapp
