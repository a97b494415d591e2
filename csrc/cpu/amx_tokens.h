// Activations into tiles, and sums out of them: both are transposed.
#pragma once

#include "amx_tiles.h"

namespace wandapp {
namespace {

struct Swaps {  // for blocks of 1, 2, 4, 8 lanes
  alignas(64) uint32_t low[4][16];
  alignas(64) uint32_t high[4][16];
  constexpr Swaps() : low(), high() {
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t block = 1u << i;
      for (uint32_t lane = 0; lane < 16; ++lane) {
        const bool upper = (lane & block) != 0;
        low[i][lane] = upper ? 16 + lane - block : lane;
        high[i][lane] = upper ? 16 + lane : lane + block;
      }
    }
  }
};
constexpr Swaps kSwaps;

// 16 x 16 lanes of 32 bits: the upper right and the lower left of ever smaller blocks change places.
[[gnu::always_inline]] inline void transpose(Floats (&rows)[16]) {
#pragma GCC unroll 4
  for (int step = 3; step >= 0; --step) {
    const Words low = load_words(kSwaps.low[step]), high = load_words(kSwaps.high[step]);
    const int block = 1 << step;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if ((i & block) != 0) continue;
      const Floats a = rows[i], b = rows[i + block];
      rows[i] = permute_floats(a, low, b);
      rows[i + block] = permute_floats(a, high, b);
    }
  }
}

int64_t steps_of(int64_t cols) { return ceil_div(cols, kPaddedCols) * (kPaddedCols / kStepCols); }
size_t group_bytes(int64_t cols) { return static_cast<size_t>(steps_of(cols) * kTileBytes); }

bool finite(const Bf16* x, int64_t size) {
  bool all = true;
  for (int64_t k = 0; k < size; ++k) all &= (x[k].bits & 0x7f80u) != 0x7f80u;
  return all;
}

// Tokens and columns that are missing are zeros.
bool prepare_group(const void* tokens, int64_t count, int64_t cols, void* prepared) {
  const Bf16* x = static_cast<const Bf16*>(tokens);
  char* out = static_cast<char*>(prepared);
  for (int64_t k = 0; k < steps_of(cols) * kStepCols; k += kStepCols) {
    const uint32_t mask = low_bits(cols - k);
    Floats rows[16];
#pragma GCC unroll 16
    for (int64_t m = 0; m < kTile; ++m) {
      rows[m] = m < count ? as_floats(load_words_masked(mask, x + m * cols + k)) : zero();
    }
    transpose(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) store_floats(out + i * kRowBytes, rows[i]);
    out += kTileBytes;
  }
  return finite(x, count * cols);
}

// Tokens [token, token + tokens) of rows [row, row + rows): the sums of one tile, or of two that are added.
void put_sums(const float* sums, const float* more, const Output<Bf16>& output, int64_t token, int64_t tokens,
              int64_t row, int64_t rows) {
  Floats lanes[16];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
    lanes[i] = load_floats(sums + i * kTile);
    if (more != nullptr) lanes[i] = add(lanes[i], load_floats(more + i * kTile));
  }
  transpose(lanes);
  float bias[kTile] = {};
  if (output.bias != nullptr) {
    for (int64_t i = 0; i < rows; ++i) bias[i] = widen(output.bias[row + i]);
  }
  Bf16* out = output.out + token * output.stride + row;
#pragma GCC unroll 16
  for (int64_t m = 0; m < kTile; ++m) {
    if (m == tokens) return;
    store_bf16(out + m * output.stride, rows, add(lanes[m], load_floats(bias)));
  }
}

// Four tiles of sums: tile 2 i + j has row tile i and group j. At most 32 tokens of at most 32 rows.
void put_pair(const float* sums, const Output<Bf16>& output, int64_t token, int64_t tokens, int64_t row, int64_t rows) {
  constexpr int64_t kSums = kTile * kTile;
  for (int64_t m = 0; m < tokens; m += kTile) {
    for (int64_t i = 0; i < rows; i += kTile) {
      put_sums(sums + (2 * i + m) / kTile * kSums, nullptr, output, token + m, at_most(tokens - m, kTile), row + i,
               at_most(rows - i, kTile));
    }
  }
}

}  // namespace
}  // namespace wandapp
