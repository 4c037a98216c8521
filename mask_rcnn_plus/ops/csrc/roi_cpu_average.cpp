// Average pooling on the CPU. The arithmetic is in roi_math.h, the inner loops in roi_cpu_average.h.
#include "roi_cpu_backward.h"
#include "roi_cpu_forward.h"

namespace roi {
namespace {

// Larger than the private caches of several cores, and a large part of the shared cache.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

bool should_stream(const void* out, int64_t numel, int64_t channels, const Type& type) {
  return numel * type.bytes >= kStreamBytes && channels * type.bytes % kStreamAlignment == 0 &&
         reinterpret_cast<uintptr_t>(out) % kStreamAlignment == 0;
}

template <class R>
Tensor average(const Call<R>& call, const std::vector<Tensor>& features, bool channels_last) {
  int64_t channels = features[0].size(1);
  int bins_y = call.sampling.bins_y, bins_x = call.sampling.bins_x;
  Tensor out = empty({call.count(), channels, bins_y, bins_x}, features[0], features[0].scalar_type(), channels_last);
  if (out.numel() == 0) return out;
  std::vector<Tensor> maps = dense_maps(features, channels_last);

  Type type = type_of(out.scalar_type());
  Plan<Tap<R>> plan(call.boxes(), call.count(), call.pyramid, call.sampling);
  Job<Tap<R>> job{kernels<R>(type.storage), type, plan, call.pyramid, call.sampling, channels};
  void* bins = out.mutable_data_ptr();
  if (channels_last) {
    bool streams = job.kernel.average_streaming && should_stream(bins, out.numel(), channels, type);
    auto pool = streams ? job.kernel.average_streaming : job.kernel.average;
    pool_channels_last(job, maps, [&](const RoITaps<R>& roi, const void* map, int64_t row, int64_t cell) {
      pool(roi, bins_y, bins_x, map, row, cell, channels, at(bins, roi.index * job.bins() * channels, type.bytes),
              channels);
    });
    return out;
  }
  int64_t workers = worker_count(job.block_tasks(), 4 * job.outputs());
  int64_t bytes = job.bins() * kBlock * type.working_bytes;
  Scratch scratch(workers * bytes);
  pool_planes(job, maps, workers, [&](int64_t worker, const RoITaps<R>& roi, const void* block, int64_t row,
                                      int64_t cell, int64_t c, int64_t some) {
    char* sums = at(scratch.get(), worker * bytes, 1);
    job.kernel.average_block(roi, bins_y, bins_x, block, row, cell, cell, sums, kBlock);
    job.kernel.scatter_planes(sums, kBlock, job.bins(), some,
                              at(bins, (roi.index * channels + c) * job.bins(), type.bytes), job.bins());
  });
  return out;
}

template <class R>
std::vector<Tensor> average_backward(const Call<R>& call, const Tensor& grad, const std::vector<int64_t>& sizes,
                                     bool channels_last) {
  std::vector<Tensor> out = empty_gradients(grad, sizes, call.pyramid.levels, channels_last);
  if (grad.numel() == 0) {
    for (Tensor& t : out) torch::stable::zero_(t);
    return out;
  }

  Tensor given = dense(grad);
  const void* bins = given.const_data_ptr();
  Type type = type_of(grad.scalar_type());
  Plan<Tap<R>> plan(call.boxes(), call.count(), call.pyramid, call.sampling);
  Job<Tap<R>> job{kernels<R>(type.storage), type, plan, call.pyramid, call.sampling, grad.size(1)};
  Gradient<Tap<R>> gradient{job, channels_last, !is_channels_last(given)};
  int bins_y = call.sampling.bins_y, bins_x = call.sampling.bins_x;
  if (is_channels_last(given)) {
    gradient.sum(out, [&](int64_t, const RoITaps<R>& roi, const Part& p) {
      job.kernel.spread(roi, bins_y, bins_x, at(bins, roi.index * job.bins() * job.channels + p.c, type.bytes),
                        job.channels, p.channels, p.data, p.row, p.cell, p.row_begin, p.row_end);
    });
    return out;
  }
  int64_t width = gradient.width(), bytes = job.bins() * width * type.working_bytes;
  Scratch scratch(gradient.workers() * bytes);
  gradient.sum(out, [&](int64_t worker, const RoITaps<R>& roi, const Part& p) {
    char* cells = at(scratch.get(), worker * bytes, 1);
    job.kernel.gather_planes(at(bins, (roi.index * job.channels + p.c) * job.bins(), type.bytes), job.bins(),
                             job.bins(), p.channels, cells, width);
    job.kernel.spread_block(roi, bins_y, bins_x, cells, width, p.channels, p.data, p.row, p.cell, p.row_begin,
                            p.row_end);
  });
  return out;
}

Tensor forward(std::vector<Tensor> features, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
               std::vector<double> scales, int64_t ratio, int64_t grid, int64_t min_level, double canonical_size,
               int64_t canonical_level, bool channels_last) {
  std::vector<int64_t> sizes = sizes_of(features);
  ScalarType type = features[0].scalar_type();
  return with_working_type(type, [&](auto real) {
    Call<decltype(real)> call(type, boxes, sizes, scales, pooled_height, pooled_width, ratio, grid, min_level,
                              canonical_size, canonical_level);
    check_averaged(call.sampling);
    return average(call, features, channels_last);
  });
}

std::vector<Tensor> backward(const Tensor& grad, const Tensor& boxes, std::vector<int64_t> sizes,
                             std::vector<double> scales, int64_t ratio, int64_t grid, int64_t min_level,
                             double canonical_size, int64_t canonical_level, bool channels_last) {
  check_gradient(grad, boxes, sizes);
  ScalarType type = grad.scalar_type();
  return with_working_type(type, [&](auto real) {
    Call<decltype(real)> call(type, boxes, sizes, scales, grad.size(2), grad.size(3), ratio, grid, min_level,
                              canonical_size, canonical_level);
    check_averaged(call.sampling);
    return average_backward(call, grad, sizes, channels_last);
  });
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
