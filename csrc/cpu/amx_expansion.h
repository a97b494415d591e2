// Weights into tiles a little at a time, while others are multiplied.
#pragma once

#include <utility>

#include "amx_rows.h"

namespace wandapp {
namespace {

// Blocks of 32 rows and 512 columns in their order: all rows, then the next columns. There are two places in memory: one
// block is expanded, row by row, while the one before is in use.
template <class Rows>
class Expansion {
 public:
  // `after` is where the next work begins, to be fetched ahead.
  Expansion(Rows& rows, int64_t count, int64_t cols, Place after, char* memory)
      : rows_(rows), count_(count), cols_(cols), after_(after), out_(memory), in_use_(memory + kBlockBytes) {}

  Place following(Place block) const {
    const bool below = block.i + kBlockRows < count_;
    return below ? Place{block.i + kBlockRows, block.k} : Place{0, block.k + kBlockCols};
  }

  // A block that is expanded by `shares` calls of `share`; none where there are no more columns.
  void begin(Place block, int64_t shares) {
    block_ = block;
    ahead_ = following(block);
    if (ahead_.k >= cols_) ahead_ = after_;
    shares_ = shares;
    block_rows_ = block.k < cols_ ? at_most(count_ - block.i, kBlockRows) : 0;
    done_ = owed_ = 0;
  }

  void share() {
    for (owed_ += block_rows_; owed_ >= shares_; owed_ -= shares_) expand_row();
  }

  // The block, when all is shared out: until the next is taken. Rows that are missing keep what was there: no other row's
  // sums depend on them.
  const char* take() {
    std::swap(out_, in_use_);
    return in_use_;
  }

 private:
  // Not inlined: `share` stands in the innermost loop.
  [[gnu::noinline]] void expand_row() {
    const int64_t next = ahead_.i + done_;
    rows_.expand({block_.i + done_, block_.k}, out_ + row_in_block(done_),
                 {ahead_.k == 0 ? next : at_most(next, count_ - 1), ahead_.k});
    ++done_;
  }

  Rows& rows_;
  int64_t count_, cols_;
  Place after_, block_{}, ahead_{};
  char* out_;
  char* in_use_;
  int64_t shares_ = 0, block_rows_ = 0, done_ = 0, owed_ = 0;  // owed: shares of the row that is next
};

}  // namespace
}  // namespace wandapp
