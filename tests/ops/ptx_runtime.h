// What kernels translated from PTX (ptx.py) need: memory that checks each access, and PTX's instructions.
//
// Registers hold bits; operands are widened to 64 bits, and a type says how many of them count.
#pragma once
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "cuda_emulation.h"

namespace ptx {

using pred = bool;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f16 = _Float16;
using f32 = float;
using f64 = double;

struct bf16 {
  u16 bits;
  explicit bf16(float value = 0) {
    u32 wide = std::bit_cast<u32>(value);
    bits = value != value ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  operator float() const { return std::bit_cast<float>(u32{bits} << 16); }
};

// Kernels, and the one that runs.
struct Entry {
  const char* name;
  void (*run)();
  std::vector<std::pair<int, int>> parameters;  // where each begins, and its bytes
};
extern const std::vector<Entry> entries;
inline u64 shared_bytes, parameter_bytes;
alignas(16) inline unsigned char parameters[4096];

inline void* checked(bool right, void* memory, const char* what, const char* place) {
  if (right) return memory;
  emulation::machine.fail(std::string(what) + " at " + place);
  alignas(16) static unsigned char nowhere[16];
  return nowhere;
}
inline void* global_memory(u64 address, u64 bytes, const char* place) {
  return checked(address % bytes == 0, reinterpret_cast<void*>(address), "misaligned access of memory", place);
}
inline void* shared_memory(u64 address, u64 bytes, const char* place) {
  bool right = address % bytes == 0 && address + bytes <= shared_bytes;
  return checked(right, emulation::shared_memory() + address, "access beside shared memory, or misaligned,", place);
}
inline void* param_memory(u64 address, u64 bytes, const char* place) {
  bool right = address % bytes == 0 && address + bytes <= parameter_bytes;
  return checked(right, parameters + address, "access beside the parameters, or misaligned,", place);
}

template <class T>
T in(u64 bits) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(bits);
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Integers widen with their sign, if they have one.
template <class R, class T>
void put(R& to, T value) {
  static_assert(sizeof(R) >= sizeof(T));
  if constexpr (std::is_integral_v<T>) to = static_cast<R>(value);
  else std::memcpy(&to, &value, sizeof(T));
}

template <class T, class... R>
void ld_(const void* from, R&... to) {
  const T* next = static_cast<const T*>(from);
  (put(to, *next++), ...);
}
template <class T, class... Values>
void st_(void* to, Values... values) {
  T* next = static_cast<T*>(to);
  ((*next++ = in<T>(values)), ...);
}

// Registers as the parts of a larger one, the first in its lowest bits.
template <class T, class... Parts>
T pack(Parts... parts) {
  constexpr int bits = 8 * sizeof(T) / sizeof...(Parts);
  u64 whole = 0, at = 0;
  ((whole |= (u64{parts} & ((u64{1} << bits) - 1)) << at, at += bits), ...);
  return static_cast<T>(whole);
}
template <class T, class... Parts>
void unpack(u64 whole, Parts&... parts) {
  constexpr int bits = 8 * sizeof(T) / sizeof...(Parts);
  ((parts = static_cast<Parts>(whole & ((u64{1} << bits) - 1)), whole >>= bits), ...);
}

#define PTX_1(name, result) \
  template <class T>        \
  auto name##_(u64 x) {     \
    T a = in<T>(x);         \
    return result;          \
  }
#define PTX_2(name, result)    \
  template <class T>           \
  auto name##_(u64 x, u64 y) { \
    T a = in<T>(x), b = in<T>(y); \
    return result;             \
  }
#define PTX_3(name, result)           \
  template <class T>                  \
  auto name##_(u64 x, u64 y, u64 z) { \
    T a = in<T>(x), b = in<T>(y);     \
    return result;                    \
  }

template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, s64, u64>;

