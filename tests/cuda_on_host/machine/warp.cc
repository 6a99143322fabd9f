#include "warp.h"

#include <bit>
#include <cstring>
#include <stdexcept>

namespace cuda_on_host::machine {

void Fail(const Instruction& instruction, const std::string& what) {
  throw std::runtime_error(instruction.opcode + ": " + what);
}

void Warp::Begin(BlockState& of, uint32_t first, uint32_t threads) {
  block = &of;
  first_thread = first;
  live_ = threads >= kLanes ? kAll : (1u << threads) - 1;
  groups_ = {{live_, 0}};
  // Registers hold what was there before; only these are known.
  std::memset(&registers[kNoRegister], 0, sizeof(Row));
  uniforms[kNoUniform] = 0;
  predicates[kTrue] = kAll;
  uniform_predicates[kTrue] = true;
}

bool Warp::Run() {
  for (;;) {
    const auto ready = [&] {
      for (size_t i = groups_.size(); i-- > 0;) {
        if (groups_[i].wait == Wait::kNothing) return static_cast<int>(i);
      }
      return -1;
    };
    int next = ready();
    if (next < 0) {
      bool moved = false;
      for (size_t i = 0; i < groups_.size() && !moved; ++i) {
        if (groups_[i].wait != Wait::kBlockBarrier) {
          moved = Together(groups_[i].wait, groups_[i].meeting);
        }
      }
      if (!moved) break;
      continue;
    }
    const Group group = groups_[next];
    groups_.erase(groups_.begin() + next);
    RunGroup(group);
  }
  for (const Group& group : groups_) {
    if (group.wait != Wait::kBlockBarrier) {
      Fail(block->code->instructions[group.at], "lanes wait for others that do not come");
    }
  }
  return live_ != 0;
}

void Warp::PassBarrier() {
  for (Group& group : groups_) {
    group.wait = Wait::kNothing;
    ++group.at;
  }
}

// Lets those go on together that wait for each other, if all of them are there.
bool Warp::Together(Wait wait, int meeting) {
  uint32_t here = 0;
  int at = -1;
  for (const Group& group : groups_) {
    if (group.wait != wait || group.meeting != meeting) continue;
    here |= group.lanes;
    if (wait == Wait::kWarpBarrier && at >= 0 && at != group.at) {
      Fail(block->code->instructions[at], "lanes of a warp wait at two places");
    }
    at = group.at;
  }
  const uint32_t expected = wait == Wait::kMeeting ? meetings_[meeting].lanes & live_ : live_;
  if ((expected & ~here) != 0) return false;
  std::erase_if(groups_, [&](const Group& g) { return g.wait == wait && g.meeting == meeting; });
  groups_.push_back({here, wait == Wait::kMeeting ? meetings_[meeting].target : at + 1});
  return true;
}

uint32_t Warp::Guarded(const Operand& predicate, uint32_t lanes) const {
  if (predicate.kind == Operand::kNone) return lanes;
  const uint32_t value = predicate.kind == Operand::kUniformPredicate
                             ? (uniform_predicates[predicate.index] ? kAll : 0)
                             : predicates[predicate.index];
  return lanes & (predicate.inverted ? ~value : value);
}

// Runs lanes until they wait, are done, or part. What others have to wait for stays in groups_.
void Warp::RunGroup(Group group) {
  const std::vector<Instruction>& code = block->code->instructions;
  uint32_t lanes = group.lanes;
  int at = group.at;
  const auto leave = [&](uint32_t some, Wait wait, int meeting = 0) {
    groups_.push_back({some, at, wait, meeting});
    lanes &= ~some;
  };
  while (lanes != 0) {
    const Instruction& i = code[at];
    ++i.count;
    const uint32_t some = Guarded(i.guard, lanes);
    switch (i.flow) {
      case Flow::kNext:
        if (some != 0) i.execute(*this, i, some);
        break;
      case Flow::kJump:
      case Flow::kReturn: {
        const uint32_t taken =
            i.flow == Flow::kJump && i.inputs > 0 ? Guarded(i.from[0], some) : some;
        int target = i.target;
        if (taken != 0 && i.flow == Flow::kReturn) {
          target += static_cast<int>(registers[i.from[0].index][std::countr_zero(taken)]) / 16;
        }
        if (taken != 0 && target < 0) Fail(i, "a jump to nobody knows where");
        if (taken == lanes) {
          at = target;
          continue;
        }
        if (taken != 0) {
          groups_.push_back({taken, target});
          lanes &= ~taken;
        }
        break;
      }
      case Flow::kJumpIfApart:
        if (lanes != (uniforms[i.from[0].index] & live_)) {
          Fail(i, "lanes of a warp exchange values, but are not together");
        }
        break;
      case Flow::kExit: {
        const uint32_t done = i.inputs > 0 ? Guarded(i.from[0], some) : some;
        live_ &= ~done;
        lanes &= ~done;
        break;
      }
      case Flow::kSetMeeting:
        meetings_[i.meeting] = {lanes, i.target};
        break;
      case Flow::kLeaveMeeting:
        meetings_[i.meeting].lanes &= ~some;
        break;
      case Flow::kMeet:
        if (some == lanes && (meetings_[i.meeting].lanes & live_ & ~lanes) == 0) {
          at = meetings_[i.meeting].target;
          continue;
        }
        if (some != 0) leave(some, Wait::kMeeting, i.meeting);
        break;
      case Flow::kWarpBarrier:
        if (some != live_ && some != 0) leave(some, Wait::kWarpBarrier);
        break;
      case Flow::kBlockBarrier:
        if (i.inputs > 1) block->vote |= Guarded(i.from[1], some) != 0;
        if (some != 0) leave(some, Wait::kBlockBarrier);
        break;
    }
    ++at;
  }
}

}  // namespace cuda_on_host::machine
