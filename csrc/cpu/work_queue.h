// SPDX-License-Identifier: Apache-2.0
// One OpenMP region around one atomic queue. Items are taken in order, so callers put the longest
// first. Which thread runs an item never changes its result. Exceptions cannot leave an OpenMP
// region: the first one is kept and rethrown.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace rapid3rt {

// Calls under about 100 us of work run on the caller: waking a team costs as much, and where other
// programs hold a core, a whole slice of the scheduler (8 ms measured). Bytes that one thread
// handles in that time:
constexpr int64_t kSerialBytes = 2 * 1024 * 1024;      // with arithmetic
constexpr int64_t kSerialCopyBytes = 8 * 1024 * 1024;  // copies alone

inline int threads_for_bytes(int64_t bytes, int num_threads, int64_t serial_bytes = kSerialBytes) {
  return bytes < serial_bytes ? 1 : num_threads;
}

// make_worker() is called once per thread and returns a callable worker(item) that may own scratch
// memory.
template <class MakeWorker>
void run_queue(int64_t num_items, int num_threads, MakeWorker&& make_worker) {
  if (num_items <= 0) return;
#ifdef _OPENMP
  if (num_threads > 1 && num_items > 1) {
    std::atomic<int64_t> next{0};
    std::exception_ptr error = nullptr;
#pragma omp parallel num_threads(num_threads)
    {
      try {
        auto worker = make_worker();
        for (int64_t item = next.fetch_add(1); item < num_items; item = next.fetch_add(1)) {
          worker(item);
        }
      } catch (...) {
        next.store(num_items);
#pragma omp critical(rapid3rt_work_queue)
        if (!error) error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#else
  (void)num_threads;
#endif
  auto worker = make_worker();
  for (int64_t item = 0; item < num_items; ++item) worker(item);
}

}  // namespace rapid3rt
