// bitmap_windows with AVX2 for several tokens: every value is multiplied with the activations of its column, 8 or 16
// tokens side by side. Nothing is permuted, and the time per token goes with the number of values. The sums of 4 rows
// fit the registers, so a block of 16 is read four times, all but the first from the cache.
#pragma once

#include "avx2_token_groups.h"
#include "avx2_windows.h"

namespace wandapp {
namespace {

static_assert(kQuarterRows == kBlockRows);

// A quarter of a block: 8 slots, whose columns lie in 8 bytes.
template <class T, int V>
struct WindowsTokens {
  const T* values;
  const uint8_t* pair;
  const uint8_t* end;
  int64_t slots, columns;  // of the quarter in a step's values, in a pair's columns
  TokenSums<V> sums;

  void start(const Matrix& matrix, int64_t quarter) {
    constexpr int64_t kQuarters = kWindowRows / kQuarterRows;
    const WindowsBlock<T> block(matrix, quarter / kQuarters);
    values = block.values;
    pair = block.meta;
    end = pair + block.pairs * kPairBytes;
    slots = quarter % kQuarters * kQuarterRows * 2;
    columns = byte_of(slots);
    sums.clear();
  }
};

Halves load_halves(const float* w) { return Halves(_mm256_loadu_ps(w)); }
Halves load_halves(const Fp16* w) { return Halves(load_8(w)); }
Halves load_halves(const Bf16* w) {
  const __m256i words = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  const __m256i zero = _mm256_setzero_si256();
  return Halves(_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, words)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, words)));
}

// Pairs of steps until the window starts at column `limit` or later. (Not inlined: in the loop over blocks GCC would
// keep addresses, and then sums, on the stack.)
template <class T, int V>
[[gnu::noinline]] void windows_strip(WindowsTokens<T, V>& block, const WindowsTokens<T, V>& next, const float* x,
                                     int64_t limit) {
  constexpr int kShift = V == 1 ? 5 : 6;  // log2 of a column's bytes
  const T *values = block.values, *next_values = next.values;
  const uint8_t *pair = block.pair, *next_pair = next.pair;
  const int64_t slots = block.slots, columns = block.columns;
  TokenSums<V> sums = block.sums;
  for (; pair != block.end; pair += kPairBytes, values += kPair * kSlots) {
    uint16_t window[kPair];
    std::memcpy(window, pair + kColumnBytes, sizeof(window));
    if (window[0] >= limit) break;
    fetch(next_values);
    fetch(next_values + kSlots);
    fetch(next_pair);
    next_values += kPair * kSlots;
    next_pair += kPairBytes;
    uint64_t word;
    std::memcpy(&word, pair + columns, sizeof(word));
#pragma GCC unroll 2
    for (int i = 0; i < kPair; ++i) {
      const Halves weights = load_halves(values + slots + i * kSlots);
      const char* from = reinterpret_cast<const char*>(x) + (static_cast<int64_t>(window[i]) << kShift);
      asm("" : "+r"(from));  // added up here: GCC would do it for every value
#pragma GCC unroll 8
      for (int n = 0; n < 2 * kQuarterRows; ++n) {
        const int slot = n / 4 + n % 4 * 2;  // the rows in turn
        const int shift = 8 * slot + 4 * i - kShift;
        const uint64_t column = (shift < 0 ? word << -shift : word >> shift) & uint64_t{15} << kShift;
        sums.add(slot / 2, slot % 2, spread(weights.of[slot / 4], slot % 4), from + column);
      }
    }
  }
  block.sums = sums;
  block.values = values;
  block.pair = pair;
}

template <class T>
void run_windows_many(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t tokens, int64_t first,
                      int64_t last, void*) {
  const Output<T> output(matrix, first_token);
  for_groups(prepared, matrix.cols, tokens, [&](auto vectors, const float* x, int64_t m, int64_t count) {
    multiply_in_strips<WindowsTokens<T, vectors>>(
        first, last, matrix.cols, m, count, output,
        [&](auto& block, int64_t number) { block.start(matrix, number); },
        [&](auto& block, const auto& next, int64_t k, int64_t columns) { windows_strip(block, next, x, k + columns); });
  });
}

template <class T>
constexpr Kernel kWindowsMany{
    kWindowRows, kGroupTokens, group_bytes, prepare_group<T>, no_scratch, run_windows_many<T>};

// From this many tokens on, 8 or 16 at once cost less than permuting for each.
template <class T>
constexpr int64_t kWindowsManyTokens = std::is_same_v<T, Bf16> ? 13 : 5;

template <class T>
constexpr Kernel kWindows{kWindowRows,    1,       planes_bytes<T>,  prepare_planes<T>, no_scratch,
                          run_windows<T>, nullptr, &kWindowsMany<T>, kWindowsManyTokens<T>};

}  // namespace
}  // namespace wandapp
