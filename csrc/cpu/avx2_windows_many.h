// bitmap_windows with AVX2 for several tokens: every value is multiplied with the activations of its column, 8 or 16
// tokens side by side. Nothing is permuted, and the time per token goes with the number of values.
#pragma once

#include "avx2_token_groups.h"
#include "avx2_windows.h"

namespace wandapp {
namespace {

static_assert(kWindowRows == kBlockRows);

template <class T, int V>
struct WindowsTokens {
  const T* values;
  const uint32_t* words;
  const uint32_t* end;
  const char* window;
  TokenSums<V> sums;

  void start(const WindowsBlock<T>& block, const float* x) {
    values = block.values;
    words = block.words;
    end = block.words + block.steps;
    window = reinterpret_cast<const char*>(x);
    sums.clear();
  }
};

// Steps until the window has reached `limit`. (Not inlined: in the loop over blocks GCC would keep addresses, and then
// sums, on the stack.)
template <class T, int V>
[[gnu::noinline]] void windows_strip(WindowsTokens<T, V>& block, const WindowsTokens<T, V>& next, const char* limit) {
  constexpr int kShift = V == 1 ? 5 : 6;  // log2 of a column's bytes
  const T *values = block.values, *next_values = next.values;
  const uint32_t *words = block.words, *next_words = next.words;
  const char* window = block.window;
  TokenSums<V> sums = block.sums;
  for (; words != block.end && window < limit; words += kPair, values += kPair * kSlots) {
    fetch(next_values);
    fetch(next_words);
    next_values += kPair * kSlots;
    next_words += kPair;
    const Chunk chunk = load(values);
#pragma GCC unroll 2
    for (int i = 0; i < kPair; ++i) {
      const Halves weights(i == 0 ? chunk.first : chunk.second);
      const uint32_t word = words[i];
      window += move_of(words + i) << kShift;
#pragma GCC unroll 8
      for (int n = 0; n < kSlots; ++n) {
        const int slot = n / 4 + n % 4 * 2;  // the rows in turn
        const int shift = 3 * slot - kShift;
        const uint32_t column = (shift < 0 ? word << -shift : word >> shift) & 7u << kShift;
        sums.add(slot / 2, slot % 2, spread(weights.of[slot / 4], slot % 4), window + column);
      }
    }
  }
  block.sums = sums;
  block.values = values;
  block.words = words;
  block.window = window;
}

template <class T>
void run_windows_many(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t tokens, int64_t first,
                      int64_t last, void*) {
  const Output<T> output(matrix, first_token);
  for_groups(prepared, matrix.cols, tokens, [&](auto vectors, const float* x, int64_t m, int64_t count) {
    multiply_in_strips<WindowsTokens<T, vectors>>(
        first, last, matrix.cols, m, count, output,
        [&](auto& block, int64_t number) { block.start(WindowsBlock<T>(matrix, number), x); },
        [&](auto& block, const auto& next, int64_t k, int64_t columns) {
          windows_strip(block, next, reinterpret_cast<const char*>(x + (k + columns) * vectors * kLanes));
        });
  });
}

template <class T>
constexpr Kernel kWindowsMany{
    kWindowRows, kGroupTokens, group_bytes, prepare_group<T>, no_scratch, run_windows_many<T>};

// From this many tokens on, 8 at once cost less than permuting for each.
constexpr int64_t kWindowsManyTokens = 5;

template <class T>
constexpr Kernel kWindows{kWindowRows,    1,       token_bytes,      prepare<T, false>, no_scratch,
                          run_windows<T>, nullptr, &kWindowsMany<T>, kWindowsManyTokens};

}  // namespace
}  // namespace wandapp
