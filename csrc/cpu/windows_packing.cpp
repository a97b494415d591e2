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

// Calls step(window) for every step of a block, and before it place(slot, column) for every slot and pick(slot) for
// each that takes its row's next weight. A window starts at the first column that any row still needs, and each row takes
// what it can: no step could do more for the rows that are behind.
template <class Place, class Pick, class Step>
void for_windows(const Matrix& from, int64_t block, Place place, Pick pick, Step step) {
  const uint8_t* bitmap = static_cast<const uint8_t*>(from.meta);
  const int64_t bytes = ceil_div(from.cols, 8);
  const int64_t first = block * kWindowRows, count = std::min(from.rows - first, kWindowRows);
  Columns columns[kWindowRows];
  for (int64_t i = 0; i < count; ++i) columns[i] = Columns(bitmap + (first + i) * bytes, from.cols);
  const int64_t last_window = std::max<int64_t>(from.cols - kWindow, 0);
  int64_t window = 0, steps = 0;
  for (;; ++steps) {
    int64_t needed = kNone;
    for (const Columns& row : columns) needed = std::min(needed, row.next());
    if (needed == kNone && steps % kPair == 0) break;
    if (needed != kNone) window = std::min(needed, last_window);
    for (int64_t i = 0; i < kWindowRows; ++i) {
      Columns& row = columns[i];
      uint32_t column[2] = {kNothing[0], kNothing[1]};
      for (int64_t j = 0; j < 2 && row.next() < window + kWindow; ++j) {
        column[j] = static_cast<uint32_t>(row.next() - window);
        if (j == 0) column[1] = column[0];
        pick(2 * i + j);
        row.advance();
      }
      place(2 * i, column[0]);
      place(2 * i + 1, column[1]);
    }
    step(window);
  }
}

template <class T>
void pack(const Matrix& from, int64_t block, const int64_t* offsets, T* values, uint8_t* meta) {
  const T* next[kWindowRows];
  for (int64_t i = 0; i < kWindowRows; ++i) {
    next[i] = static_cast<const T*>(from.values) + from.offsets[std::min(block * kWindowRows + i, from.rows)];
  }
  int64_t s = offsets[block];
  const int64_t steps = offsets[block + 1] - s;
  if (steps == 0) return;
  uint8_t* pair = meta + s / kPair * kPairBytes;
  std::memset(static_cast<void*>(values + s * kSlots), 0, static_cast<size_t>(steps * kSlots) * sizeof(T));
  std::memset(pair, 0, static_cast<size_t>(steps / kPair * kPairBytes));
  const auto place = [&](int64_t slot, uint32_t column) {
    uint8_t& byte = pair[byte_of(slot)];
    byte = static_cast<uint8_t>(byte | column << (4 * (s % kPair)));
  };
  const auto pick = [&](int64_t slot) { values[s * kSlots + slot] = *next[slot / 2]++; };
  for_windows(from, block, place, pick, [&](int64_t window) {
    const uint16_t column = static_cast<uint16_t>(window);
    std::memcpy(pair + kColumnBytes + 2 * (s % kPair), &column, sizeof(column));
    if (++s % kPair == 0) pair += kPairBytes;
  });
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
    for_windows(
        from, block, [](int64_t, uint32_t) {}, [&](int64_t slot) { ++kept[slot / 2]; }, [&](int64_t) { ++count; });
    steps[block] = count;
    const int64_t first = block * kWindowRows;
    for (int64_t r = first; r < std::min(first + kWindowRows, from.rows); ++r) {
      if (kept[r - first] != from.offsets[r + 1] - from.offsets[r]) good = false;
    }
  });
  return good;
}

void pack_windows(Type type, const Matrix& from, const int64_t* offsets, void* values, uint8_t* meta, int threads) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_for(ceil_div(from.rows, kWindowRows), threads,
                 [&](int64_t block) { pack(from, block, offsets, static_cast<T*>(values), meta); });
  });
}

bool unpack_windows(Type type, const Matrix& from, const int64_t* row_offsets, void* values, uint8_t* bitmap,
                    int threads) {
  const int64_t bytes = ceil_div(from.cols, 8);
  std::atomic<bool> good{row_offsets[0] == 0};
  parallel_for(from.rows, threads, [&](int64_t r) {
    int64_t kept = 0;
    for (int64_t s = from.offsets[r / kWindowRows]; s < from.offsets[r / kWindowRows + 1]; ++s) {
      kept += kept_of(pair_meta(from, s), s % kPair, r % kWindowRows);
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
