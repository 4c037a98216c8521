// The inner loops of max pooling, for the instruction set of the translation unit that includes this.
//
// A point's value is the sum over its taps, rows first. A tap of weight zero is not read, since 0 times infinity is
// NaN. Products and sums are rounded separately, as on the device: both must agree on which of two points is greater.
// The first maximum in row-major order wins, and NaN is greater than every number, as in torch's max_pool2d.
#pragma once
#include "roi_cpu_simd.h"

namespace {

using roi::Point;
using roi::RoIPoints;

// The registers hold the best values, their points and one point's values.
constexpr int kMaxVectors = ROI_VECTOR_BYTES == 64 ? 4 : 2;

// Whole vectors of channels, or the first lanes of one vector.
template <class A>
struct Whole {
  template <class T>
  ROI_MEMBER Vec<A> load(const T* p) const {
    return ::load(p, A());
  }
  template <class T>
  ROI_MEMBER void store(T* p, Vec<A> v) const {
    ::store(p, v);
  }
  ROI_MEMBER Lanes<A> load_points(const int32_t* p) const { return load_lanes<A>(p); }
  ROI_MEMBER void store_points(int32_t* p, Lanes<A> v) const { store_lanes<A>(p, v); }
};
template <class A>
struct Part {
  int64_t channels;
  template <class T>
  ROI_MEMBER Vec<A> load(const T* p) const {
    return load_part(p, channels, A());
  }
  template <class T>
  ROI_MEMBER void store(T* p, Vec<A> v) const {
    store_part(p, v, channels);
  }
  ROI_MEMBER Lanes<A> load_points(const int32_t* p) const { return load_lanes_part<A>(p, channels); }
  ROI_MEMBER void store_points(int32_t* p, Lanes<A> v) const { store_lanes_part<A>(p, v, channels); }
};

// Calls tap(weight, offset of the cell in the map) for the one, two or four cells that a point reads.
template <class A, class Tap>
ROI_INLINE void each_tap(const Point<A>& y, const Point<A>& x, int64_t row, int64_t cell, const Tap& tap) {
  int64_t first = y.cell * row + x.cell * cell;
  tap(y.low * x.low, first);
  if (x.high != A(0)) tap(y.low * x.high, first + cell);
  if (y.high == A(0)) return;
  tap(y.high * x.low, first + row);
  if (x.high != A(0)) tap(y.high * x.high, first + row + cell);
}

// One bin of Vectors x lanes channels.
template <int Vectors, class A, class In, class Out, class Access>
ROI_INLINE void maximum_of_bin(const RoIPoints<A>& roi, int by, int bx, const In* map, int64_t row, int64_t cell, Out* out,
                               int32_t* points, Access access) {
  constexpr int n = kLanes<A>;
  Vec<A> best[Vectors];
  Lanes<A> index[Vectors];
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; v++) {
    best[v] = splat<A>(roi.defined ? A(0) : A(__builtin_nanf("")));
    index[v] = splat_lanes<A>(-1);
  }
  const int32_t y_begin = roi.y.begin[by], y_end = roi.y.begin[by + 1];
  const int32_t x_begin = roi.x.begin[bx], x_end = roi.x.begin[bx + 1];
  int32_t point = 0;
  for (int32_t y = y_begin; y < y_end; y++)
    for (int32_t x = x_begin; x < x_end; x++, point++) {
      Vec<A> value[Vectors] = {};
      bool first = true;
      each_tap(roi.y.items[y], roi.x.items[x], row, cell, [&](A weight, int64_t at) ROI_LAMBDA {
        const In* p = pinned(map + at);
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; v++) {
          Vec<A> in = access.load(p + v * n);
          value[v] = first ? splat<A>(weight) * in : value[v] + splat<A>(weight) * in;
        }
        first = false;
      });
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; v++) {
        Lanes<A> better = ~(value[v] <= best[v]) & (best[v] == best[v]);
        if (point == 0) better = splat_lanes<A>(-1);
        best[v] = better ? value[v] : best[v];
        index[v] = better ? splat_lanes<A>(point) : index[v];
      }
    }
  // Samples outside the map count as zero.
  bool outside = roi.y.samples > 0 && roi.x.samples > 0 &&
                 (y_end - y_begin < roi.y.samples || x_end - x_begin < roi.x.samples);
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; v++) {
    if (outside && point > 0) {
      Lanes<A> below = best[v] < splat<A>(0);
      best[v] = below ? splat<A>(0) : best[v];
      index[v] = below ? splat_lanes<A>(-1) : index[v];
    }
    access.store(out + v * n, best[v]);
    access.store_points(points + v * n, index[v]);
  }
}

