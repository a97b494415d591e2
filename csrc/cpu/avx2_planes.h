// Activations for the windows kernel with AVX2: byte planes, all low bytes, then the next, ...; a vpshufb of each picks
// 32 activations out of 16 columns, and unpacking joins their bytes again.
#pragma once

#include "avx2_common.h"
#include "windows.h"

namespace wandapp {
namespace {

// With zeros up to a multiple of 16, which a window of a row with fewer columns reads. Whole pages would put the same
// column of all planes into one set of the cache.
int64_t plane_bytes(int64_t cols) {
  const int64_t bytes = ceil_div(cols, 64) * 64;
  return bytes % 4096 == 0 ? bytes + 64 : bytes;
}

template <class T>
size_t planes_bytes(int64_t cols) {
  return sizeof(T) * static_cast<size_t>(plane_bytes(cols));
}

// 16 elements into their planes.
template <class T>
void split_bytes(const T* x, uint8_t* planes, int64_t stride) {
  if constexpr (sizeof(T) == 2) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(words, 8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planes), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + stride), _mm256_extracti128_si256(bytes, 1));
  } else {
    const __m128i by_plane = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i four[4];
    for (int i = 0; i < 4; ++i) {
      four[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 4 * i)), by_plane);
    }
    const __m128i a = _mm_unpacklo_epi32(four[0], four[1]), b = _mm_unpackhi_epi32(four[0], four[1]);
    const __m128i c = _mm_unpacklo_epi32(four[2], four[3]), d = _mm_unpackhi_epi32(four[2], four[3]);
    const __m128i of[4] = {_mm_unpacklo_epi64(a, c), _mm_unpackhi_epi64(a, c), _mm_unpacklo_epi64(b, d),
                           _mm_unpackhi_epi64(b, d)};
    for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + i * stride), of[i]);
  }
}

template <class T>
bool prepare_planes(const void* token, int64_t, int64_t cols, void* prepared) {
  const T* x = static_cast<const T*>(token);
  uint8_t* planes = static_cast<uint8_t*>(prepared);
  const int64_t stride = plane_bytes(cols);
  const __m256 zero = _mm256_setzero_ps();
  __m256 probe = zero;
  for (int64_t k = 0; k < cols; k += kChunk) {
    T tail[kChunk] = {};
    const T* from = x + k;
    if (cols - k < kChunk) {
      std::memcpy(tail, from, static_cast<size_t>(cols - k) * sizeof(T));
      from = tail;
    }
    const Chunk chunk = load(from);
    probe = _mm256_fmadd_ps(chunk.first, zero, _mm256_fmadd_ps(chunk.second, zero, probe));
    split_bytes(from, planes + k, stride);
  }
  return sum(probe) == 0.0f;
}

template <class T>
struct Planes {
  const uint8_t* bytes;
  int64_t stride;

  Planes(const void* prepared, int64_t cols, int64_t token)
      : bytes(static_cast<const uint8_t*>(prepared) + token * static_cast<int64_t>(planes_bytes<T>(cols))),
        stride(plane_bytes(cols)) {}
};

// 32 elements in fp32, in the order that costs least. bf16: even and odd slots of rows 0 to 7, even and odd slots of
// rows 8 to 15, so that lanes are rows. fp16: slots 8i to 8i + 7. fp32: slots 0 to 3 and 8 to 11, 4 to 7 and 12 to 15, ...
struct Slots {
  __m256 of[4];
};

inline __m256i picked(const uint8_t* plane, __m256i columns) {
  const __m128i window = _mm_loadu_si128(reinterpret_cast<const __m128i*>(plane));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(window), columns);
}
inline __m256 widen_low(__m256i halves) { return _mm256_cvtph_ps(_mm256_castsi256_si128(halves)); }
inline __m256 widen_high(__m256i halves) { return _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)); }

// The activations of 32 slots: `x` is the window's first column in the first plane.
template <class T>
[[gnu::always_inline]] inline Slots pick(const uint8_t* x, int64_t stride, __m256i columns) {
  const __m256i b0 = picked(x, columns), b1 = picked(x + stride, columns);
  const __m256i low = _mm256_unpacklo_epi8(b0, b1), high = _mm256_unpackhi_epi8(b0, b1);
  if constexpr (std::is_same_v<T, Bf16>) {
    const Chunk a = widen_bf16(low), b = widen_bf16(high);
    return {{a.first, a.second, b.first, b.second}};
  } else if constexpr (std::is_same_v<T, Fp16>) {
    return {{widen_low(low), widen_high(low), widen_low(high), widen_high(high)}};
  } else {
    const __m256i b2 = picked(x + 2 * stride, columns), b3 = picked(x + 3 * stride, columns);
    const __m256i top_low = _mm256_unpacklo_epi8(b2, b3), top_high = _mm256_unpackhi_epi8(b2, b3);
    return {{_mm256_castsi256_ps(_mm256_unpacklo_epi16(low, top_low)),
             _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, top_low)),
             _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, top_high)),
             _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, top_high))}};
  }
}

// The weights of 32 slots.
template <class T>
[[gnu::always_inline]] inline Slots load_slots(const T* w) {
  if constexpr (sizeof(T) == 2) {
    const Chunk a = load(w), b = load(w + kChunk);
    return {{a.first, a.second, b.first, b.second}};
  } else {
    const auto halves = [](const float* from) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + 8), 1);
    };
    return {{halves(w), halves(w + 4), halves(w + 16), halves(w + 20)}};
  }
}

// Sums of slots; of bf16 of rows, for which half the registers do.
template <class T>
struct SlotSums {
  static constexpr int kSlotsEach = std::is_same_v<T, Bf16> ? 2 : 1;
  __m256 of[4 / kSlotsEach];

  void clear() {
    for (__m256& sum : of) sum = _mm256_setzero_ps();
  }

  [[gnu::always_inline]] void add(const Slots& weights, const Slots& x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) of[i / kSlotsEach] = _mm256_fmadd_ps(weights.of[i], x.of[i], of[i / kSlotsEach]);
  }

  void put(float (&rows)[kWindowRows]) const {
    if constexpr (std::is_same_v<T, Bf16>) {
      for (int i = 0; i < 2; ++i) _mm256_storeu_ps(rows + 8 * i, of[i]);
    } else {
      float slots[kSlots];
      for (int i = 0; i < 4; ++i) {
        const int first = sizeof(T) == 2 ? 8 * i : i / 2 * 16 + i % 2 * 4;
        _mm_storeu_ps(slots + first, _mm256_castps256_ps128(of[i]));
        _mm_storeu_ps(slots + first + (sizeof(T) == 2 ? 4 : 8), _mm256_extractf128_ps(of[i], 1));
      }
      for (int64_t i = 0; i < kWindowRows; ++i) rows[i] = slots[2 * i] + slots[2 * i + 1];
    }
  }
};

}  // namespace
}  // namespace wandapp
