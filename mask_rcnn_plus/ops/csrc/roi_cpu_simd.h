// Vectors of the width this file is compiled for, loaded from and stored to every storage type.
//
// Included by one translation unit for each instruction set, after it has chosen its target. Everything here has
// internal linkage: a linker must never pick the AVX-512 copy of a function for the baseline.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>
#include <utility>

#define ROI_INLINE static inline __attribute__((always_inline))

namespace {

// Chosen by the including file: GCC 12 does not define __AVX512F__ and its like after `#pragma GCC target` in C++.
#ifndef ROI_VECTOR_BYTES
#define ROI_VECTOR_BYTES 16
#endif
constexpr int kVectorBytes = ROI_VECTOR_BYTES;
// Accumulators that leave registers for operands: AVX-512 has 32, the others 16.
constexpr int kForwardVectors = ROI_VECTOR_BYTES == 64 ? 16 : 8;
constexpr int kBackwardVectors = ROI_VECTOR_BYTES == 64 ? 8 : 4;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int lanes = kVectorBytes / sizeof(A);
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = VecOf<A>::lanes;

typedef uint32_t VecBits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
ROI_INLINE Vec<A> splat(A a) {
  return a - Vec<A>{};
}

ROI_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if ROI_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif ROI_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

ROI_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if ROI_VECTOR_BYTES == 64
  return _mm512_fmadd_pd(a, b, c);
#elif ROI_VECTOR_BYTES == 32
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Same-type loads and stores.
template <class A>
ROI_INLINE Vec<A> load(const A* p, A) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
ROI_INLINE void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

ROI_INLINE HalfBits load_bits(const void* p) {
  HalfBits v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

ROI_INLINE Vec<float> load(const BFloat16* p, float) {
  return (Vec<float>)(__builtin_convertvector(load_bits(p), VecBits) << 16);
}

ROI_INLINE void store(BFloat16* p, Vec<float> v) {
  VecBits u = (VecBits)v;
  // To nearest, ties to even; a NaN must not be rounded into infinity.
  VecBits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VecBits nan = (VecBits)(v != v);
  HalfBits h = __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), HalfBits);
  std::memcpy(p, &h, sizeof h);
}

ROI_INLINE Vec<float> load(const Half* p, float) {
#if ROI_VECTOR_BYTES == 64
  return _mm512_cvtph_ps((__m256i)load_bits(p));
#elif ROI_VECTOR_BYTES == 32
  return _mm256_cvtph_ps((__m128i)load_bits(p));
#else
  VecBits h = __builtin_convertvector(load_bits(p), VecBits);
  VecBits sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent's bias, subnormal numbers included; infinity and NaN keep all-ones.
  Vec<float> value = (Vec<float>)magnitude * 0x1p112f;
  VecBits special = (VecBits)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Vec<float>)((VecBits)value | special | sign);
#endif
}

ROI_INLINE void store(Half* p, Vec<float> v) {
#if ROI_VECTOR_BYTES == 64
  __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif ROI_VECTOR_BYTES == 32
  __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VecBits u = (VecBits)v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Normal: move the bias from 127 to 15 and round 13 bits away, ties to even. Subnormal: adding 0.5 lines the ulp up
  // with 2^-24, so that the addition itself rounds.
  VecBits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  VecBits subnormal = (VecBits)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  VecBits small = (VecBits)(magnitude < 0x38800000u), large = (VecBits)(magnitude >= 0x477ff000u);
  VecBits nan = (VecBits)(magnitude > 0x7f800000u);
  VecBits result = (subnormal & small) | (normal & ~small & ~large) | (0x7c00u & large);
  HalfBits h = __builtin_convertvector(result | (0x0200u & nan) | sign, HalfBits);
#endif
  std::memcpy(p, &h, sizeof h);
}

// The first n lanes only; the rest are zero.
template <class T, class A>
ROI_INLINE Vec<A> load_part(const T* p, int64_t n, A tag) {
  T buffer[kLanes<A>] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer, tag);
}

template <class T, class V>
ROI_INLINE void store_part(T* p, V v, int64_t n) {
  T buffer[sizeof(V) / sizeof(v[0])];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// Transposes a square of kLanes x kLanes in registers: each step swaps the off-diagonal halves of ever larger blocks.
template <int Step, class V, int... J>
ROI_INLINE void swap_blocks(V& a, V& b, std::integer_sequence<int, J...>) {
  constexpr int n = sizeof...(J);
  V upper = __builtin_shufflevector(a, b, ((J & Step) ? n + J - Step : J)...);
  V lower = __builtin_shufflevector(a, b, ((J & Step) ? n + J : J + Step)...);
  a = upper;
  b = lower;
}

template <class A, int Step = 1>
ROI_INLINE void transpose_square(Vec<A>* rows) {
  if constexpr (Step < kLanes<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; i++)
      if (!(i & Step)) swap_blocks<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kLanes<A>>{});
    transpose_square<A, Step * 2>(rows);
  }
}

}  // namespace
