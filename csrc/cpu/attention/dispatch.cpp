// SPDX-License-Identifier: Apache-2.0
// block_sparse_attention: checks lists, chooses the kernel, makes one tile per (row, head, query
// block). Threads take tiles, or whole heads, longest first.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
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

// The instruction set that computes attention of this kind.
Isa choose_isa(DType dtype, int64_t head_dim) {
  const Isa isa = current_isa();
  if (head_dim % 8 != 0) return Isa::kScalar;
  if (isa < Isa::kAvx512Bf16) return isa;
  if (dtype != DType::kBFloat16) return Isa::kAvx512;
  if (isa == Isa::kAmx && head_dim % 32 == 0) return Isa::kAmx;
  // Where they are slow, floats are 1.3 to 1.5 times as fast; dots that were forced run.
  const bool dots = has_fast_dots() || (isa == Isa::kAvx512Bf16 && is_forced());
  return dots ? Isa::kAvx512Bf16 : Isa::kAvx512;
}

const TileKernel& kernel_of(Isa isa) {
  switch (isa) {
#ifdef RAPID3RT_AMX
    case Isa::kAmx:
      return kAmxTile;
#endif
#ifdef RAPID3RT_AVX512_BF16
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Tile;
#endif
#ifdef RAPID3RT_AVX512
    case Isa::kAvx512:
      return kAvx512Tile;
#endif
#ifdef RAPID3RT_AVX2
    case Isa::kAvx2:
      return kAvx2Tile;
#endif
    default:
      return kScalarTile;
  }
}

// Multiple of 64 bytes at or after an address, of which so much has to be added to what is asked
// for.
constexpr uintptr_t kAlignment = 64;
char* aligned(const std::unique_ptr<char[]>& memory) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + (kAlignment - begin % kAlignment) % kAlignment;
}

// Keys and values in the kernel's own order; only blocks that are visited hold anything.
class Packed {
 public:
  Packed(int64_t num_heads, int64_t head_bytes)
      : head_bytes_(head_bytes), memory_(new char[num_heads * head_bytes + kAlignment]) {}
  char* head(int64_t i) const { return aligned(memory_) + i * head_bytes_; }

 private:
  int64_t head_bytes_;
  std::unique_ptr<char[]> memory_;  // pages come as they are written
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
  tile.lse = p.lse != nullptr;
  return tile;
}

// Key blocks that some tile of a head visits.
template <class Visit>
void visit_blocks(const AttentionParams& p, int64_t head_id, Visit visit) {
  const int64_t num_q = ceil_div(p.len_q, p.block_q), num_kv = ceil_div(p.len_kv, p.block_kv);
  const int64_t row = head_id / p.num_heads, head = head_id % p.num_heads;
  std::vector<char> is_visited(num_kv, p.mode[head_id] == kDense);
  for (int64_t block = 0; p.mode[head_id] == kList && block < num_q; ++block) {
    const int32_t* const index = list_of(p, row, head, block);
    const int32_t count = count_of(p, row, head, block);
    for (int32_t i = 0; i < count; ++i) is_visited[index[i]] = 1;
  }
  for (int64_t block = 0; block < num_kv; ++block) {
    if (is_visited[block]) visit(block);
  }
}

