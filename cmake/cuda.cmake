# The CUDA kernels: one static library, linked into the module. Warnings are errors, in the host's and
# the device's half; a register that spills to memory fails the build; --fmad=false keeps the CPU's
# bits.
set(piece_ops_cuda_flags
  --fmad=false -Xcompiler=-Wall,-Wextra,-Wno-unused-parameter -Xptxas=-warn-spills)
if(PIECE_OPS_WERROR)
  list(APPEND piece_ops_cuda_flags -Werror=all-warnings -Xcompiler=-Werror -Xptxas=-Werror)
endif()
add_library(piece_ops_cuda STATIC ${piece_ops_cuda_sources})
target_include_directories(piece_ops_cuda PUBLIC csrc/include)
target_compile_options(piece_ops_cuda PRIVATE ${piece_ops_cuda_flags})
set(piece_ops_architectures "${CMAKE_CUDA_ARCHITECTURES}")
list(JOIN piece_ops_architectures "," piece_ops_architectures)
set_source_files_properties(csrc/cuda/device.cu PROPERTIES
  COMPILE_DEFINITIONS PIECE_OPS_CUDA_ARCHITECTURES="${piece_ops_architectures}")

# Registers, shared memory and spills of every kernel and architecture, as ptxas says while it
# compiles, in resources/<file>.txt; python_tests/test_cuda_build.py reads them.
if(PIECE_OPS_RESOURCES)
  target_compile_options(piece_ops_cuda PRIVATE -Xptxas=-v)
  set_target_properties(piece_ops_cuda PROPERTIES CUDA_COMPILER_LAUNCHER
    "${CMAKE_COMMAND};-DFOLDER=${CMAKE_CURRENT_BINARY_DIR}/resources;-P;${CMAKE_CURRENT_SOURCE_DIR}/cmake/report.cmake;--")
endif()
