// The host's code of cuda_emulation.cpp, with another driver in place of the emulated kernels.
#include "cuda_emulation.cpp"

API void connect(decltype(cuda::Driver::find) find, decltype(cuda::Driver::launch) launch) {
  cuda::driver.find = find;
  cuda::driver.launch = launch;
}
