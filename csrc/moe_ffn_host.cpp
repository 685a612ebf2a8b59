// moe_ffn of CPU tensors in fp32, in pieces that threads take: a few rows of one expert through both projections, or
// some rows of one projection's gradient. Nothing is gathered beforehand: rows are read through the routing maps as
// they are packed. Against the composition that saves the gathered rows and the activations, written and read again: 8
// T K H + 8 R I bytes forward, of R = S T + T K rows.
#include <ATen/ATen.h>

#include <atomic>

#include "device.h"
#include "expert_products.h"
#include "large_empty.h"
#include "moe_ffn.h"

namespace ummrm::host {
namespace {

std::atomic<bool> enabled{true};

constexpr int64_t kRows = 192;  // of a piece: two pre-activations of an I of 1408 fill a second-level cache

// Rows of one expert, from `begin` on among its kind's and from `at` on in the combined buffer.
struct Block {
  bool shared;
  int64_t expert, begin, rows, at;
};

struct Groups {
  std::vector<Block> whole;  // one an expert, empty ones too
  std::vector<Block> pieces;
  int64_t live;

  // The piece that the thread of piece i will likely have after it, or null.
  const Block* after(int64_t i) const {
    const int64_t next = i + at::get_num_threads();
    return next < static_cast<int64_t>(pieces.size()) ? &pieces[next] : nullptr;
  }

  Groups(const MoeSizes& n, const int32_t* offsets) : live(offsets[n.num_experts]) {
    for (int64_t s = 0; s < n.num_shared; ++s) whole.push_back({true, s, 0, n.tokens, s * n.tokens});
    for (int64_t e = 0; e < n.num_experts; ++e) {
      whole.push_back({false, e, offsets[e], offsets[e + 1] - offsets[e], n.shared_rows() + offsets[e]});
    }
    for (const Block& group : whole) {
      const int64_t count = (group.rows + kRows - 1) / kRows;
      const int64_t step = count == 0 ? 1 : ((group.rows + count - 1) / count + 15) / 16 * 16;
      for (int64_t row = 0; row < group.rows; row += step) {
        pieces.push_back(
            {group.shared, group.expert, group.begin + row, std::min(step, group.rows - row), group.at + row});
      }
    }
  }
};

// Contiguous tensors of a layer, and where an expert's part begins.
struct Layer {
  Tensor x, shared_up, routed_up, shared_down, routed_down;
  OptionalTensor shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias;
  Tensor offsets;
  std::vector<int32_t> token_of_row;  // of each sorted row
  MoeSizes n;

  Layer(const Tensor& x_in, const Experts& p, const RoutingMaps& maps, const MoeSizes& sizes)
      : x(x_in.contiguous()),
        shared_up(p.shared_up.contiguous()),
        routed_up(p.routed_up.contiguous()),
        shared_down(p.shared_down.contiguous()),
        routed_down(p.routed_down.contiguous()),
        shared_up_bias(contiguous(p.shared_up_bias)),
        routed_up_bias(contiguous(p.routed_up_bias)),
        shared_down_bias(contiguous(p.shared_down_bias)),
        routed_down_bias(contiguous(p.routed_down_bias)),
        offsets(maps.expert_offsets.contiguous()),
        token_of_row(sizes.slots()),
        n(sizes) {
    const Tensor sorted_to_slot = maps.sorted_to_slot.contiguous();
    const auto* slots = sorted_to_slot.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < n.slots(); ++i) token_of_row[i] = static_cast<int32_t>(slots[i] / n.top_k);
  }

  // Rows of `of`, one a token, that `block` takes.
  cpu::Rows rows(const Tensor& of, const Block& block) const {
    const cpu::Rows all{of.const_data_ptr<float>(), block.shared ? nullptr : token_of_row.data(), of.size(1)};
    return all.from(block.begin);
  }
  const float* up(const Block& b) const { return part(b, shared_up, routed_up); }
  const float* down(const Block& b) const { return part(b, shared_down, routed_down); }
  const float* up_bias(const Block& b) const { return part(b, shared_up_bias, routed_up_bias); }
  const float* down_bias(const Block& b) const { return part(b, shared_down_bias, routed_down_bias); }

