// The schemas of all RoI operators. The files for each device register kernels for them.
//
// Common arguments: boxes, (R, 5), fp64 for fp64 maps and else fp32; pooled_*, the sides of the output; channels_last,
// the memory format of the output and of the gradients; grid, a roi::Grid. Backward operators get the features' sizes:
// (N, C, H, W) of each level, in one list.
#include <torch/csrc/stable/library.h>

#define ROI_ARGUMENTS                                                                                \
  "float[] spatial_scales, int sampling_ratio, int grid, int min_level, float canonical_box_size, " \
  "int canonical_level, bool channels_last"

STABLE_TORCH_LIBRARY(mask_rcnn_plus, m) {
  // The instruction set used on the CPU: avx512, avx2 or baseline.
  m.def("cpu_isa() -> str");
  // The average of a bin's samples; kPool is refused.
  m.def("fpn_roi_align(Tensor[] features, Tensor boxes, SymInt pooled_height, SymInt pooled_width, " ROI_ARGUMENTS
        ") -> Tensor");
  m.def("fpn_roi_align_backward(Tensor grad, Tensor boxes, SymInt[] sizes, " ROI_ARGUMENTS ") -> Tensor[]");
  // The maximum of a bin's points, and its index: int32, row by row among the bin's points on the map, or -1 if none of
  // them is the maximum (an empty bin, an undefined box, samples outside the map that count as zero).
  m.def("fpn_roi_max(Tensor[] features, Tensor boxes, SymInt pooled_height, SymInt pooled_width, " ROI_ARGUMENTS
        ") -> (Tensor, Tensor)");
  m.def("fpn_roi_max_backward(Tensor grad, Tensor index, Tensor boxes, SymInt[] sizes, " ROI_ARGUMENTS
        ") -> Tensor[]");
  // Masks (R, rows, columns) fp32 pasted into boxes (R, 4) fp32 of an image: COCO's compressed run lengths,
  // concatenated, and the end of each. fused: a product and a sum are rounded once.
  m.def("paste_masks_rle(Tensor masks, Tensor boxes, int height, int width, float threshold, bool fused) -> (Tensor, "
        "Tensor)");
}
