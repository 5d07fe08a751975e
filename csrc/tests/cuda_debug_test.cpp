// SPDX-License-Identifier: Apache-2.0
// A debug build of the CUDA ops stops at an id, a list entry or a length that is out of range; at
// the last one in range it does not. Each call in a process of its own, on emulated CTAs.
#undef NDEBUG
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

#include "../cuda/attention/work.h"
#include "../cuda/ops.h"
#include "check.h"
#include "cuda_buffers.h"

namespace rapid3rt {
namespace {

constexpr cuda::Launch kLaunch = {0, nullptr};
constexpr int64_t kTotal = 3, kTokens = 2, kWidth = 8, kRow = kTokens * kWidth;
constexpr float kOnes[2] = {1.0f, 1.0f};

struct Shape {
  DType dtype = DType::kFloat32;
  int skip = 0;
};

// Two rows, the second with the id.
void gather(int32_t id) {
  Buffer x(kTotal * kRow, Shape{}, 1), out(2 * kRow, Shape{});
  const int32_t ids[2] = {0, id};
  cuda::gather_rows({out.data(), x.data(), ids, 2, kTotal, 4 * kRow, 1}, kLaunch);
}

void scatter(int32_t id) {
  Buffer x(2 * kRow, Shape{}, 1), out(kTotal * kRow, Shape{});
  const int32_t ids[2] = {0, id};
  cuda::scatter_rows({out.data(), x.data(), ids, 2, kTotal, 4 * kRow, 1}, kLaunch);
}

void look_up(int32_t slot, bool is_normed) {
  Buffer x(2 * kRow, Shape{}, 1), slots(kTotal * kRow, Shape{}, 2), out(2 * kRow, Shape{});
  Buffer scale(2 * kWidth, Shape{}, 3), shift(2 * kWidth, Shape{}, 4);
  const int32_t ids[2] = {0, slot};
  LookupParams p{out.data(), x.data(), slots.data(), ids, kOnes,   nullptr, nullptr,
                 1e-6f,      2,        kTotal,       1,   kTokens, kWidth,  DType::kFloat32,
                 1};
  if (is_normed) p.scale = scale.data(), p.shift = shift.data();
  cuda::cache_lookup(p, kLaunch);
}

void store(int32_t slot) {
  Buffer out(2 * kRow, Shape{}, 1), embedded(2 * kRow, Shape{}, 2);
  Buffer slots(kTotal * kRow, Shape{}, 3), stats(6, Shape{});
  const int32_t ids[2] = {0, slot};
  const StoreParams p{reinterpret_cast<float*>(stats.data()),
                      slots.data(),
                      out.data(),
                      embedded.data(),
                      ids,
                      kOnes,
                      2,
                      kTotal,
                      1,
                      kTokens,
                      kWidth,
                      DType::kFloat32,
                      1};
  const auto workspace = make_memory(cuda::store_workspace_bytes(p));
  cuda::cache_store(p, workspace.get(), kLaunch);
}

// Attention: what a CTA reads of the lists. 130 keys are three blocks of 64.
struct Lists {
  int32_t order = 0, count = 1, entry = 0, kv_len = 130;
};

void walk(const Lists& lists) {
  const uint8_t mode = 1;
  AttentionParams p{};
  p.num_rows = p.num_heads = 1;
  p.len_q = 64;
  p.len_kv = 130;
  p.block_q = p.block_kv = 64;
  p.list_len = 1;
  p.mode = &mode;
  p.order = &lists.order;
  p.count = &lists.count;
  p.index = &lists.entry;
  p.kv_len = &lists.kv_len;
  const cuda::AttentionCall call = cuda::make_call(p, nullptr);
  cuda::KeyWalk<64> keys(p, cuda::work_at(call, 0));
  while (keys.next().num_keys > 0) continue;
}

// Whether an assertion ends a process that does it; what it says is not shown.
template <class Body>
bool stops(const Body& body) {
  const pid_t child = fork();
  CHECK(child >= 0, "no process");
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(2);
    body();
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child, "no status");
  const bool is_stopped = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
  CHECK(is_stopped || (WIFEXITED(status) && WEXITSTATUS(status) == 0), "status %d", status);
  return is_stopped;
}

template <class Body>
void stops_outside(const char* what, int32_t first, int32_t last, const Body& body) {
  for (const int32_t id : {first, last}) {
    CHECK(!stops([&] { body(id); }), "%s: %d is in range", what, id);
  }
  for (const int32_t id : {first - 1, last + 1}) {
    CHECK(stops([&] { body(id); }), "%s: %d is out of range", what, id);
  }
}

}  // namespace
}  // namespace rapid3rt

int main() {
  using namespace rapid3rt;
  stops_outside("gather_rows", 0, kTotal - 1, gather);
  stops_outside("scatter_rows", 0, kTotal - 1, scatter);
  stops_outside("cache_lookup", 0, kTotal - 1, [](int32_t slot) { look_up(slot, false); });
  stops_outside("cache_lookup_norm", 0, kTotal - 1, [](int32_t slot) { look_up(slot, true); });
  stops_outside("cache_store", 0, kTotal - 1, store);
  stops_outside("order", 0, 0, [](int32_t id) { walk({id}); });
  stops_outside("count", 0, 1, [](int32_t count) { walk({0, count}); });
  stops_outside("index", 0, 2, [](int32_t entry) { walk({0, 1, entry}); });
  stops_outside("kv_len", 0, 130, [](int32_t len) { walk({0, 1, 0, len}); });
  std::printf("debug build: ok\n");
}
