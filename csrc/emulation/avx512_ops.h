// The functions of cpu/avx512_ops.h lane by lane in plain C++: the AVX-512 kernels run on any processor, in tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cpu/types.h"

namespace wandapp {
namespace {

struct Words {
  uint16_t lane[32];
};
struct Floats {
  float lane[16];
};

inline Words load_words(const void* p) {
  Words v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Words load_words_masked(uint32_t mask, const void* p) {
  Words v{};
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) std::memcpy(&v.lane[i], static_cast<const char*>(p) + 2 * i, 2);
  }
  return v;
}
inline Floats load_floats(const void* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Floats load_floats_masked(uint32_t mask, const void* p) {
  Floats v{};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(&v.lane[i], static_cast<const char*>(p) + 4 * i, 4);
  }
  return v;
}
inline void store_words(void* p, Words v) { std::memcpy(p, &v, sizeof(v)); }
inline void store_floats(void* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }
inline Words load_quarters(const void* a, const void* b, const void* c, const void* d) {
  Words v;
  const void* parts[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) std::memcpy(v.lane + 8 * i, parts[i], 16);
  return v;
}
inline void prefetch(const void*) {}

template <class Lane>
Words broadcast_lane(Lane value) {
  Words v;
  for (size_t i = 0; i < sizeof(v) / sizeof(value); ++i) {
    std::memcpy(reinterpret_cast<char*>(&v) + i * sizeof(value), &value, sizeof(value));
  }
  return v;
}
inline Words broadcast_64(uint64_t value) { return broadcast_lane(value); }
inline Words broadcast_32(uint32_t value) { return broadcast_lane(value); }
inline Words broadcast_16(uint16_t value) { return broadcast_lane(value); }

inline Words multishift(Words shifts, Words source) {
  uint8_t control[64], result[64];
  uint64_t lanes[8];
  std::memcpy(control, &shifts, 64);
  std::memcpy(lanes, &source, 64);
  for (int i = 0; i < 64; ++i) {
    const uint64_t lane = lanes[i / 8];
    const int shift = control[i] & 63;
    result[i] = static_cast<uint8_t>(shift == 0 ? lane : lane >> shift | lane << (64 - shift));
  }
  Words v;
  std::memcpy(&v, result, 64);
  return v;
}
inline Words shift_right_32(Words source, Words shifts) {
  uint32_t lanes[16], counts[16];
  std::memcpy(lanes, &source, 64);
  std::memcpy(counts, &shifts, 64);
  for (int i = 0; i < 16; ++i) lanes[i] = counts[i] < 32 ? lanes[i] >> counts[i] : 0;
  Words v;
  std::memcpy(&v, lanes, 64);
  return v;
}
inline Words and_or(Words a, Words b, Words c) {
  for (int i = 0; i < 32; ++i) a.lane[i] = static_cast<uint16_t>((a.lane[i] & b.lane[i]) | c.lane[i]);
  return a;
}
inline Words permute_words(Words low, Words index, Words high) {
  Words v;
  for (int i = 0; i < 32; ++i) {
    const int from = index.lane[i] & 63;
    v.lane[i] = from < 32 ? low.lane[from] : high.lane[from - 32];
  }
  return v;
}
inline Floats permute_floats(Floats low, Words index, Floats high) {
  uint32_t from[16];
  std::memcpy(from, &index, 64);
  Floats v;
  for (int i = 0; i < 16; ++i) v.lane[i] = (from[i] & 16) != 0 ? high.lane[from[i] & 15] : low.lane[from[i] & 15];
  return v;
}
inline Words shuffle_bytes(Words source, Words control) {
  uint8_t from[64], select[64], result[64];
  std::memcpy(from, &source, 64);
  std::memcpy(select, &control, 64);
  for (int i = 0; i < 64; ++i) result[i] = (select[i] & 0x80) != 0 ? 0 : from[i / 16 * 16 + select[i] % 16];
  Words v;
  std::memcpy(&v, result, 64);
  return v;
}
inline Words expand_words(uint32_t mask, Words source) {
  Words v{};
  int next = 0;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) v.lane[i] = source.lane[next++];
  }
  return v;
}
inline Floats expand_floats(uint32_t mask, Floats source) {
  Floats v{};
  int next = 0;
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) v.lane[i] = source.lane[next++];
  }
  return v;
}

inline Floats zero() { return Floats{}; }
inline Floats add(Floats a, Floats b) {
  for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 16; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}
inline float sum(Floats v) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v.lane[i] += v.lane[i + width];
  }
  return v.lane[0];
}

inline Floats even_bf16(Words v) {
  Floats f;
  for (int i = 0; i < 16; ++i) f.lane[i] = widen(Bf16{v.lane[2 * i]});
  return f;
}
inline Floats odd_bf16(Words v) {
  Floats f;
  for (int i = 0; i < 16; ++i) f.lane[i] = widen(Bf16{v.lane[2 * i + 1]});
  return f;
}
inline Floats low_fp16(Words v) {
  Floats f;
  for (int i = 0; i < 16; ++i) f.lane[i] = widen(Fp16{v.lane[i]});
  return f;
}
inline Floats high_fp16(Words v) {
  Floats f;
  for (int i = 0; i < 16; ++i) f.lane[i] = widen(Fp16{v.lane[16 + i]});
  return f;
}
// The processor also flushes subnormal inputs and results to zero; fp32 sums of tests do not depend on it.
inline Floats dot_bf16(Floats acc, Words a, Words b) {
  return multiply_add(even_bf16(a), even_bf16(b), multiply_add(odd_bf16(a), odd_bf16(b), acc));
}

}  // namespace
}  // namespace wandapp
