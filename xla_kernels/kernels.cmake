# What every build of the kernels shares: those of the extensions (CMakeLists.txt here) and of the harnesses
# (tests/cuda_on_host, tests/thread_sanitizer).
set(KERNELS "${CMAKE_CURRENT_LIST_DIR}")

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)

# What Python knows: where nanobind and XLA's FFI headers are.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
  OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(nanobind CONFIG REQUIRED)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import jaxlib, os; print(os.path.join(list(jaxlib.__path__)[0], 'include'))"
  OUTPUT_VARIABLE XLA_FFI_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT EXISTS "${XLA_FFI_INCLUDE_DIR}/xla/ffi/api/ffi.h")
  message(FATAL_ERROR "XLA's FFI headers are not in ${XLA_FFI_INCLUDE_DIR}: is jaxlib >= 0.10.2 installed?")
endif()

# Every folder is an op, or what several share; BUILD has the same pattern.
file(GLOB CPU_SOURCES CONFIGURE_DEPENDS "${KERNELS}/*/*.cc")
file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS "${KERNELS}/*/*.cu")

# No value changes by the last two: errno and floating-point exception flags are never read here, and loops with
# a conditional floating-point operation vectorise.
set(CPU_FLAGS -Wall -Wextra -Wno-psabi -fno-math-errno -fno-trapping-math)

# A jump that crosses a border of 32 bytes made the inner loops of convolution a tenth slower, or not, as code before
# them grew or shrank: the assembler pads it, where it can.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-Wa,-mbranches-within-32B-boundaries CAN_PAD_JUMPS)
if(CAN_PAD_JUMPS)
  set(loops ${CPU_SOURCES})
  list(FILTER loops INCLUDE REGEX "/(conv|conv_at|conv_by_site|lines|site_map|submanifold)/")
  set_source_files_properties(${loops} PROPERTIES COMPILE_OPTIONS -Wa,-mbranches-within-32B-boundaries)
endif()

# Lets a target include the kernels' headers and XLA's.
function(use_kernels target)
  target_include_directories(${target} PRIVATE "${KERNELS}/..")
  target_include_directories(${target} SYSTEM PRIVATE "${XLA_FFI_INCLUDE_DIR}")
endfunction()
