// AVX-512 (F, BW, VL, VBMI), compiled twice: with BF16 dot products and without.
//
// nm reads the canonical 2:4 weight as it is. Of 64 columns, 32 values are kept and one 64-bit word holds their 32
// positions; the activations are permuted, not the weights expanded:
//
//   index = (multishift(shifts, meta) & 3) | base        word i: its 2-bit position, plus its group's first column
//   xs    = permute_words(x[0:32], index, x[32:64])
//   acc   = dot(acc, values, xs)
//
// bitmap: a byte of the mask selects a byte shuffle that spreads the next kept values over 8 columns; 4 of them make a
// vector. (Cheaper than vpexpandw where that is slow, and it needs no VBMI2.)
#include "expand.h"

#ifdef WANDAPP_EMULATE_AVX512
#include "../emulation/avx512_ops.h"
#else
#include "avx512_ops.h"
#endif

// WANDAPP_AVX512_KERNEL: the name of the exported function. WANDAPP_BF16_DOT: 1 with AVX512-BF16.
namespace wandapp {
namespace {

constexpr int kMaxTokens = 4;
constexpr int kRows = 4;
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kPaddedCols = 64;

uint32_t low_bits(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
void prefetch_ahead(const void* p) { prefetch(static_cast<const char*>(p) + kPrefetchBytes); }

// ---- one vector of weights of type T: 64 bytes

struct WordPositions {
  alignas(64) uint8_t shifts[64];
  alignas(64) uint16_t base[32];
  constexpr WordPositions() : shifts(), base() {
    for (int i = 0; i < 32; ++i) {
      shifts[2 * i] = static_cast<uint8_t>(2 * i);
      base[i] = static_cast<uint16_t>(4 * (i / 2));
    }
  }
};
constexpr WordPositions kWordPositions;

struct FloatPositions {
  alignas(64) uint32_t shifts[16];
  alignas(64) uint32_t base[16];
  constexpr FloatPositions() : shifts(), base() {
    for (uint32_t i = 0; i < 16; ++i) {
      shifts[i] = 2 * i;
      base[i] = 4 * (i / 2);
    }
  }
};
constexpr FloatPositions kFloatPositions;

template <class T>
struct Lanes {  // 16-bit types
  using Vector = Words;
  static constexpr int64_t kCount = 32;
  static Vector load(const void* p) { return load_words(p); }
  static Vector load(const void* p, int64_t count) { return load_words_masked(low_bits(count), p); }
  static void store(void* p, Vector v) { store_words(p, v); }
  static Vector permute(Vector low, Words index, Vector high) { return permute_words(low, index, high); }
  static Words positions(const uint8_t* meta, int64_t bytes) {
    uint64_t fields = 0;
    std::memcpy(&fields, meta, static_cast<size_t>(bytes));
    return and_or(multishift(load_words(kWordPositions.shifts), broadcast_64(fields)), broadcast_16(3),
                  load_words(kWordPositions.base));
  }
};

template <>
struct Lanes<float> {
  using Vector = Floats;
  static constexpr int64_t kCount = 16;
  static Vector load(const void* p) { return load_floats(p); }
  static Vector load(const void* p, int64_t count) { return load_floats_masked(low_bits(count), p); }
  static void store(void* p, Vector v) { store_floats(p, v); }
  static Vector permute(Vector low, Words index, Vector high) { return permute_floats(low, index, high); }
  static Words positions(const uint8_t* meta, int64_t bytes) {
    uint32_t fields = 0;
    std::memcpy(&fields, meta, static_cast<size_t>(bytes));
    return and_or(shift_right_32(broadcast_32(fields), load_words(kFloatPositions.shifts)), broadcast_32(3),
                  load_words(kFloatPositions.base));
  }
};

template <class T>
Floats dot(Floats acc, Words w, Words x);
template <>
Floats dot<Bf16>(Floats acc, Words w, Words x) {
#if WANDAPP_BF16_DOT
  return dot_bf16(acc, w, x);
#else
  return multiply_add(even_bf16(w), even_bf16(x), multiply_add(odd_bf16(w), odd_bf16(x), acc));
#endif
}
template <>
Floats dot<Fp16>(Floats acc, Words w, Words x) {
  return multiply_add(low_fp16(w), low_fp16(x), multiply_add(high_fp16(w), high_fp16(x), acc));
}
template <class T>
Floats dot(Floats acc, Floats w, Floats x) {
  return multiply_add(w, x, acc);
}

// ---- activations: as they are, with zeros up to a multiple of 64 columns

template <class T>
size_t token_bytes(int64_t cols) {
  return static_cast<size_t>(ceil_div(cols, kPaddedCols) * kPaddedCols) * sizeof(T);
}

bool finite(float v) { return (bits_of(v) & 0x7f800000u) != 0x7f800000u; }
bool finite(Bf16 v) { return (v.bits & 0x7f80u) != 0x7f80u; }
bool finite(Fp16 v) { return (v.bits & 0x7c00u) != 0x7c00u; }

template <class T>
bool prepare(const void* token, int64_t cols, void* prepared) {
  const T* x = static_cast<const T*>(token);
  std::memcpy(prepared, token, static_cast<size_t>(cols) * sizeof(T));
  std::memset(static_cast<T*>(prepared) + cols, 0, token_bytes<T>(cols) - static_cast<size_t>(cols) * sizeof(T));
  bool all = true;
  for (int64_t k = 0; k < cols; ++k) all &= finite(x[k]);
  return all;
}

template <class T>
struct Tokens {
  const T* x;
  int64_t stride;

  Tokens(const void* prepared, int64_t cols)
      : x(static_cast<const T*>(prepared)), stride(static_cast<int64_t>(token_bytes<T>(cols) / sizeof(T))) {}
  const T* operator[](int64_t token) const { return x + token * stride; }
};

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

// Calls body(R, M, first row, first token) for a block of at most kRows rows and all tokens: 4 rows share each vector of
// activations when there are several tokens; with one token, or in an incomplete block, rows go one by one, and so does
// what is left of the tokens there.
template <class Body>
void for_token_groups(int64_t tokens, int64_t block, Body body) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, kRows> all;
  int64_t m = 0;
  if (block == kRows) {
    for (; m + 4 <= tokens; m += 4) body(all, std::integral_constant<int, 4>(), 0, m);
    if (tokens - m == 3) body(all, std::integral_constant<int, 3>(), 0, m);
    if (tokens - m == 2) body(all, std::integral_constant<int, 2>(), 0, m);
    if (tokens - m != 1) return;
  }
  for (int64_t i = 0; i < block; ++i) {
    for (int64_t j = m; j < tokens; ++j) body(one, one, i, j);
  }
}

// ---- accumulators of R rows x M tokens; one row and token has 4 chains, to hide the latency

template <int R, int M>
struct Accumulators {
  static constexpr int kChains = R * M == 1 ? 4 : 1;
  Floats acc[R][M][kChains];

