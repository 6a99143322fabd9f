// How to execute an instruction, by its opcode: null for one that is of another file.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_INSTRUCTIONS_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_INSTRUCTIONS_H_

#include <string>

#include "code.h"

namespace cuda_on_host::machine {

// `name` is the first part of the opcode; a uniform instruction has that of the same for lanes.
Execute IntegerInstruction(Instruction& instruction, const std::string& name);
Execute FloatInstruction(Instruction& instruction, const std::string& name);
// Memory, and what lanes tell each other.
Execute MemoryInstruction(Instruction& instruction, const std::string& name);

}  // namespace cuda_on_host::machine

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_INSTRUCTIONS_H_
