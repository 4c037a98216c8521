// The shared headers come before the choice of target, so that their inline functions are baseline code.
#include "roi_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define ROI_VECTOR_BYTES 32
#include "roi_cpu_table.h"

namespace roi {
template <class R>
const Kernels<R>* kernels_avx2(Storage storage) {
  // Every processor with AVX2 and FMA also has F16C.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? table<R>(storage) : nullptr;
}
}  // namespace roi
#else
namespace roi {
template <class R>
const Kernels<R>* kernels_avx2(Storage) { return nullptr; }
}  // namespace roi
#endif

namespace roi {
template const Kernels<float>* kernels_avx2<float>(Storage);
template const Kernels<double>* kernels_avx2<double>(Storage);
}  // namespace roi
