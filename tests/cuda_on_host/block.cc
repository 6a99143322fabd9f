#include "block.h"

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <sstream>
#include <utility>

#ifdef WATCH_RACES
#include <sanitizer/tsan_interface.h>
// ThreadSanitizer takes an order of things from these, and from nothing else here: it sees neither
// this file nor how host threads hand over to each other.
#define HAPPENS_BEFORE(address) __tsan_release(address)
#define HAPPENS_AFTER(address) __tsan_acquire(address)
#else
#define HAPPENS_BEFORE(address) static_cast<void>(address)
#define HAPPENS_AFTER(address) static_cast<void>(address)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {

Launch launch;
Block* block = nullptr;
unsigned resident_blocks = 1;

using State = Thread::State;

void Block::Main() {
  block->running().fiber.Arrive();
  HAPPENS_AFTER(&block->ends_[block->blocks_ & 1]);  // what was here before
  (*launch.body)();
  HAPPENS_BEFORE(&block->ends_[~block->blocks_ & 1]);
  block->running().state = State::kDone;
  block->runs_ = false;
  block->running().fiber.Leave();
}

void Block::Start(unsigned rank) {
  Thread& thread = *threads_[rank];
  thread.fiber.Begin(&Block::Main);
  thread.index = {rank % blockDim.x, rank / blockDim.x % blockDim.y,
                  rank / blockDim.x / blockDim.y};
  thread.state = State::kReady;
  thread.block_barriers = thread.warp_barriers = 0;
  thread.fenced = false;
  thread.loaded.clear();
}

void Block::Begin(uint64_t rank, size_t dynamic_shared, std::span<char> static_shared) {
  End();
  index_ = {static_cast<unsigned>(rank % gridDim.x),
            static_cast<unsigned>(rank / gridDim.x % gridDim.y),
            static_cast<unsigned>(rank / gridDim.x / gridDim.y)};
  count_ = blockDim.x * blockDim.y * blockDim.z;
  while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>());
  shared_ = std::make_unique_for_overwrite<char[]>(dynamic_shared);
  std::fill_n(shared_.get(), dynamic_shared, static_cast<char>(launch.rubbish));
  std::fill(static_shared.begin(), static_shared.end(), static_cast<char>(launch.rubbish));
  for (unsigned i = 0; i < count_; ++i) Start(i);
  for (Warp& warp : warps_) std::fill_n(warp.turn, 32, 0);
  ranks_.resize(count_);
  for (unsigned i = 0; i < count_; ++i) {
    ranks_[i] = launch.order == Order::kReverse ? count_ - 1 - i : i;
  }
  HAPPENS_BEFORE(&ends_[++blocks_ & 1]);
}

void Block::End() {
  for (char& end : ends_) HAPPENS_AFTER(&end);
}

bool Block::GoOn() {
  block = this;
  blockIdx = index_;
  while (launch.error.empty()) {
    if (launch.order == Order::kRandom) std::shuffle(ranks_.begin(), ranks_.end(), launch.random);
    bool ran = false, done = true;
    for (const unsigned rank : ranks_) {
      Thread& thread = *threads_[rank];
      if (thread.state == State::kReady) {
        current_ = rank;
        threadIdx = thread.index;
        runs_ = ran = true;
        thread.fiber.Resume();
      }
      done &= thread.state == State::kDone;
    }
    if (done) return true;
    if (std::exchange(waits_, false)) return false;
    if (ran) continue;
    PassBarrier();
    if (launch.order == Order::kRandom) return false;
  }
  return true;
}

// Back to GoOn(), until it turns to this thread again.
void Block::Yield() {
  runs_ = false;
  running().fiber.Suspend();
}

void Block::LetOthersRun() {
  if (resident_blocks == 1) return;
  waits_ = true;
  Yield();
}

// --- Barriers ------------------------------------------------------------------------------------

// The same line does not do: two calls of a helper, in the branches of a divergent `if`, would
// meet.
static bool Differ(const Thread& a, const Thread& b) {
  return a.state != b.state || a.line != b.line || a.calls != b.calls ||
         (a.file != b.file && std::strcmp(a.file, b.file) != 0);
}

static std::string Lines(const Calls& calls);

// All threads wait or are done: lets them through the block's barrier if they are at the same one.
void Block::PassBarrier() {
  for (unsigned rank = 1; rank < count_; ++rank) {
    if (!Differ(*threads_[0], *threads_[rank])) continue;
    launch.error = Divergent(0, rank);
    return;
  }
  if (threads_[0]->state != State::kAtBlock) {
    launch.error = launch.kernel + ": divergent barrier: " + Where(0) +
                   ", for lanes that never come\n" + Lines(threads_[0]->calls);
    return;
  }
  for (unsigned rank = 0; rank < count_; ++rank) threads_[rank]->state = State::kReady;
}

void Block::Wait(Barrier barrier, uint32_t mask, const char* file, int line) {
  Thread& thread = running();
  thread.file = file;
  thread.line = line;
  thread.calls = CallsTo(__builtin_frame_address(0));
  if (barrier == Barrier::kBlock) {
    char* order = &of_block_[thread.block_barriers++ & 1];
    HAPPENS_BEFORE(order);
    thread.state = State::kAtBlock;
    Yield();
    HAPPENS_AFTER(order);
    return;
  }
  const unsigned first = current_ / 32 * 32;
  thread.state = State::kAtWarp;
  thread.mask = mask;
  if (!(mask >> (current_ - first) & 1)) {
    launch.error = launch.kernel + ": a lane waits for a mask without itself: " + Where(current_);
    Yield();
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const unsigned other = first + lane;
    if (other >= count_ || Differ(thread, *threads_[other]) || threads_[other]->mask != mask) {
      Yield();  // until the last lane comes
      return;
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) threads_[first + lane]->state = State::kReady;
  }
}