  Accumulators() {
    for (auto& row : acc) {
      for (auto& token : row) {
        for (auto& chain : token) chain = zero();
      }
    }
  }
  template <class T>
  void put(const Output<T>& output, int64_t m, int64_t r) const {
    for (int i = 0; i < R; ++i) {
      for (int j = 0; j < M; ++j) {
        const Floats* chain = acc[i][j];
        const Floats total =
            kChains == 4 ? add(add(chain[0], chain[1]), add(chain[kChains - 2], chain[kChains - 1])) : chain[0];
        output.put(m + j, r + i, sum(total));
      }
    }
  }
};

// ---- dense

template <class T, int R, int M>
void dense_block(const T* rows, int64_t row_stride, int64_t cols, const Tokens<T>& tokens, int64_t m, int64_t r,
                 const Output<T>& output) {
  using L = Lanes<T>;
  Accumulators<R, M> sums;
  constexpr int kChains = Accumulators<R, M>::kChains;
  const auto step = [&](int64_t k, int chain, auto load) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const auto w = load(rows + i * row_stride + k);
      prefetch_ahead(rows + i * row_stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        sums.acc[i][j][chain] = dot<T>(sums.acc[i][j][chain], w, L::load(tokens[m + j] + k));
      }
    }
  };
  const auto whole = [](const T* p) { return L::load(p); };
  int64_t k = 0;
  for (; k + kChains * L::kCount <= cols; k += kChains * L::kCount) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) step(k + chain * L::kCount, chain, whole);
  }
  for (; k < cols; k += L::kCount) {
    const int64_t count = at_most(cols - k, L::kCount);
    step(k, 0, [count](const T* p) { return L::load(p, count); });
  }
  sums.put(output, m, r);
}

// At most kRows rows, all tokens.
template <class T>
void dense_rows(const T* rows, int64_t block, int64_t row_stride, int64_t cols, const Tokens<T>& tokens, int64_t count,
                int64_t r, const Output<T>& output) {
  for_token_groups(count, block, [&](auto rows_at_once, auto m_count, int64_t i, int64_t m) {
    dense_block<T, rows_at_once, m_count>(rows + i * row_stride, row_stride, cols, tokens, m, r + i, output);
  });
}

