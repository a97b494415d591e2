// What the AVX2 and the AVX-512 kernels share: sizes, outputs, and how rows of a bitmap are read.
#pragma once

#include "expand.h"

namespace wandapp {
namespace {

constexpr int kMaxTokens = 4;  // rows of activations that share a vector of weights
constexpr int64_t kPrefetchBytes = 1024;

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
[[maybe_unused]] size_t no_scratch(int64_t) { return 0; }
[[maybe_unused]] inline uint32_t low_bits(int64_t count) {
  return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
}

template <class T>
struct Output {
  const T* bias;
  T* out;
  int64_t stride;

  Output(const Matrix& matrix, int64_t first_token)
      : bias(static_cast<const T*>(matrix.bias)),
        out(static_cast<T*>(matrix.out) + first_token * matrix.rows),
        stride(matrix.rows) {}

  void put(int64_t token, int64_t row, float value) const {
    out[token * stride + row] = narrow<T>(bias == nullptr ? value : value + widen(bias[row]));
  }
};

// ---- bitmap

// pshufb controls that spread the next kept values of 16 bits over 8 columns; bit 7 gives the zero of a removed one.
struct ShuffleTable {
  alignas(64) uint8_t control[256][16];
  constexpr ShuffleTable() : control() {
    for (int mask = 0; mask < 256; ++mask) {
      int kept = 0;
      for (int column = 0; column < 8; ++column) {
        const bool keep = (mask >> column & 1) != 0;
        control[mask][2 * column] = static_cast<uint8_t>(keep ? 2 * kept : 0x80);
        control[mask][2 * column + 1] = static_cast<uint8_t>(keep ? 2 * kept + 1 : 0x80);
        kept += keep ? 1 : 0;
      }
    }
  }
};
constexpr ShuffleTable kShuffles;

// Columns of a row that was spread.
template <int64_t multiple>
int64_t padded(int64_t cols) {
  return ceil_div(cols, multiple) * multiple;
}

// Room for `rows` rows that were spread, and for a copy of readable_row; or for a copy of each.
template <class T, int64_t multiple, int64_t rows>
size_t bitmap_scratch(int64_t cols) {
  return static_cast<size_t>((padded<multiple>(cols) + multiple) * (rows + 1)) * sizeof(T);
}

[[maybe_unused]] inline int64_t count_bits(const uint8_t* bytes, int64_t size) {
  int64_t bits = 0, b = 0;
  for (; b + 8 <= size; b += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + b, sizeof(word));
    bits += __builtin_popcountll(word);
  }
  for (; b < size; ++b) bits += __builtin_popcount(bytes[b]);
  return bits;
}

// readable_row near the end of the weight. Not inlined: that would slow down the loop over the other rows.
template <int64_t vector, class T>
[[gnu::noinline]] const T* readable_last_row(const Matrix& matrix, int64_t r, T* copy) {
  const T* row = static_cast<const T*>(matrix.values) + matrix.offsets[r];
  const int64_t bytes = ceil_div(matrix.cols, 8);
  const int64_t bits = count_bits(static_cast<const uint8_t*>(matrix.meta) + r * bytes, bytes);
  if (matrix.offsets[r] + bits + vector <= matrix.offsets[matrix.rows]) return row;
  const int64_t kept = matrix.offsets[r + 1] - matrix.offsets[r];
  if (kept > 0) std::memcpy(copy, row, static_cast<size_t>(kept) * sizeof(T));
  std::memset(static_cast<void*>(copy + kept), 0, static_cast<size_t>(8 * bytes + vector - kept) * sizeof(T));
  return copy;
}

// The row's values, with a vector of readable ones after as many as its bitmap asks for: nobody has compared its bits
// with the offsets. They are counted only where too many could lead out of the weight.
template <int64_t vector, class T>
const T* readable_row(const Matrix& matrix, int64_t r, T* copy) {
  const bool inside = matrix.offsets[r] + padded<8>(matrix.cols) + vector <= matrix.offsets[matrix.rows];
  return inside ? static_cast<const T*>(matrix.values) + matrix.offsets[r]
                : readable_last_row<vector>(matrix, r, copy);
}

}  // namespace
}  // namespace wandapp
