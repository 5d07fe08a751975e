// SPDX-License-Identifier: Apache-2.0
// gather_rows and scatter_rows: copies of whole rows as bytes.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "rowwise/choose.h"
#include "work_queue.h"

namespace rapid3rt {
namespace {

constexpr int64_t kChunkBytes = 64 * 1024;

// All but the lines that are not written whole go past the caches.
void stream_bytes(const RowKernels& kernels, char* out, const char* x, int64_t bytes) {
  const int64_t head = std::min(-reinterpret_cast<intptr_t>(out) & 63, bytes);
  const int64_t body = (bytes - head) / 64 * 64;
  std::memcpy(out, x, head);
  kernels.copy(out + head, x + head, body);
  std::memcpy(out + head + body, x + head + body, bytes - head - body);
}

// from(i) and to(i): where row i comes from and goes to.
template <class From, class To>
void copy_rows(const RowsParams& p, From&& from, To&& to) {
  if (p.row_bytes == 0) return;
  const RowKernels& kernels = row_kernels();
  const int64_t chunks = ceil_div(p.row_bytes, kChunkBytes);
  const int64_t out_bytes = p.num_rows * p.row_bytes;
  const bool stream = should_stream(nullptr, out_bytes, 0, p.num_threads);
  const int num_threads = threads_for_bytes(2 * out_bytes, p.num_threads, kSerialCopyBytes);
  run_queue(p.num_rows * chunks, num_threads, [&] {
    return [&](int64_t item) {
      const int64_t row = item / chunks, offset = item % chunks * kChunkBytes;
      const int64_t bytes = std::min(kChunkBytes, p.row_bytes - offset);
      char* const out = static_cast<char*>(p.out) + to(row) * p.row_bytes + offset;
      const char* const x = static_cast<const char*>(p.x) + from(row) * p.row_bytes + offset;
      if (stream) {
        stream_bytes(kernels, out, x, bytes);
      } else {
        std::memcpy(out, x, bytes);
      }
    };
  });
}

}  // namespace

void gather_rows(const RowsParams& p) {
  check_ids("rows", p.rows, p.num_rows, p.total, false);
  copy_rows(p, [&](int64_t i) -> int64_t { return p.rows[i]; }, [](int64_t i) { return i; });
}

void scatter_rows(const RowsParams& p) {
  check_ids("rows", p.rows, p.num_rows, p.total, true);
  copy_rows(p, [](int64_t i) { return i; }, [&](int64_t i) -> int64_t { return p.rows[i]; });
}

}  // namespace rapid3rt
