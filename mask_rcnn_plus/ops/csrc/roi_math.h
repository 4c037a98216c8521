// The geometry of all RoI operators, for host and device.
//
// A box is (image index, x0, y0, x1, y1) in input-image pixels. R is the type of boxes, coordinates and weights: float,
// or double for maps of double. Each axis of a box on a map is an `Axis`: `bins` equal bins from `start`, each with `samples` regularly spaced points, on a map of `size` cells. A sample reads the
// two cells around it with linear weights; a cell's centre is at its integer index. Samples more than one cell outside
// the map count as zero, as in torchvision. RoIPool reads whole cells instead (`kWholeCells`).
//
// All arithmetic uses add/sub/mul/div below. They are never contracted into fused operations (the host compiles with
// -ffp-contract=off, the device uses the _rn intrinsics), so host and device agree bit for bit. The only exception is
// the logarithm exactly at a level border.
#pragma once
#ifdef __CUDACC_RTC__
#include "roi_cuda_nvrtc.h"
#define ROI_HD __device__ __forceinline__
#else
#include <cmath>
#include <cstdint>
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

#ifdef __CUDACC_RTC__
ROI_HD float add(float a, float b) { return __fadd_rn(a, b); }
ROI_HD float sub(float a, float b) { return __fsub_rn(a, b); }
ROI_HD float mul(float a, float b) { return __fmul_rn(a, b); }
ROI_HD float div(float a, float b) { return __fdiv_rn(a, b); }
ROI_HD float root(float a) { return __fsqrt_rn(a); }
ROI_HD double add(double a, double b) { return __dadd_rn(a, b); }
ROI_HD double sub(double a, double b) { return __dsub_rn(a, b); }
ROI_HD double mul(double a, double b) { return __dmul_rn(a, b); }
ROI_HD double div(double a, double b) { return __ddiv_rn(a, b); }
ROI_HD double root(double a) { return __dsqrt_rn(a); }
#else
template <class R> ROI_HD R add(R a, R b) { return a + b; }
template <class R> ROI_HD R sub(R a, R b) { return a - b; }
template <class R> ROI_HD R mul(R a, R b) { return a * b; }
template <class R> ROI_HD R div(R a, R b) { return a / b; }
template <class R> ROI_HD R root(R a) { return std::sqrt(a); }
#endif

ROI_HD float round_down(float a) { return floorf(a); }
ROI_HD float round_up(float a) { return ceilf(a); }
ROI_HD float round_nearest(float a) { return roundf(a); }  // halves away from zero
ROI_HD float logarithm(float a) { return log2f(a); }
ROI_HD double round_down(double a) { return floor(a); }
ROI_HD double round_up(double a) { return ceil(a); }
ROI_HD double round_nearest(double a) { return round(a); }
ROI_HD double logarithm(double a) { return log2(a); }

template <class R>
ROI_HD bool is_finite(R v) { return sub(v, v) == R(0); }

