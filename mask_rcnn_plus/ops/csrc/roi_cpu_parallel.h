// Runs tasks on torch's threads; the result must not depend on their order.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace roi {

// Elements to read or write per thread: waking a thread takes about as long.
constexpr int64_t kLeastWork = 32768;

// The number of threads for `tasks` tasks that read or write about `work` elements in all.
inline int64_t worker_count(int64_t tasks, int64_t work) {
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work / kLeastWork);
  return std::max<int64_t>(1, std::min(tasks, threads));
}

// Runs work(worker, task) for every task in [0, tasks), on `workers` threads. Tasks are unequal, so each worker takes
// the next task when it is free. Any worker may run a task: tasks must not write to shared memory, and `worker` may
// only select scratch memory.
template <class Work>
void for_each_task(int64_t tasks, int64_t workers, const Work& work) {
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; task++) work(0, task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(worker, task);
  });
}

}  // namespace roi
