// errors.cpp - errors of the native code become Python's.
#include <exception>

#include "bind.h"
#include "piece_ops/core/check.h"

namespace piece_ops::binding {

void translate_errors() {
  pybind11::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const Error& e) {
      PyObject* type = e.kind == ErrorKind::kArgument      ? PyExc_ValueError
                       : e.kind == ErrorKind::kUnsupported ? PyExc_NotImplementedError
                                                           : PyExc_RuntimeError;
      PyErr_SetString(type, e.what());
    }
  });
}

}  // namespace piece_ops::binding
