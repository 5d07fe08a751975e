// SPDX-License-Identifier: Apache-2.0
// block_sparse_attention: checks lists, chooses the kernel, makes one tile per (row, head, query
// block), runs them longest first.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "attention/tile.h"
#include "isa.h"
#include "ops.h"
#include "work_queue.h"

namespace rapid3rt {
namespace {

enum Mode : uint8_t { kDense = 0, kList = 1, kSkip = 2 };

const int32_t* list_of(const AttentionParams& p, int64_t row, int64_t head, int64_t block) {
  return p.index + row * p.index_strides.row + head * p.index_strides.head +
         block * p.index_strides.token;
}

int32_t count_of(const AttentionParams& p, int64_t row, int64_t head, int64_t block) {
  return p.count[row * p.count_row + head * p.count_head + block];
}

void check_lists(const AttentionParams& p, int64_t num_q, int64_t num_kv) {
  for (int64_t row = 0; row < p.num_rows; ++row) {
    if (p.kv_len != nullptr) {
      R3_CHECK(p.kv_len[row] >= 0 && p.kv_len[row] <= p.len_kv, "kv_len must be in [0, ", p.len_kv,
               "], got ", p.kv_len[row], " for row ", row);
    }
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const int mode = p.mode[row * p.num_heads + head];
      R3_CHECK(mode <= kSkip, "mode must be 0, 1 or 2, got ", mode, " for row ", row, ", head ",
               head);
      R3_CHECK(mode != kSkip || p.allow_skip,
               "mode must be 0 or 1 in the functional form, got 2 (skip) for row ", row, ", head ",
               head, "; use block_sparse_attention_");
      if (mode != kList) continue;
      R3_CHECK(p.count != nullptr && (p.index != nullptr || p.list_len == 0),
               "count and index must be given where a mode is 1, got none for row ", row, ", head ",
               head);
      for (int64_t block = 0; block < num_q; ++block) {
        const int32_t count = count_of(p, row, head, block);
        R3_CHECK(count >= 0 && count <= p.list_len, "count must be in [0, ", p.list_len, "], got ",
                 count, " for row ", row, ", head ", head, ", query block ", block);
        const int32_t* const index = list_of(p, row, head, block);
        for (int32_t i = 0; i < count; ++i) {
          R3_CHECK(index[i] >= 0 && index[i] < num_kv && (i == 0 || index[i] > index[i - 1]),
                   "index must be ascending in [0, ", num_kv, "), got ", index[i], " for row ", row,
                   ", head ", head, ", query block ", block);
        }
      }
    }
  }
}

const TileKernel& choose_kernel(const AttentionParams& p) {
  [[maybe_unused]] const Isa isa = p.head_dim % 8 == 0 ? current_isa() : Isa::kScalar;
#ifdef RAPID3RT_AMX
  if (isa >= Isa::kAmx && p.dtype == DType::kBFloat16 && p.head_dim % 32 == 0) return kAmxTile;
#endif
#ifdef RAPID3RT_AVX512_BF16
  if (isa >= Isa::kAvx512Bf16 && p.dtype == DType::kBFloat16) return kAvx512Bf16Tile;
#endif
#ifdef RAPID3RT_AVX512
  if (isa >= Isa::kAvx512) return kAvx512Tile;
#endif
#ifdef RAPID3RT_AVX2
  if (isa >= Isa::kAvx2) return kAvx2Tile;
#endif
  return kScalarTile;
}

// Multiple of 64 bytes at or after an address, of which so much has to be added to what is asked
// for.
constexpr uintptr_t kAlignment = 64;
char* aligned(const std::unique_ptr<char[]>& memory) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + (kAlignment - begin % kAlignment) % kAlignment;
}

// Keys and values in the kernel's own order; only blocks that are visited hold anything.
struct Packed {
  std::unique_ptr<char[]> memory;
  char* blocks = nullptr;  // [R, H, Mk, block_bytes]
  int64_t block_bytes = 0;
};

// What all tiles of a call share.
Tile make_tile(const AttentionParams& p) {
  Tile tile{};
  tile.q.token = p.q_strides.token;
  tile.k.token = p.k_strides.token;
  tile.v.token = p.v_strides.token;
  tile.out_token = p.out_strides.token;
  tile.head_dim = p.head_dim;
  tile.block_q = p.block_q;
  tile.block_kv = p.block_kv;
  tile.scale = p.scale;
  tile.dtype = static_cast<int>(p.dtype);
  return tile;
}

