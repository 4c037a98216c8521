// One call on the CPU: its tensors, and how they are divided into tasks. The callers define what is done with a RoI, an
// average or a maximum.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "roi_checks.h"
#include "roi_cpu.h"
#include "roi_cpu_parallel.h"

namespace roi {

struct Type {
  Storage storage;
  int64_t bytes;          // bytes of an element in a tensor
  int64_t working_bytes;  // bytes of an element while it is summed
};

// Calls run(R()), where R is the working type of the features' type.
template <class Run>
auto with_working_type(ScalarType features, const Run& run) {
  return features == ScalarType::Double ? run(double()) : run(float());
}

inline Type type_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return {Storage::kFloat, 4, 4};
    case ScalarType::Double: return {Storage::kDouble, 8, 8};
    case ScalarType::Half: return {Storage::kHalf, 2, 4};
    case ScalarType::BFloat16: return {Storage::kBFloat16, 2, 4};
    default: STD_TORCH_CHECK(false, "RoI operators take float32, float64, float16 or bfloat16 features");
  }
}

inline Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like, ScalarType type, bool channels_last) {
  Tensor t = torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, memory_format(channels_last));
  int64_t bytes = type == ScalarType::Int ? 4 : type_of(type).bytes;
  if (t.numel() > 0) use_huge_pages(t.mutable_data_ptr(), t.numel() * bytes);
  return t;
}

inline bool is_channels_last(const Tensor& t) { return t.stride(1) == 1 && t.size(1) > 1; }

// The tensor itself in either dense layout; a copy of anything else, such as an expanded scalar.
inline Tensor dense(const Tensor& t) {
  return torch::stable::contiguous(t, memory_format(is_channels_last(t) && t.stride(3) == t.size(1)));
}

inline std::vector<Tensor> dense_maps(const std::vector<Tensor>& features, bool channels_last) {
  std::vector<Tensor> maps;
  for (const Tensor& f : features) maps.push_back(torch::stable::contiguous(f, memory_format(channels_last)));
  return maps;
}

inline const char* at(const void* base, int64_t elements, int64_t bytes) {
  return static_cast<const char*>(base) + elements * bytes;
}
inline char* at(void* base, int64_t elements, int64_t bytes) { return static_cast<char*>(base) + elements * bytes; }

// The arguments that all operators have in common. `features` is the type of the maps.
template <class R>
struct Call {
  Pyramid pyramid;
  Sampling sampling;
  Tensor rois;  // dense

  Call(ScalarType features, const Tensor& boxes, const std::vector<int64_t>& sizes, const std::vector<double>& scales, int64_t bins_y,
       int64_t bins_x, int64_t ratio, int64_t grid, int64_t min_level, double canonical_size, int64_t canonical_level)
      : pyramid(make_pyramid(sizes, scales, min_level, canonical_size, canonical_level)),
        sampling(make_sampling(bins_y, bins_x, ratio, grid)), rois((check_boxes(boxes, features), torch::stable::contiguous(boxes))) {
    check_images(this->boxes(), count(), pyramid.images);
  }

  const R* boxes() const { return rois.const_data_ptr<R>(); }
  int64_t count() const { return rois.size(0); }
};

// The data that all tasks of a call share.
template <class Item>
struct Job {
  const Kernels<typename Item::Real>& kernel;
  Type type;
  const Plan<Item>& plan;
  const Pyramid& pyramid;
  const Sampling& sampling;
  int64_t channels;

  int64_t bins() const { return int64_t{sampling.bins_y} * sampling.bins_x; }
  int64_t height(int map) const { return pyramid.height[map / pyramid.images]; }
  int64_t width(int map) const { return pyramid.width[map / pyramid.images]; }
  int64_t cells(int map) const { return height(map) * width(map); }
  int64_t outputs() const { return plan.size() * channels * bins(); }
  // The number of blocks of kBlock channels, and that of all maps.
  int64_t blocks() const { return (channels + kBlock - 1) / kBlock; }
  // Channels per cell of a block: a huge map of few channels must not use memory for 16.
  int64_t block_width() const { return std::min<int64_t>(kBlock, (channels + 3) / 4 * 4); }
  int64_t block_tasks() const { return plan.maps() * blocks(); }
  // The number of rows of all maps.
  int64_t rows() const {
    int64_t all = 0;
    for (int m = 0; m < plan.maps(); m++) all += height(m);
    return all;
  }
  int64_t most_cells() const {
    int64_t most = 0;
    for (int m = 0; m < plan.maps(); m++) most = std::max(most, cells(m));
    return most;
  }
  // The first element of a map in its level's tensor.
  int64_t offset(int map) const { return map % pyramid.images * channels * cells(map); }
};

}  // namespace roi
