// The Python module ilajax._cuda: the CUDA handlers, and their plans. The other functions tell what
// was compiled and what is here, so that Python can compare them before it registers anything; none
// of them fails, and only devices() starts CUDA.

#define CPU_TARGET(target, Name)  // has no handler here

#include <cuda_runtime.h>

#include <algorithm>
#include <string_view>

#include "xla_kernels/bind.h"

namespace nb = nanobind;

// CMake's list, "80-real;90-real".
#ifndef ILAJAX_CUDA_ARCHITECTURES
#define ILAJAX_CUDA_ARCHITECTURES ""
#endif

namespace {

nb::list Architectures() {
  nb::list found;
  constexpr std::string_view kSeparators = ";, ";
  std::string_view rest = ILAJAX_CUDA_ARCHITECTURES;
  while (!rest.empty()) {
    const size_t end = std::min(rest.find_first_of(kSeparators), rest.size());
    if (end > 0) found.append(nb::str(rest.data(), end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  return found;
}

int DriverVersion() {
  int version = 0;
  const bool ok = cudaDriverGetVersion(&version) == cudaSuccess;
  (void)cudaGetLastError();  // or the next call of this thread reports it
  return ok ? version : 0;
}

nb::list Devices() {
  nb::list found;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    nb::dict facts;
    facts["name"] = nb::str(properties.name);
    facts["capability"] = nb::make_tuple(properties.major, properties.minor);
    facts["max_shared"] = properties.sharedMemPerBlockOptin;
    found.append(facts);
  }
  (void)cudaGetLastError();
  return found;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "ilajax's CUDA handlers for XLA's FFI.";
  ilajax::Bind(m);
  m.def("driver_version", &DriverVersion,
        "The newest CUDA that the driver runs, such as 13000; 0 without a driver.");
  m.def(
      "runtime_version", [] { return CUDART_VERSION; },
      "The CUDA that this module was built with, such as 13000: the driver must have its major "
      "version.");
  m.def("architectures", &Architectures,
        "What the kernels were compiled for, in CMake's words: \"90-real\" is machine code, "
        "\"90-virtual\" PTX, \"90\" both. Empty if the build did not say.");
  m.def(
      "devices", &Devices,
      "name, capability (major, minor) and max_shared, the bytes of shared memory that a block may "
      "opt into, of each device; empty without a driver that runs this module. Starts CUDA, which "
      "settles what devices are visible.");
}
