// The gradient of average pooling: for a cell, the sum over bins of weight_y * weight_x * the bin's gradient.
#pragma once
#include "roi_cuda_gather.cuh"

namespace roi::cuda {

constexpr int kTileRows = kWarps;  // one warp per row of a tile

// In shared memory: the weights of a tile's rows and columns in the bins of a batch of RoIs, and for each row and
// column the bins that read it, so that no thread visits the others.
template <class R, int Columns>
struct WeightTables {
  R* y;        // [RoI][bin][row], 1 / samples included
  R* x;        // [RoI][bin][column]
  Range* bins_y;   // [RoI][row]
  Range* bins_x;   // [RoI][column]
  int stride_y, stride_x;  // of a RoI

  static int64_t bytes(int bins_y, int bins_x) {
    return (int64_t{bins_y} * kTileRows + int64_t{bins_x} * Columns) * sizeof(R) +
           (kTileRows + Columns) * sizeof(Range);
  }

  ROI_DEVICE WeightTables(unsigned char* memory, const TableShape& t)
      : stride_y(t.bins_y * kTileRows), stride_x(t.bins_x * Columns) {
    x = reinterpret_cast<R*>(memory);
    y = x + t.batch * stride_x;
    bins_y = reinterpret_cast<Range*>(y + t.batch * stride_y);
    bins_x = bins_y + t.batch * kTileRows;
  }

