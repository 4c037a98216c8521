// The unchanged operators of roi_cuda.cu, registered for the CPU in a separate namespace: the code between torch and the
// kernels runs on CPU tensors, and the kernels are emulated.
#include "cuda_emulation.h"
// These must come before the renames below.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator

namespace {
AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}  // namespace

#define DeviceGuard NoGuard
#define is_cuda is_cpu
#define aoti_torch_get_current_cuda_stream no_stream
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() ((void)0)

#define CUDA CPU
#define mask_rcnn_plus mask_rcnn_plus_emulated

#include "roi_cuda.cu"
#include "roi_ops.cpp"
