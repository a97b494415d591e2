// Byte shuffles that put 2:4 values into their columns. A byte holds the positions of 4 values, 2 bits each; they are
// values 2g + i of group g in the canonical weight, 2i + g in nm_pairs. Bit 7 of a control byte gives a zero.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace wandapp {
namespace {

// 4 values of 16 bits over 8 columns; 4 of 32 bits over 4 columns in each of two 128-bit halves, whose values are the
// first two elements of that half.
using WordControls = uint8_t[256][16];
using FloatControls = uint8_t[256][32];

struct PositionTables {
  alignas(64) WordControls words;
  alignas(64) FloatControls floats;
};

constexpr PositionTables position_tables(bool groups_alternate) {
  PositionTables tables{};
  for (int fields = 0; fields < 256; ++fields) {
    for (auto& byte : tables.words[fields]) byte = 0x80;
    for (auto& byte : tables.floats[fields]) byte = 0x80;
    for (int j = 0; j < 4; ++j) {
      const int group = groups_alternate ? j % 2 : j / 2;
      const int in_group = groups_alternate ? j / 2 : j % 2;
      const int column = 4 * group + (fields >> (2 * j) & 3);
      for (int b = 0; b < 2; ++b) tables.words[fields][2 * column + b] = static_cast<uint8_t>(2 * j + b);
      for (int b = 0; b < 4; ++b) tables.floats[fields][4 * column + b] = static_cast<uint8_t>(4 * in_group + b);
    }
  }
  return tables;
}

constexpr PositionTables kNMTables = position_tables(false);
constexpr PositionTables kPairsTables = position_tables(true);
constexpr const WordControls& kNMWords = kNMTables.words;
constexpr const FloatControls& kNMFloats = kNMTables.floats;
constexpr const WordControls& kPairsWords = kPairsTables.words;
constexpr const FloatControls& kPairsFloats = kPairsTables.floats;

__m128i load_control(const uint8_t* control) { return _mm_load_si128(reinterpret_cast<const __m128i*>(control)); }

}  // namespace
}  // namespace wandapp
