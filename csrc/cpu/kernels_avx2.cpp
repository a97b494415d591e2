// AVX2 + FMA + F16C.
//
// nm_pairs, the derived layout of 2:4: a 128-bit lane of fp32 activations is one group of 4 columns, and vpermilps picks
// any 4 of its 4 elements. So two rows are done at once: lane g of a step holds (row 0: both kept values of group g,
// row 1: both kept values of group g), 8 values a step instead of 16 dense ones. vpermilps reads only the low 2 bits of
// each element, hence one shift by a constant makes the control out of a word that holds 16 steps' positions:
//
//   block  4 rows: pairs p = 0, 1 of two rows          step   8 columns, 8 values of a pair
//   chunk  16 columns: steps h = 0, 1, 16 values       tile   8 chunks, one 32-bit word a lane: step s at bits [2s, +2)
//
// bitmap: a byte of the mask selects a pshufb control that spreads the next kept values over 8 columns.
//
// bf16 is widened in place: of 16 packed values the even ones by a shift, the odd ones by a mask. The activations of
// dense and bitmap kernels are therefore stored as 8 even, then 8 odd columns of every 16.
#include <immintrin.h>

#include "expand.h"

namespace wandapp {
namespace {

constexpr int kChunk = 16;
constexpr int kMaxTokens = 4;
constexpr int kDenseRows = 4;
constexpr int64_t kPrefetchBytes = 1024;

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address) + kPrefetchBytes, _MM_HINT_T0); }

float sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

struct Chunk {  // 16 weights
  __m256 first, second;
};

Chunk widen_bf16(__m256i packed) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(packed, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(packed, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}

Chunk load(const Bf16* w) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))); }
Chunk load(const Fp16* w) {
  const __m128i* half = reinterpret_cast<const __m128i*>(w);
  return {_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}
Chunk load(const float* w) { return {_mm256_loadu_ps(w), _mm256_loadu_ps(w + 8)}; }

// pshufb controls for 8 columns of 16 bits, and lane numbers for 8 columns of 32 bits; a removed column has bit 7 set.
struct ExpandTables {
  alignas(64) uint8_t words[256][16];
  alignas(64) int8_t lanes[256][8];
};

constexpr ExpandTables make_tables() {
  ExpandTables tables{};
  for (int mask = 0; mask < 256; ++mask) {
    int kept = 0;
    for (int column = 0; column < 8; ++column) {
      const bool keep = (mask >> column & 1) != 0;
      tables.words[mask][2 * column] = static_cast<uint8_t>(keep ? 2 * kept : 0x80);
      tables.words[mask][2 * column + 1] = static_cast<uint8_t>(keep ? 2 * kept + 1 : 0x80);
      tables.lanes[mask][column] = static_cast<int8_t>(keep ? kept : -128);
      kept += keep ? 1 : 0;
    }
  }
  return tables;
}

constexpr ExpandTables kTables = make_tables();

// 8 columns from the kept values at p. Reads 8 values, however many are kept.
__m128i expand_words(const void* p, uint32_t mask) {
  return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(p)),
                          _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.words[mask])));
}

