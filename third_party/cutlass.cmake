# Sets UMMRM_CUTLASS_INCLUDE: what the user gave as UMMRM_CUTLASS (a variable of CMake, or of the environment when first
# configured), else what pip downloads into the build folder. Included only where kernels are built that need it.
set(UMMRM_CUTLASS "$ENV{UMMRM_CUTLASS}" CACHE PATH "a folder with CUTLASS 4.2, or its wheel; empty: downloaded by pip")

find_package(Python3 REQUIRED COMPONENTS Interpreter)
set(given)
if(UMMRM_CUTLASS)
  set(given --given ${UMMRM_CUTLASS})
endif()
execute_process(
  COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/cutlass.py --into ${CMAKE_BINARY_DIR}/third_party ${given}
  OUTPUT_VARIABLE UMMRM_CUTLASS_INCLUDE
  ERROR_VARIABLE error
  RESULT_VARIABLE status
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${error}")
endif()
message(STATUS "CUTLASS: ${UMMRM_CUTLASS_INCLUDE}")
