// SPDX-License-Identifier: Apache-2.0
// The machine of Sm80Attention on a CPU: the threads of a CTA are fibers, and what the hardware
// leaves open is drawn at random. Instructions are written down from the PTX ISA, not from
// fragments.h, which they check.
//
// - Warps run in any order between barriers, lanes in any order between what a warp does together.
// - A cp.async lands at once, or destroys its target at once and lands when it is waited for: one
//   that comes too early or is read too early shows as NaN, as all fresh shared memory does.
// - Addresses must lie in shared memory and be aligned, all lanes of a warp must come to the same
//   instruction, and the rows of a matrix that ldmatrix reads must lie in different banks.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "rapid3rt/dtype.h"

namespace rapid3rt::cuda {

class EmulatedCta {
 public:
  static constexpr int kLanes = 32, kWarps = 4, kThreads = kLanes * kWarps;
  static constexpr uint32_t kBase = 1024;  // where shared memory begins, as on sm_90

  EmulatedCta(int shared_bytes, uint32_t cta, uint32_t num_ctas, uint32_t seed)
      : cta(cta), num_ctas(num_ctas), shared_(shared_bytes, '\xff'), random_(seed) {}

  // body() by all threads of the CTA.
  template <class Body>
  void run(Body&& body) {
    start_ = [](void* b) { (*static_cast<std::remove_reference_t<Body>*>(b))(); };
    body_ = &body;
    current = this;
    fibers_.resize(kThreads);
    for (Fiber& fiber : fibers_) {
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.context, &EmulatedCta::enter, 0);
    }
    for (int64_t idle = 0; num_done_ < kThreads;) {
      const int64_t before = progress_;
      run_warp(static_cast<int>(random_() % kWarps), 1 + static_cast<int>(random_() % 40));
      idle = progress_ == before ? idle + 1 : 0;
      CHECK(idle < 1000, "threads wait for each other in different places");
    }
    current = nullptr;
  }

  int thread() const { return running_; }

  // What all lanes of a warp do together: the last to come does it for all, given their arguments.
  template <class Arguments, class F>
  void together(const char* what, Arguments& mine, F&& compute) {
    Warp& warp = warps_[running_ / kLanes];
    const int lane = running_ % kLanes;
    CHECK(warp.num_here == 0 || std::strcmp(warp.what, what) == 0, "%s and %s in one warp",
          warp.what, what);
    warp.what = what;
    warp.arguments[lane] = &mine;
    ++progress_;
    if (++warp.num_here == kLanes) {
      Arguments* all[kLanes];
      for (int i = 0; i < kLanes; ++i) all[i] = static_cast<Arguments*>(warp.arguments[i]);
      compute(all);
      warp.num_here = 0;
      ++warp.turn;
      return;
    }
    for (const int64_t turn = warp.turn; warp.turn == turn;) yield();
  }

  void barrier() {
    ++progress_;
    if (++num_at_barrier_ == kThreads) {
      num_at_barrier_ = 0;
      ++barrier_turn_;
      return;
    }
    for (const int64_t turn = barrier_turn_; barrier_turn_ == turn;) yield();
  }

  char* shared(uint32_t address, uint32_t bytes) {
    CHECK(address % bytes == 0, "address %u of %u bytes", address, bytes);
    CHECK(address >= kBase && address - kBase + bytes <= shared_.size(),
          "address %u of %zu bytes of shared memory", address - kBase, shared_.size());
    return &shared_[address - kBase];
  }

  void copy(uint32_t to, const void* from, int num_bytes) {
    CHECK(reinterpret_cast<uintptr_t>(from) % 16 == 0 || num_bytes == 0, "unaligned copy");
    char* const target = shared(to, 16);
    std::vector<Copy>& open = fibers_[running_].open;
    const bool is_late = random_() % 2 == 0;
    std::memset(target, is_late ? 0xff : 0, 16);
    if (is_late) {
      open.push_back({target, from, num_bytes});
    } else {
      std::memcpy(target, from, static_cast<size_t>(num_bytes));
    }
  }

