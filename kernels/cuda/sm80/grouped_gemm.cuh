// The instances for Ampere and Ada, which newer GPUs without instances of their own run too: CUTLASS's grouped GEMM
// with its schedule made on the device, mma.sync fed by cp.async, sums in fp32.
//
// The kernel is launched here and not by CUTLASS, which asks the runtime for the same at each call, and keeps its
// errors. Of CUTLASS 4.2 this relies on the following, read in its sources. The schedule needs no workspace and no
// shape on the host, walks a problem's tiles along its columns, and counts tiles in int32. An operand's address and row
// stride are read for each problem, so a source of stride 0 is one row for all of them: the bias. A source of factor 0
// is not read.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>

#include <type_traits>

#include "../expert_tiles.h"
#include "../grouped_product.h"
#include "../per_device.h"

namespace ummrm::cuda::sm80 {

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

// fp32 operands are rounded to TF32 on their way to mma.sync. One tile, of as many bytes as the smaller one's.
inline constexpr TileShape kTf32Tile = {128, 128, 16, 1, 1, "multistage"};
inline constexpr int kTf32 = -1;

template <class Kernel>
constexpr int kShared = static_cast<int>(sizeof(typename Kernel::SharedStorage));

// Blocks that a multiprocessor of the current device holds; the kernel is then ready to be launched there.
template <class Kernel>
int resident_blocks(cudaError_t& status) {
  static_assert(kShared<Kernel> <= 99 * 1024, "more shared memory than a block of Ada can have");
  static PerDevice known;
  return known.get(
      [](int, int* blocks) {
        const auto kernel = &cutlass::Kernel<Kernel>;
        cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared<Kernel>);
        if (status == cudaSuccess)
          status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, Kernel::kThreadCount, kShared<Kernel>);
        return status == cudaSuccess && *blocks < 1 ? cudaErrorInvalidConfiguration : status;
      },
      status);
}

template <class Kernel>
cudaError_t launch_persistent(int blocks, const typename Kernel::Params& params, Stream stream) {
  const cudaLaunchConfig_t config = {
      dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreadCount), kShared<Kernel>, stream, nullptr, 0};
  return cudaLaunchKernelEx(&config, &cutlass::Kernel<Kernel>, params);
}

template <int tile, class Element, class LayoutA, class LayoutB, class Out>
struct Instance {
  static constexpr TileShape kShape = tile == kTf32 ? kTf32Tile : kSm80Tiles[tile == kTf32 ? 0 : tile];
  static constexpr int kStages = kShape.n == 256 ? 3 : 4;
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits<Element>::value;
  static constexpr int kOutAlignment = 128 / cutlass::sizeof_bits<Out>::value;

  using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
      Element, LayoutA, cutlass::ComplexTransform::kNone, kAlignment, Element, LayoutB,
      cutlass::ComplexTransform::kNone, kAlignment, Out, RowMajor, float, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, cutlass::gemm::GemmShape<kShape.m, kShape.n, kShape.k>,
      cutlass::gemm::GemmShape<64, 64, kShape.k>, cutlass::gemm::GemmShape<16, 8, tile == kTf32 ? 8 : 16>,
      cutlass::epilogue::thread::LinearCombination<Out, kOutAlignment, float, float>,
      cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, kStages,
      cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmGrouped<Kernel>;

  static_assert(sizeof(cutlass::gemm::GemmCoord) == sizeof(GroupShape));

  static int64_t scratch_bytes(int) { return 0; }

  static int run(const GroupedProduct& product, Stream stream) {
    cudaError_t status = cudaSuccess;
    const int blocks = resident_blocks<Kernel>(status) * product.sms;
    if (status != cudaSuccess) return status;
    const GroupTables& tables = product.tables;
    const typename Gemm::Arguments args(
        reinterpret_cast<cutlass::gemm::GemmCoord*>(tables.shapes), product.problems, blocks,
        {1.f, product.biased ? 1.f : 0.f}, const_cast<Element**>(reinterpret_cast<const Element**>(tables.a)),
        const_cast<Element**>(reinterpret_cast<const Element**>(tables.b)),
        const_cast<Out**>(reinterpret_cast<const Out**>(tables.bias)), reinterpret_cast<Out**>(tables.d),
        tables.a_stride, tables.b_stride, tables.bias_stride, tables.d_stride);
    return launch_persistent<Kernel>(blocks, typename Kernel::Params(args), stream);
  }

  static GroupedInstance get() { return {&scratch_bytes, &run}; }
};

template <class LayoutA, class LayoutB, class Out, class Element>
GroupedInstance instance_of(int tile) {
  using T = std::conditional_t<std::is_void_v<Out>, Element, Out>;
  static_assert(kSm80TileCount == 2);
  return tile == 0 ? Instance<0, Element, LayoutA, LayoutB, T>::get()
                   : Instance<1, Element, LayoutA, LayoutB, T>::get();
}

// Out is void for the type of a and b.
template <class LayoutA, class LayoutB, class Out>
GroupedInstance instance_of(int tile, DType dtype) {
  if constexpr (std::is_void_v<Out>) {
    if (dtype == DType::f32) return Instance<kTf32, float, LayoutA, LayoutB, float>::get();
  }
  return dtype == DType::bf16 ? instance_of<LayoutA, LayoutB, Out, cutlass::bfloat16_t>(tile)
                              : instance_of<LayoutA, LayoutB, Out, cutlass::half_t>(tile);
}

}  // namespace ummrm::cuda::sm80
