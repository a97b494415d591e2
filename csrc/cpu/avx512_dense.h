// Dense weights with AVX-512.
#pragma once

#include "avx512_common.h"

namespace wandapp {
namespace {

template <class T, int R, int M>
void dense_block(const T* rows, int64_t row_stride, int64_t cols, const Tokens<T>& tokens, int64_t m, int64_t r,
                 const Output<T>& output) {
  using L = Lanes<T>;
  Accumulators<R, M> sums;
  constexpr int kChains = Accumulators<R, M>::kChains;
  const auto step = [&](int64_t k, int chain, auto load) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const auto w = load(rows + i * row_stride + k);
      prefetch_ahead(rows + i * row_stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        sums.acc[i][j][chain] = dot<T>(sums.acc[i][j][chain], w, L::load(tokens[m + j] + k));
      }
    }
  };
  const auto whole = [](const T* p) { return L::load(p); };
  int64_t k = 0;
  for (; k + kChains * L::kCount <= cols; k += kChains * L::kCount) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) step(k + chain * L::kCount, chain, whole);
  }
  for (; k < cols; k += L::kCount) {
    const int64_t count = at_most(cols - k, L::kCount);
    step(k, 0, [count](const T* p) { return L::load(p, count); });
  }
  sums.put(output, m, r);
}

// At most kRows rows, all tokens.
template <class T>
void dense_rows(const T* rows, int64_t block, int64_t row_stride, int64_t cols, const Tokens<T>& tokens, int64_t count,
                int64_t r, const Output<T>& output) {
  for_token_groups(count, block, [&](auto rows_at_once, auto m_count, int64_t i, int64_t m) {
    dense_block<T, rows_at_once, m_count>(rows + i * row_stride, row_stride, cols, tokens, m, r + i, output);
  });
}

template <class T>
void run_dense(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
               int64_t last, void*) {
  const T* values = static_cast<const T*>(matrix.values);
  const Tokens<T> tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  for (int64_t r = first; r < last; r += kRows) {
    dense_rows(values + r * matrix.cols, at_most(last - r, kRows), matrix.cols, matrix.cols, tokens, count, r, output);
  }
}

template <class T>
constexpr Kernel kDense{kRows, 1, token_bytes<T>, prepare<T>, no_scratch, run_dense<T>};

}  // namespace
}  // namespace wandapp
