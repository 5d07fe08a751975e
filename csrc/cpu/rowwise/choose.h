// SPDX-License-Identifier: Apache-2.0
// What the memory-bound ops share: which kernels run, how rows are cut into items, where stores go.
#pragma once

#include <cstdint>
#include <vector>

#include "rapid3rt/dtype.h"
#include "rowwise/kernels.h"

namespace rapid3rt {

// The kernels of the instruction set that runs now.
const RowKernels& row_kernels();

// Whether the stores of a call should go past the caches: its output does not fit into them, so
// reading each line before it is written, and keeping it, would be wasted. `step` is the distance
// in bytes of what is written in one go: a streamed line must be written whole.
bool should_stream(const void* out, int64_t out_bytes, int64_t step);

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
