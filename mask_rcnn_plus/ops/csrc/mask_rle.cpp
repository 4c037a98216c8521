// Pastes masks into an image and run-length encodes them in one step, without a bitmap of the image.
//
// The result equals, bit for bit, that of detectron2's paste_masks_in_image on the CPU followed by pycocotools' encode.
// It depends on one comparison per pixel, value >= threshold, so the value is computed exactly as in torch's
// grid_sample: in fp32, in the same order, and with products and sums rounded once or twice, depending on how torch was
// compiled for this machine (`fused`, from mask_rcnn_plus/ops/mask_rle.py). Between four cells that are all clearly
// above or all clearly below the threshold, no values are computed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "roi_checks.h"
#include "roi_cpu.h"
#include "roi_cpu_parallel.h"

namespace roi {
namespace {

// The margin that counts as "clearly", relative to the largest of the four cells: a hundred times the largest rounding error.
constexpr float kMargin = 1e-5f;
// Whole vectors are read, also beyond the last weight.
constexpr int64_t kPadding = 16;

struct Threshold {
  float value;
  bool fused;
};

// Consecutive pixels between the same two cells of the mask.
struct Stretch {
  int32_t begin, end;  // relative to the first pixel of the axis
  int32_t cell;        // in the padded mask; the second cell is cell + 1
};

// One axis of a box: the positions of its pixels on the mask.
class PastedAxis {
 public:
  // Pixels [first, first + size) of the image; the centre of pixel i is at i + 0.5.
  int64_t first, size;
  std::vector<Stretch> stretches;
  std::vector<float> low, high;  // for each pixel, the weights of its two cells

  PastedAxis(float start, float end, int64_t image, int64_t cells, bool fused) {
    // One more pixel than the box on each side; no pixel if the box is NaN or outside the image.
    float from = std::floor(start) - 1.f, to = std::ceil(end) + 1.f, limit = static_cast<float>(image);
    if (from < 0.f) from = 0.f;
    if (to > limit) to = limit;
    first = size = 0;
    if (!(from < to)) return;
    first = static_cast<int64_t>(from);
    size = static_cast<int64_t>(to) - first;
    low.resize(size + kPadding);
    high.resize(size + kPadding);
    float half = static_cast<float>(cells) / 2.f;
    for (int64_t i = 0; i < size; i++) {
      float pixel = static_cast<float>(first + i) + 0.5f;
      float unit = (pixel - start) / (end - start) * 2.f - 1.f;  // -1 at the box's start, 1 at its end
      float at = fused ? std::fma(unit + 1.f, half, -0.5f) : (unit + 1.f) * half - 0.5f;
      float whole = std::floor(at);
      high[i] = at - whole;
      low[i] = 1.f - high[i];
      // Cell -1 is the first of the padded mask. Both cells are zero from cells + 1 on, and where `at` is NaN.
      bool inside = whole >= -1.f && whole < static_cast<float>(cells);
      int32_t cell = inside ? static_cast<int32_t>(whole) + 1 : static_cast<int32_t>(cells) + 1;
      if (stretches.empty() || stretches.back().cell != cell)
        stretches.push_back({static_cast<int32_t>(i), static_cast<int32_t>(i), cell});
      stretches.back().end = static_cast<int32_t>(i + 1);
    }
  }
};

// A mask with a border of zeros, column by column; and for each square of four cells, whether the values between them
// are all below the threshold, all reach it, or are mixed.
class PaddedMask {
 public:
  enum Verdict : uint8_t { kBelow, kReached, kMixed };

  PaddedMask(const float* mask, int64_t rows, int64_t columns, float threshold)
      : stride_(rows + 3), values_((columns + 3) * stride_), verdicts_(values_.size()) {
    for (int64_t y = 0; y < rows; y++)
      for (int64_t x = 0; x < columns; x++) values_[(x + 1) * stride_ + y + 1] = mask[y * columns + x];
    for (int64_t x = 0; x <= columns + 1; x++)
      for (int64_t y = 0; y <= rows + 1; y++) {
        MaskCell c = cell(x, y);
        float least = std::min(std::min(c.nw, c.ne), std::min(c.sw, c.se));
        float most = std::max(std::max(c.nw, c.ne), std::max(c.sw, c.se));
        float slack = kMargin * std::max(std::fabs(least), std::fabs(most));
        bool number = !std::isnan(c.nw + c.ne + c.sw + c.se);
        // Beyond the padded mask, weights may be NaN, and so may the values.
        bool outside = x > columns || y > rows;
        Verdict verdict = kMixed;
        if (number && most + slack < threshold) verdict = kBelow;
        if (number && least - slack >= threshold && !outside) verdict = kReached;
        verdicts_[x * stride_ + y] = verdict;
      }
  }