__m256 expand_floats(const float* p, uint32_t mask) {
  int64_t lanes;
  std::memcpy(&lanes, kTables.lanes[mask], sizeof(lanes));
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

// ---- activations

size_t token_bytes(int64_t cols) { return static_cast<size_t>(ceil_div(cols, kChunk)) * kChunk * sizeof(float); }

template <class T, bool split>
bool prepare(const void* token, int64_t cols, void* prepared) {
  const T* x = static_cast<const T*>(token);
  float* out = static_cast<float*>(prepared);
  __m256 probe = _mm256_setzero_ps();
  const __m256 zero = _mm256_setzero_ps();
  for (int64_t k = 0; k < cols; k += kChunk) {
    T tail[kChunk] = {};
    const T* from = x + k;
    if (cols - k < kChunk) {
      std::memcpy(tail, from, static_cast<size_t>(cols - k) * sizeof(T));
      from = tail;
    }
    Chunk chunk = load(from);
    if constexpr (std::is_same_v<T, Bf16> && !split) {
      const __m256 low = _mm256_unpacklo_ps(chunk.first, chunk.second);
      const __m256 high = _mm256_unpackhi_ps(chunk.first, chunk.second);
      chunk = {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
    }
    probe = _mm256_fmadd_ps(chunk.first, zero, _mm256_fmadd_ps(chunk.second, zero, probe));
    _mm256_store_ps(out + k, chunk.first);
    _mm256_store_ps(out + k + 8, chunk.second);
  }
  return sum(probe) == 0.0f;
}

// ---- outputs

template <class T>
struct Output {
  const T* bias;
  T* out;
  int64_t stride;

  Output(const Matrix& matrix, int64_t first_token)
      : bias(static_cast<const T*>(matrix.bias)),
        out(static_cast<T*>(matrix.out) + first_token * matrix.rows),
        stride(matrix.rows) {}

  void put(int64_t token, int64_t row, float value) const {
    out[token * stride + row] = narrow<T>(bias == nullptr ? value : value + widen(bias[row]));
  }
};

struct Tokens {
  const float* x;
  int64_t stride;

  Tokens(const void* prepared, int64_t cols)
      : x(static_cast<const float*>(prepared)), stride(static_cast<int64_t>(token_bytes(cols) / sizeof(float))) {}
  const float* operator[](int64_t token) const { return x + token * stride; }
};

// Calls body(integral_constant<M>, first token) for groups of at most kMaxTokens tokens.
template <class Body>
void for_token_groups(int64_t tokens, Body body) {
  int64_t m = 0;
  for (; m + 4 <= tokens; m += 4) body(std::integral_constant<int, 4>(), m);
  if (tokens - m == 3) body(std::integral_constant<int, 3>(), m);
  if (tokens - m == 2) body(std::integral_constant<int, 2>(), m);
  if (tokens - m == 1) body(std::integral_constant<int, 1>(), m);
}

// ---- dense

// R rows that lie `row_stride` elements apart, M tokens.
template <class T, int R, int M>
void dense_block(const T* rows, int64_t row_stride, int64_t cols, const Tokens& tokens, int64_t m, int64_t r,
                 const Output<T>& output) {
  constexpr int kChains = M == 1 ? 2 : 1;
  __m256 acc[R][M][kChains];
  for (auto& row : acc) {
    for (auto& token : row) {
      for (auto& chain : token) chain = _mm256_setzero_ps();
    }
  }
  const auto step = [&](const T* w, int64_t stride, int64_t k) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Chunk chunk = load(w + i * stride);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const float* x = tokens[m + j] + k;
        acc[i][j][0] = _mm256_fmadd_ps(chunk.first, _mm256_load_ps(x), acc[i][j][0]);
        acc[i][j][kChains - 1] = _mm256_fmadd_ps(chunk.second, _mm256_load_ps(x + 8), acc[i][j][kChains - 1]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kChunk <= cols; k += kChunk) {
    for (int i = 0; i < R; ++i) prefetch(rows + i * row_stride + k);
    step(rows + k, row_stride, k);
  }
  if (k < cols) {
    T tail[R * kChunk] = {};
    for (int i = 0; i < R; ++i) {
      std::memcpy(tail + i * kChunk, rows + i * row_stride + k, static_cast<size_t>(cols - k) * sizeof(T));
    }
    step(tail, kChunk, k);
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < M; ++j) {
      const __m256 total = kChains == 2 ? _mm256_add_ps(acc[i][j][0], acc[i][j][kChains - 1]) : acc[i][j][0];
      output.put(m + j, r + i, sum(total));
    }
  }
}

// At most kDenseRows rows, all tokens.
template <class T>
void dense_rows(const T* rows, int64_t block, int64_t row_stride, int64_t cols, const Tokens& tokens, int64_t count,
                int64_t r, const Output<T>& output) {
  if (block == kDenseRows) {
    for_token_groups(count, [&](auto m_count, int64_t m) {
      dense_block<T, kDenseRows, m_count>(rows, row_stride, cols, tokens, m, r, output);
    });
    return;
  }
  for (int64_t i = 0; i < block; ++i) {
    for (int64_t m = 0; m < count; ++m) {
      dense_block<T, 1, 1>(rows + i * row_stride, row_stride, cols, tokens, m, r + i, output);
    }
  }
}

template <class T>
void run_dense(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
               int64_t last, void*) {
  const T* values = static_cast<const T*>(matrix.values);
  const Tokens tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  for (int64_t r = first; r < last; r += kDenseRows) {
    dense_rows(values + r * matrix.cols, at_most(last - r, kDenseRows), matrix.cols, matrix.cols, tokens, count, r,
               output);
  }
}

// ---- 2:4

template <class T, int M>
void pairs_block(const T* values, const __m256i* meta, int64_t chunks, const Tokens& tokens, int64_t m, int64_t r,
                 int64_t rows, const Output<T>& output) {
  constexpr int kPairs = 2;
  constexpr int kChains = M == 1 ? 2 : 1;
  __m256 acc[kPairs][M][kChains];
  for (auto& pair : acc) {
    for (auto& token : pair) {
      for (auto& chain : token) chain = _mm256_setzero_ps();
    }
  }
  const auto step = [&](const T* w, int64_t k, __m256i control0, __m256i control1, int shift) {
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; ++p) {
      const __m256i positions = p == 0 ? control0 : control1;
      const __m256i first = _mm256_srli_epi32(positions, shift);
      const __m256i second = _mm256_srli_epi32(positions, shift + 2);
      const Chunk chunk = load(w + p * kChunk);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const float* x = tokens[m + j] + k;
        acc[p][j][0] = _mm256_fmadd_ps(chunk.first, _mm256_permutevar_ps(_mm256_load_ps(x), first), acc[p][j][0]);
        acc[p][j][kChains - 1] = _mm256_fmadd_ps(
            chunk.second, _mm256_permutevar_ps(_mm256_load_ps(x + 8), second), acc[p][j][kChains - 1]);
      }
    }
  };
  const auto tile = [&](int64_t c, int count) {
    const __m256i control0 = _mm256_loadu_si256(meta);
    const __m256i control1 = _mm256_loadu_si256(meta + 1);
    prefetch(meta);
    meta += kPairs;
    const auto chunk = [&](int i) {
      prefetch(values);
      if constexpr (sizeof(T) == 4) prefetch(values + kChunk);
      step(values, (c + i) * kChunk, control0, control1, 4 * i);
      values += kPairs * kChunk;
    };
    if (M == 1 && count == 8) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) chunk(i);
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < count; ++i) chunk(i);
    }
  };
  for (int64_t c = 0; c < chunks; c += 8) tile(c, static_cast<int>(at_most(chunks - c, 8)));
  for (int p = 0; p < kPairs; ++p) {
    for (int j = 0; j < M; ++j) {
      const __m256 total = kChains == 2 ? _mm256_add_ps(acc[p][j][0], acc[p][j][kChains - 1]) : acc[p][j][0];
      alignas(16) float lanes[4];
      _mm_store_ps(lanes, _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1)));
      if (2 * p < rows) output.put(m + j, r + 2 * p, lanes[0] + lanes[1]);
      if (2 * p + 1 < rows) output.put(m + j, r + 2 * p + 1, lanes[2] + lanes[3]);
    }
  }
}

