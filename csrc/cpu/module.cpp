// wandapp_kernels._cpu: addresses and sizes in, nothing of torch. The caller checks shapes, types and lifetimes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu_features.h"
#include "linear.h"
#include "parallel.h"
#include "pieces.h"
#include "windows_packing.h"

namespace py = pybind11;

namespace {

using wandapp::Format;
using wandapp::Matrix;
using wandapp::Type;
using wandapp::Variant;

// Best first.
std::vector<std::pair<std::string, Variant>> variants() {
  std::vector<std::pair<std::string, Variant>> found;
#if defined(WANDAPP_HAVE_AVX512)
  if (wandapp::has_avx512_vbmi2()) found.emplace_back("avx512_vbmi2", Variant::avx512_vbmi2);
  if (wandapp::has_avx512_bf16()) found.emplace_back("avx512_bf16", Variant::avx512_bf16);
  if (wandapp::has_avx512()) found.emplace_back("avx512", Variant::avx512);
#endif
#if defined(WANDAPP_HAVE_AVX2)
  if (wandapp::has_avx2()) found.emplace_back("avx2", Variant::avx2);
#endif
  found.emplace_back("plain", Variant::plain);
  return found;
}

// Not one of the above: it has kernels for bf16 only, and is asked for by name.
bool has_amx() {
#if defined(WANDAPP_HAVE_AMX)
  return wandapp::has_amx();
#else
  return false;
#endif
}

void require_here(Variant variant) {
  if (variant == Variant::amx && has_amx()) return;
  for (const auto& [name, available] : variants())
    if (available == variant) return;
  throw py::value_error("this processor cannot run the variant");
}

// A weight and its bias, checked once: addresses that the caller keeps alive.
struct Bound {
  const wandapp::Kernel* kernel;  // null: the variant can only decompress the format
  wandapp::Decompress decompress;
  Format format;
  Type type;
  Matrix matrix;
  std::unique_ptr<const int64_t[]> shares;  // of the matrix
};

Bound bind(Variant variant, Format format, Type type, uintptr_t values, uintptr_t meta, uintptr_t offsets,
           uintptr_t bias, int64_t rows, int64_t cols) {
  if (rows < 1 || cols < 1) throw py::value_error("a matrix needs at least one row and one column");
  require_here(variant);
  Matrix matrix{reinterpret_cast<const void*>(values),
                reinterpret_cast<const void*>(meta),
                reinterpret_cast<const int64_t*>(offsets),
                reinterpret_cast<const void*>(bias),
                nullptr,
                rows,
                cols};
  std::unique_ptr<const int64_t[]> shares = wandapp::find_shares(format, type, matrix);
  matrix.shares = shares.get();
  return {wandapp::find_kernel(variant, format, type),
          wandapp::find_decompress(variant, format, type),
          format,
          type,
          matrix,
          std::move(shares)};
}

bool offsets_fit(uintptr_t offsets, int64_t rows, int64_t cols, int64_t values) {
  return wandapp::offsets_fit(reinterpret_cast<const int64_t*>(offsets), rows, cols, values);
}

bool linear(const std::vector<const Bound*>& bound, uintptr_t x, int64_t tokens, const std::vector<uintptr_t>& outs,
            int threads) {
  if (bound.empty() || bound.size() != outs.size() || tokens < 1)
    throw py::value_error("at least one matrix, an output for each, and one token are needed");
  const Bound& first = *bound.front();
  if (first.kernel == nullptr) throw py::value_error("the variant has no kernel for this format");
  std::vector<Matrix> matrices;
  matrices.reserve(bound.size());
  for (size_t i = 0; i < bound.size(); ++i) {
    const Bound& one = *bound[i];
    if (one.kernel != first.kernel || one.matrix.cols != first.matrix.cols)
      throw py::value_error("matrices of one call share their kernel and the number of columns");
    matrices.push_back(one.matrix);
    matrices.back().out = reinterpret_cast<void*>(outs[i]);
  }
  py::gil_scoped_release unlocked;
  return wandapp::linear(*first.kernel, first.format, first.type, matrices, reinterpret_cast<const void*>(x), tokens,
                         threads);
}

void decompress(const Bound& bound, int64_t first, int64_t last, uintptr_t out, bool to_fp32, int threads) {
  if (first < 0 || last > bound.matrix.rows || first > last) throw py::value_error("rows are out of range");
  py::gil_scoped_release unlocked;
  wandapp::decompress(bound.decompress, bound.type, bound.matrix, first, last, reinterpret_cast<void*>(out), to_fp32,
                      threads);
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

bool count_windows(const Bound& from, uintptr_t steps, int threads) {
  if (from.format != Format::bitmap) throw py::value_error("only the bitmap format is packed into windows");
  py::gil_scoped_release unlocked;
  return wandapp::count_windows(from.matrix, at<int64_t>(steps), threads);
}

void pack_windows(const Bound& from, uintptr_t offsets, uintptr_t values, uintptr_t meta, int threads) {
  if (from.format != Format::bitmap) throw py::value_error("only the bitmap format is packed into windows");
  if (from.matrix.cols > wandapp::kMostColumns) throw py::value_error("windows hold at most 65536 columns");
  py::gil_scoped_release unlocked;
  wandapp::pack_windows(from.type, from.matrix, at<const int64_t>(offsets), at<void>(values), at<uint8_t>(meta),
                        threads);
}

bool unpack_windows(const Bound& from, uintptr_t row_offsets, uintptr_t values, uintptr_t bitmap, int threads) {
  if (from.format != Format::bitmap_windows) throw py::value_error("only windows are unpacked");
  py::gil_scoped_release unlocked;
  return wandapp::unpack_windows(from.type, from.matrix, at<const int64_t>(row_offsets), at<void>(values),
                                 at<uint8_t>(bitmap), threads);
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
      .value("bitmap", Format::bitmap)
      .value("bitmap_windows", Format::bitmap_windows);
  py::enum_<Type>(module, "Type").value("bf16", Type::bf16).value("fp16", Type::fp16).value("fp32", Type::fp32);
  py::enum_<Variant>(module, "Variant")
      .value("plain", Variant::plain)
      .value("avx2", Variant::avx2)
      .value("avx512", Variant::avx512)
      .value("avx512_bf16", Variant::avx512_bf16)
      .value("avx512_vbmi2", Variant::avx512_vbmi2)
      .value("amx", Variant::amx);
  module.def("variants", &variants, "Name and value of every variant this processor runs, best first.");
  module.def("has_kernel", [](Variant variant, Format format, Type type) {
    return wandapp::find_kernel(variant, format, type) != nullptr;
  });
  module.def("has_amx", &has_amx, "Whether the variant amx, which variants() leaves out, was built and runs here.");
  module.def("has_fast_bf16_gemm", &wandapp::has_fast_bf16_gemm, "AMX-BF16 or AVX512-BF16.");
  module.def("parallel_backend", &wandapp::parallel_backend, "Whose threads work: \"openmp\" (torch's) or \"own\".");
  module.def("leave_openmp", &wandapp::leave_openmp, "Use own threads from now on: for a forked child.");
  py::class_<Bound>(module, "Bound", "A weight and its bias by address, checked once.")
      .def(py::init(&bind), py::arg("variant"), py::arg("format"), py::arg("type"), py::arg("values"),
           py::arg("meta"), py::arg("offsets"), py::arg("bias"), py::arg("rows"), py::arg("cols"));
  module.def("offsets_fit", &offsets_fit, py::arg("offsets"), py::arg("rows"), py::arg("cols"), py::arg("values"),
             "Whether a bitmap weight's offsets ascend from 0 to the number of values, a row by the columns at most.");
  module.def("linear", &linear, py::arg("bound"), py::arg("x"), py::arg("tokens"), py::arg("outs"),
             py::arg("threads"),
             "x W^T + bias into the out of every matrix; false when x is not finite (sparse formats only).");
  module.def("decompress", &decompress, py::arg("bound"), py::arg("first"), py::arg("last"), py::arg("out"),
             py::arg("to_fp32"), py::arg("threads"), "Rows first to last as dense rows into out.");
  module.def("count_windows", &count_windows, py::arg("bitmap"), py::arg("steps"), py::arg("threads"),
             "Steps of every block of rows of a bitmap weight in windows; false: bitmap and offsets do not fit together.");
  module.def("pack_windows", &pack_windows, py::arg("bitmap"), py::arg("offsets"), py::arg("values"),
             py::arg("meta"), py::arg("threads"), "A bitmap weight into the format bitmap_windows.");
  module.def("unpack_windows", &unpack_windows, py::arg("windows"), py::arg("row_offsets"), py::arg("values"),
             py::arg("bitmap"), py::arg("threads"), "The other way round, bit for bit; false: weights and row_offsets do not fit together.");
}
