// Tokens side by side, for kernels that multiply one weight with several: fp32 [columns, 8 or 16], zeros up to a multiple
// of 16 columns and 8 tokens.
//
// All columns do not fit the first-level cache, and each is read about once by every block of 4 rows. So the columns are
// taken in strips that fit, each for several blocks, whose sums wait in between.
#pragma once

#include "avx2_common.h"

namespace wandapp {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kGroupTokens = 16;
constexpr int64_t kStripColumns = 256;  // 16 KB with 16 tokens: half of a first-level cache
constexpr int64_t kStripBlocks = 16;
constexpr int64_t kBlockRows = 4;

// Vectors of tokens that a group of `count` has; those that are missing are zeros.
int64_t vectors_of(int64_t count) { return ceil_div(count, kLanes); }

int64_t padded_columns(int64_t cols) { return ceil_div(cols, kChunk) * kChunk; }

size_t group_bytes(int64_t cols) { return static_cast<size_t>(padded_columns(cols) * kGroupTokens) * sizeof(float); }

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
  for (int64_t k = cols; k < padded_columns(cols); ++k) {
    for (int64_t m = 0; m < width; m += kLanes) _mm256_store_ps(out + k * width + m, zero);
  }
  return sum(probe) == 0.0f;
}

// Calls body(integral_constant<V>, x [columns, 8 V], first token, tokens) for every group.
template <class Body>
void for_groups(const void* prepared, int64_t cols, int64_t tokens, Body body) {
  const char* group = static_cast<const char*>(prepared);
  for (int64_t m = 0; m < tokens; m += kGroupTokens) {
    const float* x = reinterpret_cast<const float*>(group);
    const int64_t count = at_most(tokens - m, kGroupTokens);
    if (vectors_of(count) == 1) {
      body(std::integral_constant<int, 1>(), x, m, count);
    } else {
      body(std::integral_constant<int, 2>(), x, m, count);
    }
    group += group_bytes(cols);
  }
}

// Sums of a block's rows x 8 V tokens. With V = 1 two for each, which take turns: a sum has to wait for the one before.
template <int V>
struct TokenSums {
  __m256 of[kBlockRows][2];

  void clear() {
    for (auto& row : of) row[0] = row[1] = _mm256_setzero_ps();
  }

  // of[row] += weight * x for value number i of the row. (Always inline: only then do the sums stay in registers.)
  [[gnu::always_inline]] void add(int row, int i, __m256 weight, const char* x) {
    const float* tokens = reinterpret_cast<const float*>(x);
    if constexpr (V == 1) {
      of[row][i % 2] = _mm256_fmadd_ps(weight, _mm256_load_ps(tokens), of[row][i % 2]);
    } else {
      of[row][0] = _mm256_fmadd_ps(weight, _mm256_load_ps(tokens), of[row][0]);
      of[row][1] = _mm256_fmadd_ps(weight, _mm256_load_ps(tokens + kLanes), of[row][1]);
    }
  }

  // The first `rows` rows and `count` tokens, into rows r and tokens m on of the output.
  template <class T>
  void put(int64_t m, int64_t count, int64_t r, int64_t rows, const Output<T>& output) const {
    for (int64_t i = 0; i < rows; ++i) {
      alignas(32) float sums[2 * kLanes];
      _mm256_store_ps(sums, V == 1 ? _mm256_add_ps(of[i][0], of[i][1]) : of[i][0]);
      _mm256_store_ps(sums + kLanes, of[i][1]);
      for (int64_t j = 0; j < count; ++j) output.put(m + j, r + i, sums[j]);
    }
  }
};

// Lane i of both halves of v in all lanes of its half: less work for the loads than a broadcast from memory.
inline __m256 spread(__m256 v, int i) {
  switch (i) {
    case 0:
      return _mm256_permute_ps(v, 0x00);
    case 1:
      return _mm256_permute_ps(v, 0x55);
    case 2:
      return _mm256_permute_ps(v, 0xaa);
    default:
      return _mm256_permute_ps(v, 0xff);
  }
}

struct Halves {
  __m256 of[2];  // the lower, the upper 4 of 8 weights, twice

  Halves(__m256 lower, __m256 upper) : of{lower, upper} {}
  explicit Halves(__m256 eight)
      : of{_mm256_permute2f128_ps(eight, eight, 0x00), _mm256_permute2f128_ps(eight, eight, 0x11)} {}
};

// Multiplies rows [first, last) with `count` tokens from m on: start(block, its number) for every block of rows, then
// strip(block, the block that is next, first column, columns) until each has seen all columns. A Block has `sums`.
template <class Block, class T, class Start, class Strip>
void multiply_in_strips(int64_t first, int64_t last, int64_t cols, int64_t m, int64_t count, const Output<T>& output,
                        Start start, Strip strip) {
  Block blocks[kStripBlocks];
  for (int64_t r = first; r < last; r += kStripBlocks * kBlockRows) {
    const int64_t together = at_most(ceil_div(last - r, kBlockRows), kStripBlocks);
    for (int64_t b = 0; b < together; ++b) start(blocks[b], r / kBlockRows + b);
    for (int64_t k = 0; k < cols; k += kStripColumns) {
      for (int64_t b = 0; b < together; ++b) {
        strip(blocks[b], blocks[b + 1 == together ? 0 : b + 1], k, at_most(cols - k, kStripColumns));
      }
    }
    for (int64_t b = 0; b < together; ++b) {
      const int64_t row = r + b * kBlockRows;
      blocks[b].sums.put(m, count, row, at_most(last - row, kBlockRows), output);
    }
  }
}

}  // namespace
}  // namespace wandapp
