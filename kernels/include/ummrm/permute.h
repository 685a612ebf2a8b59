// Moving token rows into expert order and back: a gather of rows, and the gated sum of each token's expert rows.
#pragma once

#include <cstdint>

#include "ummrm/types.h"

namespace ummrm {

struct Permute {
  const void* x;                  // [tokens, row_bytes]
  const int32_t* sorted_to_slot;  // [rows]
  int64_t live_rows, top_k, row_bytes;
  void* out;  // [rows, row_bytes]; rows from live_rows on become zero
};

// out_t = shared_weight_t / S * sum_s rows[s*T + t] + sum_k routed_weights[t, k] * rows[S*T + slot_to_sorted[t*K + k]];
// a null weight counts as one, for the shared rows without the 1/S. Sorted rows from live_rows on are not read.
struct Unpermute {
  DType dtype;                    // of rows and out
  const void* rows;               // [S*T + T*K, hidden]
  const int32_t* slot_to_sorted;  // [T*K]
  const void* shared_weight;      // accumulator type [T], or null
  const void* routed_weights;     // accumulator type [T, K], or null
  int64_t tokens, hidden, top_k, num_shared, live_rows;
  void* out;  // [T, hidden]
};

struct UnpermuteBackward {
  DType dtype;
  const void* grad_out;  // [T, hidden]
  const void* rows;
  const int32_t* slot_to_sorted;
  const void* shared_weight;
  const void* routed_weights;
  int64_t tokens, hidden, top_k, num_shared, live_rows;
  void* grad_rows;            // out, [S*T + T*K, hidden]
  void* grad_shared_weight;   // out, accumulator type [T]; null with shared_weight
  void* grad_routed_weights;  // out, accumulator type [T, K]; null with routed_weights
};

namespace cpu {

void permute(const Permute& args, int64_t begin_row, int64_t end_row);
void unpermute(const Unpermute& args, int64_t begin_token, int64_t end_token);
void unpermute_backward(const UnpermuteBackward& args, int64_t begin_token, int64_t end_token);

// The first position in [begin, end) whose value is outside [low, high), or -1.
int64_t first_out_of_range(const int32_t* values, int64_t begin, int64_t end, int64_t low, int64_t high);

}  // namespace cpu

// The arguments' live_rows is not read: it is known on the device alone, where `live_rows` points at expert_offsets[E].
namespace cuda {

int permute(const Permute& args, int64_t rows, const int32_t* live_rows, Stream stream);
int unpermute(const Unpermute& args, const int32_t* live_rows, Stream stream);
int unpermute_backward(const UnpermuteBackward& args, const int32_t* live_rows, Stream stream);

}  // namespace cuda
}  // namespace ummrm
