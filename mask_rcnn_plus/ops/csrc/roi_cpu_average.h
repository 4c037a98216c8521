// The inner loops of average pooling, for the instruction set of the translation unit that includes this.
//
// Explicit vector accumulators: loops that the compiler vectorises are four times slower.
#pragma once
#include "roi_cpu_simd.h"

namespace {

using roi::RoIPoints;
using roi::RoITaps;

// One bin, Vectors x lanes channels: bins[c] = sum of weight * map[cell][c].
template <int Vectors, bool Stream, class A, class In, class Out>
ROI_INLINE void average_bin(const RoITaps<A>& roi, int by, int bx, const In* map, int64_t row, int64_t cell, Out* out) {
  Vec<A> sum[Vectors];
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; v++) sum[v] = splat<A>(roi.defined ? A(0) : A(__builtin_nanf("")));
  for (int32_t y = roi.y.begin[by]; y < roi.y.begin[by + 1]; y++) {
    const In* line = map + roi.y.items[y].cell * row;
    for (int32_t x = roi.x.begin[bx]; x < roi.x.begin[bx + 1]; x++) {
      Vec<A> weight = splat<A>(roi.y.items[y].weight * roi.x.items[x].weight);
      const In* p = pinned(line + roi.x.items[x].cell * cell);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; v++) sum[v] = fma(weight, load(p + v * kLanes<A>, A()), sum[v]);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; v++) {
    if constexpr (Stream) stream(out + v * kLanes<A>, sum[v]);
    else store(out + v * kLanes<A>, sum[v]);
  }
}

// Prefetches the cells that the bin below reads and this one does not. The hardware prefetches adjacent cells, but not
// the next row of a map.
template <int Vectors, class A, class In>
ROI_INLINE void prefetch_below(const RoITaps<A>& roi, int by, int bx, const In* map, int64_t row, int64_t cell) {
  const int32_t* y = roi.y.begin + by;
  int32_t seen = y[1] > y[0] ? roi.y.items[y[1] - 1].cell : -1;
  for (int32_t below = y[1]; below < y[2]; below++) {
    if (roi.y.items[below].cell <= seen) continue;
    for (int32_t x = roi.x.begin[bx]; x < roi.x.begin[bx + 1]; x++) {
      const In* p = pinned(map + roi.y.items[below].cell * row + roi.x.items[x].cell * cell);
#pragma GCC unroll 16
      for (int i = 0; i < Vectors * kLanes<A>; i += 64 / sizeof(In)) __builtin_prefetch(p + i);
    }
  }
}

template <int Vectors, bool Stream, class A, class In, class Out>
ROI_INLINE void average_bins(const RoITaps<A>& roi, int bins_y, int bins_x, const In* map, int64_t row, int64_t cell,
                             Out* out, int64_t stride) {
  for (int by = 0; by < bins_y; by++)
    for (int bx = 0; bx < bins_x; bx++, out += stride) {
      if (Vectors == kForwardVectors && by + 1 < bins_y) prefetch_below<Vectors, A>(roi, by, bx, map, row, cell);
      average_bin<Vectors, Stream, A>(roi, by, bx, map, row, cell, out);
    }
}

template <class A, class In, class Out>
ROI_INLINE void average_bin_part(const RoITaps<A>& roi, int by, int bx, const In* map, int64_t row, int64_t cell, Out* out,
                                 int64_t channels) {
  Vec<A> sum = splat<A>(roi.defined ? A(0) : A(__builtin_nanf("")));
  for (int32_t y = roi.y.begin[by]; y < roi.y.begin[by + 1]; y++)
    for (int32_t x = roi.x.begin[bx]; x < roi.x.begin[bx + 1]; x++) {
      Vec<A> weight = splat<A>(roi.y.items[y].weight * roi.x.items[x].weight);
      const In* p = map + roi.y.items[y].cell * row + roi.x.items[x].cell * cell;
      sum = fma(weight, load_part(p, channels, A()), sum);
    }
  store_part(out, sum, channels);
}

template <class A, class In, class Out, bool Stream = false>
void average(const RoITaps<A>& roi, int bins_y, int bins_x, const void* map_, int64_t row, int64_t cell, int64_t channels,
             void* bins_, int64_t stride) {
  constexpr int n = kLanes<A>, few = roi::kBlock / n > 1 ? roi::kBlock / n : 1;
  constexpr int many = kForwardVectors, some = many / 4;
  const In* map = static_cast<const In*>(map_);
  Out* bins = static_cast<Out*>(bins_);
  int64_t c = 0;
  for (; c + many * n <= channels; c += many * n)
    average_bins<many, Stream, A>(roi, bins_y, bins_x, map + c, row, cell, bins + c, stride);
  for (; c + some * n <= channels; c += some * n)
    average_bins<some, Stream, A>(roi, bins_y, bins_x, map + c, row, cell, bins + c, stride);
  for (; c + few * n <= channels; c += few * n)
    average_bins<few, Stream, A>(roi, bins_y, bins_x, map + c, row, cell, bins + c, stride);
  for (; c < channels; c += n)
    for (int b = 0; b < bins_y * bins_x; b++)
      average_bin_part<A>(roi, b / bins_x, b % bins_x, map + c, row, cell, bins + b * stride + c,
                          channels - c < n ? channels - c : n);
  if constexpr (Stream) fence();
}

