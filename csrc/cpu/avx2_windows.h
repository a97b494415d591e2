// bitmap_windows with AVX2, few tokens: the activations of 32 slots are picked out of byte planes.
#pragma once

#include <utility>

#include "avx2_planes.h"

namespace wandapp {
namespace {

template <class T>
struct WindowsBlock {
  const T* values;
  const uint8_t* meta;
  int64_t pairs;
  int64_t row;

  WindowsBlock(const Matrix& matrix, int64_t block)
      : values(static_cast<const T*>(matrix.values) + matrix.offsets[block] * kSlots),
        meta(pair_meta(matrix, matrix.offsets[block])),
        pairs((matrix.offsets[block + 1] - matrix.offsets[block]) / kPair),
        row(block * kWindowRows) {}
};

// B blocks side by side, M tokens.
template <class T, int B, int M>
void windows_blocks(WindowsBlock<T> (&blocks)[B], const void* prepared, int64_t cols, int64_t m, int64_t rows,
                    const Output<T>& output) {
  const __m256i low_half = _mm256_set1_epi8(15);
  const Planes<T> planes(prepared, cols, m);
  const int64_t stride = planes.stride, token = static_cast<int64_t>(planes_bytes<T>(cols));
  SlotSums<T> acc[B][M];
  int64_t common = blocks[0].pairs;
  for (int b = 0; b < B; ++b) {
    for (SlotSums<T>& sums : acc[b]) sums.clear();
    common = at_most(common, blocks[b].pairs);
  }
  const auto step = [&](int b, int i, __m256i columns) {
    const Slots weights = load_slots(blocks[b].values + i * kSlots);
    const uint8_t* x = planes.bytes + window_of(blocks[b].meta, i);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) acc[b][j].add(weights, pick<T>(x + j * token, stride, columns));
  };
  const auto pair = [&](int b) {
    for (size_t line = 0; line < kPair * kSlots * sizeof(T); line += 64) {
      prefetch(reinterpret_cast<const char*>(blocks[b].values) + line);
    }
    prefetch(blocks[b].meta);
    const __m256i columns = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks[b].meta));
    step(b, 0, _mm256_and_si256(columns, low_half));
    step(b, 1, _mm256_and_si256(_mm256_srli_epi16(columns, 4), low_half));
    blocks[b].values += kPair * kSlots;
    blocks[b].meta += kPairBytes;
  };
  for (int64_t p = 0; p < common; ++p) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) pair(b);
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
#pragma GCC unroll 1
    for (int64_t p = common; p < blocks[b].pairs; ++p) pair(b);
    for (int j = 0; j < M; ++j) {
      float sums[kWindowRows];
      acc[b][j].put(sums);
      const int64_t r = blocks[b].row;
      for (int64_t i = 0; i < at_most(rows - r, kWindowRows); ++i) output.put(m + j, r + i, sums[i]);
    }
  }
}

// B blocks at once, so far apart that each is a stream of whole pages. Returns the first block that is left.
template <class T, int B, int M, size_t... I>
int64_t windows_streams(const Matrix& matrix, const void* prepared, int64_t begin, int64_t end, int64_t rows,
                        const Output<T>& output, std::index_sequence<I...>) {
  const int64_t apart = (end - begin) / B;
  for (int64_t block = begin; block < begin + apart; ++block) {
    WindowsBlock<T> blocks[B] = {{matrix, block + static_cast<int64_t>(I) * apart}...};
    windows_blocks<T, B, M>(blocks, prepared, matrix.cols, 0, rows, output);
  }
  return begin + B * apart;
}

template <class T>
void run_windows(const Matrix& matrix, const void* prepared, int64_t first_token, int64_t count, int64_t first,
                 int64_t last, void*) {
  const Output<T> output(matrix, first_token);
  const int64_t end = ceil_div(last, kWindowRows);
  int64_t block = first / kWindowRows;
  if (count == 1) {
    block = windows_streams<T, 3, 1>(matrix, prepared, block, end, last, output, std::make_index_sequence<3>());
  }
  for (; block < end; ++block) {
    for_token_groups(count, [&](auto m_count, int64_t m) {
      WindowsBlock<T> one[1] = {{matrix, block}};
      windows_blocks<T, 1, m_count>(one, prepared, matrix.cols, m, last, output);
    });
  }
}

}  // namespace
}  // namespace wandapp
