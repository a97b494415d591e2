// Dense rows out of nm_pairs with AVX2. Of a step of 16 columns, a 128-bit half of the values is one group of each 8
// columns for two rows, 4 values a row; the byte of their positions selects the shuffle that spreads them.
#pragma once

#include "avx2_decompress.h"

namespace wandapp {
namespace {

// A byte of positions for each (g, row) and chunk of a tile: those of value i of group (h, g) at bits [4i + 2h, +2).
struct TilePositions {
  alignas(32) uint8_t bytes[4][8];

  // 8 words: both kept values of (g, row) lie side by side, a chunk is the same nibble of both.
  explicit TilePositions(__m256i words) {
    const __m256i low = _mm256_set1_epi64x(0x0f0f0f0f);
    const __m256i second = _mm256_srli_epi64(words, 32);
    const __m256i even = _mm256_or_si256(_mm256_and_si256(words, low),
                                         _mm256_slli_epi64(_mm256_and_si256(second, low), 4));
    const __m256i odd = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi64(words, 4), low),
                                        _mm256_andnot_si256(low, second));
    const __m256i zipped = _mm256_set1_epi64x(0x0703060205010400);
    const __m256i half = _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes),
                       _mm256_shuffle_epi8(_mm256_or_si256(even, _mm256_slli_epi64(odd, 32)),
                                           _mm256_add_epi8(zipped, half)));
  }
  uint8_t of(int g, int row, int chunk) const { return bytes[2 * g + row][chunk]; }
};

// 16 values of a pair in the order of bf16: lane for lane, both halves side by side.
__m256i load_lanes(const Bf16* values) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)); }
__m256i load_lanes(const Fp16* values) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values) + 1);
  return join(_mm_unpacklo_epi16(first, second), _mm_unpackhi_epi16(first, second));
}

// 16 columns of both rows. The values of the second row lie 8 bytes above those of the first.
template <class T, class Out>
void spread_pair(const T* values, const TilePositions& positions, int chunk, Out* row0, Out* row1) {
  const __m256i lanes = load_lanes(values);
  const auto spread = [&](__m256i of_row, int row) {
    const __m256i control = join(load_control(kPairsWords[positions.of(0, row, chunk)]),
                                 load_control(kPairsWords[positions.of(1, row, chunk)]));
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(of_row, control), 0xd8);
  };
  put_words<T>(row0, spread(lanes, 0));
  put_words<T>(row1, spread(_mm256_srli_si256(lanes, 8), 1));
}
void spread_pair(const float* values, const TilePositions& positions, int chunk, float* row0, float* row1) {
  for (int h = 0; h < 2; ++h) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 8 * h));
    const auto spread = [&](__m256i of_row, int row) {
      const __m256i control = join(load_control(kPairsFloats[positions.of(0, row, chunk)] + 16 * h),
                                   load_control(kPairsFloats[positions.of(1, row, chunk)] + 16 * h));
      return _mm256_shuffle_epi8(of_row, control);
    };
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row0 + 8 * h), spread(lanes, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row1 + 8 * h), spread(_mm256_srli_si256(lanes, 8), 1));
  }
}

// Rows r and r + 1, a pair of a block.
template <class T, class Out>
void decompress_pair(const Matrix& matrix, int64_t r, Out* row0, Out* row1) {
  const int64_t chunks = ceil_div(matrix.cols, kPairsChunk);
  const int64_t whole = matrix.cols / kPairsChunk;
  const int64_t block = r / kPairsRows, pair = r % kPairsRows / 2;
  const T* values = static_cast<const T*>(matrix.values) + (block * chunks * 2 + pair) * kChunk;
  const __m256i* meta =
      static_cast<const __m256i*>(matrix.meta) + block * ceil_div(matrix.cols, kPairsTile) * 2 + pair;
  for (int64_t c = 0; c < whole; c += 8) {
    const TilePositions positions(_mm256_loadu_si256(meta));
    meta += 2;
    const int count = static_cast<int>(at_most(whole - c, 8));
    for (int i = 0; i < count; ++i) {
      prefetch(values);
      if constexpr (sizeof(T) == 4) prefetch(values + kChunk);
      spread_pair(values, positions, i, row0 + (c + i) * kChunk, row1 + (c + i) * kChunk);
      values += 2 * kChunk;
    }
  }
  expand_nm_pairs<T>(matrix, r, row0, whole * kPairsChunk);
  expand_nm_pairs<T>(matrix, r + 1, row1, whole * kPairsChunk);
}

template <class T, class Out>
void decompress_pairs(const Matrix& matrix, int64_t first, int64_t last, Out* out) {
  for (int64_t r = first; r < last;) {
    Out* row = out + (r - first) * matrix.cols;
    if (r % 2 == 0 && r + 1 < last) {
      decompress_pair<T>(matrix, r, row, row + matrix.cols);
      r += 2;
    } else {
      expand_nm_pairs<T>(matrix, r, row, 0);
      r += 1;
    }
  }
}

}  // namespace
}  // namespace wandapp
