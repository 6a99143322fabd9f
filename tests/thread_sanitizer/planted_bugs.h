// A handler with bugs to choose from, see planted_bugs.cc.

#ifndef ILAJAX_TESTS_THREAD_SANITIZER_PLANTED_BUGS_H_
#define ILAJAX_TESTS_THREAD_SANITIZER_PLANTED_BUGS_H_

#include <string>

#include "calls.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(Planted);

namespace thread_sanitizer {

inline const char kPlanted[] = "planted";

// A call of Planted as if it had been recorded.
Call PlantedCall(const std::string& bug);

}  // namespace thread_sanitizer

#endif  // ILAJAX_TESTS_THREAD_SANITIZER_PLANTED_BUGS_H_