const uint64_t* Block::Exchange(uint32_t mask, uint64_t value, const char* file, int line) {
  Warp& warp = warps_[current_ / 32];
  const unsigned lane = current_ % 32;
  uint64_t* values = warp.values[warp.turn[lane]];
  warp.turn[lane] ^= 1;
  values[lane] = value;
  Wait(Barrier::kWarp, mask, file, line);
  return values;
}

void Wait(Barrier barrier, uint32_t mask, const char* file, int line) {
  block->Wait(barrier, mask, file, line);
}

// Orders memory, as shuffles do not.
void SyncWarp(uint32_t mask, const char* file, int line) { block->SyncWarp(mask, file, line); }

void Block::SyncWarp(uint32_t mask, const char* file, int line) {
  char* order = &of_warps_[current_ / 32][running().warp_barriers++ & 1];
  HAPPENS_BEFORE(order);
  Wait(Barrier::kWarp, mask, file, line);
  HAPPENS_AFTER(order);
}

const uint64_t* Exchange(uint32_t mask, uint64_t value, const char* file, int line) {
  return block->Exchange(mask, value, file, line);
}

void* DynamicShared() { return block->dynamic_shared(); }

// --- Atomics and fences: a fence orders what stands around it with the atomics on the other side --

void AfterAtomic(const void* address) {
#ifdef WATCH_RACES
  Thread& thread = block->running();
  if (thread.fenced) HAPPENS_BEFORE(const_cast<void*>(address));
  thread.loaded.push_back(address);
  if (thread.loaded.size() > 64) thread.loaded.pop_front();
#else
  static_cast<void>(address);
#endif
}

void Fence() {
  Thread& thread = block->running();
  for (const void* address : thread.loaded) HAPPENS_AFTER(const_cast<void*>(address));
  thread.loaded.clear();
  thread.fenced = true;
}

void LetOthersRun() { block->LetOthersRun(); }

// --- Reports -------------------------------------------------------------------------------------

// Functions, files and lines of the calls that return to these addresses, as addr2line knows them.
static std::string Lines(const Calls& calls) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&DynamicShared), &info) == 0) return "";
  const uintptr_t base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::ostringstream command;
  command << "addr2line --demangle --functions --inlines --pretty-print --exe=" << info.dli_fname;
  // One less lies within the call itself.
  for (int i = 0; i < calls.count; ++i) {
    command << " 0x" << std::hex << calls.returns[i] - 1 - base;
  }
  FILE* pipe = popen(command.str().c_str(), "r");
  if (pipe == nullptr) return "";
  std::string text;
  char line[4096];
  while (std::fgets(line, sizeof(line), pipe) != nullptr) {
    if (std::strstr(line, "std::_Function_handler") != nullptr) break;  // the harness's own calls
    text += std::string("  ") + line;
  }
  pclose(pipe);
  return text;
}

static std::string Stand(const Thread& thread) {
  if (thread.state == State::kReady) return "is on its way";
  if (thread.state == State::kDone) return "has returned";
  return std::string("waits for its ") + (thread.state == State::kAtBlock ? "block" : "warp") +
         " at " + thread.file + ":" + std::to_string(thread.line);
}

std::string Block::Where(unsigned rank) const {
  return "thread " + std::to_string(rank) + " " + Stand(*threads_[rank]);
}

std::string Block::Divergent(unsigned a, unsigned b) const {
  return launch.kernel + ": divergent barrier: " + Where(a) + ", " + Where(b) + "\n" +
         Lines(threads_[a]->calls) + "and\n" + Lines(threads_[b]->calls);
}

Calls Block::CallsTo(const void* frame) const {
  Calls calls;
  while (threads_[current_]->fiber.Holds(frame)) {
    const void* const* words = static_cast<const void* const*>(frame);
    calls.Add(reinterpret_cast<uintptr_t>(words[1]));
    frame = words[0];
  }
  return calls;
}

void Block::GiveUp([[maybe_unused]] const void* signal_context) {
  std::map<std::string, unsigned> places;  // -> threads
  for (unsigned rank = 0; rank < count_; ++rank) {
    if (!runs_ || rank != current_) ++places[Stand(*threads_[rank])];
  }
  std::ostringstream text;
  text << launch.kernel << ": takes too long, in block (" << index_.x << ", " << index_.y << ", "
       << index_.z << ")\n";
  for (const auto& [where, count] : places) {
    text << "  " << count << " threads: each " << where << "\n";
  }
  if (runs_) {
    text << "  thread " << current_ << " runs\n";
#ifdef __x86_64__
    const auto& registers = static_cast<const ucontext_t*>(signal_context)->uc_mcontext.gregs;
    Calls here;
    here.Add(registers[REG_RIP] + 1);
    text << Lines(here) << Lines(CallsTo(reinterpret_cast<void*>(registers[REG_RBP])));
#endif
  }
  launch.error = text.str();
  if (runs_) Yield();  // for good
}

}  // namespace cuda_on_host