  void commit() {
    Fiber& fiber = fibers_[running_];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
  }

  void wait(size_t num_left) {
    std::deque<std::vector<Copy>>& groups = fibers_[running_].groups;
    for (; groups.size() > num_left; groups.pop_front()) {
      for (const Copy& c : groups.front()) {
        std::memset(c.to, 0, 16);
        std::memcpy(c.to, c.from, static_cast<size_t>(c.num_bytes));
      }
    }
  }

  inline static EmulatedCta* current = nullptr;
  const uint32_t cta, num_ctas;

 private:
  static constexpr int kStackBytes = 128 << 10;

  struct Copy {
    char* to;
    const void* from;
    int num_bytes;
  };
  struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool is_started = false, is_done = false;
    std::unique_ptr<char[]> stack;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };
  struct Warp {
    int num_here = 0;
    int64_t turn = 0;
    const char* what = "";
    void* arguments[kLanes];
  };

  static void enter() {
    EmulatedCta& cta = *current;
    cta.start_(cta.body_);
    Fiber& fiber = cta.fibers_[cta.running_];
    for (const std::vector<Copy>& group : fiber.groups) {
      CHECK(group.empty(), "a copy that nobody waited for");
    }
    CHECK(fiber.open.empty(), "a copy without a group");
    fiber.is_done = true;
    ++cta.num_done_;
    ++cta.progress_;
    _longjmp(cta.scheduler_, 1);
  }

  void run_warp(int warp, int num_rounds) {
    for (int round = 0; round < num_rounds; ++round) {
      const int first = static_cast<int>(random_() % kLanes), step = random_() % 2 == 0 ? 1 : 31;
      const int64_t before = progress_;
      for (int i = 0; i < kLanes; ++i) resume(warp * kLanes + (first + i * step) % kLanes);
      if (progress_ == before) return;
    }
  }

  void resume(int thread) {
    Fiber& fiber = fibers_[thread];
    if (fiber.is_done) return;
    running_ = thread;
    // The jumps of setjmp, for a switch of contexts costs a system call.
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.is_started) _longjmp(fiber.place, 1);
    fiber.is_started = true;
    setcontext(&fiber.context);
  }

  void yield() {
    if (_setjmp(fibers_[running_].place) == 0) _longjmp(scheduler_, 1);
  }

  void (*start_)(void*) = nullptr;
  void* body_ = nullptr;
  std::vector<char> shared_;
  std::mt19937 random_;
  std::vector<Fiber> fibers_;
  Warp warps_[kWarps];
  jmp_buf scheduler_;
  int running_ = 0, num_done_ = 0, num_at_barrier_ = 0;
  int64_t barrier_turn_ = 0, progress_ = 0;
};

struct EmulatedMachine {
  struct alignas(16) Chunk {
    uint32_t words[4];
  };

  static EmulatedCta& it() { return *EmulatedCta::current; }
  static uint32_t thread() { return static_cast<uint32_t>(it().thread()); }
  static uint32_t opaque(uint32_t x) { return x; }
  static uint32_t cta() { return it().cta; }
  static uint32_t num_ctas() { return it().num_ctas; }
  static uint32_t shared_base() { return EmulatedCta::kBase; }
  static void sync() { it().barrier(); }
  static void sync_warp() {
    int nothing = 0;
    it().together("sync_warp", nothing, [](int**) {});
  }
  static uint32_t atomic_increment(uint32_t* counter) { return (*counter)++; }

  static void cp_async(uint32_t to, const void* from, int bytes) { it().copy(to, from, bytes); }
  static void commit() { it().commit(); }
  static void wait_all_but_one() { it().wait(1); }

  static void ldmatrix(uint32_t (&to)[4], uint32_t from) { load_matrices("ldmatrix", to, from); }
  static void ldmatrix_trans(uint32_t (&to)[4], uint32_t from) {
    load_matrices("ldmatrix.trans", to, from);
  }

