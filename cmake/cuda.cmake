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

# cuda_resources: registers, shared memory and spills of every kernel and architecture, as ptxas
# says, in resources/<file>.txt; python_tests/test_cuda_build.py reads them.
set(piece_ops_gencode)
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
  string(REGEX REPLACE "-.*" "" number ${architecture})
  list(APPEND piece_ops_gencode -gencode arch=compute_${number},code=sm_${number})
endforeach()
file(GLOB piece_ops_cuda_headers CONFIGURE_DEPENDS csrc/cuda/*.h csrc/include/piece_ops/*/*.h)
set(piece_ops_reports)
foreach(source IN LISTS piece_ops_cuda_sources)
  get_filename_component(name ${source} NAME_WE)
  set(report ${CMAKE_CURRENT_BINARY_DIR}/resources/${name}.txt)
  add_custom_command(OUTPUT ${report}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/resources
    COMMAND ${CMAKE_COMMAND} -DREPORT=${report}
      "-DCOMMAND=${CMAKE_CUDA_COMPILER};-O3;-std=c++17;${piece_ops_cuda_flags};-Xptxas=-v;${piece_ops_gencode};-I${CMAKE_CURRENT_SOURCE_DIR}/csrc/include;-c;${source};-o;${report}.o"
      -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/report.cmake
    DEPENDS ${source} ${piece_ops_cuda_headers}
    VERBATIM)
  list(APPEND piece_ops_reports ${report})
endforeach()
add_custom_target(cuda_resources DEPENDS ${piece_ops_reports})