 private:
  static const float* part(const Block& block, const Tensor& shared, const Tensor& routed) {
    const Tensor& of = block.shared ? shared : routed;
    return of.const_data_ptr<float>() + block.expert * of.stride(0);
  }
  static const float* part(const Block& block, const OptionalTensor& shared, const OptionalTensor& routed) {
    const OptionalTensor& of = block.shared ? shared : routed;
    return of.has_value() ? of->const_data_ptr<float>() + block.expert * of->stride(0) : nullptr;
  }
};

void set_next(cpu::Product* product, const cpu::Product& then, int64_t columns) {
  product->next = then.rows;
  product->next_rows = then.out_rows;
  product->next_columns = columns;
  product->after = &then;
}

int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// Floats of scratch that the two products of any piece need, and the most rows that one has.
std::pair<int64_t, int64_t> room_for(const std::vector<Block>& pieces, const auto& products) {
  int64_t floats = 0, most = 0;
  for (const Block& b : pieces) {
    const auto [one, other] = products(b);
    floats = std::max({floats, cpu::scratch_floats(one), cpu::scratch_floats(other)});
    most = std::max(most, b.rows);
  }
  return {aligned(floats), most};
}

cpu::Product forward_of(const cpu::Rows& rows, const float* proj, const float* bias, int64_t count, int64_t columns,
                        int64_t depth, float* out) {
  cpu::Product p{cpu::ProductKind::forward, count, columns, depth, rows, {}, proj, depth, bias, out, columns, false};
  p.pack_rows = true;
  return p;
}

cpu::Product input_grad_of(const cpu::Rows& rows, const float* proj, int64_t count, int64_t columns, int64_t depth,
                           float* out) {
  return {cpu::ProductKind::input_grad, count, columns, depth, rows, {}, proj, columns, nullptr, out, columns, false};
}

void zero_rows(const Tensor& of, int64_t first) {
  if (first < of.size(0)) of.slice(0, first).zero_();
}

}  // namespace

void use(bool on) { enabled = on; }

bool serves(const Tensor& x) {
  return on_host(x) && x.is_cpu() && x.scalar_type() == at::kFloat && enabled && cpu::has_products();
}

Tensor2 forward(const Tensor& x, const Experts& p, const RoutingMaps& maps, const MoeSizes& n, ActivationKind kind,
                bool glu, bool keep) {
  const Layer layer(x, p, maps, n);
  const Groups groups(n, layer.offsets.const_data_ptr<int32_t>());
  const int64_t rows = n.shared_rows() + n.slots();
  const Tensor out = workspace_empty({rows, n.hidden}, x.options());  // for unpermute alone
  const Tensor pre = keep ? large_empty({rows, n.pre_width}, x.options()) : Tensor();
  auto* out_data = out.mutable_data_ptr<float>();
  auto* pre_data = keep ? pre.mutable_data_ptr<float>() : nullptr;
  const auto products = [&](const Block& b, float* pre_rows, float* act, float* to) {
    return std::pair{
        forward_of(layer.rows(layer.x, b), layer.up(b), layer.up_bias(b), b.rows, n.pre_width, n.hidden, pre_rows),
        forward_of({act, nullptr, n.width}, layer.down(b), layer.down_bias(b), b.rows, n.hidden, n.width, to)};
  };
  const auto room = room_for(groups.pieces, [&](const Block& b) { return products(b, nullptr, nullptr, nullptr); });
  const int64_t act_at = room.first, most = room.second, pre_at = act_at + aligned(most * n.width);
  deal_out(static_cast<int64_t>(groups.pieces.size()), pre_at + (keep ? 0 : most * n.pre_width),
           [&](int64_t i, float* scratch) {
             const Block& b = groups.pieces[i];
             float* act = scratch + act_at;
             float* pre_rows = keep ? pre_data + b.at * n.pre_width : scratch + pre_at;
             auto [up, down] = products(b, pre_rows, act, out_data + b.at * n.hidden);
             const Block* after = groups.after(i);
             const auto then = products(after == nullptr ? b : *after, nullptr, nullptr, nullptr);
             up.after = &down;
             if (after != nullptr) set_next(&down, then.first, n.hidden);
             cpu::multiply(up, scratch);
             cpu::activation({DType::f32, kind, glu, n.width, pre_rows, act}, 0, b.rows);
             cpu::multiply(down, scratch);
           });
  if (keep) zero_rows(pre, n.shared_rows() + groups.live);  // unpermute reads no such rows of `out`
  return {out, pre};
}

