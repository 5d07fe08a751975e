// SPDX-License-Identifier: Apache-2.0
// Block-sparse attention in the structure of sm_80, written over a machine M: ptx.cuh on a GPU, and
// in tests an emulation that runs these very lines on the CPU (csrc/tests/cuda_machine.h).
//
// A CTA of four warps keeps a tile of kBlock queries, kBlock / 4 rows a warp, and walks its keys in
// steps of 64. K and V of a step are a slot each, in a ring of three. While one operand is read,
// the second next is asked for, into the slot of the one before:
//
//   read      K0        V0        K1        V1
//   asked     K1 -> 2   V1 -> 0   K2 -> 1   V2 -> 2
//
// Three slots and not four: at head dim 128 two CTAs then fit into the 164 KiB of an A100.
//
// Each operand is one cp.async group, empty where no step follows, and two groups are in flight
// whenever an operand is waited for: waiting until one is left makes a thread's own copies land,
// and the barrier behind it everyone's. The same barrier tells that all warps are done with the
// operand before, whose slot is filled next. Queries travel in the group of K0.
#pragma once

#include "fragments.h"
#include "work.h"

#ifdef __CUDACC__
#define R3_DEVICE __device__ __forceinline__
#define R3_UNROLL _Pragma("unroll")
#else
#define R3_DEVICE inline
#define R3_UNROLL
#endif

namespace rapid3rt::cuda {

// M, all static: thread, cta, num_ctas, shared_base, sync, sync_warp, quad_max, quad_sum,
// atomic_increment; cp_async, commit, wait_all_but_one; ldmatrix, ldmatrix_trans, mma<T>, exp2,
// log2, pack<T>; load_word, load_chunk, store_word of shared memory, max, fma, mul, sub,
// store_global.
template <class M, class T, int kDim, int kBlock>
class Sm80Attention {
 public:
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;

 private:
  using Rows = SharedRows<kDim>;
  using Chunk = typename M::Chunk;
  static constexpr int kSlots = 3;
  static constexpr int kTiles = kBlock / (16 * kWarps);  // m16 tiles of queries of a warp
  static constexpr int kSlotBytes = kStepKeys * Rows::kBytes;
  static constexpr int kQueryBytes = kBlock * Rows::kBytes;
  // Queries stay in registers where they leave room for the output; else each step reads them anew.
  static constexpr bool kHoldsQueries = kTiles * kDim <= 128;

 public:
  // Queries (in the end the output), the ring, two words for the place to go on.
  static constexpr int kSharedBytes = kQueryBytes + kSlots * kSlotBytes + 2 * 4;

  R3_DEVICE explicit Sm80Attention(const AttentionCall& call)
      : call_(call), thread_(M::thread()), queries_(M::shared_base()) {}

  // All tiles of this CTA.
  R3_DEVICE void run() {
    const bool is_queue = call_.counter != nullptr;
    uint32_t position = M::cta();
    for (int turn = 0; position < call_.num_items; turn ^= 1) {
      uint32_t next = 0;
      if (thread_ == 0) {
        const uint32_t ticket = is_queue ? M::atomic_increment(call_.counter) : 0;
        next = next_position(position, M::num_ctas(), is_queue, ticket);
      }
      const Work work = work_at(call_, position);
      if (work.mode != Mode::kSkip) attend(work);
      // Two words in turn: one is written again only behind the barrier that follows its reading.
      const uint32_t mail = slot(kSlots) + static_cast<uint32_t>(turn * 4);
      if (thread_ == 0) M::store_word(mail, next);
      M::sync();  // also: no warp reads a slot, or its output, any more
      position = M::load_word(mail);
    }
  }

 private:
  // What a thread stands for: lane of 32, and its warp's first row of the tile. Worked out anew
  // wherever it is used: the compiler would keep each address that follows from it through the
  // walk.
  struct Place {
    int lane, warp_row;
  };

