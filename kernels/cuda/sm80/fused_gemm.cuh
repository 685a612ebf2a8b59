// Grouped GEMMs that end with more than storing their sums (row_endings.cuh), on Ampere: CUTLASS's main loop and
// schedule as grouped_gemm.cuh has them, and an end of our own, straight from registers.
#pragma once

#include "../row_endings.cuh"
#include "grouped_gemm.cuh"

namespace ummrm::cuda::sm80 {

// Ending's T is ours of numeric.cuh, Element is CUTLASS's of the same bits.
template <class Base, class Ending>
struct FusedKernel {
  using Mma = typename Base::Mma;
  using Visitor = typename Base::ProblemVisitor;
  using Element = typename Mma::IteratorA::Element;
  using Warps = typename Mma::WarpCount;
  using Warp = typename Mma::Operator::Shape;
  static constexpr int kThreadCount = Base::kThreadCount;
  static constexpr int kPartColumns = Warp::kN / Ending::kSides;  // of a warp

  struct Params {
    typename Visitor::Params visitor;
    GroupTables tables;
    int64_t pair_rows;  // of b, from a gate's to the same column of up
    typename Ending::Launch ending;
  };
  struct SharedStorage {
    typename Mma::SharedStorage main_loop;
    typename Visitor::SharedStorage visitor;
  };

  // Where b's rows of a tile with two sides are: a warp's columns are half gate, half up, so that a lane has both, and
  // every warp loads 32 of b's rows, all of one side. They are where CUTLASS looks for them once b is moved by `rows`.
  struct Side {
    int64_t rows;
    int extent;  // to which it may look, so moved
    __device__ Side(const Params& params, int columns, int first, int warp) {
      constexpr int kHalf = Warp::kN / 2;
      static_assert(Mma::Shape::kN / (kThreadCount / kWarp) == kHalf && Mma::Shape::kK == 32);
      const int looked_at = first + warp * kHalf, column = first / 2 + warp / 2 * kHalf;
      rows = column - looked_at + (warp % 2 == 1 ? params.pair_rows : 0);
      extent = columns / 2 + looked_at - column;
    }
  };

  __device__ void operator()(const Params& params, SharedStorage& shared) {
    Visitor visitor(params.visitor, shared.visitor, static_cast<int>(blockIdx.x));
    while (visitor.next_tile()) {
      const auto size = visitor.problem_size();
      const int problem = visitor.problem_index(), tile = visitor.threadblock_idx();
      const auto grid = visitor.grid_shape(size);
      const int first_row = tile / grid.n() * Mma::Shape::kM, first_column = tile % grid.n() * Mma::Shape::kN;
      const int warp = cutlass::canonical_warp_idx_sync(), lane = static_cast<int>(threadIdx.x) % kWarp;
      auto* a = static_cast<Element*>(const_cast<void*>(params.tables.a[problem]));
      auto* b = static_cast<Element*>(const_cast<void*>(params.tables.b[problem]));
      const int64_t a_stride = params.tables.a_stride[problem], b_stride = params.tables.b_stride[problem];
      int b_columns = size.n();
      if constexpr (Ending::kSides == 2) {
        const Side side(params, size.n(), first_column, warp);
        b += side.rows * b_stride;
        b_columns = side.extent;
      }
      typename Mma::IteratorA a_tile(typename Mma::IteratorA::Layout(a_stride), a, {size.m(), size.k()}, threadIdx.x,
                                     {first_row, 0});
      typename Mma::IteratorB b_tile(typename Mma::IteratorB::Layout(b_stride), b, {size.k(), b_columns}, threadIdx.x,
                                     {0, first_column});
      typename Mma::FragmentC sums;
      sums.clear();
      Mma mma(shared.main_loop, threadIdx.x, warp, lane);
      __syncthreads();  // the last tile's operands have been read
      mma((size.k() + Mma::Shape::kK - 1) / Mma::Shape::kK, sums, a_tile, b_tile, sums);

      constexpr int kRows = Warp::kM / 16, kBlocks = Warp::kN / kEight;
      const int row = first_row + warp % Warps::kM * Warp::kM + lane / 4;
      const int column = first_column / Ending::kSides + warp / Warps::kM * kPartColumns;
      finish_rows<kBlocks, 2 * kRows, 1>(
          Ending(params.ending, problem),
          [&](int block, int i, int c) { return sums[(block * kRows + i / 2) * 4 + i % 2 * 2 + c]; },
          [&](int i) { return row + i / 2 * 16 + i % 2 * 8; }, size.m(), column, size.n() / Ending::kSides);
      visitor.advance(static_cast<int>(gridDim.x));
    }
  }
};

template <int tile, class Element, class LayoutB, class Ending>
struct FusedInstance {
  using Kernel = FusedKernel<typename Instance<tile, Element, RowMajor, LayoutB, Element>::Kernel, Ending>;

  static int run(const GroupedProduct& product, int64_t pair_rows, const typename Ending::Launch& ending,
                 Stream stream) {
    cudaError_t status = cudaSuccess;
    const int blocks = resident_blocks<Kernel>(status) * product.sms;
    if (status != cudaSuccess) return status;
    const typename Kernel::Params params = {
        {reinterpret_cast<cutlass::gemm::GemmCoord*>(product.tables.shapes), product.problems},
        product.tables,
        pair_rows,
        ending};
    return launch_persistent<Kernel>(blocks, params, stream);
  }
};

}  // namespace ummrm::cuda::sm80
