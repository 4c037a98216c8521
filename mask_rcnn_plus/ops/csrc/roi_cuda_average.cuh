// Average pooling. A block pools some channels of one RoI. The merged taps of the RoI's bins are computed once, into
// shared memory, and are used for every channel.
#pragma once
#include "roi_cuda_device.cuh"

namespace roi::cuda {

template <class R>
struct Tap {
  int cell;
  R weight;
};

// A block's data about its RoI. Each bin of an axis has room for `slots` taps and uses `counts` of them.
template <class R>
struct TapTables {
  Place<R> place;
  int slots_y, slots_x;
  bool fits;      // whether there is room for all slots
  bool overflow;  // whether a bin has more taps than slots
};

// The maximum number of taps of a bin: one per cell.
template <class R>
ROI_HD int slots_of(const Axis<R>& a) {
  // A bin includes part of a cell at each end, and rounding may add another.
  R spanned = add(round_up(a.bin < R(0) ? -a.bin : a.bin), R(3));
  int slots = a.size;
  if (spanned < R(slots)) slots = static_cast<int>(spanned);
  return 2 * a.samples < slots ? 2 * a.samples : slots;
}

// Room for the taps of any RoI that is on its map. Other RoIs, and RoIs on maps too large for shared memory, are pooled
// without tables, sample by sample.
template <class R>
int tap_capacity(const Call& call) {
  int64_t bins = int64_t{call.sampling.bins_y} + call.sampling.bins_x, sides = 0;
  for (int l = 0; l < call.pyramid.levels; l++) {
    int64_t here = int64_t{call.pyramid.height[l]} + call.pyramid.width[l];
    if (here > sides) sides = here;
  }
  int64_t most = (kSharedBytes - static_cast<int64_t>(sizeof(TapTables<R>) + sizeof(Tap<R>) + bins * sizeof(int))) /
                 static_cast<int64_t>(sizeof(Tap<R>));
  int64_t wanted = sides + 4 * bins;
  return static_cast<int>(most < 0 ? 0 : most < wanted ? most : wanted);
}

template <class R>
int64_t tap_bytes(const Call& call, int capacity) {
  if (capacity == 0) return sizeof(TapTables<R>);
  int64_t bins = int64_t{call.sampling.bins_y} + call.sampling.bins_x;
  return sizeof(TapTables<R>) + ceil_div(bins, 2) * 2 * sizeof(int) + capacity * sizeof(Tap<R>);
}

// The taps of one RoI, read by all threads of a block.
template <class R>
class RoITaps {
 public:
  // All threads of the block must call this once.
  ROI_DEVICE RoITaps(const Call& call, const R* box, int capacity, unsigned char* shared)
      : tables_(reinterpret_cast<TapTables<R>*>(shared)),
        counts_(reinterpret_cast<int*>(shared + sizeof(TapTables<R>))),
        bins_y_(call.sampling.bins_y) {
    int bins = bins_y_ + call.sampling.bins_x;
    taps_ = reinterpret_cast<Tap<R>*>(counts_ + (bins + 1) / 2 * 2);
    if (threadIdx.x == 0) {
      TapTables<R> t = {};
      t.place = place_of(box, call);
      if (!t.place.roi.defined) t.place.roi.y.samples = t.place.roi.x.samples = 0;
      t.slots_y = slots_of(t.place.roi.y);
      t.slots_x = slots_of(t.place.roi.x);
      int64_t wanted = int64_t{t.slots_y} * bins_y_ + int64_t{t.slots_x} * call.sampling.bins_x;
      t.fits = capacity > 0 && wanted <= capacity;
      *tables_ = t;
    }
    __syncthreads();
    fits_ = tables_->fits;
    if (fits_) {
      for (int bin = threadIdx.x; bin < bins; bin += kThreads) fill(bin);
    }
    __syncthreads();
    fits_ = fits_ && !tables_->overflow;
  }

  ROI_DEVICE const Place<R>& place() const { return tables_->place; }

