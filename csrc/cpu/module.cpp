// wandapp_kernels._cpu: addresses and sizes in, nothing of torch. The caller checks shapes, types and lifetimes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu_features.h"
#include "linear.h"

namespace py = pybind11;

namespace {

using wandapp::Format;
using wandapp::Matrix;
using wandapp::Type;
using wandapp::Variant;

// values, meta, offsets, bias, out (addresses; 0 = none), rows
using MatrixArguments = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t>;

Matrix matrix_of(const MatrixArguments& arguments, int64_t cols) {
  const auto& [values, meta, offsets, bias, out, rows] = arguments;
  if (rows < 1 || cols < 1) throw py::value_error("a matrix needs at least one row and one column");
  return {reinterpret_cast<const void*>(values), reinterpret_cast<const void*>(meta),
          reinterpret_cast<const int64_t*>(offsets), reinterpret_cast<const void*>(bias),
          reinterpret_cast<void*>(out), rows, cols};
}

// Best first.
std::vector<std::pair<std::string, Variant>> variants() {
  std::vector<std::pair<std::string, Variant>> found;
#if defined(WANDAPP_HAVE_AVX512)
  if (wandapp::has_avx512_bf16()) found.emplace_back("avx512_bf16", Variant::avx512_bf16);
  if (wandapp::has_avx512()) found.emplace_back("avx512", Variant::avx512);
#endif
#if defined(WANDAPP_HAVE_AVX2)
  if (wandapp::has_avx2()) found.emplace_back("avx2", Variant::avx2);
#endif
  found.emplace_back("plain", Variant::plain);
  return found;
}

const wandapp::Kernel& kernel_of(Variant variant, Format format, Type type) {
  for (const auto& [name, available] : variants()) {
    if (available != variant) continue;
    const wandapp::Kernel* kernel = wandapp::find_kernel(variant, format, type);
    if (kernel == nullptr) throw py::value_error("variant " + name + " has no kernel for this format");
    return *kernel;
  }
  throw py::value_error("this processor cannot run the variant");
}

bool linear(Variant variant, Format format, Type type, uintptr_t x, int64_t tokens, int64_t cols,
            const std::vector<MatrixArguments>& arguments, int threads) {
  const wandapp::Kernel& kernel = kernel_of(variant, format, type);
  if (arguments.empty() || tokens < 1) throw py::value_error("at least one matrix and one token are needed");
  std::vector<Matrix> matrices;
  matrices.reserve(arguments.size());
  for (const auto& one : arguments) matrices.push_back(matrix_of(one, cols));
  py::gil_scoped_release unlocked;
  return wandapp::linear(kernel, format, type, matrices, reinterpret_cast<const void*>(x), tokens, threads);
}

void decompress(Format format, Type type, const MatrixArguments& arguments, int64_t cols, int64_t first, int64_t last,
                bool to_fp32, int threads) {
  const Matrix matrix = matrix_of(arguments, cols);
  if (first < 0 || last > matrix.rows || first > last) throw py::value_error("rows are out of range");
  py::gil_scoped_release unlocked;
  wandapp::decompress(format, type, matrix, first, last, matrix.out, to_fp32, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of wandapp_kernels over raw addresses.";
#if defined(WANDAPP_HAVE_AVX512)
  module.attr("HAS_AVX512") = true;
#else
  module.attr("HAS_AVX512") = false;
#endif
  py::enum_<Format>(module, "Format")
      .value("dense", Format::dense)
      .value("nm", Format::nm)
      .value("nm_pairs", Format::nm_pairs)
      .value("bitmap", Format::bitmap);
  py::enum_<Type>(module, "Type").value("bf16", Type::bf16).value("fp16", Type::fp16).value("fp32", Type::fp32);
  py::enum_<Variant>(module, "Variant")
      .value("plain", Variant::plain)
      .value("avx2", Variant::avx2)
      .value("avx512", Variant::avx512)
      .value("avx512_bf16", Variant::avx512_bf16);
  module.def("variants", &variants, "Name and value of every variant this processor runs, best first.");
  module.def("has_kernel", [](Variant variant, Format format, Type type) {
    return wandapp::find_kernel(variant, format, type) != nullptr;
  });
  module.def("has_fast_bf16_gemm", &wandapp::has_fast_bf16_gemm, "AMX-BF16 or AVX512-BF16.");
  module.def("linear", &linear, py::arg("variant"), py::arg("format"), py::arg("type"), py::arg("x"),
             py::arg("tokens"), py::arg("cols"), py::arg("matrices"), py::arg("threads"),
             "x W^T + bias into every matrix's out; false when x is not finite (sparse formats only).");
  module.def("decompress", &decompress, py::arg("format"), py::arg("type"), py::arg("matrix"), py::arg("cols"),
             py::arg("first"), py::arg("last"), py::arg("to_fp32"), py::arg("threads"),
             "Rows first to last as dense rows into the matrix's out.");
}
