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

// R rows from r on, `apart` rows from one to the next; M tokens.
template <class T, int R, int M>
void nm_block(const Matrix& matrix, int64_t r, int64_t apart, const Tokens<T>& tokens, int64_t m,
              const Output<T>& output) {
  using L = Lanes<T>;
  constexpr int64_t kBytes = L::kCount / 4;
  Accumulators<R, M> sums;
  constexpr int kChains = Accumulators<R, M>::kChains;
  const int64_t kept = kept_per_row(matrix.cols), meta_bytes = ceil_div(kept, 4);
  const T* values = static_cast<const T*>(matrix.values) + r * kept;
  const uint8_t* meta = static_cast<const uint8_t*>(matrix.meta) + r * meta_bytes;
  const auto step = [&](int64_t k, int chain, int64_t bytes, auto load) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Words index = L::positions(meta + i * apart * meta_bytes + k / 4, bytes);
      const T* from = values + i * apart * kept + k;
      const auto w = load(from);
      prefetch_ahead(from);
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
  sums.put(output, m, r, apart);
}

template <class T>
void run_nm(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
            int64_t last, void*) {
  const Tokens<T> tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  for_rows_and_tokens(first, last, count, [&](auto rows_at_once, auto m_count, int64_t r, int64_t apart, int64_t m) {
    nm_block<T, rows_at_once, m_count>(matrix, r, apart, tokens, m, output);
  });
}

template <class T>
constexpr Kernel kNM{kStreams, 1, token_bytes<T>, prepare<T>, no_scratch, run_nm<T>};

}  // namespace
}  // namespace wandapp
