// See runtime.h: fat binaries, launches, devices and memory. The driver's part is in driver.cpp.
#include "runtime.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "driver.h"
#include "memory.h"

namespace ptx::runtime {

Device device;
Refusal refusal;
// Made before what others set it in at load (extension/from_environment.cpp).
__attribute__((init_priority(101))) std::function<void(const Started&)> on_launch;

std::map<std::string, uint64_t>& calls() {
  static std::map<std::string, uint64_t> counts;
  return counts;
}

namespace {

constexpr size_t kBlockShared = 48 * 1024;  // without an attribute that asks for more
size_t most_shared() { return (device.major == 9 ? 227 : device.minor == 0 ? 163 : 99) * 1024; }
size_t multiprocessor_shared() { return most_shared() + 1024; }

struct FatBinary {
  struct Part {  // for one architecture
    std::string text;
    int major = 0, minor = 0;
    bool exact = false;  // of an `a` architecture, whose code runs on no other
    std::unique_ptr<Module> module;
  };
  std::vector<Part> parts;

  Module* for_device() {
    const auto runs = [](const Part& part) {
      const int needed = part.major * 10 + part.minor, has = device.major * 10 + device.minor;
      return part.exact ? needed == has : needed <= has;
    };
    Part* best = nullptr;
    for (Part& part : parts) {
      const auto better = [&] {
        return part.major * 10 + part.minor + part.exact > best->major * 10 + best->minor + best->exact;
      };
      if (runs(part) && (best == nullptr || better())) best = &part;
    }
    if (best == nullptr) return nullptr;
    if (best->module == nullptr) {
      best->module = std::make_unique<Module>(parse(best->text));
    }
    return best->module.get();
  }
};

struct Function {
  FatBinary* binary;
  std::string name;
  size_t most_dynamic = kBlockShared;
};

std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> table;
  return table;
}

std::map<void*, size_t>& allocations() {
  static std::map<void*, size_t> table;
  return table;
}

thread_local cudaError_t latest = cudaSuccess;
cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) latest = error;
  return error;
}

// Counts a call; true: it is to be refused.
bool refused(const char* name) {
  ++calls()[name];
  return refusal.error != 0 && refusal.call == name;
}
#define UMMRM_CALL(name) \
  if (refused(#name)) return answer(static_cast<cudaError_t>(refusal.error))

// What the hardware's limits on a launch are, as far as they are known without a GPU.
cudaError_t fault_of_launch(const Kernel& kernel, const Function& function, dim3 grid, dim3 block, dim3 cluster,
                            size_t dynamic) {
  const size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{cluster.x} * cluster.y * cluster.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (threads == 0 || threads > 1024 || block.z > 64 || blocks > 8) return cudaErrorInvalidConfiguration;
  if (dynamic > function.most_dynamic || dynamic + static_cast<size_t>(kernel.static_shared) > most_shared())
    return cudaErrorInvalidValue;
  if (kernel.max_threads != 0 && threads > static_cast<size_t>(kernel.max_threads))
    return cudaErrorLaunchOutOfResources;
  if (blocks > 1 && device.major < 9) return cudaErrorInvalidValue;
  return cudaSuccess;
}

cudaError_t start(const void* entry, dim3 grid, dim3 block, dim3 cluster, size_t dynamic, void** arguments) {
  const auto found = functions().find(entry);
  if (found == functions().end()) return answer(cudaErrorInvalidDeviceFunction);
  Module* module = found->second.binary->for_device();
  if (module == nullptr) return answer(cudaErrorNoKernelImageForDevice);
  Kernel* kernel = module->find(found->second.name);
  if (kernel == nullptr) return answer(cudaErrorInvalidDeviceFunction);
  if (const auto fault = fault_of_launch(*kernel, found->second, grid, block, cluster, dynamic); fault != cudaSuccess) {
    return answer(fault);
  }
  std::vector<char> parameters(static_cast<size_t>(kernel->parameter_bytes) + 1);  // at least one, to have an address
  for (size_t i = 0; i < kernel->parameters.size(); ++i) {
    const Parameter& parameter = kernel->parameters[i];
    std::memcpy(parameters.data() + parameter.offset, arguments[i], static_cast<size_t>(parameter.bytes));
  }
  Dim blocks{grid.x, grid.y, grid.z}, in_cluster{cluster.x, cluster.y, cluster.z};
  if (on_launch != nullptr) {
    if (!kernel->decoded) decode(*kernel);
    on_launch({*kernel, blocks, in_cluster, parameters});
  }
  launch(*kernel, blocks, {block.x, block.y, block.z}, in_cluster, static_cast<unsigned>(dynamic), parameters.data());
  return cudaSuccess;
}

struct Configuration {  // of kernel<<<...>>>
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

}  // namespace

void for_kernels(const std::string& part_of_name, const std::function<void(Kernel&)>& body) {
  for (auto& [entry, function] : functions()) {
    if (function.name.find(part_of_name) == std::string::npos) continue;
    Module* module = function.binary->for_device();
    Kernel* kernel = module == nullptr ? nullptr : module->find(function.name);
    if (kernel == nullptr) continue;
    if (!kernel->decoded) decode(*kernel);
    body(*kernel);
  }
}

}  // namespace ptx::runtime

using namespace ptx;
using namespace ptx::runtime;

extern "C" {

// ---- what nvcc's stubs call as a program starts; fatbinary_section.h of the toolkit has the wrapper

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int mark, version;
    const char* data;
    void* unused;
  };
  struct Header {
    uint32_t mark;
    uint16_t version, bytes;
    uint64_t rest;
  };
  struct Entry {
    uint16_t kind, unused;
    uint32_t header_bytes;
    uint64_t bytes;
  };
  constexpr uint16_t kPtx = 1;
  const char* at = static_cast<const Wrapper*>(wrapper)->data;
  Header header;
  std::memcpy(&header, at, sizeof header);
  auto* binary = new FatBinary;
  const char* end = at + header.bytes + header.rest;
  for (at += header.bytes; at < end;) {
    Entry entry;
    std::memcpy(&entry, at, sizeof entry);
    if (entry.kind == kPtx) {
      FatBinary::Part part;
      part.text.assign(at + entry.header_bytes, strnlen(at + entry.header_bytes, entry.bytes));
      const size_t target = part.text.find(".target sm_");
      if (target == std::string::npos) {
        std::fprintf(stderr, "the machine reads PTX that is not compressed: build with nvcc --no-compress\n");
        std::abort();
      }
      const char* number = part.text.c_str() + target + 11;
      const int arch = std::atoi(number);
      while (*number >= '0' && *number <= '9') ++number;
      part.major = arch / 10, part.minor = arch % 10, part.exact = *number == 'a';
      binary->parts.push_back(std::move(part));
    }
    at += entry.header_bytes + entry.bytes;
  }
  return reinterpret_cast<void**>(binary);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** binary, const char* entry, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  functions()[entry] = {reinterpret_cast<FatBinary*>(binary), name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}  // none is used by the host
char __cudaInitModule(void**) { return 1; }

// ---- launches

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* entry) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(entry));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  UMMRM_CALL(cudaLaunchKernel);
  return start(reinterpret_cast<const void*>(kernel), grid, block, dim3(1, 1, 1), shared, arguments);
}
cudaError_t cudaLaunchKernel(const void* entry, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  UMMRM_CALL(cudaLaunchKernel);
  return start(entry, grid, block, dim3(1, 1, 1), shared, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* entry, void** arguments) {
  UMMRM_CALL(cudaLaunchKernelExC);
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
  }
  return start(entry, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, arguments);
}

