#include "comparisons.h"
#include "instructions.h"
#include "operands.h"

namespace cuda_on_host::machine {
namespace {

// to = f(a, b, c) of integers.
template <typename Of>
void Integers(Warp& w, const Instruction& i, uint32_t lanes, Of f) {
  Row rooms[3], result;
  const Row &a = Integer(w, i.from[0], rooms[0]), &b = Integer(w, i.from[1], rooms[1]),
            &c = Integer(w, i.from[2], rooms[2]);
  Fill(result, [&](int l) { return f(a[l], b[l], c[l]); });
  Write(w, i.to, lanes, result);
}

// Bits of what a sum of 32 bits carries, in one predicate or two.
void Carry(Warp& w, const Instruction& i, uint32_t lanes, const WideRow& sum) {
  WriteBits(w, i.to_predicate[0], lanes, Ballot([&](int l) { return sum[l] >> 32 >= 1; }));
  WriteBits(w, i.to_predicate[1], lanes, Ballot([&](int l) { return sum[l] >> 32 >= 2; }));
}

// --- Sums and products ----------------------------------------------------------------------------

// IADD3: -x is ~x + 1, which carries where x is 0. IADD3.X takes one carry or two.
void Add(Warp& w, const Instruction& i, uint32_t lanes) {
  if (i.to_predicate[0].kind == Operand::kNone && !i.extended) {
    Integers(w, i, lanes, [](uint32_t a, uint32_t b, uint32_t c) { return a + b + c; });
    return;
  }
  WideRow sum = {};
  Row room, result;
  for (int k = 0; k < 3; ++k) {
    const Operand& o = i.from[k];
    const Row& plain = Plain(w, o, room);
    const uint32_t flip = o.negative || o.inverted ? kAll : 0;
    const uint64_t one = o.negative ? 1 : 0;
    Fill(sum, [&](int l) { return sum[l] + (plain[l] ^ flip) + one; });
  }
  for (int k = 3; k < i.inputs; ++k) {
    const uint32_t carry = Bits(w, i.from[k]);
    Fill(sum, [&](int l) { return sum[l] + (carry >> l & 1); });
  }
  Fill(result, [&](int l) { return static_cast<uint32_t>(sum[l]); });
  Write(w, i.to, lanes, result);
  Carry(w, i, lanes, sum);
}

// IMAD.WIDE, IMAD.HI: 64 bits, or the high ones of them.
void MultiplyWide(Warp& w, const Instruction& i, uint32_t lanes) {
  Row rooms[2];
  WideRow c, sum;
  const Row &a = Integer(w, i.from[0], rooms[0]), &b = Integer(w, i.from[1], rooms[1]);
  Wide(w, i.from[2], c);
  if (i.is_signed) {
    Fill(sum, [&](int l) {
      return static_cast<uint64_t>(int64_t{static_cast<int32_t>(a[l])} *
                                   static_cast<int32_t>(b[l])) +
             c[l];
    });
  } else {
    Fill(sum, [&](int l) { return uint64_t{a[l]} * b[l] + c[l]; });
  }
  WriteBits(w, i.to_predicate[0], lanes, Ballot([&](int l) { return sum[l] < c[l]; }));
  if (i.high) {
    Row high;
    Fill(high, [&](int l) { return static_cast<uint32_t>(sum[l] >> 32); });
    Write(w, i.to, lanes, high);
  } else {
    WriteWide(w, i, lanes, sum);
  }
}

void Multiply(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t carry = i.extended ? Bits(w, i.from[3]) : 0;
  Row rooms[3], result;
  const Row &a = Integer(w, i.from[0], rooms[0]), &b = Integer(w, i.from[1], rooms[1]),
            &c = Integer(w, i.from[2], rooms[2]);
  Fill(result, [&](int l) { return a[l] * b[l] + c[l] + (carry >> l & 1); });
  Write(w, i.to, lanes, result);
}

void AddTwo(Warp& w, const Instruction& i, uint32_t lanes) {
  Integers(w, i, lanes, [](uint32_t a, uint32_t b, uint32_t) { return a + b; });
}

// LEA: (a << shift) + b; LEA.HI: ((c, a) << shift) >> 32, + b.
void ShiftAdd(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool high = i.high, extends = i.kind;
  const int shift_at = high && !extends ? 3 : 2;
  const uint32_t shift = i.from[shift_at].bits;
  const uint32_t carry = i.extended ? Bits(w, i.from[shift_at + 1]) : 0;
  Row rooms[3];
  WideRow sum;
  const Row &a = Integer(w, i.from[0], rooms[0]), &b = Plain(w, i.from[1], rooms[1]),
            &c = Plain(w, i.from[2], rooms[2]);
  const uint32_t flip = i.from[1].inverted || i.from[1].negative ? kAll : 0;
  const uint64_t one = i.from[1].negative ? 1 : 0;
  Fill(sum, [&](int l) {
    const uint64_t sign = extends ? static_cast<uint32_t>(static_cast<int32_t>(a[l]) >> 31) : c[l];
    const uint32_t part =
        high ? static_cast<uint32_t>((sign << 32 | a[l]) << shift >> 32) : a[l] << shift;
    return uint64_t{part} + (b[l] ^ flip) + one + (carry >> l & 1);
  });
  Row result;
  Fill(result, [&](int l) { return static_cast<uint32_t>(sum[l]); });
  Write(w, i.to, lanes, result);
  Carry(w, i, lanes, sum);
}

// --- Bits -----------------------------------------------------------------------------------------

void Shift(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool left = i.left, high = i.high, wraps = i.wraps, wide = i.wide, is_signed = i.is_signed;
  const uint32_t most = wide ? 64 : 32;
  Integers(w, i, lanes, [&](uint32_t a, uint32_t amount, uint32_t c) -> uint32_t {
    const uint32_t s = wraps ? amount & (most - 1) : amount > most ? most : amount;
    if (left && !wide) return s < 32 ? a << s : 0;
    if (left)
      return s == 0 ? c : static_cast<uint32_t>(((uint64_t{c} << 32 | a) << (s & 63)) >> 32);
    if (high && !wide) {
      if (is_signed) return static_cast<uint32_t>(static_cast<int32_t>(c) >> (s < 32 ? s : 31));
      return s < 32 ? c >> s : 0;
    }
    const uint64_t both = uint64_t{c} << 32 | a;
    if (is_signed) return static_cast<uint32_t>(static_cast<int64_t>(both) >> (s < 64 ? s : 63));
    return s < 64 ? static_cast<uint32_t>(both >> s) : 0;
  });
}

// A bit for each of the eight combinations of three.
template <typename T>
T ByTable(uint32_t table, T a, T b, T c) {
  T result = 0;
  for (int k = 0; k < 8; ++k) {
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return result;
}

void Logic(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t table = i.from[3].bits;
  Row rooms[3], result;
  const Row &a = Integer(w, i.from[0], rooms[0]), &b = Integer(w, i.from[1], rooms[1]),
            &c = Integer(w, i.from[2], rooms[2]);
  switch (table) {
    case 0xc0:
      Fill(result, [&](int l) { return a[l] & b[l]; });
      break;
    case 0xfc:
      Fill(result, [&](int l) { return a[l] | b[l]; });
      break;
    case 0x3c:
      Fill(result, [&](int l) { return a[l] ^ b[l]; });
      break;
    default:
      Fill(result, [&](int l) { return ByTable(table, a[l], b[l], c[l]); });
  }
  Write(w, i.to, lanes, result);
  if (i.to_predicate[0].kind != Operand::kNone) {
    const uint32_t either = Bits(w, i.from[4]);
    WriteBits(w, i.to_predicate[0], lanes, either | Ballot([&](int l) { return result[l] != 0; }));
  }
}

void LogicOfPredicates(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t a = Bits(w, i.from[0]), b = Bits(w, i.from[1]), c = Bits(w, i.from[2]);
  WriteBits(w, i.to_predicate[0], lanes, ByTable(i.from[3].bits, a, b, c));
  WriteBits(w, i.to_predicate[1], lanes, ByTable(i.from[4].bits, a, b, c));
}

void Permute(Warp& w, const Instruction& i, uint32_t lanes) {
  Integers(w, i, lanes, [](uint32_t a, uint32_t selector, uint32_t c) {
    const uint64_t both = uint64_t{c} << 32 | a;
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t which = selector >> 4 * k & 15;
      uint32_t byte = both >> 8 * (which & 7) & 255;
      if (which & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << 8 * k;
    }
    return result;
  });
}

void Population(Warp& w, const Instruction& i, uint32_t lanes) {
  Integers(w, i, lanes, [](uint32_t a, uint32_t, uint32_t) { return uint32_t(std::popcount(a)); });
}

// Where the highest bit is; how far it would have to be shifted with .SH.
void LeadingOne(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool shift = i.kind;
  Integers(w, i, lanes, [&](uint32_t a, uint32_t, uint32_t) {
    const uint32_t zeros = static_cast<uint32_t>(std::countl_zero(a));
    return a == 0 ? kAll : shift ? zeros : 31 - zeros;
  });
}

void Reverse(Warp& w, const Instruction& i, uint32_t lanes) {
  Integers(w, i, lanes, [](uint32_t a, uint32_t, uint32_t) {
    uint32_t result = 0;
    for (int k = 0; k < 32; ++k) result |= (a >> k & 1) << (31 - k);
    return result;
  });
}

// --- Choices --------------------------------------------------------------------------------------

void Move(Warp& w, const Instruction& i, uint32_t lanes) {
  Integers(w, i, lanes, [](uint32_t a, uint32_t, uint32_t) { return a; });
}

void MoveZeros(Warp& w, const Instruction& i, uint32_t lanes) { WriteWide(w, i, lanes, WideRow{}); }

void Select(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t first = Bits(w, i.from[2]);
  Row rooms[2], result;
  const Row &a = Plain(w, i.from[0], rooms[0]), &b = Plain(w, i.from[1], rooms[1]);
  Fill(result, [&](int l) { return first >> l & 1 ? a[l] : b[l]; });
  Write(w, i.to, lanes, result);
}

uint32_t MinMax(bool is_signed, bool min, uint32_t a, uint32_t b) {
  const bool less = is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
  return less == min ? a : b;
}

// VIMNMX; VIADDMNMX, of a sum.
void MinMaxOfIntegers(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool sum = i.kind;
  const uint32_t min = Bits(w, i.from[sum ? 3 : 2]);
  Row rooms[3], result;
  const Row &a = Integer(w, i.from[0], rooms[0]), &b = Integer(w, i.from[1], rooms[1]);
  const Row& c = sum ? Integer(w, i.from[2], rooms[2]) : b;
  Fill(result,
       [&](int l) { return MinMax(i.is_signed, min >> l & 1, sum ? a[l] + b[l] : a[l], c[l]); });
  Write(w, i.to, lanes, result);
}

void Absolute(Warp& w, const Instruction& i, uint32_t lanes) {
  Integers(w, i, lanes, [](uint32_t a, uint32_t, uint32_t) { return a >> 31 ? 0u - a : a; });
}

// With .EX the high half of 64 bits, behind a comparison of the low one.
void Compare(Warp& w, const Instruction& i, uint32_t lanes) {
  Row rooms[2];
  const Row &a = Integer(w, i.from[0], rooms[0]), &b = Integer(w, i.from[1], rooms[1]);
  const uint32_t flip = i.is_signed ? 0x80000000u : 0;
  const uint32_t equal = Ballot([&](int l) { return a[l] == b[l]; });
  const uint32_t less = Ballot([&](int l) { return (a[l] ^ flip) < (b[l] ^ flip); });
  uint32_t result = 0;
  if (i.kind & kLess) result |= less;
  if (i.kind & kGreater) result |= ~less & ~equal;
  if (i.extended) {
    const uint32_t low = Bits(w, i.from[3]);
    result |= equal & low;
  } else if (i.kind & kEqual) {
    result |= equal;
  }
  Compared(w, i, lanes, result);
}

}  // namespace

Execute IntegerInstruction(Instruction& i, const std::string& name) {
  if (name == "IADD3") return Add;
  if (name == "IMAD") return i.wide || i.high ? MultiplyWide : Multiply;
  if (name == "VIADD") return AddTwo;
  if (name == "LEA") {
    i.kind = i.Has(".SX32");
    return ShiftAdd;
  }
  if (name == "SHF") return Shift;
  if (name == "LOP3") return Logic;
  if (name == "PLOP3") return LogicOfPredicates;
  if (name == "PRMT") return Permute;
  if (name == "POPC") return Population;
  if (name == "FLO") {
    i.kind = i.Has(".SH");
    return LeadingOne;
  }
  if (name == "BREV") return Reverse;
  if (name == "MOV") return Move;
  if (name == "CS2R" && i.Has(".SRZ")) return MoveZeros;
  if (name == "SEL" || name == "FSEL") return Select;
  if (name == "VIMNMX" || name == "VIADDMNMX") {
    i.kind = name == "VIADDMNMX";
    return MinMaxOfIntegers;
  }
  if (name == "IABS") return Absolute;
  if (name == "ISETP") {
    i.kind = Comparison(i);
    return Compare;
  }
  return nullptr;
}

}  // namespace cuda_on_host::machine
