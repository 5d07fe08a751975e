// SPDX-License-Identifier: Apache-2.0
// The ops of the CUDA module, one function per op, asynchronous on the caller's stream.
// Definitions: rapid3rt/ops/reference.py. num_threads of the params is not read. Nothing allocates
// or waits, so every call may stand in a CUDA graph; what a call needs beside its operands is
// `workspace`, of at least *_workspace_bytes, uninitialised.
#pragma once

#include <cstdint>

#include "launch.h"
#include "rapid3rt/params.h"

namespace rapid3rt::cuda {

// How CTAs take work. kQueue: from an atomic counter, in the order of AttentionParams::order
// (longest first) where there is one. kStatic: with a constant stride. For measurement; results
// never differ.
enum class Schedule : int32_t { kQueue = 0, kStatic = 1 };

int64_t attention_workspace_bytes(const AttentionParams& params);
void block_sparse_attention(const AttentionParams& params, Schedule schedule, void* workspace,
                            const Launch& launch);
int64_t lists_workspace_bytes(const ListsParams& params);
void build_block_lists(const ListsParams& params, void* workspace, const Launch& launch);
void cache_lookup(const LookupParams& params,
                  const Launch& launch);  // with scale: cache_lookup_norm
int64_t store_workspace_bytes(const StoreParams& params);
void cache_store(const StoreParams& params, void* workspace, const Launch& launch);
void gather_rows(const RowsParams& params, const Launch& launch);
void scatter_rows(const RowsParams& params, const Launch& launch);
void norm_modulate(const ModulateParams& params, const Launch& launch);
void gate_residual(const GateParams& params, const Launch& launch);

}  // namespace rapid3rt::cuda
