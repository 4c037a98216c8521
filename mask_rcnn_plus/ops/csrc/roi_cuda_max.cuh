// Max pooling, and the index of the maximum among a bin's points.
//
// There are no fused operations here: host and device must round a point's value, a weighted sum, in the same way, or
// they would disagree on which of two points is greater.
#pragma once
#include "roi_cuda_device.cuh"

namespace roi::cuda {

#ifdef __CUDA_ARCH__
ROI_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
ROI_DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
#else
ROI_HD double add(double a, double b) { return a + b; }
ROI_HD double mul(double a, double b) { return a * b; }
#endif
using roi::add;
using roi::mul;

// The value of a point on one channel's map. A cell of weight zero is not read, since it may be infinite.
template <class T>
ROI_DEVICE Working<T> value_at(const T* channel, const Strides& s, const Cells& y, const Cells& x) {
  using W = Working<T>;
  W sum = 0;
  for (int i = 0; i < 2; i++) {
    float weight_y = i ? y.high_weight : y.low_weight;
    if (weight_y == 0.f) continue;
    for (int j = 0; j < 2; j++) {
      float weight_x = j ? x.high_weight : x.low_weight;
      if (weight_x == 0.f) continue;
      W value = static_cast<W>(channel[(y.low + i) * s.row + (x.low + j) * s.cell]);
      sum = add(sum, mul(static_cast<W>(mul(weight_y, weight_x)), value));
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
ROI_DEVICE Maximum<Working<T>> maximum_of(const RoI& roi, int by, int bx, Range in_y, Range in_x, const T* channel,
                                          const Strides& s) {
  using W = Working<T>;
  Maximum<W> best = {W(0), -1};
  float begin_y = bin_start(roi.y, by), begin_x = bin_start(roi.x, bx);
  int index = 0;
  for (int iy = in_y.begin; iy < in_y.end; iy++) {
    Cells y = point_at(roi.y, begin_y, iy);
    for (int ix = in_x.begin; ix < in_x.end; ix++, index++) {
      W value = value_at(channel, s, y, point_at(roi.x, begin_x, ix));
      bool is_nan = value != value, had_nan = best.value != best.value;
      if (best.index < 0 || value > best.value || (is_nan && !had_nan)) best = {value, index};
    }
  }
  if (best.value < W(0) && reads_outside(roi.y, in_y, roi.x, in_x)) best = {W(0), -1};
  return best;
}

struct MaxHeader {
  Place place;
};

// Outputs per block: enough to make finding the RoI and its bins' points worth its cost.
constexpr int64_t kMaximaABlock = 2048;

// For any layout: a thread computes one output at a time. `tables`: whether all bins' points fit in shared memory.
template <class T>
ROI_KERNEL(2) max_elements(Call call, Maps<const T> maps, const float* boxes, T* out, int* indices,
                           int64_t chunk_channels, int64_t chunks, bool tables) {
  using W = Working<T>;
  ROI_SHARED_MEMORY(shared);
  MaxHeader* header = reinterpret_cast<MaxHeader*>(shared);
  Range* points_y = reinterpret_cast<Range*>(shared + sizeof(MaxHeader));
  Range* points_x = points_y + call.sampling.bins_y;
  int bins_y = call.sampling.bins_y, bins_x = call.sampling.bins_x;
  int64_t row = quotient(blockIdx.x, chunks), first = (blockIdx.x - row * chunks) * chunk_channels;
  if (threadIdx.x == 0) header->place = place_of(boxes + 5 * row, call);
  __syncthreads();
  Place place = header->place;
  const RoI& roi = place.roi;
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
bool launch_max(const Call& call, const Maps<const T>& maps, const float* boxes, T* out, int* indices, void* stream) {
  int64_t bins = int64_t{call.sampling.bins_y} + call.sampling.bins_x;
  int64_t shared = sizeof(MaxHeader) + bins * sizeof(Range);
  bool tables = shared <= kSharedBytes;
  int64_t chunk_channels = kMaximaABlock / call.bins() > 1 ? kMaximaABlock / call.bins() : 1;
  int64_t chunks = ceil_div(call.channels, chunk_channels);
  if (chunks > kMostBlocks / call.rois) return false;
  launch(max_elements<T>, call.rois * chunks, tables ? shared : sizeof(MaxHeader), stream, call, maps, boxes, out,
         indices, chunk_channels, chunks, tables);
  return true;
}

}  // namespace roi::cuda
