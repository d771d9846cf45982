// A libcuda.so.1 without a GPU: device memory is this process's, and a kernel is a function of the emulator's.
//
// What is put on a stream runs when the stream is synchronized, or run() says so, and no earlier: whoever reads a result
// before has the old one. On a stream that is captured it goes to a graph, which replay() runs, any number of times.
// Device memory is what allow() has named and what is allocated here: a kernel that touches anything else is an error, a
// use after free too. A library's image is a text: the path of the emulated kernels, and how many parameters each has.
//
// Functions are as in NVIDIA's documentation, as far as they are used; those in lower case are for the tests.

#include "fake_cuda.h"

#include <dlfcn.h>

extern "C" {

// ---------------------------------------------------------------- for the tests

void use_emulator(Emulator emulator, int reversed) { world.emulator = emulator, world.reversed = reversed; }

void allow(char* start, size_t bytes, int writable) { world.memory[start] = {bytes, writable != 0}; }

void forbid(char* start) { world.memory.erase(start); }

void set_capability(int device, int capability) { world.capability[device] = capability; }

void fail(const char* function, int result) { world.failures[function] = result; }

void run() { RunAll(); }

void capture(void* stream, int begin) {
  if (begin) world.graph.clear();
  world.streams[stream].capturing = begin != 0;
}

void replay() { Run(world.graph); }

int resident_blocks() { return kMultiprocessors * kBlocksOfMultiprocessor; }

int contexts_pushed() { return static_cast<int>(contexts.size()); }

const char* take_log() {
  world.text = world.log.str();
  world.log.str("");
  return world.text.c_str();
}

// ---------------------------------------------------------------- the driver

int cuGetErrorName(int result, const char** name) {
  static char text[32];
  snprintf(text, sizeof text, "CUDA_ERROR_NUMBER_%d", result);
  *name = text;
  return kSuccess;
}

int cuGetErrorString(int, const char** text) {
  *text = "as a test wants it";
  return kSuccess;
}

int cuInit(unsigned flags) {
  BEGIN("cuInit");
  if (flags != 0) return kInvalidValue;
  world.initialized = 1;
  return kSuccess;
}

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  BEGIN("cuDeviceGet");
  if (ordinal < 0 || ordinal >= kDevices) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  BEGIN("cuDeviceGetAttribute");
  const int major = world.capability[device] / 10, minor = world.capability[device] % 10;
  const std::map<int, int> attributes = {{16, kMultiprocessors}, {75, major}, {76, minor}};
  const auto found = attributes.find(attribute);
  if (found == attributes.end()) return kInvalidValue;
  *value = found->second;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(intptr_t* context, int device) {
  BEGIN("cuDevicePrimaryCtxRetain");
  *context = device + 1;
  world.log << "context device=" << device << "\n";
  return kSuccess;
}

int cuCtxPushCurrent_v2(intptr_t context) {
  BEGIN("cuCtxPushCurrent");
  contexts.push_back(context);
  return kSuccess;
}

int cuCtxPopCurrent_v2(intptr_t* context) {
  NEEDS_CONTEXT();
  *context = contexts.back();
  contexts.pop_back();
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return kSuccess;
}

int cuLibraryLoadData(void** library, const void* image, void*, void*, unsigned, void*, void*, unsigned) {
  BEGIN("cuLibraryLoadData");
  UNSAFE();
  std::istringstream text(std::string(static_cast<const char*>(image), strnlen(static_cast<const char*>(image), 1 << 16)));
  std::string word, path;
  if (!(text >> word >> path) || word != "emulated") return kInvalidImage;
  void* const handle = dlopen(path.c_str(), RTLD_NOW);
  if (handle == nullptr) return kInvalidImage;
  Library& made = world.libraries.emplace_back();
  int parameters;
  while (text >> word >> parameters) {
    auto* const entry = reinterpret_cast<void (*)(void**)>(dlsym(handle, (word + "_entry").c_str()));
    if (entry == nullptr) return kInvalidImage;
    made.kernels[word] = {word, entry, parameters};
  }
  *library = &made;
  world.log << "library " << made.kernels.size() << "\n";
  return kSuccess;
}

int cuLibraryGetKernel(void** kernel, Library* library, const char* name) {
  BEGIN("cuLibraryGetKernel");
  const auto found = library->kernels.find(name);
  if (found == library->kernels.end()) return kNotFound;
  *kernel = &found->second;
  return kSuccess;
}

int cuKernelGetFunction(void** function, Kernel* kernel) {
  BEGIN("cuKernelGetFunction");
  NEEDS_CONTEXT();
  UNSAFE();
  *function = kernel;
  return kSuccess;
}

int cuFuncSetAttribute(Kernel* kernel, int attribute, int value) {
  BEGIN("cuFuncSetAttribute");
  if (attribute != 8 || value < 0 || value > 227 << 10) return kInvalidValue;
  kernel->shared_limit = value;
  return kSuccess;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int, size_t shared) {
  BEGIN("cuOccupancyMaxActiveBlocksPerMultiprocessor");
  if (static_cast<int>(shared) > kernel->shared_limit) return kInvalidValue;
  *blocks = kBlocksOfMultiprocessor;
  return kSuccess;
}

int cuLaunchKernel(Kernel* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** values, void** extra) {
  BEGIN("cuLaunchKernel");
  NEEDS_CONTEXT();
  if (extra != nullptr || gx * gy * gz == 0 || static_cast<int>(shared) > kernel->shared_limit) return kInvalidValue;
  std::vector<uint64_t> copied(kernel->parameters);
  for (int i = 0; i < kernel->parameters; ++i) memcpy(&copied[i], values[i], 8);
  world.log << "launch " << kernel->name << Where(stream) << " grid=" << gx << " block=" << bx << " shared=" << shared
            << "\n";
  Put(stream, [=] { Execute(*kernel, copied, {gx, gy, gz}, {bx, by, bz}, shared); });
  return kSuccess;
}

int cuMemAlloc_v2(char** memory, size_t bytes) {
  BEGIN("cuMemAlloc");
  NEEDS_CONTEXT();
  UNSAFE();
  return Allocate(memory, bytes);
}

int cuMemHostAlloc(char** memory, size_t bytes, unsigned flags) {
  BEGIN("cuMemHostAlloc");
  NEEDS_CONTEXT();
  UNSAFE();
  return flags == 3 ? Allocate(memory, bytes) : kInvalidValue;
}

int cuMemHostGetDevicePointer_v2(char** seen, char* memory, unsigned flags) {
  BEGIN("cuMemHostGetDevicePointer");
  if (flags != 0 || world.memory.count(memory) == 0) return kInvalidValue;
  *seen = memory;
  return kSuccess;
}

int cuMemPoolCreate(intptr_t* pool, const int* props) {
  BEGIN("cuMemPoolCreate");
  if (props[0] != 1 || props[1] != 0 || props[2] != 1) return kInvalidValue;
  *pool = props[3] + 1;
  return kSuccess;
}

int cuMemPoolSetAttribute(intptr_t, int attribute, const uint64_t* value) {
  BEGIN("cuMemPoolSetAttribute");
  return attribute == 4 && *value == UINT64_MAX ? kSuccess : kInvalidValue;
}

int cuMemAllocFromPoolAsync(char** memory, size_t bytes, intptr_t pool, void* stream) {
  BEGIN("cuMemAllocFromPoolAsync");
  NEEDS_CONTEXT();
  if (pool != contexts.back()) return kInvalidValue;
  char* const made = *memory = NewMemory(bytes);
  world.log << "alloc " << bytes << Where(stream) << "\n";
  Put(stream, [=] { world.memory[made] = {bytes, true}; });
  return kSuccess;
}

int cuMemFreeAsync(char* memory, void* stream) {
  BEGIN("cuMemFreeAsync");
  NEEDS_CONTEXT();
  world.log << "free" << Where(stream) << "\n";
  Put(stream, [=] {  // kept, for graphs that are replayed; nothing reads it again
    const auto found = world.memory.find(memory);
    if (found == world.memory.end()) {
      world.log << "fault: memory is freed that is not there\n";
      return;
    }
    memset(memory, 0xFF, found->second.bytes);
    world.memory.erase(found);
  });
  return kSuccess;
}

int cuMemsetD32Async(char* memory, unsigned value, size_t count, void* stream) {
  BEGIN("cuMemsetD32Async");
  NEEDS_CONTEXT();
  world.log << "memset" << Where(stream) << "\n";
  Put(stream, [=] {
    for (size_t i = 0; i < count; ++i) memcpy(memory + 4 * i, &value, 4);
  });
  return kSuccess;
}

int cuMemcpyDtoHAsync_v2(void* to, const char* from, size_t bytes, void* stream) {
  BEGIN("cuMemcpyDtoHAsync");
  NEEDS_CONTEXT();
  UNSAFE();
  world.log << "copy " << bytes << Where(stream) << "\n";
  RunAll();
  memcpy(to, from, bytes);
  return kSuccess;
}

int cuMemcpyHtoDAsync_v2(char* to, const void* from, size_t bytes, void* stream) {
  BEGIN("cuMemcpyHtoDAsync");
  NEEDS_CONTEXT();
  UNSAFE();
  world.log << "upload " << bytes << Where(stream) << "\n";
  Put(stream, [=] { memcpy(to, from, bytes); });
  return kSuccess;
}

int cuStreamCreate(void** stream, unsigned flags) {
  BEGIN("cuStreamCreate");
  if (flags != 1) return kInvalidValue;
  static intptr_t next = 1 << 20;
  *stream = reinterpret_cast<void*>(++next);
  return kSuccess;
}

int cuStreamDestroy_v2(void* stream) {
  BEGIN("cuStreamDestroy");
  return world.streams.erase(stream) ? kSuccess : kInvalidHandle;
}

int cuStreamSynchronize(void* stream) {
  BEGIN("cuStreamSynchronize");
  if (world.streams[stream].capturing) return kCaptureUnsupported;
  Stream& waiting = world.streams[stream];
  Run(waiting.waiting);
  waiting.waiting.clear();
  return kSuccess;
}

int cuStreamIsCapturing(void* stream, int* status) {
  BEGIN("cuStreamIsCapturing");
  *status = world.streams[stream].capturing;
  return kSuccess;
}

}  // extern "C"
