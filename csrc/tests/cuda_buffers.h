// SPDX-License-Identifier: Apache-2.0
// Memory for tests of emulated kernels: of its exact size, poisoned until it is written.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "rapid3rt/dtype.h"

namespace rapid3rt {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// Aligned as device memory is; every byte is 0xff: NaN, or -1.
inline Memory make_memory(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes > 0 ? bytes : 1) != 0) std::abort();
  std::memset(memory, 0xff, bytes);
  return Memory(static_cast<char*>(memory));
}

// `count` elements, `skip` elements beyond an aligned address.
class Buffer {
 public:
  template <class Shape>  // has dtype and skip
  Buffer(int64_t count, const Shape& shape, unsigned seed = 0)
      : dtype_(shape.dtype),
        size_(element_bytes(dtype_)),
        skip_(shape.skip * size_),
        bytes_(skip_ + count * size_),
        memory_(make_memory(bytes_)) {
    for (int64_t i = 0; seed != 0 && i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      set(i, static_cast<float>(static_cast<int>(seed >> 24) - 128) / 64.0f);
    }
  }

  char* data() const { return memory_.get() + skip_; }
  std::vector<char> bytes() const { return {data(), memory_.get() + bytes_}; }
  void poison(int64_t at, int64_t count) { std::memset(data() + at * size_, 0xff, count * size_); }

  double value(int64_t i) const {
    if (dtype_ == DType::kFloat32) return as<float>(i);
    return dtype_ == DType::kBFloat16 ? to_float(as<bfloat16>(i)) : to_float(as<float16>(i));
  }
  void set(int64_t i, float value) {
    with_type(dtype_, [&](auto x) {
      from_float(value, x);
      std::memcpy(data() + i * size_, &x, sizeof(x));
    });
  }

 private:
  template <class T>
  T as(int64_t i) const {
    T x;
    std::memcpy(&x, data() + i * size_, sizeof(x));
    return x;
  }

  DType dtype_;
  int64_t size_, skip_, bytes_;
  Memory memory_;
};

}  // namespace rapid3rt
