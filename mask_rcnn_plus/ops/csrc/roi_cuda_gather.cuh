// How gradients are gathered. Each block owns a tile of one map's gradient, finds the RoIs that read it, and writes
// every element once: without atomics or zeroing, and with sums in a fixed order.
//
// There are three launches on one stream, and the host does not wait between them: plan_rois locates every RoI,
// rank_rois sorts them by map, and the gathering kernel visits the RoIs of its tile's map.
#pragma once
#include "roi_cuda_device.cuh"

namespace roi::cuda {

// Rows [top, bottom) and columns [left, right) of a map.
struct Bounds {
  int top, bottom, left, right;
};

ROI_HD bool meets(Range a, int begin, int end) { return a.begin < end && begin < a.end; }

ROI_HD bool meet(const Bounds& a, const Bounds& b) {
  return a.top < b.bottom && b.top < a.bottom && a.left < b.right && b.left < a.right;
}

template <class R>
struct PlannedRoI {
  RoI<R> roi;
  Bounds cells;  // the cells that its bins read
};

// The RoIs of a call, sorted by map (level-major, then image), and within a map by row of `boxes`. The arrays are in
// device memory.
template <class R>
struct Plan {
  Bounds* bounds;       // sorted
  int* order;           // sorted: rows of `boxes`
  int* map_begin;       // maps + 1; the RoIs of map m are [map_begin[m], map_begin[m + 1])
  PlannedRoI<R>* rois;  // not sorted
  int* keys;            // not sorted: the map, or the number of maps if a box is undefined

