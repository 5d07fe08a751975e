// SPDX-License-Identifier: Apache-2.0
// norm_modulate and gate_residual.
#include "ops.h"
#include "rowwise/choose.h"

namespace rapid3rt {

void norm_modulate(const ModulateParams& p) {
  const RowKernels& kernels = row_kernels();
  const RowItems items = cut_rows(p, 2);
  items.run([&] {
    return [&, scratch = Scratch(p.width)](const RowItem& item) mutable {
      const Modulation modulation = {element(p.scale, item.row * p.width, p.dtype),
                                     element(p.shift, item.row * p.width, p.dtype),
                                     p.weight,
                                     p.bias,
                                     p.eps,
                                     p.rms};
      LookupPiece piece{};  // of no terms
      piece.out = element(p.out, item.at, p.dtype);
      piece.embedded = element(p.x, item.at, p.dtype);
      piece.count = item.count;
      piece.width = p.width;
      piece.modulation = &modulation;
      piece.scratch = scratch.data();
      piece.stream = items.stream;
      piece.dtype = static_cast<int>(p.dtype);
      kernels.lookup(piece);
    };
  });
}

void gate_residual(const GateParams& p) {
  const RowKernels& kernels = row_kernels();
  const RowItems items = cut_rows(p, 3);
  items.run([&] {
    return [&](const RowItem& item) {
      GatePiece piece{};
      piece.out = element(p.out, item.at, p.dtype);
      piece.residual = element(p.residual, item.at, p.dtype);
      piece.gate = element(p.gate, item.row * p.width, p.dtype);
      piece.y = element(p.y, item.at, p.dtype);
      piece.tokens = item.count / p.width;
      piece.width = p.width;
      piece.stream = items.stream;
      piece.dtype = static_cast<int>(p.dtype);
      kernels.gate(piece);
    };
  });
}

}  // namespace rapid3rt
