// Forward pooling on the CPU, in either layout.
#pragma once
#include "roi_cpu_job.h"

namespace roi {

// channels_last: a cell's channels are contiguous, so the inner loop reads them in place.
// pool(roi, map, row, cell): row and cell are strides in elements of storage.
template <class Item, class Pool>
void pool_channels_last(const Job<Item>& job, const std::vector<Tensor>& maps, const Pool& pool) {
  // Successive RoIs in the plan read the same cells, so a worker takes several at once.
  constexpr int64_t kRoIsPerTask = 8, kTasksPerWorker = 16;
  int64_t count = job.plan.size(), c = job.channels, workers = worker_count(count, 4 * job.outputs());
  int64_t tasks = std::min(count, std::max(count / kRoIsPerTask, workers * kTasksPerWorker));
  for_each_task(tasks, workers, [&](int64_t, int64_t task) {
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; i++) {
      int map = job.plan.map_of(i);
      const void* data = at(maps[map / job.pyramid.images].const_data_ptr(), job.offset(map), job.type.bytes);
      pool(job.plan[i], data, job.width(map) * c, c);
    }
  });
}

// NCHW: 16 channels of one map at a time are rearranged into a block with contiguous channels. Each run of cells is
// rearranged at its first use, so overlapping RoIs share that work, and cells that no RoI reads cost nothing.
// pool(worker, roi, block, row, cell, c, channels): row and cell are strides in working elements; channels
// [c, c + channels).
template <class Item, class Pool>
void pool_planes(const Job<Item>& job, const std::vector<Tensor>& maps, int64_t workers, const Pool& pool) {
  constexpr int64_t kRun = 16;
  int64_t block_width = job.block_width(), block_bytes = job.most_cells() * block_width * job.type.working_bytes;
  Scratch blocks(workers * block_bytes);
  std::vector<std::vector<char>> filled(workers);

  for_each_task(job.block_tasks(), workers, [&](int64_t worker, int64_t task) {
    int map = static_cast<int>(task / job.blocks());
    if (job.plan.begin(map) == job.plan.end(map)) return;
    int64_t c = task % job.blocks() * kBlock, channels = std::min<int64_t>(kBlock, job.channels - c);
    int64_t width = job.width(map), plane = job.cells(map), runs = (width + kRun - 1) / kRun;
    const char* planes = at(maps[map / job.pyramid.images].const_data_ptr(), job.offset(map) + c * plane, job.type.bytes);
    char* block = at(blocks.get(), worker * block_bytes, 1);
    std::vector<char>& done = filled[worker];
    done.assign(runs * job.height(map), 0);

    for (int64_t i = job.plan.begin(map); i < job.plan.end(map); i++) {
      const RoIItems<Item>& roi = job.plan[i];
      if (!roi.empty())
        for (int64_t y = roi.y.first; y <= roi.y.last; y++)
          for (int64_t run = roi.x.first / kRun; run <= roi.x.last / kRun; run++) {
            char& is_done = done[y * runs + run];
            if (is_done) continue;
            is_done = 1;
            int64_t cell = y * width + run * kRun;
            job.kernel.gather_planes(at(planes, cell, job.type.bytes), plane, std::min(kRun, width - run * kRun),
                                     channels, at(block, cell * block_width, job.type.working_bytes), block_width);
          }
      pool(worker, roi, block, width * block_width, block_width, c, channels);
    }
  });
}

}  // namespace roi
