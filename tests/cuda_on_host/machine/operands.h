// Reads the operands of an instruction for all lanes, and writes its results for some.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_OPERANDS_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_OPERANDS_H_

#include <bit>
#include <cstdint>

#include "warp.h"

namespace cuda_on_host::machine {

struct alignas(64) WideRow {
  uint64_t lane[kLanes];
  uint64_t& operator[](int i) { return lane[i]; }
  const uint64_t& operator[](int i) const { return lane[i]; }
};

template <typename R, typename F>
inline void Fill(R& row, F&& f) {
  for (int l = 0; l < kLanes; ++l) row[l] = f(l);
}

// What stands there, without a sign; `offset` registers further.
inline const Row& Plain(Warp& w, const Operand& o, Row& room, int offset = 0) {
  if (o.kind == Operand::kRegister) {
    return w.registers[o.index == kNoRegister ? kNoRegister : o.index + offset];
  }
  const int uniform = o.index == kNoUniform ? kNoUniform : o.index + offset;
  const uint32_t value = o.kind == Operand::kUniform ? w.uniforms[uniform]
                         : offset == 0               ? o.bits
                                                     : 0;
  Fill(room, [&](int) { return value; });
  return room;
}

// An integer: `-R1` and `~R1` are what they say.
inline const Row& Integer(Warp& w, const Operand& o, Row& room) {
  const Row& plain = Plain(w, o, room);
  if (o.negative) {
    Fill(room, [&](int l) { return 0u - plain[l]; });
    return room;
  }
  if (o.inverted) {
    Fill(room, [&](int l) { return ~plain[l]; });
    return room;
  }
  return plain;
}

// The bits of a float: `-|R1|` too.
inline const Row& Float(Warp& w, const Operand& o, Row& room) {
  const Row& plain = Plain(w, o, room);
  if (!o.negative && !o.absolute) return plain;
  const uint32_t keep = o.absolute ? 0x7fffffffu : kAll, flip = o.negative ? 0x80000000u : 0;
  Fill(room, [&](int l) { return (plain[l] & keep) ^ flip; });
  return room;
}

// 64 bits in two registers; a number has 32.
inline void Wide(Warp& w, const Operand& o, WideRow& row) {
  Row low_room, high_room;
  const Row &low = Plain(w, o, low_room), &high = Plain(w, o, high_room, 1);
  Fill(row, [&](int l) { return uint64_t{high[l]} << 32 | low[l]; });
  if (o.negative) Fill(row, [&](int l) { return 0 - row[l]; });
}

// A predicate, a bit for each lane.
inline uint32_t Bits(Warp& w, const Operand& o) {
  if (o.kind == Operand::kNone) return 0;
  const uint32_t bits = o.kind == Operand::kPredicate   ? w.predicates[o.index]
                        : w.uniform_predicates[o.index] ? kAll
                                                        : 0;
  return o.inverted ? ~bits : bits;
}

inline void Write(Warp& w, const Operand& o, uint32_t lanes, const Row& value, int offset = 0) {
  if (o.kind == Operand::kUniform) {
    if (o.index != kNoUniform) w.uniforms[o.index + offset] = value[std::countr_zero(lanes)];
    return;
  }
  if (o.index == kNoRegister) return;
  Row& to = w.registers[o.index + offset];
  if (lanes == kAll) {
    to = value;
  } else {
    Fill(to, [&](int l) { return lanes >> l & 1 ? value[l] : to[l]; });
  }
}

inline void WriteWide(Warp& w, const Instruction& i, uint32_t lanes, const WideRow& row) {
  Row half;
  Fill(half, [&](int l) { return static_cast<uint32_t>(row[l]); });
  Write(w, i.to, lanes, half);
  Fill(half, [&](int l) { return static_cast<uint32_t>(row[l] >> 32); });
  Write(w, i.to, lanes, half, 1);
}

inline void WriteBits(Warp& w, const Operand& o, uint32_t lanes, uint32_t bits) {
  if (o.index == kTrue || !o.predicate()) return;
  if (o.kind == Operand::kUniformPredicate) {
    w.uniform_predicates[o.index] = bits >> std::countr_zero(lanes) & 1;
  } else {
    w.predicates[o.index] = (w.predicates[o.index] & ~lanes) | (bits & lanes);
  }
}

// A bit for each lane for which f says so.
template <typename F>
inline uint32_t Ballot(F&& f) {
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(static_cast<bool>(f(l))) << l;
  return bits;
}

}  // namespace cuda_on_host::machine

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_OPERANDS_H_
