// The RoI operators for CUDA: from torch's arguments to kernel launches. The kernels are in the .cuh files, and are
// compiled at first use.
//
// Nothing here waits for the device, so a box with a wrong image index cannot raise an exception: it fails an assertion
// in the kernel, which torch reports at the next synchronisation.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "roi_checks.h"
#include "roi_cuda_average.cuh"
#include "roi_cuda_average_backward.cuh"
#include "roi_cuda_max.cuh"
#include "roi_cuda_max_backward.cuh"

namespace roi::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Calls run(T()), where T is the features' type.
template <class Run>
void dispatch(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float: return run(float());
    case ScalarType::Double: return run(double());
    case ScalarType::Half: return run(Half());
    case ScalarType::BFloat16: return run(BFloat16());
    default: STD_TORCH_CHECK(false, "RoI operators take float32, float64, float16 or bfloat16 features");
  }
}

Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like, ScalarType type, bool channels_last) {
  return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, memory_format(channels_last));
}

// The tensor itself in either dense layout; a copy of anything else, such as an expanded scalar.
bool is_channels_last(const Tensor& t) { return t.size(1) > 1 && t.stride(1) == 1 && t.stride(3) == t.size(1); }

Tensor dense(const Tensor& t) { return torch::stable::contiguous(t, memory_format(is_channels_last(t))); }

template <class T>
Maps<const T> pointers_to(const std::vector<Tensor>& maps) {
  Maps<const T> out = {};
  for (size_t l = 0; l < maps.size(); l++) out.level[l] = static_cast<const T*>(maps[l].const_data_ptr());
  return out;
}

template <class T>
Maps<T> pointers_into(std::vector<Tensor>& maps) {
  Maps<T> out = {};
  for (size_t l = 0; l < maps.size(); l++) out.level[l] = static_cast<T*>(maps[l].mutable_data_ptr());
  return out;
}

template <class T>
T* into(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* from(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

void check_launched(bool launched) {
  STD_TORCH_CHECK(launched, "too many RoIs, channels or cells for one launch; split the call");
}

// The arguments of one call, and its features as the kernels read them.
struct Forward {
  Call call;
  Tensor boxes;
  std::vector<Tensor> maps;
};

Forward make_forward(const std::vector<Tensor>& features, const Tensor& boxes, const Pyramid& pyramid,
                     const Sampling& sampling, bool channels_last) {
  Call call = {pyramid, sampling, boxes.size(0), features[0].size(1), channels_last};
  Forward f = {call, torch::stable::contiguous(boxes), {}};
  for (const Tensor& t : features) f.maps.push_back(torch::stable::contiguous(t, memory_format(channels_last)));
  return f;
}

void check_device(const Tensor& boxes, const Tensor& other) {
  STD_TORCH_CHECK(boxes.is_cuda() && other.is_cuda() && boxes.get_device_index() == other.get_device_index(),
                  "boxes and features must be on one CUDA device");
}

void check_forward(const std::vector<Tensor>& features, const Tensor& boxes) {
  check_boxes(boxes, features.empty() ? ScalarType::Float : features[0].scalar_type());
  for (const Tensor& t : features) check_device(boxes, t);
}

Tensor average(std::vector<Tensor> features, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
               std::vector<double> scales, int64_t ratio, int64_t grid, int64_t min_level, double canonical_size,
               int64_t canonical_level, bool channels_last) {
  check_forward(features, boxes);
  Pyramid pyramid = make_pyramid(sizes_of(features), scales, min_level, canonical_size, canonical_level);
  Sampling sampling = make_sampling(pooled_height, pooled_width, ratio, grid);
  check_averaged(sampling);
  DeviceGuard guard(boxes.get_device_index());
  Tensor out = empty({boxes.size(0), features[0].size(1), pooled_height, pooled_width}, features[0],
                     features[0].scalar_type(), channels_last);
  if (out.numel() == 0) return out;
  Forward f = make_forward(features, boxes, pyramid, sampling, channels_last);
  dispatch(out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    check_launched(launch_average<T>(f.call, pointers_to<T>(f.maps), from<Working<T>>(f.boxes), into<T>(out),
                                     boxes.get_device_index()));
  });
  return out;
}

std::tuple<Tensor, Tensor> maximum(std::vector<Tensor> features, const Tensor& boxes, int64_t pooled_height,
                                   int64_t pooled_width, std::vector<double> scales, int64_t ratio, int64_t grid,
                                   int64_t min_level, double canonical_size, int64_t canonical_level,
                                   bool channels_last) {
  check_forward(features, boxes);
  Pyramid pyramid = make_pyramid(sizes_of(features), scales, min_level, canonical_size, canonical_level);
  Sampling sampling = make_sampling(pooled_height, pooled_width, ratio, grid);
  check_planes(pyramid);
  DeviceGuard guard(boxes.get_device_index());
  std::vector<int64_t> sizes = {boxes.size(0), features[0].size(1), pooled_height, pooled_width};
  Tensor out = empty(sizes, features[0], features[0].scalar_type(), channels_last);
  Tensor index = empty(sizes, features[0], ScalarType::Int, channels_last);
  if (out.numel() == 0) return {out, index};
  Forward f = make_forward(features, boxes, pyramid, sampling, channels_last);
  dispatch(out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    check_launched(launch_max<T>(f.call, pointers_to<T>(f.maps), from<Working<T>>(f.boxes), into<T>(out), into<int>(index),
                                 boxes.get_device_index()));
  });
  return {out, index};
}

