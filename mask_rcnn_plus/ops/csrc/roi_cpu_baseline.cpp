#include "roi_cpu.h"
#include "roi_cpu_table.h"

namespace roi {
template <class R>
const Kernels<R>* kernels_baseline(Storage storage) {
  return table<R>(storage);
}
template const Kernels<float>* kernels_baseline<float>(Storage);
template const Kernels<double>* kernels_baseline<double>(Storage);
}  // namespace roi
