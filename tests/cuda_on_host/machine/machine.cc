#include "machine.h"

#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "warp.h"

namespace cuda_on_host::machine {
namespace {

// Of constant bank 0: the sizes of block and grid, and where the parameters begin.
constexpr size_t kBlockSize = 0, kGridSize = 12, kParameters = 0x210;

std::vector<uint8_t> Constants(unsigned blocks, unsigned threads,
                               const std::vector<Parameter>& parameters) {
  std::vector<uint8_t> bank(kParameters);
  const uint32_t sizes[] = {threads, 1, 1, blocks, 1, 1};
  std::memcpy(&bank[kBlockSize], sizes, 12);
  std::memcpy(&bank[kGridSize], sizes + 3, 12);
  for (const Parameter& each : parameters) {
    const size_t at = (bank.size() + each.alignment - 1) / each.alignment * each.alignment;
    bank.resize(at + each.size);
    std::memcpy(&bank[at], each.data, each.size);
  }
  bank.resize((bank.size() + 15) / 16 * 16);
  return bank;
}

}  // namespace

std::map<const void*, Code> codes;

std::string Run(const Code& code, unsigned blocks, unsigned threads, size_t dynamic_shared,
                int rubbish, const std::vector<Parameter>& parameters) {
  const unsigned count = (threads + kLanes - 1) / kLanes;
  const auto warps = std::make_unique<Warp[]>(count);
  for (unsigned k = 0; k < count; ++k) {
    std::memset(warps[k].registers, rubbish, sizeof(warps[k].registers));
    std::memset(warps[k].predicates, rubbish, sizeof(warps[k].predicates));
    std::memset(warps[k].uniforms, rubbish, sizeof(warps[k].uniforms));
    std::memset(warps[k].uniform_predicates, rubbish & 1, sizeof(warps[k].uniform_predicates));
  }
  BlockState block;
  block.code = &code;
  block.constants = Constants(blocks, threads, parameters);
  block.shared.resize(kReservedShared + code.static_shared + dynamic_shared);
  try {
    for (block.index = 0; block.index < blocks; ++block.index) {
      std::memset(block.shared.data(), rubbish, block.shared.size());
      for (unsigned k = 0; k < count; ++k) {
        warps[k].Begin(block, k * kLanes, threads - k * kLanes);
      }
      for (bool some = true; some;) {
        some = false;
        for (unsigned k = 0; k < count; ++k) some |= warps[k].Run();
        block.result = std::exchange(block.vote, false);
        for (unsigned k = 0; k < count; ++k) warps[k].PassBarrier();
      }
    }
  } catch (const std::runtime_error& error) {
    return "block " + std::to_string(block.index) + ": " + error.what();
  }
  return "";
}

}  // namespace cuda_on_host::machine
