# _emulation: csrc/cuda compiled by the C++ compiler against csrc/test/simt, for tests without a GPU.
#
# With PIECE_OPS_SANITIZE=thread the scheduler itself is left uninstrumented: it tells
# ThreadSanitizer about the fibers.
set_source_files_properties(${piece_ops_cuda_sources} PROPERTIES LANGUAGE CXX)
file(GLOB piece_ops_cuda_bindings CONFIGURE_DEPENDS csrc/binding/cuda*.cpp)
piece_ops_add_module(_emulation
  ${piece_ops_cuda_sources} ${piece_ops_cuda_bindings} csrc/binding/emulation.cpp
  csrc/binding/errors.cpp)
add_library(piece_ops_simt OBJECT
  csrc/test/simt/fibers.cpp csrc/test/simt/grid.cpp csrc/test/simt/meetings.cpp
  csrc/test/simt/copies.cpp csrc/test/simt/traffic.cpp)
# Mistakes that must be noticed; run by python_tests/test_cuda_simt.py.
add_executable(planted csrc/test/simt/planted.cpp)
foreach(target _emulation planted piece_ops_simt)
  target_include_directories(${target} PRIVATE csrc/include csrc/test)
  target_compile_definitions(${target} PRIVATE PIECE_OPS_CUDA_EMULATION)
  # -fno-strict-aliasing: vector types read other types' memory, as CUDA allows.
  target_compile_options(${target} PRIVATE -g -Wall -Wextra -Werror -Wno-unknown-pragmas
    -ffp-contract=off -fno-strict-aliasing)
endforeach()
if(PIECE_OPS_SANITIZE)
  foreach(target _emulation planted)
    target_compile_options(${target} PRIVATE
      -O1 -fno-omit-frame-pointer -fsanitize=${PIECE_OPS_SANITIZE})
    target_link_options(${target} PRIVATE -fsanitize=${PIECE_OPS_SANITIZE})
  endforeach()
  if(PIECE_OPS_SANITIZE STREQUAL "thread")
    target_compile_definitions(piece_ops_simt PRIVATE PIECE_OPS_SIMT_TSAN)
  else()
    target_compile_options(piece_ops_simt PRIVATE -fsanitize=${PIECE_OPS_SANITIZE})
  endif()
else()
  target_compile_options(_emulation PRIVATE -O2)
endif()
target_compile_options(piece_ops_simt PRIVATE -O2)
target_link_libraries(_emulation PRIVATE piece_ops_simt)
target_link_libraries(planted PRIVATE piece_ops_simt)