  MaskCell cell(int64_t x, int64_t y) const {
    const float *west = &values_[x * stride_ + y], *east = west + stride_;
    return {west[0], east[0], west[1], east[1]};
  }
  Verdict verdict(int64_t x, int64_t y) const { return static_cast<Verdict>(verdicts_[x * stride_ + y]); }

 private:
  int64_t stride_;
  std::vector<float> values_;
  std::vector<uint8_t> verdicts_;
};

// Writes COCO's compressed run lengths: of zeros, ones, zeros and so on, column by column. From the fourth on, each is
// the difference from the last but one. They are written in groups of five bits, least significant first; bit 5 says
// that another group follows, and 48 is added.
class RunWriter {
 public:
  // Adds ones at [begin, end), which must be after those added so far.
  void add(int64_t begin, int64_t end) {
    if (begin != end_) {
      flush();
      begin_ = begin;
    }
    end_ = end;
  }

  // Returns the code of an image of `pixels` pixels.
  std::string finish(int64_t pixels) {
    flush();
    if (written_ < pixels || pixels == 0) write(pixels - written_);
    return std::move(code_);
  }

 private:
  void flush() {
    if (begin_ == end_) return;
    write(begin_ - written_);
    write(end_ - begin_);
    written_ = end_;
  }

  void write(int64_t length) {
    int64_t x = count_ > 2 ? length - before_last_ : length;
    before_last_ = last_;
    last_ = length;
    count_++;
    for (bool more = true; more;) {
      int group = static_cast<int>(x & 31);
      x >>= 5;
      more = (group & 16) ? x != -1 : x != 0;
      code_.push_back(static_cast<char>(48 + group + (more ? 32 : 0)));
    }
  }

