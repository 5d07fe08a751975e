// SPDX-License-Identifier: Apache-2.0
// norm_modulate and gate_residual.
#include <algorithm>

#include "ops.h"
#include "rowwise/choose.h"
#include "work_queue.h"

namespace rapid3rt {

void norm_modulate(const ModulateParams& p) {
  const RowKernels& kernels = row_kernels();
  const int64_t tokens = tokens_per_item(p.width);
  const int64_t chunks = ceil_div(p.num_tokens, tokens);
  const int64_t size = element_bytes(p.dtype);
  const int64_t out_bytes = p.num_rows * p.num_tokens * p.width * size;
  const bool stream = should_stream(p.out, out_bytes, p.width * size);
  run_queue(p.num_rows * chunks, threads_for_bytes(2 * out_bytes, p.num_threads), [&] {
    return [&, scratch = Scratch(p.width)](int64_t item) mutable {
      const int64_t row = item / chunks, first = item % chunks * tokens;
      const int64_t at = (row * p.num_tokens + first) * p.width;
      const Modulation modulation = {element(p.scale, row * p.width, p.dtype),
                                     element(p.shift, row * p.width, p.dtype),
                                     p.weight,
                                     p.bias,
                                     p.eps,
                                     p.rms};
      LookupPiece piece{};  // of no terms
      piece.out = element(p.out, at, p.dtype);
      piece.embedded = element(p.x, at, p.dtype);
      piece.count = std::min(tokens, p.num_tokens - first) * p.width;
      piece.width = p.width;
      piece.modulation = &modulation;
      piece.scratch = scratch.data();
      piece.stream = stream;
      piece.dtype = static_cast<int>(p.dtype);
      kernels.lookup(piece);
    };
  });
}

void gate_residual(const GateParams& p) {
  const RowKernels& kernels = row_kernels();
  const int64_t tokens = tokens_per_item(p.width);
  const int64_t chunks = ceil_div(p.num_tokens, tokens);
  const int64_t size = element_bytes(p.dtype);
  const int64_t out_bytes = p.num_rows * p.num_tokens * p.width * size;
  const bool stream = should_stream(p.out, out_bytes, p.width * size);
  run_queue(p.num_rows * chunks, threads_for_bytes(3 * out_bytes, p.num_threads), [&] {
    return [&](int64_t item) {
      const int64_t row = item / chunks, first = item % chunks * tokens;
      const int64_t at = (row * p.num_tokens + first) * p.width;
      GatePiece piece{};
      piece.out = element(p.out, at, p.dtype);
      piece.residual = element(p.residual, at, p.dtype);
      piece.gate = element(p.gate, row * p.width, p.dtype);
      piece.y = element(p.y, at, p.dtype);
      piece.tokens = std::min(tokens, p.num_tokens - first);
      piece.width = p.width;
      piece.stream = stream;
      piece.dtype = static_cast<int>(p.dtype);
      kernels.gate(piece);
    };
  });
}

}  // namespace rapid3rt
