// Average pooling on the CPU: which task works on which part of which tensor. The arithmetic is in roi_math.h, the
// inner loops in roi_cpu_kernels.h.
#include "roi_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <string>

#include "roi_checks.h"
#include "roi_cpu_parallel.h"

namespace roi {
namespace {

constexpr int64_t kRoIsPerTask = 8;

struct Type {
  Storage storage;
  int64_t bytes;          // of an element in a tensor
  int64_t working_bytes;  // of an element while it is summed
};

Type type_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return {Storage::kFloat, 4, 4};
    case ScalarType::Double: return {Storage::kDouble, 8, 8};
    case ScalarType::Half: return {Storage::kHalf, 2, 4};
    case ScalarType::BFloat16: return {Storage::kBFloat16, 2, 4};
    default: STD_TORCH_CHECK(false, "RoI operators take float32, float64, float16 or bfloat16 features");
  }
}

Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like, bool channels_last) {
  Tensor t = torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                  memory_format(channels_last));
  if (t.numel() > 0) use_huge_pages(t.mutable_data_ptr(), t.numel() * type_of(t.scalar_type()).bytes);
  return t;
}

bool is_channels_last(const Tensor& t) { return t.stride(1) == 1 && t.size(1) > 1; }

const char* at(const void* base, int64_t elements, int64_t bytes) {
  return static_cast<const char*>(base) + elements * bytes;
}
char* at(void* base, int64_t elements, int64_t bytes) { return static_cast<char*>(base) + elements * bytes; }

// One call's shared facts.
struct Job {
  const Kernels& kernel;
  Type type;
  const Plan& plan;
  const Pyramid& pyramid;
  const Sampling& sampling;
  int64_t channels;

  int64_t bins() const { return int64_t{sampling.bins_y} * sampling.bins_x; }
  int64_t height(int map) const { return pyramid.height[map / pyramid.images]; }
  int64_t width(int map) const { return pyramid.width[map / pyramid.images]; }
  int64_t cells(int map) const { return height(map) * width(map); }
  int64_t blocks(int64_t width_) const { return (channels + width_ - 1) / width_; }
  int64_t most_cells() const {
    int64_t most = 0;
    for (int m = 0; m < plan.maps(); m++) most = std::max(most, cells(m));
    return most;
  }
  // First element of a map within its level's tensor.
  int64_t offset(int map) const { return map % pyramid.images * channels * cells(map); }
};

// channels_last: a cell's channels are contiguous, so the inner loop runs over them in place.
void forward_channels_last(const Job& job, const std::vector<Tensor>& maps, Tensor& out) {
  int64_t tasks = (job.plan.size() + kRoIsPerTask - 1) / kRoIsPerTask, c = job.channels;
  for_each_task(tasks, worker_count(tasks, 4 * out.numel()), [&](int64_t, int64_t task) {
    for (int64_t i = task * kRoIsPerTask; i < std::min(job.plan.size(), (task + 1) * kRoIsPerTask); i++) {
      const RoITaps& roi = job.plan[i];
      int map = job.plan.map_of(i);
      const void* data = at(maps[map / job.pyramid.images].const_data_ptr(), job.offset(map), job.type.bytes);
      void* bins = at(out.mutable_data_ptr(), roi.index * job.bins() * c, job.type.bytes);
      job.kernel.forward(roi, job.sampling.bins_y, job.sampling.bins_x, data, job.width(map) * c, c, c, bins, c);
    }
  });
}

