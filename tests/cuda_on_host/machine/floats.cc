#include <cfenv>
#include <cmath>
#include <limits>

#include "comparisons.h"
#include "instructions.h"
#include "operands.h"

namespace cuda_on_host::machine {
namespace {

float F(uint32_t bits) { return std::bit_cast<float>(bits); }
uint32_t B(float value) { return std::bit_cast<uint32_t>(value); }

// to = f(a, b, c) of floats.
template <typename Of>
void Floats(Warp& w, const Instruction& i, uint32_t lanes, Of f) {
  Row rooms[3], result;
  const Row &a = Float(w, i.from[0], rooms[0]), &b = Float(w, i.from[1], rooms[1]),
            &c = Float(w, i.from[2], rooms[2]);
  Fill(result, [&](int l) { return B(f(F(a[l]), F(b[l]), F(c[l]))); });
  Write(w, i.to, lanes, result);
}

void AddFloats(Warp& w, const Instruction& i, uint32_t lanes) {
  Floats(w, i, lanes, [](float a, float b, float) { return a + b; });
}

void MultiplyFloats(Warp& w, const Instruction& i, uint32_t lanes) {
  Floats(w, i, lanes, [](float a, float b, float) { return a * b; });
}

void MultiplyAdd(Warp& w, const Instruction& i, uint32_t lanes) {
  Floats(w, i, lanes, [](float a, float b, float c) { return std::fma(a, b, c); });
}

// .RM, .RP, .RZ: what a division takes for numbers near the ends.
void MultiplyAddRounded(Warp& w, const Instruction& i, uint32_t lanes) {
  const int old = std::fegetround();
  std::fesetround(i.Has(".RM") ? FE_DOWNWARD : i.Has(".RP") ? FE_UPWARD : FE_TOWARDZERO);
  Floats(w, i, lanes, [](float a, float b, float c) {
    volatile float x = a, y = b, z = c;
    return std::fma(x, y, z);
  });
  std::fesetround(old);
}

void MinMaxOfFloats(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t min = Bits(w, i.from[2]);
  Row rooms[2], result;
  const Row &a = Float(w, i.from[0], rooms[0]), &b = Float(w, i.from[1], rooms[1]);
  Fill(result, [&](int l) {
    const float x = F(a[l]), y = F(b[l]);
    if (std::isnan(x) || std::isnan(y)) return 0x7fffffffu;
    const bool less = x < y || (x == y && std::signbit(x));
    return less == static_cast<bool>(min >> l & 1) ? a[l] : b[l];
  });
  Write(w, i.to, lanes, result);
}

void Reciprocal(Warp& w, const Instruction& i, uint32_t lanes) {
  Floats(w, i, lanes, [](float a, float, float) { return 1 / a; });
}

void ReciprocalRoot(Warp& w, const Instruction& i, uint32_t lanes) {
  Floats(w, i, lanes, [](float a, float, float) { return 1 / std::sqrt(a); });
}

// Whether a quotient needs more care than the usual steps take; they are right far from both ends.
void CheckQuotient(Warp& w, const Instruction& i, uint32_t lanes) {
  Row rooms[2];
  const Row &a = Float(w, i.from[0], rooms[0]), &b = Float(w, i.from[1], rooms[1]);
  WriteBits(w, i.to_predicate[0], lanes, Ballot([&](int l) {
              const int x = a[l] >> 23 & 255, y = b[l] >> 23 & 255;
              return x < 32 || x > 222 || y < 32 || y > 222 || x - y > 90 || y - x > 90;
            }));
}

void CompareFloats(Warp& w, const Instruction& i, uint32_t lanes) {
  Row rooms[2];
  const Row &a = Float(w, i.from[0], rooms[0]), &b = Float(w, i.from[1], rooms[1]);
  Compared(w, i, lanes, Ballot([&](int l) {
             const float x = F(a[l]), y = F(b[l]);
             return i.kind & (x < y ? kLess : x == y ? kEqual : x > y ? kGreater : kApart);
           }));
}

// --- From one type to another ---------------------------------------------------------------------

template <typename T>
float RoundUp(T value) {
  const float nearest = static_cast<float>(value);
  return static_cast<__int128>(nearest) < static_cast<__int128>(value)
             ? std::nextafter(nearest, std::numeric_limits<float>::infinity())
             : nearest;
}

// I2F, I2FP: .RP rounds up.
void FromInteger(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool up = i.rounds_up, is_unsigned = !i.is_signed;
  WideRow wides;
  Row room, result;
  if (i.wide) {
    Wide(w, i.from[0], wides);
  } else {
    const Row& a = Integer(w, i.from[0], room);
    Fill(wides, [&](int l) {
      return is_unsigned ? uint64_t{a[l]} : static_cast<uint64_t>(static_cast<int32_t>(a[l]));
    });
  }
  Fill(result, [&](int l) {
    if (is_unsigned) return B(up ? RoundUp(wides[l]) : static_cast<float>(wides[l]));
    const int64_t value = static_cast<int64_t>(wides[l]);
    return B(up ? RoundUp(value) : static_cast<float>(value));
  });
  Write(w, i.to, lanes, result);
}

// F2I to unsigned integers: the nearest that there is.
void ToInteger(Warp& w, const Instruction& i, uint32_t lanes) {
  Row room, result;
  const Row& a = Float(w, i.from[0], room);
  if (i.wide) {
    WideRow wides;
    Fill(wides, [&](int l) -> uint64_t {
      const float x = F(a[l]);
      return !(x > 0) ? 0 : x >= 0x1p64f ? ~uint64_t{0} : static_cast<uint64_t>(x);
    });
    WriteWide(w, i, lanes, wides);
    return;
  }
  Fill(result, [&](int l) {
    const float x = F(a[l]);
    return !(x > 0) ? 0u : x >= 0x1p32f ? kAll : static_cast<uint32_t>(x);
  });
  Write(w, i.to, lanes, result);
}

uint32_t Half(float value) {
  if (std::isnan(value)) return 0x7fff;
  return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}

// HFMA2.MMA with zero factors: how the compiler writes two numbers of 16 bits.
void TwoHalves(Warp& w, const Instruction& i, uint32_t lanes) {
  if (i.from[0].index != kNoRegister || i.from[1].index != kNoRegister) Fail(i, "of registers");
  const uint32_t both = Half(i.from[2].number) << 16 | Half(i.from[3].number);
  Row result;
  Fill(result, [&](int) { return both; });
  Write(w, i.to, lanes, result);
}

// HADD2.F32 to, -RZ, a.H0_H0.
void FromHalf(Warp& w, const Instruction& i, uint32_t lanes) {
  Row room, result;
  const Row& a = Plain(w, i.from[1], room);
  Fill(result, [&](int l) {
    return B(static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(a[l]))));
  });
  Write(w, i.to, lanes, result);
}