template <class A, class In, class Out>
void maximum(const RoIPoints<A>& roi, int bins_y, int bins_x, const void* map_, int64_t row, int64_t cell, int64_t channels,
             void* bins_, int32_t* points, int64_t stride) {
  constexpr int n = kLanes<A>, many = kMaxVectors;
  const In* map = static_cast<const In*>(map_);
  for (int by = 0; by < bins_y; by++)
    for (int bx = 0; bx < bins_x; bx++, points += stride) {
      Out* out = static_cast<Out*>(bins_) + (int64_t(by) * bins_x + bx) * stride;
      int64_t c = 0;
      for (; c + many * n <= channels; c += many * n)
        maximum_of_bin<many, A>(roi, by, bx, map + c, row, cell, out + c, points + c, Whole<A>());
      for (; c + n <= channels; c += n)
        maximum_of_bin<1, A>(roi, by, bx, map + c, row, cell, out + c, points + c, Whole<A>());
      if (c < channels)
        maximum_of_bin<1, A>(roi, by, bx, map + c, row, cell, out + c, points + c, Part<A>{channels - c});
    }
}

// One vector of a bin's channels: each lane's gradient goes to the cells of the point that was its maximum. Lanes with
// the same point are handled together; few of a bin's points are a maximum.
template <class A, class In, class Access>
ROI_INLINE void route_bin(const RoIPoints<A>& roi, int by, int bx, const In* grad, const int32_t* points, A* map,
                          int64_t row, int64_t cell, int32_t row_begin, int32_t row_end, Access access) {
  const Vec<A> g = access.load(grad);
  const Lanes<A> chosen = access.load_points(points);
  const int32_t columns = roi.x.begin[bx + 1] - roi.x.begin[bx];
  // A direct caller may pass points that this bin does not have.
  const int32_t count = columns * (roi.y.begin[by + 1] - roi.y.begin[by]);
  for (uint32_t left = lane_bits<A>((chosen >= splat_lanes<A>(0)) & (chosen < splat_lanes<A>(count))); left != 0;) {
    int32_t point = points[__builtin_ctz(left)];
    Lanes<A> here = chosen == splat_lanes<A>(point);
    left &= ~lane_bits<A>(here);
    Vec<A> part = here ? g : splat<A>(0);
    const Point<A> &y = roi.y.items[roi.y.begin[by] + point / columns], &x = roi.x.items[roi.x.begin[bx] + point % columns];
    each_tap(y, x, row, cell, [&](A weight, int64_t at) ROI_LAMBDA {
      if (at < row_begin * row || at >= row_end * row) return;
      access.store(map + at, fma(splat<A>(weight), part, access.load(map + at)));
    });
  }
}

template <class A, class In>
void route(const RoIPoints<A>& roi, int bins_y, int bins_x, const void* bins_, const int32_t* points, int64_t stride,
           int64_t channels, void* map_, int64_t row, int64_t cell, int32_t row_begin, int32_t row_end) {
  constexpr int n = kLanes<A>;
  A* map = static_cast<A*>(map_);
  for (int by = 0; by < bins_y; by++)
    for (int bx = 0; bx < bins_x; bx++, points += stride) {
      const In* grad = static_cast<const In*>(bins_) + (int64_t(by) * bins_x + bx) * stride;
      int64_t c = 0;
      for (; c + n <= channels; c += n)
        route_bin<A>(roi, by, bx, grad + c, points + c, map + c, row, cell, row_begin, row_end, Whole<A>());
      if (c < channels)
        route_bin<A>(roi, by, bx, grad + c, points + c, map + c, row, cell, row_begin, row_end, Part<A>{channels - c});
    }
}

}  // namespace
