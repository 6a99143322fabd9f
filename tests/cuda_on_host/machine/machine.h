// Runs the CUDA kernels as a GPU does: their machine code, a warp at a time, an instruction for its
// lanes at once. Counts the instructions. What a GPU decides for itself (which lanes go first where they
// part, which warp when) is decided here in one way of many.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_MACHINE_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_MACHINE_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "code.h"

namespace cuda_on_host::machine {

// The code of each kernel, by where the host has its function. Empty: kernels run as fibers.
extern std::map<const void*, Code> codes;

// Runs a grid of blocks, one after the other; returns what went wrong, or "".
std::string Run(const Code& code, unsigned blocks, unsigned threads, size_t dynamic_shared,
                int rubbish, const std::vector<Parameter>& parameters);

}  // namespace cuda_on_host::machine

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_MACHINE_H_
