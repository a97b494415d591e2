// AMX for many tokens: the product in blocks, of a size that no shape changes.
//
//   for each 256 rows, 256 tokens    their sums, 256 KB, stay in the second-level cache, and so does what is next:
//     for each 512 columns           of x, 256 KB, that serve all these rows
//       for each 32 rows             expanded into 32 KB
//         for each 32 tokens         load sums, multiply 16 steps, store sums
//
// Multiplying leaves the rest of the core idle: meanwhile the next 32 rows are expanded, one by one, and the next 512
// columns of x are fetched.
//
// Sums are added up in the order of the columns, whatever the pass and the piece.
#pragma once

#include "amx_expansion.h"
#include "amx_tiles.h"
#include "amx_tokens.h"

namespace wandapp {
namespace {

constexpr int64_t kManyTokens = 65;  // the fewest that this kernel is for
constexpr int64_t kPassTokens = 256;
constexpr int64_t kPairTokens = 2 * kTile;
constexpr int64_t kSlabBytes = kBlockSteps * kTileBytes;  // of one group and 512 columns
constexpr int64_t kLine = 64;

// An odd number of slabs: with an even one, the slabs of the same columns would share few sets of the cache.
size_t many_group_bytes(int64_t cols) { return static_cast<size_t>((ceil_div(cols, kBlockCols) | 1) * kSlabBytes); }
int64_t many_tokens_at_once(int64_t, int64_t tokens) { return even_part(tokens, kPassTokens, kPairTokens); }
size_t many_scratch_bytes(int64_t) {
  constexpr int64_t kSums = kMostRows / kBlockRows * (kPassTokens / kPairTokens);
  return static_cast<size_t>(2 * kBlockBytes + kSums * kSumBytes);
}

// Two slabs, `stride` apart, that are fetched a slice at a time: into the second-level cache, since those of all tokens
// are too much for the first.
struct Slabs {
  const char* at;
  int64_t stride, slice;

  void fetch_slice() {
    for (int64_t i = 0; i < slice; i += kLine) {
      prefetch_far(at + i);
      prefetch_far(at + stride + i);
    }
    at += slice;
  }
};

struct Pass {
  const Matrix& matrix;
  const char* x;
  int64_t group_stride, tokens;
  Output<Bf16> output;
};

// Rows [first, first + count) times the tokens of a pass.
template <class Rows>
class Product {
 public:
  // `more`: rows of the same piece follow.
  Product(const Pass& pass, Rows& rows, int64_t first, int64_t count, bool more, char* scratch)
      : pass_(pass),
        first_(first),
        count_(count),
        more_(more),
        pairs_(ceil_div(pass.tokens, kPairTokens)),
        slice_(ceil_div(kBlockSteps, ceil_div(count, kBlockRows)) * kLine),
        sums_(scratch + 2 * kBlockBytes),
        expansion_(rows, count, pass.matrix.cols, {more ? count : 0, 0}, scratch) {
    rows.start(first, count);
  }

  void run() {
    expansion_.begin({0, 0}, 1);
    expansion_.share();
    for (Place block{0, 0}; block.k < pass_.matrix.cols; block = expansion_.following(block)) {
      const int64_t steps = steps_of(at_most(pass_.matrix.cols - block.k, kBlockCols));
      const char* const weights = expansion_.take();
      expansion_.begin(expansion_.following(block), pairs_ * steps);
      multiply(block, steps, weights);
    }
  }

 private:
  // A block with all tokens.
  void multiply(Place block, int64_t steps, const char* weights) {
    const int64_t at = block.k / kStepCols * kTileBytes;
    const bool last = block.k + kBlockCols >= pass_.matrix.cols;
    for (int64_t pair = 0; pair < pairs_; ++pair) {
      char* const sums = sums_of(block, pair);
      const char* const x = pass_.x + 2 * pair * pass_.group_stride;
      // Where there is no second group the first stands in for it; its sums are not put.
      const int64_t second = pass_.tokens - pair * kPairTokens > kTile ? pass_.group_stride : 0;
      Slabs ahead = slabs_ahead(x, second, block, last);
      if (at == 0) {
        zero_sums();
      } else {
        load_sums(sums);
      }
      multiply_two(weights, x + at, x + second + at, steps, [&] {
        expansion_.share();
        ahead.fetch_slice();
      });
      store_sums(sums);
      // One pair behind: the last products of this one are not done yet.
      if (last && pair > 0) put(block, pair - 1);
    }
    if (last) put(block, pairs_ - 1);
  }

  char* sums_of(Place block, int64_t pair) const { return sums_ + (block.i / kBlockRows * pairs_ + pair) * kSumBytes; }

  // What a block of rows fetches of a pair's next slabs. After the last slabs come the first, for the rows that follow.
  Slabs slabs_ahead(const char* x, int64_t second, Place block, bool last) const {
    const char* const next = x + (last ? 0 : (block.k / kStepCols + kBlockSteps) * kTileBytes);
    return {next + block.i / kBlockRows * kBlockSteps * slice_, second, last && !more_ ? 0 : slice_};
  }

  void put(Place block, int64_t pair) const {
    const int64_t token = pair * kPairTokens;
    put_pair(reinterpret_cast<const float*>(sums_of(block, pair)), pass_.output, token,
             at_most(pass_.tokens - token, kPairTokens), first_ + block.i, at_most(count_ - block.i, kBlockRows));
  }

  const Pass& pass_;
  const int64_t first_, count_;
  const bool more_;
  const int64_t pairs_;
  const int64_t slice_;  // of a slab: each block of rows fetches its share, a slice at each step
  char* const sums_;
  Expansion<Rows> expansion_;
};

template <class Rows>
void run_many(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t tokens, int64_t first,
              int64_t last, void* scratch) {
  const Tiles tiles;
  const Pass pass{matrix, static_cast<const char*>(prepared), static_cast<int64_t>(many_group_bytes(matrix.cols)),
                  tokens, Output<Bf16>(matrix, first_token)};
  Rows rows(matrix);
  const int64_t count = even_part(last - first, kMostRows, kBlockRows);
  for (int64_t r = first; r < last; r += count) {
    Product<Rows>(pass, rows, r, at_most(last - r, count), r + count < last, static_cast<char*>(scratch)).run();
  }
}

template <class Rows>
constexpr Kernel kMany{kBlockRows,         kTile,          many_group_bytes,   prepare_group,
                       many_scratch_bytes, run_many<Rows>, many_tokens_at_once};

}  // namespace
}  // namespace wandapp