  // Calls visit(row, column, weight) for every cell that a bin reads.
  template <class Visit>
  ROI_DEVICE void for_each(int by, int bx, Visit&& visit) const {
    if (!fits_) return for_each_sample(by, bx, visit);
    const Tap<R>* taps_y = taps(by);
    const Tap<R>* taps_x = taps(bins_y_ + bx);
    int count_y = counts_[by], count_x = counts_[bins_y_ + bx];
    for (int i = 0; i < count_y; i++) {
      Tap<R> y = taps_y[i];
#pragma unroll 4
      for (int j = 0; j < count_x; j++) visit(y.cell, taps_x[j].cell, mul(y.weight, taps_x[j].weight));
    }
  }

 private:
  ROI_DEVICE Tap<R>* taps(int bin) const {
    if (bin < bins_y_) return taps_ + bin * tables_->slots_y;
    return taps_ + bins_y_ * tables_->slots_y + (bin - bins_y_) * tables_->slots_x;
  }

  ROI_DEVICE void fill(int bin) {
    bool is_y = bin < bins_y_;
    const RoI<R>& roi = tables_->place.roi;
    Axis<R> axis = is_y ? roi.y : roi.x;
    R factor = is_y ? roi.inv_count : R(1);
    int slots = is_y ? tables_->slots_y : tables_->slots_x, count = 0;
    Tap<R>* out = taps(bin);
    merged_taps(axis, is_y ? bin : bin - bins_y_, [&](int cell, R weight) {
      if (count < slots) out[count] = {cell, mul(weight, factor)};
      count++;
    });
    counts_[bin] = count;
    if (count > slots) tables_->overflow = true;
  }

  template <class Visit>
  ROI_DEVICE void for_each_sample(int by, int bx, Visit&& visit) const {
    const RoI<R>& roi = tables_->place.roi;
    R begin_y = bin_start(roi.y, by), begin_x = bin_start(roi.x, bx);
    Range in_y = samples_inside(roi.y, begin_y), in_x = samples_inside(roi.x, begin_x);
    for (int iy = in_y.begin; iy < in_y.end; iy++) {
      Cells<R> y = cells_of(roi.y, sample_at(roi.y, begin_y, iy));
      for (int ix = in_x.begin; ix < in_x.end; ix++) {
        Cells<R> x = cells_of(roi.x, sample_at(roi.x, begin_x, ix));
#pragma unroll 1
        for (int corner = 0; corner < 4; corner++) {
          int up = corner / 2, right = corner % 2;
          R weight_y = mul(up ? y.high_weight : y.low_weight, roi.inv_count);
          R weight = mul(weight_y, right ? x.high_weight : x.low_weight);
          if (weight != R(0)) visit(y.low + up, x.low + right, weight);
        }
      }
    }
  }