void ToHalves(Warp& w, const Instruction& i, uint32_t lanes) {
  Row rooms[2], result;
  const Row &a = Float(w, i.from[0], rooms[0]), &b = Float(w, i.from[1], rooms[1]);
  Fill(result, [&](int l) { return Half(F(a[l])) << 16 | Half(F(b[l])); });
  Write(w, i.to, lanes, result);
}

}  // namespace

Execute FloatInstruction(Instruction& i, const std::string& name) {
  if (name == "FSETP") {
    i.kind = Comparison(i);
    return CompareFloats;
  }
  if (name == "FADD") return AddFloats;
  if (name == "FMUL") return MultiplyFloats;
  if (name == "FFMA") {
    return i.Has(".RM") || i.Has(".RP") || i.Has(".RZ") ? MultiplyAddRounded : MultiplyAdd;
  }
  if (name == "FMNMX" && i.Has(".NAN")) return MinMaxOfFloats;
  if (name == "MUFU" && i.Has(".RCP")) return Reciprocal;
  if (name == "MUFU" && i.Has(".RSQ")) return ReciprocalRoot;
  if (name == "FCHK") return CheckQuotient;
  if (name == "I2F" || name == "I2FP") return FromInteger;
  if (name == "F2I") return ToInteger;
  if (name == "HFMA2") return TwoHalves;
  if (name == "HADD2" && i.Has(".F32")) return FromHalf;
  if (name == "F2FP" && i.Has(".F16") && i.Has(".PACK_AB")) return ToHalves;
  return nullptr;
}

}  // namespace cuda_on_host::machine
