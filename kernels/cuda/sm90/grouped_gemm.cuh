// The instances for Hopper: CUTLASS's persistent pointer-array kernels over groups, wgmma fed by TMA, sums in fp32.
// Compiled for sm_90a alone, since plain sm_90 has neither instruction and compiles to a kernel that traps.
//
// Of CUTLASS 4.2 this relies on the following, read in its sources. With no shapes on the host nothing is checked and
// the grid is one block a multiprocessor; a block without a tile returns. Nothing waits for the device: initialising
// encodes two descriptors on the host (their addresses and sizes are replaced on the device before use) and sets the
// kernel's shared memory. The scratch holds each block's descriptors; no earlier content is read. Three ints are a
// shape; a stride is the int64 of its one mode that is not constant. Tiles past a group's rows read zeros and store
// nothing. The kernel is launched here and not by CUTLASS's adapter, which encodes maps and sets attributes at each
// call, and keeps the runtime's errors to itself.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <cstring>
#include <type_traits>

#include "../expert_tiles.h"
#include "../grouped_product.h"
#include "../per_device.h"

namespace ummrm::cuda::sm90 {

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

struct Cooperative {  // two warp groups share a tile
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};
struct Pingpong {  // two warp groups have a tile each, one multiplies while the other stores
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};

// d = a x b, plus a row for each problem where Biased. CUTLASS 4.2 names no such epilogue for pointer arrays; this is
// its visitor for one row, which takes an array of pointers, put together by hand.
template <class Element, class Tile>
using AddRow = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, float, float, cutlass::FloatRoundStyle::round_to_nearest>,
    cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Element*, float>, cutlass::epilogue::fusion::Sm90AccFetch>;

// A driver that refuses to encode a map leaves it as it was; CUTLASS prints so and goes on.
inline bool encoded(const cute::TmaDescriptor& map) {
  constexpr cute::TmaDescriptor kNone{};
  return std::memcmp(&map, &kNone, sizeof(map)) != 0;
}

// Makes the kernel ready on the current device, once, and launches it.
template <class Kernel>
int launch_kernel(const typename Kernel::Params& params, Stream stream) {
  static PerDevice prepared;
  cudaError_t status = cudaSuccess;
  prepared.get(
      [](int, int* done) {
        *done = 1;
        return cudaFuncSetAttribute(&cutlass::device_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Kernel::SharedStorageSize);
      },
      status);
  if (status != cudaSuccess) return status;
  using Cluster = typename Kernel::ClusterShape;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1};
  const cudaLaunchConfig_t config = {
      Kernel::get_grid_shape(params), Kernel::get_block_shape(), Kernel::SharedStorageSize, stream, &cluster, 1};
  return cudaLaunchKernelEx(&config, &cutlass::device_kernel<Kernel>, params);
}

template <int tile, class Element, class LayoutA, class LayoutB, class Out, bool kBiased>
struct Instance {
  static constexpr TileShape kShape = kSm90Tiles[tile];
  using Schedule = std::conditional_t<kShape.schedule[0] == 'c', Cooperative, Pingpong>;
  using Tile = cute::Shape<cute::Int<kShape.m>, cute::Int<kShape.n>, cute::Int<kShape.k>>;
  using Cluster = cute::Shape<cute::Int<kShape.cluster_m>, cute::Int<kShape.cluster_n>, cute::Int<1>>;
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits<Element>::value;
  static constexpr int kOutAlignment = 128 / cutlass::sizeof_bits<Out>::value;

  using Problems = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor*, kOutAlignment, Out, RowMajor*,
      kOutAlignment, typename Schedule::Epilogue,
      std::conditional_t<kBiased, AddRow<Element, Tile>, cutlass::epilogue::fusion::Sm90AccFetch>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA*, kAlignment, Element, LayoutB*, kAlignment,
      float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Problems, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using StrideA = typename Kernel::InternalStrideA;
  using StrideB = typename Kernel::InternalStrideB;
  using StrideD = typename Kernel::InternalStrideD;

  static_assert(sizeof(typename Problems::UnderlyingProblemShape) == sizeof(GroupShape));
  static_assert(Kernel::SharedStorageSize <= 227 * 1024, "more shared memory than a block of Hopper can have");
  static_assert(sizeof(StrideA) == sizeof(int64_t) && sizeof(StrideB) == sizeof(int64_t) &&
                sizeof(StrideD) == sizeof(int64_t));

