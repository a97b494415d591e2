// Dense weights with AVX2: 4 rows at once share each load of activations.
#pragma once

#include "avx2_common.h"

namespace wandapp {
namespace {

constexpr int kDenseRows = 4;

// R rows that lie `row_stride` elements apart, M tokens; they are rows r, r + r_step, ... of the output.
template <class T, int R, int M>
void dense_block(const T* rows, int64_t row_stride, int64_t cols, const Tokens& tokens, int64_t m, int64_t r,
                 int64_t r_step, const Output<T>& output) {
  constexpr int kChains = M == 1 ? 2 : 1;
  __m256 acc[R][M][kChains];
  for (auto& row : acc) {
    for (auto& token : row) {
      for (auto& chain : token) chain = _mm256_setzero_ps();
    }
  }
  const auto step = [&](const T* w, int64_t stride, int64_t k) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Chunk chunk = load(w + i * stride);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const float* x = tokens[m + j] + k;
        acc[i][j][0] = _mm256_fmadd_ps(chunk.first, _mm256_load_ps(x), acc[i][j][0]);
        acc[i][j][kChains - 1] = _mm256_fmadd_ps(chunk.second, _mm256_load_ps(x + 8), acc[i][j][kChains - 1]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kChunk <= cols; k += kChunk) {
    for (int i = 0; i < R; ++i) prefetch(rows + i * row_stride + k);
    step(rows + k, row_stride, k);
  }
  if (k < cols) {
    T tail[R * kChunk] = {};
    for (int i = 0; i < R; ++i) {
      std::memcpy(tail + i * kChunk, rows + i * row_stride + k, static_cast<size_t>(cols - k) * sizeof(T));
    }
    step(tail, kChunk, k);
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < M; ++j) {
      const __m256 total = kChains == 2 ? _mm256_add_ps(acc[i][j][0], acc[i][j][kChains - 1]) : acc[i][j][0];
      output.put(m + j, r + i * r_step, sum(total));
    }
  }
}

// At most kDenseRows rows, all tokens.
template <class T>
void dense_rows(const T* rows, int64_t block, int64_t row_stride, int64_t cols, const Tokens& tokens, int64_t count,
                int64_t r, int64_t r_step, const Output<T>& output) {
  if (block == kDenseRows) {
    for_token_groups(count, [&](auto m_count, int64_t m) {
      dense_block<T, kDenseRows, m_count>(rows, row_stride, cols, tokens, m, r, r_step, output);
    });
    return;
  }
  for (int64_t i = 0; i < block; ++i) {
    for (int64_t m = 0; m < count; ++m) {
      dense_block<T, 1, 1>(rows + i * row_stride, row_stride, cols, tokens, m, r + i * r_step, r_step, output);
    }
  }
}

template <class T>
void run_dense(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
               int64_t last, void*) {
  const T* values = static_cast<const T*>(matrix.values);
  const Tokens tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  // A quarter of the rows apart: each of the four goes on from row to row, as a stream that is never interrupted.
  const int64_t apart = (last - first) / kDenseRows;
  for (int64_t r = first; r < first + apart; ++r) {
    dense_rows(values + r * matrix.cols, kDenseRows, apart * matrix.cols, matrix.cols, tokens, count, r, apart, output);
  }
  const int64_t rest = first + apart * kDenseRows;
  dense_rows(values + rest * matrix.cols, last - rest, matrix.cols, matrix.cols, tokens, count, rest, 1, output);
}

template <class T>
constexpr Kernel kDense{kDenseRows, 1, token_bytes, prepare<T, true>, no_scratch, run_dense<T>};

}  // namespace
}  // namespace wandapp
