// Max pooling on the CPU: RoIPool, and the maximum of the samples of RoIAlign and RoIWarp. The inner loops are in
// roi_cpu_max.h.
#include <tuple>

#include "roi_cpu_backward.h"
#include "roi_cpu_forward.h"

namespace roi {
namespace {

// Points and values of a block are stored together, so 32-bit points are copied as floats with the same bits.
const Kernels<float>& movers() { return kernels<float>(Storage::kFloat); }

template <class R>
std::tuple<Tensor, Tensor> maximum(const Call<R>& call, const std::vector<Tensor>& features, bool channels_last) {
  int64_t channels = features[0].size(1);
  int bins_y = call.sampling.bins_y, bins_x = call.sampling.bins_x;
  std::vector<int64_t> shape = {call.count(), channels, bins_y, bins_x};
  Tensor out = empty(shape, features[0], features[0].scalar_type(), channels_last);
  Tensor index = empty(shape, features[0], ScalarType::Int, channels_last);
  if (out.numel() == 0) return {out, index};
  std::vector<Tensor> maps = dense_maps(features, channels_last);

  Type type = type_of(out.scalar_type());
  Plan<Point<R>> plan(call.boxes(), call.count(), call.pyramid, call.sampling);
  Job<Point<R>> job{kernels<R>(type.storage), type, plan, call.pyramid, call.sampling, channels};
  void* bins = out.mutable_data_ptr();
  int32_t* points = static_cast<int32_t*>(index.mutable_data_ptr());
  if (channels_last) {
    pool_channels_last(job, maps, [&](const RoIPoints<R>& roi, const void* map, int64_t row, int64_t cell) {
      int64_t first = roi.index * job.bins() * channels;
      job.kernel.maximum(roi, bins_y, bins_x, map, row, cell, channels, at(bins, first, type.bytes), points + first,
                         channels);
    });
    return {out, index};
  }
  int64_t workers = worker_count(job.block_tasks(), 4 * job.outputs());
  int64_t bytes = job.bins() * kBlock * (type.working_bytes + 4);
  Scratch scratch(workers * bytes);
  pool_planes(job, maps, workers, [&](int64_t worker, const RoIPoints<R>& roi, const void* block, int64_t row,
                                      int64_t cell, int64_t c, int64_t some) {
    char* best = at(scratch.get(), worker * bytes, 1);
    int32_t* which = reinterpret_cast<int32_t*>(at(best, job.bins() * kBlock, type.working_bytes));
    job.kernel.maximum_block(roi, bins_y, bins_x, block, row, cell, cell, best, which, kBlock);
    int64_t first = (roi.index * channels + c) * job.bins();
    job.kernel.scatter_planes(best, kBlock, job.bins(), some, at(bins, first, type.bytes), job.bins());
    movers().scatter_planes(which, kBlock, job.bins(), some, points + first, job.bins());
  });
  return {out, index};
}

template <class R>
std::vector<Tensor> maximum_backward(const Call<R>& call, const Tensor& grad, const Tensor& index,
                                     const std::vector<int64_t>& sizes, bool channels_last) {
  std::vector<Tensor> out = empty_gradients(grad, sizes, call.pyramid.levels, channels_last);
  if (grad.numel() == 0) {
    for (Tensor& t : out) torch::stable::zero_(t);
    return out;
  }

  Tensor given = dense(grad), chosen = torch::stable::contiguous(index, memory_format(is_channels_last(given)));
  const void* bins = given.const_data_ptr();
  const int32_t* points = static_cast<const int32_t*>(chosen.const_data_ptr());
  Type type = type_of(grad.scalar_type());
  Plan<Point<R>> plan(call.boxes(), call.count(), call.pyramid, call.sampling);
  Job<Point<R>> job{kernels<R>(type.storage), type, plan, call.pyramid, call.sampling, grad.size(1)};
  Gradient<Point<R>> gradient{job, channels_last, !is_channels_last(given)};
  int bins_y = call.sampling.bins_y, bins_x = call.sampling.bins_x;
  if (is_channels_last(given)) {
    gradient.sum(out, [&](int64_t, const RoIPoints<R>& roi, const Part& p) {
      int64_t first = roi.index * job.bins() * job.channels + p.c;
      job.kernel.route(roi, bins_y, bins_x, at(bins, first, type.bytes), points + first, job.channels, p.channels,
                       p.data, p.row, p.cell, p.row_begin, p.row_end);
    });
    return out;
  }
  int64_t width = gradient.width(), bytes = job.bins() * width * (type.working_bytes + 4);
  Scratch scratch(gradient.workers() * bytes);
  gradient.sum(out, [&](int64_t worker, const RoIPoints<R>& roi, const Part& p) {
    char* cells = at(scratch.get(), worker * bytes, 1);
    int32_t* which = reinterpret_cast<int32_t*>(at(cells, job.bins() * width, type.working_bytes));
    int64_t first = (roi.index * job.channels + p.c) * job.bins();
    job.kernel.gather_planes(at(bins, first, type.bytes), job.bins(), job.bins(), p.channels, cells, width);
    movers().gather_planes(points + first, job.bins(), job.bins(), p.channels, which, width);
    job.kernel.route_block(roi, bins_y, bins_x, cells, which, width, p.channels, p.data, p.row, p.cell, p.row_begin,
                           p.row_end);
  });
  return out;
}

std::tuple<Tensor, Tensor> forward(std::vector<Tensor> features, const Tensor& boxes, int64_t pooled_height,
                                   int64_t pooled_width, std::vector<double> scales, int64_t ratio, int64_t grid,
                                   int64_t min_level, double canonical_size, int64_t canonical_level,
                                   bool channels_last) {
  std::vector<int64_t> sizes = sizes_of(features);
  ScalarType type = features[0].scalar_type();
  return with_working_type(type, [&](auto real) {
    Call<decltype(real)> call(type, boxes, sizes, scales, pooled_height, pooled_width, ratio, grid, min_level,
                              canonical_size, canonical_level);
    check_planes(call.pyramid);
    return maximum(call, features, channels_last);
  });
}

std::vector<Tensor> backward(const Tensor& grad, const Tensor& index, const Tensor& boxes, std::vector<int64_t> sizes,
                             std::vector<double> scales, int64_t ratio, int64_t grid, int64_t min_level,
                             double canonical_size, int64_t canonical_level, bool channels_last) {
  check_gradient(grad, boxes, sizes);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 4 && index.size(0) == grad.size(0) &&
                      index.size(1) == grad.size(1) && index.size(2) == grad.size(2) && index.size(3) == grad.size(3),
                  "index must be an int32 tensor of the gradient's shape");
  ScalarType type = grad.scalar_type();
  return with_working_type(type, [&](auto real) {
    Call<decltype(real)> call(type, boxes, sizes, scales, grad.size(2), grad.size(3), ratio, grid, min_level,
                              canonical_size, canonical_level);
    check_planes(call.pyramid);
    return maximum_backward(call, grad, index, sizes, channels_last);
  });
}

}  // namespace
}  // namespace roi

STABLE_TORCH_LIBRARY_IMPL(mask_rcnn_plus, CPU, m) {
  m.impl("fpn_roi_max", TORCH_BOX(&roi::forward));
  m.impl("fpn_roi_max_backward", TORCH_BOX(&roi::backward));
}
