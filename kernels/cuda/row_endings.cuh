// What products end with (quad_rows.cuh): the gated activation, its backward, and the sum with what is there already. A
// tile's rows and columns are its problem's; GroupTables says which of the combined buffer these are.
#pragma once

#include "activation_math.cuh"
#include "expert_groups.cuh"
#include "grouped_product.h"
#include "quad_rows.cuh"
#include "ummrm/expert_glu.h"

namespace ummrm::cuda {

// The pre-activation with its bias, and the activation of what was stored.
template <class T, class Kind>
class GluEnding {
 public:
  static constexpr int kSides = 2, kAhead = 2;
  static constexpr bool kDots = false;
  struct Launch {
    T *pre, *activation;
    int64_t width;
    GroupTables tables;
    bool biased;
  };
  struct Read {
    uint4 gate, up;  // biases
  };

  __device__ GluEnding(const Launch& launch, int problem) : width_(launch.width), bias_(nullptr) {
    const int64_t row = launch.tables.first_row[problem], column = launch.tables.first_column[problem];
    pre_ = launch.pre + row * 2 * width_ + column;
    activation_ = launch.activation + row * width_ + column;
    if (launch.biased) bias_ = static_cast<const T*>(launch.tables.bias[problem]);
  }

  __device__ Read read(int, int column) const {
    if (bias_ == nullptr) return {};  // zeros, in every type
    return {*reinterpret_cast<const uint4*>(bias_ + column), *reinterpret_cast<const uint4*>(bias_ + width_ + column)};
  }
  __device__ float write(int row, int column, const Read& biases, float (&sums)[2][kEight]) const {
    float bias[2][kEight], derivative[kEight];
    unpack_all<T>(biases.gate, bias[0]);
    unpack_all<T>(biases.up, bias[1]);
    T* pre = pre_ + row * (2 * width_) + column;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) sums[side][i] += bias[side][i];
      const uint4 words = pack_all<T>(sums[side]);
      *reinterpret_cast<uint4*>(pre + side * width_) = words;
      unpack_all<T>(words, sums[side]);
    }
    float act[kEight];
    apply<Kind, MathOf<T>>(sums[0], act, derivative);
#pragma unroll
    for (int i = 0; i < kEight; ++i) act[i] *= sums[1][i];
    store<kEight>(act, activation_ + row * width_ + column);
    return 0;
  }

 private:
  int64_t width_;
  T *pre_, *activation_;
  const T* bias_;
};

// activation_backward of activation.h, on gradients that were never rounded. The dots are partial sums: one
// for every part of a row, in the row's order.
template <class T, class Kind>
class GluBackwardEnding {
 public:
  static constexpr int kSides = 1, kAhead = 2;
  static constexpr bool kDots = true;
  struct Launch {
    const T* pre;
    const float* row_weights;
    T *grad_pre, *weighted;
    float* partial_dots;  // [rows, parts]
    int64_t width, parts;
    GroupTables tables;
  };
  struct Read {
    uint4 gate, up;
  };

  __device__ GluBackwardEnding(const Launch& launch, int problem) : launch_(launch) {
    row_ = launch.tables.first_row[problem];
    column_ = static_cast<int>(launch.tables.first_column[problem]);
  }

  __device__ Read read(int row, int column) const {
    const T* pre = launch_.pre + (row_ + row) * 2 * launch_.width + column_ + column;
    return {*reinterpret_cast<const uint4*>(pre), *reinterpret_cast<const uint4*>(pre + launch_.width)};
  }
  __device__ float write(int row, int column, const Read& read, float (&sums)[1][kEight]) const {
    float gate[kEight], up[kEight], act[kEight], derivative[kEight], grad_up[kEight];
    unpack_all<T>(read.gate, gate);
    unpack_all<T>(read.up, up);
    const float(&g)[kEight] = sums[0];
    apply<Kind, MathOf<T>>(gate, act, derivative);
    const float weight = launch_.row_weights[row_ + row];
    float dot = 0;
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      grad_up[i] = weight * g[i] * act[i];
      act[i] *= up[i];
      derivative[i] *= up[i] * (weight * g[i]);
      dot += g[i] * act[i];
      act[i] *= weight;
    }
    T* grad_pre = launch_.grad_pre + (row_ + row) * 2 * launch_.width + column_ + column;
    store<kEight>(derivative, grad_pre);
    store<kEight>(grad_up, grad_pre + launch_.width);
    store<kEight>(act, launch_.weighted + (row_ + row) * launch_.width + column_ + column);
    return dot;
  }
  template <int part_columns>
  __device__ void dot(int row, int first_column, float value) const {
    launch_.partial_dots[(row_ + row) * launch_.parts + (column_ + first_column) / part_columns] = value;
  }

 private:
  const Launch& launch_;
  int64_t row_;
  int column_;
};

using FusedKind = Silu;
static_assert(kFusedKind == ActivationKind::silu);
using FusedGlu = GluEnding<bf16, FusedKind>;
using FusedGluBackward = GluBackwardEnding<bf16, FusedKind>;

inline FusedGlu::Launch launch_of(const GroupedProduct& product, const ExpertGlu& args) {
  return {static_cast<bf16*>(args.product.out), static_cast<bf16*>(args.activation), args.product.out_width / 2,
          product.tables, product.biased};
}

inline FusedGluBackward::Launch launch_of(const GroupedProduct& product, const ExpertGluBackward& args,
                                          float* partial_dots, int64_t parts) {
  return {static_cast<const bf16*>(args.pre_activation),
          args.row_weights,
          static_cast<bf16*>(args.grad_pre_activation),
          static_cast<bf16*>(args.weighted_activation),
          partial_dots,
          args.product.out_width,
          parts,
          product.tables};
}

// d += a x b: what is there is widened, and the sum rounded once.
template <class Out>
class SumEnding {
 public:
  static constexpr int kSides = 1;
  static constexpr bool kDots = false;
  static constexpr int kWords = kEight * sizeof(Out) / sizeof(uint4), kAhead = 4 / kWords;
  struct Launch {
    GroupTables tables;
  };
  struct Read {
    uint4 words[kWords];
  };

  __device__ SumEnding(const Launch& launch, int problem)
      : out_(static_cast<Out*>(launch.tables.d[problem])), stride_(launch.tables.d_stride[problem]) {}

  __device__ Read read(int row, int column) const {
    Read read;
#pragma unroll
    for (int w = 0; w < kWords; ++w) read.words[w] = words_of(row, column)[w];
    return read;
  }
  __device__ float write(int row, int column, const Read& read, float (&sums)[1][kEight]) const {
    constexpr int kEach = kVector<Out>;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float there[kEach];
      unpack_all<Out>(read.words[w], there);
#pragma unroll
      for (int i = 0; i < kEach; ++i) there[i] += sums[0][w * kEach + i];
      words_of(row, column)[w] = pack_all<Out>(there);
    }
    return 0;
  }

 private:
  __device__ uint4* words_of(int row, int column) const {
    return reinterpret_cast<uint4*>(out_ + row * stride_ + column);
  }
  Out* out_;
  int64_t stride_;
};

}  // namespace ummrm::cuda
