// The unchanged operators of roi_cuda.cpp, registered for the CPU in a separate namespace: the code between torch and the
// kernels runs on CPU tensors, and the kernels are emulated.
// These must come before the renames below.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator

#include "cuda_emulation_driver.h"

#define DeviceGuard NoGuard
#define is_cuda is_cpu
// A CPU tensor's is -1.
#define get_device_index() get_device_index() + 1

#define CUDA CPU
#define mask_rcnn_plus mask_rcnn_plus_emulated

#include "roi_cuda.cpp"
#include "roi_ops.cpp"
