// SPDX-License-Identifier: Apache-2.0
// Index, list and work-order logic is compiled for host and device alike, so that CPU tests can run
// it.
#pragma once

#ifdef __CUDACC__
#define R3_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define R3_HOST_DEVICE inline
#endif