// NCHW: 16 channels of one map at a time are rearranged into a block with contiguous channels, a run of cells when
// first asked for: overlapping RoIs then share that work, and cells that no RoI reads cost nothing.
void forward_planes(const Job& job, const std::vector<Tensor>& maps, Tensor& out) {
  constexpr int64_t kRun = 16;
  int64_t tasks = job.plan.maps() * job.blocks(kBlock), workers = worker_count(tasks, 4 * out.numel());
  int64_t block_bytes = job.most_cells() * kBlock * job.type.working_bytes;
  int64_t bins_bytes = job.bins() * kBlock * job.type.working_bytes;
  Scratch blocks(workers * block_bytes), bins(workers * bins_bytes);
  std::vector<std::vector<char>> filled(workers);

  for_each_task(tasks, workers, [&](int64_t worker, int64_t task) {
    int map = static_cast<int>(task / job.blocks(kBlock));
    if (job.plan.begin(map) == job.plan.end(map)) return;
    int64_t c = task % job.blocks(kBlock) * kBlock, channels = std::min<int64_t>(kBlock, job.channels - c);
    int64_t width = job.width(map), plane = job.cells(map), runs = (width + kRun - 1) / kRun;
    const char* planes = at(maps[map / job.pyramid.images].const_data_ptr(), job.offset(map) + c * plane, job.type.bytes);
    char* block = at(blocks.get(), worker * block_bytes, 1);
    char* sums = at(bins.get(), worker * bins_bytes, 1);
    std::vector<char>& done = filled[worker];
    done.assign(runs * job.height(map), 0);

    for (int64_t i = job.plan.begin(map); i < job.plan.end(map); i++) {
      const RoITaps& roi = job.plan[i];
      if (!roi.empty())
        for (int64_t y = roi.y.first; y <= roi.y.last; y++)
          for (int64_t run = roi.x.first / kRun; run <= roi.x.last / kRun; run++) {
            char& is_done = done[y * runs + run];
            if (is_done) continue;
            is_done = 1;
            int64_t cell = y * width + run * kRun;
            job.kernel.gather_planes(at(planes, cell, job.type.bytes), plane, std::min(kRun, width - run * kRun),
                                     channels, at(block, cell * kBlock, job.type.working_bytes), kBlock);
          }
      job.kernel.forward_block(roi, job.sampling.bins_y, job.sampling.bins_x, block, width * kBlock, kBlock, kBlock,
                               sums, kBlock);
      job.kernel.scatter_planes(sums, kBlock, job.bins(), channels,
                                at(out.mutable_data_ptr(), (roi.index * job.channels + c) * job.bins(), job.type.bytes),
                                job.bins());
    }
  });
}

Tensor forward(std::vector<Tensor> features, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
               std::vector<double> scales, int64_t ratio, bool aligned, int64_t min_level, double canonical_size,
               int64_t canonical_level, bool channels_last) {
  check_boxes(boxes);
  Pyramid pyramid = make_pyramid(sizes_of(features), scales, min_level, canonical_size, canonical_level);
  Sampling sampling = make_sampling(pooled_height, pooled_width, ratio, aligned);
  Tensor rois = torch::stable::contiguous(boxes);
  check_images(rois.const_data_ptr<float>(), rois.size(0), pyramid.images);

  int64_t channels = features[0].size(1);
  Tensor out = empty({rois.size(0), channels, pooled_height, pooled_width}, features[0], channels_last);
  if (out.numel() == 0) return out;
  if (!has_cells(pyramid)) return torch::stable::zero_(out);
  std::vector<Tensor> maps;
  for (const Tensor& f : features) maps.push_back(torch::stable::contiguous(f, memory_format(channels_last)));

  Type type = type_of(out.scalar_type());
  Plan plan(rois.const_data_ptr<float>(), rois.size(0), pyramid, sampling);
  Job job{kernels(type.storage), type, plan, pyramid, sampling, channels};
  if (channels_last) forward_channels_last(job, maps, out);
  else forward_planes(job, maps, out);
  return out;
}

// Some rows and channels of one map's gradient. Nobody else writes there, and RoIs are added in the plan's order, so
// the sum is the same however many threads there are.
struct Part {
  int map;
  int64_t c, channels;
  int32_t row_begin, row_end;
  char* data;    // channel c of the map's first cell, in the working type
  int64_t cell;  // elements from one cell to the next
};

