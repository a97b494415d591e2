// Products of blocks in tiles. A tile is 16 rows of 64 bytes:
//
//   weights       16 rows x 32 columns of bf16
//   activations   16 pairs of columns x 16 tokens: row p holds (x[m][2p], x[m][2p + 1]) for every token m
//   sums          16 weight rows x 16 tokens of fp32
//
// A step is 32 columns: 2 tiles of weights, 1 of activations for each group of 16 tokens. Loading a tile costs about what
// multiplying does, so that each is used twice; a product waits 52 cycles for its sums but a new one can start every 16,
// so that there are four tiles of sums.
#pragma once

#include "vector_common.h"

#ifdef WANDAPP_EMULATE_AVX512
#include "../emulation/amx_ops.h"
#else
#include "amx_ops.h"
#endif

namespace wandapp {
namespace {

constexpr int64_t kTile = 16;               // rows of a tile, tokens of a group
constexpr int64_t kRowBytes = 64;           // of a tile
constexpr int64_t kStepCols = 32;           // columns of a step
constexpr int64_t kTileBytes = kTile * kRowBytes;
constexpr int64_t kPaddedCols = 2 * kStepCols;  // rows are a whole number of pairs of steps
constexpr int64_t kBlockRows = 2 * kTile;
// Columns that are expanded at once: 32 rows are then 32 KB.
constexpr int64_t kBlockCols = 512;
constexpr int64_t kBlockSteps = kBlockCols / kStepCols;
constexpr int64_t kBlockBytes = kBlockSteps * 2 * kTileBytes;
constexpr int64_t kSumBytes = 4 * kTileBytes;  // sums of one product

// Where the first step of row i of 32 is in a block.
inline int64_t row_in_block(int64_t i) { return i / kTile * kTileBytes + i % kTile * kRowBytes; }

// Palette 1 has 8 tiles; bytes that are not named here are 0.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the instruction reads 64 bytes");
constexpr TileConfig kTileConfig;

// Tiles of this thread, for as long as it lives: other libraries configure their own.
struct Tiles {
  Tiles() { configure_tiles(&kTileConfig); }
  ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Sums are tiles 0 to 3, one after the other in memory; weights 4 and 5; activations 6 and 7.
inline void load_sums(const char* sums) {
  load_tile<0>(sums, kRowBytes);
  load_tile<1>(sums + kTileBytes, kRowBytes);
  load_tile<2>(sums + 2 * kTileBytes, kRowBytes);
  load_tile<3>(sums + 3 * kTileBytes, kRowBytes);
}
inline void zero_sums() {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
}
inline void store_sums(char* sums) {
  store_tile<0>(sums, kRowBytes);
  store_tile<1>(sums + kTileBytes, kRowBytes);
  store_tile<2>(sums + 2 * kTileBytes, kRowBytes);
  store_tile<3>(sums + 3 * kTileBytes, kRowBytes);
}

// Two tiles of rows times two groups of tokens: tile 2 i + j has the sums of row tile i and group j. A step keeps
// the multiplier busy for 64 cycles: other work is done in `meanwhile`, a little after each step.
template <class Meanwhile>
inline void multiply_two(const char* weights, const char* x0, const char* x1, int64_t steps, Meanwhile meanwhile) {
#pragma GCC unroll 1
  for (; steps > 0; --steps) {
    load_tile<4>(weights, kRowBytes);
    load_tile<6>(x0, kRowBytes);
    multiply_tiles<0, 4, 6>();
    load_tile<7>(x1, kRowBytes);
    multiply_tiles<1, 4, 7>();
    load_tile<5>(weights + kTileBytes, kRowBytes);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
    meanwhile();
    weights += 2 * kTileBytes;
    x0 += kTileBytes;
    x1 += kTileBytes;
  }
}

// Two tiles of rows times one group: tile 2 i + j has the sums of row tile i over the even (j = 0) or the odd steps.
inline void multiply_one(const char* weights, const char* x, int64_t steps) {
#pragma GCC unroll 1
  for (; steps > 0; steps -= 2) {
    load_tile<6>(x, kRowBytes);
    load_tile<4>(weights, kRowBytes);
    multiply_tiles<0, 4, 6>();
    load_tile<5>(weights + kTileBytes, kRowBytes);
    multiply_tiles<2, 5, 6>();
    load_tile<7>(x + kTileBytes, kRowBytes);
    load_tile<4>(weights + 2 * kTileBytes, kRowBytes);
    multiply_tiles<1, 4, 7>();
    load_tile<5>(weights + 3 * kTileBytes, kRowBytes);
    multiply_tiles<3, 5, 7>();
    weights += 4 * kTileBytes;
    x += 2 * kTileBytes;
  }
}

}  // namespace
}  // namespace wandapp
