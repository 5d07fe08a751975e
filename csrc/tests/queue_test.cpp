// SPDX-License-Identifier: Apache-2.0
// The work queue on plain threads: the thread sanitizer sees false races inside OpenMP.
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "work_queue.h"

using rapid3rt::WorkQueue;

namespace {

template <class MakeWorker>
void run_on_threads(WorkQueue& queue, int num_threads, const MakeWorker& make_worker) {
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&] { queue.work(make_worker); });
  }
  for (std::thread& thread : threads) thread.join();
}

void every_item_runs_once() {
  for (const int64_t num_items : {0, 1, 7, 10000}) {
    std::vector<int> runs(num_items);  // plain: two threads on one item would be a race
    std::atomic<int> workers{0};
    WorkQueue queue(num_items);
    run_on_threads(queue, 4, [&] {
      ++workers;
      return [&, scratch = std::vector<int>(8)](int64_t item) mutable {
        scratch[item % 8] += 1;
        runs[item] += 1;
      };
    });
    queue.rethrow();
    CHECK(workers == 4, "%d workers", workers.load());
    for (int64_t i = 0; i < num_items; ++i)
      CHECK(runs[i] == 1, "item %ld ran %d times", long(i), runs[i]);
  }
}

void the_first_error_ends_the_work() {
  for (int round = 0; round < 50; ++round) {
    WorkQueue queue(1000000000);
    run_on_threads(queue, 4, [] {
      return [](int64_t item) {
        if (item % 100 == 99) throw std::runtime_error("item " + std::to_string(item));
      };
    });
    std::string message;
    try {
      queue.rethrow();
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK(message.rfind("item ", 0) == 0, "message '%s'", message.c_str());
  }
}

void an_error_of_make_worker_is_kept() {
  WorkQueue queue(10);
  const auto make_worker = []() -> void (*)(int64_t) { throw std::bad_alloc(); };
  run_on_threads(queue, 2, make_worker);
  bool thrown = false;
  try {
    queue.rethrow();
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  CHECK(thrown, "nothing was thrown");
}

}  // namespace

int main() {
  every_item_runs_once();
  the_first_error_ends_the_work();
  an_error_of_make_worker_is_kept();
  std::puts("queue: ok");
}