class GradientSum {
 public:
  // width: the most channels in a part.
  GradientSum(const Job& job, const Tensor& grad, int64_t width, int64_t workers)
      : job_(job), grad_(grad), width_((width + kBlock - 1) / kBlock * kBlock),
        bins_bytes_(job.bins() * width_ * job.type.working_bytes),
        bins_(is_channels_last(grad) ? 0 : workers * bins_bytes_) {}

  // Rows are zeroed just ahead of the RoIs that reach them, while they are about to be in cache anyway.
  void run(int64_t worker, const Part& part) const {
    int32_t zeroed = part.row_begin;
    for (int64_t i = job_.plan.begin(part.map); i < job_.plan.end(part.map); i++) {
      const RoITaps& roi = job_.plan[i];
      if (roi.empty() || roi.y.last < part.row_begin || roi.y.first >= part.row_end) continue;
      zeroed = zero_rows(part, zeroed, std::min(roi.y.last + 1, part.row_end));
      add(worker, roi, part);
    }
    zero_rows(part, zeroed, part.row_end);
  }

 private:
  int32_t zero_rows(const Part& part, int32_t begin, int32_t end) const {
    if (end <= begin) return begin;
    int64_t first = begin * job_.width(part.map), last = end * job_.width(part.map);
    // Cells lie side by side: a part is either all channels of a tensor or a whole block.
    std::memset(at(part.data, first * part.cell, job_.type.working_bytes), 0,
                (last - first) * part.cell * job_.type.working_bytes);
    return end;
  }

  void add(int64_t worker, const RoITaps& roi, const Part& part) const {
    int bins_y = job_.sampling.bins_y, bins_x = job_.sampling.bins_x;
    int64_t row = job_.width(part.map) * part.cell, first = roi.index * job_.bins() * job_.channels;
    if (is_channels_last(grad_)) {
      const char* grad = at(grad_.const_data_ptr(), first + part.c, job_.type.bytes);
      job_.kernel.backward(roi, bins_y, bins_x, grad, job_.channels, part.channels, part.data, row, part.cell,
                           part.row_begin, part.row_end);
      return;
    }
    char* bins = at(bins_.get(), worker * bins_bytes_, 1);
    job_.kernel.gather_planes(at(grad_.const_data_ptr(), first + part.c * job_.bins(), job_.type.bytes), job_.bins(),
                              job_.bins(), part.channels, bins, width_);
    job_.kernel.backward_block(roi, bins_y, bins_x, bins, width_, part.channels, part.data, row, part.cell,
                               part.row_begin, part.row_end);
  }

  const Job& job_;
  const Tensor& grad_;
  int64_t width_, bins_bytes_;
  Scratch bins_;
};

int64_t backward_work(const Job& job, const Tensor& grad) {
  return 4 * grad.numel() + job.plan.maps() * job.most_cells() * job.channels;
}

// channels_last, and the storage type is the one sums are made in: straight into the gradient map, a band of rows at a
// time. RoIs across a border of two bands are visited for both.
void backward_in_place(const Job& job, const Tensor& grad, std::vector<Tensor>& out) {
  constexpr int64_t kLeastRows = 16, kTasksPerWorker = 8;
  int64_t all_rows = 0;
  for (int m = 0; m < job.plan.maps(); m++) all_rows += job.height(m);
  int64_t workers = worker_count(all_rows, backward_work(job, grad));
  int64_t band = std::max(kLeastRows, all_rows / (kTasksPerWorker * workers));

  std::vector<Part> parts;
  for (int m = 0; m < job.plan.maps(); m++) {
    char* data = at(out[m / job.pyramid.images].mutable_data_ptr(), job.offset(m), job.type.bytes);
    for (int64_t row = 0; row < job.height(m); row += band)
      parts.push_back({m, 0, job.channels, static_cast<int32_t>(row),
                       static_cast<int32_t>(std::min(job.height(m), row + band)), data, job.channels});
  }
  GradientSum sum(job, grad, job.channels, workers);
  for_each_task(parts.size(), workers, [&](int64_t worker, int64_t task) { sum.run(worker, parts[task]); });
}

