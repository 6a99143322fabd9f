#ifndef ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_ARITHMETIC_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_ARITHMETIC_H_

#include "code.h"

namespace cuda_on_host::machine {

// How to execute an instruction that computes, lane by lane, or null; sets what it takes from it.
Execute Arithmetic(Instruction& instruction);

}  // namespace cuda_on_host::machine

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_ARITHMETIC_H_
