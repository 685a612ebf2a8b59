// See driver.h. The checks are those that the driver's documentation of cuTensorMapEncodeTiled lists.
#include "driver.h"

#include <cuda.h>

#include <cstring>

#include "runtime.h"
#include "tensor_map.h"

namespace ptx::runtime {
namespace {

int element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  ++calls()["cuTensorMapEncodeTiled"];
  if (refusal.error != 0 && refusal.call == "cuTensorMapEncodeTiled") return static_cast<CUresult>(refusal.error);
  constexpr CUresult kWrong = CUDA_ERROR_INVALID_VALUE;
  TensorMap map{};
  map.mark = TensorMap::kMark;
  map.element_bytes = static_cast<uint8_t>(element_bytes(type));
  map.rank = static_cast<uint8_t>(rank);
  map.swizzle = static_cast<Swizzle>(swizzle);
  map.address = reinterpret_cast<uint64_t>(address);
  if (reinterpret_cast<uint64_t>(out) % 64 != 0 || map.address % 16 != 0 || rank < 1 || rank > 5) return kWrong;
  // What no kernel here asks for, the machine does not have.
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) return kWrong;
  if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return kWrong;
  for (cuuint32_t d = 0; d < rank; ++d) {
    if (sizes[d] == 0 || sizes[d] > uint64_t{1} << 32 || box[d] == 0 || box[d] > 256 || element_strides[d] != 1)
      return kWrong;
    map.size[d] = static_cast<uint32_t>(sizes[d]);
    map.box[d] = static_cast<uint16_t>(box[d]);
    if (d == 0) continue;
    if (strides[d - 1] % 16 != 0 || strides[d - 1] >> 40 != 0) return kWrong;
    map.stride[d - 1] = strides[d - 1];
  }
  const uint32_t row = box[0] * map.element_bytes,
                 widest = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? ~0u : 16u << swizzle;
  if (row % 16 != 0 || row > widest) return kWrong;
  std::memset(out, 0, 128);
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace

void* driver_function(const char* name) {
  return std::strcmp(name, "cuTensorMapEncodeTiled") == 0 ? reinterpret_cast<void*>(&encode) : nullptr;
}

}  // namespace ptx::runtime
