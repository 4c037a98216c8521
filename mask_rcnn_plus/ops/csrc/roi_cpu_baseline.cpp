#include "roi_cpu.h"
#include "roi_cpu_table.h"

namespace roi {
const Kernels* kernels_baseline(Storage storage) { return table(storage); }
}  // namespace roi
