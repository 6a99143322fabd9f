// A warp, and the block that it is of.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_WARP_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_WARP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "code.h"

namespace cuda_on_host::machine {

constexpr int kLanes = 32;
constexpr uint32_t kAll = ~0u;
// Where shared memory lies among all addresses: SR_SWINHI. No host has memory there.
constexpr uint32_t kSharedWindow = 0x7ead0000;
// What the driver keeps of shared memory.
constexpr uint32_t kReservedShared = 1024;

// A value for each lane.
struct alignas(64) Row {
  uint32_t lane[kLanes];
  uint32_t& operator[](int i) { return lane[i]; }
  const uint32_t& operator[](int i) const { return lane[i]; }
};

// What all warps of a block have in common.
struct BlockState {
  const Code* code;
  std::vector<uint8_t> constants;  // bank 0: sizes of block and grid, parameters
  std::vector<uint8_t> shared;     // from address 0 on
  uint32_t index;                  // blockIdx.x
  // Of a barrier with a vote: whether any lane that has come voted for it; how the last one ended.
  bool vote = false, result = false;
};

[[noreturn]] void Fail(const Instruction& instruction, const std::string& what);

class Warp {
 public:
  // Begins with the first instruction, for the first `threads` of the lanes.
  void Begin(BlockState& of, uint32_t first_thread, uint32_t threads);
  // Runs until all lanes are done or wait for a barrier of the block; false if all are done.
  bool Run();
  // Goes on behind the barrier.
  void PassBarrier();

  Row registers[kNoRegister + 1];
  uint32_t predicates[kTrue + 1];  // a bit for each lane
  uint32_t uniforms[kNoUniform + 1];
  bool uniform_predicates[kTrue + 1];
  BlockState* block;
  uint32_t first_thread;

 private:
  enum class Wait : uint8_t { kNothing, kMeeting, kWarpBarrier, kBlockBarrier };
  // Lanes that are together.
  struct Group {
    uint32_t lanes;
    int at;
    Wait wait = Wait::kNothing;
    int meeting = 0;
  };
  struct Meeting {
    uint32_t lanes = 0;
    int target = 0;
  };

  void RunGroup(Group group);
  bool Together(Wait wait, int meeting);
  uint32_t Guarded(const Operand& predicate, uint32_t lanes) const;

  std::vector<Group> groups_;
  Meeting meetings_[16];
  uint32_t live_ = 0;
};

}  // namespace cuda_on_host::machine

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_MACHINE_WARP_H_
