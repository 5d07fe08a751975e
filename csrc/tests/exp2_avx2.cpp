// SPDX-License-Identifier: Apache-2.0
#include "attention/vectors256.h"
#include "exp2.h"

namespace rapid3rt {

double exp2_error_avx2(int degree) {
  return degree == 4 ? exp2_error<Vectors256, 4>() : exp2_error<Vectors256, 5>();
}

}  // namespace rapid3rt
