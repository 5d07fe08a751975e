// SPDX-License-Identifier: Apache-2.0
// gather_rows and scatter_rows: copies of whole rows as bytes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "ops.h"
#include "work_queue.h"

namespace rapid3rt {

void check_ids(const char* name, const int32_t* ids, int64_t count, int64_t limit, bool unique) {
  std::vector<char> seen(unique ? limit : 0, 0);
  for (int64_t i = 0; i < count; ++i) {
    R3_CHECK(ids[i] >= 0 && ids[i] < limit, name, " must be in [0, ", limit, "), got ", ids[i],
             " at position ", i);
    if (unique) {
      R3_CHECK(!seen[ids[i]], name, " must be unique, got ", ids[i], " twice");
      seen[ids[i]] = 1;
    }
  }
}

namespace {

constexpr int64_t kChunkBytes = 64 * 1024;

// copy(row, offset, bytes) moves one piece of one row.
template <class Copy>
void copy_rows(const RowsParams& p, Copy&& copy) {
  if (p.row_bytes == 0) return;
  const int64_t chunks = (p.row_bytes + kChunkBytes - 1) / kChunkBytes;
  const int num_threads =
      threads_for_bytes(2 * p.num_rows * p.row_bytes, p.num_threads, kSerialCopyBytes);
  run_queue(p.num_rows * chunks, num_threads, [&] {
    return [&](int64_t item) {
      const int64_t offset = item % chunks * kChunkBytes;
      copy(item / chunks, offset, std::min(kChunkBytes, p.row_bytes - offset));
    };
  });
}

}  // namespace

void gather_rows(const RowsParams& p) {
  check_ids("rows", p.rows, p.num_rows, p.total, false);
  auto* out = static_cast<char*>(p.out);
  const auto* x = static_cast<const char*>(p.x);
  copy_rows(p, [&](int64_t row, int64_t offset, int64_t bytes) {
    std::memcpy(out + row * p.row_bytes + offset, x + p.rows[row] * p.row_bytes + offset, bytes);
  });
}

void scatter_rows(const RowsParams& p) {
  check_ids("rows", p.rows, p.num_rows, p.total, true);
  auto* out = static_cast<char*>(p.out);
  const auto* x = static_cast<const char*>(p.x);
  copy_rows(p, [&](int64_t row, int64_t offset, int64_t bytes) {
    std::memcpy(out + p.rows[row] * p.row_bytes + offset, x + row * p.row_bytes + offset, bytes);
  });
}

}  // namespace rapid3rt
