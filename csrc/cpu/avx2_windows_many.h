// bitmap_windows with AVX2 for several tokens: every value is multiplied with the activations of its column, 8 or 16
// tokens side by side. Nothing is permuted, and the time per token goes with the number of values.
#pragma once

#include "avx2_token_groups.h"
#include "avx2_windows.h"

namespace wandapp {
namespace {

// (Not inlined: in the loop over rows GCC would keep addresses, and then sums, on the stack.)
template <class T, int V>
[[gnu::noinline]] void windows_tokens(const WindowsBlock<T>& block, const float* x, int64_t m, int64_t count,
                                      int64_t rows, const Output<T>& output) {
  const T* values = block.values;
  const uint32_t* words = block.words;
  constexpr int kShift = V == 1 ? 5 : 6;  // log2 of a column's bytes
  __m256 acc[kWindowRows][V];
  for (auto& row : acc) {
    for (auto& vector : row) vector = _mm256_setzero_ps();
  }
  const char* window = reinterpret_cast<const char*>(x);
  alignas(32) float weights[kPair][kSlots];
  for (int64_t s = 0; s < block.steps; s += kPair) {
    prefetch(values + s * kSlots);
    prefetch(words + s);
    const Chunk chunk = load(values + s * kSlots);
    _mm256_store_ps(weights[0], chunk.first);
    _mm256_store_ps(weights[1], chunk.second);
#pragma GCC unroll 2
    for (int i = 0; i < kPair; ++i) {
      const uint32_t word = words[s + i];
      window += move_of(words + s + i) << kShift;
#pragma GCC unroll 8
      for (int slot = 0; slot < kSlots; ++slot) {
        const int shift = 3 * slot - kShift;
        const uint32_t column = (shift < 0 ? word << -shift : word >> shift) & 7u << kShift;
        const float* of_column = reinterpret_cast<const float*>(window + column);
        const __m256 weight = _mm256_set1_ps(weights[i][slot]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          __m256& sum = acc[slot / 2][v];
          sum = _mm256_fmadd_ps(weight, _mm256_load_ps(of_column + v * kLanes), sum);
        }
      }
    }
  }
  put_tokens(acc, m, count, block.row, at_most(rows - block.row, kWindowRows), output);
}

template <class T>
void run_windows_many(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t tokens, int64_t first,
                      int64_t last, void*) {
  const Output<T> output(matrix, first_token);
  for_groups(prepared, matrix.cols, tokens, [&](auto vectors, const float* x, int64_t m, int64_t count) {
    for (int64_t block = first / kWindowRows; block < ceil_div(last, kWindowRows); ++block) {
      windows_tokens<T, vectors>(WindowsBlock<T>(matrix, block), x, m, count, last, output);
    }
  });
}

template <class T>
constexpr Kernel kWindowsMany{
    kWindowRows, kGroupTokens, group_bytes, prepare_group<T>, no_scratch, run_windows_many<T>};

// From this many tokens on, 8 at once cost less than permuting for each.
constexpr int64_t kWindowsManyTokens = 7;

template <class T>
constexpr Kernel kWindows{kWindowRows,    1,       token_bytes,      prepare<T, false>, no_scratch,
                          run_windows<T>, nullptr, &kWindowsMany<T>, kWindowsManyTokens};

}  // namespace
}  // namespace wandapp
