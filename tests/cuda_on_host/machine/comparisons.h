// What comparisons of integers and of floats share.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_COMPARISONS_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_COMPARISONS_H_

#include "operands.h"

namespace cuda_on_host::machine {

// A bit for less, one for equal, one for greater, one for not comparable.
constexpr int kLess = 1, kEqual = 2, kGreater = 4, kApart = 8;

inline int Comparison(const Instruction& i) {
  static const struct {
    const char* name;
    int kind;
  } all[] = {{".LT", kLess},
             {".EQ", kEqual},
             {".LE", kLess | kEqual},
             {".GT", kGreater},
             {".NE", kLess | kGreater},
             {".GE", kGreater | kEqual},
             {".NUM", kLess | kEqual | kGreater},
             {".NAN", kApart},
             {".LTU", kLess | kApart},
             {".EQU", kEqual | kApart},
             {".LEU", kLess | kEqual | kApart},
             {".GTU", kGreater | kApart},
             {".NEU", kLess | kGreater | kApart},
             {".GEU", kGreater | kEqual | kApart}};
  for (const auto& each : all) {
    if (i.Has(each.name)) return each.kind;
  }
  return 0;
}

inline void Compared(Warp& w, const Instruction& i, uint32_t lanes, uint32_t result) {
  const uint32_t with = Bits(w, i.from[2]);
  WriteBits(w, i.to_predicate[0], lanes, i.either ? result | with : result & with);
  WriteBits(w, i.to_predicate[1], lanes, i.either ? ~result | with : ~result & with);
}

}  // namespace cuda_on_host::machine

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_COMPARISONS_H_