// One bin, Vectors x lanes channels: map[cell][c] += weight * bins[c], for the taps [y, y_end) of the bin's rows.
template <int Vectors, class A, class In>
ROI_INLINE void spread_bin(const RoITaps<A>& roi, int32_t y, int32_t y_end, int bx, const In* grad, A* map, int64_t row,
                           int64_t cell) {
  Vec<A> g[Vectors];
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; v++) g[v] = load(grad + v * kLanes<A>, A());
  for (; y < y_end; y++) {
    A* line = map + roi.y.items[y].cell * row;
    for (int32_t x = roi.x.begin[bx]; x < roi.x.begin[bx + 1]; x++) {
      Vec<A> weight = splat<A>(roi.y.items[y].weight * roi.x.items[x].weight);
      A* p = pinned(line + roi.x.items[x].cell * cell);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; v++) store(p + v * kLanes<A>, fma(weight, g[v], load(p + v * kLanes<A>, A())));
    }
  }
}

template <class A, class In>
ROI_INLINE void spread_bin_part(const RoITaps<A>& roi, int32_t y, int32_t y_end, int bx, const In* grad, A* map,
                                int64_t row, int64_t cell, int64_t channels) {
  Vec<A> g = load_part(grad, channels, A());
  for (; y < y_end; y++)
    for (int32_t x = roi.x.begin[bx]; x < roi.x.begin[bx + 1]; x++) {
      Vec<A> weight = splat<A>(roi.y.items[y].weight * roi.x.items[x].weight);
      A* p = map + roi.y.items[y].cell * row + roi.x.items[x].cell * cell;
      store_part(p, fma(weight, g, load_part(p, channels, A())), channels);
    }
}

template <class A, class In>
void spread(const RoITaps<A>& roi, int bins_y, int bins_x, const void* bins_, int64_t stride, int64_t channels, void* map_,
            int64_t row, int64_t cell, int32_t row_begin, int32_t row_end) {
  constexpr int n = kLanes<A>, few = roi::kBlock / n > 1 ? roi::kBlock / n : 1;
  constexpr int many = kBackwardVectors, some = many / 2;
  A* map = static_cast<A*>(map_);
  for (int by = 0; by < bins_y; by++) {
    // A bin's cells are in order, so those within the rows are consecutive.
    int32_t y = roi.y.begin[by], y_end = roi.y.begin[by + 1];
    auto outside = [&](int32_t i) { return roi.y.items[i].cell < row_begin || roi.y.items[i].cell >= row_end; };
    while (y < y_end && outside(y)) y++;
    while (y < y_end && outside(y_end - 1)) y_end--;
    if (y == y_end) continue;
    for (int bx = 0; bx < bins_x; bx++) {
      const In* grad = static_cast<const In*>(bins_) + (int64_t(by) * bins_x + bx) * stride;
      int64_t c = 0;
      for (; c + many * n <= channels; c += many * n)
        spread_bin<many, A>(roi, y, y_end, bx, grad + c, map + c, row, cell);
      for (; c + some * n <= channels; c += some * n)
        spread_bin<some, A>(roi, y, y_end, bx, grad + c, map + c, row, cell);
      for (; c + few * n <= channels; c += few * n)
        spread_bin<few, A>(roi, y, y_end, bx, grad + c, map + c, row, cell);
      for (; c < channels; c += n)
        spread_bin_part<A>(roi, y, y_end, bx, grad + c, map + c, row, cell, channels - c < n ? channels - c : n);
    }
  }
}

template <class A, class T>
void gather_planes(const void* planes_, int64_t plane, int64_t cells, int64_t channels, void* out_, int64_t cell) {
  constexpr int n = kLanes<A>;
  const T* planes = static_cast<const T*>(planes_);
  A* out = static_cast<A*>(out_);
  for (int64_t c = 0; c < channels; c += n)
    for (int64_t i = 0; i < cells; i += n) {
      Vec<A> rows[n];
      for (int r = 0; r < n; r++) {
        const T* p = planes + (c + r) * plane + i;
        rows[r] = c + r >= channels ? splat<A>(0) : i + n <= cells ? load(p, A()) : load_part(p, cells - i, A());
      }
      transpose_square<A>(rows);
      for (int r = 0; r < n && i + r < cells; r++) {
        if (c + n <= cell) store(out + (i + r) * cell + c, rows[r]);
        else store_part(out + (i + r) * cell + c, rows[r], cell - c);
      }
    }
}

template <class A, class T>
void scatter_planes(const void* in_, int64_t cell, int64_t cells, int64_t channels, void* planes_, int64_t plane) {
  constexpr int n = kLanes<A>;
  const A* in = static_cast<const A*>(in_);
  T* planes = static_cast<T*>(planes_);
  for (int64_t c = 0; c < channels; c += n)
    for (int64_t i = 0; i < cells; i += n) {
      Vec<A> rows[n];
      for (int r = 0; r < n; r++) rows[r] = i + r < cells ? load(in + (i + r) * cell + c, A()) : splat<A>(0);
      transpose_square<A>(rows);
      for (int r = 0; r < n && c + r < channels; r++) {
        T* p = planes + (c + r) * plane + i;
        if (i + n <= cells) store(p, rows[r]);
        else store_part(p, rows[r], cells - i);
      }
    }
}

template <class A, class T>
void store_cells(const void* in_, int64_t in_cell, int64_t cells, int64_t channels, void* out_, int64_t out_cell) {
  constexpr int n = kLanes<A>;
  for (int64_t i = 0; i < cells; i++) {
    const A* in = static_cast<const A*>(in_) + i * in_cell;
    T* out = static_cast<T*>(out_) + i * out_cell;
    int64_t c = 0;
    for (; c + n <= channels; c += n) store(out + c, load(in + c, A()));
    if (c < channels) store_part(out + c, load(in + c, A()), channels - c);
  }
}

}  // namespace
