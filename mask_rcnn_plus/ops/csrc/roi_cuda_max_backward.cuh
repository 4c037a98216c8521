// The gradient of max pooling: a bin's gradient goes to the cells of the point that was its maximum.
#pragma once
#include "roi_cuda_gather.cuh"

namespace roi::cuda {

constexpr int kMaxRows = kWarps;
constexpr int kMaxColumns = kWarp;
constexpr int kMaxChannels = 8;

struct BinPoints {
  Range points, cells;
};

// In shared memory: the points and cells of a batch of RoIs' bins, and for each row and column of a tile the bins that
// read it, so that no thread visits the others.
struct PointTables {
  BinPoints* y;    // [RoI][bin]
  BinPoints* x;    // [RoI][bin]
  Range* bins_y;   // [RoI][row]
  Range* bins_x;   // [RoI][column]
  int stride_y, stride_x;  // of a RoI

  static int64_t bytes(int bins_y, int bins_x) {
    return (int64_t{bins_y} + bins_x) * sizeof(BinPoints) + (kMaxRows + kMaxColumns) * sizeof(Range);
  }

  ROI_DEVICE PointTables(unsigned char* memory, const TableShape& t) : stride_y(t.bins_y), stride_x(t.bins_x) {
    y = reinterpret_cast<BinPoints*>(memory);
    x = y + t.batch * stride_y;
    bins_y = reinterpret_cast<Range*>(x + t.batch * stride_x);
    bins_x = bins_y + t.batch * kMaxRows;
  }

  // Called by all threads of the block, for the bins [by, by + count_y) and [bx, bx + count_x).
  template <class R>
  ROI_DEVICE void fill(const Plan<R>& plan, const int* rows, int count, const Bounds& tile, int by, int count_y, int bx,
                       int count_x) {
    for (int i = threadIdx.x; i < count * (count_y + count_x); i += kThreads) {
      int roi = i / (count_y + count_x), bin = i % (count_y + count_x);
      const RoI<R>& r = plan.rois[rows[roi]].roi;
      bool is_y = bin < count_y;
      Axis<R> axis = is_y ? r.y : r.x;
      int at = is_y ? by + bin : bx + bin - count_y;
      BinPoints* out = is_y ? y + roi * stride_y + bin : x + roi * stride_x + bin - count_y;
      *out = {points_of(axis, at), cells_read(axis, at)};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * (kMaxRows + kMaxColumns); i += kThreads) {
      int roi = i / (kMaxRows + kMaxColumns), k = i % (kMaxRows + kMaxColumns);
      if (k < kMaxRows) {
        bins_y[roi * kMaxRows + k] = bins_that_read(y + roi * stride_y, count_y, tile.top, k, tile.bottom);
      } else {
        k -= kMaxRows;
        bins_x[roi * kMaxColumns + k] = bins_that_read(x + roi * stride_x, count_x, tile.left, k, tile.right);
      }
    }
    __syncthreads();
  }

