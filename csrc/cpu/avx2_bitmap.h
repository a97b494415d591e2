// Bitmap weights with AVX2: a byte of the mask selects a pshufb control that spreads the next kept values over 8 columns.
#pragma once

#include "avx2_dense.h"

namespace wandapp {
namespace {

// Lane numbers that spread the next kept values of 32 bits over 8 columns; a removed column is negative.
struct LaneTable {
  alignas(64) int8_t of[256][8];
  constexpr LaneTable() : of() {
    for (int mask = 0; mask < 256; ++mask) {
      int8_t kept = 0;
      for (int column = 0; column < 8; ++column) {
        of[mask][column] = (mask >> column & 1) != 0 ? kept++ : int8_t{-128};
      }
    }
  }
};
constexpr LaneTable kLaneNumbers;

constexpr int64_t kLoaded = 8;

// 8 columns from the kept values at p. Reads kLoaded values, however many are kept.
__m128i expand_words(const void* p, uint32_t mask) {
  return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(p)),
                          _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.control[mask])));
}

__m256 expand_floats(const float* p, uint32_t mask) {
  int64_t lanes;
  std::memcpy(&lanes, kLaneNumbers.of[mask], sizeof(lanes));
  const __m256i index = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(lanes));
  const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), spread);
}

// 16 columns from the kept values at p, which moves on.
Chunk expand(const Bf16*& p, uint32_t mask) {
  const __m128i low = expand_words(p, mask & 0xff);
  const __m128i high = expand_words(p + _mm_popcnt_u32(mask & 0xff), mask >> 8);
  p += _mm_popcnt_u32(mask);
  return widen_bf16(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}
Chunk expand(const Fp16*& p, uint32_t mask) {
  const __m128i low = expand_words(p, mask & 0xff);
  const __m128i high = expand_words(p + _mm_popcnt_u32(mask & 0xff), mask >> 8);
  p += _mm_popcnt_u32(mask);
  return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
}
Chunk expand(const float*& p, uint32_t mask) {
  const __m256 low = expand_floats(p, mask & 0xff);
  const __m256 high = expand_floats(p + _mm_popcnt_u32(mask & 0xff), mask >> 8);
  p += _mm_popcnt_u32(mask);
  return {low, high};
}

// Calls body(k, mask of 16 columns) over a row's bitmap, and ahead() every 64 columns: at half the weights kept these
// are a cache line of values.
template <class Ahead, class Body>
void for_chunks(const uint8_t* bitmap, int64_t cols, Ahead ahead, Body body) {
  int64_t k = 0;
  for (; k + 64 <= cols; k += 64) {
    uint64_t mask;
    std::memcpy(&mask, bitmap + k / 8, sizeof(mask));
    ahead();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) body(k + i * kChunk, static_cast<uint32_t>(mask >> (i * kChunk) & 0xffff));
  }
  for (; k < cols; k += kChunk) {
    uint32_t mask = bitmap[k / 8];
    if (cols - k > 8) mask |= static_cast<uint32_t>(bitmap[k / 8 + 1]) << 8;
    body(k, mask);
  }
}

template <class T, int M>
void bitmap_row(const T* values, const uint8_t* bitmap, int64_t cols, const Tokens& tokens, int64_t r,
                const Output<T>& output) {
  __m256 acc[M][2];
  for (auto& token : acc) token[0] = token[1] = _mm256_setzero_ps();
  const auto ahead = [&] { prefetch(values); };
  for_chunks(bitmap, cols, ahead, [&](int64_t k, uint32_t mask) {
    const Chunk chunk = expand(values, mask);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) {
      const float* x = tokens[j] + k;
      acc[j][0] = _mm256_fmadd_ps(chunk.first, _mm256_load_ps(x), acc[j][0]);
      acc[j][1] = _mm256_fmadd_ps(chunk.second, _mm256_load_ps(x + 8), acc[j][1]);
    }
  });
  for (int j = 0; j < M; ++j) output.put(j, r, sum(_mm256_add_ps(acc[j][0], acc[j][1])));
}

void store(Bf16* row, const Chunk& chunk) {
  const __m256i even = _mm256_srli_epi32(_mm256_castps_si256(chunk.first), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm256_or_si256(even, _mm256_castps_si256(chunk.second)));
}
void store(Fp16* row, const Chunk& chunk) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(row), _mm256_cvtps_ph(chunk.first, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 8), _mm256_cvtps_ph(chunk.second, 0));
}
void store(float* row, const Chunk& chunk) {
  _mm256_storeu_ps(row, chunk.first);
  _mm256_storeu_ps(row + 8, chunk.second);
}

// Few tokens: spread and multiply at once. More: spread 4 rows into the cache, then multiply them as dense ones.
template <class T>
void run_bitmap(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                int64_t last, void* scratch) {
  const int64_t bytes = ceil_div(matrix.cols, 8);
  const int64_t width = padded<kChunk>(matrix.cols);
  const uint8_t* bitmap = static_cast<const uint8_t*>(matrix.meta);
  T* rows = static_cast<T*>(scratch);
  T* copy = rows + width * kDenseRows;
  const Tokens tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  if (count <= kMaxTokens) {
    for (int64_t r = first; r < last; ++r) {
      const T* values = readable_row<kLoaded>(matrix, r, copy);
      for_token_groups(count, [&](auto m_count, int64_t) {
        bitmap_row<T, m_count>(values, bitmap + r * bytes, matrix.cols, tokens, r, output);
      });
    }
    return;
  }
  for (int64_t r = first; r < last; r += kDenseRows) {
    const int64_t block = at_most(last - r, kDenseRows);
    for (int64_t i = 0; i < block; ++i) {
      const T* values = readable_row<kLoaded>(matrix, r + i, copy);
      const auto ahead = [&] { prefetch(values); };
      for_chunks(bitmap + (r + i) * bytes, matrix.cols, ahead, [&](int64_t k, uint32_t mask) {
        store(rows + i * width + k, expand(values, mask));
      });
    }
    dense_rows(rows, block, width, width, tokens, count, r, 1, output);
  }
}

template <class T>
constexpr Kernel kBitmap{
    kDenseRows, 1, token_bytes, prepare<T, true>, bitmap_scratch<T, kChunk, kDenseRows>, run_bitmap<T>};

}  // namespace
}  // namespace wandapp