  static typename Gemm::Arguments arguments(const GroupedProduct& product) {
    const GroupTables& tables = product.tables;
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    args.problem_shape = {product.problems, reinterpret_cast<typename Problems::UnderlyingProblemShape*>(tables.shapes),
                          nullptr};
    args.mainloop.ptr_A = reinterpret_cast<const Element**>(tables.a);
    args.mainloop.dA = reinterpret_cast<StrideA*>(tables.a_stride);
    args.mainloop.ptr_B = reinterpret_cast<const Element**>(tables.b);
    args.mainloop.dB = reinterpret_cast<StrideB*>(tables.b_stride);
    args.epilogue.ptr_D = reinterpret_cast<Out**>(tables.d);
    args.epilogue.dD = reinterpret_cast<StrideD*>(tables.d_stride);
    if constexpr (kBiased) {
      const auto rows = product.biased ? reinterpret_cast<const Element* const*>(tables.bias) : nullptr;  // null: zeros
      args.epilogue.thread = {{rows}, {}, {}};
    }
    args.hw_info.sm_count = product.sms;
    // Along the columns of a problem, which are those of one band, then on to the next rows.
    args.scheduler.raster_order = decltype(args.scheduler.raster_order)::AlongN;
    return args;
  }

  static int64_t scratch_bytes(int sms) {
    GroupedProduct product = {};
    product.sms = sms;
    return static_cast<int64_t>(Gemm::get_workspace_size(arguments(product)));
  }

  using Params = typename Kernel::Params;

  // The maps are encoded for the first call; blocks replace their addresses and sizes, so they serve all calls.
  static Params params_of(const typename Gemm::Arguments& args, void* scratch) {
    static const Params first = Kernel::to_underlying_arguments(args, scratch);
    Params params = first;
    params.problem_shape = args.problem_shape;
    params.hw_info.sm_count = args.hw_info.sm_count;
    params.mainloop.ptr_A = reinterpret_cast<decltype(params.mainloop.ptr_A)>(args.mainloop.ptr_A);
    params.mainloop.dA = args.mainloop.dA;
    params.mainloop.ptr_B = reinterpret_cast<decltype(params.mainloop.ptr_B)>(args.mainloop.ptr_B);
    params.mainloop.dB = args.mainloop.dB;
    params.epilogue.ptr_D = args.epilogue.ptr_D;
    params.epilogue.dD = args.epilogue.dD;
    params.epilogue.thread =
        Epilogue::FusionCallbacks::to_underlying_arguments(args.problem_shape, args.epilogue.thread, nullptr);
    params.scheduler = Kernel::TileScheduler::to_underlying_arguments(
        args.problem_shape, typename Kernel::TileShape{}, typename Kernel::ClusterShape{}, params.hw_info,
        args.scheduler, nullptr, Epilogue::get_store_pipe_increment(typename Kernel::TileShape{}));
    // The scratch: the epilogue's maps, then the main loop's.
    auto* at = static_cast<unsigned char*>(scratch);
    params.epilogue.tensormaps = reinterpret_cast<cute::TmaDescriptor*>(at);
    const auto bytes = Epilogue::get_workspace_size(args.problem_shape, args.epilogue, args.hw_info.sm_count);
    params.mainloop.tensormaps = at + cutlass::round_nearest(bytes, Kernel::MinTensorMapWorkspaceAlignment);
    params.workspace = scratch;
    return params;
  }

  static int run(const GroupedProduct& product, Stream stream) {
    const auto args = arguments(product);
    if (Gemm::can_implement(args) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
    const Params params = params_of(args, product.scratch);
    if (!encoded(*params.mainloop.tma_load_a.get_tma_descriptor()) ||
        !encoded(*params.mainloop.tma_load_b.get_tma_descriptor()) ||
        !encoded(*params.epilogue.tma_store_d.get_tma_descriptor()))
      return cudaErrorNotSupported;
    return launch_kernel<Kernel>(params, stream);
  }

  static GroupedInstance get() { return {&scratch_bytes, &run}; }
};

template <class LayoutA, class LayoutB, class Out, bool kBiased, class Element>
GroupedInstance instance_of(int tile) {
  using T = std::conditional_t<std::is_void_v<Out>, Element, Out>;
  static_assert(kSm90TileCount == 3);
  return tile == 0   ? Instance<0, Element, LayoutA, LayoutB, T, kBiased>::get()
         : tile == 1 ? Instance<1, Element, LayoutA, LayoutB, T, kBiased>::get()
                     : Instance<2, Element, LayoutA, LayoutB, T, kBiased>::get();
}

// Out is void for the type of a and b.
template <class LayoutA, class LayoutB, class Out, bool kBiased>
GroupedInstance instance_of(int tile, DType dtype) {
  return dtype == DType::bf16 ? instance_of<LayoutA, LayoutB, Out, kBiased, cutlass::bfloat16_t>(tile)
                              : instance_of<LayoutA, LayoutB, Out, kBiased, cutlass::half_t>(tile);
}

}  // namespace ummrm::cuda::sm90