  std::string code_;
  int64_t begin_ = 0, end_ = 0, written_ = 0, count_ = 0, last_ = 0, before_last_ = 0;
};

void add_bits(RunWriter& runs, const uint64_t* bits, int64_t count, int64_t position) {
  for (int64_t word = 0; 64 * word < count; word++)
    for (uint64_t left = bits[word]; left != 0;) {
      int begin = __builtin_ctzll(left);
      uint64_t rest = ~(left >> begin);
      int length = rest == 0 ? 64 : __builtin_ctzll(rest);  // the shift fills with zeros, so begin + length <= 64
      int64_t at = position + 64 * word + begin;
      runs.add(at, at + length);
      left = begin + length == 64 ? 0 : left & (~uint64_t{0} << (begin + length));
    }
}

// box: (x0, y0, x1, y1) in pixels of the image.
std::string paste(const float* mask, int64_t rows, int64_t columns, const float* box, int64_t height, int64_t width,
                  Threshold threshold) {
  RunWriter runs;
  // A box with NaN has no pixel.
  bool number = !std::isnan(box[0]) && !std::isnan(box[1]) && !std::isnan(box[2]) && !std::isnan(box[3]);
  PastedAxis y(box[1], box[3], number ? height : 0, rows, threshold.fused);
  PastedAxis x(box[0], box[2], y.size ? width : 0, columns, threshold.fused);
  if (x.size == 0 || y.size == 0) return runs.finish(height * width);

  PaddedMask padded(mask, rows, columns, threshold.value);
  const Kernels<float>& kernel = kernels<float>(Storage::kFloat);
  auto reach = threshold.fused ? kernel.reach_fused : kernel.reach;
  std::vector<uint64_t> bits((y.size + 63) / 64);
  std::vector<Stretch> column;  // stretches not below the threshold; `cell` is -1 if all values reach it
  for (const Stretch& across : x.stretches) {
    column.clear();
    for (Stretch down : y.stretches) {
      PaddedMask::Verdict verdict = padded.verdict(across.cell, down.cell);
      if (verdict == PaddedMask::kBelow) continue;
      if (verdict == PaddedMask::kReached) down.cell = -1;
      if (down.cell < 0 && !column.empty() && column.back().cell < 0 && column.back().end == down.begin)
        column.back().end = down.end;
      else
        column.push_back(down);
    }
    if (column.empty()) continue;
    for (int64_t i = across.begin; i < across.end; i++) {
      int64_t top = (x.first + i) * height + y.first;
      for (const Stretch& down : column) {
        if (down.cell < 0) {
          runs.add(top + down.begin, top + down.end);
          continue;
        }
        reach(padded.cell(across.cell, down.cell), x.low[i], x.high[i], &y.low[down.begin], &y.high[down.begin],
              down.end - down.begin, threshold.value, bits.data());
        add_bits(runs, bits.data(), down.end - down.begin, top + down.begin);
      }
    }
  }
  return runs.finish(height * width);
}

int64_t pixels_of(const float* box, int64_t height, int64_t width) {
  auto side = [](float start, float end, int64_t image) {
    float length = std::min(end, static_cast<float>(image)) - std::max(start, 0.f);
    return length > 0.f ? static_cast<int64_t>(length) + 1 : 1;
  };
  return side(box[0], box[2], width) * side(box[1], box[3], height);
}

// The codes of all masks, concatenated, and the end of each.
std::tuple<Tensor, Tensor> paste_masks_rle(const Tensor& masks_, const Tensor& boxes_, int64_t height, int64_t width,
                                           double threshold, bool fused) {
  STD_TORCH_CHECK(masks_.dim() == 3 && masks_.scalar_type() == ScalarType::Float,
                  "masks must be a float32 tensor of shape (R, rows, columns)");
  STD_TORCH_CHECK(boxes_.dim() == 2 && boxes_.size(1) == 4 && boxes_.size(0) == masks_.size(0) &&
                      boxes_.scalar_type() == ScalarType::Float,
                  "boxes must be a float32 tensor of shape (R, 4)");
  int64_t count = masks_.size(0), rows = masks_.size(1), columns = masks_.size(2);
  STD_TORCH_CHECK(rows > 0 && columns > 0 && rows <= 65536 && columns <= 65536,
                  "the sides of a mask must be 1 to 65536, got (", rows, ", ", columns, ")");
  // Half pixels are exact in fp32 up to 2^23; run lengths have 32 bits.
  constexpr int64_t kLargest = int64_t{1} << 23;
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= kLargest && width <= kLargest && height * width <= UINT32_MAX,
                  "an image must have sides of 1 to 2^23 and less than 2^32 pixels, got ", height, " x ", width);
  Tensor masks = torch::stable::contiguous(masks_), boxes = torch::stable::contiguous(boxes_);
  const float* values = static_cast<const float*>(masks.const_data_ptr());
  const float* corners = static_cast<const float*>(boxes.const_data_ptr());
  int64_t pixels = 0;
  for (int64_t i = 0; i < count; i++) pixels += pixels_of(corners + 4 * i, height, width);

  std::vector<std::string> codes(count);
  // Most pixels are decided together with about a hundred others.
  for_each_task(count, worker_count(count, count * rows * columns + pixels / 4), [&](int64_t, int64_t i) {
    codes[i] = paste(values + i * rows * columns, rows, columns, corners + 4 * i, height, width,
                     {static_cast<float>(threshold), fused});
  });

  Tensor ends = torch::stable::empty({count}, ScalarType::Long);
  int64_t* end = static_cast<int64_t*>(ends.mutable_data_ptr());
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) end[i] = bytes += static_cast<int64_t>(codes[i].size());
  Tensor out = torch::stable::empty({bytes}, ScalarType::Byte);
  char* code = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < count; i++) code = std::copy(codes[i].begin(), codes[i].end(), code);
  return {out, ends};
}

}  // namespace
}  // namespace roi

STABLE_TORCH_LIBRARY_IMPL(mask_rcnn_plus, CPU, m) { m.impl("paste_masks_rle", TORCH_BOX(&roi::paste_masks_rle)); }