template <class T>
void run_dense(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
               int64_t last, void*) {
  const T* values = static_cast<const T*>(matrix.values);
  const Tokens<T> tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  for (int64_t r = first; r < last; r += kRows) {
    dense_rows(values + r * matrix.cols, at_most(last - r, kRows), matrix.cols, matrix.cols, tokens, count, r, output);
  }
}

// ---- 2:4

template <class T, int R, int M>
void nm_block(const T* values, const uint8_t* meta, int64_t kept, const Tokens<T>& tokens, int64_t m, int64_t r,
              const Output<T>& output) {
  using L = Lanes<T>;
  constexpr int64_t kBytes = L::kCount / 4;
  Accumulators<R, M> sums;
  constexpr int kChains = Accumulators<R, M>::kChains;
  const int64_t meta_bytes = ceil_div(kept, 4);
  const auto step = [&](int64_t k, int chain, int64_t bytes, auto load) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Words index = L::positions(meta + i * meta_bytes + k / 4, bytes);
      const auto w = load(values + i * kept + k);
      prefetch_ahead(values + i * kept + k);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const T* x = tokens[m + j] + 2 * k;
        const auto xs = L::permute(L::load(x), index, L::load(x + L::kCount));
        sums.acc[i][j][chain] = dot<T>(sums.acc[i][j][chain], w, xs);
      }
    }
  };
  const auto whole = [](const T* p) { return L::load(p); };
  int64_t k = 0;
  for (; k + kChains * L::kCount <= kept; k += kChains * L::kCount) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) step(k + chain * L::kCount, chain, kBytes, whole);
  }
  for (; k < kept; k += L::kCount) {
    const int64_t count = at_most(kept - k, L::kCount);
    step(k, 0, ceil_div(count, 4), [count](const T* p) { return L::load(p, count); });
  }
  sums.put(output, m, r);
}

template <class T>
void run_nm(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
            int64_t last, void*) {
  const int64_t kept = kept_per_row(matrix.cols);
  const Tokens<T> tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  const int64_t meta_bytes = ceil_div(kept, 4);
  for (int64_t r = first; r < last; r += kRows) {
    const T* values = static_cast<const T*>(matrix.values) + r * kept;
    const uint8_t* meta = static_cast<const uint8_t*>(matrix.meta) + r * meta_bytes;
    for_token_groups(count, at_most(last - r, kRows), [&](auto rows_at_once, auto m_count, int64_t i, int64_t m) {
      nm_block<T, rows_at_once, m_count>(values + i * kept, meta + i * meta_bytes, kept, tokens, m, r + i, output);
    });
  }
}

// ---- bitmap

struct ShuffleTable {
  alignas(64) uint8_t control[256][16];
  constexpr ShuffleTable() : control() {
    for (int mask = 0; mask < 256; ++mask) {
      int kept = 0;
      for (int column = 0; column < 8; ++column) {
        const bool keep = (mask >> column & 1) != 0;
        control[mask][2 * column] = static_cast<uint8_t>(keep ? 2 * kept : 0x80);
        control[mask][2 * column + 1] = static_cast<uint8_t>(keep ? 2 * kept + 1 : 0x80);
        kept += keep ? 1 : 0;
      }
    }
  }
};
constexpr ShuffleTable kShuffles{};

template <class T>
Quarter expand_8(const T*& p, uint32_t mask) {
  const Quarter spread = shuffle_bytes(load_quarter(p), load_quarter(kShuffles.control[mask & 0xff]));
  p += __builtin_popcount(mask & 0xff);
  return spread;
}

// One vector of columns from the kept values at p, which moves on. Reads 32 values at most, however many are kept.
template <class T>
Words expand(const T*& p, uint32_t mask) {
  const Quarter a = expand_8(p, mask);
  const Quarter b = expand_8(p, mask >> 8);
  const Quarter c = expand_8(p, mask >> 16);
  const Quarter d = expand_8(p, mask >> 24);
  return join(a, b, c, d);
}
Floats expand(const float*& p, uint32_t mask) {
  const Floats spread = expand_floats(mask, load_floats(p));
  p += __builtin_popcount(mask);
  return spread;
}

uint32_t mask_at(const uint8_t* bitmap, int64_t byte, int64_t count) {
  uint32_t mask = 0;
  std::memcpy(&mask, bitmap + byte, static_cast<size_t>(count));
  return mask;
}

