// SPDX-License-Identifier: Apache-2.0
// build_block_lists in two launches: block means of q and k; then scores, the best key blocks per
// query block, and the work order by the last CTA to finish. No host reads, so that it stands in a
// graph. Sums run in the order of csrc/cpu/rowwise/spans.h: both modules choose alike, bit for bit.
#include "block_choice.h"
#include "elements.cuh"
#include "ops.h"
#include "reduce.cuh"
#include "start.cuh"

namespace rapid3rt::cuda {
namespace {

constexpr int kMeanThreads = kWarp;  // small CTAs: few blocks spread evenly over many SMs
constexpr int kMeanWords = 2;        // 8 bytes a thread: twice the threads of 16
template <bool kAligned>
constexpr int kMeanDepth = kAligned ? 16 : 8;  // loads in flight
constexpr int kChooseThreads = 256, kChooseWarps = kChooseThreads / kWarp;
constexpr int kMostPerLane = 8;          // key blocks that a lane keeps in registers
constexpr int kSharedBins = 512;         // key blocks whose bins fit into shared memory
constexpr int64_t kWorkspaceStep = 256;  // alignment of its parts

// What the launches share, and how long its parts are.
struct Workspace {
  float* q_means;     // [R * H, Mq, K]
  float* k_means;     // [R * H, K, padded Mk]: lanes of a warp read neighbours
  uint32_t* done;     // CTAs of the second launch that have finished
  uint32_t* keys;     // [R * H * Mq, Mk], where registers do not hold a row
  int32_t* bins;      // [Mk + 1, kChooseWarps], where shared memory does not hold them
  int64_t padded_kv;  // Mk, rounded up to whole warps
  int64_t num_q, num_kv;
  TextBlocks q_text, k_text;
};

// Lays the parts out one after another; returns the bytes they take.
int64_t lay_out(const ListsParams& p, void* memory, Workspace& w) {
  const int64_t heads = p.num_rows * p.num_heads;
  w.num_q = ceil_div(p.num_tokens, p.block_q);
  w.num_kv = ceil_div(p.num_tokens, p.block_kv);
  w.padded_kv = ceil_div(w.num_kv, kWarp) * kWarp;
  w.q_text = text_blocks(p.num_tokens, p.block_q, p.text_start, p.text_len);
  w.k_text = text_blocks(p.num_tokens, p.block_kv, p.text_start, p.text_len);
  int64_t bytes = 0;
  const auto part = [&](int64_t size) {
    void* const at = memory == nullptr ? nullptr : static_cast<char*>(memory) + bytes;
    bytes += ceil_div(size, kWorkspaceStep) * kWorkspaceStep;
    return at;
  };
  const bool has_keys = w.num_kv > kMostPerLane * kWarp, has_bins = w.num_kv > kSharedBins;
  w.q_means = static_cast<float*>(part(heads * w.num_q * p.head_dim * 4));
  w.k_means = static_cast<float*>(part(heads * p.head_dim * w.padded_kv * 4));
  w.done = static_cast<uint32_t*>(part(4));
  w.keys = static_cast<uint32_t*>(part(has_keys ? heads * w.num_q * w.num_kv * 4 : 0));
  w.bins = static_cast<int32_t*>(part(has_bins ? (w.num_kv + 1) * kChooseWarps * 4 : 0));
  return bytes;
}

__device__ __forceinline__ bool is_dense(const ListsParams& p, const Workspace& w, int64_t row) {
  return p.keep[row] >= w.num_kv - w.k_text.count();
}

// The mean of `tokens` tokens for one vector of columns, summed token after token.
template <class T, bool kAligned>
__device__ __forceinline__ void column_mean(const T* x, int64_t token_stride, int64_t tokens, int n,
                                            float (&mean)[kLanes<T, kMeanWords>]) {
#pragma unroll
  for (float& sum : mean) sum = 0.0f;
  constexpr int kDepth = kMeanDepth<kAligned>;
  for (int64_t first = 0; first < tokens; first += kDepth) {
    Pack<kMeanWords> packs[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int64_t token = first + i;
      packs[i] = load<kAligned, kMeanWords>(x + token * token_stride, token < tokens ? n : 0);
    }
    // Lanes beyond the tokens hold 0: a sum that begins with 0 is never -0, adding 0 keeps it.
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      float value[kLanes<T, kMeanWords>];
      widen<T>(packs[i], value);
#pragma unroll
      for (int lane = 0; lane < kLanes<T, kMeanWords>; ++lane) {
        mean[lane] = add(mean[lane], value[lane]);
      }
    }
  }
  const auto count = static_cast<float>(tokens);
#pragma unroll
  for (float& sum : mean) sum = div(sum, count);
}

// One thread a vector of columns of one block of one head; heads next to each other, as they lie in
// packed projections. Blocks that no score needs are not read.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kMeanThreads, 16)
    means_kernel(const ListsParams p, const Workspace w) {
  constexpr int kColumns = kLanes<T, kMeanWords>;
  if (blockIdx.x == 0 && threadIdx.x == 0) *w.done = 0;
  const int64_t vectors = ceil_div(p.head_dim, kColumns);
  const int64_t thread = int64_t{blockIdx.x} * kMeanThreads + threadIdx.x;
  const int64_t item = vectors > 0 ? thread / vectors : 0;
  const int64_t head = item % p.num_heads, blocks = w.num_q + w.num_kv;
  const int64_t row = item / p.num_heads / blocks;
  if (vectors == 0 || row >= p.num_rows || is_dense(p, w, row)) return;
  const int64_t place = item / p.num_heads % blocks;
  const bool is_key = place >= w.num_q;
  const int64_t block = is_key ? place - w.num_q : place;
  if (is_key ? w.k_text.holds(block) : w.q_text.holds(block)) return;

  const int64_t d = thread % vectors * kColumns;
  const int n = lanes_before(d, p.head_dim, kColumns);
  const int64_t size = is_key ? p.block_kv : p.block_q;
  const Strides &qs = p.q_strides, &ks = p.k_strides;
  const int64_t begin = is_key ? row * ks.row + head * ks.head + block * size * ks.token
                               : row * qs.row + head * qs.head + block * size * qs.token;
  const T* const x = static_cast<const T*>(is_key ? p.k : p.q) + begin + d;
  float mean[kColumns];
  column_mean<T, kAligned>(x, is_key ? ks.token : qs.token, block_tokens(p.num_tokens, size, block),
                           n, mean);
  const int64_t at = row * p.num_heads + head;
  float* const out = is_key ? w.k_means + (at * p.head_dim + d) * w.padded_kv + block
                            : w.q_means + (at * w.num_q + block) * p.head_dim + d;
  const int64_t step = is_key ? w.padded_kv : 1;
#pragma unroll
  for (int lane = 0; lane < kColumns; ++lane) {
    if (lane < n) out[lane * step] = mean[lane];
  }
}

// Rank keys of one query block: key block `lane + 32 i` in lane `lane`; 0: no candidate.
template <int kPerLane>
struct Keys {
  uint32_t held[kPerLane];

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) body(i, held[i]);
  }
};

