// The inner loops by storage type, for the instruction set of the translation unit that includes this.
#pragma once
#include "mask_rle.h"
#include "roi_cpu_average.h"
#include "roi_cpu_max.h"

namespace {

template <class A, class T>
constexpr roi::Kernels<A> kTable = {
    average<A, T, T>,     average<A, A, A>,  nullptr,     spread<A, T>, spread<A, A>,
    maximum<A, T, T>,     maximum<A, A, A>,  route<A, T>, route<A, A>,  gather_planes<A, T>,
    scatter_planes<A, T>, store_cells<A, T>, nullptr,     nullptr,
};

constexpr roi::Kernels<float> with_float_only(roi::Kernels<float> table) {
  table.average_streaming = average<float, float, float, true>;
  table.reach = reach<false>;
  table.reach_fused = reach<true>;
  return table;
}
constexpr roi::Kernels<float> kFloatTable = with_float_only(kTable<float, float>);

template <class R>
const roi::Kernels<R>* table(roi::Storage storage) {
  if constexpr (sizeof(R) == 8) return &kTable<double, double>;
  else if (storage == roi::Storage::kHalf) return &kTable<float, Half>;
  else if (storage == roi::Storage::kBFloat16) return &kTable<float, BFloat16>;
  else return &kFloatTable;
}

}  // namespace
