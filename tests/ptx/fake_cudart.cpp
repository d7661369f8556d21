// Stands where CUDA's runtime library would: a launch is told to whoever listens, and not made.
// Linked to what nvcc makes of a .cu file, so that its own host code chooses kernel and grid.

#include <cstddef>
#include <map>

namespace {

struct Size {
  unsigned x, y, z;
};

using Listener = void (*)(const char* kernel, const Size* grid, const Size* block, void** args);

Listener listener;
Size pushed_grid, pushed_block;

// From a host function to its kernel's name. Filled before this file's own globals exist.
std::map<const void*, const char*>& kernels() {
  static std::map<const void*, const char*> table;
  return table;
}

}  // namespace

extern "C" {

void listen(Listener new_listener) { listener = new_listener; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* kernel, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = kernel;
}

// What <<<grid, block>>> becomes.
unsigned __cudaPushCallConfiguration(Size grid, Size block, std::size_t, void*) {
  pushed_grid = grid;
  pushed_block = block;
  return 0;
}

int __cudaPopCallConfiguration(Size* grid, Size* block, std::size_t* shared_size, void** stream) {
  *grid = pushed_grid;
  *block = pushed_block;
  *shared_size = 0;
  *stream = nullptr;
  return 0;
}

int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}

// cudaLaunchKernel before CUDA 13.
int cudaLaunchKernel(const void* host, Size grid, Size block, void** args, std::size_t, void*) {
  listener(kernels().at(host), &grid, &block, args);
  return 0;
}

int __cudaLaunchKernel(const void* kernel, Size grid, Size block, void** args, std::size_t, void*) {
  return cudaLaunchKernel(kernel, grid, block, args, 0, nullptr);
}

int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "no error"; }
}
