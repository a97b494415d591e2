// What the AVX2 and the AVX-512 kernels share: sizes and outputs.
#pragma once

#include "expand.h"

namespace wandapp {
namespace {

constexpr int kMaxTokens = 4;  // rows of activations that share a vector of weights
constexpr int64_t kPrefetchBytes = 1024;

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
[[maybe_unused]] size_t no_scratch(int64_t) { return 0; }
[[maybe_unused]] inline uint32_t low_bits(int64_t count) {
  return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
}

template <class T>
struct Output {
  const T* bias;
  T* out;
  int64_t stride;

  Output(const Matrix& matrix, int64_t first_token)
      : bias(static_cast<const T*>(matrix.bias)),
        out(static_cast<T*>(matrix.out) + first_token * matrix.rows),
        stride(matrix.rows) {}

  void put(int64_t token, int64_t row, float value) const {
    out[token * stride + row] = narrow<T>(bias == nullptr ? value : value + widen(bias[row]));
  }
};

}  // namespace
}  // namespace wandapp
