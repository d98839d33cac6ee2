// Python's view of margin_softmax.h. Tensors come as addresses (`data_ptr()`): backends/cpu.py vouches for
// shapes, dtypes and contiguity. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "margin_softmax.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void bind_kernels(py::module_& m, const std::string& dtype) {
  const auto guard = py::call_guard<py::gil_scoped_release>();
  using namespace expface;
  m.def(("inverse_norms_" + dtype).c_str(),
        [](uintptr_t w, int64_t rows, int64_t dim, uintptr_t inv, int threads) {
          inverse_norms<T>(at<T>(w), rows, dim, at<T>(inv), threads);
        },
        py::arg("w"), py::arg("rows"), py::arg("dim"), py::arg("inv"), py::arg("threads"), guard);
  m.def(("forward_tile_" + dtype).c_str(),
        [](uintptr_t dots, int64_t rows, int64_t batch, uintptr_t inv, double scale, uintptr_t local_labels,
           uintptr_t tile_max, uintptr_t tile_sum, uintptr_t hardest, int threads) {
          forward_tile<T>(at<T>(dots), rows, batch, at<T>(inv), scale, at<int64_t>(local_labels),
                          at<T>(tile_max), at<double>(tile_sum), at<int64_t>(hardest), threads);
        },
        py::arg("dots"), py::arg("rows"), py::arg("batch"), py::arg("inv"), py::arg("scale"),
        py::arg("local_labels"), py::arg("tile_max"), py::arg("tile_sum"), py::arg("hardest"),
        py::arg("threads"), guard);
  m.def(("backward_tile_" + dtype).c_str(),
        [](uintptr_t dots, int64_t rows, int64_t batch, uintptr_t inv, double scale, uintptr_t local_labels,
           uintptr_t shift, int threads) {
          backward_tile<T>(at<T>(dots), rows, batch, at<T>(inv), scale, at<int64_t>(local_labels),
                           at<T>(shift), threads);
        },
        py::arg("dots"), py::arg("rows"), py::arg("batch"), py::arg("inv"), py::arg("scale"),
        py::arg("local_labels"), py::arg("shift"), py::arg("threads"), guard);
  m.def(("project_" + dtype).c_str(),
        [](uintptr_t acc, uintptr_t w, int64_t rows, int64_t dim, uintptr_t inv, double factor, int threads) {
          project<T>(at<T>(acc), at<T>(w), rows, dim, at<T>(inv), factor, threads);
        },
        py::arg("acc"), py::arg("w"), py::arg("rows"), py::arg("dim"), py::arg("inv"), py::arg("factor"),
        py::arg("threads"), guard);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the cpu backend does between its matrix products.";
  bind_kernels<float>(m, "float32");
  bind_kernels<double>(m, "float64");
  m.def("instruction_set", &expface::instruction_set, "Kernels in use.");
  m.def("instruction_sets", &expface::instruction_sets, "Kernels that this machine can run.");
  m.def("use_instruction_set", &expface::use_instruction_set, py::arg("name"), "Choose kernels by name.");
  m.def("thread_runtime", &expface::thread_runtime, "Whose threads the kernels run on.");
}
