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

#include <utility>

#include "avx2_common.h"

namespace wandapp {
namespace {

constexpr int kBlockPairs = 2;
constexpr int64_t kTileChunks = kPairsTile / kPairsChunk;

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

// B blocks side by side, M tokens.
template <class T, int B, int M>
void pairs_blocks(PairsBlock<T> (&blocks)[B], int64_t chunks, const Tokens& tokens, int64_t m, int64_t rows,
                  const Output<T>& output) {
  __m256 acc[B][kBlockPairs][M];
  for (auto& block : acc) {
    for (auto& pair : block) {
      for (auto& sum : pair) sum = _mm256_setzero_ps();
    }
  }
  const auto chunk = [&](int64_t c, int i) {
    const int64_t k = (c + i) * kPairsChunk;
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const T* w = blocks[b].values + i * kBlockPairs * kChunk;
      // With one token the streams are as many, and as fast, as the processor follows by itself.
      if constexpr (M > 1) {
        prefetch(w);
        if constexpr (sizeof(T) == 4) prefetch(w + kChunk);
      }
#pragma GCC unroll 2
      for (int p = 0; p < kBlockPairs; ++p) {
        const __m256i positions = _mm256_loadu_si256(blocks[b].meta + p);
        const __m256i first = _mm256_srli_epi32(positions, 4 * i);
        const __m256i second = _mm256_srli_epi32(positions, 4 * i + 2);
        const Chunk weights = load(w + p * kChunk);
#pragma GCC unroll 4
        for (int j = 0; j < M; ++j) {
          const float* x = tokens[m + j] + k;
          __m256& sum = acc[b][p][j];
          sum = _mm256_fmadd_ps(weights.first, _mm256_permutevar_ps(_mm256_load_ps(x), first), sum);
          sum = _mm256_fmadd_ps(weights.second, _mm256_permutevar_ps(_mm256_load_ps(x + 8), second), sum);
        }
      }
    }
  };
  for (int64_t c = 0; c < chunks; c += kTileChunks) {
    if (c + kTileChunks <= chunks) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileChunks; ++i) chunk(c, i);
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < chunks - c; ++i) chunk(c, i);
    }
    for (PairsBlock<T>& block : blocks) {
      if constexpr (M > 1) prefetch(block.meta);
      block.values += kTileChunks * kBlockPairs * kChunk;
      block.meta += kBlockPairs;
    }
  }
  for (int b = 0; b < B; ++b) {
    for (int p = 0; p < kBlockPairs; ++p) {
      for (int j = 0; j < M; ++j) {
        const __m256 sum = acc[b][p][j];
        alignas(16) float lanes[4];
        _mm_store_ps(lanes, _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
        const int64_t r = blocks[b].row + 2 * p;
        if (r < rows) output.put(m + j, r, lanes[0] + lanes[1]);
        if (r + 1 < rows) output.put(m + j, r + 1, lanes[2] + lanes[3]);
      }
    }
  }
}

// B blocks at once, so far apart that each is a stream of whole pages: several keep more of the memory busy than one.
// Returns the first block that is left.
template <class T, int B, int M, size_t... I>
int64_t pairs_streams(const Matrix& matrix, const Tokens& tokens, int64_t begin, int64_t end, int64_t rows,
                      const Output<T>& output, std::index_sequence<I...>) {
  const int64_t apart = (end - begin) / B;
  for (int64_t block = begin; block < begin + apart; ++block) {
    PairsBlock<T> blocks[B] = {{matrix, block + static_cast<int64_t>(I) * apart}...};
    pairs_blocks<T, B, M>(blocks, ceil_div(matrix.cols, kPairsChunk), tokens, 0, rows, output);
  }
  return begin + B * apart;
}

template <class T>
void run_pairs(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
               int64_t last, void*) {
  const Tokens tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  const int64_t end = ceil_div(last, kPairsRows);
  int64_t block = first / kPairsRows;
  if (count == 1) {
    block = pairs_streams<T, 4, 1>(matrix, tokens, block, end, last, output, std::make_index_sequence<4>());
  }
  if (count == 2) {
    block = pairs_streams<T, 2, 2>(matrix, tokens, block, end, last, output, std::make_index_sequence<2>());
  }
  for (; block < end; ++block) {
    for_token_groups(count, [&](auto m_count, int64_t m) {
      PairsBlock<T> one[1] = {{matrix, block}};
      pairs_blocks<T, 1, m_count>(one, ceil_div(matrix.cols, kPairsChunk), tokens, m, last, output);
    });
  }
}

}  // namespace
}  // namespace wandapp
