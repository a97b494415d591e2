// bitmap_windows with AVX2 for several tokens: the 8 or 16 activations of one column lie side by side, and every kept
// weight is multiplied with all of them. Neither weights nor activations are permuted, and the time per token goes with
// the weights that are kept.
#pragma once

#include <algorithm>

#include "avx2_windows.h"

namespace wandapp {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kGroupTokens = 16;

// Vectors of tokens that a group of `count` has; those that are missing are zeros.
int64_t vectors_of(int64_t count) { return ceil_div(count, kLanes); }

size_t group_bytes(int64_t cols) {
  return static_cast<size_t>(std::max(cols, kWindow) * kGroupTokens) * sizeof(float);
}

__m256 load_8(const float* x) { return _mm256_loadu_ps(x); }
__m256 load_8(const Fp16* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
__m256 load_8(const Bf16* x) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

// rows[i][j] to rows[j][i].
void transpose_8(__m256* rows) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

// Tokens [count, cols] to fp32 [cols, 8 or 16].
template <class T>
bool prepare_group(const void* tokens, int64_t count, int64_t cols, void* prepared) {
  const T* x = static_cast<const T*>(tokens);
  float* out = static_cast<float*>(prepared);
  const int64_t width = vectors_of(count) * kLanes;
  const __m256 zero = _mm256_setzero_ps();
  __m256 probe = zero;
  for (int64_t k = 0; k < cols; k += kLanes) {
    const int64_t columns = at_most(cols - k, kLanes);
    for (int64_t m = 0; m < width; m += kLanes) {
      __m256 block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        T tail[kLanes] = {};
        const bool whole = m + i < count && columns == kLanes;
        if (m + i < count && !whole) {
          std::memcpy(tail, x + (m + i) * cols + k, static_cast<size_t>(columns) * sizeof(T));
        }
        block[i] = load_8(whole ? x + (m + i) * cols + k : tail);
        probe = _mm256_fmadd_ps(block[i], zero, probe);
      }
      transpose_8(block);
      for (int64_t i = 0; i < columns; ++i) _mm256_store_ps(out + (k + i) * width + m, block[i]);
    }
  }
  // What a window of a narrow weight reads past the last column.
  for (int64_t k = cols; k < kWindow; ++k) {
    for (int64_t m = 0; m < width; m += kLanes) _mm256_store_ps(out + k * width + m, zero);
  }
  return sum(probe) == 0.0f;
}

template <class T, int V>
void windows_tokens(const T* values, const uint32_t* words, int64_t steps, const float* x, int64_t count, int64_t r,
                    int64_t rows, int64_t m, const Output<T>& output) {
  constexpr int kShift = V == 1 ? 5 : 6;  // log2 of a column's bytes
  __m256 acc[kWindowRows][V];
  for (auto& row : acc) {
    for (auto& vector : row) vector = _mm256_setzero_ps();
  }
  const char* window = reinterpret_cast<const char*>(x);
  alignas(32) float weights[kPair][kSlots];
  for (int64_t s = 0; s < steps; s += kPair) {
    prefetch(values + s * kSlots);
    prefetch(words + s);
    const Chunk chunk = load(values + s * kSlots);
    _mm256_store_ps(weights[0], chunk.first);
    _mm256_store_ps(weights[1], chunk.second);
#pragma GCC unroll 2
    for (int i = 0; i < kPair; ++i) {
      const uint32_t word = words[s + i];
      window += move_of(word) << kShift;
#pragma GCC unroll 8
      for (int slot = 0; slot < kSlots; ++slot) {
        const int shift = 3 * slot - kShift;
        const uint32_t column = (shift < 0 ? word << -shift : word >> shift) & 7u << kShift;
        const float* of_column = reinterpret_cast<const float*>(window + column);
        const __m256 weight = _mm256_broadcast_ss(&weights[i][slot]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          __m256& sum = acc[slot / 2][v];
          sum = _mm256_fmadd_ps(weight, _mm256_load_ps(of_column + v * kLanes), sum);
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    alignas(32) float sums[V * kLanes];
    for (int v = 0; v < V; ++v) _mm256_store_ps(sums + v * kLanes, acc[i][v]);
    for (int64_t j = 0; j < count; ++j) output.put(m + j, r + i, sums[j]);
  }
}

template <class T>
void run_windows_many(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                      int64_t last, void*) {
  const Output<T> output(matrix, first_token);
  for (int64_t m = 0; m < count; m += kGroupTokens) {
    const float* x = static_cast<const float*>(prepared) + m / kGroupTokens * (group_bytes(matrix.cols) / sizeof(float));
    const int64_t tokens = at_most(count - m, kGroupTokens);
    for (int64_t r = first; r < last; r += kWindowRows) {
      const int64_t begin = matrix.offsets[r / kWindowRows], steps = matrix.offsets[r / kWindowRows + 1] - begin;
      const T* values = static_cast<const T*>(matrix.values) + begin * kSlots;
      const uint32_t* words = static_cast<const uint32_t*>(matrix.meta) + begin;
      const int64_t rows = at_most(last - r, kWindowRows);
      if (vectors_of(tokens) == 1) {
        windows_tokens<T, 1>(values, words, steps, x, tokens, r, rows, m, output);
      } else {
        windows_tokens<T, 2>(values, words, steps, x, tokens, r, rows, m, output);
      }
    }
  }
}

template <class T>
constexpr Kernel kWindowsMany{
    kWindowRows, kGroupTokens, group_bytes, prepare_group<T>, no_scratch, run_windows_many<T>};

// From this many tokens on, 8 at once cost less than permuting for each.
constexpr int64_t kManyTokens = 7;

template <class T>
constexpr Kernel kWindows{kWindowRows,    1,          token_bytes,      prepare<T, false>,
                          no_scratch,     run_windows<T>, &kWindowsMany<T>, kManyTokens};

}  // namespace
}  // namespace wandapp
