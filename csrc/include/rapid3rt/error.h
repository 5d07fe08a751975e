// SPDX-License-Identifier: Apache-2.0
// R3_CHECK(condition, parts...): throw std::invalid_argument (ValueError in Python) with the parts
// as its message.
#pragma once

#include <sstream>
#include <stdexcept>

namespace rapid3rt {

template <class... Parts>
[[noreturn]] void throw_invalid(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace rapid3rt

#define R3_CHECK(condition, ...)                              \
  do {                                                        \
    if (!(condition)) ::rapid3rt::throw_invalid(__VA_ARGS__); \
  } while (false)
