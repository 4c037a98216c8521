// Work shared among torch's threads, in an order that the result cannot depend on.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace roi {

// Elements read or written that are worth a thread: waking one costs about as much.
constexpr int64_t kLeastWork = 32768;

// Threads for `tasks` tasks that touch about `work` elements in all.
inline int64_t worker_count(int64_t tasks, int64_t work) {
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work / kLeastWork);
  return std::max<int64_t>(1, std::min(tasks, threads));
}

// Runs work(worker, task) for every task in [0, tasks), on `workers` threads. Tasks are unequal, so each worker takes
// the next one when it is free. Which worker runs a task is left to chance: tasks must not share what they write, and
// `worker` may only choose scratch memory.
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
