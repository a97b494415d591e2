// bitmap_windows with AVX2: a word shifted right by 3 bits a lane is the index of vpermps, which reads the low 3 bits.
#pragma once

#include "avx2_common.h"
#include "windows.h"

namespace wandapp {
namespace {

constexpr int64_t kPair = 2;  // steps that are loaded together

template <class T, int M>
void windows_block(const T* values, const uint32_t* words, int64_t steps, const Tokens& tokens, int64_t m, int64_t r,
                   int64_t rows, const Output<T>& output) {
  constexpr int kChains = M == 1 ? 4 : M == 2 ? 2 : 1;
  const __m256i shifts = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
  __m256 acc[M][kChains];
  for (auto& token : acc) {
    for (auto& chain : token) chain = _mm256_setzero_ps();
  }
  const float* window = tokens[m];
  const int64_t stride = tokens.stride;
  const auto pair = [&](int64_t s, int chain) {
    const Chunk chunk = load(values + s * kSlots);
#pragma GCC unroll 2
    for (int i = 0; i < kPair; ++i) {
      const uint32_t word = words[s + i];
      window += move_of(word);
      const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const __m256 x = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window + j * stride), index);
        __m256& sum = acc[j][(chain + i) % kChains];
        sum = _mm256_fmadd_ps(i == 0 ? chunk.first : chunk.second, x, sum);
      }
    }
  };
  int64_t s = 0;
  for (; s + 2 * kPair <= steps; s += 2 * kPair) {
    prefetch(values + s * kSlots);
    if constexpr (sizeof(T) == 4) prefetch(values + (s + kPair) * kSlots);
    prefetch(words + s);
    pair(s, 0);
    pair(s + kPair, kPair);
  }
  if (s < steps) pair(s, 0);
  for (int j = 0; j < M; ++j) {
    __m256 total = acc[j][0];
    for (int chain = 1; chain < kChains; ++chain) total = _mm256_add_ps(total, acc[j][chain]);
    alignas(32) float slots[kSlots];
    _mm256_store_ps(slots, total);
    for (int64_t i = 0; i < rows; ++i) output.put(m + j, r + i, slots[2 * i] + slots[2 * i + 1]);
  }
}

template <class T>
void run_windows(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                 int64_t last, void*) {
  const Tokens tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  for (int64_t r = first; r < last; r += kWindowRows) {
    const int64_t begin = matrix.offsets[r / kWindowRows], steps = matrix.offsets[r / kWindowRows + 1] - begin;
    const T* values = static_cast<const T*>(matrix.values) + begin * kSlots;
    const uint32_t* words = static_cast<const uint32_t*>(matrix.meta) + begin;
    for_token_groups(count, [&](auto m_count, int64_t m) {
      windows_block<T, m_count>(values, words, steps, tokens, m, r, at_most(last - r, kWindowRows), output);
    });
  }
}

}  // namespace
}  // namespace wandapp
