// What Python sees of the host-side parts that are no tensor ops: the module
// fasttrace_kernels._host.

#include "prefetch_ring.h"

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using fasttrace::PrefetchRing;
using fasttrace::RingPart;

namespace {

using Part = std::tuple<int64_t, int64_t, int64_t, int64_t>;

std::unique_ptr<PrefetchRing> make_ring(const std::vector<Part>& given, int64_t slots) {
  std::vector<RingPart> parts;
  for (const auto& [kept, kept_bytes, staged, staged_bytes] : given) {
    parts.push_back({kept, kept_bytes, staged, staged_bytes});
  }
  return std::make_unique<PrefetchRing>(std::move(parts), slots);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  using Free = py::call_guard<py::gil_scoped_release>;
  py::class_<PrefetchRing>(m, "PrefetchRing", py::release_gil_before_calling_cpp_dtor())
      .def(py::init(&make_ring), py::arg("parts"), py::arg("slots") = 2)
      .def("prefetch", &PrefetchRing::prefetch, py::arg("call"), Free())
      .def("wait", &PrefetchRing::wait, py::arg("call"), Free())
      .def("release", &PrefetchRing::release, py::arg("call"), Free())
      .def("close", &PrefetchRing::close, Free());
}
