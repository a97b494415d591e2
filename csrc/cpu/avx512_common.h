// What the AVX-512 kernels (F, BW, VL, VBMI) share: vectors of weights, activations, accumulators.
//
// WANDAPP_BF16_DOT: 1 with AVX512-BF16.
#pragma once

#include "vector_common.h"

#ifdef WANDAPP_EMULATE_AVX512
#include "../emulation/avx512_ops.h"
#else
#include "avx512_ops.h"
#endif

namespace wandapp {
namespace {

constexpr int kRows = 4;     // at once, with several tokens
constexpr int kStreams = 8;  // rows at once, with one token
constexpr int64_t kPaddedCols = 64;

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
bool prepare(const void* token, int64_t, int64_t cols, void* prepared) {
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

// Calls body(R, first row, distance to the next row) for rows [first, last): `together` rows at once, which share each
// vector of activations, and what is left of the rows one by one.
//
// They are that part of all rows apart, and each goes on in the row that follows it: as streams, none of which is
// interrupted, they keep more of the memory busy than rows side by side.
template <int together, class Body>
void for_rows(int64_t first, int64_t last, Body body) {
  const int64_t apart = (last - first) / together;
  for (int64_t r = first; r < first + apart; ++r) body(std::integral_constant<int, together>(), r, apart);
  for (int64_t r = first + together * apart; r < last; ++r) body(std::integral_constant<int, 1>(), r, 1);
}

// Calls body(R, M, first row, distance to the next row, first token). Single rows are multiplied with single tokens.
template <class Body>
void for_rows_and_tokens(int64_t first, int64_t last, int64_t tokens, Body body) {
  constexpr std::integral_constant<int, 1> one;
  if (tokens == 1) {
    for_rows<kStreams>(first, last, [&](auto rows, int64_t r, int64_t apart) { body(rows, one, r, apart, 0); });
    return;
  }
  for_rows<kRows>(first, last, [&](auto rows, int64_t r, int64_t apart) {
    if constexpr (rows == 1) {
      for (int64_t m = 0; m < tokens; ++m) body(rows, one, r, apart, m);
    } else {
      int64_t m = 0;
      for (; m + 4 <= tokens; m += 4) body(rows, std::integral_constant<int, 4>(), r, apart, m);
      if (tokens - m == 3) body(rows, std::integral_constant<int, 3>(), r, apart, m);
      if (tokens - m == 2) body(rows, std::integral_constant<int, 2>(), r, apart, m);
      if (tokens - m == 1) body(rows, one, r, apart, m);
    }
  });
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
  void put(const Output<T>& output, int64_t m, int64_t r, int64_t apart) const {
    for (int i = 0; i < R; ++i) {
      for (int j = 0; j < M; ++j) {
        const Floats* chain = acc[i][j];
        const Floats total =
            kChains == 4 ? add(add(chain[0], chain[1]), add(chain[kChains - 2], chain[kChains - 1])) : chain[0];
        output.put(m + j, r + i * apart, sum(total));
      }
    }
  }
};

}  // namespace
}  // namespace wandapp
