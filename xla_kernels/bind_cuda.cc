// The Python module ilajax._cuda: registrations() maps each FFI target to its CUDA handler; of the
// unproven targets only in a build with ILAJAX_CUDA_UNPROVEN, which is what `make gpu-check` tests.

#include <nanobind/nanobind.h>

#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;

#ifdef ILAJAX_CUDA_UNPROVEN
#define TARGET_UNPROVEN TARGET
#endif
#define TARGET(target, Handler) XLA_FFI_DECLARE_HANDLER_SYMBOL(Handler);
#define TARGET_CPU(target, Handler)
#include "xla_kernels/targets.def"

NB_MODULE(_cuda, m) {
  m.doc() = "ilajax's CUDA handlers for XLA's FFI.";
  m.def(
      "registrations",
      [] {
        nb::dict targets;
#ifdef ILAJAX_CUDA_UNPROVEN
#define TARGET_UNPROVEN TARGET
#endif
#define TARGET(target, Handler) targets[#target] = nb::capsule(reinterpret_cast<void*>(Handler));
#define TARGET_CPU(target, Handler)
#include "xla_kernels/targets.def"
        return targets;
      },
      "FFI target name -> capsule of its handler, as jax.ffi.register_ffi_target takes it.");
}
