// Every operation of the AMX kernels that plain C++ does not have, behind one small named function; vectors are those of
// avx512_ops.h. emulation/amx_ops.h has the same functions in plain C++.
//
// Tiles are named by their number, which the instruction holds. Compilers know nothing of what they contain: "memory"
// keeps stores to what a tile loads before the load (GCC 12's own intrinsics do not say so).
#pragma once

#include "avx512_ops.h"

namespace wandapp {
namespace {

// The shapes of all tiles, 64 bytes (Intel SDM, vol. 1, "Tile configuration"); clears them.
inline void configure_tiles(const void* config) {
  __asm__ volatile("ldtilecfg %0" : : "m"(*static_cast<const uint8_t(*)[64]>(config)));
}
// Back to the initial state: nothing to save when the thread is switched.
inline void release_tiles() { __asm__ volatile("tilerelease"); }

template <int tile>
void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// Row i from p + i * stride.
template <int tile>
void load_tile(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
void store_tile(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
// sums[i][j] += over p of a[i][2p] * b[p][2j] + a[i][2p + 1] * b[p][2j + 1]; sums of fp32, a and b of bf16.
template <int sums, int a, int b>
void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

// Into the second-level cache.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// The first 16 words; the others are not read, and undefined.
inline Words load_half(const void* p) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline Words and_words(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words or_words(Words a, Words b) { return _mm512_or_si512(a, b); }
inline Floats as_floats(Words v) { return _mm512_castsi512_ps(v); }
// The first `count` lanes as bf16, rounded as narrow<Bf16> does. (vcvtneps2bf16 takes subnormal numbers for zero.)
inline void store_bf16(void* p, int64_t count, Floats v) {
  const Words bits = _mm512_castps_si512(v), upper = _mm512_srli_epi32(bits, 16);
  const Words half = _mm512_add_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const Words rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const Words quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), first = static_cast<__mmask16>((1u << count) - 1);
  _mm512_mask_cvtepi32_storeu_epi16(p, first, _mm512_mask_mov_epi32(rounded, nan, quiet));
}

}  // namespace
}  // namespace wandapp
