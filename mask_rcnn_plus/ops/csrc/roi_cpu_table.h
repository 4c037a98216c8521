// The inner loops by storage type, for the instruction set of the translation unit that includes this.
#pragma once
#include "mask_rle.h"
#include "roi_cpu_average.h"
#include "roi_cpu_max.h"

namespace {

template <class A, class T>
constexpr roi::Kernels kTable = {
    average<A, T, T>,     average<A, A, A>,  nullptr,     spread<A, T>, spread<A, A>,
    maximum<A, T, T>,     maximum<A, A, A>,  route<A, T>, route<A, A>,  gather_planes<A, T>,
    scatter_planes<A, T>, store_cells<A, T>, nullptr,     nullptr,
};

constexpr roi::Kernels with_float_alone(roi::Kernels table) {
  table.average_streaming = average<float, float, float, true>;
  table.reach = reach<false>;
  table.reach_fused = reach<true>;
  return table;
}
constexpr roi::Kernels kFloatTable = with_float_alone(kTable<float, float>);

const roi::Kernels* table(roi::Storage storage) {
  switch (storage) {
    case roi::Storage::kFloat: return &kFloatTable;
    case roi::Storage::kDouble: return &kTable<double, double>;
    case roi::Storage::kHalf: return &kTable<float, Half>;
    default: return &kTable<float, BFloat16>;
  }
}

}  // namespace
