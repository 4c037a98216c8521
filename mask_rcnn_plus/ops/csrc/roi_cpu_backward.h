// Backward pooling on the CPU: which task sums which part of the gradient maps. No other task writes there, and RoIs
// are added in the plan's order, so the sums do not depend on the number of threads.
#pragma once
#include "roi_cpu_job.h"

namespace roi {

// Some rows and channels of one map's gradient.
struct Part {
  int map;
  int64_t c, channels;
  int32_t row_begin, row_end;
  char* data;     // channel c of the map's first cell, in the working type
  int64_t width;  // channels of a cell that belong to this part
  int64_t cell;   // elements from one cell to the next
  int64_t row;
};

template <class Item>
int32_t zero_rows(const Job<Item>& job, const Part& part, int32_t begin, int32_t end) {
  if (end <= begin) return begin;
  int64_t bytes = job.type.working_bytes;
  if (part.width == part.cell) {  // the cells are contiguous
    std::memset(at(part.data, begin * part.row, bytes), 0, (end - begin) * part.row * bytes);
    return end;
  }
  for (int64_t i = begin * part.row; i < end * part.row; i += part.cell)
    std::memset(at(part.data, i, bytes), 0, part.width * bytes);
  return end;
}

// Zeroes rows just before the first RoI that reaches them, when they are needed in the cache anyway.
// add(worker, roi, part) adds one RoI to the part.
template <class Item, class Add>
void sum_part(const Job<Item>& job, int64_t worker, const Part& part, const Add& add) {
  int32_t zeroed = part.row_begin;
  for (int64_t i = job.plan.begin(part.map); i < job.plan.end(part.map); i++) {
    const RoIItems<Item>& roi = job.plan[i];
    if (roi.empty() || roi.y.last < part.row_begin || roi.y.first >= part.row_end) continue;
    zeroed = zero_rows(job, part, zeroed, std::min(roi.y.last + 1, part.row_end));
    add(worker, roi, part);
  }
  zero_rows(job, part, zeroed, part.row_end);
}

// For channels_last in the working type: sums are written directly to the gradient map.
//
// By rows: a band of rows at a time, all channels. A RoI across the border of two bands is visited for both.
template <class Item, class Add>
void sum_rows(const Job<Item>& job, std::vector<Tensor>& out, int64_t workers, const Add& add) {
  constexpr int64_t kLeastRows = 16, kTasksPerWorker = 8;
  int64_t band = std::max(kLeastRows, job.rows() / (kTasksPerWorker * workers)), c = job.channels;
  std::vector<Part> parts;
  for (int m = 0; m < job.plan.maps(); m++) {
    char* data = at(out[m / job.pyramid.images].mutable_data_ptr(), job.offset(m), job.type.bytes);
    for (int64_t row = 0; row < job.height(m); row += band)
      parts.push_back({m, 0, c, static_cast<int32_t>(row), static_cast<int32_t>(std::min(job.height(m), row + band)),
                       data, c, c, job.width(m) * c});
  }
  for_each_task(parts.size(), workers,
                [&](int64_t worker, int64_t task) { sum_part(job, worker, parts[task], add); });
}

// By channels: all rows, some channels. A RoI's gradient that must be rearranged first is rearranged once.
template <class Item, class Add>
void sum_slices(const Job<Item>& job, std::vector<Tensor>& out, int64_t slice, int64_t workers, const Add& add) {
  int64_t slices = (job.channels + slice - 1) / slice;
  for_each_task(job.plan.maps() * slices, workers, [&](int64_t worker, int64_t task) {
    int map = static_cast<int>(task / slices);
    int64_t c = task % slices * slice, channels = std::min(slice, job.channels - c);
    char* data = at(out[map / job.pyramid.images].mutable_data_ptr(), job.offset(map) + c, job.type.bytes);
    sum_part(job, worker,
             {map, c, channels, 0, static_cast<int32_t>(job.height(map)), data, channels, job.channels,
              job.width(map) * job.channels},
             add);
  });
}

// For other layouts and types: a block of 16 channels of one map is summed in the working type, then stored once.
template <class Item, class Add>
void sum_by_block(const Job<Item>& job, std::vector<Tensor>& out, bool channels_last, int64_t workers, const Add& add) {
  int64_t width = job.block_width(), block_bytes = job.most_cells() * width * job.type.working_bytes;
  Scratch blocks(workers * block_bytes);
  for_each_task(job.block_tasks(), workers, [&](int64_t worker, int64_t task) {
    int map = static_cast<int>(task / job.blocks());
    int64_t c = task % job.blocks() * kBlock, channels = std::min<int64_t>(kBlock, job.channels - c);
    char* block = at(blocks.get(), worker * block_bytes, 1);
    Part part = {map,   c,     channels, 0,    static_cast<int32_t>(job.height(map)), block, width, width,
                 job.width(map) * width};
    sum_part(job, worker, part, add);
    void* data = out[map / job.pyramid.images].mutable_data_ptr();
    if (channels_last) {
      job.kernel.store_cells(block, width, job.cells(map), channels, at(data, job.offset(map) + c, job.type.bytes),
                             job.channels);
    } else {
      job.kernel.scatter_planes(block, width, job.cells(map), channels,
                                at(data, job.offset(map) + c * job.cells(map), job.type.bytes), job.cells(map));
    }
  });
}

// The gradient of every level. `rearranged`: whether the incoming gradient is first rearranged into cells, in scratch
// memory of `width()` channels for each of `workers()`.
template <class Item>
struct Gradient {
  const Job<Item>& job;
  bool channels_last, rearranged;

  bool in_place() const { return channels_last && job.type.bytes == job.type.working_bytes; }
  // Wide slices keep a cell's cache lines together; narrow slices occupy more threads.
  int64_t width() const {
    if (!in_place()) return kBlock;
    int64_t threads = torch::stable::get_num_threads(), width = 4 * kBlock;
    while (width > kBlock && job.channels / width < 2 * threads) width /= 2;
    return width;
  }
  int64_t workers() const {
    int64_t work = 4 * job.outputs() + job.plan.maps() * job.most_cells() * job.channels;
    return worker_count(in_place() && !rearranged ? job.rows() : job.block_tasks(), work);
  }
  template <class Add>
  void sum(std::vector<Tensor>& out, const Add& add) const {
    if (!in_place()) sum_by_block(job, out, channels_last, workers(), add);
    else if (rearranged) sum_slices(job, out, width(), workers(), add);
    else sum_rows(job, out, workers(), add);
  }
};

inline std::vector<Tensor> empty_gradients(const Tensor& grad, const std::vector<int64_t>& sizes, int levels,
                                           bool channels_last) {
  std::vector<Tensor> out;
  for (int l = 0; l < levels; l++)
    out.push_back(empty({sizes.begin() + 4 * l, sizes.begin() + 4 * l + 4}, grad, grad.scalar_type(), channels_last));
  return out;
}

inline void check_gradient(const Tensor& grad, const Tensor& boxes, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(grad.dim() == 4 && boxes.dim() == 2 && grad.size(0) == boxes.size(0) && sizes.size() >= 4 &&
                      grad.size(1) == sizes[1],
                  "the gradient must have shape (R, C, pooled_height, pooled_width)");
}

}  // namespace roi
