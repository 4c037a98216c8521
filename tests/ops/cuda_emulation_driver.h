// The kernels by name, and a CUDA driver that runs them in the emulation: it gets pointers to the arguments, as CUDA's
// does, so that the code that finds and launches kernels is the product's own.
#pragma once
#include <map>

#include "cuda_emulation.h"
// The emulation must come before the headers that it replaces.
#include "roi_cuda_average.cuh"
#include "roi_cuda_average_backward.cuh"
#include "roi_cuda_max.cuh"
#include "roi_cuda_max_backward.cuh"

namespace emulation {

struct LoadedKernel {
  std::vector<int> sizes;  // of the parameters
  std::function<void(void**)> run;
};

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}

template <class... P>
LoadedKernel loaded(void (*kernel)(P...)) {
  return {{static_cast<int>(sizeof(P))...}, [kernel](void** a) { call(kernel, a, std::index_sequence_for<P...>()); }};
}

using Kernels = std::map<std::string, LoadedKernel>;

template <class T>
void add_kernels(Kernels& all) {
  using namespace roi::cuda;
  std::string type = std::string("<") + kTypeName<T> + ">";
  all["roi::cuda::average_vectors" + type] = loaded(&average_vectors<T>);
  all["roi::cuda::average_elements" + type] = loaded(&average_elements<T>);
  all["roi::cuda::spread_vectors" + type] = loaded(&spread_vectors<T>);
  all["roi::cuda::spread_elements" + type] = loaded(&spread_elements<T>);
  all["roi::cuda::max_elements" + type] = loaded(&max_elements<T>);
  all["roi::cuda::spread_maxima" + type] = loaded(&spread_maxima<T>);
  if constexpr (sizeof(T) >= 4) {
    all["roi::cuda::plan_rois" + type] = loaded(&plan_rois<T>);
    all["roi::cuda::rank_rois" + type] = loaded(&rank_rois<T>);
  }
}

inline const Kernels& kernels() {
  static const Kernels all = [] {
    Kernels k;
    add_kernels<float>(k);
    add_kernels<double>(k);
    add_kernels<roi::cuda::Half>(k);
    add_kernels<roi::cuda::BFloat16>(k);
    return k;
  }();
  return all;
}

inline void* find_kernel(const char* name, int, void**, char* message) {
  auto found = kernels().find(name);
  if (found != kernels().end()) return const_cast<LoadedKernel*>(&found->second);
  std::strcpy(message, "unknown kernel");
  return nullptr;
}

inline int launch_kernel(void* function, unsigned blocks, unsigned grid_y, unsigned grid_z, unsigned threads,
                         unsigned block_y, unsigned block_z, unsigned shared_bytes, void*, void** arguments, void**) {
  if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1) return 1;  // CUDA_ERROR_INVALID_VALUE
  launch(blocks, threads, shared_bytes, [&] { static_cast<const LoadedKernel*>(function)->run(arguments); });
  return 0;
}

inline int32_t no_stream(int32_t, void**) { return 0; }

inline const bool connected = [] {
  roi::cuda::driver = {find_kernel, [](void*) { return 0; }, launch_kernel, no_stream};
  return true;
}();

}  // namespace emulation
