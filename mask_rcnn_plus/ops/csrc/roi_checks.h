// Converts an operator's arguments to the geometry's types. The checks prevent direct calls from reading out of bounds;
// the Python functions, which users call, have clearer messages.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "roi_math.h"

namespace roi {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline MemoryFormat memory_format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// sizes: (N, C, H, W) of each level, in one list.
inline Pyramid make_pyramid(const std::vector<int64_t>& sizes, const std::vector<double>& scales, int64_t min_level,
                            double canonical_size, int64_t canonical_level) {
  STD_TORCH_CHECK(!scales.empty() && scales.size() <= kMaxLevels, "expected 1 to ", kMaxLevels, " levels, got ",
                  scales.size());
  STD_TORCH_CHECK(sizes.size() == 4 * scales.size(), "expected four sizes for each of ", scales.size(), " scales, got ",
                  sizes.size());
  Pyramid p = {};
  p.levels = static_cast<int>(scales.size());
  p.min_level = static_cast<int>(min_level);
  p.canonical_level = static_cast<int>(canonical_level);
  p.canonical_size = canonical_size;
  for (int l = 0; l < p.levels; l++) {
    const int64_t* s = &sizes[4 * l];
    STD_TORCH_CHECK(s[0] == sizes[0] && s[1] == sizes[1], "level ", l, " has ", s[0], " images and ", s[1],
                    " channels, level 0 has ", sizes[0], " and ", sizes[1]);
    STD_TORCH_CHECK(s[0] < INT32_MAX && s[2] < INT32_MAX && s[3] < INT32_MAX, "a side of level ", l, " exceeds 2^31");
    // The loops need at least one cell to clamp to.
    STD_TORCH_CHECK(s[2] > 0 && s[3] > 0, "level ", l, " has no cells: ", s[2], " x ", s[3]);
    p.scale[l] = scales[l];
    p.height[l] = static_cast<int>(s[2]);
    p.width[l] = static_cast<int>(s[3]);
  }
  p.images = static_cast<int>(sizes[0]);
  return p;
}

inline Sampling make_sampling(int64_t bins_y, int64_t bins_x, int64_t ratio, int64_t grid) {
  STD_TORCH_CHECK(bins_y > 0 && bins_x > 0 && bins_y <= kMaxBins && bins_x <= kMaxBins, "output_size must be 1 to ",
                  kMaxBins, ", got (", bins_y, ", ", bins_x, ")");
  STD_TORCH_CHECK(ratio <= kMaxSamples, "sampling_ratio must be at most ", kMaxSamples, ", got ", ratio);
  STD_TORCH_CHECK(grid >= 0 && grid <= 3, "grid must be 0 to 3, got ", grid);
  return {static_cast<int>(bins_y), static_cast<int>(bins_x), static_cast<int>(ratio > 0 ? ratio : 0),
          static_cast<Grid>(grid)};
}

inline void check_averaged(const Sampling& s) { STD_TORCH_CHECK(s.grid != Grid::kPool, "RoIPool has no average"); }

// The index of a maximum has 32 bits.
inline void check_planes(const Pyramid& p) {
  for (int l = 0; l < p.levels; l++)
    STD_TORCH_CHECK(int64_t{p.height[l]} * p.width[l] <= INT32_MAX,
                    "max pooling takes maps of fewer than 2^31 cells; level ", l, " has ", p.height[l], " x ",
                    p.width[l]);
}

// features: the type of the maps.
inline void check_boxes(const Tensor& boxes, ScalarType features) {
  ScalarType type = features == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5 && boxes.scalar_type() == type,
                  "boxes must be a tensor of shape (R, 5), float64 for float64 features and float32 for others");
}

// (N, C, H, W) of each map, in one list.
inline std::vector<int64_t> sizes_of(const std::vector<Tensor>& maps) {
  STD_TORCH_CHECK(!maps.empty(), "expected at least one feature map");
  std::vector<int64_t> sizes;
  for (const Tensor& m : maps) {
    STD_TORCH_CHECK(m.dim() == 4, "a feature map must have shape (N, C, H, W), got ", m.dim(), " dimensions");
    STD_TORCH_CHECK(m.scalar_type() == maps[0].scalar_type(), "feature maps must share one dtype");
    sizes.insert(sizes.end(), m.sizes().begin(), m.sizes().end());
  }
  return sizes;
}

// For boxes in host memory.
template <class R>
void check_images(const R* boxes, int64_t count, int images) {
  for (int64_t i = 0; i < count; i++)
    STD_TORCH_CHECK(image_of(boxes + 5 * i, images) >= 0, "boxes[", i, "] names image ", boxes[5 * i],
                    ", but the features hold images 0 to ", images - 1,
                    "; the first column of boxes must be a whole number in that range");
}

}  // namespace roi
