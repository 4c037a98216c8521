// Shared by the CPU sources: the plan of a call, and the table of inner loops, which exists once per instruction set.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "roi_math.h"

namespace roi {

// The cells that one axis of a bin reads. Averaging is separable: it reads each cell once, with the sum of its samples' weights
// (Tap). A maximum needs every point (Point).
// R is the type of boxes and weights, which is also the working type of the sums.
template <class R>
struct Tap {
  using Real = R;
  int32_t cell;
  R weight;
};
template <class R>
struct Point {
  using Real = R;
  int32_t cell;
  R low, high;  // weights of `cell` and of cell + 1; high is 0 if only one cell is read
};

// One axis of one RoI: bin b reads the items [begin[b], begin[b + 1]). `first` and `last` are the first and last cells
// that it reads; last < first if the RoI is outside the map.
template <class Item>
struct AxisItems {
  const int32_t* begin;
  const Item* items;
  int32_t first, last;
  int32_t samples;  // samples of a bin, including those outside the map; kWholeCells for RoIPool
};

template <class Item>
struct RoIItems {
  int64_t index;  // row of the boxes and of the output
  bool defined;
  AxisItems<Item> y, x;  // the weights of Taps in y include 1 / samples
  bool empty() const { return y.last < y.first || x.last < x.first; }
};
template <class R>
using RoITaps = RoIItems<Tap<R>>;
template <class R>
using RoIPoints = RoIItems<Point<R>>;

// All boxes of a call, grouped by map (level-major, then image) and ordered from top to bottom within a map, so that
// successive RoIs read nearby memory. Its size is proportional to RoIs x (bins + items along their sides).
template <class Item>
class Plan {
 public:
  Plan(const typename Item::Real* boxes, int64_t count, const Pyramid& pyramid, const Sampling& sampling);

  int64_t size() const { return static_cast<int64_t>(rois_.size()); }
  const RoIItems<Item>& operator[](int64_t i) const { return rois_[i]; }
  int maps() const { return static_cast<int>(map_begin_.size()) - 1; }
  int64_t begin(int map) const { return map_begin_[map]; }
  int64_t end(int map) const { return map_begin_[map + 1]; }
  // The map of the i-th RoI.
  int map_of(int64_t i) const { return map_of_[i]; }

 private:
  struct Arena {
    std::vector<int32_t> begins;
    std::vector<Item> items;
  };
  std::vector<RoIItems<Item>> rois_;
  std::vector<int> map_of_;
  std::vector<int64_t> map_begin_;
  std::vector<Arena> arenas_;
};

// The four cells around a sample of a mask.
struct MaskCell {
  float nw, ne, sw, se;
};

// The number of channels of a channels-first map that are processed at a time: they are copied into a block in which
// the 16 channels of a cell are contiguous.
constexpr int kBlock = 16;

// The inner loops for one storage type, which is the tensors' type. R, the working type, is float, or double for double.
// Strides are in elements. A map has row and cell strides; bins are contiguous rows of channels, `stride` apart.
template <class R>
struct Kernels {
  // Averages every bin of one RoI. average: storage map to storage bins; average_block: working block to working bins.
  void (*average)(const RoITaps<R>&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell, int64_t channels,
                  void* bins, int64_t stride);
  void (*average_block)(const RoITaps<R>&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell,
                        int64_t channels, void* bins, int64_t stride);
  // average for bins at multiples of kStreamAlignment bytes, written with non-temporal stores: an output larger than
  // the caches would be fetched only to be overwritten. For fp32; null for other types.
  void (*average_streaming)(const RoITaps<R>&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell,
                            int64_t channels, void* bins, int64_t stride);
  // Adds the gradient of every bin of one RoI to the rows [row_begin, row_end) of a working map. spread: from a storage
  // gradient; spread_block: from a working gradient.
  void (*spread)(const RoITaps<R>&, int bins_y, int bins_x, const void* bins, int64_t stride, int64_t channels, void* map,
                 int64_t row, int64_t cell, int32_t row_begin, int32_t row_end);
  void (*spread_block)(const RoITaps<R>&, int bins_y, int bins_x, const void* bins, int64_t stride, int64_t channels,
                       void* map, int64_t row, int64_t cell, int32_t row_begin, int32_t row_end);
  // The same for the maximum; `points`, with the strides of the bins, are the indices of the maxima.
  void (*maximum)(const RoIPoints<R>&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell,
                  int64_t channels, void* bins, int32_t* points, int64_t stride);
  void (*maximum_block)(const RoIPoints<R>&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell,
                        int64_t channels, void* bins, int32_t* points, int64_t stride);
  void (*route)(const RoIPoints<R>&, int bins_y, int bins_x, const void* bins, const int32_t* points, int64_t stride,
                int64_t channels, void* map, int64_t row, int64_t cell, int32_t row_begin, int32_t row_end);
  void (*route_block)(const RoIPoints<R>&, int bins_y, int bins_x, const void* bins, const int32_t* points,
                      int64_t stride, int64_t channels, void* map, int64_t row, int64_t cell, int32_t row_begin,
                      int32_t row_end);
  // Copies channel planes of storage, `plane` apart, to working cells, `cell` apart, and back. Gathering fills the
  // cells with zeros up to a whole number of vectors or to the next cell; scattering may read a vector beyond the last
  // cell.
  void (*gather_planes)(const void* planes, int64_t plane, int64_t cells, int64_t channels, void* out, int64_t cell);
  void (*scatter_planes)(const void* in, int64_t cell, int64_t cells, int64_t channels, void* planes, int64_t plane);
  // Copies working cells to storage cells.
  void (*store_cells)(const void* in, int64_t in_cell, int64_t cells, int64_t channels, void* out, int64_t out_cell);
  // Sets bit i of `bits` if the sample of a mask between four cells, with the weights west, east, north[i] and
  // south[i], reaches the threshold. May read a vector of weights beyond `count`. For fp32; null for other types.
  void (*reach)(const MaskCell&, float west, float east, const float* north, const float* south, int64_t count,
                float threshold, uint64_t* bits);
  // The same with fused multiply-add, which rounds once.
  void (*reach_fused)(const MaskCell&, float west, float east, const float* north, const float* south, int64_t count,
                      float threshold, uint64_t* bits);
};

constexpr int64_t kStreamAlignment = 64;

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// Null if this build or this machine lacks the instruction set.
template <class R>
const Kernels<R>* kernels_avx512(Storage storage);
template <class R>
const Kernels<R>* kernels_avx2(Storage storage);
template <class R>
const Kernels<R>* kernels_baseline(Storage storage);

// The widest instruction set of this machine, or the one named by MASK_RCNN_PLUS_CPU_ISA: avx512, avx2 or baseline.
const char* cpu_isa();
template <class R>
const Kernels<R>& kernels(Storage storage);

// Uninitialised memory in huge pages, which cause hundreds of times fewer page faults, with room to read a vector
// beyond its end.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  void* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_;
};

void use_huge_pages(void* data, int64_t bytes);

}  // namespace roi