// The row's values with at least 16 readable ones after the last.
template <class T>
const T* readable_row(const Matrix& matrix, int64_t r, T* copy) {
  constexpr int64_t kSlack = 16;
  const T* row = static_cast<const T*>(matrix.values) + matrix.offsets[r];
  const int64_t kept = matrix.offsets[r + 1] - matrix.offsets[r];
  if (matrix.offsets[r + 1] + kSlack <= matrix.offsets[matrix.rows]) return row;
  if (kept > 0) std::memcpy(copy, row, static_cast<size_t>(kept) * sizeof(T));
  std::memset(static_cast<void*>(copy + kept), 0, kSlack * sizeof(T));
  return copy;
}

template <class T, int M>
void bitmap_row(const T* values, const uint8_t* bitmap, int64_t cols, const Tokens<T>& tokens, int64_t r,
                const Output<T>& output) {
  using L = Lanes<T>;
  Accumulators<1, M> sums;
  constexpr int kChains = Accumulators<1, M>::kChains;
  const auto step = [&](int64_t k, int chain, int64_t bytes) {
    prefetch_ahead(values);
    const auto w = expand(values, mask_at(bitmap, k / 8, bytes));
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) sums.acc[0][j][chain] = dot<T>(sums.acc[0][j][chain], w, L::load(tokens[j] + k));
  };
  int64_t k = 0;
  for (; k + kChains * L::kCount <= cols; k += kChains * L::kCount) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) step(k + chain * L::kCount, chain, L::kCount / 8);
  }
  for (; k < cols; k += L::kCount) step(k, 0, ceil_div(at_most(cols - k, L::kCount), 8));
  sums.put(output, 0, r);
}

int64_t padded(int64_t cols) { return ceil_div(cols, kPaddedCols) * kPaddedCols; }

template <class T>
size_t bitmap_scratch(int64_t cols) {
  return static_cast<size_t>(padded(cols) * (kRows + 1) + kPaddedCols) * sizeof(T);
}

// Few tokens: spread and multiply at once. More: spread 4 rows into the cache, then multiply them as dense ones.
template <class T>
void run_bitmap(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                int64_t last, void* scratch) {
  using L = Lanes<T>;
  const int64_t bytes = ceil_div(matrix.cols, 8);
  const int64_t width = padded(matrix.cols);
  const uint8_t* bitmap = static_cast<const uint8_t*>(matrix.meta);
  T* rows = static_cast<T*>(scratch);
  T* copy = rows + width * kRows;
  const Tokens<T> tokens(prepared, matrix.cols);
  const Output<T> output(matrix, first_token);
  for (int64_t r = first; r < last; r += kRows) {
    const int64_t block = at_most(last - r, kRows);
    for (int64_t i = 0; i < block; ++i) {
      const T* values = readable_row(matrix, r + i, copy);
      const uint8_t* row_bitmap = bitmap + (r + i) * bytes;
      if (count == 1) bitmap_row<T, 1>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count == 2) bitmap_row<T, 2>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count == 3) bitmap_row<T, 3>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count == 4) bitmap_row<T, 4>(values, row_bitmap, matrix.cols, tokens, r + i, output);
      if (count <= kMaxTokens) continue;
      for (int64_t k = 0; k < width; k += L::kCount) {
        const int64_t mask_bytes = k < matrix.cols ? ceil_div(at_most(matrix.cols - k, L::kCount), 8) : 0;
        L::store(rows + i * width + k, expand(values, mask_at(row_bitmap, k / 8, mask_bytes)));
      }
    }
    if (count > kMaxTokens) dense_rows(rows, block, width, width, tokens, count, r, output);
  }
}

size_t no_scratch(int64_t) { return 0; }

template <class T>
constexpr Kernel kDense{kRows, token_bytes<T>, prepare<T>, no_scratch, run_dense<T>};
template <class T>
constexpr Kernel kNM{kRows, token_bytes<T>, prepare<T>, no_scratch, run_nm<T>};
template <class T>
constexpr Kernel kBitmap{kRows, token_bytes<T>, prepare<T>, bitmap_scratch<T>, run_bitmap<T>};

template <class T>
const Kernel* of_type(Format format) {
  if (format == Format::dense) return &kDense<T>;
  if (format == Format::nm) return &kNM<T>;
  if (format == Format::bitmap) return &kBitmap<T>;
  return nullptr;
}

}  // namespace

const Kernel* WANDAPP_AVX512_KERNEL(Format format, Type type) {
  if (type == Type::bf16) return of_type<Bf16>(format);
  if (type == Type::fp16) return of_type<Fp16>(format);
  return of_type<float>(format);
}

}  // namespace wandapp
