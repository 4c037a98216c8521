#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "roi_cpu.h"
#include "roi_cpu_parallel.h"

namespace roi {
namespace {

constexpr int64_t kRoIsPerArena = 16;
constexpr int64_t kHugePage = int64_t{2} << 20;

// Holds offsets while the arena grows, then pointers.
struct AxisOffsets {
  size_t begin, items;
  int32_t first, last, samples;
};

// Calls emit(first cell, last cell, item) for every item that a bin reads.
template <class R, class Emit>
void read_bin(const Axis<R>& axis, int bin, R factor, Tap<R>*, const Emit& emit) {
  merged_taps(axis, bin, [&](int cell, R weight) { emit(cell, cell, Tap<R>{cell, mul(weight, factor)}); });
}

template <class R, class Emit>
void read_bin(const Axis<R>& axis, int bin, R, Point<R>*, const Emit& emit) {
  Range range = points_of(axis, bin);
  R begin = bin_start(axis, bin);
  for (int i = range.begin; i < range.end; i++) {
    Cells<R> c = point_at(axis, begin, i);
    emit(c.low, c.high_weight != R(0) ? c.low + 1 : c.low, Point<R>{c.low, c.low_weight, c.high_weight});
  }
}

template <class Item, class R, class Arena>
AxisOffsets append_axis(Arena& arena, const Axis<R>& axis, int bins, R factor) {
  AxisOffsets o = {arena.begins.size(), arena.items.size(), 0, -1, axis.samples};
  for (int bin = 0; bin < bins; bin++) {
    arena.begins.push_back(static_cast<int32_t>(arena.items.size() - o.items));
    read_bin(axis, bin, factor, static_cast<Item*>(nullptr), [&](int first, int last, const Item& item) {
      if (o.last < o.first) o.first = first, o.last = last;
      o.first = std::min(o.first, first);
      o.last = std::max(o.last, last);
      arena.items.push_back(item);
    });
  }
  arena.begins.push_back(static_cast<int32_t>(arena.items.size() - o.items));
  return o;
}

template <class Item, class Arena>
AxisItems<Item> resolve(const Arena& arena, const AxisOffsets& o) {
  return {arena.begins.data() + o.begin, arena.items.data() + o.items, o.first, o.last, o.samples};
}

// Row and column of the first cell, only used to order the RoIs.
template <class R>
int order_key(R start, int size) {
  return static_cast<int>(start > R(0) ? (start < R(size) ? start : R(size)) : R(0));
}

}  // namespace

template <class Item>
Plan<Item>::Plan(const typename Item::Real* boxes, int64_t count, const Pyramid& pyramid, const Sampling& sampling) {
  using R = typename Item::Real;
  // Bands of 8 rows: small enough for the cache, large enough to keep neighbours in x together.
  struct Key {
    int map, band, column;
    int64_t index;
    bool operator<(const Key& o) const {
      return std::tie(map, band, column, index) < std::tie(o.map, o.band, o.column, o.index);
    }
  };
  std::vector<Key> keys(count);
  int64_t tasks = (count + kRoIsPerArena - 1) / kRoIsPerArena;
  // To find what a bin reads takes, per axis, about as long as to read a hundred elements.
  int64_t workers = worker_count(tasks, count * 100 * (sampling.bins_y + sampling.bins_x));
  std::vector<RoI<R>> located(count);
  for_each_task(tasks, workers, [&](int64_t, int64_t task) {
    for (int64_t i = task * kRoIsPerArena; i < std::min(count, (task + 1) * kRoIsPerArena); i++) {
      RoI<R>& r = located[i];
      r = locate(boxes + 5 * i, pyramid, sampling);
      int map = r.level * pyramid.images + image_of(boxes + 5 * i, pyramid.images);
      keys[i] = {map, order_key(r.y.start, r.y.size) / 8, order_key(r.x.start, r.x.size), i};
    }
  });
  std::sort(keys.begin(), keys.end());

  rois_.resize(count);
  map_of_.resize(count);
  arenas_.resize(tasks);
  for_each_task(tasks, workers, [&](int64_t, int64_t task) {
    Arena& arena = arenas_[task];
    AxisOffsets y[kRoIsPerArena], x[kRoIsPerArena];
    int64_t first = task * kRoIsPerArena, last = std::min(count, first + kRoIsPerArena);
    for (int64_t i = first; i < last; i++) {
      RoI<R>& r = located[keys[i].index];
      rois_[i].index = keys[i].index;
      rois_[i].defined = r.defined;
      map_of_[i] = keys[i].map;
      if (!r.defined) r.y.samples = r.x.samples = 0;  // converting NaN to a cell is undefined behaviour
      y[i - first] = append_axis<Item>(arena, r.y, sampling.bins_y, r.inv_count);
      x[i - first] = append_axis<Item>(arena, r.x, sampling.bins_x, R(1));
    }
    for (int64_t i = first; i < last; i++) {
      rois_[i].y = resolve<Item>(arena, y[i - first]);
      rois_[i].x = resolve<Item>(arena, x[i - first]);
    }
  });

  map_begin_.assign(pyramid.levels * pyramid.images + 1, 0);
  for (const Key& key : keys) map_begin_[key.map + 1]++;
  std::partial_sum(map_begin_.begin(), map_begin_.end(), map_begin_.begin());
}

template class Plan<Tap<float>>;
template class Plan<Tap<double>>;
template class Plan<Point<float>>;
template class Plan<Point<double>>;

const char* cpu_isa() {
  static const char* const isa = [] {
    const char* wanted = std::getenv("MASK_RCNN_PLUS_CPU_ISA");
    if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return "baseline";
    if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0 && kernels_avx2<float>(Storage::kFloat)) return "avx2";
    if (kernels_avx512<float>(Storage::kFloat) && !(wanted && std::strcmp(wanted, "avx2") == 0)) return "avx512";
    return kernels_avx2<float>(Storage::kFloat) ? "avx2" : "baseline";
  }();
  return isa;
}

template <class R>
const Kernels<R>& kernels(Storage storage) {
  const char* isa = cpu_isa();
  if (std::strcmp(isa, "avx512") == 0) return *kernels_avx512<R>(storage);
  if (std::strcmp(isa, "avx2") == 0) return *kernels_avx2<R>(storage);
  return *kernels_baseline<R>(storage);
}

template const Kernels<float>& kernels<float>(Storage);
template const Kernels<double>& kernels<double>(Storage);

void use_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  begin = (begin + kHugePage - 1) & ~static_cast<uintptr_t>(kHugePage - 1);
  end &= ~static_cast<uintptr_t>(kHugePage - 1);
  // Only a hint: if it is refused, small pages are used.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

Scratch::Scratch(int64_t bytes) {
  size_t size = (std::max<int64_t>(bytes, 1) + 63) / 64 * 64 + 64;
  size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  size = (size + alignment - 1) / alignment * alignment;
  data_.reset(std::aligned_alloc(alignment, size));
  if (!data_) throw std::bad_alloc();
  use_huge_pages(data_.get(), static_cast<int64_t>(size));
}

void Scratch::Free::operator()(void* p) const { std::free(p); }

}  // namespace roi
