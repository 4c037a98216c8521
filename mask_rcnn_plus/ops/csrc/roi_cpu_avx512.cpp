// The shared headers come before the choice of target, so that their inline functions are baseline code.
#include "roi_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#define ROI_VECTOR_BYTES 64
#include "roi_cpu_table.h"

namespace roi {
template <class R>
const Kernels<R>* kernels_avx512(Storage storage) {
  bool usable = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return usable ? table<R>(storage) : nullptr;
}
}  // namespace roi
#else
namespace roi {
template <class R>
const Kernels<R>* kernels_avx512(Storage) { return nullptr; }
}  // namespace roi
#endif

namespace roi {
template const Kernels<float>* kernels_avx512<float>(Storage);
template const Kernels<double>* kernels_avx512<double>(Storage);
}  // namespace roi
