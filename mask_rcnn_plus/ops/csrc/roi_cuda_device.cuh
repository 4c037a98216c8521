// What every kernel file needs of CUDA. For the tests, kernels are compiled a second time, by the host's compiler:
// there tests/ops/cuda_emulation.h stands in for CUDA and runs their threads one by one. So this is the only file that
// names CUDA's headers.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <limits>

#include "roi_math.h"

#ifdef __CUDACC__
// A wrong image index must stop the program, in release builds too.
#undef NDEBUG
#include <cuda_runtime.h>

#include <cassert>
#define ROI_DEVICE __device__ __forceinline__
#define ROI_KERNEL(blocks_an_sm) __global__ void __launch_bounds__(roi::cuda::kThreads, blocks_an_sm)
#define ROI_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define ROI_ASSERT(condition) assert(condition)
#else
#include "cuda_emulation.h"
#define ROI_DEVICE inline
#define ROI_KERNEL(blocks_an_sm) void
#define ROI_SHARED_MEMORY(name) unsigned char* name = emulation::shared_memory()
#define ROI_ASSERT(condition) emulation::check(condition, #condition)
#endif

namespace roi::cuda {

using c10::BFloat16;
using c10::Half;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Kernels take a block's shared memory without asking for more than every device grants.
constexpr int64_t kSharedBytes = 40 * 1024;
constexpr int64_t kMostBlocks = INT32_MAX;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  (void)stream;
  emulation::launch(blocks, kThreads, shared_bytes, [&] { kernel(arguments...); });
#endif
}

// The facts of one call that all its kernels share.
struct Call {
  Pyramid pyramid;
  Sampling sampling;
  int64_t rois, channels;
  bool channels_last;  // the maps, their gradients, and the output

  ROI_HD int64_t bins() const { return int64_t{sampling.bins_y} * sampling.bins_x; }
};

// One pointer a level, to a dense (N, C, H, W) tensor.
template <class T>
struct Maps {
  T* level[kMaxLevels];
};

// Of a dense four-dimensional tensor; they count elements.
struct Strides {
  int64_t item, channel, row, cell;
};

ROI_HD Strides strides_of(bool channels_last, int64_t channels, int64_t height, int64_t width) {
  int64_t item = channels * height * width;
  if (channels_last) return {item, 1, width * channels, channels};
  return {item, height * width, width, 1};
}

ROI_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64-bit division takes a hundred instructions; nearly every operand is small.
ROI_HD int64_t quotient(int64_t a, int64_t b) {
  if (a <= INT32_MAX && b <= INT32_MAX) return static_cast<int32_t>(a) / static_cast<int32_t>(b);
  return a / b;
}

// The box's place, undefined where it names no image. The host cannot look at boxes without waiting for the device, so
// a wrong index is found here: as in torch's own lookups it fails an assertion, which the program meets at its next
// synchronisation.
struct Place {
  RoI roi;
  int image;
};

ROI_DEVICE Place place_of(const float* box, const Call& call) {
  Place p = {locate(box, call.pyramid, call.sampling), image_of(box, call.pyramid.images)};
  ROI_ASSERT(p.image >= 0 && "boxes name an image that the features do not hold");
  if (p.image < 0) {
    p.roi.defined = false;
    p.image = 0;
  }
  return p;
}

// Sums are made in fp32, and for fp64 in fp64.
template <class T>
struct WorkingType {
  using Type = float;
};
template <>
struct WorkingType<double> {
  using Type = double;
};
template <class T>
using Working = typename WorkingType<T>::Type;

template <class W>
ROI_DEVICE W not_a_number() {
  return std::numeric_limits<W>::quiet_NaN();
}

ROI_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
ROI_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// 16 bytes, the widest access there is.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
ROI_DEVICE void load_vector(const T* from, Working<T> (&to)[kVector<T>]) {
  uint4 bits = *reinterpret_cast<const uint4*>(from);
  T items[kVector<T>];
  memcpy(items, &bits, sizeof(bits));
#pragma unroll
  for (int v = 0; v < kVector<T>; v++) to[v] = static_cast<Working<T>>(items[v]);
}

template <class T>
ROI_DEVICE void store_vector(T* to, const Working<T> (&from)[kVector<T>]) {
  T items[kVector<T>];
#pragma unroll
  for (int v = 0; v < kVector<T>; v++) items[v] = static_cast<T>(from[v]);
  uint4 bits;
  memcpy(&bits, items, sizeof(bits));
  // A plain assignment may be taken apart into four.
  __stwb(reinterpret_cast<uint4*>(to), bits);
}

// Whether every cell of a channels_last tensor starts on a vector's boundary.
template <class T>
bool is_vectorised(const void* data, int64_t channels) {
  return channels % kVector<T> == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace roi::cuda
