#include "windows_packing.h"

#include <algorithm>

#include "parallel.h"
#include "windows.h"

namespace wandapp {
namespace {

constexpr int64_t kNone = INT64_MAX;

// The set bits of one row of a bitmap, from left to right.
class Columns {
 public:
  Columns() = default;
  Columns(const uint8_t* bits, int64_t bytes) : bits_(bits), bytes_(bytes) { advance(); }

  int64_t next() const { return next_; }

  void advance() {
    while (word_ == 0) {
      if (at_ >= bytes_) {
        next_ = kNone;
        return;
      }
      base_ = at_ * 8;
      std::memcpy(&word_, bits_ + at_, static_cast<size_t>(std::min<int64_t>(bytes_ - at_, 8)));
      at_ += 8;
    }
    next_ = base_ + __builtin_ctzll(word_);
    word_ &= word_ - 1;
  }

 private:
  const uint8_t* bits_ = nullptr;
  int64_t bytes_ = 0, at_ = 0, base_ = 0, next_ = kNone;
  uint64_t word_ = 0;
};

// Calls step(word) for every step of a block, and before it pick(slot) for each slot that takes its row's next weight.
// A window starts at the first column that any row still needs, and each row takes what it can: no step could do more
// for the rows that are behind.
template <class Pick, class Step>
void for_steps(const uint8_t* bitmap, int64_t rows, int64_t cols, int64_t block, Pick pick, Step step) {
  const int64_t bytes = ceil_div(cols, 8);
  const int64_t first = block * kWindowRows, count = std::min(rows - first, kWindowRows);
  Columns columns[kWindowRows];
  for (int64_t i = 0; i < count; ++i) columns[i] = Columns(bitmap + (first + i) * bytes, bytes);
  const int64_t last_window = std::max<int64_t>(cols - kWindow, 0);
  int64_t base = 0, steps = 0;
  for (;;) {
    int64_t needed = kNone;
    for (const Columns& row : columns) needed = std::min(needed, row.next());
    if (needed == kNone) break;
    const int64_t window = std::min(needed, last_window);
    // A step without weights ends before the columns of the next one (expand_windows_block writes its zeros).
    constexpr int64_t kAway = kFarthest - kWindow;
    for (; window - base > kFarthest; base += kAway, ++steps) step(kNothing | static_cast<uint32_t>(kAway) << 24);
    uint32_t word = static_cast<uint32_t>(window - base) << 24;
    base = window;
    for (int64_t i = 0; i < count; ++i) {
      Columns& row = columns[i];
      uint32_t place[2] = {1, 0};
      for (int64_t j = 0; j < 2 && row.next() < base + kWindow; ++j) {
        place[j] = static_cast<uint32_t>(row.next() - base);
        if (j == 0) place[1] = place[0];
        pick(2 * i + j);
        row.advance();
      }
      word |= (place[0] | place[1] << 3) << (6 * i);
    }
    for (int64_t i = count; i < kWindowRows; ++i) word |= (kNothing & 077u) << (6 * i);
    step(word);
    ++steps;
  }
  if (steps % 2 != 0) step(kNothing);
}

template <class T>
void pack(const Matrix& from, int64_t block, const int64_t* offsets, T* values, uint32_t* words) {
  const T* next[kWindowRows];
  for (int64_t i = 0; i < kWindowRows; ++i) {
    next[i] = static_cast<const T*>(from.values) + from.offsets[std::min(block * kWindowRows + i, from.rows)];
  }
  int64_t s = offsets[block];
  std::memset(static_cast<void*>(values + s * kSlots), 0,
              static_cast<size_t>((offsets[block + 1] - s) * kSlots) * sizeof(T));
  for_steps(
      static_cast<const uint8_t*>(from.meta), from.rows, from.cols, block,
      [&](int64_t slot) { values[value_at<T>(s, slot)] = *next[slot / 2]++; }, [&](uint32_t word) { words[s++] = word; });
}

template <class T>
void unpack(const Matrix& from, int64_t r, T* values, uint8_t* bitmap) {
  std::memset(bitmap, 0, static_cast<size_t>(ceil_div(from.cols, 8)));
  for_windows_row<T>(from, r, [&](int64_t column, T value) {
    *values++ = value;
    bitmap[column / 8] = static_cast<uint8_t>(bitmap[column / 8] | 1u << (column % 8));
  });
}

// Calls body(T()) with the element type.
template <class Body>
void with_type(Type type, Body body) {
  if (type == Type::bf16) body(Bf16());
  if (type == Type::fp16) body(Fp16());
  if (type == Type::fp32) body(0.0f);
}

}  // namespace

void count_windows(const uint8_t* bitmap, int64_t rows, int64_t cols, int64_t* steps, int threads) {
  parallel_for(ceil_div(rows, kWindowRows), threads, [&](int64_t block) {
    int64_t count = 0;
    for_steps(bitmap, rows, cols, block, [](int64_t) {}, [&](uint32_t) { ++count; });
    steps[block] = count;
  });
}

void pack_windows(Type type, const Matrix& from, const int64_t* offsets, void* values, uint32_t* words, int threads) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_for(ceil_div(from.rows, kWindowRows), threads,
                 [&](int64_t block) { pack(from, block, offsets, static_cast<T*>(values), words); });
  });
}

void unpack_windows(Type type, const Matrix& from, const int64_t* row_offsets, void* values, uint8_t* bitmap,
                    int threads) {
  const int64_t bytes = ceil_div(from.cols, 8);
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_for(from.rows, threads, [&](int64_t r) {
      unpack(from, r, static_cast<T*>(values) + row_offsets[r], bitmap + r * bytes);
    });
  });
}

}  // namespace wandapp
