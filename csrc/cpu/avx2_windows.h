// bitmap_windows with AVX2: a word shifted right by 3 bits a lane is the index of vpermps, which reads the low 3 bits.
#pragma once

#include "avx2_common.h"
#include "windows.h"

namespace wandapp {
namespace {

constexpr int64_t kPair = 2;  // steps that are loaded together

template <class T>
struct WindowsBlock {
  const T* values;
  const uint32_t* words;
  int64_t steps;
  int64_t row;

  WindowsBlock(const Matrix& matrix, int64_t block)
      : values(static_cast<const T*>(matrix.values) + matrix.offsets[block] * kSlots),
        words(static_cast<const uint32_t*>(matrix.meta) + matrix.offsets[block]),
        steps(matrix.offsets[block + 1] - matrix.offsets[block]),
        row(block * kWindowRows) {}
};

// B blocks at once, M tokens.
template <class T, int64_t B, int M>
void windows_blocks(const WindowsBlock<T> (&blocks)[B], const Tokens& tokens, int64_t m, int64_t rows,
                    const Output<T>& output) {
  constexpr int kChains = M <= 2 ? 2 : 1;  // for any B: which blocks go together must not change a sum
  const __m256i shifts = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
  const int64_t stride = tokens.stride;
  __m256 acc[B][M][kChains];
  const float* window[B];
  int64_t common = blocks[0].steps;
  for (int b = 0; b < B; ++b) {
    for (auto& token : acc[b]) {
      for (auto& chain : token) chain = _mm256_setzero_ps();
    }
    window[b] = tokens[m];
    common = at_most(common, blocks[b].steps);
  }
  const auto pair = [&](int b, int64_t s) {
    const Chunk chunk = load(blocks[b].values + s * kSlots);
#pragma GCC unroll 2
    for (int i = 0; i < kPair; ++i) {
      const uint32_t* word = blocks[b].words + s + i;
      window[b] += move_of(word);
      const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(*reinterpret_cast<const int32_t*>(word)), shifts);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const __m256 x = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window[b] + j * stride), index);
        __m256& sum = acc[b][j][i % kChains];
        sum = _mm256_fmadd_ps(i == 0 ? chunk.first : chunk.second, x, sum);
      }
    }
  };
  int64_t s = 0;
  for (; s + 2 * kPair <= common; s += 2 * kPair) {
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) {
      prefetch(blocks[b].values + s * kSlots);
      if constexpr (sizeof(T) == 4) prefetch(blocks[b].values + (s + kPair) * kSlots);
      pair(b, s);
      pair(b, s + kPair);
    }
  }
#pragma GCC unroll 3
  for (int b = 0; b < B; ++b) {
#pragma GCC unroll 1
    for (int64_t rest = s; rest < blocks[b].steps; rest += kPair) pair(b, rest);
    for (int j = 0; j < M; ++j) {
      __m256 total = acc[b][j][0];
      if constexpr (kChains == 2) total = _mm256_add_ps(total, acc[b][j][1]);
      alignas(32) float slots[kSlots];
      _mm256_store_ps(slots, total);
      const int64_t r = blocks[b].row;
      for (int64_t i = 0; i < at_most(rows - r, kWindowRows); ++i) {
        output.put(m + j, r + i, slots[2 * i] + slots[2 * i + 1]);
      }
    }
  }
}

// One or two tokens: three or two blocks at once, for several streams of whole pages keep more of the memory busy.
template <class T>
void run_windows(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                 int64_t last, void*) {
  const Tokens tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  const int64_t begin = first / kWindowRows, end = ceil_div(last, kWindowRows);
  const int64_t streams = count == 1 ? 3 : count == 2 ? 2 : 1;
  const int64_t apart = streams > 1 ? (end - begin) / streams : 0;
  for (int64_t block = begin; block < begin + apart; ++block) {
    if (streams == 3) {
      const WindowsBlock<T> three[3] = {{matrix, block}, {matrix, block + apart}, {matrix, block + 2 * apart}};
      windows_blocks<T, 3, 1>(three, tokens, 0, last, output);
    } else {
      const WindowsBlock<T> two[2] = {{matrix, block}, {matrix, block + apart}};
      windows_blocks<T, 2, 2>(two, tokens, 0, last, output);
    }
  }
  for (int64_t block = begin + streams * apart; block < end; ++block) {
    const WindowsBlock<T> one[1] = {{matrix, block}};
    for_token_groups(count, [&](auto m_count, int64_t m) {
      windows_blocks<T, 1, m_count>(one, tokens, m, last, output);
    });
  }
}

}  // namespace
}  // namespace wandapp