// Every other layout and type: a block of 16 channels of one map is summed in the working type, then stored once.
void backward_by_block(const Job& job, const Tensor& grad, std::vector<Tensor>& out, bool channels_last) {
  int64_t tasks = job.plan.maps() * job.blocks(kBlock), workers = worker_count(tasks, backward_work(job, grad));
  int64_t block_bytes = job.most_cells() * kBlock * job.type.working_bytes;
  Scratch blocks(workers * block_bytes);
  GradientSum sum(job, grad, kBlock, workers);
  for_each_task(tasks, workers, [&](int64_t worker, int64_t task) {
    int map = static_cast<int>(task / job.blocks(kBlock));
    int64_t c = task % job.blocks(kBlock) * kBlock, channels = std::min<int64_t>(kBlock, job.channels - c);
    char* block = at(blocks.get(), worker * block_bytes, 1);
    sum.run(worker, {map, c, channels, 0, static_cast<int32_t>(job.height(map)), block, kBlock});
    void* data = out[map / job.pyramid.images].mutable_data_ptr();
    if (channels_last) {
      job.kernel.store_cells(block, kBlock, job.cells(map), channels, at(data, job.offset(map) + c, job.type.bytes),
                             job.channels);
    } else {
      job.kernel.scatter_planes(block, kBlock, job.cells(map), channels,
                                at(data, job.offset(map) + c * job.cells(map), job.type.bytes), job.cells(map));
    }
  });
}

std::vector<Tensor> backward(const Tensor& grad, const Tensor& boxes, std::vector<int64_t> sizes,
                             std::vector<double> scales, int64_t ratio, bool aligned, int64_t min_level,
                             double canonical_size, int64_t canonical_level, bool channels_last) {
  check_boxes(boxes);
  Pyramid pyramid = make_pyramid(sizes, scales, min_level, canonical_size, canonical_level);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == sizes[1],
                  "the gradient must have shape (R, C, pooled_height, pooled_width)");
  Sampling sampling = make_sampling(grad.size(2), grad.size(3), ratio, aligned);
  Tensor rois = torch::stable::contiguous(boxes);
  check_images(rois.const_data_ptr<float>(), rois.size(0), pyramid.images);

  std::vector<Tensor> out;
  for (int l = 0; l < pyramid.levels; l++)
    out.push_back(empty({sizes.begin() + 4 * l, sizes.begin() + 4 * l + 4}, grad, channels_last));
  if (grad.numel() == 0 || !has_cells(pyramid)) {
    for (Tensor& t : out) torch::stable::zero_(t);
    return out;
  }

  // Either dense layout is read as it lies; anything else, such as an expanded scalar, is copied.
  Tensor dense = torch::stable::contiguous(
      grad, memory_format(is_channels_last(grad) && grad.stride(3) == grad.size(1)));
  Type type = type_of(grad.scalar_type());
  Plan plan(rois.const_data_ptr<float>(), rois.size(0), pyramid, sampling);
  Job job{kernels(type.storage), type, plan, pyramid, sampling, grad.size(1)};
  if (channels_last && type.bytes == type.working_bytes) backward_in_place(job, dense, out);
  else backward_by_block(job, dense, out, channels_last);
  return out;
}

std::string isa_name() { return cpu_isa(); }

}  // namespace
}  // namespace roi

STABLE_TORCH_LIBRARY_IMPL(mask_rcnn_plus, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&roi::isa_name));
}

STABLE_TORCH_LIBRARY_IMPL(mask_rcnn_plus, CPU, m) {
  m.impl("fpn_roi_align", TORCH_BOX(&roi::forward));
  m.impl("fpn_roi_align_backward", TORCH_BOX(&roi::backward));
}
