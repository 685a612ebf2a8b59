// Grouped GEMMs that end with more than storing their sums (row_endings.cuh), on Hopper: CUTLASS's main loop, schedule
// and kernel as grouped_gemm.cuh has them, and an end of our own, straight from registers, since the epilogues that
// CUTLASS 4.2 has for pointer arrays write one tensor. What it takes no shared memory for, the main loop has.
//
// Of CUTLASS 4.2 this relies on the following, read in its sources, beside what grouped_gemm.cuh does. The kernel calls
// of a main loop no more than what is named below, on its own type, so that a derived one may hide it. Tensor maps made
// on the host are copied on the device, and dimensions and strides replaced but not the box.
#pragma once

#include "../row_endings.cuh"
#include "grouped_gemm.cuh"

namespace ummrm::cuda::sm90 {

// The Adapter of CUTLASS makes of it what a kernel calls.
template <class Ending, class TiledMma>
struct RowEpilogue {
  using EpilogueSchedule = cutlass::epilogue::PtrArrayNoSmemWarpSpecialized;
  using DispatchPolicy = EpilogueSchedule;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementOutput = cutlass::bfloat16_t;  // read by nothing; what is written is Ending's affair
  using ElementC = cutlass::bfloat16_t;
  using ElementD = cutlass::bfloat16_t;
  using InternalStrideC = cute::Stride<int64_t, cute::_1, cute::_0>;
  using InternalStrideD = InternalStrideC;
  using StrideC = InternalStrideC*;
  using StrideD = InternalStrideD*;
  struct SharedStorage {};
  using TensorMapStorage = SharedStorage;
  using Arguments = typename Ending::Launch;
  using Params = Arguments;

