// The launch of expert_groups.cuh. The first block writes the tables; all blocks zero, and mostly find nothing to zero.
#include "expert_groups.cuh"

namespace ummrm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 512;

__device__ int64_t first_row(const ExpertGroups& g, int64_t group) {
  return group < g.num_shared ? 0 : g.expert_offsets[group - g.num_shared];
}

__device__ int64_t rows_of(const ExpertGroups& g, int64_t group) {
  if (group < g.num_shared) return g.tokens;
  const int64_t expert = group - g.num_shared;
  return g.expert_offsets[expert + 1] - g.expert_offsets[expert];
}

__device__ const char* address(const ExpertGroups& g, const GroupOperand& operand, int64_t group, int64_t band) {
  if (group < g.num_shared) return operand.shared + group * operand.shared_step + band * operand.band_step;
  const int64_t steps = operand.by_row ? first_row(g, group) : group - g.num_shared;
  return operand.routed + steps * operand.routed_step + band * operand.band_step;
}

// One block. Groups by descending rows, then by number: long products of a weight gradient start first.
__device__ void write_tables(const ExpertGroups& g, const GroupTables& to) {
  __shared__ int32_t rows[kMaxGroups], order[kMaxGroups];
  const int64_t groups = g.groups(), bands = g.bands();
  for (int64_t i = threadIdx.x; i < groups; i += kThreads) rows[i] = static_cast<int32_t>(rows_of(g, i));
  __syncthreads();
  for (int64_t i = threadIdx.x; i < groups; i += kThreads) {
    int64_t rank = 0;
    for (int64_t j = 0; j < groups; ++j) rank += rows[j] > rows[i] || (rows[j] == rows[i] && j < i);
    order[rank] = static_cast<int32_t>(i);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < groups * bands; i += kThreads) {
    const int64_t group = order[i / bands], band = i % bands, left = g.columns - band * g.band;
    const auto columns = static_cast<int32_t>(left < g.band ? left : g.band), other = static_cast<int32_t>(g.other);
    const int32_t count = rows[group];
    GroupShape shape = {count, columns, other};
    if (g.rows_reduced) shape = {other, columns, count};
    if (count == 0) shape = {0, 0, 0};  // with m and n above 0 and nothing to sum, CUTLASS 4.2 goes wrong
    to.shapes[i] = shape;
    to.a[i] = address(g, g.a, group, band);
    to.b[i] = address(g, g.b, group, band);
    to.d[i] = const_cast<char*>(address(g, g.d, group, band));
    to.bias[i] = g.biased ? address(g, g.bias, group, band) : nullptr;
    to.a_stride[i] = g.a.row_stride;
    to.b_stride[i] = g.b.row_stride;
    to.d_stride[i] = g.d.row_stride;
    to.bias_stride[i] = g.bias.row_stride;
    to.first_row[i] = (group < g.num_shared ? group * g.tokens : g.num_shared * g.tokens) + first_row(g, group);
    to.first_column[i] = band * (g.paired ? g.band / 2 : g.band);
  }
}

// All blocks together.
__device__ void zero(const char* from, int64_t bytes) {
  auto* words = reinterpret_cast<uint4*>(const_cast<char*>(from));
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < bytes / 16; i += step)
    words[i] = uint4{0, 0, 0, 0};
}

__global__ void __launch_bounds__(kThreads, kResident) groups_kernel(ExpertGroups g, GroupTables to) {
  if (blockIdx.x == 0) write_tables(g, to);
  if (!g.rows_reduced) {
    const int64_t live = g.expert_offsets[g.num_experts];
    zero(g.d.routed + live * g.bytes, (g.slots - live) * g.bytes);
    for (const GroupRows& rows : g.more)
      if (rows.routed != nullptr) zero(rows.routed + live * rows.bytes, (g.slots - live) * rows.bytes);
    return;
  }
  if (g.summed) return;
  for (int64_t group = 0; group < g.groups(); ++group)
    if (rows_of(g, group) == 0) zero(address(g, g.d, group, 0), g.bytes);
}

const char* bytes_at(const void* address) { return static_cast<const char*>(address); }

}  // namespace

ExpertGroups groups_of(const ExpertGemm& args, int64_t band, const void* zeros) {
  const int64_t size = element_bytes(args.dtype), in_bytes = args.in * size, out_bytes = args.out_width * size;
  const int64_t shared_out = args.tokens * out_bytes, proj = args.in * out_bytes;
  const auto bias_or_zeros = [&](const void* bias) { return bytes_at(bias == nullptr ? zeros : bias); };
  ExpertGroups groups = {};
  groups.tokens = args.tokens;
  groups.num_shared = args.num_shared;
  groups.num_experts = args.num_experts;
  groups.slots = args.slots;
  groups.expert_offsets = args.expert_offsets;
  groups.rows_reduced = false;
  groups.other = args.in;
  groups.columns = args.out_width;
  groups.band = band;
  groups.a = {bytes_at(args.shared_rows),
              bytes_at(args.routed_rows),
              args.one_row_a_token ? 0 : args.tokens * in_bytes,
              in_bytes,
              0,
              true,
              args.in};
  groups.b = {bytes_at(args.shared_proj),
              bytes_at(args.routed_proj),
              proj,
              proj,
              band * (args.transpose ? size : in_bytes),
              false,
              args.transpose ? args.out_width : args.in};
  groups.d = {
      bytes_at(args.out), bytes_at(args.out) + args.num_shared * shared_out, shared_out, out_bytes, band * size, true,
      args.out_width};
  groups.biased = args.shared_bias != nullptr || args.routed_bias != nullptr;
  if (groups.biased) {
    groups.bias = {bias_or_zeros(args.shared_bias),
                   bias_or_zeros(args.routed_bias),
                   args.shared_bias == nullptr ? 0 : out_bytes,
                   args.routed_bias == nullptr ? 0 : out_bytes,
                   band * size,
                   false,
                   0};
  }
  groups.bytes = out_bytes;
  return groups;
}

