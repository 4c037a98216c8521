// Max pooling, and the index of the maximum among a bin's points.
//
// There are no fused operations here: host and device must round a point's value, a weighted sum, in the same way, or
// they would disagree on which of two points is greater.
#pragma once
#include "roi_cuda_device.cuh"

namespace roi::cuda {

// The value of a point on one channel's map. A cell of weight zero is not read, since it may be infinite.
template <class T>
ROI_DEVICE Working<T> value_at(const T* channel, const Strides& s, const Cells<Working<T>>& y, const Cells<Working<T>>& x) {
  using W = Working<T>;
  W sum = 0;
  for (int i = 0; i < 2; i++) {
    W weight_y = i ? y.high_weight : y.low_weight;
    if (weight_y == W(0)) continue;
    for (int j = 0; j < 2; j++) {
      W weight_x = j ? x.high_weight : x.low_weight;
      if (weight_x == W(0)) continue;
      W value = static_cast<W>(channel[(y.low + i) * s.row + (x.low + j) * s.cell]);
      sum = add(sum, mul(mul(weight_y, weight_x), value));
    }
  }
  return sum;
}

template <class W>
struct Maximum {
  W value;
  int index;  // row by row among the bin's points on the map, or -1
};

// The first of equal points wins; the first NaN wins over every number.
template <class T>
ROI_DEVICE Maximum<Working<T>> maximum_of(const RoI<Working<T>>& roi, int by, int bx, Range in_y, Range in_x, const T* channel,
                                          const Strides& s) {
  using W = Working<T>;
  Maximum<W> best = {W(0), -1};
  W begin_y = bin_start(roi.y, by), begin_x = bin_start(roi.x, bx);
  int index = 0;
  for (int iy = in_y.begin; iy < in_y.end; iy++) {
    Cells<W> y = point_at(roi.y, begin_y, iy);
    for (int ix = in_x.begin; ix < in_x.end; ix++, index++) {
      W value = value_at(channel, s, y, point_at(roi.x, begin_x, ix));
      bool is_nan = value != value, had_nan = best.value != best.value;
      if (best.index < 0 || value > best.value || (is_nan && !had_nan)) best = {value, index};
    }
  }
  if (best.value < W(0) && reads_outside(roi.y, in_y, roi.x, in_x)) best = {W(0), -1};
  return best;
}

template <class R>
struct MaxHeader {
  Place<R> place;
};

// Outputs per block: enough to make finding the RoI and its bins' points worth its cost.
constexpr int64_t kMaximaABlock = 2048;

// For any layout: a thread computes one output at a time. `tables`: whether all bins' points fit in shared memory.
template <class T>
ROI_KERNEL(2) max_elements(Call call, Maps<const T> maps, const Working<T>* boxes, T* out, int* indices,
                           int64_t chunk_channels, int64_t chunks, bool tables) {
  using W = Working<T>;
  ROI_SHARED_MEMORY(shared);
  MaxHeader<W>* header = reinterpret_cast<MaxHeader<W>*>(shared);
  Range* points_y = reinterpret_cast<Range*>(shared + sizeof(MaxHeader<W>));
  Range* points_x = points_y + call.sampling.bins_y;
  int bins_y = call.sampling.bins_y, bins_x = call.sampling.bins_x;
  int64_t row = quotient(blockIdx.x, chunks), first = (blockIdx.x - row * chunks) * chunk_channels;
  if (threadIdx.x == 0) header->place = place_of(boxes + 5 * row, call);
  __syncthreads();
  Place<W> place = header->place;
  const RoI<W>& roi = place.roi;
  if (tables && roi.defined) {
    for (int bin = threadIdx.x; bin < bins_y + bins_x; bin += kThreads)
      points_y[bin] = bin < bins_y ? points_of(roi.y, bin) : points_of(roi.x, bin - bins_y);
  }
  __syncthreads();

  int level = roi.level;
  Strides from = strides_of(call.channels_last, call.channels, call.pyramid.height[level], call.pyramid.width[level]);
  Strides to = strides_of(call.channels_last, call.channels, bins_y, bins_x);
  const T* map = maps.level[level] + place.image * from.item;
  int64_t channels = call.channels - first < chunk_channels ? call.channels - first : chunk_channels;

  for (int64_t i = threadIdx.x; i < channels * call.bins(); i += kThreads) {
    int64_t outer = quotient(i, call.channels_last ? channels : call.bins());
    int64_t inner = i - outer * (call.channels_last ? channels : call.bins());
    int64_t c = first + (call.channels_last ? inner : outer), b = call.channels_last ? outer : inner;
    int by = static_cast<int>(quotient(b, bins_x)), bx = static_cast<int>(b - int64_t{by} * bins_x);
    Maximum<W> best = {not_a_number<W>(), -1};
    if (roi.defined) {
      Range in_y = tables ? points_y[by] : points_of(roi.y, by), in_x = tables ? points_x[bx] : points_of(roi.x, bx);
      best = maximum_of(roi, by, bx, in_y, in_x, map + c * from.channel, from);
    }
    int64_t at = row * to.item + c * to.channel + b * to.cell;
    out[at] = static_cast<T>(best.value);
    indices[at] = best.index;
  }
}

// Returns false if the call needs more blocks than a launch may have.
template <class T>
bool launch_max(const Call& call, const Maps<const T>& maps, const Working<T>* boxes, T* out, int* indices,
                int device) {
  int64_t bins = int64_t{call.sampling.bins_y} + call.sampling.bins_x;
  int64_t header = sizeof(MaxHeader<Working<T>>), shared = header + bins * sizeof(Range);
  bool tables = shared <= kSharedBytes;
  int64_t chunk_channels = kMaximaABlock / call.bins() > 1 ? kMaximaABlock / call.bins() : 1;
  int64_t chunks = ceil_div(call.channels, chunk_channels);
  if (chunks > kMostBlocks / call.rois) return false;
  ROI_LAUNCH(max_elements, T, call.rois * chunks, tables ? shared : header, device, call, maps, boxes, out,
             indices, chunk_channels, chunks, tables);
  return true;
}

}  // namespace roi::cuda
