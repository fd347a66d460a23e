# A compiler launcher: runs the nvcc command after "--", keeps what it says in FOLDER/<source>.txt,
# and says it aloud where nvcc fails.
#
#   cmake -DFOLDER=... -P report.cmake -- nvcc ... -c a.cu -o a.o
set(command)
set(name)
set(is_command OFF)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
  set(argument "${CMAKE_ARGV${i}}")
  if(is_command)
    list(APPEND command "${argument}")
    if(argument MATCHES "\\.cu$")
      get_filename_component(name "${argument}" NAME_WE)
    endif()
  elseif(argument STREQUAL "--")
    set(is_command ON)
  endif()
endforeach()
execute_process(COMMAND ${command} OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${text}")
endif()
file(WRITE "${FOLDER}/${name}.txt" "${text}")
