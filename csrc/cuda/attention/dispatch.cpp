// SPDX-License-Identifier: Apache-2.0
// block_sparse_attention: checks what the host can see, chooses the kernel. Lists stay on the
// device unread; what kernels make of wrong ones stands in work.h.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>

#include "../ops.h"
#include "launchers.h"

namespace rapid3rt::cuda {
namespace {

constexpr int64_t kAlignment = 16;  // bytes, of every copy

AttentionLauncher choose_kernel(const AttentionParams& p) {
  R3_CHECK(p.dtype != DType::kFloat32,
           "block_sparse_attention on CUDA must have q, k and v in bfloat16 or float16, got "
           "float32; convert them, or use backend 'flex' or 'reference'");
  R3_CHECK(p.head_dim == 64 || p.head_dim == 128,
           "block_sparse_attention on CUDA must have head dim 64 or 128, got ", p.head_dim,
           "; use backend 'flex' or 'reference'");
  R3_CHECK(p.block_q == p.block_kv && (p.block_q == 64 || p.block_q == 128),
           "block_q and block_kv must both be 64 or 128 on CUDA, got ", p.block_q, " and ",
           p.block_kv, "; use backend 'flex' or 'reference', or other blocks");
  const bool is_bf16 = p.dtype == DType::kBFloat16;
  if (p.head_dim == 64) return is_bf16 ? attend_sm80_d64_bf16 : attend_sm80_d64_fp16;
  return is_bf16 ? attend_sm80_d128_bf16 : attend_sm80_d128_fp16;
}

void check_alignment(const char* name, const void* data, const Strides& strides,
                     const AttentionParams& p, int64_t num_tokens) {
  const int64_t elements = kAlignment / element_bytes(p.dtype);
  R3_CHECK(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, name,
           " must begin at a multiple of 16 bytes, got address ", data);
  // A stride over a single element is never used.
  const bool fits = (p.num_rows == 1 || strides.row % elements == 0) &&
                    (p.num_heads == 1 || strides.head % elements == 0) &&
                    (num_tokens == 1 || strides.token % elements == 0);
  R3_CHECK(fits, name, " must have strides that are multiples of 16 bytes, got (", strides.row,
           ", ", strides.head, ", ", strides.token, ") elements");
}

void check_sizes(const AttentionParams& p, int64_t items) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  R3_CHECK(items <= kMost, "rows * heads * query blocks must fit int32, got ", items);
  R3_CHECK(p.len_q <= kMost - p.block_q && p.len_kv <= kMost - p.block_kv,
           "tokens must fit int32, got ", p.len_q, " queries and ", p.len_kv, " keys");
  // An index of no entries has no address.
  R3_CHECK(p.list_len == 0 || (p.count == nullptr) == (p.index == nullptr),
           "count and index must be given together, got ", p.count == nullptr ? "index" : "count",
           " alone");
}

}  // namespace

int64_t attention_workspace_bytes(const AttentionParams&) { return sizeof(uint32_t); }

void block_sparse_attention(const AttentionParams& p, Schedule schedule, void* workspace,
                            const Launch& launch) {
  const AttentionLauncher attend = choose_kernel(p);
  const int64_t items = p.num_rows * p.num_heads * ceil_div(p.len_q, p.block_q);
  check_sizes(p, items);
  check_alignment("q", p.q, p.q_strides, p, p.len_q);
  check_alignment("k", p.k, p.k_strides, p, p.len_kv);
  check_alignment("v", p.v, p.v_strides, p, p.len_kv);
  check_alignment("out", p.out, p.out_strides, p, p.len_q);
  if (items == 0) return;
  const DeviceGuard guard(launch.device);
  uint32_t* counter = nullptr;
  if (schedule == Schedule::kQueue) {
    counter = static_cast<uint32_t*>(workspace);
    check(cudaMemsetAsync(counter, 0, sizeof(*counter), launch.stream), "block_sparse_attention");
  }
  attend(make_call(p, counter), launch);
}

}  // namespace rapid3rt::cuda
