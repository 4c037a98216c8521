// The geometry of all RoI operators, for host and device.
//
// A box is (image index, x0, y0, x1, y1) in input-image pixels, fp32. Each axis of a box on a map is an `Axis`: `bins`
// equal bins from `start`, each with `samples` regularly spaced points, on a map of `size` cells. A sample reads the
// two cells around it with linear weights; a cell's centre is at its integer index. Samples more than one cell outside
// the map count as zero, as in torchvision. RoIPool reads whole cells instead (`kWholeCells`).
//
// All arithmetic uses add/sub/mul/div below. They are never contracted into fused operations (the host compiles with
// -ffp-contract=off, the device uses the _rn intrinsics), so host and device agree bit for bit. The only exception is
// log2f exactly at a level border.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ROI_HD __host__ __device__ __forceinline__
#else
#define ROI_HD inline __attribute__((always_inline))
#endif

namespace roi {

// Kernels receive a Pyramid by value. No image can be halved 32 times.
constexpr int kMaxLevels = 32;
// Maximum samples per bin and axis of an adaptive grid, so that a flat sample index fits in 31 bits. A bin of more
// cells is larger than any map.
constexpr int kMaxSamples = 32768;
// Maximum bins per axis, so that a box's bins can be counted in 31 bits.
constexpr int kMaxBins = 32768;
// A value of Axis::samples: every cell of a bin is a point.
constexpr int kWholeCells = -1;

#ifdef __CUDA_ARCH__
ROI_HD float add(float a, float b) { return __fadd_rn(a, b); }
ROI_HD float sub(float a, float b) { return __fsub_rn(a, b); }
ROI_HD float mul(float a, float b) { return __fmul_rn(a, b); }
ROI_HD float div(float a, float b) { return __fdiv_rn(a, b); }
ROI_HD float root(float a) { return __fsqrt_rn(a); }
#else
ROI_HD float add(float a, float b) { return a + b; }
ROI_HD float sub(float a, float b) { return a - b; }
ROI_HD float mul(float a, float b) { return a * b; }
ROI_HD float div(float a, float b) { return a / b; }
ROI_HD float root(float a) { return std::sqrt(a); }
#endif

ROI_HD bool is_finite(float v) { return sub(v, v) == 0.f; }

struct Pyramid {
  int levels;
  int images;
  float min_level;        // FPN's number of the first map: 2 for P2
  float canonical_level;  // the level of a box whose side is canonical_size pixels
  float canonical_size;
  float scale[kMaxLevels];
  int height[kMaxLevels];
  int width[kMaxLevels];
};

// How a box is converted to a grid of points on a map.
enum class Grid : int {
  kAlign = 0,      // RoIAlign with torchvision's aligned=False: no shift, at least one cell per side
  kAlignHalf = 1,  // RoIAlign, shifted by half a cell, so that pixel and cell centres coincide
  kWarp = 2,       // RoIWarp: the border rounded to whole cells, samples inside
  kPool = 3,       // RoIPool: border and bins rounded to whole cells
};

struct Sampling {
  int bins_y, bins_x;
  int ratio;  // samples per bin and axis; <= 0: the bin's size in cells, rounded up
  Grid grid;
};

struct Axis {
  float start, bin;
  int samples, size;
};

struct RoI {
  int level;
  bool defined;  // false if a coordinate is not finite, or the box is too large for fp32
  Axis y, x;
  float inv_count;  // 1 / samples in a bin
};

// FPN, equation 1, with detectron2's rounding: floor(k0 + log2(sqrt(area) / 224 + 1e-8)), clamped to the existing
// levels. A box of negative area is treated as empty.
ROI_HD int level_of(const float* box, const Pyramid& p) {
  if (p.levels == 1) return 0;
  float area = mul(sub(box[3], box[1]), sub(box[4], box[2]));
  float side = root(area > 0.f ? area : 0.f);
  float level = floorf(add(p.canonical_level, log2f(add(div(side, p.canonical_size), 1e-8f))));
  float index = sub(level, p.min_level);
  float last = (float)(p.levels - 1);
  return index > 0.f ? (int)(index < last ? index : last) : 0;
}

ROI_HD Axis make_axis(float lo, float hi, float scale, int bins, const Sampling& s, int size) {
  Axis a;
  a.size = size;
  float length;
  if (s.grid == Grid::kWarp || s.grid == Grid::kPool) {
    // Both border cells belong to the box; halves round away from zero.
    float first = roundf(mul(lo, scale));
    length = add(sub(roundf(mul(hi, scale)), first), 1.f);
    a.start = s.grid == Grid::kWarp ? sub(first, 0.5f) : first;
  } else {
    float offset = s.grid == Grid::kAlignHalf ? 0.5f : 0.f;
    a.start = sub(mul(lo, scale), offset);
    length = sub(sub(mul(hi, scale), offset), a.start);
  }
  // Versions before half-cell alignment widened boxes to at least one cell; their grids keep that.
  if (s.grid != Grid::kAlignHalf && !(length > 1.f)) length = 1.f;
  a.bin = div(length, (float)bins);
  float adaptive = ceilf(a.bin);
  adaptive = adaptive > 0.f ? (adaptive < (float)kMaxSamples ? adaptive : (float)kMaxSamples) : 0.f;
  a.samples = s.grid == Grid::kPool ? kWholeCells : s.ratio > 0 ? s.ratio : (int)adaptive;
  return a;
}

ROI_HD RoI locate(const float* box, const Pyramid& p, const Sampling& s) {
  RoI r;
  r.defined = is_finite(box[1]) && is_finite(box[2]) && is_finite(box[3]) && is_finite(box[4]);
  r.level = r.defined ? level_of(box, p) : 0;
  float scale = p.scale[r.level];
  r.x = make_axis(box[1], box[3], scale, s.bins_x, s, p.width[r.level]);
  r.y = make_axis(box[2], box[4], scale, s.bins_y, s, p.height[r.level]);
  r.defined = r.defined && is_finite(r.x.bin) && is_finite(r.y.bin) && is_finite(r.x.start) && is_finite(r.y.start);
  float count = mul((float)r.x.samples, (float)r.y.samples);
  r.inv_count = count > 1.f ? div(1.f, count) : 1.f;
  return r;
}

// The image that a box belongs to, or -1 if its index is not an integer in [0, images).
ROI_HD int image_of(const float* box, int images) {
  if (!(box[0] >= 0.f && box[0] < (float)images)) return -1;
  int n = (int)box[0];
  return (float)n == box[0] ? n : -1;
}

ROI_HD float bin_start(const Axis& a, int bin) { return add(a.start, mul((float)bin, a.bin)); }

ROI_HD float sample_at(const Axis& a, float bin_begin, int i) {
  return add(bin_begin, div(mul(add((float)i, 0.5f), a.bin), (float)a.samples));
}

ROI_HD bool is_inside(const Axis& a, float v) { return v >= -1.f && v <= (float)a.size; }

struct Range {
  int begin, end;
};

// The samples of a bin that are on the map. Rounding is monotone, so they are consecutive; a binary search finds the
// ends, since the grid may be far larger than the map.
ROI_HD Range samples_inside(const Axis& a, float bin_begin) {
  Range whole = {0, a.samples};
  if (a.samples <= 0) return whole;
  // A sample is between its bin's ends, also after rounding.
  if (is_inside(a, bin_begin) && is_inside(a, add(bin_begin, a.bin))) return whole;
  Range r;
  for (int end = 0; end < 2; end++) {
    int lo = 0, hi = a.samples;
    while (lo < hi) {
      int mid = lo + (hi - lo) / 2;
      float v = sample_at(a, bin_begin, mid);
      // Ascending samples enter the map at -1 and leave it after `size`; those of an inverted box descend.
      bool before = a.bin >= 0.f ? (end == 0 ? !(v >= -1.f) : v <= (float)a.size)
                                 : (end == 0 ? !(v <= (float)a.size) : v >= -1.f);
      if (before) lo = mid + 1; else hi = mid;
    }
    if (end == 0) r.begin = lo; else r.end = lo;
  }
  return r;
}

// The two cells that a sample reads: `low` with weight 1 - high_weight and low + 1 with high_weight (0 at the far
// border).
struct Cells {
  int low;
  float low_weight, high_weight;
};

ROI_HD Cells cells_of(const Axis& a, float v) {
  Cells c;
  if (!(v > 0.f)) v = 0.f;
  c.low = (int)v;
  if (c.low >= a.size - 1) {
    c.low = a.size - 1;
    v = (float)c.low;
  }
  c.high_weight = sub(v, (float)c.low);
  c.low_weight = sub(1.f, c.high_weight);
  return c;
}

// The points of a bin that are on the map: samples, or with kWholeCells the cells themselves.
ROI_HD Range points_of(const Axis& a, int bin) {
  if (a.samples != kWholeCells) return samples_inside(a, bin_start(a, bin));
  float last = (float)a.size;
  float begin = add(a.start, floorf(mul((float)bin, a.bin)));
  float end = add(a.start, ceilf(mul((float)(bin + 1), a.bin)));
  begin = begin > 0.f ? (begin < last ? begin : last) : 0.f;
  end = end > begin ? (end < last ? end : last) : begin;
  // As a float, a side of more than 2^24 cells may be rounded up.
  Range r = {(int)begin, (int)end};
  if (r.end > a.size) r.end = a.size;
  return r;
}

// The cells that point i of a bin reads; bin_begin is bin_start(a, bin).
ROI_HD Cells point_at(const Axis& a, float bin_begin, int i) {
  if (a.samples == kWholeCells) return {i, 1.f, 0.f};
  return cells_of(a, sample_at(a, bin_begin, i));
}

// Whether some of a bin's samples are outside the map, where they count as zero.
ROI_HD bool reads_outside(const Axis& y, Range in_y, const Axis& x, Range in_x) {
  if (y.samples <= 0 || x.samples <= 0) return false;
  return in_y.end - in_y.begin < y.samples || in_x.end - in_x.begin < x.samples;
}

// The cells [begin, end) that a bin reads; empty if begin >= end.
ROI_HD Range cells_read(const Axis& a, int bin) {
  Range points = points_of(a, bin);
  if (points.begin >= points.end) return {0, 0};
  float begin = bin_start(a, bin);
  Cells first = point_at(a, begin, points.begin), last = point_at(a, begin, points.end - 1);
  if (last.low < first.low) {  // the points of an inverted box descend
    Cells swap = first;
    first = last;
    last = swap;
  }
  // If both points are between the same cells, either may reach the upper cell.
  bool upper = last.high_weight != 0.f || (first.low == last.low && first.high_weight != 0.f);
  return {first.low, last.low + (upper ? 2 : 1)};
}

// Calls emit(cell, weight) once for each cell that a bin reads, in the samples' order (ascending, or descending for an
// inverted box). The weight is the sum over the samples, in that order. Average pooling is separable, so it only needs
// these weights, one list per axis.
template <class Emit>
ROI_HD void merged_taps(const Axis& a, int bin, Emit&& emit) {
  float begin = bin_start(a, bin);
  Range range = samples_inside(a, begin);
  int cell = -1;  // the pending pair is (cell, cell + 1)
  float low = 0.f, high = 0.f;
  for (int i = range.begin; i < range.end; i++) {
    Cells c = cells_of(a, sample_at(a, begin, i));
    if (c.low != cell) {
      bool up = cell >= 0 && c.low == cell + 1, down = cell >= 0 && c.low == cell - 1;
      // The cells of an inverted box descend.
      if (high != 0.f && !up && c.low < cell) emit(cell + 1, high);
      if (low != 0.f && !down) emit(cell, low);
      if (high != 0.f && !up && c.low > cell) emit(cell + 1, high);
      float old_low = low, old_high = high;
      low = up ? old_high : 0.f;
      high = down ? old_low : 0.f;
      cell = c.low;
    }
    low = add(low, c.low_weight);
    high = add(high, c.high_weight);
  }
  if (a.bin < 0.f && high != 0.f) emit(cell + 1, high);
  if (low != 0.f) emit(cell, low);
  if (a.bin >= 0.f && high != 0.f) emit(cell + 1, high);
}

// The weight of one cell in a bin, bit for bit as merged_taps emits it. The gathering backward needs it by cell.
ROI_HD float weight_of(const Axis& a, int bin, int cell) {
  float begin = bin_start(a, bin);
  Range range = samples_inside(a, begin);
  float weight = 0.f;
  for (int i = range.begin; i < range.end; i++) {
    Cells c = cells_of(a, sample_at(a, begin, i));
    if (c.low == cell) weight = add(weight, c.low_weight);
    if (c.low + 1 == cell) weight = add(weight, c.high_weight);
  }
  return weight;
}

}  // namespace roi
