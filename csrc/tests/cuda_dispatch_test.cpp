// SPDX-License-Identifier: Apache-2.0
// The host's half of block_sparse_attention on CUDA: which kernel runs, and what is refused.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "attention/launchers.h"
#include "check.h"
#include "ops.h"

namespace rapid3rt::cuda {
namespace {

const char* called = nullptr;
AttentionCall last{};
int device_within = -1;

void record(const char* name, const AttentionCall& call, const Launch&) {
  called = name;
  last = call;
  device_within = current_device;
}

}  // namespace

void attend_sm80_d64_bf16(const AttentionCall& c, const Launch& l) { record("d64 bf16", c, l); }
void attend_sm80_d64_fp16(const AttentionCall& c, const Launch& l) { record("d64 fp16", c, l); }
void attend_sm80_d128_bf16(const AttentionCall& c, const Launch& l) { record("d128 bf16", c, l); }
void attend_sm80_d128_fp16(const AttentionCall& c, const Launch& l) { record("d128 fp16", c, l); }

namespace {

alignas(16) char memory[32];

AttentionParams fitting() {
  AttentionParams p{};
  p.out = memory;
  p.q = p.k = p.v = memory;
  p.num_rows = 2;
  p.num_heads = 3;
  p.len_q = 100;
  p.len_kv = 70;
  p.head_dim = 64;
  p.block_q = p.block_kv = 64;
  p.out_strides = p.q_strides = p.k_strides = p.v_strides = {6400, 64, 192};
  p.scale = 0.125f;
  p.dtype = DType::kBFloat16;
  return p;
}

// What a call says, empty where a kernel was reached.
std::string told(const AttentionParams& p, int device = 0, Schedule schedule = Schedule::kQueue) {
  called = nullptr;
  uint32_t counter = 7;
  try {
    block_sparse_attention(p, schedule, &counter, {device, nullptr});
  } catch (const std::exception& error) {
    CHECK(called == nullptr, "a kernel ran all the same");
    return error.what();
  }
  CHECK(called == nullptr || schedule != Schedule::kQueue || counter == 0, "the counter is not 0");
  return "";
}

template <class Change>
void refused(const char* why, Change change) {
  AttentionParams p = fitting();
  change(p);
  const std::string error = told(p);
  CHECK(error.find(why) != std::string::npos, "'%s' does not say '%s'", error.c_str(), why);
}

void the_kernel_is_that_of_dtype_and_head_dim() {
  const char* const names[2][2] = {{"d64 bf16", "d64 fp16"}, {"d128 bf16", "d128 fp16"}};
  for (const int wide : {0, 1}) {
    for (const int half : {0, 1}) {
      for (const int64_t block : {64, 128}) {
        AttentionParams p = fitting();
        p.head_dim = wide != 0 ? 128 : 64;
        p.dtype = half != 0 ? DType::kFloat16 : DType::kBFloat16;
        p.block_q = p.block_kv = block;
        const std::string error = told(p, 1);
        CHECK(error.empty() && std::strcmp(called, names[wide][half]) == 0, "%s", error.c_str());
        CHECK(last.num_q == (block == 64 ? 2u : 1u) && last.num_items == 6 * last.num_q, "items");
        CHECK(last.counter != nullptr && last.params.block_q == block, "call");
        CHECK(device_within == 1 && current_device == 0, "device");
      }
    }
  }
  CHECK(told(fitting(), 0, Schedule::kStatic).empty() && last.counter == nullptr, "static");
  CHECK(attention_workspace_bytes(fitting()) >= 4, "workspace");
}

void what_does_not_fit_is_refused_by_name() {
  refused("bfloat16 or float16, got float32; convert", [](auto& p) { p.dtype = DType::kFloat32; });
  refused("head dim 64 or 128, got 40; use backend", [](auto& p) { p.head_dim = 40; });
  refused("must both be 64 or 128 on CUDA, got 32 and 32",
          [](auto& p) { p.block_q = p.block_kv = 32; });
  refused("got 128 and 64", [](auto& p) { p.block_q = 128; });
  refused("q must begin at a multiple of 16 bytes", [](auto& p) { p.q = memory + 2; });
  refused("out must begin", [](auto& p) { p.out = memory + 8; });
  refused("k must have strides that are multiples of 16 bytes, got (6400, 68, 192)",
          [](auto& p) { p.k_strides.head = 68; });
  refused("v must have strides", [](auto& p) { p.v_strides.token = 65; });
  refused("q must have strides", [](auto& p) { p.q_strides.row = 1; });
  refused("must be given together, got count alone", [](auto& p) {
    static const int32_t count[12] = {};
    p.count = count;
    p.list_len = 2;
  });
  refused("must fit int32, got 6442450944 queries", [](auto& p) { p.len_q = 3ll << 31; });
  refused("rows * heads * query blocks must fit int32", [](auto& p) { p.num_rows = 1ll << 30; });
  CHECK(told(fitting(), 5).find("invalid device ordinal") != std::string::npos, "device");
}

void what_is_never_used_may_be_anything() {
  AttentionParams p = fitting();
  p.num_rows = p.num_heads = p.len_q = p.len_kv = 1;
  p.q_strides = p.k_strides = {1, 3, 5};
  CHECK(told(p).empty() && called != nullptr, "strides over single elements");
  p = fitting();
  p.len_kv = 0;
  p.k = p.v = nullptr;
  CHECK(told(p).empty() && called != nullptr, "no keys");
  p.len_q = 0;
  p.q = nullptr;
  CHECK(told(p).empty() && called == nullptr, "no queries, no kernel");
}

}  // namespace
}  // namespace rapid3rt::cuda

int main() {
  using namespace rapid3rt::cuda;
  the_kernel_is_that_of_dtype_and_head_dim();
  what_does_not_fit_is_refused_by_name();
  what_is_never_used_may_be_anything();
  std::printf("cuda dispatch: ok\n");
}
