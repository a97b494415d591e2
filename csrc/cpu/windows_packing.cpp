#include "windows_packing.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"
#include "windows.h"

namespace wandapp {
namespace {

constexpr int64_t kNone = INT64_MAX;

// The set bits of the first `cols` of one row of a bitmap, from left to right.
class Columns {
 public:
  Columns() = default;
  Columns(const uint8_t* bits, int64_t cols) : bits_(bits), cols_(cols) { advance(); }

  int64_t next() const { return next_; }

  void advance() {
    while (word_ == 0) {
      if (at_ >= cols_) {
        next_ = kNone;
        return;
      }
      const int64_t left = std::min<int64_t>(cols_ - at_, 64);
      std::memcpy(&word_, bits_ + at_ / 8, static_cast<size_t>(ceil_div(left, 8)));
      if (left < 64) word_ &= (uint64_t{1} << left) - 1;
      at_ += 64;
    }
    next_ = at_ - 64 + __builtin_ctzll(word_);
    word_ &= word_ - 1;
  }

 private:
  const uint8_t* bits_ = nullptr;
  int64_t cols_ = 0, at_ = 0, next_ = kNone;
  uint64_t word_ = 0;
};

// Calls step(word) for every step of a block, and before it pick(slot) for each slot that takes its row's next weight.
// A window starts at the first column that any row still needs, and each row takes what it can: no step could do more
// for the rows that are behind.
template <class Pick, class Step>
void for_windows(const Matrix& from, int64_t block, Pick pick, Step step) {
  const uint8_t* bitmap = static_cast<const uint8_t*>(from.meta);
  const int64_t bytes = ceil_div(from.cols, 8);
  const int64_t first = block * kWindowRows, count = std::min(from.rows - first, kWindowRows);
  Columns columns[kWindowRows];
  for (int64_t i = 0; i < count; ++i) columns[i] = Columns(bitmap + (first + i) * bytes, from.cols);
  const int64_t last_window = std::max<int64_t>(from.cols - kWindow, 0);
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
  if (s == offsets[block + 1]) return;
  std::memset(static_cast<void*>(values + s * kSlots), 0,
              static_cast<size_t>((offsets[block + 1] - s) * kSlots) * sizeof(T));
  const auto pick = [&](int64_t slot) { values[value_at<T>(s, slot)] = *next[slot / 2]++; };
  for_windows(from, block, pick, [&](uint32_t word) { words[s++] = word; });
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

bool count_windows(const Matrix& from, int64_t* steps, int threads) {
  std::atomic<bool> good{true};
  parallel_for(ceil_div(from.rows, kWindowRows), threads, [&](int64_t block) {
    int64_t count = 0, kept[kWindowRows] = {};
    for_windows(from, block, [&](int64_t slot) { ++kept[slot / 2]; }, [&](uint32_t) { ++count; });
    steps[block] = count;
    const int64_t first = block * kWindowRows;
    for (int64_t r = first; r < std::min(first + kWindowRows, from.rows); ++r) {
      if (kept[r - first] != from.offsets[r + 1] - from.offsets[r]) good = false;
    }
  });
  return good;
}

void pack_windows(Type type, const Matrix& from, const int64_t* offsets, void* values, uint32_t* words, int threads) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_for(ceil_div(from.rows, kWindowRows), threads,
                 [&](int64_t block) { pack(from, block, offsets, static_cast<T*>(values), words); });
  });
}

bool unpack_windows(Type type, const Matrix& from, const int64_t* row_offsets, void* values, uint8_t* bitmap,
                    int threads) {
  const int64_t bytes = ceil_div(from.cols, 8);
  const uint32_t* words = static_cast<const uint32_t*>(from.meta);
  std::atomic<bool> good{row_offsets[0] == 0};
  parallel_for(from.rows, threads, [&](int64_t r) {
    int64_t kept = 0;
    for (int64_t s = from.offsets[r / kWindowRows]; s < from.offsets[r / kWindowRows + 1]; ++s) {
      kept += kept_of(words[s], r % kWindowRows);
    }
    if (kept != row_offsets[r + 1] - row_offsets[r]) good = false;
  });
  if (!good) return false;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_for(from.rows, threads, [&](int64_t r) {
      unpack(from, r, static_cast<T*>(values) + row_offsets[r], bitmap + r * bytes);
    });
  });
  return true;
}

}  // namespace wandapp