  TapTables<R>* tables_;
  int* counts_;
  Tap<R>* taps_;
  int bins_y_;
  bool fits_;
};

// The number of blocks that share a multiprocessor's registers. fp64 needs more than a third of them.
template <class T>
constexpr int kAverageBlocks = sizeof(T) == 8 ? 2 : 4;

// For channels_last: `lanes` neighbouring threads take neighbouring vectors of a cell.
template <class T>
ROI_KERNEL(kAverageBlocks<T>) average_vectors(Call call, Maps<const T> maps, const Working<T>* boxes, T* out, int lanes, int chunks,
                              int capacity) {
  ROI_SHARED_MEMORY(shared);
  int64_t index = blockIdx.x / chunks;
  RoITaps<Working<T>> taps(call, boxes + 5 * index, capacity, shared);

  int64_t c = (int64_t{blockIdx.x} % chunks * lanes + threadIdx.x % lanes) * kVector<T>;
  if (c >= call.channels) return;
  const Place<Working<T>>& place = taps.place();
  int level = place.roi.level, bins_x = call.sampling.bins_x;
  int64_t cell = call.channels, row = cell * call.pyramid.width[level];
  // An undefined box reads no cells.
  const T* map = maps.level[level] + place.image * row * call.pyramid.height[level] + c;
  T* bins = out + index * call.bins() * cell + c;
  Working<T> start = place.roi.defined ? Working<T>(0) : not_a_number<Working<T>>();

  for (int64_t b = threadIdx.x / lanes; b < call.bins(); b += kThreads / lanes) {
    int by = static_cast<int>(quotient(b, bins_x)), bx = static_cast<int>(b - int64_t{by} * bins_x);
    Working<T> sum[kVector<T>];
#pragma unroll
    for (int v = 0; v < kVector<T>; v++) sum[v] = start;
    taps.for_each(by, bx, [&](int y, int x, Working<T> weight) {
      Working<T> values[kVector<T>];
      load_vector(map + y * row + x * cell, values);
#pragma unroll
      for (int v = 0; v < kVector<T>; v++) sum[v] = fused(weight, values[v], sum[v]);
    });
    store_vector(bins + b * cell, sum);
  }
}

// For any layout: neighbouring threads take neighbouring outputs, so that whole cache lines are written.
template <class T>
ROI_KERNEL(kAverageBlocks<T>) average_elements(Call call, Maps<const T> maps, const Working<T>* boxes, T* out, int64_t chunk_channels,
                               int64_t chunks, int capacity) {
  ROI_SHARED_MEMORY(shared);
  int64_t index = quotient(blockIdx.x, chunks), first = (blockIdx.x - index * chunks) * chunk_channels;
  RoITaps<Working<T>> taps(call, boxes + 5 * index, capacity, shared);

  const Place<Working<T>>& place = taps.place();
  int level = place.roi.level, bins_x = call.sampling.bins_x;
  Strides from = strides_of(call.channels_last, call.channels, call.pyramid.height[level], call.pyramid.width[level]);
  Strides to = strides_of(call.channels_last, call.channels, call.sampling.bins_y, bins_x);
  const T* map = maps.level[level] + place.image * from.item;
  Working<T> start = place.roi.defined ? Working<T>(0) : not_a_number<Working<T>>();
  int64_t channels = call.channels - first < chunk_channels ? call.channels - first : chunk_channels;

  for (int64_t i = threadIdx.x; i < channels * call.bins(); i += kThreads) {
    int64_t outer = quotient(i, call.channels_last ? channels : call.bins());
    int64_t inner = i - outer * (call.channels_last ? channels : call.bins());
    int64_t c = first + (call.channels_last ? inner : outer), b = call.channels_last ? outer : inner;
    int by = static_cast<int>(quotient(b, bins_x)), bx = static_cast<int>(b - int64_t{by} * bins_x);
    Working<T> sum = start;
    taps.for_each(by, bx, [&](int y, int x, Working<T> weight) {
      T value = map[c * from.channel + y * from.row + x * from.cell];
      sum = fused(weight, static_cast<Working<T>>(value), sum);
    });
    out[index * to.item + c * to.channel + b * to.cell] = static_cast<T>(sum);
  }
}

// Outputs per block of average_elements: enough to make the tables worth their cost.
constexpr int64_t kElementsABlock = 4096;
// Lanes of average_vectors: 256 bytes, so that cells shared by a RoI's bins stay in the L1 cache.
constexpr int kMostLanes = 16;

// Returns false if the call needs more blocks than a launch may have.
template <class T>
bool launch_average(const Call& call, const Maps<const T>& maps, const Working<T>* boxes, T* out,
                    int device) {
  int capacity = tap_capacity<Working<T>>(call);
  bool vectors = call.channels_last && is_vectorised<T>(out, call.channels);
  for (int l = 0; l < call.pyramid.levels; l++) vectors = vectors && is_vectorised<T>(maps.level[l], call.channels);
  if (vectors) {
    int lanes = 1;
    while (lanes < kMostLanes && lanes * kVector<T> < call.channels) lanes *= 2;
    int64_t chunks = ceil_div(call.channels, lanes * kVector<T>);
    if (chunks > kMostBlocks / call.rois) return false;
    ROI_LAUNCH(average_vectors, T, call.rois * chunks, tap_bytes<Working<T>>(call, capacity), device, call, maps, boxes,
               out, lanes, static_cast<int>(chunks), capacity);
    return true;
  }
  int64_t chunk_channels = kElementsABlock / call.bins() > 1 ? kElementsABlock / call.bins() : 1;
  int64_t chunks = ceil_div(call.channels, chunk_channels);
  if (chunks > kMostBlocks / call.rois) return false;
  ROI_LAUNCH(average_elements, T, call.rois * chunks, tap_bytes<Working<T>>(call, capacity), device, call, maps, boxes,
             out, chunk_channels, chunks, capacity);
  return true;
}

}  // namespace roi::cuda
