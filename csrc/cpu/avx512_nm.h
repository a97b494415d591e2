// The canonical 2:4 weight, as it is, with AVX-512.
//
// Of 64 columns, 32 values are kept and one 64-bit word holds their 32 positions; the activations are permuted, not the
// weights expanded:
//
//   index = (multishift(shifts, meta) & 3) | base        word i: its 2-bit position, plus its group's first column
//   xs    = permute_words(x[0:32], index, x[32:64])
//   acc   = dot(acc, values, xs)
#pragma once

#include "avx512_common.h"

namespace wandapp {
namespace {

template <class T, int R, int M>
void nm_block(const T* values, const uint8_t* meta, int64_t kept, const Tokens<T>& tokens, int64_t m, int64_t r,
              const Output<T>& output) {
  using L = Lanes<T>;
  constexpr int64_t kBytes = L::kCount / 4;
  Accumulators<R, M> sums;
  constexpr int kChains = Accumulators<R, M>::kChains;
  const int64_t meta_bytes = ceil_div(kept, 4);
  const auto step = [&](int64_t k, int chain, int64_t bytes, auto load) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Words index = L::positions(meta + i * meta_bytes + k / 4, bytes);
      const auto w = load(values + i * kept + k);
      prefetch_ahead(values + i * kept + k);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const T* x = tokens[m + j] + 2 * k;
        const auto xs = L::permute(L::load(x), index, L::load(x + L::kCount));
        sums.acc[i][j][chain] = dot<T>(sums.acc[i][j][chain], w, xs);
      }
    }
  };
  const auto whole = [](const T* p) { return L::load(p); };
  int64_t k = 0;
  for (; k + kChains * L::kCount <= kept; k += kChains * L::kCount) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) step(k + chain * L::kCount, chain, kBytes, whole);
  }
  for (; k < kept; k += L::kCount) {
    const int64_t count = at_most(kept - k, L::kCount);
    step(k, 0, ceil_div(count, 4), [count](const T* p) { return L::load(p, count); });
  }
  sums.put(output, m, r);
}

template <class T>
void run_nm(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
            int64_t last, void*) {
  const int64_t kept = kept_per_row(matrix.cols);
  const Tokens<T> tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  const int64_t meta_bytes = ceil_div(kept, 4);
  for (int64_t r = first; r < last; r += kRows) {
    const T* values = static_cast<const T*>(matrix.values) + r * kept;
    const uint8_t* meta = static_cast<const uint8_t*>(matrix.meta) + r * meta_bytes;
    for_token_groups(count, at_most(last - r, kRows), [&](auto rows_at_once, auto m_count, int64_t i, int64_t m) {
      nm_block<T, rows_at_once, m_count>(values + i * kept, meta + i * meta_bytes, kept, tokens, m, r + i, output);
    });
  }
}

template <class T>
constexpr Kernel kNM{kRows, 1, token_bytes<T>, prepare<T>, no_scratch, run_nm<T>};

}  // namespace
}  // namespace wandapp
