// The functions of cpu/amx_ops.h in plain C++, after the pseudocode of the Intel SDM (vol. 2). What a processor answers
// with a fault ends the program, and so do tiles that are not released.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "avx512_ops.h"

namespace wandapp {
namespace {

struct Tile {
  int rows, row_bytes;
  uint8_t row[16][64];
};

inline void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

struct Tiles8 {
  bool configured = false;
  Tile tile[8];

  Tile& operator[](int i) {
    require(configured, "a tile is used before tiles are configured");
    return tile[i];
  }
  ~Tiles8() { require(!configured, "a thread ends with configured tiles"); }
};

inline Tiles8& tiles() {
  static thread_local Tiles8 all;
  return all;
}

inline void configure_tiles(const void* config) {
  uint8_t bytes[64];
  std::memcpy(bytes, config, sizeof(bytes));
  Tiles8& all = tiles();
  require(!all.configured, "tiles are configured again before they are released");
  require(bytes[0] == 1, "the palette is not 1");
  for (int i = 1; i < 16; ++i) require(bytes[i] == 0, "start_row or a reserved byte is not 0");
  for (int i = 32; i < 48; ++i) require(bytes[i] == 0, "a ninth tile has row bytes");
  for (int i = 56; i < 64; ++i) require(bytes[i] == 0, "a ninth tile has rows");
  for (int i = 0; i < 8; ++i) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    require(row_bytes <= 64 && rows <= 16 && (row_bytes == 0) == (rows == 0), "a tile has an impossible size");
    all.tile[i] = Tile{rows, row_bytes, {}};
  }
  all.configured = true;
}
inline void release_tiles() { tiles().configured = false; }

template <int tile>
void zero_tile() {
  std::memset(tiles()[tile].row, 0, sizeof(Tile::row));
}
template <int tile>
void load_tile(const void* p, int64_t stride) {
  zero_tile<tile>();
  Tile& to = tiles()[tile];
  for (int i = 0; i < to.rows; ++i) {
    std::memcpy(to.row[i], static_cast<const char*>(p) + i * stride, static_cast<size_t>(to.row_bytes));
  }
}
template <int tile>
void store_tile(void* p, int64_t stride) {
  const Tile& from = tiles()[tile];
  for (int i = 0; i < from.rows; ++i) {
    std::memcpy(static_cast<char*>(p) + i * stride, from.row[i], static_cast<size_t>(from.row_bytes));
  }
}

// Subnormal numbers count as zero, as operands and as results.
inline float flush(float value) {
  const uint32_t bits = bits_of(value);
  return (bits & 0x7f800000u) == 0 ? float_of(bits & 0x80000000u) : value;
}
template <class T>
T lane(const uint8_t* row, int i) {
  T value;
  std::memcpy(&value, row + static_cast<size_t>(i) * sizeof(T), sizeof(T));
  return value;
}
inline float bf16_product_sum(float sum, const uint8_t* a, int i, const uint8_t* b, int j) {
  return flush(std::fma(flush(widen(lane<Bf16>(a, i))), flush(widen(lane<Bf16>(b, j))), sum));
}

// Even and odd products are summed on their own, then to each other, then to what was there.
template <int sums, int a, int b>
void multiply_tiles() {
  static_assert(sums != a && sums != b && a != b, "the instruction wants three tiles");
  Tile& to = tiles()[sums];
  const Tile &left = tiles()[a], &right = tiles()[b];
  require(left.rows == to.rows && right.row_bytes == to.row_bytes && left.row_bytes == 4 * right.rows &&
              to.row_bytes % 4 == 0,
          "the sizes of three tiles do not fit");
  for (int i = 0; i < to.rows; ++i) {
    for (int j = 0; j < to.row_bytes / 4; ++j) {
      float even = 0, odd = 0;
      for (int p = 0; p < right.rows; ++p) {
        even = bf16_product_sum(even, left.row[i], 2 * p, right.row[p], 2 * j);
        odd = bf16_product_sum(odd, left.row[i], 2 * p + 1, right.row[p], 2 * j + 1);
      }
      const float sum = flush(flush(lane<float>(to.row[i], j)) + flush(even + odd));
      std::memcpy(to.row[i] + 4 * j, &sum, sizeof(sum));
    }
  }
}

inline void prefetch_far(const void*) {}

inline Words load_half(const void* p) {
  Words v;
  std::memset(&v, 0xa5, sizeof(v));
  std::memcpy(&v, p, 32);
  return v;
}
inline Words and_words(Words a, Words b) {
  for (int i = 0; i < 32; ++i) a.lane[i] = static_cast<uint16_t>(a.lane[i] & b.lane[i]);
  return a;
}
inline Words or_words(Words a, Words b) {
  for (int i = 0; i < 32; ++i) a.lane[i] = static_cast<uint16_t>(a.lane[i] | b.lane[i]);
  return a;
}
inline Floats as_floats(Words v) {
  Floats f;
  std::memcpy(&f, &v, sizeof(f));
  return f;
}
inline void store_bf16(void* p, int64_t count, Floats v) {
  for (int64_t i = 0; i < count; ++i) {
    const Bf16 value = narrow<Bf16>(v.lane[i]);
    std::memcpy(static_cast<char*>(p) + 2 * i, &value, sizeof(value));
  }
}

}  // namespace
}  // namespace wandapp
