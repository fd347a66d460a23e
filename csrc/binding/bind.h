// bind.h - the parts of the module. That of the CUDA ops is also bound over emulated kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace piece_ops::binding {

void translate_errors();  // piece_ops::Error to ValueError, NotImplementedError or RuntimeError

void bind_cuda(pybind11::module_& m);
void bind_cuda_look(pybind11::module_& m);
void bind_cuda_select_topk(pybind11::module_& m);

}  // namespace piece_ops::binding
