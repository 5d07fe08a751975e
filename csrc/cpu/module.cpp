// SPDX-License-Identifier: Apache-2.0
// The Python module _cpu. Tensors arrive as addresses, sizes and strides; rapid3rt/ops/native.py
// has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "isa.h"
#include "ops.h"

namespace py = pybind11;

namespace rapid3rt {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Three = std::array<int64_t, 3>;

Strides strides(const Three& s) { return {s[0], s[1], s[2]}; }

std::vector<std::string> isas() {
  return {kIsaNames, kIsaNames + static_cast<int>(best_isa()) + 1};
}

std::string isa() { return kIsaNames[static_cast<int>(current_isa())]; }

void force_isa_named(const std::string& name) {
  std::string list;
  int at = -1, i = 0;
  for (const std::string& known : isas()) {
    list += (i == 0 ? "" : ", ") + known;
    if (known == name) at = i;
    ++i;
  }
  R3_CHECK(at >= 0, "RAPID3RT_CPU_ISA must be one of ", list,
           " (this build on this machine), got '", name, "'");
  force_isa(static_cast<Isa>(at));
}

// A [R, H, N, K] operand: vectors of keys and queries must be aligned, whatever the caller checked.
void check_operand(const char* name, uintptr_t address, const Three& strides, Three sizes,
                   int dtype) {
  R3_CHECK(address % 16 == 0, name, " must start at a multiple of 16 bytes, got address ", address);
  const int64_t step = dtype == static_cast<int>(DType::kFloat32) ? 4 : 8;
  for (int i = 0; i < 3; ++i) {
    R3_CHECK(sizes[i] <= 1 || (strides[i] >= 0 && strides[i] % step == 0), name,
             " must have strides that are multiples of 16 bytes and not negative, got ", strides[i],
             " elements");
  }
}

void lookup(uintptr_t out, uintptr_t embedded, uintptr_t slots, uintptr_t slot, uintptr_t coef,
            uintptr_t scale, uintptr_t shift, float eps, int64_t num_rows, int64_t num_slots,
            int64_t num_orders, int64_t num_tokens, int64_t width, int dtype, int num_threads) {
  cache_lookup({pointer<void>(out), pointer<void>(embedded), pointer<void>(slots),
                pointer<int32_t>(slot), pointer<float>(coef), pointer<void>(scale),
                pointer<void>(shift), eps, num_rows, num_slots, num_orders, num_tokens, width,
                static_cast<DType>(dtype), num_threads});
}

void store(uintptr_t stats, uintptr_t slots, uintptr_t out, uintptr_t embedded, uintptr_t slot,
           uintptr_t gap, int64_t num_rows, int64_t num_slots, int64_t num_orders,
           int64_t num_tokens, int64_t width, int dtype, int num_threads) {
  cache_store({pointer<float>(stats), pointer<void>(slots), pointer<void>(out),
               pointer<void>(embedded), pointer<int32_t>(slot), pointer<float>(gap), num_rows,
               num_slots, num_orders, num_tokens, width, static_cast<DType>(dtype), num_threads});
}

RowsParams rows_params(uintptr_t out, uintptr_t x, uintptr_t rows, int64_t num_rows, int64_t total,
                       int64_t row_bytes, int num_threads) {
  return {pointer<void>(out), pointer<void>(x), pointer<int32_t>(rows), num_rows, total,
          row_bytes,          num_threads};
}

void gather(uintptr_t out, uintptr_t x, uintptr_t rows, int64_t num_rows, int64_t total,
            int64_t row_bytes, int num_threads) {
  gather_rows(rows_params(out, x, rows, num_rows, total, row_bytes, num_threads));
}

void scatter(uintptr_t out, uintptr_t x, uintptr_t rows, int64_t num_rows, int64_t total,
             int64_t row_bytes, int num_threads) {
  scatter_rows(rows_params(out, x, rows, num_rows, total, row_bytes, num_threads));
}

void modulate(uintptr_t out, uintptr_t x, uintptr_t scale, uintptr_t shift, uintptr_t weight,
              uintptr_t bias, float eps, bool rms, int64_t num_rows, int64_t num_tokens,
              int64_t width, int dtype, int num_threads) {
  norm_modulate({pointer<void>(out), pointer<void>(x), pointer<void>(scale), pointer<void>(shift),
                 pointer<void>(weight), pointer<void>(bias), eps, rms, num_rows, num_tokens, width,
                 static_cast<DType>(dtype), num_threads});
}

void gate(uintptr_t out, uintptr_t residual, uintptr_t gate, uintptr_t y, int64_t num_rows,
          int64_t num_tokens, int64_t width, int dtype, int num_threads) {
  gate_residual({pointer<void>(out), pointer<void>(residual), pointer<void>(gate), pointer<void>(y),
                 num_rows, num_tokens, width, static_cast<DType>(dtype), num_threads});
}

void lists(uintptr_t mode, uintptr_t count, uintptr_t index, uintptr_t order, uintptr_t q,
           uintptr_t k, uintptr_t keep, Three q_strides, Three k_strides,
           std::array<int64_t, 4> sizes, int64_t text_start, int64_t text_len, int64_t block_q,
           int64_t block_kv, float scale, int dtype, int num_threads) {
  build_block_lists({pointer<uint8_t>(mode),
                     pointer<int32_t>(count),
                     pointer<int32_t>(index),
                     pointer<int32_t>(order),
                     pointer<void>(q),
                     pointer<void>(k),
                     pointer<int32_t>(keep),
                     strides(q_strides),
                     strides(k_strides),
                     sizes[0],
                     sizes[1],
                     sizes[2],
                     sizes[3],
                     text_start,
                     text_len,
                     block_q,
                     block_kv,
                     scale,
                     static_cast<DType>(dtype),
                     num_threads});
}

// sizes: rows, heads, queries, keys, head dim.
void attention(uintptr_t out, uintptr_t lse, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t mode,
               uintptr_t count, uintptr_t index, uintptr_t order, uintptr_t kv_len,
               Three out_strides, Three q_strides, Three k_strides, Three v_strides,
               Three index_strides, std::array<int64_t, 2> count_strides,
               std::array<int64_t, 5> sizes, int64_t block_q, int64_t block_kv, int64_t list_len,
               float scale, bool allow_skip, int dtype, int num_threads) {
  const Three queries = {sizes[0], sizes[1], sizes[2]}, keys = {sizes[0], sizes[1], sizes[3]};
  check_operand("out", out, out_strides, queries, dtype);
  check_operand("q", q, q_strides, queries, dtype);
  check_operand("k", k, k_strides, keys, dtype);
  check_operand("v", v, v_strides, keys, dtype);
  AttentionParams p{};
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
  p.dtype = static_cast<DType>(dtype);
  p.num_threads = num_threads;
  block_sparse_attention(p);
}

}  // namespace
}  // namespace rapid3rt

PYBIND11_MODULE(_cpu, m) {
  using namespace rapid3rt;
  m.doc() = "CPU kernels of rapid3rt. Knows no torch: tensors are addresses, sizes and strides.";
#ifdef _OPENMP
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
  m.attr("isas") = isas();  // those that this build and this machine have, ascending
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("isa", &isa);
  m.def("force_isa", &force_isa_named);
  m.def("block_sparse_attention", &attention, no_gil);
  m.def("build_block_lists", &lists, no_gil);
  m.def("cache_lookup", &lookup, no_gil);
  m.def("cache_store", &store, no_gil);
  m.def("gather_rows", &gather, no_gil);
  m.def("gate_residual", &gate, no_gil);
  m.def("norm_modulate", &modulate, no_gil);
  m.def("scatter_rows", &scatter, no_gil);
}
