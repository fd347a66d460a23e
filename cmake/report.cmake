# Runs COMMAND (a list) and keeps what it says in REPORT: cmake -DREPORT= -DCOMMAND= -P report.cmake
execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${text}")
endif()
file(WRITE ${REPORT} "${text}")
file(REMOVE ${REPORT}.o)
