// Dense weights with AVX-512.
#pragma once

#include "avx512_common.h"

namespace wandapp {
namespace {

// R rows that lie `row_stride` elements apart, M tokens; they are rows r, r + apart, ... of the output.
template <class T, int R, int M>
void dense_block(const T* rows, int64_t row_stride, int64_t cols, const Tokens<T>& tokens, int64_t m, int64_t r,
                 int64_t apart, const Output<T>& output) {
  using L = Lanes<T>;
  Accumulators<R, M> sums;
  constexpr int kChains = Accumulators<R, M>::kChains;
  const auto step = [&](int64_t k, int chain, auto load) {
#pragma GCC unroll 8
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
  sums.put(output, m, r, apart);
}

template <class T>
void run_dense(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
               int64_t last, void*) {
  const T* values = static_cast<const T*>(matrix.values);
  const int64_t cols = matrix.cols;
  const Tokens<T> tokens(prepared, cols);
  const Output<T> output(matrix, first_token);
  for_rows_and_tokens(first, last, count, [&](auto rows_at_once, auto m_count, int64_t r, int64_t apart, int64_t m) {
    dense_block<T, rows_at_once, m_count>(values + r * cols, apart * cols, cols, tokens, m, r, apart, output);
  });
}

template <class T>
constexpr Kernel kDense{kStreams, 1, token_bytes<T>, prepare<T>, no_scratch, run_dense<T>};

}  // namespace
}  // namespace wandapp
