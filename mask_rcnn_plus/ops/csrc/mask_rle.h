// The samples of a pasted mask, for the instruction set of the translation unit that includes this.
#pragma once
#include "roi_cpu_simd.h"

namespace {

// a * b + c, rounded once or twice, as torch's own sampling does on this machine (mask_rle.cpp).
template <bool Fused>
ROI_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  if constexpr (!Fused) return a * b + c;
#if ROI_VECTOR_BYTES > 16
  return fma(a, b, c);
#else
  for (int i = 0; i < kLanes<float>; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

template <bool Fused>
void reach(const roi::MaskCell& cell, float west, float east, const float* north, const float* south, int64_t count,
           float threshold, uint64_t* bits) {
  for (int64_t word = 0; word < (count + 63) / 64; word++) bits[word] = 0;
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    Vec<float> n = load(north + i, 0.f), s = load(south + i, 0.f);
    Vec<float> value = splat(cell.nw) * (splat(west) * n);
    value = multiply_add<Fused>(splat(cell.ne), splat(east) * n, value);
    value = multiply_add<Fused>(splat(cell.sw), splat(west) * s, value);
    value = multiply_add<Fused>(splat(cell.se), splat(east) * s, value);
    bits[i / 64] |= uint64_t{lane_bits<float>(value >= splat(threshold))} << (i % 64);
  }
  if (count % 64 != 0) bits[count / 64] &= (uint64_t{1} << (count % 64)) - 1;
}

}  // namespace
