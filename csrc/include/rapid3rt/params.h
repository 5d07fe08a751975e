// SPDX-License-Identifier: Apache-2.0
// One plain struct per op: pointers, sizes, strides in elements. Shapes stand in trailing comments.
// R rows, S slots, O orders, I tokens, D width, H heads, N tokens of queries or keys, K head dim, M
// query blocks.
#pragma once

#include <cstdint>

#include "rapid3rt/dtype.h"

namespace rapid3rt {

struct LookupParams {
  void* out;             // [R, I, D]
  const void* embedded;  // [R, I, D]
  const void* slots;     // [S, O, I, D]
  const int32_t* slot;   // [R]
  const float* coef;     // [R, O]
  const void* scale;     // [R, D], null: no norm and modulation
  const void* shift;     // [R, D]
  float eps;
  int64_t num_rows, num_slots, num_orders, num_tokens, width;
  DType dtype;
  int num_threads;
};

struct StoreParams {
  float* stats;          // [R, 3]: drift, mean, std
  void* slots;           // [S, O, I, D]
  const void* out;       // [R, I, D]
  const void* embedded;  // [R, I, D]
  const int32_t* slot;   // [R]
  const float* gap;      // [R]
  int64_t num_rows, num_slots, num_orders, num_tokens, width;
  DType dtype;
  int num_threads;
};

// Rows are opaque bytes here: no arithmetic is done on them.
struct RowsParams {
  void* out;            // gather: [R, row_bytes]; scatter: [total, row_bytes]
  const void* x;        // gather: [total, row_bytes]; scatter: [R, row_bytes]
  const int32_t* rows;  // [R]
  int64_t num_rows, total, row_bytes;
  int num_threads;
};

struct ModulateParams {
  void* out;           // [R, I, D]
  const void* x;       // [R, I, D]
  const void* scale;   // [R, D]
  const void* shift;   // [R, D]
  const void* weight;  // [D] or null
  const void* bias;    // [D] or null
  float eps;
  bool rms;
  int64_t num_rows, num_tokens, width;
  DType dtype;
  int num_threads;
};

struct GateParams {
  void* out;             // [R, I, D]
  const void* residual;  // [R, I, D]
  const void* gate;      // [R, D]
  const void* y;         // [R, I, D]
  int64_t num_rows, num_tokens, width;
  DType dtype;
  int num_threads;
};

// Strides over rows, heads and tokens; the last dimension is contiguous.
struct Strides {
  int64_t row, head, token;
};

struct ListsParams {
  uint8_t* mode;        // [R, H]
  int32_t* count;       // [R, H, Mq]
  int32_t* index;       // [R, H, Mq, Mk]
  int32_t* order;       // [R * H * Mq]
  const void* q;        // [R, H, N, K]
  const void* k;        // [R, H, N, K]
  const int32_t* keep;  // [R]
  Strides q_strides, k_strides;
  int64_t num_rows, num_heads, num_tokens, head_dim, text_start, text_len, block_q, block_kv;
  float scale;
  DType dtype;
  int num_threads;
};

struct AttentionParams {
  void* out;              // [R, H, Nq, K]
  float* lse;             // [R, H, Nq] contiguous or null
  const void* q;          // [R, H, Nq, K]
  const void* k;          // [R, H, Nk, K]
  const void* v;          // [R, H, Nk, K]
  const uint8_t* mode;    // [R, H]: 0 dense, 1 list, 2 skip
  const int32_t* count;   // [R, H, Mq] or null
  const int32_t* index;   // [R, H, Mq, S] or null
  const int32_t* order;   // [R * H * Mq] or null
  const int32_t* kv_len;  // [R] or null
  Strides out_strides, q_strides, k_strides, v_strides;
  Strides index_strides;          // token = query block
  int64_t count_row, count_head;  // strides of count
  int64_t num_rows, num_heads, len_q, len_kv, head_dim, block_q, block_kv, list_len;
  float scale;
  bool allow_skip;
  DType dtype;
  int num_threads;
};

}  // namespace rapid3rt