  // Called by all threads of the block, for the bins [by, by + count_y) and [bx, bx + count_x).
  ROI_DEVICE void fill(const Plan<R>& plan, const int* rows, int count, const Bounds& tile, int by, int count_y, int bx,
                       int count_x) {
    for (int i = threadIdx.x; i < count * (count_y + count_x); i += kThreads) {
      int roi = i / (count_y + count_x), bin = i % (count_y + count_x);
      const RoI<R>& r = plan.rois[rows[roi]].roi;
      if (bin < count_y) {
        fill_bin(r.y, by + bin, r.inv_count, tile.top, tile.bottom, kTileRows, y + roi * stride_y + bin * kTileRows);
      } else {
        bin -= count_y;
        fill_bin(r.x, bx + bin, R(1), tile.left, tile.right, Columns, x + roi * stride_x + bin * Columns);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * (kTileRows + Columns); i += kThreads) {
      int roi = i / (kTileRows + Columns), k = i % (kTileRows + Columns);
      if (k < kTileRows) {
        bins_y[roi * kTileRows + k] = bins_in_use(y + roi * stride_y + k, kTileRows, count_y);
      } else {
        k -= kTileRows;
        bins_x[roi * Columns + k] = bins_in_use(x + roi * stride_x + k, Columns, count_x);
      }
    }
    __syncthreads();
  }

 private:
  // weights[i] is the weight of cell first + i, or zero beyond the tile.
  ROI_DEVICE static void fill_bin(const Axis<R>& axis, int bin, R factor, int first, int end, int room,
                                  R* weights) {
    for (int i = 0; i < room; i++) weights[i] = R(0);
    if (!meets(cells_read(axis, bin), first, end)) return;
    merged_taps(axis, bin, [&](int cell, R weight) {
      if (cell >= first && cell < end) weights[cell - first] = mul(weight, factor);
    });
  }

  ROI_DEVICE static Range bins_in_use(const R* weights, int stride, int bins) {
    Range r = {0, 0};
    for (int bin = 0; bin < bins; bin++) {
      if (weights[bin * stride] == R(0)) continue;
      if (r.end == 0) r.begin = bin;
      r.end = bin + 1;
    }
    return r;
  }
};

// 32 accumulators per thread, and the number of columns that they serve.
template <class T>
constexpr int kVectorColumns = sizeof(T) == 2 ? 4 : 8;

// The number of blocks that share a multiprocessor's registers. fp64 needs slightly more than a third of them.
template <class T>
constexpr int kVectorBlocks = sizeof(T) == 8 ? 2 : 3;

// For channels_last gradients and maps: a thread takes one vector of every cell in a row of the tile, so that each
// gradient vector that it loads is used for several cells.
template <class T>
ROI_KERNEL(kVectorBlocks<T>) spread_vectors(Call call, Plan<Working<T>> plan, const T* grad, Maps<T> maps, Tiling tiling,
                                            TableShape shape, int64_t chunks) {
  using W = Working<T>;
  constexpr int kColumns = kVectorColumns<T>;
  ROI_SHARED_MEMORY(shared);
  HitList* list = reinterpret_cast<HitList*>(shared);
  WeightTables<W, kColumns> tables(shared + sizeof(HitList), shape);
  int64_t index = quotient(blockIdx.x, chunks), chunk = blockIdx.x - index * chunks, cell = call.channels;
  find_tile(list, tiling, call.pyramid, index);
  const Tile& tile = list->tile;
  int row = threadIdx.x / kWarp;
  int64_t c = (chunk * kWarp + threadIdx.x % kWarp) * kVector<T>;
  bool in_use = c < call.channels;
  if (!in_use) c = 0;

  W sum[kColumns][kVector<T>] = {};
  for_each_batch(
      call, plan, shape.batch, list, [&](const int* rows, int count) {
        for_each_bins(call.sampling, shape, [&](int by, int count_y, int bx, int count_x) {
          tables.fill(plan, rows, count, tile.bounds, by, count_y, bx, count_x);
          for (int roi = 0; roi < count; roi++) {
            Range in_y = tables.bins_y[roi * kTileRows + row], in_x = {INT32_MAX, 0};
            for (int k = 0; k < kColumns; k++) {
              Range r = tables.bins_x[roi * kColumns + k];
              if (r.begin >= r.end) continue;
              if (r.begin < in_x.begin) in_x.begin = r.begin;
              if (r.end > in_x.end) in_x.end = r.end;
            }
            for (int y = in_y.begin; y < in_y.end; y++) {
              W weight_y = tables.y[roi * tables.stride_y + y * kTileRows + row];
              const T* bins = grad + (rows[roi] * call.bins() + int64_t{by + y} * call.sampling.bins_x + bx) * cell + c;
              const W* weights_x = tables.x + roi * tables.stride_x;
#pragma unroll 2
              for (int x = in_x.begin; x < in_x.end; x++) {
                W values[kVector<T>];
                load_vector(bins + x * cell, values);
                constexpr int kWide = kVector<W>;
                W weights[kColumns / kWide][kWide];
#pragma unroll
                for (int k = 0; k < kColumns / kWide; k++)
                  load_vector(weights_x + x * kColumns + kWide * k, weights[k]);
#pragma unroll
                for (int k = 0; k < kColumns; k++) {
                  W weight = mul(weight_y, weights[k / kWide][k % kWide]);
                  // Skip cells that the bin does not read: its gradient may be infinite.
                  if (weight != W(0)) {
#pragma unroll
                    for (int v = 0; v < kVector<T>; v++)
                      sum[k][v] = fused(weight, values[v], sum[k][v]);
                  }
                }
              }
            }
          }
          __syncthreads();
        });
      });

  if (!in_use || tile.bounds.top + row >= tile.bounds.bottom) return;
  int64_t width = call.pyramid.width[tile.level], height = call.pyramid.height[tile.level];
  T* out = maps.level[tile.level] +
           ((tile.image * height + tile.bounds.top + row) * width + tile.bounds.left) * cell + c;
#pragma unroll
  for (int k = 0; k < kColumns; k++)
    if (tile.bounds.left + k < tile.bounds.right) store_vector(out + k * cell, sum[k]);
}

constexpr int kElementColumns = kWarp;
constexpr int kElementChannels = 16;

// For any layouts: a thread takes one cell and some channels.
template <class T>
ROI_KERNEL(2) spread_elements(Call call, Plan<Working<T>> plan, const T* grad, Strides from, Maps<T> maps, Tiling tiling,
                              TableShape shape, int64_t chunks) {
  using W = Working<T>;
  ROI_SHARED_MEMORY(shared);
  HitList* list = reinterpret_cast<HitList*>(shared);
  WeightTables<W, kElementColumns> tables(shared + sizeof(HitList), shape);
  int64_t index = quotient(blockIdx.x, chunks), first = (blockIdx.x - index * chunks) * kElementChannels;
  find_tile(list, tiling, call.pyramid, index);
  const Tile& tile = list->tile;
  int row = threadIdx.x / kWarp, column = threadIdx.x % kWarp;
  int64_t channels = call.channels - first;

  W sum[kElementChannels] = {};
  for_each_batch(
      call, plan, shape.batch, list, [&](const int* rows, int count) {
        for_each_bins(call.sampling, shape, [&](int by, int count_y, int bx, int count_x) {
          tables.fill(plan, rows, count, tile.bounds, by, count_y, bx, count_x);
          for (int roi = 0; roi < count; roi++) {
            Range in_y = tables.bins_y[roi * kTileRows + row], in_x = tables.bins_x[roi * kElementColumns + column];
            for (int y = in_y.begin; y < in_y.end; y++) {
              for (int x = in_x.begin; x < in_x.end; x++) {
                W weight = mul(tables.y[roi * tables.stride_y + y * kTileRows + row],
                               tables.x[roi * tables.stride_x + x * kElementColumns + column]);
                if (weight == W(0)) continue;
                const T* bin = grad + rows[roi] * from.item + first * from.channel + (by + y) * from.row +
                               (bx + x) * from.cell;
#pragma unroll
                for (int k = 0; k < kElementChannels; k++)
                  if (k < channels)
                    sum[k] = fused(weight, static_cast<W>(bin[k * from.channel]), sum[k]);
              }
            }
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
  for (int k = 0; k < kElementChannels; k++)
    if (k < channels) out[k * to.channel] = static_cast<T>(sum[k]);
}

// grad_channels_last describes the incoming gradient. Returns false if the call needs more blocks than a launch may
// have.
template <class T>
bool launch_average_backward(const Call& call, const Working<T>* boxes, const T* grad, bool grad_channels_last,
                             const Maps<T>& maps, const Plan<Working<T>>& plan, int device) {
  bool vectors = call.channels_last && grad_channels_last && is_vectorised<T>(grad, call.channels);
  for (int l = 0; l < call.pyramid.levels; l++) vectors = vectors && is_vectorised<T>(maps.level[l], call.channels);
  int columns = vectors ? kVectorColumns<T> : kElementColumns;
  Tiling tiling = make_tiling(call.pyramid, kTileRows, columns);
  int64_t tiles = tiling.begin[call.pyramid.levels];
  int64_t chunks = ceil_div(call.channels, vectors ? kWarp * kVector<T> : kElementChannels);
  if (tiles > 0 && chunks > kMostBlocks / tiles) return false;
  if (!launch_plan(call, boxes, plan, device)) return false;

  auto bytes_of = vectors ? WeightTables<Working<T>, kVectorColumns<T>>::bytes : WeightTables<Working<T>, kElementColumns>::bytes;
  TableShape shape = make_table_shape(call.sampling, bytes_of);
  int64_t shared = sizeof(HitList) + shape.batch * bytes_of(shape.bins_y, shape.bins_x);
  if (vectors) {
    ROI_LAUNCH(spread_vectors, T, tiles * chunks, shared, device, call, plan, grad, maps, tiling, shape, chunks);
  } else {
    Strides from = strides_of(grad_channels_last, call.channels, call.sampling.bins_y, call.sampling.bins_x);
    ROI_LAUNCH(spread_elements, T, tiles * chunks, shared, device, call, plan, grad, from, maps, tiling, shape, chunks);
  }
  return true;
}

}  // namespace roi::cuda
