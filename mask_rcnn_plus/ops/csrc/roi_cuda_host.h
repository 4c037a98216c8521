// For the host's compiler, which does not compile the kernels: what they name, and their launch.
//
// Python compiles and loads the kernels (mask_rcnn_plus/ops/kernels.py) and passes the functions of `Driver`, so that
// this library needs neither CUDA's headers nor its libraries.
#pragma once
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <tuple>

#ifndef ROI_EMULATION
struct Index {
  unsigned x;
};
extern const Index threadIdx, blockIdx;
struct uint4 {
  unsigned x, y, z, w;
};
void __syncthreads();
void __stwb(uint4*, uint4);
int __popc(unsigned);
int __shfl_xor_sync(unsigned, int, int);
unsigned __ballot_sync(unsigned, int);
extern unsigned char* const shared_memory;
#endif

namespace roi::cuda {

constexpr int kMostDevices = 64;
constexpr int kMessageBytes = 2048;

struct Driver {
  // The function of a kernel, and the context of its device; or null, and the reason in `message`. The first call sets
  // the functions below.
  void* (*find)(const char* kernel, int device, void** context, char* message);
  // cuCtxSetCurrent
  int (*set_context)(void* context);
  // cuLaunchKernel
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra);
  // aoti_torch_get_current_cuda_stream
  int32_t (*current_stream)(int32_t device, void** stream);
};

inline Driver driver = {};

// A kernel for one type, on every device.
class Kernel {
 public:
  Kernel(const char* name, const char* type) : name_(std::string("roi::cuda::") + name + "<" + type + ">") {}

  const std::string& name() const { return name_; }

  // The kernel's function. The device's context becomes the thread's: a thread that has not called CUDA yet has none.
  void* on(int device) {
    STD_TORCH_CHECK(device < kMostDevices, "CUDA device ", device, ": at most ", kMostDevices, " are supported");
    void* function = functions_[device].load();
    void* context = contexts_[device].load();
    if (function == nullptr) {
      char message[kMessageBytes] = "import mask_rcnn_plus.ops first, which compiles the CUDA kernels";
      if (driver.find != nullptr) function = driver.find(name_.c_str(), device, &context, message);
      STD_TORCH_CHECK(function != nullptr, name_, " cannot run on CUDA device ", device, ": ", message);
      contexts_[device].store(context);
      functions_[device].store(function);
    }
    int error = driver.set_context(context);
    STD_TORCH_CHECK(error == 0, name_, ": cuCtxSetCurrent failed with CUDA error ", error);
    return function;
  }

 private:
  std::string name_;
  std::atomic<void*> functions_[kMostDevices] = {}, contexts_[kMostDevices] = {};
};

// The first argument only tells the types of the kernel's parameters, to which the arguments are converted.
template <class... Parameters, class... Arguments>
void launch(void (*)(Parameters...), Kernel& kernel, int64_t blocks, int64_t shared_bytes, int device,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  void *function = kernel.on(device), *stream = nullptr;
  STD_TORCH_CHECK(driver.current_stream(device, &stream) == 0, "CUDA device ", device, " has no current stream");
  std::tuple<Parameters...> parameters(arguments...);
  std::apply(
      [&](auto&... parameter) {
        void* pointers[] = {&parameter...};
        int error = driver.launch(function, static_cast<unsigned>(blocks), 1, 1, kThreads, 1, 1,
                                  static_cast<unsigned>(shared_bytes), stream, pointers, nullptr);
        STD_TORCH_CHECK(error == 0, kernel.name(), ": cuLaunchKernel failed with CUDA error ", error);
      },
      parameters);
}

}  // namespace roi::cuda
