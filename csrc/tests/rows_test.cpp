// SPDX-License-Identifier: Apache-2.0
// The memory-bound ops and the lists on buffers of their exact size, at odd addresses, on every
// instruction set: an address sanitizer sees what is touched beside them. All sets must give the
// same bytes.
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "isa.h"
#include "ops.h"

namespace rapid3rt {
namespace {

constexpr int64_t kRows = 2, kSlots = 3, kOrders = 3, kTokens = 3;

// Memory that ends with its last element and begins one element beyond an aligned address.
class Buffer {
 public:
  Buffer(int64_t count, DType dtype, unsigned seed)
      : skip_(element_bytes(dtype)), bytes_(skip_ * (count + 1)) {
    memory_.reset(new char[bytes_]);
    for (int64_t i = 0; i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const float value = static_cast<float>(static_cast<int>(seed >> 24) - 128) / 64.0f;
      float16 half;
      bfloat16 brain;
      from_float(value, half);
      from_float(value, brain);
      char* const at = memory_.get() + skip_ * (i + 1);
      if (dtype == DType::kFloat32) std::memcpy(at, &value, 4);
      if (dtype == DType::kBFloat16) std::memcpy(at, &brain, 2);
      if (dtype == DType::kFloat16) std::memcpy(at, &half, 2);
    }
  }
  void* data() { return memory_.get() + skip_; }
  std::vector<char> bytes() const { return {memory_.get() + skip_, memory_.get() + bytes_}; }

 private:
  int64_t skip_, bytes_;
  std::unique_ptr<char[]> memory_;
};

// What all ops leave behind.
std::vector<std::vector<char>> run_all(int64_t width, DType dtype, int num_threads) {
  const int64_t size = kRows * kTokens * width;
  Buffer embedded(size, dtype, 1), y(size, dtype, 2),
      slots(kSlots * kOrders * kTokens * width, dtype, 3);
  Buffer scale(kRows * width, dtype, 4), shift(kRows * width, dtype, 5), weight(width, dtype, 6);
  Buffer looked_up(size, dtype, 0), normed(size, dtype, 0), modulated(size, dtype, 0);
  Buffer gated(size, dtype, 0), gathered(size, dtype, 0),
      scattered(kSlots * kTokens * width, dtype, 0);
  const int32_t slot[kRows] = {2, 0};
  const float coef[kRows * kOrders] = {1.0f, 0.0f, -0.5f, 0.25f, 2.0f, 1.0f},
                           gap[kRows] = {0.0f, 0.5f};
  float stats[kRows * 3];
  cache_lookup({looked_up.data(), embedded.data(), slots.data(), slot, coef, nullptr, nullptr, 0.0f,
                kRows, kSlots, kOrders, kTokens, width, dtype, num_threads});
  cache_lookup({normed.data(), embedded.data(), slots.data(), slot, coef, scale.data(),
                shift.data(), 1e-6f, kRows, kSlots, kOrders, kTokens, width, dtype, num_threads});
  norm_modulate({modulated.data(), embedded.data(), scale.data(), shift.data(), weight.data(),
                 weight.data(), 1e-6f, true, kRows, kTokens, width, dtype, num_threads});
  gate_residual({gated.data(), embedded.data(), scale.data(), y.data(), kRows, kTokens, width,
                 dtype, num_threads});
  const int64_t row_bytes = kTokens * width * element_bytes(dtype);
  gather_rows(
      {gathered.data(), slots.data(), slot, kRows, kSlots * kOrders, row_bytes, num_threads});
  scatter_rows({scattered.data(), gathered.data(), slot, kRows, kSlots, row_bytes, num_threads});
  cache_store({stats, slots.data(), y.data(), embedded.data(), slot, gap, kRows, kSlots, kOrders,
               kTokens, width, dtype, num_threads});
  std::vector<char> seen(sizeof(stats));
  std::memcpy(seen.data(), stats, sizeof(stats));
  return {looked_up.bytes(), normed.bytes(),    modulated.bytes(), gated.bytes(),
          gathered.bytes(),  scattered.bytes(), slots.bytes(),     seen};
}

std::vector<int32_t> run_lists(int64_t head_dim, DType dtype, int num_threads) {
  constexpr int64_t kHeads = 2, kLength = 203, kBlock = 32, kBlocks = 7;
  const int64_t size = kRows * kHeads * kLength * head_dim, items = kRows * kHeads * kBlocks;
  Buffer q(size, dtype, 1), k(size, dtype, 2);
  const int32_t keep[kRows] = {2, 99};
  std::vector<uint8_t> mode(kRows * kHeads);
  std::vector<int32_t> count(items), index(items * kBlocks), order(items);
  const Strides strides = {kHeads * kLength * head_dim, kLength * head_dim, head_dim};
  build_block_lists({mode.data(), count.data(), index.data(), order.data(), q.data(),
                     k.data(),    keep,         strides,      strides,      kRows,
                     kHeads,      kLength,      head_dim,     180,          23,
                     kBlock,      kBlock,       0.1f,         dtype,        num_threads});
  count.insert(count.end(), index.begin(), index.end());
  count.insert(count.end(), order.begin(), order.end());
  return count;
}

}  // namespace
}  // namespace rapid3rt

int main() {
  using namespace rapid3rt;
  const Isa best = best_isa();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t width : {1, 15, 16, 17, 63, 64, 65, 203}) {
      force_isa(Isa::kScalar);
      const auto rows = run_all(width, dtype, 1);
      const auto lists = run_lists(width, dtype, 1);
      for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
        force_isa(static_cast<Isa>(isa));
        CHECK(run_all(width, dtype, 2) == rows, "%s, width %d", kIsaNames[isa],
              static_cast<int>(width));
        CHECK(run_lists(width, dtype, 2) == lists, "%s, head dim %d", kIsaNames[isa],
              static_cast<int>(width));
      }
    }
  }
  std::puts("rows: ok");
  return 0;
}
