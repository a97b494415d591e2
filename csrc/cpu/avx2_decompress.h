// Dense rows out of compressed ones with AVX2: a byte of positions, or of the bitmap, selects a byte shuffle that spreads
// the next values over 8 columns. No load or store leaves the tensors: what is left of a row is expanded in plain C++.
#pragma once

#include "avx2_bitmap.h"
#include "avx2_position_tables.h"

namespace wandapp {
namespace {

// ---- 16 columns into a row: of the weight's type, or widened

__m256i join(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

template <class T>
void put_words(T* row, __m256i words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), words);
}

template <class T>
void put_words(float* row, __m256i words);
template <>
void put_words<Bf16>(float* row, __m256i words) {
  // Unpacking works in each half; a zero below a word is its fp32.
  const __m256i halves = _mm256_permute4x64_epi64(words, 0xd8);
  const __m256i zero = _mm256_setzero_si256();
  _mm256_storeu_ps(row, _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, halves)));
  _mm256_storeu_ps(row + 8, _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, halves)));
}
template <>
void put_words<Fp16>(float* row, __m256i words) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
  _mm256_storeu_ps(row, low);
  _mm256_storeu_ps(row + 8, high);
  if (_mm256_movemask_ps(_mm256_cmp_ps(low, high, _CMP_UNORD_Q)) == 0) return;
  // A NaN: the instruction sets its quiet bit, bits are to stay.
  Fp16 values[kChunk];
  std::memcpy(values, &words, sizeof(values));
  for (int i = 0; i < kChunk; ++i) row[i] = widen(values[i]);
}

// ---- 2:4, canonical. Each returns the first column that it did not write.

template <class T, class Out>
int64_t spread_nm(const T* values, const uint8_t* meta, int64_t cols, Out* row) {
  int64_t k = 0;
  for (; k + kChunk <= cols; k += kChunk) {
    prefetch(values);
    const __m128i kept = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m256i control = join(load_control(kNMWords[meta[0]]), load_control(kNMWords[meta[1]]));
    // 4 values for each half.
    put_words<T>(row + k, _mm256_shuffle_epi8(_mm256_permute4x64_epi64(_mm256_castsi128_si256(kept), 0x50), control));
    values += kChunk / 2;
    meta += 2;
  }
  return k;
}
int64_t spread_nm(const float* values, const uint8_t* meta, int64_t cols, float* row) {
  int64_t k = 0;
  for (; k + 8 <= cols; k += 8) {
    prefetch(values);
    const __m128i kept = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m256i control = _mm256_load_si256(reinterpret_cast<const __m256i*>(kNMFloats[*meta]));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(_mm256_castsi128_si256(kept), 0x50), control);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + k), spread);
    values += 4;
    meta += 1;
  }
  return k;
}

template <class T, class Out>
void decompress_nm(const Matrix& matrix, int64_t first, int64_t last, Out* out) {
  const int64_t kept = kept_per_row(matrix.cols);
  for (int64_t r = first; r < last; ++r) {
    const T* values = static_cast<const T*>(matrix.values) + r * kept;
    const uint8_t* meta = static_cast<const uint8_t*>(matrix.meta) + r * ceil_div(kept, 4);
    Out* row = out + (r - first) * matrix.cols;
    expand_nm<T>(matrix, r, row, spread_nm(values, meta, matrix.cols, row));
  }
}

// ---- bitmap

template <class T, class Out>
void spread_bitmap(const T*& values, uint32_t mask, Out* row) {
  const __m128i low = expand_words(values, mask & 0xff);
  const __m128i high = expand_words(values + _mm_popcnt_u32(mask & 0xff), mask >> 8);
  put_words<T>(row, join(low, high));
  values += _mm_popcnt_u32(mask);
}
void spread_bitmap(const float*& values, uint32_t mask, float* row) { store(row, expand(values, mask)); }

template <class T, class Out>
void decompress_bitmap(const Matrix& matrix, int64_t first, int64_t last, Out* out) {
  constexpr int64_t kColumns = 64;
  const int64_t bytes = ceil_div(matrix.cols, 8);
  const T* end = static_cast<const T*>(matrix.values) + matrix.offsets[matrix.rows];
  for (int64_t r = first; r < last; ++r) {
    const T* values = static_cast<const T*>(matrix.values) + matrix.offsets[r];
    const uint8_t* bitmap = static_cast<const uint8_t*>(matrix.meta) + r * bytes;
    Out* row = out + (r - first) * matrix.cols;
    int64_t k = 0;
    // Loads read ahead of what is kept, but not past the last value of the weight.
    for (; k + kColumns <= matrix.cols && end - values >= kColumns; k += kColumns) {
      uint64_t mask;
      std::memcpy(&mask, bitmap + k / 8, sizeof(mask));
      prefetch(values);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        spread_bitmap(values, static_cast<uint32_t>(mask >> (i * kChunk) & 0xffff), row + k + i * kChunk);
      }
    }
    expand_bitmap(matrix, r, row, k, values);
  }
}

}  // namespace
}  // namespace wandapp