struct Pyramid {
  int levels;
  int images;
  int min_level;        // FPN's number of the first map: 2 for P2
  int canonical_level;  // the level of a box whose side is canonical_size pixels
  double canonical_size;
  double scale[kMaxLevels];
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

template <class R>
struct Axis {
  R start, bin;
  int samples, size;
};

template <class R>
struct RoI {
  int level;
  bool defined;  // false if a coordinate is not finite, or the box is too large for R
  Axis<R> y, x;
  R inv_count;  // 1 / samples in a bin
};

// FPN, equation 1, with detectron2's rounding: floor(k0 + log2(sqrt(area) / 224 + 1e-8)), clamped to the existing
// levels. A box of negative area is treated as empty.
template <class R>
ROI_HD int level_of(const R* box, const Pyramid& p) {
  if (p.levels == 1) return 0;
  R area = mul(sub(box[3], box[1]), sub(box[4], box[2]));
  R side = root(area > R(0) ? area : R(0));
  R level = round_down(add(R(p.canonical_level), logarithm(add(div(side, R(p.canonical_size)), R(1e-8)))));
  R index = sub(level, R(p.min_level));
  R last = R(p.levels - 1);
  return index > R(0) ? (int)(index < last ? index : last) : 0;
}

template <class R>
ROI_HD Axis<R> make_axis(R lo, R hi, R scale, int bins, const Sampling& s, int size) {
  Axis<R> a;
  a.size = size;
  R length;
  if (s.grid == Grid::kWarp || s.grid == Grid::kPool) {
    // Both border cells belong to the box; halves round away from zero.
    R first = round_nearest(mul(lo, scale));
    length = add(sub(round_nearest(mul(hi, scale)), first), R(1));
    a.start = s.grid == Grid::kWarp ? sub(first, R(0.5)) : first;
  } else {
    R offset = s.grid == Grid::kAlignHalf ? R(0.5) : R(0);
    a.start = sub(mul(lo, scale), offset);
    length = sub(sub(mul(hi, scale), offset), a.start);
  }
  // Versions before half-cell alignment widened boxes to at least one cell; their grids keep that.
  if (s.grid != Grid::kAlignHalf && !(length > R(1))) length = R(1);
  a.bin = div(length, R(bins));
  R adaptive = round_up(a.bin);
  adaptive = adaptive > R(0) ? (adaptive < R(kMaxSamples) ? adaptive : R(kMaxSamples)) : R(0);
  a.samples = s.grid == Grid::kPool ? kWholeCells : s.ratio > 0 ? s.ratio : (int)adaptive;
  return a;
}

template <class R>
ROI_HD RoI<R> locate(const R* box, const Pyramid& p, const Sampling& s) {
  RoI<R> r;
  r.defined = is_finite(box[1]) && is_finite(box[2]) && is_finite(box[3]) && is_finite(box[4]);
  r.level = r.defined ? level_of(box, p) : 0;
  R scale = R(p.scale[r.level]);
  r.x = make_axis(box[1], box[3], scale, s.bins_x, s, p.width[r.level]);
  r.y = make_axis(box[2], box[4], scale, s.bins_y, s, p.height[r.level]);
  r.defined = r.defined && is_finite(r.x.bin) && is_finite(r.y.bin) && is_finite(r.x.start) && is_finite(r.y.start);
  R count = mul(R(r.x.samples), R(r.y.samples));
  r.inv_count = count > R(1) ? div(R(1), count) : R(1);
  return r;
}

// The image that a box belongs to, or -1 if its index is not an integer in [0, images).
template <class R>
ROI_HD int image_of(const R* box, int images) {
  if (!(box[0] >= R(0) && box[0] < R(images))) return -1;
  int n = (int)box[0];
  return R(n) == box[0] ? n : -1;
}

template <class R>
ROI_HD R bin_start(const Axis<R>& a, int bin) { return add(a.start, mul(R(bin), a.bin)); }

template <class R>
ROI_HD R sample_at(const Axis<R>& a, R bin_begin, int i) {
  return add(bin_begin, div(mul(add(R(i), R(0.5)), a.bin), R(a.samples)));
}

template <class R>
ROI_HD bool is_inside(const Axis<R>& a, R v) { return v >= -R(1) && v <= R(a.size); }

struct Range {
  int begin, end;
};

// The samples of a bin that are on the map. Rounding is monotone, so they are consecutive; a binary search finds the
// ends, since the grid may be far larger than the map.
template <class R>
ROI_HD Range samples_inside(const Axis<R>& a, R bin_begin) {
  Range whole = {0, a.samples};
  if (a.samples <= 0) return whole;
  // A sample is between its bin's ends, also after rounding.
  if (is_inside(a, bin_begin) && is_inside(a, add(bin_begin, a.bin))) return whole;
  Range r;
  for (int end = 0; end < 2; end++) {
    int lo = 0, hi = a.samples;
    while (lo < hi) {
      int mid = lo + (hi - lo) / 2;
      R v = sample_at(a, bin_begin, mid);
      // Ascending samples enter the map at -1 and leave it after `size`; those of an inverted box descend.
      bool before = a.bin >= R(0) ? (end == 0 ? !(v >= -R(1)) : v <= R(a.size))
                                 : (end == 0 ? !(v <= R(a.size)) : v >= -R(1));
      if (before) lo = mid + 1; else hi = mid;
    }
    if (end == 0) r.begin = lo; else r.end = lo;
  }
  return r;
}

// The two cells that a sample reads: `low` with weight 1 - high_weight and low + 1 with high_weight (0 at the far
// border).
template <class R>
struct Cells {
  int low;
  R low_weight, high_weight;
};

template <class R>
ROI_HD Cells<R> cells_of(const Axis<R>& a, R v) {
  Cells<R> c;
  if (!(v > R(0))) v = R(0);
  c.low = (int)v;
  if (c.low >= a.size - 1) {
    c.low = a.size - 1;
    v = R(c.low);
  }
  c.high_weight = sub(v, R(c.low));
  c.low_weight = sub(R(1), c.high_weight);
  return c;
}

// The points of a bin that are on the map: samples, or with kWholeCells the cells themselves.
template <class R>
ROI_HD Range points_of(const Axis<R>& a, int bin) {
  if (a.samples != kWholeCells) return samples_inside(a, bin_start(a, bin));
  R last = R(a.size);
  R begin = add(a.start, round_down(mul(R(bin), a.bin)));
  R end = add(a.start, round_up(mul(R(bin + 1), a.bin)));
  begin = begin > R(0) ? (begin < last ? begin : last) : R(0);
  end = end > begin ? (end < last ? end : last) : begin;
  // As a float, a side of more than 2^24 cells may be rounded up.
  Range r = {(int)begin, (int)end};
  if (r.end > a.size) r.end = a.size;
  return r;
}

// The cells that point i of a bin reads; bin_begin is bin_start(a, bin).
template <class R>
ROI_HD Cells<R> point_at(const Axis<R>& a, R bin_begin, int i) {
  if (a.samples == kWholeCells) return {i, R(1), R(0)};
  return cells_of(a, sample_at(a, bin_begin, i));
}

// Whether some of a bin's samples are outside the map, where they count as zero.
template <class R>
ROI_HD bool reads_outside(const Axis<R>& y, Range in_y, const Axis<R>& x, Range in_x) {
  if (y.samples <= 0 || x.samples <= 0) return false;
  return in_y.end - in_y.begin < y.samples || in_x.end - in_x.begin < x.samples;
}

// The cells [begin, end) that a bin reads; empty if begin >= end.
template <class R>
ROI_HD Range cells_read(const Axis<R>& a, int bin) {
  Range points = points_of(a, bin);
  if (points.begin >= points.end) return {0, 0};
  R begin = bin_start(a, bin);
  Cells<R> first = point_at(a, begin, points.begin), last = point_at(a, begin, points.end - 1);
  if (last.low < first.low) {  // the points of an inverted box descend
    Cells<R> swap = first;
    first = last;
    last = swap;
  }
  // If both points are between the same cells, either may reach the upper cell.
  bool upper = last.high_weight != R(0) || (first.low == last.low && first.high_weight != R(0));
  return {first.low, last.low + (upper ? 2 : 1)};
}

// Calls emit(cell, weight) once for each cell that a bin reads, in the samples' order (ascending, or descending for an
// inverted box). The weight is the sum over the samples, in that order. Average pooling is separable, so it only needs
// these weights, one list per axis.
template <class R, class Emit>
ROI_HD void merged_taps(const Axis<R>& a, int bin, Emit&& emit) {
  R begin = bin_start(a, bin);
  Range range = samples_inside(a, begin);
  int cell = -1;  // the pending pair is (cell, cell + 1)
  R low = R(0), high = R(0);
  for (int i = range.begin; i < range.end; i++) {
    Cells<R> c = cells_of(a, sample_at(a, begin, i));
    if (c.low != cell) {
      bool up = cell >= 0 && c.low == cell + 1, down = cell >= 0 && c.low == cell - 1;
      // The cells of an inverted box descend.
      if (high != R(0) && !up && c.low < cell) emit(cell + 1, high);
      if (low != R(0) && !down) emit(cell, low);
      if (high != R(0) && !up && c.low > cell) emit(cell + 1, high);
      R old_low = low, old_high = high;
      low = up ? old_high : R(0);
      high = down ? old_low : R(0);
      cell = c.low;
    }
    low = add(low, c.low_weight);
    high = add(high, c.high_weight);
  }
  if (a.bin < R(0) && high != R(0)) emit(cell + 1, high);
  if (low != R(0)) emit(cell, low);
  if (a.bin >= R(0) && high != R(0)) emit(cell + 1, high);
}

}  // namespace roi
