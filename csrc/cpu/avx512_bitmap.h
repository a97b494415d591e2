// Bitmap weights with AVX-512: a byte of the mask selects a byte shuffle that spreads the next kept values over 8
// columns; 4 of them make a vector. (Cheaper than vpexpandw where that is slow, and it needs no VBMI2.)
#pragma once

#include "avx512_dense.h"

namespace wandapp {
namespace {

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
constexpr ShuffleTable kShuffles{};

template <class T>
Quarter expand_8(const T*& p, uint32_t mask) {
  const Quarter spread = shuffle_bytes(load_quarter(p), load_quarter(kShuffles.control[mask & 0xff]));
  p += __builtin_popcount(mask & 0xff);
  return spread;
}

// One vector of columns from the kept values at p, which moves on. Reads 32 values at most, however many are kept.
template <class T>
Words expand(const T*& p, uint32_t mask) {
  const Quarter a = expand_8(p, mask);
  const Quarter b = expand_8(p, mask >> 8);
  const Quarter c = expand_8(p, mask >> 16);
  const Quarter d = expand_8(p, mask >> 24);
  return join(a, b, c, d);
}
Floats expand(const float*& p, uint32_t mask) {
  const Floats spread = expand_floats(mask, load_floats(p));
  p += __builtin_popcount(mask);
  return spread;
}

uint32_t mask_at(const uint8_t* bitmap, int64_t byte, int64_t count) {
  uint32_t mask = 0;
  std::memcpy(&mask, bitmap + byte, static_cast<size_t>(count));
  return mask;
}

// The row's values with at least 16 readable ones after the last.
template <class T>
const T* readable_row(const Matrix& matrix, int64_t r, T* copy) {
  constexpr int64_t kSlack = 16;
  const T* row = static_cast<const T*>(matrix.values) + matrix.offsets[r];
  const int64_t kept = matrix.offsets[r + 1] - matrix.offsets[r];
  if (matrix.offsets[r + 1] + kSlack <= matrix.offsets[matrix.rows]) return row;
  if (kept > 0) std::memcpy(copy, row, static_cast<size_t>(kept) * sizeof(T));
  std::memset(static_cast<void*>(copy + kept), 0, kSlack * sizeof(T));
  return copy;
}

template <class T, int M>
void bitmap_row(const T* values, const uint8_t* bitmap, int64_t cols, const Tokens<T>& tokens, int64_t r,
                const Output<T>& output) {
  using L = Lanes<T>;
  Accumulators<1, M> sums;
  constexpr int kChains = Accumulators<1, M>::kChains;
  const auto step = [&](int64_t k, int chain, int64_t bytes) {
    prefetch_ahead(values);
    const auto w = expand(values, mask_at(bitmap, k / 8, bytes));
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) sums.acc[0][j][chain] = dot<T>(sums.acc[0][j][chain], w, L::load(tokens[j] + k));
  };
  int64_t k = 0;
  for (; k + kChains * L::kCount <= cols; k += kChains * L::kCount) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) step(k + chain * L::kCount, chain, L::kCount / 8);
  }
  for (; k < cols; k += L::kCount) step(k, 0, ceil_div(at_most(cols - k, L::kCount), 8));
  sums.put(output, 0, r);
}

int64_t padded(int64_t cols) { return ceil_div(cols, kPaddedCols) * kPaddedCols; }

template <class T>
size_t bitmap_scratch(int64_t cols) {
  return static_cast<size_t>(padded(cols) * (kRows + 1) + kPaddedCols) * sizeof(T);
}

// Few tokens: spread and multiply at once. More: spread 4 rows into the cache, then multiply them as dense ones.
template <class T>
void run_bitmap(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                int64_t last, void* scratch) {
  using L = Lanes<T>;
  const int64_t bytes = ceil_div(matrix.cols, 8);
  const int64_t width = padded(matrix.cols);
  const uint8_t* bitmap = static_cast<const uint8_t*>(matrix.meta);
  T* rows = static_cast<T*>(scratch);
  T* copy = rows + width * kRows;
  const Tokens<T> tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  for (int64_t r = first; r < last; r += kRows) {
    const int64_t block = at_most(last - r, kRows);
    for (int64_t i = 0; i < block; ++i) {
      const T* values = readable_row(matrix, r + i, copy);
      const uint8_t* row_bitmap = bitmap + (r + i) * bytes;
      if (count == 1) bitmap_row<T, 1>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count == 2) bitmap_row<T, 2>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count == 3) bitmap_row<T, 3>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count == 4) bitmap_row<T, 4>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count <= kMaxTokens) continue;
      for (int64_t k = 0; k < width; k += L::kCount) {
        const int64_t mask_bytes = k < matrix.cols ? ceil_div(at_most(matrix.cols - k, L::kCount), 8) : 0;
        L::store(rows + i * width + k, expand(values, mask_at(row_bitmap, k / 8, mask_bytes)));
      }
    }
    if (count > kMaxTokens) dense_rows(rows, block, width, width, tokens, count, r, output);
  }
}

template <class T>
constexpr Kernel kBitmap{kRows, token_bytes<T>, prepare<T>, bitmap_scratch<T>, run_bitmap<T>};

}  // namespace
}  // namespace wandapp
