// emulation.cpp - for tests: the CUDA ops over kernels that run on the CPU (csrc/test/simt).
#include <pybind11/stl.h>

#include "bind.h"
#include "piece_ops/core/architectures.h"
#include "simt/simt.h"

namespace py = pybind11;

PYBIND11_MODULE(_emulation, m) {
  piece_ops::binding::translate_errors();
  py::register_exception<simt::Error>(m, "SimtError", PyExc_RuntimeError);
  piece_ops::binding::bind_cuda(m);
  m.def("set_seed", &simt::set_seed);
  m.def("set_device", &simt::set_device);
  m.def("skip_barrier", &simt::skip_barrier);
  m.def("skipped_count", &simt::skipped_count);
  m.def("launch_count", &simt::launch_count);
  m.def("watch", [](uintptr_t address, size_t bytes) {
    simt::watch(reinterpret_cast<void*>(address), bytes);
  });
  m.def("touched_pages", &simt::touched_pages);
  m.def("runs_on", [](const std::string& architectures, int capability) {
    return piece_ops::any_runs_on(piece_ops::parse_architectures(architectures), capability);
  });
}
