// The loops over pairs of sites, for the instruction set of this processor.

#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "xla_kernels/common/simd.h"
#include "xla_kernels/products/pairs.h"

#if ILAJAX_HAS_AVX2_TARGET
#include <immintrin.h>
#endif

// PairWords are pairs as integers, `from` in the lower half, as a little-endian processor has them. Pack
// stores those whose last bit of `found` is set one behind the other, and returns how many they are; what it
// stores behind them means nothing.

namespace ilajax::products::baseline {
typedef uint64_t PairWords __attribute__((vector_size(16)));
inline int64_t Pack(PairWords pairs, PairWords found, Pair* to) {
  __builtin_memcpy(to, &pairs, sizeof(Pair));
  const int64_t first = found[0] & 1;
  const uint64_t second = pairs[1];
  __builtin_memcpy(to + first, &second, sizeof(Pair));
  return first + (found[1] & 1);
}
using Vector = Floats;
constexpr int kVectors = 2;  // of a block of output channels
constexpr int kPairs = 6;    // at once: as many as there are registers for
#include "xla_kernels/products/loops.inc"
}  // namespace ilajax::products::baseline

#if ILAJAX_HAS_AVX2_TARGET
ILAJAX_BEGIN_AVX2
namespace ilajax::products::avx2 {
typedef uint64_t PairWords __attribute__((vector_size(32)));
inline int64_t Pack(PairWords pairs, PairWords found, Pair* to) {
  // For each choice of four pairs, which halves come first.
  static constexpr auto kOrder = [] {
    std::array<std::array<int32_t, 8>, 16> order = {};
    for (int chosen = 0; chosen < 16; ++chosen) {
      for (int i = 0, at = 0; i < 4; ++i) {
        if (chosen >> i & 1) order[chosen][at++] = 2 * i, order[chosen][at++] = 2 * i + 1;
      }
    }
    return order;
  }();
  const int chosen = _mm256_movemask_pd((__m256d)(found << 63));
  const __m256i order = _mm256_loadu_si256((const __m256i*)kOrder[chosen].data());
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32((__m256i)pairs, order));
  return __builtin_popcount(chosen);
}
using Vector = Floats;
constexpr int kVectors = 2, kPairs = 6;
#include "xla_kernels/products/loops.inc"
}  // namespace ilajax::products::avx2
ILAJAX_END_TARGET
ILAJAX_BEGIN_AVX512
namespace ilajax::products::avx512 {
typedef uint64_t PairWords __attribute__((vector_size(64)));
inline int64_t Pack(PairWords pairs, PairWords found, Pair* to) {
  const __mmask8 chosen = _mm512_movepi64_mask((__m512i)(found << 63));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(chosen, (__m512i)pairs));
  return __builtin_popcount(chosen);
}
using Vector = WideFloats;
constexpr int kVectors = 1, kPairs = 12;
#include "xla_kernels/products/loops.inc"
}  // namespace ilajax::products::avx512
ILAJAX_END_TARGET
#else
namespace ilajax::products::avx2 {
using baseline::Loops;
}  // namespace ilajax::products::avx2
namespace ilajax::products::avx512 {
using baseline::Loops;
}  // namespace ilajax::products::avx512
#endif

namespace ilajax::products {

// Calls f.template operator()<Loops>().
template <typename F>
void DispatchLoops(F&& f) {
  if (HasAvx512()) return f.template operator()<avx512::Loops>();
  if (HasAvx2()) return f.template operator()<avx2::Loops>();
  return f.template operator()<baseline::Loops>();
}

}  // namespace ilajax::products
