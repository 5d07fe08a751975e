// SPDX-License-Identifier: Apache-2.0
#include "attention/vectors512.h"
#include "exp2.h"

namespace rapid3rt {

double exp2_error_avx512(int degree) {
  return degree == 4 ? exp2_error<Vectors512, 4>() : exp2_error<Vectors512, 5>();
}

}  // namespace rapid3rt