// The same in memory, any number; a lane reads only what it wrote.
template <>
struct Keys<0> {
  const uint32_t* row;
  int64_t num_kv;
  int lane;

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
    for (int64_t i = 0; i * kWarp < num_kv; ++i) {
      const int64_t block = i * kWarp + lane;
      body(i, block < num_kv ? row[block] : 0);
    }
  }
};

// Scores of kCount key blocks from `first` on, 32 apart. Each sum runs over d in its order.
template <int kCount>
__device__ __forceinline__ void score(const ListsParams& p, const Workspace& w, int64_t item,
                                      int64_t query_block, int64_t first,
                                      uint32_t (&keys)[kCount]) {
  const float* const q = w.q_means + (item * w.num_q + query_block) * p.head_dim;
  const float* const k = w.k_means + item * p.head_dim * w.padded_kv;
  float sums[kCount] = {};
  bool is_candidate[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t block = first + i * kWarp;
    is_candidate[i] = block < w.num_kv && !w.k_text.holds(block);
  }
#pragma unroll(16 / kCount)
  for (int64_t d = 0; d < p.head_dim; ++d) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float key = is_candidate[i] ? k[d * w.padded_kv + first + i * kWarp] : 0.0f;
      sums[i] = add(sums[i], mul(q[d], key));
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    keys[i] = is_candidate[i] ? rank_key(mul(sums[i], p.scale)) : 0;
  }
}

