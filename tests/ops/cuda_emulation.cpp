// The CUDA kernels of the RoI operators, compiled for the CPU and called by test_cuda_emulation.py through ctypes; and
// for comparison the same operators, written directly from their definitions, one sample or point at a time.
#include "cuda_emulation_driver.h"

namespace {

using namespace roi;
using roi::cuda::BFloat16;
using roi::cuda::Call;
using roi::cuda::Half;
using roi::cuda::Maps;
using roi::cuda::Plan;
using roi::cuda::Working;
using roi::cuda::Strides;

std::string message;

template <class Run>
const char* report(const Run& run) {
  message.clear();
  try {
    if (!run()) message = "refused";
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

enum Type { kFloat, kDouble, kHalf, kBFloat16 };

template <class Run>
auto dispatch(int type, const Run& run) {
  switch (type) {
    case kFloat: return run(float());
    case kDouble: return run(double());
    case kHalf: return run(Half());
    default: return run(BFloat16());
  }
}

template <class T>
Maps<T> maps_at(void* const* pointers, const Call& call) {
  Maps<T> m = {};
  for (int l = 0; l < call.pyramid.levels; l++) m.level[l] = static_cast<T*>(pointers[l]);
  return m;
}

// Calls visit(roi, bin_y, bin_x, channel) for every output of every defined box.
template <class R, class Visit>
void for_each_output(const Call& call, const R* boxes, const Visit& visit) {
  for (int64_t i = 0; i < call.rois; i++) {
    RoI<R> r = locate(boxes + 5 * i, call.pyramid, call.sampling);
    if (!r.defined) continue;
    for (int by = 0; by < call.sampling.bins_y; by++)
      for (int bx = 0; bx < call.sampling.bins_x; bx++)
        for (int64_t c = 0; c < call.channels; c++) visit(i, r, by, bx, c);
  }
}

// Calls visit(cell offset, weight) for the cells of one point, except those of weight zero.
template <class R, class Visit>
void for_each_cell(const Cells<R>& y, const Cells<R>& x, const Strides& s, const Visit& visit) {
  for (int corner = 0; corner < 4; corner++) {
    bool up = corner / 2, right = corner % 2;
    R weight_y = up ? y.high_weight : y.low_weight, weight_x = right ? x.high_weight : x.low_weight;
    if (weight_y != 0 && weight_x != 0) visit((y.low + up) * s.row + (x.low + right) * s.cell, weight_y * weight_x);
  }
}

// Calls visit(sample y, sample x) for all points of a bin that are on the map.
template <class R, class Visit>
void for_each_point(const RoI<R>& r, int by, int bx, const Visit& visit) {
  Range in_y = points_of(r.y, by), in_x = points_of(r.x, bx);
  for (int iy = in_y.begin; iy < in_y.end; iy++)
    for (int ix = in_x.begin; ix < in_x.end; ix++)
      visit(point_at(r.y, bin_start(r.y, by), iy), point_at(r.x, bin_start(r.x, bx), ix),
            (iy - in_y.begin) * (in_x.end - in_x.begin) + ix - in_x.begin);
}

Strides map_strides(const Call& call, int level) {
  return cuda::strides_of(call.channels_last, call.channels, call.pyramid.height[level], call.pyramid.width[level]);
}

int64_t output_at(const Call& call, bool channels_last, int64_t i, int by, int bx, int64_t c) {
  Strides s = cuda::strides_of(channels_last, call.channels, call.sampling.bins_y, call.sampling.bins_x);
  return i * s.item + c * s.channel + by * s.row + bx * s.cell;
}

template <class R>
int64_t map_at(const Call& call, const RoI<R>& r, const R* box, int64_t c) {
  Strides s = map_strides(call, r.level);
  return image_of(box, call.pyramid.images) * s.item + c * s.channel;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API Call* new_call(int levels, const int64_t* sizes, const float* scales, int min_level, float canonical_size,
                   int canonical_level, int bins_y, int bins_x, int ratio, int grid, int64_t rois, bool channels_last) {
  Call* call = new Call{};
  call->pyramid.levels = levels;
  call->pyramid.images = static_cast<int>(sizes[0]);
  call->pyramid.min_level = min_level;
  call->pyramid.canonical_level = canonical_level;
  call->pyramid.canonical_size = canonical_size;
  for (int l = 0; l < levels; l++) {
    call->pyramid.scale[l] = scales[l];
    call->pyramid.height[l] = static_cast<int>(sizes[4 * l + 2]);
    call->pyramid.width[l] = static_cast<int>(sizes[4 * l + 3]);
  }
  call->sampling = {bins_y, bins_x, ratio > 0 ? ratio : 0, static_cast<Grid>(grid)};
  call->rois = rois;
  call->channels = sizes[1];
  call->channels_last = channels_last;
  return call;
}

API void delete_call(Call* call) { delete call; }

API const char* average(const Call* call, int type, uint64_t seed, void* const* maps, const void* boxes, void* out) {
  return report([&] {
    emulation::machine.seed(seed);
    return dispatch(type, [&](auto t) {
      using T = decltype(t);
      return cuda::launch_average<T>(*call, maps_at<const T>(maps, *call), static_cast<const Working<T>*>(boxes),
                                     static_cast<T*>(out), 0);
    });
  });
}

API int64_t plan_bytes(const Call* call) { return Plan<double>::bytes(call->rois, cuda::maps_of(*call)); }

API const char* average_backward(const Call* call, int type, uint64_t seed, const void* grad, bool grad_channels_last,
                                 const void* boxes, void* plan, void* const* maps) {
  return report([&] {
    emulation::machine.seed(seed);
    return dispatch(type, [&](auto t) {
      using T = decltype(t);
      using W = Working<T>;
      return cuda::launch_average_backward<T>(*call, static_cast<const W*>(boxes), static_cast<const T*>(grad),
                                              grad_channels_last, maps_at<T>(maps, *call),
                                              Plan<W>::in(plan, call->rois), 0);
    });
  });
}

API const char* maximum(const Call* call, int type, uint64_t seed, void* const* maps, const void* boxes, void* out,
                        int* index) {
  return report([&] {
    emulation::machine.seed(seed);
    return dispatch(type, [&](auto t) {
      using T = decltype(t);
      return cuda::launch_max<T>(*call, maps_at<const T>(maps, *call), static_cast<const Working<T>*>(boxes),
                                 static_cast<T*>(out), index, 0);
    });
  });
}

API const char* maximum_backward(const Call* call, int type, uint64_t seed, const void* grad, bool grad_channels_last,
                                 const int* index, const void* boxes, void* plan, void* const* maps) {
  return report([&] {
    emulation::machine.seed(seed);
    return dispatch(type, [&](auto t) {
      using T = decltype(t);
      using W = Working<T>;
      return cuda::launch_max_backward<T>(*call, static_cast<const W*>(boxes), static_cast<const T*>(grad),
                                          grad_channels_last, index, call->channels_last, maps_at<T>(maps, *call),
                                          Plan<W>::in(plan, call->rois), 0);
    });
  });
}

// The definitions, with boxes, coordinates and weights of type R.
namespace {

// Maps and sums are fp64. The average of an empty bin is zero, that of an undefined box NaN (the initial value of
// `out`).
template <class R>
void define_average(const Call& call, double* const* maps, const R* boxes, double* out) {
  for_each_output(call, boxes, [&](int64_t i, const RoI<R>& r, int by, int bx, int64_t c) {
    const double* map = maps[r.level] + map_at(call, r, boxes + 5 * i, c);
    double sum = 0;
    for_each_point(r, by, bx, [&](Cells<R> y, Cells<R> x, int) {
      for_each_cell(y, x, map_strides(call, r.level), [&](int64_t at, double weight) { sum += weight * map[at]; });
    });
    double count = static_cast<double>(r.y.samples) * r.x.samples;
    out[output_at(call, call.channels_last, i, by, bx, c)] = sum / std::max(count, 1.0);
  });
}

// Adds to the maps.
template <class R>
void define_average_backward(const Call& call, const double* grad, bool grad_channels_last, const R* boxes,
                             double* const* maps) {
  for_each_output(call, boxes, [&](int64_t i, const RoI<R>& r, int by, int bx, int64_t c) {
    double* map = maps[r.level] + map_at(call, r, boxes + 5 * i, c);
    double g = grad[output_at(call, grad_channels_last, i, by, bx, c)];
    double count = static_cast<double>(r.y.samples) * r.x.samples;
    for_each_point(r, by, bx, [&](Cells<R> y, Cells<R> x, int) {
      for_each_cell(y, x, map_strides(call, r.level), [&](int64_t at, double weight) { map[at] += weight / count * g; });
    });
  });
}

// Maps and sums are of type R, since rounding decides which points are equal. For undefined boxes the outputs keep their
// initial values.
template <class R>
void define_maximum(const Call& call, void* const* maps, const R* boxes, R* out, int* index) {
  for_each_output(call, boxes, [&](int64_t i, const RoI<R>& r, int by, int bx, int64_t c) {
    const R* map = static_cast<const R*>(maps[r.level]) + map_at(call, r, boxes + 5 * i, c);
    R best = 0;
    int best_index = -1;
    int64_t inside = 0;
    for_each_point(r, by, bx, [&](Cells<R> y, Cells<R> x, int at_point) {
      R value = 0;
      for_each_cell(y, x, map_strides(call, r.level), [&](int64_t at, R weight) { value += weight * map[at]; });
      if (inside++ == 0 || (!std::isnan(best) && !(value <= best))) {
        best = value;
        best_index = at_point;
      }
    });
    // Samples outside count as zero, and come after those inside.
    if (r.y.samples > 0 && inside < int64_t{r.y.samples} * r.x.samples && (inside == 0 || best < 0)) {
      best = 0;
      best_index = -1;
    }
    int64_t at = output_at(call, call.channels_last, i, by, bx, c);
    out[at] = best;
    index[at] = best_index;
  });
}

template <class R>
void define_maximum_backward(const Call& call, const double* grad, bool grad_channels_last, const int* index,
                             const R* boxes, double* const* maps) {
  for_each_output(call, boxes, [&](int64_t i, const RoI<R>& r, int by, int bx, int64_t c) {
    double* map = maps[r.level] + map_at(call, r, boxes + 5 * i, c);
    double g = grad[output_at(call, grad_channels_last, i, by, bx, c)];
    int wanted = index[output_at(call, call.channels_last, i, by, bx, c)];
    for_each_point(r, by, bx, [&](Cells<R> y, Cells<R> x, int point) {
      if (point != wanted) return;
      for_each_cell(y, x, map_strides(call, r.level), [&](int64_t at, double weight) { map[at] += weight * g; });
    });
  });
}

// Calls run(boxes) with the boxes as float or double.
template <class Run>
void with_boxes(const void* boxes, bool fp64, const Run& run) {
  if (fp64) run(static_cast<const double*>(boxes));
  else run(static_cast<const float*>(boxes));
}

}  // namespace

API void plain_average(const Call* call, bool fp64, const void* boxes, double* const* maps, double* out) {
  with_boxes(boxes, fp64, [&](auto* typed) { define_average(*call, maps, typed, out); });
}

API void plain_average_backward(const Call* call, bool fp64, const void* boxes, const double* grad,
                                bool grad_channels_last, double* const* maps) {
  with_boxes(boxes, fp64,
             [&](auto* typed) { define_average_backward(*call, grad, grad_channels_last, typed, maps); });
}

API void plain_maximum(const Call* call, bool fp64, const void* boxes, void* const* maps, void* out, int* index) {
  if (fp64) define_maximum(*call, maps, static_cast<const double*>(boxes), static_cast<double*>(out), index);
  else define_maximum(*call, maps, static_cast<const float*>(boxes), static_cast<float*>(out), index);
}

API void plain_maximum_backward(const Call* call, bool fp64, const void* boxes, const double* grad,
                                bool grad_channels_last, const int* index, double* const* maps) {
  with_boxes(boxes, fp64,
             [&](auto* typed) { define_maximum_backward(*call, grad, grad_channels_last, index, typed, maps); });
}

// The number of axes that have a bin with more taps than the forward tables can hold. Those RoIs are pooled slowly.
API int axes_beyond_tables(const Call* call, const float* boxes) {
  int count = 0;
  for (int64_t i = 0; i < call->rois; i++) {
    RoI<float> r = locate(boxes + 5 * i, call->pyramid, call->sampling);
    for (const Axis<float>& axis : {r.y, r.x}) {
      int most = 0;
      for (int bin = 0; bin < call->sampling.bins_y; bin++) {
        int taps = 0;
        if (r.defined) merged_taps(axis, bin, [&](int, float) { taps++; });
        most = std::max(most, taps);
      }
      count += most > cuda::slots_of(axis);
    }
  }
  return count;
}

// The sizes of a kernel's parameters, ended by 0.
API const int* parameter_sizes(const char* kernel) {
  static std::vector<int> sizes;
  sizes = emulation::kernels().at(kernel).sizes;
  sizes.push_back(0);
  return sizes.data();
}

// Sums a block's numbers through shared memory, with or without the necessary barrier: tests the emulation itself.
API unsigned sum_of_a_block(uint64_t seed, bool with_barrier) {
  unsigned sum = 0;
  emulation::machine.seed(seed);
  emulation::launch(1, 64, 64 * sizeof(int), [&] {
    unsigned* shared = reinterpret_cast<unsigned*>(emulation::shared_memory());
    shared[threadIdx.x] = threadIdx.x;
    if (with_barrier) __syncthreads();
    if (threadIdx.x != 40) return;
    for (int i = 0; i < 64; i++) sum += shared[i];
  });
  return sum;
}
