// Every AVX-512 operation the kernels use, behind one small named function. emulation/avx512_ops.h has the same
// functions in plain C++.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace wandapp {
namespace {

using Words = __m512i;  // 32 words of 16 bits (or 16 of 32, or 8 of 64)
using Floats = __m512;  // 16 fp32

inline Words load_words(const void* p) { return _mm512_loadu_si512(p); }
// Words whose mask bit is 0 are 0 and are not read.
inline Words load_words_masked(uint32_t mask, const void* p) { return _mm512_maskz_loadu_epi16(mask, p); }
inline Floats load_floats(const void* p) { return _mm512_loadu_ps(p); }
inline Floats load_floats_masked(uint32_t mask, const void* p) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
}
inline void store_words(void* p, Words v) { _mm512_storeu_si512(p, v); }
inline void store_floats(void* p, Floats v) { _mm512_storeu_ps(p, v); }
// 16 bytes from each address, one after the other. (Inserting from memory needs no shuffle unit; joining registers does.)
inline Words load_quarters(const void* a, const void* b, const void* c, const void* d) {
  const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  const Words first = _mm512_inserti32x4(_mm512_castsi128_si512(load(a)), load(b), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(first, load(c), 2), load(d), 3);
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline Words broadcast_64(uint64_t value) { return _mm512_set1_epi64(static_cast<int64_t>(value)); }
inline Words broadcast_32(uint32_t value) { return _mm512_set1_epi32(static_cast<int32_t>(value)); }
inline Words broadcast_16(uint16_t value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }

// Byte i = 8 bits of the same 64-bit lane of `source`, from bit shifts[i] on.
inline Words multishift(Words shifts, Words source) { return _mm512_multishift_epi64_epi8(shifts, source); }
// 32-bit lane i shifted right by shifts[i].
inline Words shift_right_32(Words source, Words shifts) { return _mm512_srlv_epi32(source, shifts); }
// (a & b) | c
inline Words and_or(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0xEA); }
// Word i = word index[i] % 64 of low:high.
inline Words permute_words(Words low, Words index, Words high) { return _mm512_permutex2var_epi16(low, index, high); }
// Float i = float index[i] % 32 of low:high.
inline Floats permute_floats(Floats low, Words index, Floats high) { return _mm512_permutex2var_ps(low, index, high); }
// In each quarter: byte i = byte control[i] % 16 of the same quarter of `source`, or 0 where control[i] has bit 7.
inline Words shuffle_bytes(Words source, Words control) { return _mm512_shuffle_epi8(source, control); }
// Lane i = the next float of `source` where mask bit i is 1, else 0.
inline Floats expand_floats(uint32_t mask, Floats source) {
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), source);
}

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }

// bf16 at even and at odd words to fp32.
inline Floats even_bf16(Words v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
inline Floats odd_bf16(Words v) {
  return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
// fp16 of the lower and of the upper 16 words to fp32.
inline Floats low_fp16(Words v) { return _mm512_cvtph_ps(_mm512_castsi512_si256(v)); }
inline Floats high_fp16(Words v) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1)); }
#ifdef __AVX512VBMI2__
// Lane i = the next word of `source` where mask bit i is 1, else 0.
inline Words expand_words(uint32_t mask, Words source) { return _mm512_maskz_expand_epi16(mask, source); }
#endif
#ifdef __AVX512BF16__
// Lane i = acc[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1], a and b of bf16.
inline Floats dot_bf16(Floats acc, Words a, Words b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

}  // namespace
}  // namespace wandapp
