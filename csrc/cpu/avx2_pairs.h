// nm_pairs, the derived layout of 2:4, with AVX2.
//
// A 128-bit lane of fp32 activations is one group of 4 columns, and vpermilps picks any 4 of its 4 elements. So two rows
// are done at once: lane g of a step holds (row 0: both kept values of group g, row 1: both kept values of group g), 8
// values a step instead of 16 dense ones. vpermilps reads only the low 2 bits of each element, hence one shift by a
// constant makes the control out of a word that holds 16 steps' positions:
//
//   block  4 rows: pairs p = 0, 1 of two rows          step   8 columns, 8 values of a pair
//   chunk  16 columns: steps h = 0, 1, 16 values       tile   8 chunks, one 32-bit word a lane: step s at bits [2s, +2)
#pragma once

#include "avx2_common.h"

namespace wandapp {
namespace {

template <class T>
struct PairsBlock {
  const T* values;
  const __m256i* meta;
  int64_t row;

  PairsBlock(const Matrix& matrix, int64_t block)
      : values(static_cast<const T*>(matrix.values) + block * ceil_div(matrix.cols, kPairsChunk) * 2 * kChunk),
        meta(static_cast<const __m256i*>(matrix.meta) + block * ceil_div(matrix.cols, kPairsTile) * 2),
        row(block * kPairsRows) {}
};

// B blocks at once, M tokens.
template <class T, int64_t B, int M>
void pairs_blocks(PairsBlock<T> (&blocks)[B], int64_t chunks, const Tokens& tokens, int64_t m, int64_t rows,
                  const Output<T>& output) {
  constexpr int kPairs = 2;
  constexpr int kChains = M == 1 ? 2 : 1;
  __m256 acc[B][kPairs][M][kChains];
  for (auto& block : acc) {
    for (auto& pair : block) {
      for (auto& token : pair) {
        for (auto& chain : token) chain = _mm256_setzero_ps();
      }
    }
  }
  const auto step = [&](__m256 (&sums)[kPairs][M][kChains], const T* w, int64_t k, __m256i control0, __m256i control1,
                        int shift) {
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; ++p) {
      const __m256i positions = p == 0 ? control0 : control1;
      const __m256i first = _mm256_srli_epi32(positions, shift);
      const __m256i second = _mm256_srli_epi32(positions, shift + 2);
      const Chunk chunk = load(w + p * kChunk);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const float* x = tokens[m + j] + k;
        sums[p][j][0] = _mm256_fmadd_ps(chunk.first, _mm256_permutevar_ps(_mm256_load_ps(x), first), sums[p][j][0]);
        sums[p][j][kChains - 1] = _mm256_fmadd_ps(
            chunk.second, _mm256_permutevar_ps(_mm256_load_ps(x + 8), second), sums[p][j][kChains - 1]);
      }
    }
  };
  const auto tile = [&](int b, int64_t c, int count) {
    PairsBlock<T>& block = blocks[b];
    const __m256i control0 = _mm256_loadu_si256(block.meta);
    const __m256i control1 = _mm256_loadu_si256(block.meta + 1);
    prefetch(block.meta);
    block.meta += kPairs;
    const auto chunk = [&](int i) {
      prefetch(block.values);
      if constexpr (sizeof(T) == 4) prefetch(block.values + kChunk);
      step(acc[b], block.values, (c + i) * kChunk, control0, control1, 4 * i);
      block.values += kPairs * kChunk;
    };
    if (M == 1 && count == 8) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) chunk(i);
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < count; ++i) chunk(i);
    }
  };
  for (int64_t c = 0; c < chunks; c += 8) {
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) tile(b, c, static_cast<int>(at_most(chunks - c, 8)));
  }
#pragma GCC unroll 2
  for (int b = 0; b < B; ++b) {
    for (int p = 0; p < kPairs; ++p) {
      for (int j = 0; j < M; ++j) {
        const auto& sums = acc[b][p][j];
        const __m256 total = kChains == 2 ? _mm256_add_ps(sums[0], sums[kChains - 1]) : sums[0];
        alignas(16) float lanes[4];
        _mm_store_ps(lanes, _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1)));
        const int64_t r = blocks[b].row + 2 * p;
        if (r < rows) output.put(m + j, r, lanes[0] + lanes[1]);
        if (r + 1 < rows) output.put(m + j, r + 1, lanes[2] + lanes[3]);
      }
    }
  }
}

// One token: two blocks at once, for two streams of whole pages keep more of the memory busy than one.
template <class T>
void run_pairs(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
               int64_t last, void*) {
  const int64_t chunks = ceil_div(matrix.cols, kPairsChunk);
  const Tokens tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  const int64_t begin = first / kPairsRows, end = ceil_div(last, kPairsRows);
  const int64_t apart = count == 1 ? (end - begin) / 2 : 0;
  for (int64_t block = begin; block < begin + apart; ++block) {
    PairsBlock<T> two[2] = {{matrix, block}, {matrix, block + apart}};
    pairs_blocks<T, 2, 1>(two, chunks, tokens, 0, last, output);
  }
  for (int64_t block = begin + 2 * apart; block < end; ++block) {
    for_token_groups(count, [&](auto m_count, int64_t m) {
      PairsBlock<T> one[1] = {{matrix, block}};
      pairs_blocks<T, 1, m_count>(one, chunks, tokens, m, last, output);
    });
  }
}

}  // namespace
}  // namespace wandapp