  template <class Problems>
  static constexpr Params to_underlying_arguments(const Problems&, const Arguments& args, void*) {
    return args;
  }
  template <class Problems>
  static size_t get_workspace_size(const Problems&, const Arguments&, int) {
    return 0;
  }
  template <class Problems>
  static cutlass::Status initialize_workspace(const Problems&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Problems>
  static bool can_implement(const Problems&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE explicit RowEpilogue(const Params& params) : params_(params) {}

  template <class Shape, class Tile, class Coordinate, class Engine, class Layout, class Residue>
  CUTLASS_DEVICE void operator()(const Shape& shape, const Tile&, const Coordinate& at,
                                 const cute::Tensor<Engine, Layout>& sums, const TiledMma&, const Residue&, int thread,
                                 char*) {
    using namespace cute;
    constexpr int kM = size<0>(Tile{}), kN = size<1>(Tile{}), kRowsApart = size(TiledMma{}) / 2;  // 64 a warp group
    static_assert(size<1>(Layout{}) * kRowsApart == kM && size<2>(Layout{}) == 1 &&
                  size<0, 2>(Layout{}) == kN / kEight);
    const auto [m, n, k, problem] = at;
    const int row = static_cast<int>(m) * kM + thread / kWarp * 16 + thread % kWarp / 4;
    finish_rows<kN / kEight, 2 * kM / kRowsApart, Ending::kAhead>(
        Ending(params_, static_cast<int>(problem)),
        [&](int block, int i, int c) { return sums(make_coord(c, i % 2, block), i / 2, 0); },
        [&](int i) { return row + i / 2 * kRowsApart + i % 2 * 8; }, static_cast<int>(get<0>(shape)),
        static_cast<int>(n) * (kN / Ending::kSides), static_cast<int>(get<1>(shape)) / Ending::kSides);
  }

 private:
  const Params& params_;
};

// A main loop whose tile of b is two of half the rows: gate's, and up's `pair_rows` further on, so that a thread's sums
// hold both of a column. It loads one after the other, for the same barrier.
template <class Base>
struct PairedMainloop : Base {
  using typename Base::InternalElementB;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::SmemLayoutA;
  using typename Base::SmemLayoutB;
  using typename Base::TensorMapStorage;
  using typename Base::TensorStorage;
  using typename Base::TileShape;
  using ClusterShape = typename Base::DispatchPolicy::ClusterShape;
  static constexpr int kHalf = cute::size<1>(TileShape{}) / 2;
  using Half = cute::Shape<cute::Int<kHalf>, decltype(cute::get<2>(TileShape{}))>;
  // Stages of the two halves: what Base has as one, since the atoms of its layout follow one another along the rows.
  using HalfLayout = decltype(cute::flat_divide(SmemLayoutB{}, cute::make_tile(cute::Int<kHalf>{})));
  using HalfTma =
      decltype(cute::make_tma_copy(typename Base::GmemTiledCopyB{},
                                   cute::make_tensor(static_cast<const InternalElementB*>(nullptr),
                                                     cute::repeat_like(typename Base::InternalStrideB{}, int32_t(0)),
                                                     typename Base::InternalStrideB{}),
                                   HalfLayout{}(cute::_, 0, cute::_, 0), Half{}, cute::size<0>(ClusterShape{})));

  struct Arguments : Base::Arguments {
    int64_t pair_rows;
  };
  struct Params : Base::Params {
    HalfTma half;
    int32_t pair_rows;
  };

  template <class Problems>
  static Params to_underlying_arguments(const Problems& problems, const Arguments& args, void* workspace) {
    using namespace cute;
    const auto base = Base::to_underlying_arguments(problems, args, workspace);
    const auto* b = reinterpret_cast<const InternalElementB*>(reinterpret_cast<uint64_t>(args.ptr_B) & ~uint64_t{15});
    const auto any = make_tensor(b, make_layout(make_shape(1, 1, 1u), typename Base::InternalStrideB{}));
    return {
        base,
        make_tma_copy(typename Base::GmemTiledCopyB{}, any, HalfLayout{}(_, 0, _, 0), Half{}, size<0>(ClusterShape{})),
        static_cast<int32_t>(args.pair_rows)};
  }
  template <class Problems>
  static bool can_implement(const Problems& problems, const Arguments& args) {
    return Base::can_implement(problems, args);
  }
  template <class Problems>
  static size_t get_workspace_size(const Problems& problems, const Arguments& args, int sms) {
    return Base::get_workspace_size(problems, args, sms);
  }

  template <class Shape>
  CUTLASS_DEVICE auto load_init(const Shape& shape, const Params& params) const {
    using namespace cute;
    const auto [a, b] = Base::load_init(shape, params);
    const auto all = params.half.get_tma_tensor(make_shape(get<1>(shape), get<2>(shape), 1));
    const auto halves = [&](int32_t rows) {
      return local_tile(domain_offset(make_coord(rows, 0, 0), all), Half{}, make_coord(_, _, _));
    };
    return make_tuple(a, halves(0), halves(params.pair_rows));  // as (rows, depth, tile, step, 0)
  }

  template <class A, class Gate, class Up, class MapA, class MapB, class Steps, class Coordinate>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state,
                           const cute::tuple<A, Gate, Up>& from, const cute::tuple<MapA, MapB>& maps,
                           const Coordinate& at, Steps step, int steps, int, uint32_t rank, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const auto block = Layout<ClusterShape>{};
    const uint32_t across = rank % size<0>(ClusterShape{}), along = rank / size<0>(ClusterShape{});
    const auto a_shared = make_tensor(make_smem_ptr(shared.smem_A.data()), SmemLayoutA{});
    const auto b_shared = make_tensor(make_smem_ptr(shared.smem_B.data()), HalfLayout{});
    const auto a_copy = params.tma_load_a.get_slice(along);
    const auto b_copy = params.half.get_slice(across);
    const auto [m, n, k, l] = at;
    const auto a_from = a_copy.partition_S(get<0>(from)(_, _, m, _, l));
    const auto gate_from = b_copy.partition_S(get<1>(from)(_, _, n, _, l));
    const auto up_from = b_copy.partition_S(get<2>(from)(_, _, n, _, l));
    const auto a_to = a_copy.partition_D(a_shared);
    const auto gate_to = b_copy.partition_D(b_shared(_, 0, _, _)), up_to = b_copy.partition_D(b_shared(_, 1, _, _));
    uint16_t a_blocks = 0, b_blocks = 0;
    if constexpr (is_same_v<typename Base::GmemTiledCopyA, SM90_TMA_LOAD_MULTICAST>) {
      for (int i = 0; i < size<1>(ClusterShape{}); ++i) a_blocks |= uint16_t(1) << block(across, i, 0);
    }
    if constexpr (is_same_v<typename Base::GmemTiledCopyB, SM90_TMA_LOAD_MULTICAST>) {
      for (int i = 0; i < size<0>(ClusterShape{}); ++i) b_blocks |= uint16_t(1) << block(i, along, 0);
    }
    CUTLASS_PRAGMA_NO_UNROLL
    for (; steps > 0; --steps, ++step, ++state) {
      pipeline.producer_acquire(state);
      auto* barrier = pipeline.producer_get_barrier(state);
      const int stage = state.index();
      copy(params.tma_load_a.with(get<0>(maps), *barrier, a_blocks), a_from(_, _, _, *step), a_to(_, _, _, stage));
      const auto b_with = params.half.with(get<1>(maps), *barrier, b_blocks);
      copy(b_with, gate_from(_, _, _, *step), gate_to(_, _, _, stage));
      copy(b_with, up_from(_, _, _, *step), up_to(_, _, _, stage));
    }
  }

  // The map that Base makes of b, with half's box.
  CUTLASS_DEVICE auto tensormaps_init(const Params& params, TensorMapStorage& shared, int32_t sms, int32_t sm) {
    using namespace cute;
    const auto maps = Base::tensormaps_init(params, shared, sms, sm);
    if (elect_one_sync()) {
      const auto from = make_tensor(params.half.get_tma_descriptor(), Int<1>{}, Int<1>{});
      const auto to = make_tensor(make_smem_ptr(&shared.smem_tensormap_B), Int<1>{}, Int<1>{});
      copy(recast<uint128_t>(from), recast<uint128_t>(to));
    }
    __syncwarp();
    return maps;
  }

  // b has rows as far as the last of up's: beyond them are another expert's, or nothing.
  template <class Maps, class Shape>
  CUTLASS_DEVICE void tensormaps_perform_update(TensorMapStorage& shared, const Params& params, const Maps& maps,
                                                const Shape& shape, int32_t problem) {
    const int32_t rows = params.pair_rows + cute::get<1>(shape) / 2;
    Base::tensormaps_perform_update(
        shared, params, maps, cute::make_shape(cute::get<0>(shape), rows, cute::get<2>(shape), cute::get<3>(shape)),
        problem);
  }
};

template <int tile, class LayoutA, class LayoutB, class Ending>
struct FusedInstance {
  using Element = cutlass::bfloat16_t;
  using Plain = Instance<tile, Element, LayoutA, LayoutB, Element, false>;
  using WholeMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA*, Plain::kAlignment, Element, LayoutB*,
      Plain::kAlignment, float, typename Plain::Tile, typename Plain::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<0>, typename Plain::Schedule::Mainloop>::CollectiveOp;
  using Mainloop = std::conditional_t<Ending::kSides == 2, PairedMainloop<WholeMainloop>, WholeMainloop>;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      RowEpilogue<Ending, typename WholeMainloop::TiledMma>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<typename Plain::Problems, Mainloop, Epilogue>;
  static constexpr int64_t kPartColumns = Plain::kShape.n;
  static_assert(Kernel::SharedStorageSize <= 227 * 1024, "more shared memory than a block of Hopper can have");

