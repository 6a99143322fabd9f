#include <string>

#include "instructions.h"
#include "warp.h"

namespace cuda_on_host::machine {
namespace {

void Nothing(Warp&, const Instruction&, uint32_t) {}

void Unknown(Warp&, const Instruction& i, uint32_t) { Fail(i, "an instruction that is not known"); }

}  // namespace

void Bind(Instruction& i) {
  static const struct {
    const char* opcode;
    Flow flow;
  } flows[] = {{"BRA", Flow::kJump},
               {"BRA.U", Flow::kJump},
               {"BRA.DIV", Flow::kJumpIfApart},
               {"CALL.REL.NOINC", Flow::kJump},
               {"RET.REL.NODEC", Flow::kReturn},
               {"EXIT", Flow::kExit},
               {"BSSY", Flow::kSetMeeting},
               {"BSYNC", Flow::kMeet},
               {"BREAK", Flow::kLeaveMeeting},
               {"WARPSYNC.ALL", Flow::kWarpBarrier},
               {"BAR.SYNC.DEFER_BLOCKING", Flow::kBlockBarrier},
               {"BAR.RED.OR.DEFER_BLOCKING", Flow::kBlockBarrier}};
  for (const auto& each : flows) {
    if (i.opcode == each.opcode) {
      i.flow = each.flow;
      return;
    }
  }
  i.is_signed = !i.Has(".U32") && !i.Has(".U64");
  i.extended = i.Has(".X") || i.Has(".EX");
  i.either = i.Has(".OR");
  i.high = i.Has(".HI");
  i.left = i.Has(".L");
  i.wide = i.Has(".U64") || i.Has(".S64") || i.Has(".WIDE");
  i.wraps = i.Has(".W");
  i.rounds_up = i.Has(".RP");
  // Uniform instructions are the same, of values that all lanes have in common.
  std::string name = i.opcode.substr(0, i.opcode.find('.'));
  if (name[0] == 'U') name.erase(0, 1);
  for (const char* none : {"NOP", "YIELD", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL"}) {
    if (name == none) i.execute = Nothing;
  }
  if (i.execute == nullptr) i.execute = MemoryInstruction(i, name);
  if (i.execute == nullptr) i.execute = IntegerInstruction(i, name);
  if (i.execute == nullptr) i.execute = FloatInstruction(i, name);
  if (i.execute == nullptr) i.execute = Unknown;
}

}  // namespace cuda_on_host::machine
