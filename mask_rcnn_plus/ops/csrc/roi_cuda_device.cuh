// Everything that the kernel files need from CUDA. NVRTC compiles the kernels; the host's compiler only reads their
// parameters. For the tests, it also compiles them, with tests/ops/cuda_emulation.h, which runs their threads one by one.
#pragma once
#include "roi_math.h"

#ifdef __CUDACC_RTC__
// A wrong image index must stop the program.
#undef NDEBUG
#define ROI_DEVICE __device__ __forceinline__
#define ROI_KERNEL(blocks_an_sm) __global__ void __launch_bounds__(roi::cuda::kThreads, blocks_an_sm)
#define ROI_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define ROI_ASSERT(condition) assert(condition)
#define ROI_LAUNCH(kernel, T, ...)
#else
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#define ROI_DEVICE inline
#define ROI_KERNEL(blocks_an_sm) void
// ROI_LAUNCH(kernel, type, blocks, bytes of shared memory, device, arguments...)
#define ROI_LAUNCH(kernel, T, ...)                                                 \
  do {                                                                             \
    static Kernel compiled(#kernel, kTypeName<T>);                                 \
    launch(static_cast<decltype(&kernel<T>)>(nullptr), compiled, __VA_ARGS__);     \
  } while (false)
#ifndef ROI_EMULATION
#define ROI_SHARED_MEMORY(name) unsigned char* name = shared_memory
#define ROI_ASSERT(condition) (void)(condition)
#endif
#endif

namespace roi::cuda {

using c10::BFloat16;
using c10::Half;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// The shared memory per block that every device grants without a request for more.
constexpr int64_t kSharedBytes = 40 * 1024;
constexpr int64_t kMostBlocks = INT32_MAX;

// As in the kernels' names.
template <class T>
constexpr const char* kTypeName = "float";
template <>
inline constexpr const char* kTypeName<double> = "double";
template <>
inline constexpr const char* kTypeName<Half> = "c10::Half";
template <>
inline constexpr const char* kTypeName<BFloat16> = "c10::BFloat16";

}  // namespace roi::cuda

#ifndef __CUDACC_RTC__
#include "roi_cuda_host.h"
#endif

namespace roi::cuda {

// The arguments that all kernels of one call share.
struct Call {
  Pyramid pyramid;
  Sampling sampling;
  int64_t rois, channels;
  bool channels_last;  // layout of the maps, their gradients, and the output

  ROI_HD int64_t bins() const { return int64_t{sampling.bins_y} * sampling.bins_x; }
};

// One pointer per level, to a dense (N, C, H, W) tensor.
template <class T>
struct Maps {
  T* level[kMaxLevels];
};

// Strides of a dense four-dimensional tensor, in elements.
struct Strides {
  int64_t item, channel, row, cell;
};

ROI_HD Strides strides_of(bool channels_last, int64_t channels, int64_t height, int64_t width) {
  int64_t item = channels * height * width;
  if (channels_last) return {item, 1, width * channels, channels};
  return {item, height * width, width, 1};
}

ROI_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64-bit division takes a hundred instructions, and nearly all operands fit in 32 bits.
ROI_HD int64_t quotient(int64_t a, int64_t b) {
  if (a <= INT32_MAX && b <= INT32_MAX) return static_cast<int32_t>(a) / static_cast<int32_t>(b);
  return a / b;
}

// The box's position on its map; undefined if the image index is wrong. The host cannot read boxes without waiting for
// the device, so the index is checked here: as in torch's own indexing, a wrong one fails an assertion, which is
// reported at the next synchronisation.
template <class R>
struct Place {
  RoI<R> roi;
  int image;
};

template <class R>
ROI_DEVICE Place<R> place_of(const R* box, const Call& call) {
  Place<R> p = {locate(box, call.pyramid, call.sampling), image_of(box, call.pyramid.images)};
  ROI_ASSERT(p.image >= 0 && "boxes name an image that the features do not hold");
  if (p.image < 0) {
    p.roi.defined = false;
    p.image = 0;
  }
  return p;
}

// Boxes, weights and sums are fp32, and fp64 for fp64 features.
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
  return static_cast<W>(nanf(""));
}

ROI_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
ROI_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// 16 bytes, the widest access.
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
  // The compiler may split a plain assignment into four.
  __stwb(reinterpret_cast<uint4*>(to), bits);
}

// Whether every cell of a channels_last tensor starts at a multiple of the vector's size.
template <class T>
bool is_vectorised(const void* data, int64_t channels) {
  return channels % kVector<T> == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace roi::cuda
