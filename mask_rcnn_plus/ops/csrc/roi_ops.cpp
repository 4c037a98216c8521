// The schemas of every RoI operator. Kernels for each device register themselves against these.
//
// Arguments that all share: boxes (R, 5) fp32; pooled_* the output's sides; channels_last the memory format of the
// output and of the gradients. Backward operators take the features' sizes, (N, C, H, W) of each level, flat.
#include <torch/csrc/stable/library.h>

#define ROI_ALIGN_ARGUMENTS                                                                       \
  "float[] spatial_scales, int sampling_ratio, bool aligned, int min_level, float canonical_box_size, " \
  "int canonical_level, bool channels_last"

STABLE_TORCH_LIBRARY(mask_rcnn_plus, m) {
  // The instruction set in use on the CPU: avx512, avx2 or baseline.
  m.def("cpu_isa() -> str");
  m.def("fpn_roi_align(Tensor[] features, Tensor boxes, SymInt pooled_height, SymInt pooled_width, " ROI_ALIGN_ARGUMENTS
        ") -> Tensor");
  m.def("fpn_roi_align_backward(Tensor grad, Tensor boxes, SymInt[] sizes, " ROI_ALIGN_ARGUMENTS ") -> Tensor[]");
}
