// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "ops.h"

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

}  // namespace rapid3rt