// The gradient of every map; `index` is null for the average.
std::vector<Tensor> gradients(const Tensor& grad, const Tensor* index, const Tensor& boxes,
                              const std::vector<int64_t>& sizes, const Pyramid& pyramid, int64_t ratio, int64_t grid,
                              bool channels_last) {
  check_boxes(boxes, grad.scalar_type());
  check_device(boxes, grad);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == sizes[1],
                  "the gradient must have shape (R, C, pooled_height, pooled_width)");
  Sampling sampling = make_sampling(grad.size(2), grad.size(3), ratio, grid);
  if (index == nullptr) check_averaged(sampling);
  DeviceGuard guard(boxes.get_device_index());
  std::vector<Tensor> out;
  for (int l = 0; l < pyramid.levels; l++)
    out.push_back(empty({sizes.begin() + 4 * l, sizes.begin() + 4 * l + 4}, grad, grad.scalar_type(), channels_last));
  if (grad.numel() == 0) {
    for (Tensor& t : out) torch::stable::zero_(t);
    return out;
  }

  Call call = {pyramid, sampling, boxes.size(0), grad.size(1), channels_last};
  Tensor rois = torch::stable::contiguous(boxes);
  // For channels_last maps, a box head that flattens its input returns an NCHW gradient. Converting it once costs
  // less than reading one layout and writing the other at every cell.
  Tensor given = index == nullptr && channels_last ? torch::stable::contiguous(grad, memory_format(true)) : dense(grad);
  dispatch(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using W = Working<T>;
    Tensor memory = torch::stable::empty({Plan<W>::bytes(call.rois, maps_of(call))}, ScalarType::Byte, std::nullopt,
                                         grad.device());
    Plan<W> plan = Plan<W>::in(memory.mutable_data_ptr(), call.rois);
    if (index == nullptr) {
      check_launched(launch_average_backward<T>(call, from<W>(rois), from<T>(given),
                                                channels_last || is_channels_last(given),
                                                pointers_into<T>(out), plan, boxes.get_device_index()));
      return;
    }
    Tensor points = dense(*index);
    check_launched(launch_max_backward<T>(call, from<W>(rois), from<T>(given), is_channels_last(given),
                                          from<int>(points), is_channels_last(points), pointers_into<T>(out), plan,
                                          boxes.get_device_index()));
  });
  return out;
}

std::vector<Tensor> average_backward(const Tensor& grad, const Tensor& boxes, std::vector<int64_t> sizes,
                                     std::vector<double> scales, int64_t ratio, int64_t grid, int64_t min_level,
                                     double canonical_size, int64_t canonical_level, bool channels_last) {
  Pyramid pyramid = make_pyramid(sizes, scales, min_level, canonical_size, canonical_level);
  return gradients(grad, nullptr, boxes, sizes, pyramid, ratio, grid, channels_last);
}

std::vector<Tensor> maximum_backward(const Tensor& grad, const Tensor& index, const Tensor& boxes,
                                     std::vector<int64_t> sizes, std::vector<double> scales, int64_t ratio,
                                     int64_t grid, int64_t min_level, double canonical_size, int64_t canonical_level,
                                     bool channels_last) {
  Pyramid pyramid = make_pyramid(sizes, scales, min_level, canonical_size, canonical_level);
  check_planes(pyramid);
  check_device(index, grad);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 4 && grad.dim() == 4,
                  "index must be int32, of the gradient's shape");
  for (int d = 0; d < 4; d++)
    STD_TORCH_CHECK(index.size(d) == grad.size(d), "index must be int32, of the gradient's shape");
  return gradients(grad, &index, boxes, sizes, pyramid, ratio, grid, channels_last);
}

}  // namespace
}  // namespace roi::cuda

// Called by mask_rcnn_plus/ops/kernels.py, first with `find` only.
extern "C" __attribute__((visibility("default"))) void roi_cuda_connect(void* find, void* set_context, void* launch,
                                                                        void* current_stream) {
  using roi::cuda::Driver;
  roi::cuda::driver = {reinterpret_cast<decltype(Driver::find)>(find),
                       reinterpret_cast<decltype(Driver::set_context)>(set_context),
                       reinterpret_cast<decltype(Driver::launch)>(launch),
                       reinterpret_cast<decltype(Driver::current_stream)>(current_stream)};
}

STABLE_TORCH_LIBRARY_IMPL(mask_rcnn_plus, CUDA, m) {
  m.impl("fpn_roi_align", TORCH_BOX(&roi::cuda::average));
  m.impl("fpn_roi_align_backward", TORCH_BOX(&roi::cuda::average_backward));
  m.impl("fpn_roi_max", TORCH_BOX(&roi::cuda::maximum));
  m.impl("fpn_roi_max_backward", TORCH_BOX(&roi::cuda::maximum_backward));
}
