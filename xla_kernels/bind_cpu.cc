// The Python module ilajax._cpu: registrations() maps each FFI target to its CPU handler.

#include <nanobind/nanobind.h>

#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;

#define TARGET(target, Handler) XLA_FFI_DECLARE_HANDLER_SYMBOL(Handler);
#include "xla_kernels/targets.def"

NB_MODULE(_cpu, m) {
  m.doc() = "ilajax's CPU handlers for XLA's FFI.";
  m.def(
      "registrations",
      [] {
        nb::dict targets;
#define TARGET(target, Handler) targets[#target] = nb::capsule(reinterpret_cast<void*>(Handler));
#include "xla_kernels/targets.def"
        return targets;
      },
      "FFI target name -> capsule of its handler, as jax.ffi.register_ffi_target takes it.");
}
