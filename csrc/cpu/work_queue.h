// SPDX-License-Identifier: Apache-2.0
// One OpenMP region around one atomic queue. Items are taken in order, so callers put the longest
// first. Which thread runs an item never changes its result. Exceptions cannot leave an OpenMP
// region: the first one is kept and rethrown.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace rapid3rt {

// Calls under about 100 us of work run on the caller: waking a team costs as much, and where other
// programs hold a core, a whole slice of the scheduler (8 ms measured). Bytes that one thread
// handles in that time:
constexpr int64_t kSerialBytes = 2 * 1024 * 1024;      // with arithmetic
constexpr int64_t kSerialCopyBytes = 8 * 1024 * 1024;  // copies alone

inline int threads_for_bytes(int64_t bytes, int num_threads, int64_t serial_bytes = kSerialBytes) {
  return bytes < serial_bytes ? 1 : num_threads;
}

// Items 0 to num_items - 1, taken in order by any number of threads that call work().
class WorkQueue {
 public:
  explicit WorkQueue(int64_t num_items) : num_items_(num_items) {}

  // make_worker() returns a callable worker(item) that may own scratch memory. Never throws: the
  // first exception of any thread ends the work of all and is kept.
  template <class MakeWorker>
  void work(MakeWorker&& make_worker) noexcept {
    try {
      auto worker = make_worker();
      for (int64_t item = next_.fetch_add(1); item < num_items_; item = next_.fetch_add(1)) {
        worker(item);
      }
    } catch (...) {
      next_.store(num_items_);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  // After all threads are done.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t num_items_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_ = nullptr;
};

// Runs worker(item) for all items; make_worker() is called once per thread.
template <class MakeWorker>
void run_queue(int64_t num_items, int num_threads, MakeWorker&& make_worker) {
  if (num_items <= 0) return;
#ifdef _OPENMP
  if (num_threads > 1 && num_items > 1) {
    WorkQueue queue(num_items);
#pragma omp parallel num_threads(num_threads)
    queue.work(make_worker);
    queue.rethrow();
    return;
  }
#else
  (void)num_threads;
#endif
  auto worker = make_worker();
  for (int64_t item = 0; item < num_items; ++item) worker(item);
}

}  // namespace rapid3rt
