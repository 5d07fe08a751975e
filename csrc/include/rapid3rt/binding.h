// SPDX-License-Identifier: Apache-2.0
// What Python passes, as parameter structs: the same arguments in the same order for every module,
// addresses first. rapid3rt/ops/native.py is the caller and has checked shapes and dtypes.
#pragma once

#include <array>
#include <cstdint>

#include "rapid3rt/error.h"
#include "rapid3rt/params.h"

namespace rapid3rt::binding {

using Two = std::array<int64_t, 2>;
using Three = std::array<int64_t, 3>;
using Four = std::array<int64_t, 4>;
using Five = std::array<int64_t, 5>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Strides strides(const Three& s) { return {s[0], s[1], s[2]}; }

// A [R, H, N, K] operand: vectors of keys and queries must be aligned, whatever the caller checked.
inline void check_operand(const char* name, uintptr_t address, const Three& strides, Three sizes,
                          DType dtype) {
  R3_CHECK(address % 16 == 0, name, " must start at a multiple of 16 bytes, got address ", address);
  const int64_t step = 16 / element_bytes(dtype);
  for (int i = 0; i < 3; ++i) {
    R3_CHECK(sizes[i] <= 1 || (strides[i] >= 0 && strides[i] % step == 0), name,
             " must have strides that are multiples of 16 bytes and not negative, got ", strides[i],
             " elements");
  }
}

inline LookupParams lookup(uintptr_t out, uintptr_t embedded, uintptr_t slots, uintptr_t slot,
                           uintptr_t coef, uintptr_t scale, uintptr_t shift, float eps,
                           int64_t num_rows, int64_t num_slots, int64_t num_orders,
                           int64_t num_tokens, int64_t width, int dtype) {
  LookupParams p{};
  p.out = pointer<void>(out);
  p.embedded = pointer<void>(embedded);
  p.slots = pointer<void>(slots);
  p.slot = pointer<int32_t>(slot);
  p.coef = pointer<float>(coef);
  p.scale = pointer<void>(scale);
  p.shift = pointer<void>(shift);
  p.eps = eps;
  p.num_rows = num_rows;
  p.num_slots = num_slots;
  p.num_orders = num_orders;
  p.num_tokens = num_tokens;
  p.width = width;
  p.dtype = static_cast<DType>(dtype);
  return p;
}

inline StoreParams store(uintptr_t stats, uintptr_t slots, uintptr_t out, uintptr_t embedded,
                         uintptr_t slot, uintptr_t gap, int64_t num_rows, int64_t num_slots,
                         int64_t num_orders, int64_t num_tokens, int64_t width, int dtype) {
  StoreParams p{};
  p.stats = pointer<float>(stats);
  p.slots = pointer<void>(slots);
  p.out = pointer<void>(out);
  p.embedded = pointer<void>(embedded);
  p.slot = pointer<int32_t>(slot);
  p.gap = pointer<float>(gap);
  p.num_rows = num_rows;
  p.num_slots = num_slots;
  p.num_orders = num_orders;
  p.num_tokens = num_tokens;
  p.width = width;
  p.dtype = static_cast<DType>(dtype);
  return p;
}

inline RowsParams rows(uintptr_t out, uintptr_t x, uintptr_t rows, int64_t num_rows, int64_t total,
                       int64_t row_bytes) {
  RowsParams p{};
  p.out = pointer<void>(out);
  p.x = pointer<void>(x);
  p.rows = pointer<int32_t>(rows);
  p.num_rows = num_rows;
  p.total = total;
  p.row_bytes = row_bytes;
  return p;
}

inline ModulateParams modulate(uintptr_t out, uintptr_t x, uintptr_t scale, uintptr_t shift,
                               uintptr_t weight, uintptr_t bias, float eps, bool rms,
                               int64_t num_rows, int64_t num_tokens, int64_t width, int dtype) {
  ModulateParams p{};
  p.out = pointer<void>(out);
  p.x = pointer<void>(x);
  p.scale = pointer<void>(scale);
  p.shift = pointer<void>(shift);
  p.weight = pointer<void>(weight);
  p.bias = pointer<void>(bias);
  p.eps = eps;
  p.rms = rms;
  p.num_rows = num_rows;
  p.num_tokens = num_tokens;
  p.width = width;
  p.dtype = static_cast<DType>(dtype);
  return p;
}

inline GateParams gate(uintptr_t out, uintptr_t residual, uintptr_t gate, uintptr_t y,
                       int64_t num_rows, int64_t num_tokens, int64_t width, int dtype) {
  GateParams p{};
  p.out = pointer<void>(out);
  p.residual = pointer<void>(residual);
  p.gate = pointer<void>(gate);
  p.y = pointer<void>(y);
  p.num_rows = num_rows;
  p.num_tokens = num_tokens;
  p.width = width;
  p.dtype = static_cast<DType>(dtype);
  return p;
}

// sizes: rows, heads, tokens, head dim.
inline ListsParams lists(uintptr_t mode, uintptr_t count, uintptr_t index, uintptr_t order,
                         uintptr_t q, uintptr_t k, uintptr_t keep, Three q_strides, Three k_strides,
                         Four sizes, int64_t text_start, int64_t text_len, int64_t block_q,
                         int64_t block_kv, float scale, int dtype) {
  ListsParams p{};
  p.mode = pointer<uint8_t>(mode);
  p.count = pointer<int32_t>(count);
  p.index = pointer<int32_t>(index);
  p.order = pointer<int32_t>(order);
  p.q = pointer<void>(q);
  p.k = pointer<void>(k);
  p.keep = pointer<int32_t>(keep);
  p.q_strides = strides(q_strides);
  p.k_strides = strides(k_strides);
  p.num_rows = sizes[0];
  p.num_heads = sizes[1];
  p.num_tokens = sizes[2];
  p.head_dim = sizes[3];
  p.text_start = text_start;
  p.text_len = text_len;
  p.block_q = block_q;
  p.block_kv = block_kv;
  p.scale = scale;
  p.dtype = static_cast<DType>(dtype);
  return p;
}

// sizes: rows, heads, queries, keys, head dim.
inline AttentionParams attention(uintptr_t out, uintptr_t lse, uintptr_t q, uintptr_t k,
                                 uintptr_t v, uintptr_t mode, uintptr_t count, uintptr_t index,
                                 uintptr_t order, uintptr_t kv_len, Three out_strides,
                                 Three q_strides, Three k_strides, Three v_strides,
                                 Three index_strides, Two count_strides, Five sizes,
                                 int64_t block_q, int64_t block_kv, int64_t list_len, float scale,
                                 bool allow_skip, int dtype) {
  AttentionParams p{};
  p.dtype = static_cast<DType>(dtype);
  const Three queries = {sizes[0], sizes[1], sizes[2]}, keys = {sizes[0], sizes[1], sizes[3]};
  check_operand("out", out, out_strides, queries, p.dtype);
  check_operand("q", q, q_strides, queries, p.dtype);
  check_operand("k", k, k_strides, keys, p.dtype);
  check_operand("v", v, v_strides, keys, p.dtype);
  p.out = pointer<void>(out);
  p.lse = pointer<float>(lse);
  p.q = pointer<void>(q);
  p.k = pointer<void>(k);
  p.v = pointer<void>(v);
  p.mode = pointer<uint8_t>(mode);
  p.count = pointer<int32_t>(count);
  p.index = pointer<int32_t>(index);
  p.order = pointer<int32_t>(order);
  p.kv_len = pointer<int32_t>(kv_len);
  p.out_strides = strides(out_strides);
  p.q_strides = strides(q_strides);
  p.k_strides = strides(k_strides);
  p.v_strides = strides(v_strides);
  p.index_strides = strides(index_strides);
  p.count_row = count_strides[0];
  p.count_head = count_strides[1];
  p.num_rows = sizes[0];
  p.num_heads = sizes[1];
  p.len_q = sizes[2];
  p.len_kv = sizes[3];
  p.head_dim = sizes[4];
  p.block_q = block_q;
  p.block_kv = block_kv;
  p.list_len = list_len;
  p.scale = scale;
  p.allow_skip = allow_skip;
  return p;
}

}  // namespace rapid3rt::binding