template <int kPerLane>
__device__ __forceinline__ Keys<kPerLane> make_keys(const ListsParams& p, const Workspace& w,
                                                    int64_t item, int64_t query_block, int lane) {
  if constexpr (kPerLane > 0) {
    Keys<kPerLane> keys;
    score(p, w, item, query_block, lane, keys.held);
    return keys;
  } else {
    uint32_t* const row = w.keys + (item * w.num_q + query_block) * w.num_kv;
    for (int64_t first = lane; first - lane < w.num_kv; first += kMostPerLane * kWarp) {
      uint32_t some[kMostPerLane];
      score(p, w, item, query_block, first, some);
#pragma unroll
      for (int i = 0; i < kMostPerLane; ++i) {
        if (first + i * kWarp < w.num_kv) row[first + i * kWarp] = some[i];
      }
    }
    return {row, w.num_kv, lane};
  }
}

// Writes the list of a query block that chooses; the whole warp calls it.
template <int kPerLane>
__device__ __forceinline__ void choose(const ListsParams& p, const Workspace& w, int64_t item,
                                       int64_t query_block, int64_t keep, int lane) {
  const Keys<kPerLane> keys = make_keys<kPerLane>(p, w, item, query_block, lane);
  const unsigned below = (1u << lane) - 1;
  const auto at_least = [&](uint32_t limit) {
    int64_t count = 0;
    keys.for_each(
        [&](int64_t, uint32_t key) { count += __popc(__ballot_sync(kAllLanes, key >= limit)); });
    return count;
  };
  // Without anything to keep, no key reaches the threshold.
  const uint32_t threshold = keep > 0 ? keep_threshold(keep, at_least) : 0xffffffffu;
  int64_t ties = keep > 0 ? keep - at_least(threshold + 1) : 0;  // of them, the lower blocks
  const int64_t count = w.k_text.count() + keep;
  int32_t* const index = p.index + (item * w.num_q + query_block) * w.num_kv;
  int64_t before = 0;
  keys.for_each([&](int64_t i, uint32_t key) {
    const int64_t block = i * kWarp + lane;
    const unsigned tied = __ballot_sync(kAllLanes, key == threshold);
    const bool is_chosen = key > threshold || (key == threshold && __popc(tied & below) < ties);
    const bool is_listed = is_chosen || w.k_text.holds(block);
    const unsigned listed = __ballot_sync(kAllLanes, is_listed);
    if (block < w.num_kv) {
      index[list_position(block, is_listed, before + __popc(listed & below), count)] =
          static_cast<int32_t>(block);
    }
    ties -= __popc(tied);
    before += __popc(listed);
  });
  if (lane == 0) p.count[item * w.num_q + query_block] = static_cast<int32_t>(count);
}

// A query block that sees all.
__device__ __forceinline__ void list_all(const ListsParams& p, const Workspace& w, int64_t at,
                                         int lane) {
  for (int64_t block = lane; block < w.num_kv; block += kWarp) {
    p.index[at * w.num_kv + block] = static_cast<int32_t>(block);
  }
  if (lane == 0) p.count[at] = static_cast<int32_t>(w.num_kv);
}

// Calls body(id, count, alike, leader) for the ids of one warp, 32 at a time and ascending. alike:
// lanes of the same count; leader: the lowest of them.
template <class Body>
__device__ __forceinline__ void for_ids(const ListsParams& p, int64_t begin, int64_t end, int lane,
                                        Body body) {
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t id = first + lane;
    const int32_t count = id < end ? __ldcg(p.count + id) : -1;
    const unsigned alike = __match_any_sync(kAllLanes, count);
    body(id, count, alike, (alike & ((1u << lane) - 1)) == 0);
    __syncwarp();
  }
}

