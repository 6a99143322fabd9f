// Memory, where a thread is, and what lanes tell each other.

#include <cstring>
#include <string>

#include "instructions.h"
#include "operands.h"

namespace cuda_on_host::machine {
namespace {

template <typename F>
void EachOf(uint32_t lanes, F&& f) {
  for (; lanes != 0; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

// --- Memory ---------------------------------------------------------------------------------------

void* Shared(Warp& w, const Instruction& i, uint32_t address, size_t size) {
  std::vector<uint8_t>& shared = w.block->shared;
  if (address < kReservedShared || address + size > shared.size()) {
    Fail(i, "beyond the end of shared memory");
  }
  if (address % size != 0) Fail(i, "an address that is not aligned");
  return &shared[address];
}

// Where an operand points to in each lane: 64 bits in two registers of global memory, 32 of shared.
struct Addresses {
  Addresses(Warp& w, const Instruction& i, const Operand& o, size_t size)
      : w(w), i(i), o(o), size(size) {}

  void* operator()(int lane) const {
    const uint32_t low = o.index == kNoRegister ? 0 : w.registers[o.index][lane];
    if (i.of_shared) return Shared(w, i, low + w.uniforms[o.uniform] + o.bits, size);
    const uint32_t high = o.index == kNoRegister ? 0 : w.registers[o.index + 1][lane];
    const uint64_t address =
        (uint64_t{high} << 32 | low) + static_cast<uint64_t>(static_cast<int32_t>(o.bits));
    if (address >> 32 == kSharedWindow) {
      return Shared(w, i, static_cast<uint32_t>(address), size);
    }
    if (address % size != 0) Fail(i, "an address that is not aligned");
    if (address < 4096) Fail(i, "an address near zero");
    return reinterpret_cast<void*>(address);
  }

  Warp& w;
  const Instruction& i;
  const Operand& o;
  size_t size;
};

size_t Size(const Instruction& i) {
  if (i.Has(".U8") || i.Has(".S8")) return 1;
  if (i.Has(".U16") || i.Has(".S16")) return 2;
  return i.Has(".128") ? 16 : i.Has(".64") ? 8 : 4;
}

void Load(Warp& w, const Instruction& i, uint32_t lanes) {
  const size_t size = i.kind;
  const Addresses address(w, i, i.from[0], size);
  EachOf(lanes, [&](int l) {
    uint32_t words[4] = {};
    std::memcpy(words, address(l), size);
    for (size_t k = 0; 4 * k < size; ++k) {
      if (i.to.index != kNoRegister) w.registers[i.to.index + k][l] = words[k];
    }
  });
}

void Store(Warp& w, const Instruction& i, uint32_t lanes) {
  const size_t size = i.kind;
  const Addresses address(w, i, i.from[0], size);
  const int16_t value = i.from[1].index;
  EachOf(lanes, [&](int l) {
    uint32_t words[4] = {};
    for (size_t k = 0; 4 * k < size; ++k) {
      if (value != kNoRegister) words[k] = w.registers[value + k][l];
    }
    std::memcpy(address(l), words, size);
  });
}

// ATOMG, ATOMS, RED, of 32 bits: lane after lane.
void Atomic(Warp& w, const Instruction& i, uint32_t lanes) {
  const Addresses address(w, i, i.from[0], 4);
  const bool increments = i.Has(".INC");
  Row room;
  const Row& value = Integer(w, i.from[1], room);
  EachOf(lanes, [&](int l) {
    uint32_t* at = static_cast<uint32_t*>(address(l));
    const uint32_t old = *at;
    switch (i.kind) {
      case '+':
        *at = old + (increments ? 1 : value[l]);
        break;
      case '|':
        *at = old | value[l];
        break;
      case '=':
        *at = value[l];
        break;
    }
    if (i.to.kind == Operand::kRegister && i.to.index != kNoRegister) {
      w.registers[i.to.index][l] = old;
    }
  });
}

// LDC, ULDC: of constant bank 0.
void LoadConstant(Warp& w, const Instruction& i, uint32_t lanes) {
  const size_t size = i.kind;
  const Operand& o = i.from[0];
  Row rows[2] = {};
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t index = o.index == kNoRegister ? 0 : w.registers[o.index][l];
    const uint32_t at = index + w.uniforms[o.uniform] + o.bits;
    if (at + size > w.block->constants.size()) {
      if (lanes >> l & 1) Fail(i, "beyond the end of the parameters");
      continue;
    }
    uint32_t words[2] = {};
    std::memcpy(words, &w.block->constants[at], size);
    rows[0][l] = words[0];
    rows[1][l] = words[1];
  }
  Write(w, i.to, lanes, rows[0]);
  if (size == 8) Write(w, i.to, lanes, rows[1], 1);
}

// --- Where a thread is ------------------------------------------------------------------------------

enum { kThread, kLane, kBlock, kWindow, kRankInCluster };

void Special(Warp& w, const Instruction& i, uint32_t lanes) {
  Row value;
  Fill(value, [&](int l) -> uint32_t {
    switch (i.kind) {
      case kThread:
        return w.first_thread + l;
      case kLane:
        return l;
      case kBlock:
        return w.block->index;
      case kWindow:
        return kSharedWindow;
      default:
        return 0;
    }
  });
  Write(w, i.to, lanes, value);
}

// --- What lanes tell each other --------------------------------------------------------------------

// SHFL, as PTX has it: the last operand is the last lane of a group and, from bit 8 on, which bits of a
// lane's number name its group.
void Shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
  Row rooms[3], result;
  const Row &value = Plain(w, i.from[0], rooms[0]), &by = Plain(w, i.from[1], rooms[1]),
            &clamp = Plain(w, i.from[2], rooms[2]);
  uint32_t inside = 0;
  Fill(result, [&](int l) -> uint32_t {
    const int group = clamp[l] >> 8 & 31, b = by[l] & 31;
    const int first = l & group, last = first | (clamp[l] & 31 & ~group);
    const int from = i.kind == 'u'   ? l - b
                     : i.kind == 'd' ? l + b
                     : i.kind == 'x' ? l ^ b
                                     : first | (b & ~group);
    if (i.kind == 'u' ? from < last : from > last) return value[l];
    inside |= 1u << l;
    // Of a lane that is not here nobody knows what it has.
    return lanes >> from & 1 ? value[from] : 0xdeadbeef;
  });
  WriteBits(w, i.to_predicate[0], lanes, inside);
  Write(w, i.to, lanes, result);
}

void Vote(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t votes = Bits(w, i.from[0]) & lanes;
  if (i.to.kind == Operand::kNone) {
    const bool passed = i.kind == 'A' ? votes == lanes : votes != 0;
    WriteBits(w, i.to_predicate[0], lanes, passed ? kAll : 0);
    return;
  }
  Row row;
  Fill(row, [&](int) { return votes; });
  Write(w, i.to, lanes, row);
}

// B2R: what the barrier's votes came to.
void Result(Warp& w, const Instruction& i, uint32_t lanes) {
  WriteBits(w, i.to_predicate[0], lanes, w.block->result ? kAll : 0);
}

void Sum(Warp& w, const Instruction& i, uint32_t lanes) {
  uint32_t sum = 0;
  EachOf(lanes, [&](int l) { sum += w.registers[i.from[0].index][l]; });
  Row row;
  Fill(row, [&](int) { return sum; });
  Write(w, i.to, lanes, row);
}

void ToUniform(Warp& w, const Instruction& i, uint32_t lanes) {
  Write(w, i.to, lanes, w.registers[i.from[0].index]);
}

// R2P: predicates from the bits of a register, those of a mask; P2R: the other way.
void ToPredicates(Warp& w, const Instruction& i, uint32_t lanes) {
  Row room;
  const Row& value = Plain(w, i.from[0], room);
  EachOf(i.from[1].bits & 0x7f, [&](int p) {
    const uint32_t bits = Ballot([&](int l) { return value[l] >> p & 1; });
    w.predicates[p] = (w.predicates[p] & ~lanes) | (bits & lanes);
  });
}

void FromPredicates(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t mask = i.from[1].bits;
  Row room, result;
  const Row& value = Plain(w, i.from[0], room);
  Fill(result, [&](int l) {
    uint32_t bits = value[l] & ~mask;
    EachOf(mask & 0x7f, [&](int p) { bits |= (w.predicates[p] >> l & 1) << p; });
    return bits;
  });
  Write(w, i.to, lanes, result);
}

}  // namespace

Execute MemoryInstruction(Instruction& i, const std::string& name) {
  i.of_shared = name == "LDS" || name == "STS" || name == "ATOMS";
  if (name == "LDG" || name == "LDS" || name == "LD") {
    i.kind = static_cast<int>(Size(i));
    return Load;
  }
  if (name == "STG" || name == "STS" || name == "ST") {
    i.kind = static_cast<int>(Size(i));
    return Store;
  }
  if (name == "ATOMG" || name == "ATOMS" || name == "REDG") {
    i.kind = i.Has(".ADD") || i.Has(".INC") ? '+' : i.Has(".OR") ? '|' : i.Has(".EXCH") ? '=' : 0;
    return i.kind != 0 && !i.Has(".64") ? Atomic : nullptr;
  }
  if (name == "LDC") {
    i.kind = static_cast<int>(Size(i));
    return LoadConstant;
  }
  if (name == "S2R" || name == "S2UR") {
    const char* known[] = {".SR_TID.X", ".SR_LANEID", ".SR_CTAID.X", ".SR_SWINHI", ".SR_CgaCtaId"};
    for (i.kind = 0; i.kind < 5; ++i.kind) {
      if (i.Has(known[i.kind])) return Special;
    }
    return nullptr;
  }
  if (name == "SHFL") {
    i.kind = i.Has(".UP") ? 'u' : i.Has(".DOWN") ? 'd' : i.Has(".BFLY") ? 'x' : 'i';
    return Shuffle;
  }
  if (name == "VOTE" || name == "VOTEU") {
    i.kind = i.Has(".ALL") ? 'A' : '0';
    return i.kind == 'A' || i.Has(".ANY") ? Vote : nullptr;
  }
  if (i.opcode == "B2R.RESULT") return Result;
  if (i.opcode == "REDUX.SUM") return Sum;
  if (name == "R2UR") return ToUniform;
  if (name == "R2P") return ToPredicates;
  if (name == "P2R") return FromPredicates;
  return nullptr;
}

}  // namespace cuda_on_host::machine
