// The two 16-bit storage types. Arithmetic is always float32: these only load, store and round.
//
// Plain integer code, since neither _Float16 nor __bf16 is promised by the compilers we build with;
// without branches, so that loops over it vectorise (given -fno-trapping-math). Both roundings are
// to nearest, ties to even, and a NaN stays a NaN (quiet, its sign and upper payload bits kept).

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define ILAJAX_HOST_DEVICE __host__ __device__
#else
#define ILAJAX_HOST_DEVICE
#endif

namespace ilajax {

ILAJAX_HOST_DEVICE inline uint32_t FloatBits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

ILAJAX_HOST_DEVICE inline float BitsFloat(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  ILAJAX_HOST_DEVICE explicit BFloat16(float x) {
    const uint32_t u = FloatBits(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (u >> 16) | 0x0040u;
    bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
  }
  ILAJAX_HOST_DEVICE explicit operator float() const {
    return BitsFloat(static_cast<uint32_t>(bits) << 16);
  }
};

struct Float16 {
  uint16_t bits;

  Float16() = default;
  ILAJAX_HOST_DEVICE explicit Float16(float x) {
#ifdef __CUDA_ARCH__
    bits = __half_as_ushort(__float2half_rn(x));
#else
    const uint32_t u = FloatBits(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t a = u & 0x7fffffffu;
    // From 2^-14 up: rebias the exponent and round off 13 bits; 65520 and more carry into infinity.
    const uint32_t normal = (a - ((127u - 15u) << 23) + 0x0fffu + ((a >> 13) & 1u)) >> 13;
    // Below: adding 0.5 leaves the subnormal's bits, rounded by the addition, in the low mantissa.
    const uint32_t subnormal = FloatBits(BitsFloat(a) + 0.5f) - FloatBits(0.5f);
    const uint32_t quiet_nan = 0x7e00u | ((a >> 13) & 0x03ffu);
    uint32_t h = a < (113u << 23) ? subnormal : normal;
    h = a >= (143u << 23) ? 0x7c00u : h;
    h = a > 0x7f800000u ? quiet_nan : h;
    bits = static_cast<uint16_t>(sign | h);
#endif
  }
  ILAJAX_HOST_DEVICE explicit operator float() const {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t a = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    const uint32_t exponent = a & 0x0f800000u;
    const uint32_t normal = a + ((127u - 15u) << 23);
    const uint32_t inf_nan = a + ((255u - 31u) << 23);
    // A subnormal m * 2^-24 is (1 + m / 1024) * 2^-14 - 2^-14, exactly.
    const uint32_t subnormal = FloatBits(BitsFloat(a + (113u << 23)) - BitsFloat(113u << 23));
    uint32_t f = exponent == 0 ? subnormal : normal;
    f = exponent == 0x0f800000u ? inf_nan : f;
    return BitsFloat(sign | f);
#endif
  }
};

static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2);

}  // namespace ilajax