// ---- functions and devices

cudaError_t cudaFuncSetAttribute(const void* entry, cudaFuncAttribute attribute, int value) {
  UMMRM_CALL(cudaFuncSetAttribute);
  const auto found = functions().find(entry);
  if (found == functions().end()) return answer(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > most_shared()) return answer(cudaErrorInvalidValue);
  found->second.most_dynamic = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* entry) {
  UMMRM_CALL(cudaFuncGetAttributes);
  const auto found = functions().find(entry);
  if (found == functions().end()) return answer(cudaErrorInvalidDeviceFunction);
  Module* module = found->second.binary->for_device();
  if (module == nullptr) return answer(cudaErrorNoKernelImageForDevice);
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(found->second.most_dynamic);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t shared,
                                                                   unsigned) {
  UMMRM_CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessor);
  const size_t by_threads = 2048 / static_cast<size_t>(threads), by_shared = multiprocessor_shared() / (shared + 1024);
  *blocks = static_cast<int>(std::min(by_threads, by_shared));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* entry, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, entry, threads, shared, 0);
}
cudaError_t cudaGetDevice(int* number) {
  UMMRM_CALL(cudaGetDevice);
  *number = device.number;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
  UMMRM_CALL(cudaSetDevice);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* number) {
  UMMRM_CALL(cudaGetDeviceCount);
  *number = device.number + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  UMMRM_CALL(cudaDeviceGetAttribute);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(most_shared()); return cudaSuccess;
    default:
      std::fprintf(stderr, "the stand-in runtime knows no attribute %d\n", attribute);
      return answer(cudaErrorInvalidValue);
  }
}
cudaError_t cudaGetLastError() {
  ++calls()["cudaGetLastError"];
  return std::exchange(latest, cudaSuccess);
}
cudaError_t cudaPeekAtLastError() {
  ++calls()["cudaPeekAtLastError"];
  return latest;
}
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[48];
  std::snprintf(text, sizeof text, "error %d of the stand-in runtime", static_cast<int>(error));
  return text;
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

// ---- memory: filled with garbage (all ones are NaN), and what lies outside is unknown to kernels

cudaError_t cudaMalloc(void** to, size_t bytes) {
  UMMRM_CALL(cudaMalloc);
  constexpr size_t kAlignment = 512;
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes + kAlignment) != 0) return answer(cudaErrorMemoryAllocation);
  std::memset(memory, 0xff, bytes + kAlignment);
  allocations()[memory] = bytes;
  add_memory(memory, bytes);
  *to = memory;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  UMMRM_CALL(cudaFree);
  if (memory == nullptr) return cudaSuccess;
  if (allocations().erase(memory) == 0) return answer(cudaErrorInvalidValue);
  remove_memory(memory);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  UMMRM_CALL(cudaMemset);
  if (bytes > 0 && !known_memory(reinterpret_cast<uint64_t>(memory), bytes)) return answer(cudaErrorInvalidValue);
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(memory, value, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  UMMRM_CALL(cudaMemcpy);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

// ---- the driver, of which CUTLASS asks for one function by its name

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  UMMRM_CALL(cudaGetDriverEntryPointByVersion);
  *function = driver_function(name);
  const bool found = *function != nullptr;
  if (result != nullptr) *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