  static int64_t bytes(int64_t rois, int64_t maps) {
    return rois * static_cast<int64_t>(sizeof(Bounds) + sizeof(PlannedRoI<R>) + 2 * sizeof(int)) +
           (maps + 1) * static_cast<int64_t>(sizeof(int));
  }
  // memory: bytes() bytes, aligned to 16.
  static Plan in(void* memory, int64_t rois) {
    Plan p;
    p.bounds = static_cast<Bounds*>(memory);
    p.rois = reinterpret_cast<PlannedRoI<R>*>(p.bounds + rois);
    p.keys = reinterpret_cast<int*>(p.rois + rois);
    p.order = p.keys + rois;
    p.map_begin = p.order + rois;
    return p;
  }
};

inline int64_t maps_of(const Call& call) { return int64_t{call.pyramid.levels} * call.pyramid.images; }

ROI_DEVICE int warp_sum(int v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// The cells that an axis' bins read, computed by a warp. The first and last bins are not enough: the bins of an
// inverted box descend, and rounding may change the order of a distant box's bins.
template <class R>
ROI_DEVICE Range warp_cells_read(const Axis<R>& a, int bins, int lane) {
  Range all = {INT32_MAX, 0};
  for (int bin = lane; bin < bins; bin += kWarp) {
    Range r = cells_read(a, bin);
    if (r.begin >= r.end) continue;
    if (r.begin < all.begin) all.begin = r.begin;
    if (r.end > all.end) all.end = r.end;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    int begin = __shfl_xor_sync(~0u, all.begin, step), end = __shfl_xor_sync(~0u, all.end, step);
    if (begin < all.begin) all.begin = begin;
    if (end > all.end) all.end = end;
  }
  return all;
}

// One warp per RoI.
template <class R>
ROI_KERNEL(1) plan_rois(Call call, const R* boxes, Plan<R> plan) {
  int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  int lane = threadIdx.x % kWarp;
  if (i >= call.rois) return;
  Place<R> place = place_of(boxes + 5 * i, call);
  PlannedRoI<R> planned = {place.roi, {0, 0, 0, 0}};
  int key = call.pyramid.levels * call.pyramid.images;
  if (place.roi.defined) {
    Range y = warp_cells_read(place.roi.y, call.sampling.bins_y, lane);
    Range x = warp_cells_read(place.roi.x, call.sampling.bins_x, lane);
    planned.cells = {y.begin, y.end, x.begin, x.end};
    key = place.roi.level * call.pyramid.images + place.image;
  }
  if (lane != 0) return;
  plan.rois[i] = planned;
  plan.keys[i] = key;
}

// One warp per RoI, which counts the RoIs before it, and one per map, which counts the RoIs of the maps before. This is
// quick for the thousands of boxes in detectors: 10^5 boxes take about a millisecond.
template <class R>
ROI_KERNEL(1) rank_rois(Plan<R> plan, int64_t rois, int64_t maps) {
  int64_t query = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  int lane = threadIdx.x % kWarp;
  if (query >= rois + maps + 1) return;
  bool is_roi = query < rois;
  int key = is_roi ? plan.keys[query] : static_cast<int>(query - rois), before = 0;
  for (int64_t i = lane; i < rois; i += kWarp) {
    int other = plan.keys[i];
    before += other < key || (is_roi && other == key && i < query);
  }
  before = warp_sum(before);
  if (lane != 0) return;
  if (is_roi) {
    plan.order[before] = static_cast<int>(query);
    plan.bounds[before] = plan.rois[query].cells;
  } else {
    plan.map_begin[query - rois] = before;
  }
}

template <class R>
bool launch_plan(const Call& call, const R* boxes, const Plan<R>& plan, int device) {
  int64_t queries = call.rois + maps_of(call) + 1;
  if (queries > kMostBlocks - kThreads) return false;
  ROI_LAUNCH(plan_rois, R, ceil_div(call.rois, kWarps), 0, device, call, boxes, plan);
  ROI_LAUNCH(rank_rois, R, ceil_div(queries, kWarps), 0, device, plan, call.rois, maps_of(call));
  return true;
}

// The tiles of every map of a call, numbered level by level, image by image.
struct Tiling {
  int rows, columns;
  int64_t begin[kMaxLevels + 1];
};

struct Tile {
  int level, image;
  Bounds bounds;
};

inline Tiling make_tiling(const Pyramid& p, int rows, int columns) {
  Tiling t = {rows, columns, {}};
  for (int l = 0; l < p.levels; l++)
    t.begin[l + 1] = t.begin[l] + p.images * ceil_div(p.height[l], rows) * ceil_div(p.width[l], columns);
  return t;
}

ROI_DEVICE Tile tile_at(const Tiling& t, const Pyramid& p, int64_t index) {
  Tile tile = {};
  while (index >= t.begin[tile.level + 1]) tile.level++;
  int height = p.height[tile.level], width = p.width[tile.level];
  int64_t down = ceil_div(height, t.rows), across = ceil_div(width, t.columns);
  index -= t.begin[tile.level];
  tile.image = static_cast<int>(quotient(index, down * across));
  index -= tile.image * down * across;
  int row = static_cast<int>(quotient(index, across)), column = static_cast<int>(index - row * across);
  tile.bounds.top = row * t.rows;
  tile.bounds.left = column * t.columns;
  tile.bounds.bottom = height - tile.bounds.top < t.rows ? height : tile.bounds.top + t.rows;
  tile.bounds.right = width - tile.bounds.left < t.columns ? width : tile.bounds.left + t.columns;
  return tile;
}

// A gathering block's data in shared memory, followed by tables that are read 16 bytes at a time.
struct alignas(16) HitList {
  Tile tile;
  int votes[kWarps];
  int rows[kThreads];  // rows of `boxes`: the RoIs that may read the tile
};

// Called by all threads of the block. The tile is in shared memory, since the registers hold the sums. The last tiles
// come first: those of the coarsest maps are read by the most RoIs, and must not delay the end of a launch.
ROI_DEVICE void find_tile(HitList* list, const Tiling& t, const Pyramid& p, int64_t index) {
  if (threadIdx.x == 0) list->tile = tile_at(t, p, t.begin[p.levels] - 1 - index);
  __syncthreads();
}

// Calls visit(rows of boxes, count) for the RoIs that may read a tile, at most `batch` at a time and always in the
// plan's order. Called by all threads of the block; visit must end with a barrier.
template <class R, class Visit>
ROI_DEVICE void for_each_batch(const Call& call, const Plan<R>& plan, int batch, HitList* list, Visit&& visit) {
  int map = list->tile.level * call.pyramid.images + list->tile.image;
  int end = plan.map_begin[map + 1], warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int first = plan.map_begin[map]; first < end; first += kThreads) {
    int i = first + static_cast<int>(threadIdx.x);
    bool hit = i < end && meet(plan.bounds[i], list->tile.bounds);
    unsigned votes = __ballot_sync(~0u, hit);
    if (lane == 0) list->votes[warp] = __popc(votes);
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < kWarps; w++) {
      if (w < warp) before += list->votes[w];
      total += list->votes[w];
    }
    if (hit) list->rows[before + __popc(votes & ((1u << lane) - 1))] = plan.order[i];
    __syncthreads();
    for (int at = 0; at < total; at += batch) visit(list->rows + at, total - at < batch ? total - at : batch);
  }
}

// Tables hold some bins of an axis at a time, so that any number of bins is possible.
constexpr int kMostTableBins = 96;
constexpr int kMostBatch = 16;

struct TableShape {
  int bins_y, bins_x;  // per table
  int batch;           // RoIs per table
};

// bytes_of(bins_y, bins_x): the size of one RoI's part of the table.
template <class BytesOf>
TableShape make_table_shape(const Sampling& s, const BytesOf& bytes_of) {
  TableShape t = {};
  t.bins_y = s.bins_y < kMostTableBins ? s.bins_y : kMostTableBins;
  t.bins_x = s.bins_x < kMostTableBins ? s.bins_x : kMostTableBins;
  int64_t fitting = (kSharedBytes - static_cast<int64_t>(sizeof(HitList))) / bytes_of(t.bins_y, t.bins_x);
  t.batch = static_cast<int>(fitting < kMostBatch ? fitting : kMostBatch);
  return t;
}

// Calls visit(first bin_y, count, first bin_x, count) for parts of the bins that fit a table.
template <class Visit>
ROI_DEVICE void for_each_bins(const Sampling& s, const TableShape& t, Visit&& visit) {
  for (int y = 0; y < s.bins_y; y += t.bins_y)
    for (int x = 0; x < s.bins_x; x += t.bins_x)
      visit(y, s.bins_y - y < t.bins_y ? s.bins_y - y : t.bins_y, x, s.bins_x - x < t.bins_x ? s.bins_x - x : t.bins_x);
}

}  // namespace roi::cuda
