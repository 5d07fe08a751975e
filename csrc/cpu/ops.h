// SPDX-License-Identifier: Apache-2.0
// The ops of the CPU module, one function per op. Definitions: rapid3rt/ops/reference.py.
#pragma once

#include <cstdint>

#include "rapid3rt/params.h"

namespace rapid3rt {

void block_sparse_attention(const AttentionParams& params);
const char* attention_isa(DType dtype, int64_t head_dim);  // whose kernel would run
void build_block_lists(const ListsParams& params);
void cache_lookup(const LookupParams& params);  // with scale: cache_lookup_norm
void cache_store(const StoreParams& params);
void gather_rows(const RowsParams& params);
void scatter_rows(const RowsParams& params);
void norm_modulate(const ModulateParams& params);
void gate_residual(const GateParams& params);

// Pieces of `step` that cover n, the last one perhaps shorter.
inline int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

// Each id within [0, limit); with unique also none twice.
void check_ids(const char* name, const int32_t* ids, int64_t count, int64_t limit, bool unique);

}  // namespace rapid3rt