// One thread's tile, with the memory that it works in.
class Worker {
 public:
  Worker(const AttentionParams& p, const TileKernel& kernel, const Packed& packed)
      : p_(p), kernel_(kernel), packed_(packed), tile_(make_tile(p)), sums_(2 * p.block_q) {
    scratch_.reset(new char[kernel.scratch_bytes(tile_) + kAlignment]);
    tile_.scratch = aligned(scratch_);
    tile_.row_max = sums_.data();
    tile_.row_sum = sums_.data() + p.block_q;
    if (kernel.enter != nullptr) kernel.enter();
  }
  ~Worker() {
    if (kernel_.leave != nullptr) kernel_.leave();
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void pack(int64_t item) {
    const int64_t head_id = item / num_kv(), block = item % num_kv();
    point_at(head_id / p_.num_heads, head_id % p_.num_heads, 0);
    kernel_.pack(tile_, block, packed_.blocks + item * packed_.block_bytes);
  }

  void run(int64_t i) {
    const int64_t num_q = ceil_div(p_.len_q, p_.block_q);
    const int64_t item = p_.order == nullptr ? i : p_.order[i];
    const int64_t head_id = item / num_q, block = item % num_q;
    if (p_.mode[head_id] == kSkip) return;
    point_at(head_id / p_.num_heads, head_id % p_.num_heads, block);
    kernel_.run(tile_);
    if (p_.lse == nullptr) return;
    float* const lse = p_.lse + head_id * p_.len_q + block * p_.block_q;
    for (int64_t j = 0; j < tile_.num_q; ++j) {
      lse[j] = tile_.row_max[j] + std::log(tile_.row_sum[j]);
    }
  }

 private:
  int64_t num_kv() const { return ceil_div(p_.len_kv, p_.block_kv); }

  void point_at(int64_t row, int64_t head, int64_t block) {
    const int64_t element = element_bytes(p_.dtype), first = block * p_.block_q;
    const auto at = [&](const void* base, const Strides& s, int64_t token) {
      return static_cast<const char*>(base) +
             (row * s.row + head * s.head + token * s.token) * element;
    };
    tile_.q.data = at(p_.q, p_.q_strides, first);
    tile_.k.data = at(p_.k, p_.k_strides, 0);
    tile_.v.data = at(p_.v, p_.v_strides, 0);
    tile_.out = const_cast<char*>(at(p_.out, p_.out_strides, first));
    tile_.num_q = std::min(p_.block_q, p_.len_q - first);
    tile_.num_kv = p_.kv_len == nullptr ? p_.len_kv : p_.kv_len[row];
    tile_.index = nullptr;
    tile_.num_listed = num_kv();
    if (packed_.blocks != nullptr) {
      const int64_t head_id = row * p_.num_heads + head;
      tile_.packed = packed_.blocks + head_id * num_kv() * packed_.block_bytes;
    }
    if (p_.mode[row * p_.num_heads + head] == kList) {
      tile_.index = list_of(p_, row, head, block);
      tile_.num_listed = count_of(p_, row, head, block);
    }
  }

  const AttentionParams& p_;
  const TileKernel& kernel_;
  const Packed& packed_;
  Tile tile_;
  std::vector<float> sums_;
  std::unique_ptr<char[]> scratch_;  // holds garbage at first
};

// Key blocks (row, head, block) that some tile visits.
std::vector<int64_t> visited_blocks(const AttentionParams& p, int64_t num_q, int64_t num_kv) {
  std::vector<int64_t> visited;
  std::vector<char> is_visited(num_kv);
  for (int64_t head_id = 0; head_id < p.num_rows * p.num_heads; ++head_id) {
    const int64_t row = head_id / p.num_heads, head = head_id % p.num_heads;
    const int mode = p.mode[head_id];
    std::fill(is_visited.begin(), is_visited.end(), mode == kDense);
    for (int64_t block = 0; mode == kList && block < num_q; ++block) {
      const int32_t* const index = list_of(p, row, head, block);
      const int32_t count = count_of(p, row, head, block);
      for (int32_t i = 0; i < count; ++i) is_visited[index[i]] = 1;
    }
    for (int64_t block = 0; block < num_kv; ++block) {
      if (is_visited[block]) visited.push_back(head_id * num_kv + block);
    }
  }
  return visited;
}

Packed pack_blocks(const AttentionParams& p, const TileKernel& kernel, int64_t num_q,
                   int64_t num_kv, int num_threads) {
  Packed packed;
  if (kernel.pack == nullptr) return packed;
  packed.block_bytes = kernel.packed_bytes(make_tile(p));
  const int64_t num_blocks = p.num_rows * p.num_heads * num_kv;
  // Pages come as they are written.
  packed.memory.reset(new char[num_blocks * packed.block_bytes + kAlignment]);
  packed.blocks = aligned(packed.memory);
  const std::vector<int64_t> visited = visited_blocks(p, num_q, num_kv);
  run_queue(static_cast<int64_t>(visited.size()), num_threads, [&] {
    return [&, worker = std::make_unique<Worker>(p, kernel, packed)](int64_t i) {
      worker->pack(visited[i]);
    };
  });
  return packed;
}

}  // namespace

void block_sparse_attention(const AttentionParams& p) {
  const int64_t num_q = ceil_div(p.len_q, p.block_q);
  const int64_t num_kv = ceil_div(p.len_kv, p.block_kv);
  const int64_t items = p.num_rows * p.num_heads * num_q;
  R3_CHECK(items <= std::numeric_limits<int32_t>::max(),
           "rows * heads * query blocks must fit int32, got ", items);
  check_lists(p, num_q, num_kv);
  if (p.order != nullptr) check_ids("order", p.order, items, items, true);
  const TileKernel& kernel = choose_kernel(p);
  const int64_t flops = 4 * p.num_rows * p.num_heads * p.len_q * p.len_kv * p.head_dim;
  const int num_threads = flops < kernel.serial_flops ? 1 : p.num_threads;
  const Packed packed = pack_blocks(p, kernel, num_q, num_kv, num_threads);
  run_queue(items, num_threads, [&] {
    return [&, worker = std::make_unique<Worker>(p, kernel, packed)](int64_t i) { worker->run(i); };
  });
}

}  // namespace rapid3rt
