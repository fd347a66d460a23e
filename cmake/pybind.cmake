# piece_ops_add_module(name sources...): a Python extension module.
#
# pybind11's own CMake package where it is installed; else the headers that torch brings along
# (torch/include/pybind11), which is all that a machine without a package registry may have.
find_package(pybind11 CONFIG QUIET)
set(PIECE_OPS_HAS_PYBIND OFF)
if(pybind11_FOUND)
  set(PIECE_OPS_HAS_PYBIND ON)
  message(STATUS "piece_ops: pybind11 ${pybind11_VERSION}")
elseif(Python_FOUND)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0] + '/include')"
    OUTPUT_VARIABLE piece_ops_torch_include OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(EXISTS ${piece_ops_torch_include}/pybind11/pybind11.h)
    # A folder with nothing else in it: no torch header can slip in.
    set(piece_ops_pybind_include ${CMAKE_BINARY_DIR}/pybind_include)
    file(MAKE_DIRECTORY ${piece_ops_pybind_include})
    file(CREATE_LINK ${piece_ops_torch_include}/pybind11 ${piece_ops_pybind_include}/pybind11
      SYMBOLIC)
    set(PIECE_OPS_HAS_PYBIND ON)
    message(STATUS "piece_ops: pybind11 headers of torch")
  endif()
endif()

# Link-time optimisation is left out: it saves nothing here and costs a minute.
function(piece_ops_add_module name)
  if(pybind11_FOUND)
    pybind11_add_module(${name} MODULE NO_EXTRAS ${ARGN})
  else()
    Python_add_library(${name} MODULE WITH_SOABI ${ARGN})
    target_include_directories(${name} SYSTEM PRIVATE ${piece_ops_pybind_include})
  endif()
endfunction()