template <class T>
void run_pairs(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
               int64_t last, void*) {
  const int64_t chunks = ceil_div(matrix.cols, kPairsChunk);
  const int64_t tiles = ceil_div(matrix.cols, kPairsTile);
  const Tokens tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  for (int64_t r = first; r < last; r += kPairsRows) {
    const T* values = static_cast<const T*>(matrix.values) + r / kPairsRows * chunks * 2 * kChunk;
    const __m256i* meta = static_cast<const __m256i*>(matrix.meta) + r / kPairsRows * tiles * 2;
    for_token_groups(count, [&](auto m_count, int64_t m) {
      pairs_block<T, m_count>(values, meta, chunks, tokens, m, r, last - r, output);
    });
  }
}

// ---- bitmap

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

// The row's values with at least 8 readable ones after the last.
template <class T>
const T* readable_row(const Matrix& matrix, int64_t r, T* copy) {
  const T* row = static_cast<const T*>(matrix.values) + matrix.offsets[r];
  const int64_t kept = matrix.offsets[r + 1] - matrix.offsets[r];
  if (matrix.offsets[r + 1] + 8 <= matrix.offsets[matrix.rows]) return row;
  if (kept > 0) std::memcpy(copy, row, static_cast<size_t>(kept) * sizeof(T));
  std::memset(static_cast<void*>(copy + kept), 0, 8 * sizeof(T));
  return copy;
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

int64_t padded(int64_t cols) { return ceil_div(cols, kChunk) * kChunk; }

template <class T>
size_t bitmap_scratch(int64_t cols) {
  return static_cast<size_t>(padded(cols) * (kDenseRows + 1) + kChunk) * sizeof(T);
}

// Few tokens: spread and multiply at once. More: spread 4 rows into the cache, then multiply them as dense ones.
template <class T>
void run_bitmap(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                int64_t last, void* scratch) {
  const int64_t bytes = ceil_div(matrix.cols, 8);
  const int64_t width = padded(matrix.cols);
  const uint8_t* bitmap = static_cast<const uint8_t*>(matrix.meta);
  T* rows = static_cast<T*>(scratch);
  T* copy = rows + width * kDenseRows;
  const Tokens tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  if (count <= kMaxTokens) {
    for (int64_t r = first; r < last; ++r) {
      const T* values = readable_row(matrix, r, copy);
      for_token_groups(count, [&](auto m_count, int64_t) {
        bitmap_row<T, m_count>(values, bitmap + r * bytes, matrix.cols, tokens, r, output);
      });
    }
    return;
  }
  for (int64_t r = first; r < last; r += kDenseRows) {
    const int64_t block = at_most(last - r, kDenseRows);
    for (int64_t i = 0; i < block; ++i) {
      const T* values = readable_row(matrix, r + i, copy);
      const auto ahead = [&] { prefetch(values); };
      for_chunks(bitmap + (r + i) * bytes, matrix.cols, ahead, [&](int64_t k, uint32_t mask) {
        store(rows + i * width + k, expand(values, mask));
      });
    }
    dense_rows(rows, block, width, width, tokens, count, r, output);
  }
}

size_t no_scratch(int64_t) { return 0; }

template <class T>
constexpr Kernel kDense{kDenseRows, token_bytes, prepare<T, true>, no_scratch, run_dense<T>};
template <class T>
constexpr Kernel kPairs{kPairsRows, token_bytes, prepare<T, false>, no_scratch, run_pairs<T>};
template <class T>
constexpr Kernel kBitmap{kDenseRows, token_bytes, prepare<T, true>, bitmap_scratch<T>, run_bitmap<T>};

template <class T>
const Kernel* of_type(Format format) {
  if (format == Format::dense) return &kDense<T>;
  if (format == Format::nm_pairs) return &kPairs<T>;
  if (format == Format::bitmap) return &kBitmap<T>;
  return nullptr;
}

}  // namespace

const Kernel* avx2_kernel(Format format, Type type) {
  if (type == Type::bf16) return of_type<Bf16>(format);
  if (type == Type::fp16) return of_type<Fp16>(format);
  return of_type<float>(format);
}

}  // namespace wandapp
