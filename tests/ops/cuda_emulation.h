// Enough of CUDA to run the kernels of mask_rcnn_plus/ops/csrc/roi_cuda_*.cuh on the CPU, and to detect errors that only
// sometimes appear on a GPU.
//
// A block's threads are fibers. Each runs until it waits for others. A seed determines which thread and which block run
// next: a kernel with a missing barrier, or whose blocks are not independent, has another result with another seed.
// Shared memory is a heap block of exactly the requested size, filled with zeros or with a seeded byte: a sanitizer
// detects accesses beyond it, and a second seed detects reads of memory that was never written. Threads that wait at
// different barriers, or exit while others wait, are an error.
#pragma once
#define ROI_EMULATION
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

struct Index {
  unsigned x;
};

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

class Machine {
 public:
  Index thread_index{}, block_index{};

  // Even seeds fill shared memory with zeros, odd ones with another byte. Threads run in any order (seeds 0 and 1), the
  // first ones first (2 and 3), or the last ones first (4 and 5).
  void seed(uint64_t value) {
    random_.seed(value);
    zeros_ = value % 2 == 0;
    order_ = value / 2 % 3;
  }

  unsigned char* shared_memory() { return shared_.get(); }

  // Runs `body` for every thread of every block.
  void launch(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> body) {
    if (threads % kWarpSize != 0) throw std::runtime_error("a block is not a whole number of warps");
    body_ = std::move(body);
    error_.clear();
    fibers_.resize(threads);
    warps_.assign(threads / kWarpSize, {});
    for (Fiber& f : fibers_)
      if (!f.stack) f.stack.reset(new char[kStackBytes]);
    std::vector<int64_t> order(blocks);
    for (int64_t b = 0; b < blocks; b++) order[b] = b;
    std::shuffle(order.begin(), order.end(), random_);
    for (int64_t block : order) run_block(block, shared_bytes);
  }

  // Waits for the whole block; `place` identifies the barrier.
  void wait_for_block(const char* place) {
    current().state = State::kAtBarrier;
    current().place = place;
    yield();
  }

  // Waits for the warp, then returns each lane's value.
  const int* exchange(int value, const char* place) {
    Warp& warp = warps_[thread_index.x / kWarpSize];
    warp.arriving[thread_index.x % kWarpSize] = value;
    current().state = State::kAtExchange;
    current().place = place;
    if (++warp.arrived == kWarpSize) {
      warp.arrived = 0;
      std::copy_n(warp.arriving, kWarpSize, warp.arrived_values);
      size_t first = thread_index.x / kWarpSize * kWarpSize;
      for (size_t i = first; i < first + kWarpSize; i++) {
        if (fibers_[i].place != place) fail("a warp's lanes exchange at different places");
        fibers_[i].state = State::kReady;
        ready_.push_back(i);
      }
    }
    yield();
    return warp.arrived_values;
  }

  void fail(const std::string& what) {
    if (error_.empty()) error_ = what;
  }

 private:
  enum class State { kReady, kAtBarrier, kAtExchange, kDone };

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    const char* place;
  };

  struct Warp {
    int arrived, arriving[kWarpSize], arrived_values[kWarpSize];
  };

  Fiber& current() { return fibers_[thread_index.x]; }

  void yield() {
    Fiber& f = current();
    swapcontext(&f.context, &scheduler_);
  }

  static void run_thread();

  void run_block(int64_t block, int64_t shared_bytes) {
    // malloc aligns to 16 bytes, as the device does.
    shared_.reset(static_cast<unsigned char*>(std::malloc(shared_bytes)));
    std::memset(shared_.get(), zeros_ ? 0 : static_cast<int>(random_() & 0xff), shared_bytes);
    block_index.x = static_cast<unsigned>(block);
    ready_.clear();
    for (size_t i = 0; i < fibers_.size(); i++) {
      Fiber& f = fibers_[i];
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStackBytes;
      f.context.uc_link = &scheduler_;
      makecontext(&f.context, &Machine::run_thread, 0);
      f.state = State::kReady;
      ready_.push_back(i);
    }
    for (;;) {
      while (!ready_.empty()) {
        size_t pick = random_() % ready_.size();
        if (order_ == 1) pick = std::min_element(ready_.begin(), ready_.end()) - ready_.begin();
        if (order_ == 2) pick = std::max_element(ready_.begin(), ready_.end()) - ready_.begin();
        size_t i = ready_[pick];
        ready_[pick] = ready_.back();
        ready_.pop_back();
        thread_index.x = static_cast<unsigned>(i);
        swapcontext(&scheduler_, &fibers_[i].context);
        if (!error_.empty()) throw std::runtime_error(error_);
      }
      if (fibers_[0].state == State::kDone) {
        for (const Fiber& f : fibers_)
          if (f.state != State::kDone) throw std::runtime_error("some threads left while others wait");
        return;
      }
      for (const Fiber& f : fibers_)
        if (f.state != State::kAtBarrier || f.place != fibers_[0].place)
          throw std::runtime_error("threads wait at different barriers");
      for (size_t i = 0; i < fibers_.size(); i++) {
        fibers_[i].state = State::kReady;
        ready_.push_back(i);
      }
    }
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };

  std::mt19937_64 random_;
  bool zeros_ = false;
  uint64_t order_ = 0;
  std::function<void()> body_;
  std::string error_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<size_t> ready_;
  std::unique_ptr<unsigned char, Free> shared_;
  ucontext_t scheduler_;
};

inline Machine machine;

inline void Machine::run_thread() {
  machine.body_();
  machine.current().state = State::kDone;
}

inline void launch(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> body) {
  machine.launch(blocks, threads, shared_bytes, std::move(body));
}

inline unsigned char* shared_memory() { return machine.shared_memory(); }

inline void check(bool condition, const char* what) {
  if (!condition) machine.fail(std::string("assertion failed: ") + what);
}

inline unsigned ballot(bool vote, const char* place) {
  const int* votes = machine.exchange(vote, place);
  unsigned all = 0;
  for (int lane = 0; lane < kWarpSize; lane++) all |= static_cast<unsigned>(votes[lane] != 0) << lane;
  return all;
}

inline int shuffle_xor(int value, int lane_mask, const char* place) {
  return machine.exchange(value, place)[(machine.thread_index.x % kWarpSize) ^ lane_mask];
}

#define EMULATION_TEXT_(line) #line
#define EMULATION_TEXT(line) EMULATION_TEXT_(line)
#define EMULATION_PLACE __FILE__ ":" EMULATION_TEXT(__LINE__)

}  // namespace emulation

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __stwb(uint4* to, uint4 value) { *to = value; }

#define ROI_SHARED_MEMORY(name) unsigned char* name = emulation::shared_memory()
#define ROI_ASSERT(condition) emulation::check(condition, #condition)
#define threadIdx emulation::machine.thread_index
#define blockIdx emulation::machine.block_index
#define __syncthreads() emulation::machine.wait_for_block(EMULATION_PLACE)
#define __ballot_sync(mask, vote) emulation::ballot(vote, EMULATION_PLACE)
#define __shfl_xor_sync(mask, value, lane_mask) emulation::shuffle_xor(value, lane_mask, EMULATION_PLACE)
#define __popc(bits) __builtin_popcount(bits)