  static typename Kernel::Arguments arguments(const GroupedProduct& product, int64_t pair_rows,
                                              const typename Ending::Launch& ending) {
    const GroupTables& tables = product.tables;
    typename Kernel::Arguments args{cutlass::gemm::GemmUniversalMode::kGrouped, {}, {}, ending};
    args.problem_shape = {product.problems,
                          reinterpret_cast<typename Plain::Problems::UnderlyingProblemShape*>(tables.shapes), nullptr};
    args.mainloop.ptr_A = reinterpret_cast<const Element**>(tables.a);
    args.mainloop.dA = reinterpret_cast<typename Kernel::InternalStrideA*>(tables.a_stride);
    args.mainloop.ptr_B = reinterpret_cast<const Element**>(tables.b);
    args.mainloop.dB = reinterpret_cast<typename Kernel::InternalStrideB*>(tables.b_stride);
    if constexpr (Ending::kSides == 2) args.mainloop.pair_rows = pair_rows;
    args.hw_info.sm_count = product.sms;
    args.scheduler.raster_order = decltype(args.scheduler.raster_order)::AlongN;
    return args;
  }

  static int64_t scratch_bytes(int sms) {
    GroupedProduct product = {};
    product.sms = sms;
    return static_cast<int64_t>(Kernel::get_workspace_size(arguments(product, 0, {})));
  }

  // As Instance's.
  static typename Kernel::Params params_of(const typename Kernel::Arguments& args, void* scratch) {
    static const typename Kernel::Params first = Kernel::to_underlying_arguments(args, scratch);
    typename Kernel::Params params = first;
    params.problem_shape = args.problem_shape;
    params.hw_info.sm_count = args.hw_info.sm_count;
    params.mainloop.ptr_A = reinterpret_cast<decltype(params.mainloop.ptr_A)>(args.mainloop.ptr_A);
    params.mainloop.dA = args.mainloop.dA;
    params.mainloop.ptr_B = reinterpret_cast<decltype(params.mainloop.ptr_B)>(args.mainloop.ptr_B);
    params.mainloop.dB = args.mainloop.dB;
    if constexpr (Ending::kSides == 2) params.mainloop.pair_rows = static_cast<int32_t>(args.mainloop.pair_rows);
    params.mainloop.tensormaps = scratch;
    params.epilogue = args.epilogue;
    params.scheduler = Kernel::TileScheduler::to_underlying_arguments(
        args.problem_shape, typename Kernel::TileShape{}, typename Kernel::ClusterShape{}, params.hw_info,
        args.scheduler, nullptr, Epilogue::get_store_pipe_increment(typename Kernel::TileShape{}));
    params.workspace = scratch;
    return params;
  }

  static int run(const GroupedProduct& product, int64_t pair_rows, const typename Ending::Launch& ending,
                 Stream stream) {
    const auto args = arguments(product, pair_rows, ending);
    if (!Kernel::can_implement(args)) return cudaErrorInvalidValue;
    const auto params = params_of(args, product.scratch);
    if (!encoded(*params.mainloop.tma_load_a.get_tma_descriptor())) return cudaErrorNotSupported;
    if constexpr (Ending::kSides == 2) {
      if (!encoded(*params.mainloop.half.get_tma_descriptor())) return cudaErrorNotSupported;
    } else if (!encoded(*params.mainloop.tma_load_b.get_tma_descriptor())) {
      return cudaErrorNotSupported;
    }
    return launch_kernel<Kernel>(params, stream);
  }
};

}  // namespace ummrm::cuda::sm90
