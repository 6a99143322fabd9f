// The Python module ilajax._cpu: the CPU handlers, and their plans.

#include "xla_kernels/bind.h"

NB_MODULE(_cpu, m) {
  m.doc() = "ilajax's CPU handlers for XLA's FFI.";
  ilajax::Bind(m);
}
