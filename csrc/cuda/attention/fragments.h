// SPDX-License-Identifier: Apache-2.0
// Which thread of a warp holds what in mma.sync m16n8k16, and where it finds that in shared memory.
//
// With g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A [16, 16]: registers 0-3 hold rows g, g + 8, g, g + 8 and columns 2t, 2t + 1, the last two
//               registers 8 columns further.
//   B [16, 8]:  registers 0, 1 hold rows 2t, 2t + 1 and 8 rows further, column g.
//   C [16, 8]:  values 0, 1 are row g, columns 2t, 2t + 1; values 2, 3 are row g + 8.
// ldmatrix hands to each lane, of a stored 8x8 matrix, row g and columns 2t, 2t + 1; with .trans
// column g and rows 2t, 2t + 1. Lanes 8i to 8i + 7 give the addresses of the rows of matrix i.
//   S = Q K^T: A is Q. B[k, n] is K[key n, dim k]: plain. Two key groups of 8 per load.
//   O = P V:   A is P, and the C fragments of S are its A fragments as they lie: tiles n = 2j, 2j +
//   1
//              of S are columns 16j to 16j + 15. B[k, n] is V[key k, dim n]: .trans.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace rapid3rt::cuda {

constexpr int kWarpSize = 32;
constexpr int kChunkBytes = 16;  // what one lane copies, and a row of an 8x8 matrix

// Rows of kDim two-byte values, chunk c of row r at place c ^ (r % 8): the same chunk of eight
// consecutive rows, which ldmatrix reads at once, then lies in all 32 banks, and so do eight
// consecutive chunks of one row, which copies write at once.
template <int kDim>
struct SharedRows {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kBytes = kChunks * kChunkBytes;
  static_assert(kDim % 64 == 0, "the swizzle permutes groups of eight chunks");

  static R3_HOST_DEVICE uint32_t at(int row, int chunk) {
    return static_cast<uint32_t>(row * kBytes + (chunk ^ (row & 7)) * kChunkBytes);
  }

  // Of the 16x16 at rows 0-15, dims 0-15, as A (Q) and, with .trans, as two B (V): matrices are
  // rows 0-7 and 8-15 of dims 0-7, then of dims 8-15.
  static R3_HOST_DEVICE uint32_t row_major(int lane) { return at(lane & 15, lane >> 4); }

  // Of the 16x16 at keys 0-15, dims 0-15, as two B (K): matrices are dims 0-7 and 8-15 of keys 0-7,
  // then of keys 8-15.
  static R3_HOST_DEVICE uint32_t key_major(int lane) {
    return at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  }

  // The same 16x16 `dims` 16-groups and `rows` 16-groups further. The chunk is the only part of an
  // address below kBytes, so that the exclusive or passes through it where the base is aligned to
  // kBytes; 16 rows do not change r % 8.
  static R3_HOST_DEVICE uint32_t moved(uint32_t address, int rows, int dims) {
    return (address ^ static_cast<uint32_t>(dims * 2 * kChunkBytes)) +
           static_cast<uint32_t>(rows * 16 * kBytes);
  }
};

R3_HOST_DEVICE int fragment_row(int lane) { return lane >> 2; }          // g
R3_HOST_DEVICE int fragment_column(int lane) { return 2 * (lane & 3); }  // 2t

}  // namespace rapid3rt::cuda