 private:
  // For cell first + k, unless that is beyond `end`.
  ROI_DEVICE static Range bins_that_read(const BinPoints* bins, int count, int first, int k, int end) {
    Range r = {0, 0};
    if (k >= end - first) return r;
    for (int bin = 0; bin < count; bin++) {
      if (first + k < bins[bin].cells.begin || first + k >= bins[bin].cells.end) continue;
      if (r.end == 0) r.begin = bin;
      r.end = bin + 1;
    }
    return r;
  }
};

template <class R>
ROI_DEVICE R weight_in(const Cells<R>& c, int cell) {
  return c.low == cell ? c.low_weight : c.low + 1 == cell ? c.high_weight : R(0);
}

// For any layouts: a thread takes one cell and some channels.
template <class T>
ROI_KERNEL(2) spread_maxima(Call call, Plan<Working<T>> plan, const T* grad, Strides from, const int* indices, Strides from_index,
                            Maps<T> maps, Tiling tiling, TableShape shape, int64_t chunks) {
  using W = Working<T>;
  ROI_SHARED_MEMORY(shared);
  HitList* list = reinterpret_cast<HitList*>(shared);
  PointTables tables(shared + sizeof(HitList), shape);
  int64_t index = quotient(blockIdx.x, chunks), first = (blockIdx.x - index * chunks) * kMaxChannels;
  find_tile(list, tiling, call.pyramid, index);
  const Tile& tile = list->tile;
  int row = threadIdx.x / kWarp, column = threadIdx.x % kWarp;
  int64_t channels = call.channels - first;

  W sum[kMaxChannels] = {};
  // Adds one bin's gradient to this thread's cell.
  auto add_bin = [&](const RoI<W>& r, int roi_row, int by, int bx, Range points_y, Range points_x) {
    int width = points_x.end - points_x.begin;
    if (width <= 0) return;
    W begin_y = bin_start(r.y, by), begin_x = bin_start(r.x, bx);
    const int* index_at = indices + roi_row * from_index.item + first * from_index.channel + by * from_index.row +
                          bx * from_index.cell;
    const T* grad_at = grad + roi_row * from.item + first * from.channel + by * from.row + bx * from.cell;
#pragma unroll
    for (int k = 0; k < kMaxChannels; k++) {
      if (k >= channels) continue;
      int point = index_at[k * from_index.channel];
      if (point < 0) continue;
      Cells<W> y = point_at(r.y, begin_y, points_y.begin + point / width);
      Cells<W> x = point_at(r.x, begin_x, points_x.begin + point % width);
      W weight = mul(weight_in(y, tile.bounds.top + row), weight_in(x, tile.bounds.left + column));
      // Skip cells that the point does not read: its gradient may be infinite.
      if (weight != W(0)) sum[k] = fused(weight, static_cast<W>(grad_at[k * from.channel]), sum[k]);
    }
  };
  for_each_batch(
      call, plan, shape.batch, list, [&](const int* rows, int count) {
        for_each_bins(call.sampling, shape, [&](int by, int count_y, int bx, int count_x) {
          tables.fill(plan, rows, count, tile.bounds, by, count_y, bx, count_x);
          for (int roi = 0; roi < count; roi++) {
            Range in_y = tables.bins_y[roi * kMaxRows + row], in_x = tables.bins_x[roi * kMaxColumns + column];
            for (int y = in_y.begin; y < in_y.end; y++)
              for (int x = in_x.begin; x < in_x.end; x++)
                add_bin(plan.rois[rows[roi]].roi, rows[roi], by + y, bx + x, tables.y[roi * tables.stride_y + y].points,
                        tables.x[roi * tables.stride_x + x].points);
          }
          __syncthreads();
        });
      });

  if (tile.bounds.top + row >= tile.bounds.bottom || tile.bounds.left + column >= tile.bounds.right) return;
  Strides to = strides_of(call.channels_last, call.channels, call.pyramid.height[tile.level],
                          call.pyramid.width[tile.level]);
  T* out = maps.level[tile.level] + tile.image * to.item + first * to.channel + (tile.bounds.top + row) * to.row +
           (tile.bounds.left + column) * to.cell;
#pragma unroll
  for (int k = 0; k < kMaxChannels; k++)
    if (k < channels) out[k * to.channel] = static_cast<T>(sum[k]);
}

// *_channels_last describe the incoming gradient and indices. Returns false if the call needs more blocks than a launch
// may have.
template <class T>
bool launch_max_backward(const Call& call, const Working<T>* boxes, const T* grad, bool grad_channels_last,
                         const int* indices, bool indices_channels_last, const Maps<T>& maps, const Plan<Working<T>>& plan,
                         int device) {
  Tiling tiling = make_tiling(call.pyramid, kMaxRows, kMaxColumns);
  int64_t tiles = tiling.begin[call.pyramid.levels], chunks = ceil_div(call.channels, kMaxChannels);
  if (tiles > 0 && chunks > kMostBlocks / tiles) return false;
  if (!launch_plan(call, boxes, plan, device)) return false;
  int bins_y = call.sampling.bins_y, bins_x = call.sampling.bins_x;
  Strides from = strides_of(grad_channels_last, call.channels, bins_y, bins_x);
  Strides from_index = strides_of(indices_channels_last, call.channels, bins_y, bins_x);
  TableShape shape = make_table_shape(call.sampling, PointTables::bytes);
  int64_t shared = sizeof(HitList) + shape.batch * PointTables::bytes(shape.bins_y, shape.bins_x);
  ROI_LAUNCH(spread_maxima, T, tiles * chunks, shared, device, call, plan, grad, from, indices, from_index, maps, tiling,
             shape, chunks);
  return true;
}

}  // namespace roi::cuda
