// What the AVX2 kernels share: loading weights, activations.
//
// bf16 is widened in place: of 16 packed values the even ones by a shift, the odd ones by a mask. The activations of
// dense and bitmap kernels are therefore stored as 8 even, then 8 odd columns of every 16.
#pragma once

#include <immintrin.h>

#include "vector_common.h"

namespace wandapp {
namespace {

constexpr int kChunk = 16;

[[maybe_unused]] inline void fetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}
void prefetch(const void* address) { fetch(static_cast<const char*>(address) + kPrefetchBytes); }

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

// ---- activations

size_t token_bytes(int64_t cols) { return static_cast<size_t>(ceil_div(cols, kChunk)) * kChunk * sizeof(float); }

template <class T, bool split>
bool prepare(const void* token, int64_t, int64_t cols, void* prepared) {
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

}  // namespace
}  // namespace wandapp
