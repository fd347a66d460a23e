// bind.h - the parts of the module. The CUDA ops' part is also bound over emulated kernels, for the
// tests.
#pragma once

#include <pybind11/pybind11.h>

namespace piece_ops::binding {

void translate_errors();  // piece_ops::Error to ValueError, NotImplementedError or RuntimeError

void bind_cuda(pybind11::module_& m);
void bind_cuda_select_topk(pybind11::module_& m);

}  // namespace piece_ops::binding
