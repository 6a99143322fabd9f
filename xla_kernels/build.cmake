# Configures and builds the extensions, and gathers in PACKAGE what is installed beside the Python files: those
# that could be built, and _build.py, which says why another could not.

# Builds one extension; a failure stops everything if it is `required`, and is a reason kept otherwise.
function(build extension required)
  set(folder "${BINARY}/${extension}")
  string(REPLACE ";" "\\;" sanitizers "${SANITIZE}")
  set(configure
      ${CMAKE_COMMAND} -S "${SOURCE}" -B "${folder}" -G "${GENERATOR}" "-DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM}"
      "-DEXTENSION=${extension}" "-DILAJAX_SANITIZE=${sanitizers}" ${ARGN})
  if(EXISTS "${BINARY}/CMakeInit.txt")  # what scikit-build-core knows of Python
    list(APPEND configure -C "${BINARY}/CMakeInit.txt")
  endif()
  execute_process(
    COMMAND ${configure} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output
    ECHO_OUTPUT_VARIABLE ECHO_ERROR_VARIABLE)
  if(status EQUAL 0)
    execute_process(
      COMMAND ${CMAKE_COMMAND} --build "${folder}" RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output
      ECHO_OUTPUT_VARIABLE ECHO_ERROR_VARIABLE)
  endif()
  if(status EQUAL 0)
    file(GLOB library "${folder}/_${extension}.*")
    file(COPY ${library} DESTINATION "${PACKAGE}")
    return()
  endif()
  if(required)
    message(FATAL_ERROR "the ${extension} extension could not be built")
  endif()
  miss(${extension} "${output}")
endfunction()

# Adds to _build.py why an extension is missing: what a build's output says from its first error on.
function(miss extension output)
  string(REGEX MATCH "[^\n]*[Ee]rror.*" reason "${output}")
  if(reason STREQUAL "")
    set(reason "${output}")
  endif()
  string(SUBSTRING "${reason}" 0 1500 reason)
  string(STRIP "${reason}" reason)
  string(REPLACE "\\" "\\\\" reason "${reason}")
  string(REPLACE "\"" "\\\"" reason "${reason}")
  string(REPLACE "\n" "\\n" reason "${reason}")
  string(REPLACE "\r" "" reason "${reason}")
  file(APPEND "${PACKAGE}/_build.py" "MISSING[\"${extension}\"] = \"${reason}\"\n")
  message(WARNING "ilajax is installed without its ${extension} extension")
endfunction()

file(REMOVE_RECURSE "${PACKAGE}")
file(WRITE "${PACKAGE}/_build.py"
     "\"\"\"Extensions that were not built, and why: written by xla_kernels/build.cmake.\"\"\"\n\nMISSING = {}\n")

if(SANITIZE)
  build(cpu TRUE)
else()
  build(cpu FALSE)
endif()

if(DEFINED ENV{CUDACXX})
  set(nvcc "$ENV{CUDACXX}")
else()
  find_program(nvcc nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
endif()
if(CUDA STREQUAL "AUTO" AND NOT nvcc)
  miss(cuda "nvcc was not found.")
elseif(CUDA STREQUAL "AUTO")
  build(cuda FALSE "-DCMAKE_CUDA_COMPILER=${nvcc}")
elseif(CUDA)
  build(cuda TRUE "-DCMAKE_CUDA_COMPILER=${nvcc}")
else()
  miss(cuda "It was left out: ILAJAX_CUDA=${CUDA}.")
endif()