  template <class T>
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Arguments {
      float* c;
      const uint32_t* a;
      uint32_t b[2];
    } mine{c, a, {b0, b1}};
    it().together("mma", mine, [](Arguments** lanes) {
      float left[16][16], right[16][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; ++i) {
          const int row = i % 4 < 2 ? g : g + 8, column = 2 * t + i % 2 + (i < 4 ? 0 : 8);
          left[row][column] = half_of<T>(lanes[lane]->a[i / 2], i % 2);
        }
        for (int i = 0; i < 4; ++i) {
          right[2 * t + i % 2 + (i < 2 ? 0 : 8)][g] = half_of<T>(lanes[lane]->b[i / 2], i % 2);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + (i < 2 ? 0 : 8), column = 2 * (lane % 4) + i % 2;
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
          lanes[lane]->c[i] += sum;
        }
      }
    });
  }

  template <class T>
  static uint32_t pack(float low, float high) {
    T first, second;
    from_float(low, first);
    from_float(high, second);
    return first.bits | static_cast<uint32_t>(second.bits) << 16;
  }

  static float exp2(float x) { return std::exp2(x); }
  static float log2(float x) { return std::log2(x); }
  static float max(float a, float b) { return std::fmax(a, b); }
  static float fma(float a, float b, float c) { return std::fma(a, b, c); }
  static float mul(float a, float b) {
    const volatile float rounded = a * b;  // what is volatile is not contracted
    return rounded;
  }
  static float sub(float a, float b) { return a - b; }
  static float quad_max(float x) {
    x = std::fmax(x, shuffle_xor(x, 1));
    return std::fmax(x, shuffle_xor(x, 2));
  }
  static float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
  }

  static void store_word(uint32_t to, uint32_t value) {
    std::memcpy(it().shared(to, 4), &value, 4);
  }
  static uint32_t load_word(uint32_t from) {
    uint32_t value;
    std::memcpy(&value, it().shared(from, 4), 4);
    return value;
  }
  static Chunk load_chunk(uint32_t from) {
    Chunk chunk;
    std::memcpy(&chunk, it().shared(from, 16), 16);
    return chunk;
  }
  static void store_global(void* to, const Chunk& chunk) {
    CHECK(reinterpret_cast<uintptr_t>(to) % 16 == 0, "unaligned store");
    std::memcpy(to, &chunk, 16);
  }

 private:
  template <class T>
  static float half_of(uint32_t word, int which) {
    return to_float(T{static_cast<uint16_t>(word >> (16 * which))});
  }

  static void load_matrices(const char* what, uint32_t (&to)[4], uint32_t from) {
    struct Arguments {
      uint32_t* to;
      uint32_t from;
    } mine{to, from};
    const bool is_transposed = std::strcmp(what, "ldmatrix") != 0;
    it().together(what, mine, [=](Arguments** lanes) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t values[8][8];
        int banks = 0;
        for (int row = 0; row < 8; ++row) {
          const uint32_t address = lanes[8 * matrix + row]->from;
          std::memcpy(values[row], it().shared(address, 16), 16);
          banks |= 1 << (address / 16 % 8);
        }
        CHECK(banks == 0xff, "rows of a matrix share banks: %x", banks);
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          const uint32_t low = is_transposed ? values[2 * t][g] : values[g][2 * t];
          const uint32_t high = is_transposed ? values[2 * t + 1][g] : values[g][2 * t + 1];
          lanes[lane]->to[matrix] = low | high << 16;
        }
      }
    });
  }

  static float shuffle_xor(float x, int mask) {
    struct Arguments {
      float in, out;
    } mine{x, 0};
    it().together("shuffle", mine, [=](Arguments** lanes) {
      for (int lane = 0; lane < 32; ++lane) lanes[lane]->out = lanes[lane ^ mask]->in;
    });
    return mine.out;
  }
};

}  // namespace rapid3rt::cuda