Gradients backward(const Tensor& grad_out_in, const Tensor& x, const Experts& p, const RoutingMaps& maps,
                   const Tensor& pre_in, const Tensor& row_weights_in, const MoeSizes& n, ActivationKind kind, bool glu,
                   const Wanted& wanted, const WeightSums& sums) {
  const Layer layer(x, p, maps, n);
  const Groups groups(n, layer.offsets.const_data_ptr<int32_t>());
  const Tensor grad_out = grad_out_in.contiguous(), pre = pre_in.contiguous(), weights = row_weights_in.contiguous();
  const int64_t rows = n.shared_rows() + n.slots();
  const auto empty = [&](at::IntArrayRef sizes) { return workspace_empty(sizes, x.options()); };
  Gradients result;
  result.dots = empty({rows});
  result.pre_activation = empty({rows, n.pre_width});
  if (wanted.rows) result.rows = empty({rows, n.hidden});
  const bool weighted_wanted = wanted.shared_down || wanted.routed_down;
  const Tensor weighted = weighted_wanted ? empty({rows, n.width}) : Tensor();
  const auto* pre_data = pre.const_data_ptr<float>();
  const auto* weight_data = weights.const_data_ptr<float>();
  auto* dots = result.dots.mutable_data_ptr<float>();
  auto* grad_pre = result.pre_activation.mutable_data_ptr<float>();
  auto* weighted_data = weighted_wanted ? weighted.mutable_data_ptr<float>() : nullptr;
  auto* grad_rows = wanted.rows ? result.rows.mutable_data_ptr<float>() : nullptr;
  const auto products = [&](const Block& b, float* grad_act) {
    float* of_pre = grad_pre + b.at * n.pre_width;
    return std::pair{input_grad_of(layer.rows(grad_out, b), layer.down(b), b.rows, n.width, n.hidden, grad_act),
                     input_grad_of({of_pre, nullptr, n.pre_width}, layer.up(b), b.rows, n.hidden, n.pre_width,
                                   wanted.rows ? grad_rows + b.at * n.hidden : nullptr)};
  };
  const auto room = room_for(groups.pieces, [&](const Block& b) { return products(b, nullptr); });
  const int64_t act_at = room.first, most = room.second, weighted_at = act_at + aligned(most * n.width);
  deal_out(static_cast<int64_t>(groups.pieces.size()), weighted_at + (weighted_wanted ? 0 : most * n.width),
           [&](int64_t i, float* scratch) {
             const Block& b = groups.pieces[i];
             auto [down, up] = products(b, scratch + act_at);
             const Block* after = groups.after(i);
             const auto then = products(after == nullptr ? b : *after, nullptr);
             down.after = &up;
             if (after != nullptr) set_next(&up, then.first, n.hidden);
             cpu::multiply(down, scratch);
             float* to = weighted_wanted ? weighted_data + b.at * n.width : scratch + weighted_at;
             cpu::activation_backward({DType::f32, kind, glu, n.width, down.out, pre_data + b.at * n.pre_width,
                                       weight_data + b.at, grad_pre + b.at * n.pre_width, to, dots + b.at},
                                      0, b.rows);
             if (wanted.rows) cpu::multiply(up, scratch);
           });
  zero_rows(result.dots, n.shared_rows() + groups.live);
  zero_rows(result.pre_activation, n.shared_rows() + groups.live);

  std::vector<cpu::Product> pieces;
  const double all = static_cast<double>(n.shared_rows() + groups.live);
  const auto weight_grad = [&](bool want, bool shared, const OptionalTensor& sum, const Tensor& proj, Tensor* grad,
                               const auto& grads_of, const auto& rows_of) {
    if (!want) return;
    if (!sum.has_value())
      *grad = workspace_empty(proj.sizes(), x.options());  // of the next step, when this one's is freed
    const Tensor& into = sum.has_value() ? *sum : *grad;
    auto* out = into.mutable_data_ptr<float>();
    for (const Block& b : groups.whole) {
      if (b.shared != shared || (b.rows == 0 && sum.has_value())) continue;
      const int64_t height = into.size(1), width = into.size(2);
      cut_for_threads({cpu::ProductKind::weight_grad, height, width, b.rows, rows_of(b), grads_of(b), nullptr, 0,
                       nullptr, out + b.expert * height * width, width, sum.has_value()},
                      b.rows / std::max(all, 1.0), &pieces);
    }
  };
  const auto of_out = [&](const Block& b) { return layer.rows(grad_out, b); };
  const auto of_x = [&](const Block& b) { return layer.rows(layer.x, b); };
  const auto of_weighted = [&](const Block& b) { return cpu::Rows{weighted_data + b.at * n.width, nullptr, n.width}; };
  const auto of_pre = [&](const Block& b) { return cpu::Rows{grad_pre + b.at * n.pre_width, nullptr, n.pre_width}; };
  weight_grad(wanted.shared_up, true, sums.shared_up, layer.shared_up, &result.shared_up, of_pre, of_x);
  weight_grad(wanted.routed_up, false, sums.routed_up, layer.routed_up, &result.routed_up, of_pre, of_x);
  weight_grad(wanted.shared_down, true, sums.shared_down, layer.shared_down, &result.shared_down, of_out, of_weighted);
  weight_grad(wanted.routed_down, false, sums.routed_down, layer.routed_down, &result.routed_down, of_out, of_weighted);
  multiply(pieces);
  return result;
}

}  // namespace ummrm::host
