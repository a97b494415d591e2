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

// Of one row: its next kept value, and its bits.
template <class T>
struct BitmapRow {
  const T* values;
  const uint8_t* bitmap;
};

// R rows, `apart` rows from one to the next; M tokens.
template <class T, int R, int M>
void bitmap_block(const BitmapRow<T> (&rows)[R], int64_t cols, const Tokens<T>& tokens, int64_t r, int64_t apart,
                  const Output<T>& output) {
  using L = Lanes<T>;
  Accumulators<R, M> sums;
  constexpr int kChains = Accumulators<R, M>::kChains;
  BitmapRow<T> row[R];
  for (int i = 0; i < R; ++i) row[i] = rows[i];
  const auto step = [&](int64_t k, int chain, int64_t bytes) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const uint32_t mask = load_mask(row[i].bitmap + k / 8, bytes);
      prefetch_ahead(row[i].values);
      const auto w = expand(row[i].values, mask);
      row[i].values += __builtin_popcount(mask);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) sums.acc[i][j][chain] = dot<T>(sums.acc[i][j][chain], w, L::load(tokens[j] + k));
    }
  };
  int64_t k = 0;
  for (; k + kChains * L::kCount <= cols; k += kChains * L::kCount) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) step(k + chain * L::kCount, chain, L::kCount / 8);
  }
  for (; k < cols; k += L::kCount) step(k, 0, ceil_div(at_most(cols - k, L::kCount), 8));
  sums.put(output, 0, r, apart);
}

// Few tokens: spread and multiply at once.
template <class T, int M>
void bitmap_rows(const Matrix& matrix, const Tokens<T>& tokens, const Output<T>& output, int64_t first, int64_t last,
                 T* copies) {
  const int64_t bytes = ceil_div(matrix.cols, 8), copy = padded<kPaddedCols>(matrix.cols) + kPaddedCols;
  const auto at = [&](int64_t r, int64_t i) {
    return BitmapRow<T>{readable_row<Lanes<T>::kCount>(matrix, r, copies + i * copy),
                        static_cast<const uint8_t*>(matrix.meta) + r * bytes};
  };
  for_rows<M == 1 ? kStreams : kRows>(first, last, [&](auto rows_at_once, int64_t r, int64_t apart) {
    BitmapRow<T> rows[rows_at_once];
    for (int64_t i = 0; i < rows_at_once; ++i) rows[i] = at(r + i * apart, i);
    bitmap_block<T, rows_at_once, M>(rows, matrix.cols, tokens, r, apart, output);
  });
}

// More: spread 4 rows into the cache, then multiply them as dense ones.
template <class T>
void spread_rows(const Matrix& matrix, const Tokens<T>& tokens, int64_t count, const Output<T>& output, int64_t first,
                 int64_t last, T* rows) {
  using L = Lanes<T>;
  const int64_t bytes = ceil_div(matrix.cols, 8);
  const int64_t width = padded<kPaddedCols>(matrix.cols);
  T* copy = rows + width * kRows;
  for (int64_t r = first; r < last; r += kRows) {
    const int64_t block = at_most(last - r, kRows);
    for (int64_t i = 0; i < block; ++i) {
      const T* values = readable_row<L::kCount>(matrix, r + i, copy);
      const uint8_t* bitmap = static_cast<const uint8_t*>(matrix.meta) + (r + i) * bytes;
      for (int64_t k = 0; k < width; k += L::kCount) {
        const int64_t mask_bytes = k < matrix.cols ? ceil_div(at_most(matrix.cols - k, L::kCount), 8) : 0;
        const uint32_t mask = load_mask(bitmap + k / 8, mask_bytes);
        L::store(rows + i * width + k, expand(values, mask));
        values += __builtin_popcount(mask);
      }
    }
    for_rows_and_tokens(r, r + block, count, [&](auto rows_at_once, auto m_count, int64_t i, int64_t apart, int64_t m) {
      dense_block<T, rows_at_once, m_count>(rows + (i - r) * width, width * apart, width, tokens, m, i, apart, output);
    });
  }
}

template <class T>
void run_bitmap(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                int64_t last, void* scratch) {
  T* own = static_cast<T*>(scratch);
  const Tokens<T> tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  switch (count) {
    case 1: return bitmap_rows<T, 1>(matrix, tokens, output, first, last, own);
    case 2: return bitmap_rows<T, 2>(matrix, tokens, output, first, last, own);
    case 3: return bitmap_rows<T, 3>(matrix, tokens, output, first, last, own);
    case 4: return bitmap_rows<T, 4>(matrix, tokens, output, first, last, own);
    default: return spread_rows(matrix, tokens, count, output, first, last, own);
  }
}

template <class T>
constexpr Kernel kBitmap{
    kStreams, 1, token_bytes<T>, prepare<T>, bitmap_scratch<T, kPaddedCols, kStreams>, run_bitmap<T>};

}  // namespace
}  // namespace wandapp