  R3_DEVICE Place place() const {
    const uint32_t thread = M::opaque(thread_);
    return {static_cast<int>(thread % kWarpSize),
            static_cast<int>(thread / kWarpSize) * 16 * kTiles};
  }

  // Tokens of one operand and head.
  struct Tokens {
    const char* data;
    int64_t bytes;  // from token to token
  };

  R3_DEVICE Tokens tokens(const void* data, const Strides& s, const Work& w) const {
    return {static_cast<const char*>(data) + 2 * offset_of(s, w.row, w.head, 0), 2 * s.token};
  }

  R3_DEVICE uint32_t slot(int i) const {
    return queries_ + static_cast<uint32_t>(kQueryBytes + i * kSlotBytes);
  }

  R3_DEVICE void attend(const Work& w) {
    const AttentionParams& p = call_.params;
    const Tokens keys = tokens(p.k, p.k_strides, w), values = tokens(p.v, p.v_strides, w);
    clear();
    KeyWalk<kBlock> walk(p, w);
    Step now = walk.next();
    if (now.num_keys > 0) {
      copy<kBlock>(queries_, tokens(p.q, p.q_strides, w), {w.first_query, w.num_queries});
      copy<kStepKeys>(slot(0), keys, now);
      M::commit();
      copy<kStepKeys>(slot(1), values, now);
      M::commit();
      if constexpr (kHoldsQueries) {
        M::wait_all_but_one();
        M::sync();
        load_queries();
      }
    }
    int at = 0;  // K of this step is in slot `at`, V in the next one
    while (now.num_keys > 0) {
      const Step next = walk.next();
      const int at_values = after(at), at_free = after(at_values);
      M::wait_all_but_one();
      M::sync();
      copy<kStepKeys>(slot(at_free), keys, next);
      M::commit();
      uint32_t weights[kTiles][kStepKeys / 16][4];
      {
        float logits[kTiles][kStepKeys / 8][4];
        multiply_keys(slot(at), logits);
        weigh(logits, now.num_keys);
        pack(logits, weights);
      }
      M::wait_all_but_one();
      M::sync();
      copy<kStepKeys>(slot(at), values, next);
      M::commit();
      add_values(slot(at_values), weights);
      at = at_free;
      now = next;
    }
    store(w);
  }

  static R3_DEVICE int after(int slot) { return slot == kSlots - 1 ? 0 : slot + 1; }

  R3_DEVICE void clear() {
    R3_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      R3_UNROLL
      for (int n = 0; n < kDim / 8; ++n) {
        R3_UNROLL
        for (int i = 0; i < 4; ++i) out_[m][n][i] = 0.0f;
      }
      R3_UNROLL
      for (int r = 0; r < 2; ++r) {
        row_max_[m][r] = -kInfinity;
        row_sum_[m][r] = 0.0f;
      }
    }
  }

  // kCount rows to shared memory by the whole CTA, zeros behind the last token: what is read as 0
  // adds 0, where NaN would not. Nothing at all where the step has no keys.
  template <int kCount>
  R3_DEVICE void copy(uint32_t to, const Tokens& from, const Step& step) const {
    if (step.num_keys == 0) return;
    constexpr int kAtOnce = kThreads / Rows::kChunks;  // rows, a multiple of 8: r % 8 stays
    static_assert(kAtOnce % 8 == 0 && kCount % kAtOnce == 0, "a copy goes in equal passes");
    const uint32_t thread = M::opaque(thread_);
    const int row = static_cast<int>(thread / Rows::kChunks);
    const int chunk = static_cast<int>(thread % Rows::kChunks);
    const char* source = from.data + (int64_t{step.first} + row) * from.bytes + chunk * kChunkBytes;
    const uint32_t target = to + Rows::at(row, chunk);
    R3_UNROLL
    for (int i = 0; i < kCount; i += kAtOnce) {
      M::cp_async(target + static_cast<uint32_t>(i * Rows::kBytes), source,
                  row + i < step.num_keys ? kChunkBytes : 0);
      source += kAtOnce * from.bytes;
    }
  }