// Turns the sizes of bins into where they begin; one warp.
__device__ __forceinline__ void scan(int32_t* bins, int64_t num_bins, int lane) {
  int32_t carry = 0;
  for (int64_t first = 0; first < num_bins; first += kWarp) {
    const int64_t bin = first + lane;
    const int32_t size = bin < num_bins ? bins[bin] : 0;
    int32_t sum = size;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (bin < num_bins) bins[bin] = carry + sum - size;
    carry += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

// Work ids by falling count, ties by id: a stable counting sort by one CTA.
__device__ __forceinline__ void write_order(const ListsParams& p, const Workspace& w,
                                            int32_t* bins) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t num_ids = p.num_rows * p.num_heads * w.num_q;
  const int64_t num_bins = (w.num_kv + 1) * kChooseWarps;
  const int64_t share = ceil_div(num_ids, kChooseThreads) * kWarp;
  const int64_t begin = warp * share, end = begin + share < num_ids ? begin + share : num_ids;
  const auto bin = [&](int32_t count) { return order_bin(count, w.num_kv, warp, kChooseWarps); };
  for (int64_t i = threadIdx.x; i < num_bins; i += kChooseThreads) bins[i] = 0;
  __syncthreads();
  for_ids(p, begin, end, lane, [&](int64_t, int32_t count, unsigned alike, bool is_leader) {
    if (count >= 0 && is_leader) bins[bin(count)] += __popc(alike);
  });
  __syncthreads();
  if (warp == 0) scan(bins, num_bins, lane);
  __syncthreads();
  for_ids(p, begin, end, lane, [&](int64_t id, int32_t count, unsigned alike, bool is_leader) {
    const int32_t first = count >= 0 ? bins[bin(count)] : 0;
    __syncwarp();
    if (count < 0) return;
    p.order[first + __popc(alike & ((1u << lane) - 1))] = static_cast<int32_t>(id);
    if (is_leader) bins[bin(count)] = first + __popc(alike);
  });
}

// One warp a query block.
template <int kPerLane>
__global__ void __launch_bounds__(kChooseThreads, 2)
    choose_kernel(const ListsParams p, const Workspace w) {
  __shared__ int32_t shared_bins[(kSharedBins + 1) * kChooseWarps];
  __shared__ bool is_last;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t at = int64_t{blockIdx.x} * kChooseWarps + warp;
  const int64_t item = at / w.num_q, query_block = at % w.num_q;
  if (item < p.num_rows * p.num_heads) {
    const int64_t row = item / p.num_heads;
    const bool dense = is_dense(p, w, row);
    if (query_block == 0 && lane == 0) p.mode[item] = dense ? 0 : 1;
    if (dense || w.q_text.holds(query_block)) {
      list_all(p, w, at, lane);
    } else {
      choose<kPerLane>(p, w, item, query_block, p.keep[row] > 0 ? p.keep[row] : 0, lane);
    }
  }

  // The last CTA sees the counts of all.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(w.done, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  write_order(p, w, w.num_kv > kSharedBins ? w.bins : shared_bins);
}

}  // namespace

int64_t lists_workspace_bytes(const ListsParams& p) {
  Workspace w;
  return lay_out(p, nullptr, w);
}

void build_block_lists(const ListsParams& p, void* workspace, const Launch& launch) {
  Workspace w;
  lay_out(p, workspace, w);
  const int64_t num_ids = p.num_rows * p.num_heads * w.num_q;
  if (num_ids == 0) return;
  constexpr int64_t kMostIds = 0x7fffffff;
  R3_CHECK(num_ids <= kMostIds, "lists must be at most ", kMostIds, ", got ", num_ids);
  const DeviceGuard guard(launch.device);
  constexpr int64_t kStep = 4 * kMeanWords;
  const int64_t size = element_bytes(p.dtype);
  const Strides &qs = p.q_strides, &ks = p.k_strides;
  const bool is_aligned =
      all_multiples(kStep, p.q, p.k, p.head_dim * size, qs.row * size, qs.head * size,
                    qs.token * size, ks.row * size, ks.head * size, ks.token * size);
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t vectors = ceil_div(p.head_dim, kLanes<T, kMeanWords>);
    const int64_t threads = p.num_rows * p.num_heads * (w.num_q + w.num_kv) * vectors;
    const int64_t ctas = ceil_div(threads, kMeanThreads);
    start("build_block_lists", is_aligned ? means_kernel<T, true> : means_kernel<T, false>,
          grid_size(1, ctas > 0 ? ctas : 1), dim3(kMeanThreads), launch, p, w);
  });
  const auto kernel = w.num_kv <= 2 * kWarp              ? choose_kernel<2>
                      : w.num_kv <= kMostPerLane * kWarp ? choose_kernel<kMostPerLane>
                                                         : choose_kernel<0>;
  start("build_block_lists", kernel, grid_size(1, ceil_div(num_ids, kChooseWarps)),
        dim3(kChooseThreads), launch, p, w);
}

}  // namespace rapid3rt::cuda
