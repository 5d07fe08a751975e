// SPDX-License-Identifier: Apache-2.0
// What the memory-bound ops share: which kernels run, how rows are cut into items, where stores go.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "rapid3rt/dtype.h"
#include "rowwise/kernels.h"
#include "work_queue.h"

namespace rapid3rt {

// The kernels of the instruction set that runs now.
const RowKernels& row_kernels();

// Whether the stores of a call should go past the caches: its output does not fit into them, so
// reading each line before it is written, and keeping it, would be wasted. `step` is the distance
// in bytes of what is written in one go: a streamed line must be written whole.
bool should_stream(const void* out, int64_t out_bytes, int64_t step, int num_threads);

// Address of an element.
inline const char* element(const void* x, int64_t at, DType dtype) {
  return static_cast<const char*>(x) + at * element_bytes(dtype);
}
inline char* element(void* x, int64_t at, DType dtype) {
  return static_cast<char*>(x) + at * element_bytes(dtype);
}

// Elements of a work item: enough to pay for taking it, whatever the number of threads; a multiple
// of a cache line.
constexpr int64_t kItemElements = 16384;

// Whole tokens per item, about kItemElements.
inline int64_t tokens_per_item(int64_t width) {
  const int64_t tokens = kItemElements / (width > 0 ? width : 1);
  return tokens > 1 ? tokens : 1;
}

// Elements of one row: `count` of them, the first is element `at` of the whole output.
struct RowItem {
  int64_t row, at, count;
};

// An op whose output [num_rows, num_tokens, width] is written once, cut into items of one row each.
struct RowItems {
  int64_t num_items, chunks, row_size, step;  // chunks items a row, step elements but for the last
  bool stream;
  int num_threads;

  // make_worker() returns a callable worker(const RowItem&), as in run_queue.
  template <class MakeWorker>
  void run(MakeWorker&& make_worker) const {
    run_queue(num_items, num_threads, [&] {
      return [this, worker = make_worker()](int64_t item) mutable {
        const int64_t row = item / chunks, first = item % chunks * step;
        worker(RowItem{row, row * row_size + first, std::min(step, row_size - first)});
      };
    });
  }
};

// tensors: how many of the output's size the call reads and writes. has_tokens: whether the width
// matters to the kernel; else a row is cut anywhere.
template <class Params>
RowItems cut_rows(const Params& p, int64_t tensors, bool has_tokens = true) {
  const int64_t row_size = p.num_tokens * p.width, size = element_bytes(p.dtype);
  const int64_t step = has_tokens ? tokens_per_item(p.width) * p.width : kItemElements;
  const int64_t chunks = row_size > 0 ? ceil_div(row_size, step) : 0;
  const int64_t out_bytes = p.num_rows * row_size * size;
  return {p.num_rows * chunks,
          chunks,
          row_size,
          step,
          should_stream(p.out, out_bytes, (has_tokens ? p.width : row_size) * size, p.num_threads),
          threads_for_bytes(out_bytes * tensors, p.num_threads)};
}

// A row of floats, padded for the kernels and aligned to 64 bytes.
class Scratch {
 public:
  explicit Scratch(int64_t width) : lines_((width + kLanes - 1) / kLanes) {}
  float* data() { return lines_.empty() ? nullptr : lines_.front().lane; }

 private:
  struct alignas(64) Line {
    float lane[kLanes];
  };
  std::vector<Line> lines_;
};

}  // namespace rapid3rt