// One thread's tile, with the memory that it works in.
class Worker {
 public:
  Worker(const AttentionParams& p, const TileKernel& kernel)
      : p_(p), kernel_(kernel), tile_(make_tile(p)), sums_(2 * p.block_q) {
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

  void pack(int64_t head_id, int64_t block, char* head) {
    point_at(head_id / p_.num_heads, head_id % p_.num_heads, 0);
    kernel_.pack(tile_, block, head + block * kernel_.packed_bytes(tile_));
  }

  // head: where its keys and values are packed, or null.
  void run(int64_t item, const char* head) {
    const int64_t num_q = ceil_div(p_.len_q, p_.block_q);
    const int64_t head_id = item / num_q, block = item % num_q;
    if (p_.mode[head_id] == kSkip) return;
    point_at(head_id / p_.num_heads, head_id % p_.num_heads, block);
    tile_.packed = head;
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
    if (p_.mode[row * p_.num_heads + head] == kList) {
      tile_.index = list_of(p_, row, head, block);
      tile_.num_listed = count_of(p_, row, head, block);
    }
  }

  const AttentionParams& p_;
  const TileKernel& kernel_;
  Tile tile_;
  std::vector<float> sums_;
  std::unique_ptr<char[]> scratch_;  // holds garbage at first
};

// Heads of the most work first.
std::vector<int64_t> sorted_heads(const AttentionParams& p) {
  const int64_t num_heads = p.num_rows * p.num_heads;
  const int64_t num_q = ceil_div(p.len_q, p.block_q), num_kv = ceil_div(p.len_kv, p.block_kv);
  std::vector<int64_t> work(num_heads), heads(num_heads);
  for (int64_t i = 0; i < num_heads; ++i) {
    heads[i] = i;
    if (p.mode[i] == kDense) work[i] = num_q * num_kv;
    for (int64_t block = 0; p.mode[i] == kList && block < num_q; ++block) {
      work[i] += count_of(p, i / p.num_heads, i % p.num_heads, block);
    }
  }
  std::stable_sort(heads.begin(), heads.end(),
                   [&](int64_t a, int64_t b) { return work[a] > work[b]; });
  return heads;
}

// Whether threads that take whole heads are done at about the same time: several heads each, and at
// most a tenth of the threads idle in the last round.
bool heads_divide(int64_t num_heads, int num_threads) {
  const int64_t rounds = ceil_div(num_heads, num_threads);
  return num_threads == 1 || (rounds >= 2 && 10 * num_heads >= 9 * rounds * num_threads);
}

// Every thread takes whole heads: what it packs stays in its core's cache, and memory for one head
// per thread is enough.
void run_heads(const AttentionParams& p, const TileKernel& kernel, int64_t head_bytes,
               int num_threads) {
  const int64_t num_q = ceil_div(p.len_q, p.block_q);
  const std::vector<int64_t> heads = sorted_heads(p);
  run_queue(static_cast<int64_t>(heads.size()), num_threads, [&] {
    return [&, worker = std::make_unique<Worker>(p, kernel),
            packed = std::make_unique<Packed>(1, head_bytes)](int64_t i) {
      char* const head = packed->head(0);
      visit_blocks(p, heads[i], [&](int64_t block) { worker->pack(heads[i], block, head); });
      for (int64_t block = 0; block < num_q; ++block) worker->run(heads[i] * num_q + block, head);
    };
  });
}

// Threads share the tiles of all heads.
void run_tiles(const AttentionParams& p, const TileKernel& kernel, int64_t head_bytes,
               int num_threads) {
  const int64_t num_heads = p.num_rows * p.num_heads, num_q = ceil_div(p.len_q, p.block_q);
  std::unique_ptr<Packed> packed;
  if (kernel.pack != nullptr) {
    packed = std::make_unique<Packed>(num_heads, head_bytes);
    std::vector<std::pair<int64_t, int64_t>> visited;
    for (int64_t head_id = 0; head_id < num_heads; ++head_id) {
      visit_blocks(p, head_id, [&](int64_t block) { visited.emplace_back(head_id, block); });
    }
    run_queue(static_cast<int64_t>(visited.size()), num_threads, [&] {
      return [&, worker = std::make_unique<Worker>(p, kernel)](int64_t i) {
        worker->pack(visited[i].first, visited[i].second, packed->head(visited[i].first));
      };
    });
  }
  run_queue(num_heads * num_q, num_threads, [&] {
    return [&, worker = std::make_unique<Worker>(p, kernel)](int64_t i) {
      const int64_t item = p.order == nullptr ? i : p.order[i];
      worker->run(item, packed == nullptr ? nullptr : packed->head(item / num_q));
    };
  });
}

}  // namespace

const char* attention_isa(DType dtype, int64_t head_dim) {
  return kIsaNames[static_cast<int>(choose_isa(dtype, head_dim))];
}

void block_sparse_attention(const AttentionParams& p) {
  const int64_t num_q = ceil_div(p.len_q, p.block_q);
  const int64_t num_kv = ceil_div(p.len_kv, p.block_kv);
  const int64_t items = p.num_rows * p.num_heads * num_q;
  R3_CHECK(items <= std::numeric_limits<int32_t>::max(),
           "rows * heads * query blocks must fit int32, got ", items);
  check_lists(p, num_q, num_kv);
  if (p.order != nullptr) check_ids("order", p.order, items, items, true);
  const TileKernel& kernel = kernel_of(choose_isa(p.dtype, p.head_dim));
  const int64_t flops = 4 * p.num_rows * p.num_heads * p.len_q * p.len_kv * p.head_dim;
  const int num_threads = flops < kernel.serial_flops ? 1 : p.num_threads;
  const int64_t num_heads = p.num_rows * p.num_heads;
  const int64_t head_bytes =
      kernel.pack == nullptr ? 0 : num_kv * kernel.packed_bytes(make_tile(p));
  const bool by_head = kernel.pack != nullptr && heads_divide(num_heads, num_threads);
  (by_head ? run_heads : run_tiles)(p, kernel, head_bytes, num_threads);
}

}  // namespace rapid3rt