  R3_DEVICE uint32_t query_address(const Place& at) const {
    return queries_ + static_cast<uint32_t>(at.warp_row * Rows::kBytes) + Rows::row_major(at.lane);
  }

  R3_DEVICE void load_queries() {
    const uint32_t address = query_address(place());
    R3_UNROLL
    for (int j = 0; j < kHeld; ++j) {
      R3_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        M::ldmatrix(held_[m][j], Rows::moved(address, m, j));
      }
    }
  }

  // logits = Q K^T of one step.
  R3_DEVICE void multiply_keys(uint32_t keys, float (&logits)[kTiles][kStepKeys / 8][4]) {
    R3_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      R3_UNROLL
      for (int n = 0; n < kStepKeys / 8; ++n) {
        R3_UNROLL
        for (int i = 0; i < 4; ++i) logits[m][n][i] = 0.0f;
      }
    }
    const Place at = place();
    const uint32_t query_address = this->query_address(at);
    const uint32_t key_address = keys + Rows::key_major(at.lane);
    R3_UNROLL
    for (int j = 0; j < kDim / 16; ++j) {
      uint32_t a[kTiles][4];
      R3_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        if constexpr (kHoldsQueries) {
          R3_UNROLL
          for (int i = 0; i < 4; ++i) a[m][i] = held_[m][j][i];
        } else {
          M::ldmatrix(a[m], Rows::moved(query_address, m, j));
        }
      }
      R3_UNROLL
      for (int n = 0; n < kStepKeys / 8; n += 2) {
        uint32_t b[4];
        M::ldmatrix(b, Rows::moved(key_address, n / 2, j));
        R3_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          M::template mma<T>(logits[m][n], a[m], b[0], b[1]);
          M::template mma<T>(logits[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Logits become weights relative to the running maximum; what was summed up before decays.
  R3_DEVICE void weigh(float (&logits)[kTiles][kStepKeys / 8][4], int num_keys) {
    if (call_.is_negative) {
      each(logits, [](float x, int) { return -x; });
    }
    if (num_keys < kStepKeys) {
      each(logits, [=](float x, int key) { return key < num_keys ? x : -kInfinity; });
    }
    const float scale = call_.scale;
    R3_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      R3_UNROLL
      for (int r = 0; r < 2; ++r) {  // rows g and g + 8
        float top = -kInfinity;
        R3_UNROLL
        for (int n = 0; n < kStepKeys / 8; ++n) {
          top = M::max(top, M::max(logits[m][n][2 * r], logits[m][n][2 * r + 1]));
        }
        const float now = M::max(row_max_[m][r], M::mul(M::quad_max(top), scale));
        // Without any finite logit the base is 0: -inf minus -inf would be NaN.
        const float base = now == -kInfinity ? 0.0f : now;
        const float decay = M::exp2(row_max_[m][r] - base);
        row_max_[m][r] = now;
        float sum = 0.0f;
        R3_UNROLL
        for (int n = 0; n < kStepKeys / 8; ++n) {
          R3_UNROLL
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            // Not fused: what rounding took from the base of a huge logit would be its exponent.
            const float weight = M::exp2(M::sub(M::mul(logits[m][n][i], scale), base));
            logits[m][n][i] = weight;
            sum += weight;
          }
        }
        row_sum_[m][r] = M::fma(row_sum_[m][r], decay, sum);  // of this lane's keys; see store
        R3_UNROLL
        for (int n = 0; n < kDim / 8; ++n) {
          out_[m][n][2 * r] *= decay;
          out_[m][n][2 * r + 1] *= decay;
        }
      }
    }
  }

  // Every logit x of this lane becomes f(x, key within the step).
  template <class F>
  R3_DEVICE void each(float (&logits)[kTiles][kStepKeys / 8][4], F f) const {
    const int column = fragment_column(place().lane);
    R3_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      R3_UNROLL
      for (int n = 0; n < kStepKeys / 8; ++n) {
        R3_UNROLL
        for (int i = 0; i < 4; ++i) logits[m][n][i] = f(logits[m][n][i], 8 * n + column + (i & 1));
      }
    }
  }

  // Weights as A fragments of 16 keys each: row g, row g + 8, and both 8 keys further.
  static R3_DEVICE void pack(const float (&weights)[kTiles][kStepKeys / 8][4],
                             uint32_t (&packed)[kTiles][kStepKeys / 16][4]) {
    R3_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      R3_UNROLL
      for (int j = 0; j < kStepKeys / 16; ++j) {
        R3_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float (&four)[4] = weights[m][2 * j + i / 2];
          packed[m][j][i] = M::template pack<T>(four[i % 2 * 2], four[i % 2 * 2 + 1]);
        }
      }
    }
  }

  // out += P V of one step.
  R3_DEVICE void add_values(uint32_t values, const uint32_t (&weights)[kTiles][kStepKeys / 16][4]) {
    const uint32_t address = values + Rows::row_major(place().lane);
    R3_UNROLL
    for (int j = 0; j < kStepKeys / 16; ++j) {
      R3_UNROLL
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t b[4];
        M::ldmatrix_trans(b, Rows::moved(address, j, n / 2));
        R3_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          M::template mma<T>(out_[m][n], weights[m][j], b[0], b[1]);
          M::template mma<T>(out_[m][n + 1], weights[m][j], b[2], b[3]);
        }
      }
    }
  }

  // out / row_sum, through the shared memory of this warp's own queries, which nobody else reads,
  // so that rows leave as 16-byte pieces; 0 for a query without keys.
  R3_DEVICE void store(const Work& w) {
    const Place place = this->place();
    const int row = place.warp_row + fragment_row(place.lane), column = fragment_column(place.lane);
    M::sync_warp();
    R3_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      R3_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float sum = M::quad_sum(row_sum_[m][r]);
        const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
        const int at = row + 16 * m + 8 * r;
        if (column == 0) store_lse(w, at, row_max_[m][r], sum);
        R3_UNROLL
        for (int n = 0; n < kDim / 8; ++n) {
          const uint32_t pair =
              M::template pack<T>(out_[m][n][2 * r] * factor, out_[m][n][2 * r + 1] * factor);
          M::store_word(queries_ + Rows::at(at, n) + static_cast<uint32_t>(2 * column), pair);
        }
      }
    }
    M::sync_warp();
    const AttentionParams& p = call_.params;
    const Tokens to = tokens(p.out, p.out_strides, w);
    constexpr int kAtOnce = kWarpSize / Rows::kChunks;
    R3_UNROLL
    for (int i = 0; i < 16 * kTiles; i += kAtOnce) {
      const int at = place.warp_row + i + place.lane / Rows::kChunks;
      const int chunk = place.lane % Rows::kChunks;
      if (at >= w.num_queries) continue;
      const Chunk piece = M::load_chunk(queries_ + Rows::at(at, chunk));
      M::store_global(const_cast<char*>(to.data) + (int64_t{w.first_query} + at) * to.bytes +
                          chunk * kChunkBytes,
                      piece);
    }
  }

  R3_DEVICE void store_lse(const Work& w, int at, float row_max, float sum) const {
    constexpr float kLn2 = 0.693147181f;
    const AttentionParams& p = call_.params;
    if (p.lse == nullptr || at >= w.num_queries) return;
    const int64_t head_id = w.row * p.num_heads + w.head;
    p.lse[head_id * p.len_q + w.first_query + at] = (row_max + M::log2(sum)) * kLn2;
  }

  static constexpr float kInfinity = __builtin_inff();
  static constexpr int kHeld = kHoldsQueries ? kDim / 16 : 1;

  const AttentionCall& call_;
  const uint32_t thread_;
  const uint32_t queries_;  // address in shared memory
  float out_[kTiles][kDim / 8][4];
  float row_max_[kTiles][2];  // in units of log2
  float row_sum_[kTiles][2];
  uint32_t held_[kTiles][kHeld][4];
};

}  // namespace rapid3rt::cuda
