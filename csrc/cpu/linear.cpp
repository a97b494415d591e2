#include "linear.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "expand.h"
#include "parallel.h"
#include "pieces.h"

namespace wandapp {
namespace {

constexpr size_t kAlignment = 64;
constexpr int64_t kSerialBytes = 256 << 10;      // of tokens: below this, waking a thread costs more than it saves
constexpr int64_t kTokenCacheBytes = 256 << 10;  // prepared tokens that stay in the second-level cache
constexpr int64_t kPreparedBytes = 16 << 20;     // at once: memory is kept for the next call, and fresh memory is slow

// Memory of this thread that grows and is kept.
class Buffer {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(::operator new(bytes, std::align_val_t(kAlignment)));
      size_ = bytes;
    }
    return memory_.get();
  }

  // Gives back what only very long rows needed.
  void trim(size_t limit) {
    if (size_ <= limit) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

thread_local Buffer tokens_buffer;
thread_local Buffer scratch_buffer;

// Whether all are finite.
bool prepare(const Kernel& kernel, int64_t cols, const char* x, int64_t token_size, int64_t tokens, int threads,
             char* prepared) {
  const int64_t group = kernel.group_tokens, stride = static_cast<int64_t>(kernel.group_bytes(cols));
  std::atomic<bool> finite{true};
  parallel_for(ceil_div(tokens, group), tokens * token_size < kSerialBytes ? 1 : threads, [&](int64_t g) {
    const int64_t m = g * group;
    if (!kernel.prepare(x + m * token_size, std::min(group, tokens - m), cols, prepared + g * stride)) finite = false;
  });
  return finite;
}

// Prepared tokens times all pieces, a pass after the other: outputs first_token and following.
void multiply(const Kernel& kernel, int64_t cols, const std::vector<Piece>& pieces, const char* prepared,
              int64_t first_token, int64_t tokens, int threads) {
  const int64_t group = kernel.group_tokens, stride = static_cast<int64_t>(kernel.group_bytes(cols));
  const int64_t pass = kernel.tokens_at_once != nullptr
                           ? kernel.tokens_at_once(cols, tokens)
                           : std::max(kTokenCacheBytes / stride * group / 4 * 4, std::max<int64_t>(group, 8));
  parallel_for(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    void* scratch = scratch_buffer.at_least(kernel.scratch_bytes(cols));
    for (int64_t m = 0; m < tokens; m += pass) {
      kernel.run(*piece.matrix, prepared + m / group * stride, first_token + m, std::min(pass, tokens - m), piece.first,
                 piece.last, scratch);
    }
  });
}

}  // namespace

const Kernel* find_kernel(Variant variant, Format format, Type type) {
#if defined(WANDAPP_HAVE_AVX2)
  // A step is made for 256-bit vectors: wider ones would join two.
  const bool vectors = variant != Variant::plain && variant != Variant::amx;
  if (format == Format::bitmap_windows && vectors) return avx2_kernel(format, type);
#endif
  switch (variant) {
    case Variant::plain:
      return plain_kernel(format, type);
#if defined(WANDAPP_HAVE_AVX2)
    case Variant::avx2:
      return avx2_kernel(format, type);
#endif
#if defined(WANDAPP_HAVE_AVX512)
    case Variant::avx512:
      return avx512_kernel(format, type);
    case Variant::avx512_bf16:
      return avx512_bf16_kernel(format, type);
    case Variant::avx512_vbmi2:
      return avx512_vbmi2_kernel(format, type);
#endif
#if defined(WANDAPP_HAVE_AMX)
    case Variant::amx:
      return amx_kernel(format, type);
#endif
    default:
      return nullptr;
  }
}

Decompress find_decompress(Variant variant, Format format, Type type) {
#if defined(WANDAPP_HAVE_AVX2)
  if (variant != Variant::plain) {
    if (const Decompress found = avx2_decompress(format, type)) return found;
  }
#endif
  static_cast<void>(variant);
  return plain_decompress(format, type);
}

bool offsets_fit(const int64_t* offsets, int64_t rows, int64_t cols, int64_t values) {
  // The top bit is set by a step back, or on by more than `cols`. (A comparison would not be made into vectors.)
  uint64_t wrong = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t step = static_cast<uint64_t>(offsets[r + 1]) - static_cast<uint64_t>(offsets[r]);
    wrong |= step | (static_cast<uint64_t>(cols) - step);
  }
  return wrong >> 63 == 0 && offsets[0] == 0 && offsets[rows] == values;
}

bool linear(const Kernel& few, Format format, Type type, const std::vector<Matrix>& matrices, const void* x,
            int64_t tokens, int threads) {
  const Kernel& kernel = few.many != nullptr && tokens >= few.many_tokens ? *few.many : few;
  const int64_t cols = matrices.at(0).cols, token_size = cols * element_size(type);
  const int64_t stride = static_cast<int64_t>(kernel.group_bytes(cols));
  const int64_t most = std::max<int64_t>(kPreparedBytes / stride, 1) * kernel.group_tokens;
  const int64_t part = even_part(tokens, most, kernel.group_tokens);
  char* const prepared =
      static_cast<char*>(tokens_buffer.at_least(static_cast<size_t>(part / kernel.group_tokens * stride)));
  const std::vector<Piece> pieces = cut(kernel, format, type, matrices, threads);
  bool good = true;
  for (int64_t m = 0; good && m < tokens; m += part) {
    const int64_t count = std::min(part, tokens - m);
    const bool finite = prepare(kernel, cols, static_cast<const char*>(x) + m * token_size, token_size, count, threads,
                                prepared);
    good = finite || format == Format::dense;
    if (good) multiply(kernel, cols, pieces, prepared, m, count, threads);
  }
  tokens_buffer.trim(kPreparedBytes);
  return good;
}

void decompress(Decompress rows_of, Type type, const Matrix& matrix, int64_t first, int64_t last, void* out,
                bool to_fp32, int threads) {
  constexpr int64_t kRows = 16;
  const int64_t row_bytes = matrix.cols * (to_fp32 ? 4 : element_size(type));
  parallel_for(ceil_div(last - first, kRows), threads, [&](int64_t i) {
    const int64_t begin = first + i * kRows;
    rows_of(matrix, begin, std::min(begin + kRows, last), static_cast<char*>(out) + i * kRows * row_bytes, to_fp32);
  });
}

}  // namespace wandapp
