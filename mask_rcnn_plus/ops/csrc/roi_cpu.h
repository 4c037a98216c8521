// What the CPU sources share: the plan of a call, and the inner loops that exist once for each instruction set.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "roi_math.h"

namespace roi {

// What one axis of a bin reads. Averaging is separable and reads each cell once, with the sum of its samples' weights;
// a maximum has to see every point.
struct Tap {
  int32_t cell;
  float weight;
};
struct Point {
  int32_t cell;
  float low, high;  // weights of `cell` and of cell + 1; high is 0 where only one cell is read
};

// One axis of one RoI: bin b reads items[begin[b]] .. items[begin[b + 1]]. `first` and `last` bound the cells in use;
// last < first where the RoI misses the map.
template <class Item>
struct AxisItems {
  const int32_t* begin;
  const Item* items;
  int32_t first, last;
  int32_t samples;  // a bin's samples, those outside the map included; kWholeCells for RoIPool
};

template <class Item>
struct RoIItems {
  int64_t index;  // row of the boxes and of the output
  bool defined;
  AxisItems<Item> y, x;  // the weights of Taps in y include 1 / samples
  bool empty() const { return y.last < y.first || x.last < x.first; }
};
using RoITaps = RoIItems<Tap>;
using RoIPoints = RoIItems<Point>;

// Every box of a call, grouped by map (level-major, then image) and within a map ordered from top to bottom, so that
// neighbours in time are neighbours in memory. Takes memory in proportion to RoIs x (bins + items along their sides).
template <class Item>
class Plan {
 public:
  Plan(const float* boxes, int64_t count, const Pyramid& pyramid, const Sampling& sampling);

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

// Channels that a channels-first map is worked on at a time: its values are brought, 16 channels to a cell, into a
// block whose cells are then contiguous.
constexpr int kBlock = 16;

// The inner loops for one storage type. Storage is the tensors' type; working is float, or double for double.
// Strides count elements. A map has row and cell strides; bins are contiguous rows of channels, `stride` apart.
struct Kernels {
  // Averages every bin of one RoI: storage map to storage bins, and working block to working bins.
  void (*average)(const RoITaps&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell, int64_t channels,
                  void* bins, int64_t stride);
  void (*average_block)(const RoITaps&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell,
                        int64_t channels, void* bins, int64_t stride);
  // average for bins at multiples of kStreamAlignment bytes, written past the caches: an output larger than those would
  // be fetched only to be overwritten. fp32 alone; null for other types.
  void (*average_streaming)(const RoITaps&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell,
                            int64_t channels, void* bins, int64_t stride);
  // Adds the gradient of every bin of one RoI to the rows [row_begin, row_end) of a working map: storage gradient, and
  // working gradient.
  void (*spread)(const RoITaps&, int bins_y, int bins_x, const void* bins, int64_t stride, int64_t channels, void* map,
                 int64_t row, int64_t cell, int32_t row_begin, int32_t row_end);
  void (*spread_block)(const RoITaps&, int bins_y, int bins_x, const void* bins, int64_t stride, int64_t channels,
                       void* map, int64_t row, int64_t cell, int32_t row_begin, int32_t row_end);
  // The same for the maximum; `points`, of the bins' strides, tells which point it was.
  void (*maximum)(const RoIPoints&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell,
                  int64_t channels, void* bins, int32_t* points, int64_t stride);
  void (*maximum_block)(const RoIPoints&, int bins_y, int bins_x, const void* map, int64_t row, int64_t cell,
                        int64_t channels, void* bins, int32_t* points, int64_t stride);
  void (*route)(const RoIPoints&, int bins_y, int bins_x, const void* bins, const int32_t* points, int64_t stride,
                int64_t channels, void* map, int64_t row, int64_t cell, int32_t row_begin, int32_t row_end);
  void (*route_block)(const RoIPoints&, int bins_y, int bins_x, const void* bins, const int32_t* points,
                      int64_t stride, int64_t channels, void* map, int64_t row, int64_t cell, int32_t row_begin,
                      int32_t row_end);
  // Channel planes of storage, `plane` apart, to working cells, `cell` apart, and back. Gathering fills the cells with
  // zeros up to a whole number of vectors or to the next cell; the way back may read a vector beyond the last cell.
  void (*gather_planes)(const void* planes, int64_t plane, int64_t cells, int64_t channels, void* out, int64_t cell);
  void (*scatter_planes)(const void* in, int64_t cell, int64_t cells, int64_t channels, void* planes, int64_t plane);
  // Working cells to storage cells.
  void (*store_cells)(const void* in, int64_t in_cell, int64_t cells, int64_t channels, void* out, int64_t out_cell);
  // Bit i of `bits`: whether the sample of a mask between four cells, with the weights west, east, north[i] and
  // south[i], reaches the threshold. Weights may be read a vector beyond `count`. fp32 alone; null for other types.
  void (*reach)(const MaskCell&, float west, float east, const float* north, const float* south, int64_t count,
                float threshold, uint64_t* bits);
  // The same with each product and sum rounded once.
  void (*reach_fused)(const MaskCell&, float west, float east, const float* north, const float* south, int64_t count,
                      float threshold, uint64_t* bits);
};

constexpr int64_t kStreamAlignment = 64;

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// Null where this build or this machine lacks the instruction set.
const Kernels* kernels_avx512(Storage storage);
const Kernels* kernels_avx2(Storage storage);
const Kernels* kernels_baseline(Storage storage);

// The widest instruction set of this machine, or the one MASK_RCNN_PLUS_CPU_ISA names: avx512, avx2 or baseline.
const char* cpu_isa();
const Kernels& kernels(Storage storage);

// Uninitialised memory, with room to read a vector beyond its end, that asks for huge pages: touching it for the first time is then hundreds of times fewer faults.
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
