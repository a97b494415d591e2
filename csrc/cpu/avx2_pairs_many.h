// nm_pairs with AVX2 for several tokens: as in avx2_windows_many.h every value is multiplied with the activations of its
// column, 8 or 16 tokens side by side.
#pragma once

#include "avx2_pairs.h"
#include "avx2_token_groups.h"

namespace wandapp {
namespace {

static_assert(kPairsRows == kBlockRows);

template <class T, int V>
struct PairsTokens {
  const T* values;
  const __m256i* meta;
  TokenSums<V> sums;

  void start(const PairsBlock<T>& block) {
    values = block.values;
    meta = block.meta;
    sums.clear();
  }
};

// Where the columns of a tile are, in bytes from the first column of their group.
template <int V>
struct TileColumns {
  alignas(32) uint32_t at[kPairsTile / 8][2][8];  // step, pair of rows, value

  // (Not inlined: in the loop over chunks the constants would take registers that the sums need.)
  [[gnu::noinline]] void find(const __m256i* meta) {
    for (int pair = 0; pair < 2; ++pair) {
      __m256i positions = _mm256_loadu_si256(meta + pair);
      for (auto& step : at) {
        const __m256i position = _mm256_and_si256(positions, _mm256_set1_epi32(3));
        _mm256_store_si256(reinterpret_cast<__m256i*>(step[pair]), _mm256_slli_epi32(position, V == 1 ? 5 : 6));
        positions = _mm256_srli_epi32(positions, 2);
      }
    }
  }
};

// `chunks` chunks on from where the block stands; x are their activations. (Not inlined, as windows_strip.)
template <class T, int V>
[[gnu::noinline]] void pairs_strip(PairsTokens<T, V>& block, const PairsTokens<T, V>& next, const float* x,
                                   int64_t chunks) {
  constexpr int64_t kGroupBytes = kGroup * V * kLanes * sizeof(float);
  const T *values = block.values, *next_values = next.values;
  const char* group = reinterpret_cast<const char*>(x);
  TileColumns<V> columns;
  TokenSums<V> sums = block.sums;
  for (int64_t c = 0; c < chunks; ++c) {
    if (c % kTileChunks == 0) {
      fetch(next.meta + c / kTileChunks * 2);
      columns.find(block.meta);
      block.meta += 2;
    }
    fetch(next_values);
    next_values += 2 * kChunk;
    const Chunk chunks_of[2] = {load(values), load(values + kChunk)};
#pragma GCC unroll 2
    for (int step = 0; step < 2; ++step) {
      const auto& at = columns.at[c % kTileChunks * 2 + step];
      const Halves weights[2] = {Halves(step == 0 ? chunks_of[0].first : chunks_of[0].second),
                                 Halves(step == 0 ? chunks_of[1].first : chunks_of[1].second)};
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) {
        const int i = n / 4 * 4 + n % 2 * 2 + n / 2 % 2;  // the rows in turn
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; ++pair) {
          const char* column = group + (2 * step + i / 4) * kGroupBytes + at[pair][i];
          sums.add(2 * pair + i % 4 / 2, i % 2, spread(weights[pair].of[i / 4], i % 4), column);
        }
      }
    }
    values += 2 * kChunk;
    group += 4 * kGroupBytes;
  }
  block.sums = sums;
  block.values = values;
}

template <class T>
void run_pairs_many(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t tokens, int64_t first,
                    int64_t last, void*) {
  const Output<T> output(matrix, first_token);
  for_groups(prepared, matrix.cols, tokens, [&](auto vectors, const float* x, int64_t m, int64_t count) {
    multiply_in_strips<PairsTokens<T, vectors>>(
        first, last, matrix.cols, m, count, output,
        [&](auto& block, int64_t number) { block.start(PairsBlock<T>(matrix, number)); },
        [&](auto& block, const auto& next, int64_t k, int64_t columns) {
          pairs_strip(block, next, x + k * vectors * kLanes, ceil_div(columns, kPairsChunk));
        });
  });
}

template <class T>
constexpr Kernel kPairsMany{
    kPairsRows, kGroupTokens, group_bytes, prepare_group<T>, no_scratch, run_pairs_many<T>};

// From this many tokens on, 16 at once cost less than permuting for each.
constexpr int64_t kPairsManyTokens = 13;

template <class T>
constexpr Kernel kPairs{kPairsRows,   1,       token_bytes,    prepare<T, false>, no_scratch,
                        run_pairs<T>, nullptr, &kPairsMany<T>, kPairsManyTokens};

}  // namespace
}  // namespace wandapp
