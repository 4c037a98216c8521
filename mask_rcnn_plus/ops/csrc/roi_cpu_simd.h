// Vectors of the width of the current target, loaded from and stored to all storage types.
//
// Included by one translation unit per instruction set, after it has set its target. Everything here has internal
// linkage, so that the linker cannot use the AVX-512 copy of a function in the baseline.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define ROI_INLINE static inline __attribute__((always_inline))
#define ROI_MEMBER inline __attribute__((always_inline))
#define ROI_LAMBDA __attribute__((always_inline))

namespace {

// Set by the including file: in C++, GCC 12 does not define __AVX512F__ and so on after `#pragma GCC target`.
#ifndef ROI_VECTOR_BYTES
#define ROI_VECTOR_BYTES 16
#endif
constexpr int kVectorBytes = ROI_VECTOR_BYTES;
// The number of accumulators, which leaves registers for operands: AVX-512 has 32, the others 16.
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

// Integers as wide as the lanes: for results of comparisons, and for indices.
template <class A>
struct LanesOf {
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Lanes = typename LanesOf<A>::type;

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

// A vector anywhere in memory, of any type. (memcpy does the same, but GCC 12 does not always inline it.)
template <class V>
struct Unaligned {
  typedef V type __attribute__((aligned(1), may_alias));
};
template <class V>
ROI_INLINE typename Unaligned<V>::type& at(void* p) {
  return *static_cast<typename Unaligned<V>::type*>(p);
}
template <class V>
ROI_INLINE const typename Unaligned<V>::type& at(const void* p) {
  return *static_cast<const typename Unaligned<V>::type*>(p);
}

// The pointer itself, kept in one register. Otherwise GCC 12 uses a separate register for the base of each access p[0],
// p[n], p[2n] and so on, and runs out of registers.
template <class T>
ROI_INLINE T* pinned(T* p) {
#if defined(__GNUC__)
  asm("" : "+r"(p));
#endif
  return p;
}

// Same-type loads and stores.
template <class A>
ROI_INLINE Vec<A> load(const A* p, A) {
  return at<Vec<A>>(p);
}

template <class A>
ROI_INLINE void store(A* p, Vec<A> v) {
  at<Vec<A>>(p) = v;
}

// A non-temporal store to an address that is a multiple of the vector's size; fence() before another thread reads it.
ROI_INLINE void stream(float* p, Vec<float> v) {
#if ROI_VECTOR_BYTES == 64
  _mm512_stream_ps(p, v);
#elif ROI_VECTOR_BYTES == 32
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
ROI_INLINE void fence() {
#if ROI_VECTOR_BYTES > 16
  _mm_sfence();
#endif
}

ROI_INLINE HalfBits load_bits(const void* p) { return at<HalfBits>(p); }

ROI_INLINE Vec<float> load(const BFloat16* p, float) {
  return (Vec<float>)(__builtin_convertvector(load_bits(p), VecBits) << 16);
}

ROI_INLINE void store(BFloat16* p, Vec<float> v) {
  VecBits u = (VecBits)v;
  // Rounds to nearest, ties to even; NaN must not become infinity.
  VecBits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VecBits nan = (VecBits)(v != v);
  HalfBits h = __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), HalfBits);
  at<HalfBits>(p) = h;
}

ROI_INLINE Vec<float> load(const Half* p, float) {
#if ROI_VECTOR_BYTES == 64
  return _mm512_cvtph_ps((__m256i)load_bits(p));
#elif ROI_VECTOR_BYTES == 32
  return _mm256_cvtph_ps((__m128i)load_bits(p));
#else
  VecBits h = __builtin_convertvector(load_bits(p), VecBits);
  VecBits sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  // Multiplying by 2^112 changes the exponent's bias, also for subnormal numbers. The exponent of infinity and NaN must
  // stay all ones.
  Vec<float> value = (Vec<float>)magnitude * 0x1p112f;
  VecBits special = (VecBits)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Vec<float>)((VecBits)value | special | sign);
#endif
}

ROI_INLINE void store(Half* p, Vec<float> v) {
#if ROI_VECTOR_BYTES == 64
  HalfBits h = (HalfBits)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif ROI_VECTOR_BYTES == 32
  HalfBits h = (HalfBits)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VecBits u = (VecBits)v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Normal: change the bias from 127 to 15 and round 13 bits away, ties to even. Subnormal: adding 0.5 makes the unit
  // in the last place 2^-24, so that the addition itself rounds.
  VecBits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  VecBits subnormal = (VecBits)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  VecBits small = (VecBits)(magnitude < 0x38800000u), large = (VecBits)(magnitude >= 0x477ff000u);
  VecBits nan = (VecBits)(magnitude > 0x7f800000u);
  VecBits result = (subnormal & small) | (normal & ~small & ~large) | (0x7c00u & large);
  HalfBits h = __builtin_convertvector(result | (0x0200u & nan) | sign, HalfBits);
#endif
  at<HalfBits>(p) = h;
}

// Loads the first n lanes; the others are zero.
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

template <class A>
ROI_INLINE Lanes<A> splat_lanes(int32_t i) {
  return i - Lanes<A>{};
}

// Loads 32-bit lanes: all of them, or the first n (the others are -1).
template <class A>
struct Narrow {
  typedef int32_t type __attribute__((vector_size(kLanes<A> * 4)));
};

template <class A>
ROI_INLINE Lanes<A> load_lanes(const int32_t* p) {
  return __builtin_convertvector(at<typename Narrow<A>::type>(p), Lanes<A>);
}

template <class A>
ROI_INLINE void store_lanes(int32_t* p, Lanes<A> v) {
  at<typename Narrow<A>::type>(p) = __builtin_convertvector(v, typename Narrow<A>::type);
}

template <class A>
ROI_INLINE Lanes<A> load_lanes_part(const int32_t* p, int64_t n) {
  int32_t buffer[kLanes<A>];
  for (int i = 0; i < kLanes<A>; i++) buffer[i] = i < n ? p[i] : -1;
  return load_lanes<A>(buffer);
}

template <class A>
ROI_INLINE void store_lanes_part(int32_t* p, Lanes<A> v, int64_t n) {
  int32_t buffer[kLanes<A>];
  store_lanes<A>(buffer, v);
  std::memcpy(p, buffer, n * sizeof(int32_t));
}

// One bit per lane of a comparison.
template <class A>
ROI_INLINE uint32_t lane_bits(Lanes<A> v) {
#if ROI_VECTOR_BYTES == 64
  return sizeof(A) == 8 ? _mm512_movepi64_mask((__m512i)v) : _mm512_movepi32_mask((__m512i)v);
#elif ROI_VECTOR_BYTES == 32
  return sizeof(A) == 8 ? _mm256_movemask_pd((__m256d)v) : _mm256_movemask_ps((__m256)v);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; i++) bits |= static_cast<uint32_t>(v[i] != 0) << i;
  return bits;
#endif
}

// Transposes kLanes x kLanes values in registers: each step swaps the off-diagonal halves of larger blocks.
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
