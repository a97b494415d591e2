// The rows of one call's matrices, cut into pieces for threads.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"

namespace wandapp {

inline int64_t element_size(Type type) { return type == Type::fp32 ? 4 : 2; }

struct Piece {
  const Matrix* matrix;
  int64_t first, last;  // rows; `first` is a multiple of the kernel's rows
};

// All rows, in order. Of what is left each piece takes half a thread's share by bytes (guided self-scheduling,
// Polychronopoulos and Kuck 1987): who is early takes small pieces at the end, and nobody waits long for the last.
std::vector<Piece> cut(const Kernel& kernel, Format format, Type type, const std::vector<Matrix>& matrices,
                       int threads);

// For Matrix::shares: the rows at which equal shares of the bytes begin. Null where all rows have the same bytes.
std::unique_ptr<const int64_t[]> find_shares(Format format, Type type, const Matrix& matrix);

}  // namespace wandapp
