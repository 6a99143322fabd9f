// The machine code of the CUDA kernels, as nvdisasm prints it of an sm_90 cubin, ready to run.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_CODE_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_CODE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_on_host::machine {

constexpr int kNoRegister = 255, kNoUniform = 63, kTrue = 7;  // RZ, URZ, PT: read only

// `-R4.reuse`, `~UR5`, `|R2|`, `!P0`, `0x1f`, `-1.5`, `desc[UR8][R2.64+0x10]`, `c[0x0][R3+0x210]`.
struct Operand {
  enum Kind : uint8_t { kNone, kRegister, kUniform, kPredicate, kUniformPredicate, kNumber };
  Kind kind = kNone;
  bool negative = false, inverted = false, absolute = false;
  int16_t index = 0;             // of a register or predicate; of an address the register in it
  int16_t uniform = kNoUniform;  // of an address: the uniform register in it
  uint32_t bits = 0;             // a number; of an address what is added
  float number = 0;              // that is not written in hexadecimal

  bool predicate() const { return kind == kPredicate || kind == kUniformPredicate; }
};

// What an instruction does to the order of things.
enum class Flow : uint8_t {
  kNext,
  kJump,
  kJumpIfApart,  // BRA.DIV: where a warp's lanes are not together
  kReturn,
  kExit,
  kSetMeeting,    // BSSY: the lanes that are here will meet, and go on at the target
  kMeet,          // BSYNC
  kLeaveMeeting,  // BREAK: these lanes will not come
  kWarpBarrier,
  kBlockBarrier,
};

class Warp;
struct Instruction;
// For the lanes that have a bit.
using Execute = void (*)(Warp&, const Instruction&, uint32_t lanes);

struct Instruction {
  std::string opcode;
  Execute execute = nullptr;
  Flow flow = Flow::kNext;
  // What the opcode's modifiers say.
  bool is_signed = true, extended = false, either = false, high = false, left = false;
  bool wide = false, wraps = false, rounds_up = false, of_shared = false;
  int kind = 0;     // what else `execute` takes from it
  int meeting = 0;  // B0, B1, ...
  int target = -1;  // of a jump: an instruction's index
  int inputs = 0;
  Operand guard, to, to_predicate[2], from[6];
  mutable uint64_t count = 0;  // warps that came here

  // Whether the opcode has this part: ".U32".
  bool Has(const char* modifier) const;
};

struct Code {
  std::vector<Instruction> instructions;  // that of address 16 i is the i-th
  size_t static_shared = 0;               // bytes
};

// Reads the text of one section, of a kernel and what it calls, without the lines of the source.
Code Decode(const std::string& text);

// Finds out how to execute an instruction whose opcode and operands are known.
void Bind(Instruction& instruction);

}  // namespace cuda_on_host::machine

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_CODE_H_