PTX_1(mov, a)
PTX_1(cvta_global, a)
PTX_1(cvta_to_global, a)
PTX_1(neg, static_cast<T>(-a))
PTX_1(abs, static_cast<T>(a < 0 ? -a : a))
PTX_1(rcp, 1 / a)
PTX_1(rcp_approx_ftz, in<T>(std::bit_cast<u64>(1 / a) >> 32 << 32))
PTX_1(sqrt, std::sqrt(a))
PTX_1(popc, static_cast<u32>(std::popcount(a)))
PTX_1(not, static_cast<T>(std::is_same_v<T, pred> ? !x : ~x))
PTX_2(and, static_cast<T>(a & b))
PTX_2(or, static_cast<T>(a | b))
PTX_2(xor, static_cast<T>(a ^ b))
PTX_2(add, static_cast<T>(a + b))
PTX_2(sub, static_cast<T>(a - b))
PTX_2(mul, static_cast<T>(a * b))
PTX_2(mul_wide, Wide<T>{a} * b)
PTX_2(mul_hi, static_cast<T>(Wide<T>{a} * b >> 32))
PTX_2(div, static_cast<T>(std::is_integral_v<T> && b == 0 ? T(-1) : a / b))
PTX_2(rem, static_cast<T>(b == 0 ? a : a % b))
// A NaN yields to a number.
PTX_2(min, (b != b || a < b ? a : b))
PTX_2(max, (b != b || a > b ? a : b))
PTX_2(copysign, std::copysign(b, a))
PTX_3(mad, static_cast<T>(a* b + in<T>(z)))
PTX_3(mad_wide, Wide<T>{a} * b + in<Wide<T>>(z))
PTX_3(fma, std::fma(a, b, in<T>(z)))
PTX_3(selp, (z != 0 ? a : b))
PTX_2(shl, (static_cast<u32>(y) < 8 * sizeof(T) ? static_cast<T>(a << static_cast<u32>(y)) : T(0)))
PTX_2(shr, static_cast<T>(static_cast<u32>(y) < 8 * sizeof(T) ? a >> static_cast<u32>(y) : a < 0 ? -1 : 0))
PTX_2(setp_eq, a == b)
PTX_2(setp_ne, a<b || a> b)
PTX_2(setp_lt, a < b)
PTX_2(setp_le, a <= b)
PTX_2(setp_gt, a > b)
PTX_2(setp_ge, a >= b)
// With u, also where a or b is NaN.
PTX_2(setp_equ, !(a < b || a > b))
PTX_2(setp_neu, a != b)
PTX_2(setp_ltu, !(a >= b))
PTX_2(setp_leu, !(a > b))
PTX_2(setp_gtu, !(a <= b))
PTX_2(setp_geu, !(a < b))
PTX_2(setp_num, a == a && b == b)
PTX_2(setp_nan, a != a || b != b)

// Rounded towards zero.
template <class T>
T add_rz_(u64 x, u64 y) {
  double sum = double{in<T>(x)} + double{in<T>(y)};
  T rounded = static_cast<T>(sum);
  return std::abs(double{rounded}) > std::abs(sum) ? std::nextafter(rounded, T(0)) : rounded;
}

template <class To, class From>
To cvt_(u64 x) {
  return static_cast<To>(in<From>(x));
}
template <class To, class From>
To to_whole(From value) {
  if constexpr (std::is_integral_v<To>) {
    using Limits = std::numeric_limits<To>;
    if (value != value) return 0;
    if (value <= static_cast<From>(Limits::min())) return Limits::min();
    if (value >= static_cast<From>(Limits::max())) return Limits::max();
  }
  return static_cast<To>(value);
}
template <class To, class From>
To cvt_rzi_(u64 x) {
  return to_whole<To>(std::trunc(in<From>(x)));
}
template <class To, class From>
To cvt_rmi_(u64 x) {
  return to_whole<To>(std::floor(in<From>(x)));
}
template <class To, class From>
To cvt_rpi_(u64 x) {
  return to_whole<To>(std::ceil(in<From>(x)));
}

}  // namespace ptx

#define PTX_API extern "C" __attribute__((visibility("default")))

PTX_API void ptx_seed(uint64_t seed) { emulation::machine.seed(seed); }

// As roi::cuda::Driver::find.
PTX_API const void* ptx_find(const char* kernel, int, char* message) {
  for (const ptx::Entry& entry : ptx::entries)
    if (std::strcmp(entry.name, kernel) == 0) return &entry;
  std::strcpy(message, "not translated from PTX");
  return nullptr;
}

// As cuLaunchKernel; throws what a kernel does wrong.
PTX_API int ptx_launch(const ptx::Entry* entry, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                       unsigned shared_bytes, void*, void** arguments, void**) {
  for (auto [begin, size] : entry->parameters) {
    std::memcpy(ptx::parameters + begin, *arguments++, size);
    ptx::parameter_bytes = begin + size;
  }
  ptx::shared_bytes = shared_bytes;
  emulation::launch(blocks, threads, shared_bytes, entry->run);
  return 0;
}
