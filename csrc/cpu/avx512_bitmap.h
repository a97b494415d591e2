// Bitmap weights with AVX-512: the mask spreads the next kept values over a vector of columns.
//
// WANDAPP_EXPAND_WORDS: 1 to do that with vpexpandw, which needs VBMI2 and takes 2 cycles on Intel but 8 on AMD's Zen 5.
// 0: a byte of the mask selects a byte shuffle for 8 columns, a quarter of a vector.
#pragma once

#include "avx512_dense.h"

namespace wandapp {
namespace {

// expand(p, mask): one vector of columns from the kept values at p. Reads a vector of values at most, however many are
// kept. (Always inline: GCC would otherwise call it once for each of 13 uses.)
#if WANDAPP_EXPAND_WORDS
template <class T>
[[gnu::always_inline]] inline Words expand(const T* p, uint32_t mask) {
  return expand_words(mask, load_words(p));
}
#else
// Where each quarter starts comes from a prefix of the mask, not from the quarter before: they do not wait for each
// other.
template <class T>
[[gnu::always_inline]] inline Words expand(const T* p, uint32_t mask) {
  const auto values = [p](uint32_t earlier) { return p + __builtin_popcount(earlier); };
  // The shift to byte `i` and the table's 16 bytes an entry in one.
  const auto control = [](uint32_t scaled) { return &kShuffles.control[0][0] + (scaled & 0xff0); };
  return shuffle_bytes(load_quarters(p, values(mask << 24), values(mask << 16), values(mask << 8)),
                       load_quarters(control(mask << 4), control(mask >> 4), control(mask >> 12), control(mask >> 20)));
}
#endif
[[gnu::always_inline]] inline Floats expand(const float* p, uint32_t mask) {
  return expand_floats(mask, load_floats(p));
}

uint32_t load_mask(const uint8_t* bitmap, int64_t bytes) {
  uint32_t mask = 0;
  std::memcpy(&mask, bitmap, static_cast<size_t>(bytes));
  return mask;
}

template <class T, int M>
void bitmap_row(const T* values, const uint8_t* bitmap, int64_t cols, const Tokens<T>& tokens, int64_t r,
                const Output<T>& output) {
  using L = Lanes<T>;
  Accumulators<1, M> sums;
  constexpr int kChains = Accumulators<1, M>::kChains;
  const auto step = [&](int64_t k, int chain, uint32_t mask) {
    prefetch_ahead(values);
    const auto w = expand(values, mask);
    values += __builtin_popcount(mask);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) sums.acc[0][j][chain] = dot<T>(sums.acc[0][j][chain], w, L::load(tokens[j] + k));
  };
  constexpr int64_t kBytes = L::kCount / 8;
  int64_t k = 0;
  for (; k + kChains * L::kCount <= cols; k += kChains * L::kCount) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      step(k + chain * L::kCount, chain, load_mask(bitmap + chain * kBytes, kBytes));
    }
    bitmap += kChains * kBytes;
  }
  for (; k < cols; k += L::kCount) {
    step(k, 0, load_mask(bitmap, ceil_div(at_most(cols - k, L::kCount), 8)));
    bitmap += kBytes;
  }
  sums.put(output, 0, r);
}

// Few tokens: spread and multiply at once. More: spread 4 rows into the cache, then multiply them as dense ones.
template <class T>
void run_bitmap(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                int64_t last, void* scratch) {
  using L = Lanes<T>;
  const int64_t bytes = ceil_div(matrix.cols, 8);
  const int64_t width = padded<kPaddedCols>(matrix.cols);
  const uint8_t* bitmap = static_cast<const uint8_t*>(matrix.meta);
  T* rows = static_cast<T*>(scratch);
  T* copy = rows + width * kRows;
  const Tokens<T> tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  for (int64_t r = first; r < last; r += kRows) {
    const int64_t block = at_most(last - r, kRows);
    for (int64_t i = 0; i < block; ++i) {
      const T* values = readable_row<L::kCount>(matrix, r + i, copy);
      const uint8_t* row_bitmap = bitmap + (r + i) * bytes;
      if (count == 1) bitmap_row<T, 1>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count == 2) bitmap_row<T, 2>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count == 3) bitmap_row<T, 3>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count == 4) bitmap_row<T, 4>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count <= kMaxTokens) continue;
      for (int64_t k = 0; k < width; k += L::kCount) {
        const int64_t mask_bytes = k < matrix.cols ? ceil_div(at_most(matrix.cols - k, L::kCount), 8) : 0;
        const uint32_t mask = load_mask(row_bitmap + k / 8, mask_bytes);
        L::store(rows + i * width + k, expand(values, mask));
        values += __builtin_popcount(mask);
      }
    }
    if (count > kMaxTokens) dense_rows(rows, block, width, width, tokens, count, r, output);
  }
}

template <class T>
constexpr Kernel kBitmap{kRows, 1, token_bytes<T>, prepare<T>, bitmap_scratch<T, kPaddedCols, kRows>, run_bitmap<T>};

}  // namespace
}  // namespace wandapp
