// SPDX-License-Identifier: Apache-2.0
// The fibers behind cuda_runtime.h.
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

// ThreadSanitizer takes each fiber for a thread; only barriers order them.
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
constexpr unsigned __tsan_switch_to_fiber_no_sync = 1;
#endif

namespace emulated {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Barrier {
  std::atomic<unsigned> arrived{0};
  std::atomic<uint64_t> generation{0};
};

struct Warp {
  Barrier barrier;
  // By turns, so that one barrier an exchange is enough.
  uint64_t values[2][32];
  const char* what[2][32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* sanitizer = nullptr;
  dim3 thread;
  unsigned exchanges = 0;
  std::atomic<bool> is_done{false};
};

Order order = Order::kAscending;
std::mt19937 generator;
std::vector<std::unique_ptr<Fiber>> fibers;  // kept for the next CTA
std::vector<std::unique_ptr<Warp>> warps;
Barrier whole;
unsigned num_threads;
std::atomic<Fiber*> current{nullptr};
std::atomic<uint64_t> progress{0};  // barriers passed and threads that ended
ucontext_t scheduler;
void* scheduler_sanitizer;
int edge;  // what comes before a CTA comes before all of its threads
void (*body)(void*);
void* argument;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated CTA: %s\n", what);
  std::exit(1);
}

void yield() {
  Fiber* const self = current.load(std::memory_order_relaxed);
  __tsan_switch_to_fiber(scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
  swapcontext(&self->context, &scheduler);
}

void wait(Barrier& barrier, unsigned threads) {
  const uint64_t before = barrier.generation.load(std::memory_order_relaxed);
  __tsan_release(&barrier);
  if (barrier.arrived.fetch_add(1, std::memory_order_relaxed) + 1 == threads) {
    barrier.arrived.store(0, std::memory_order_relaxed);
    barrier.generation.store(before + 1, std::memory_order_relaxed);
    progress.fetch_add(1, std::memory_order_relaxed);
  } else {
    while (barrier.generation.load(std::memory_order_relaxed) == before) yield();
  }
  __tsan_acquire(&barrier);
}

void enter() {
  __tsan_acquire(&edge);
  body(argument);
  current.load(std::memory_order_relaxed)->is_done.store(true, std::memory_order_relaxed);
  progress.fetch_add(1, std::memory_order_relaxed);
  __tsan_release(&edge);
  yield();
}

std::vector<unsigned> numbers(unsigned count) {
  std::vector<unsigned> list(count);
  std::iota(list.begin(), list.end(), 0u);
  if (order == Order::kDescending) std::reverse(list.begin(), list.end());
  if (order == Order::kShuffled) std::shuffle(list.begin(), list.end(), generator);
  return list;
}

void begin(Fiber& fiber, dim3 thread) {
  fiber.thread = thread;
  fiber.exchanges = 0;
  fiber.is_done.store(false, std::memory_order_relaxed);
  if (fiber.sanitizer == nullptr) fiber.sanitizer = __tsan_create_fiber(0);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

// The scheduler is none of the threads: what it tells them is no race.
__attribute__((no_sanitize("thread"))) void resume(Fiber& fiber) {
  threadIdx = fiber.thread;
  current.store(&fiber, std::memory_order_relaxed);
  __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
  swapcontext(&scheduler, &fiber.context);
}

void run_cta(unsigned index) {
  blockIdx = dim3(index);
  for (unsigned i = 0; i < num_threads; ++i) {
    begin(*fibers[i], dim3(i % blockDim.x, i / blockDim.x));
  }
  __tsan_release(&edge);
  std::vector<unsigned> left = numbers(num_threads);
  while (!left.empty()) {
    const uint64_t before = progress.load(std::memory_order_relaxed);
    for (const unsigned i : left) resume(*fibers[i]);
    const auto is_done = [](unsigned i) {
      return fibers[i]->is_done.load(std::memory_order_relaxed);
    };
    left.erase(std::remove_if(left.begin(), left.end(), is_done), left.end());
    if (progress.load(std::memory_order_relaxed) == before) fail("not all threads reach a barrier");
  }
  __tsan_acquire(&edge);
}

}  // namespace

void set_order(Order value) { order = value; }

void sync_threads() { wait(whole, num_threads); }

const uint64_t* exchange(const char* what, uint64_t value) {
  Fiber* const self = current.load(std::memory_order_relaxed);
  const unsigned number = threadIdx.y * blockDim.x + threadIdx.x, lane = number % 32;
  Warp& warp = *warps[number / 32];
  const unsigned turn = self->exchanges++ % 2;
  warp.values[turn][lane] = value;
  warp.what[turn][lane] = what;
  wait(warp.barrier, 32);
  for (const char* other : warp.what[turn]) {
    if (std::strcmp(other, what) != 0) fail("lanes of a warp meet in different operations");
  }
  return warp.values[turn];
}

void run(dim3 grid, dim3 block, void (*body_)(void*), void* argument_) {
  body = body_;
  argument = argument_;
  gridDim = grid;
  blockDim = block;
  num_threads = block.x * block.y;
  if (num_threads % 32 != 0) fail("threads must be whole warps");
  while (fibers.size() < num_threads) fibers.emplace_back(new Fiber);
  while (warps.size() < num_threads / 32) warps.emplace_back(new Warp);
  if (scheduler_sanitizer == nullptr) scheduler_sanitizer = __tsan_get_current_fiber();
  for (const unsigned index : numbers(grid.x)) run_cta(index);
}

}  // namespace emulated