ExpertGroups groups_of(const ExpertGemmWgrad& args, int64_t band) {
  const int64_t size = element_bytes(args.dtype), out_size = element_bytes(args.grad_dtype);
  const int64_t row_bytes = args.width * size, grad_bytes = args.grad_width * size;
  ExpertGroups groups = {};
  groups.tokens = args.tokens;
  groups.num_shared = args.shared_grad == nullptr ? 0 : args.num_shared;
  groups.num_experts = args.routed_grad == nullptr ? 0 : args.num_experts;
  groups.slots = args.slots;
  groups.expert_offsets = args.expert_offsets;
  groups.rows_reduced = true;
  groups.other = args.grad_width;
  groups.columns = args.width;
  groups.band = band;
  groups.a = {bytes_at(args.grad_shared_rows),
              bytes_at(args.grad_routed_rows),
              args.one_grad_row_a_token ? 0 : args.tokens * grad_bytes,
              grad_bytes,
              0,
              true,
              args.grad_width};
  groups.b = {bytes_at(args.shared_rows),
              bytes_at(args.routed_rows),
              args.one_row_a_token ? 0 : args.tokens * row_bytes,
              row_bytes,
              band * size,
              true,
              args.width};
  groups.bytes = args.grad_width * args.width * out_size;
  groups.summed = args.add;
  groups.d = {bytes_at(args.shared_grad),
              bytes_at(args.routed_grad),
              groups.bytes,
              groups.bytes,
              band * out_size,
              false,
              args.width};
  groups.biased = args.add;
  if (args.add) groups.bias = groups.d;
  return groups;
}

// Bands of a pair are half as many columns of either half.
ExpertGroups groups_of(const ExpertGlu& args, int64_t band, const void* zeros) {
  ExpertGroups groups = groups_of(args.product, band, zeros);
  groups.paired = true;
  groups.b.band_step /= 2;
  groups.d.band_step /= 2;
  groups.bias.band_step /= 2;
  const int64_t bytes = groups.bytes / 2;
  groups.more[0] = {bytes_at(args.activation) + args.product.num_shared * args.product.tokens * bytes, bytes};
  return groups;
}

ExpertGroups groups_of(const ExpertGluBackward& args, int64_t band) {
  ExpertGemm product = args.product;
  product.out = args.grad_pre_activation;
  ExpertGroups groups = groups_of(product, band, nullptr);
  const int64_t bytes = groups.bytes, size = element_bytes(product.dtype);
  groups.bytes = 2 * bytes;
  groups.d = {bytes_at(product.out),
              bytes_at(product.out) + product.num_shared * product.tokens * groups.bytes,
              product.tokens * groups.bytes,
              groups.bytes,
              band * size,
              true,
              2 * product.out_width};
  groups.more[0] = {bytes_at(args.weighted_activation) + product.num_shared * product.tokens * bytes, bytes};
  return groups;
}

GroupTables take_tables(Workspace& workspace, int64_t problems) {
  GroupTables tables;
  tables.shapes = workspace.take<GroupShape>(problems);
  tables.a = workspace.take<const void*>(problems);
  tables.b = workspace.take<const void*>(problems);
  tables.bias = workspace.take<const void*>(problems);
  tables.d = workspace.take<void*>(problems);
  tables.a_stride = workspace.take<int64_t>(problems);
  tables.b_stride = workspace.take<int64_t>(problems);
  tables.bias_stride = workspace.take<int64_t>(problems);
  tables.d_stride = workspace.take<int64_t>(problems);
  tables.first_row = workspace.take<int64_t>(problems);
  tables.first_column = workspace.take<int64_t>(problems);
  return tables;
}

int expert_groups(const ExpertGroups& groups, const GroupTables& tables, Stream stream) {
  if (groups.groups() > kMaxGroups) return cudaErrorInvalidValue;
  // As if all were to be zeroed, 8 words a thread: what has to be is known on the device alone.
  const int64_t most = groups.rows_reduced ? groups.groups() * groups.bytes : groups.slots * groups.bytes;
  const int64_t blocks = ceil_div(most, 16 * 8 * kThreads);
  return launch(groups_kernel,
                blocks < 1             ? 1
                : blocks < kMostBlocks ? blocks
                                       : kMostBlocks,
                kThreads, stream, groups, tables);
}

}  // namespace ummrm::cuda
