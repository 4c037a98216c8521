// What NVRTC lacks without the headers of a CUDA toolkit: integers of fixed size, and 16-bit floating-point numbers.
#pragma once

using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#define INT32_MAX 2147483647

namespace c10 {

struct Half {
  unsigned short bits;
  Half() = default;
  __device__ explicit Half(float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
  __device__ operator float() const {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};

struct BFloat16 {
  unsigned short bits;
  BFloat16() = default;
  __device__ explicit BFloat16(float value) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    unsigned wide = __float_as_uint(value);
    // To the nearest, halves to even.
    bits = value != value ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
#endif
  }
  __device__ operator float() const { return __uint_as_float(unsigned{bits} << 16); }
};

}  // namespace c10
