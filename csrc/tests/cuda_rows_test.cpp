// SPDX-License-Identifier: Apache-2.0
// The memory-bound CUDA ops on emulated CTAs (emulated/cuda_runtime.h) against their CPU twins: bit
// for bit but for norms and statistics, on buffers of their exact size, at odd addresses and
// widths, with threads and CTAs in several orders. An address sanitizer sees what is touched beside
// the buffers.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../cpu/ops.h"
#include "../cuda/ops.h"
#include "../cuda/rowwise.h"
#include "check.h"
#include "cuda_buffers.h"
#include "cuda_runtime.h"

namespace rapid3rt {
namespace {

constexpr cuda::Launch kLaunch = {0, nullptr};
constexpr int64_t kRows = 3, kSlots = 5, kOrders = 3;
const int32_t kSlot[kRows] = {4, 0, 2};

// What each op leaves behind. skip: elements between an aligned address and the tensors.
struct Results {
  std::vector<std::vector<char>> exact;
  std::vector<Buffer> close;  // norms
  std::vector<float> stats;
};

struct Shape {
  int64_t tokens, width;
  DType dtype;
  int skip;

  int64_t row() const { return tokens * width; }
};

struct Ops {
  void (*lookup)(const LookupParams&);
  void (*store)(const StoreParams&);
  void (*gather)(const RowsParams&);
  void (*scatter)(const RowsParams&);
  void (*norm)(const ModulateParams&);
  void (*gate)(const GateParams&);
};

const Ops kCpu = {cache_lookup, cache_store,   gather_rows,
                  scatter_rows, norm_modulate, gate_residual};
const Ops kCuda = {
    [](const LookupParams& p) { cuda::cache_lookup(p, kLaunch); },
    [](const StoreParams& p) {
      const auto workspace = make_memory(cuda::store_workspace_bytes(p));
      cuda::cache_store(p, workspace.get(), kLaunch);
    },
    [](const RowsParams& p) { cuda::gather_rows(p, kLaunch); },
    [](const RowsParams& p) { cuda::scatter_rows(p, kLaunch); },
    [](const ModulateParams& p) { cuda::norm_modulate(p, kLaunch); },
    [](const GateParams& p) { cuda::gate_residual(p, kLaunch); },
};

void run_lookups(const Ops& ops, const Shape& s, Results& results) {
  Buffer x(kRows * s.row(), s, 1), slots(kSlots * kOrders * s.row(), s, 3);
  Buffer scale(kRows * s.width, s, 4), shift(kRows * s.width, s, 5);
  // A whole row without cached terms, and poison in every order that is not read.
  const float coef[kRows * kOrders] = {1.0f, 0.0f, -0.5f, 0.25f, 2.0f, 1.0f, 0.0f, 0.0f, 0.0f};
  slots.poison((kSlot[0] * kOrders + 1) * s.row(), s.row());
  slots.poison(kSlot[2] * kOrders * s.row(), kOrders * s.row());
  Buffer looked_up(kRows * s.row(), s), normed(kRows * s.row(), s);
  LookupParams p{looked_up.data(), x.data(), slots.data(), kSlot,   coef,
                 nullptr,          nullptr,  0.0f,         kRows,   kSlots,
                 kOrders,          s.tokens, s.width,      s.dtype, 1};
  ops.lookup(p);
  results.exact.push_back(looked_up.bytes());
  p.out = normed.data();
  p.scale = scale.data();
  p.shift = shift.data();
  p.eps = 1e-6f;
  ops.lookup(p);
  results.close.push_back(std::move(normed));
}

void run_modulation(const Ops& ops, const Shape& s, Results& results) {
  Buffer x(kRows * s.row(), s, 1), y(kRows * s.row(), s, 2);
  Buffer scale(kRows * s.width, s, 4), shift(kRows * s.width, s, 5);
  Buffer weight(s.width, s, 6), bias(s.width, s, 7);
  Buffer gated(kRows * s.row(), s);
  for (const bool rms : {false, true}) {
    for (const bool affine : {false, true}) {
      Buffer out(kRows * s.row(), s);
      ops.norm({out.data(), x.data(), scale.data(), shift.data(), affine ? weight.data() : nullptr,
                affine ? bias.data() : nullptr, 1e-6f, rms, kRows, s.tokens, s.width, s.dtype, 1});
      results.close.push_back(std::move(out));
    }
  }
  ops.gate({gated.data(), x.data(), scale.data(), y.data(), kRows, s.tokens, s.width, s.dtype, 1});
  results.exact.push_back(gated.bytes());
}

void run_copies(const Ops& ops, const Shape& s, Results& results) {
  Buffer x(kSlots * s.row(), s, 3), gathered(kRows * s.row(), s), scattered(kSlots * s.row(), s);
  const int64_t row_bytes = s.row() * element_bytes(s.dtype);
  ops.gather({gathered.data(), x.data(), kSlot, kRows, kSlots, row_bytes, 1});
  ops.scatter({scattered.data(), gathered.data(), kSlot, kRows, kSlots, row_bytes, 1});
  results.exact.push_back(gathered.bytes());
  results.exact.push_back(scattered.bytes());  // slots 1 and 3 keep their poison
}

void run_store(const Ops& ops, const Shape& s, Results& results) {
  Buffer out(kRows * s.row(), s, 1), embedded(kRows * s.row(), s, 2);
  Buffer slots(kSlots * kOrders * s.row(), s, 3);
  slots.poison(kSlot[1] * kOrders * s.row(), kOrders * s.row());  // without history: not read
  const float gap[kRows] = {0.5f, 0.0f, -0.3f};
  results.stats.assign(kRows * 3, std::nanf(""));
  ops.store({results.stats.data(), slots.data(), out.data(), embedded.data(), kSlot, gap, kRows,
             kSlots, kOrders, s.tokens, s.width, s.dtype, 1});
  results.exact.push_back(slots.bytes());
}

Results run_all(const Ops& ops, const Shape& s) {
  Results results;
  run_lookups(ops, s, results);
  run_modulation(ops, s, results);
  run_copies(ops, s, results);
  run_store(ops, s, results);
  return results;
}

// Half a unit in the last place of 1, and what float sums in another order may add.
double tolerance(DType dtype) {
  const double rounding = dtype == DType::kFloat32    ? 0.0
                          : dtype == DType::kBFloat16 ? 1.0 / 128
                                                      : 1.0 / 1024;
  return rounding + 2e-5;
}

void compare(const char* what, const Results& got, const Results& want, const Shape& s) {
  for (size_t i = 0; i < want.exact.size(); ++i) {
    CHECK(got.exact[i] == want.exact[i], "%s: tensor %d, %d tokens of %d, dtype %d, skip %d", what,
          int(i), int(s.tokens), int(s.width), int(s.dtype), s.skip);
  }
  for (size_t i = 0; i < want.close.size(); ++i) {
    for (int64_t j = 0; j < kRows * s.row(); ++j) {
      const double a = got.close[i].value(j), b = want.close[i].value(j);
      CHECK(std::abs(a - b) <= tolerance(s.dtype) * (1 + std::abs(b)),
            "%s: norm %d, %d tokens of %d, dtype %d, element %d is %g, not %g", what, int(i),
            int(s.tokens), int(s.width), int(s.dtype), int(j), a, b);
    }
  }
  for (size_t i = 0; i < want.stats.size(); ++i) {
    const double a = got.stats[i], b = want.stats[i];
    CHECK(std::abs(a - b) <= 2e-6 * (1 + std::abs(b)), "%s: statistic %d is %g, not %g", what,
          int(i), a, b);
  }
}

bool same_bits(const Results& a, const Results& b) {
  if (a.exact != b.exact) return false;
  for (size_t i = 0; i < a.close.size(); ++i) {
    if (a.close[i].bytes() != b.close[i].bytes()) return false;
  }
  return std::memcmp(a.stats.data(), b.stats.data(), a.stats.size() * sizeof(float)) == 0;
}

void ops_match_their_twins(const Shape& s) {
  const Results want = run_all(kCpu, s);
  emulated::set_order(emulated::Order::kAscending);
  const Results got = run_all(kCuda, s);
  compare("ascending", got, want, s);
  for (const auto order : {emulated::Order::kDescending, emulated::Order::kShuffled}) {
    emulated::set_order(order);
    CHECK(same_bits(run_all(kCuda, s), got), "the order of threads changes bits, width %d",
          int(s.width));
  }
  // Neither does an address.
  emulated::set_order(emulated::Order::kAscending);
  Shape moved = s;
  moved.skip = 1;
  CHECK(same_bits(run_all(kCuda, moved), got), "an address changes bits, width %d", int(s.width));
}

void sizes_of_nothing_do_nothing() {
  for (const auto& [tokens, width] : {std::pair{0, 8}, std::pair{4, 0}}) {
    const Results results = run_all(kCuda, {tokens, width, DType::kFloat32, 0});
    for (const float value : results.stats) CHECK(value == 0.0f, "statistic %g", value);
  }
  kCuda.lookup({nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0.0f, 0, 1, 1, 4, 8,
                DType::kFloat32, 1});
  kCuda.store(
      {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 1, 1, 4, 8, DType::kFloat32, 1});
  kCuda.gather({nullptr, nullptr, nullptr, 0, 4, 16, 1});
  kCuda.norm({nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0.0f, false, 0, 4, 8,
              DType::kFloat32, 1});
  kCuda.gate({nullptr, nullptr, nullptr, nullptr, 0, 4, 8, DType::kFloat32, 1});
}

void a_small_spread_about_a_large_mean_is_seen() {
  const Shape s = {40, 300, DType::kFloat32, 0};
  Buffer out(s.row(), s, 1), embedded(s.row(), s), slots(s.row(), s);
  double mean = 0, spread = 0;
  for (int64_t i = 0; i < s.row(); ++i) {
    out.set(i, 1000.0f + 0.01f * static_cast<float>(out.value(i)));
    embedded.set(i, 0.0f);
    mean += out.value(i) / static_cast<double>(s.row());
  }
  for (int64_t i = 0; i < s.row(); ++i) spread += std::pow(out.value(i) - mean, 2);
  const double deviation = std::sqrt(spread / static_cast<double>(s.row()));
  const int32_t slot = 0;
  const float gap = 0.0f;
  float stats[3];
  kCuda.store({stats, slots.data(), out.data(), embedded.data(), &slot, &gap, 1, 1, 1, s.tokens,
               s.width, s.dtype, 1});
  CHECK(std::abs(stats[1] - mean) <= 1e-7 * mean, "mean %.9g, not %.9g", stats[1], mean);
  CHECK(std::abs(stats[2] - deviation) <= 1e-5 * deviation, "%g, not %g", stats[2], deviation);
}

void an_infinite_residual_keeps_its_mean() {
  const Shape s = {40, 300, DType::kFloat32, 0};
  Buffer out(s.row(), s, 1), embedded(s.row(), s, 2), slots(s.row(), s);
  out.set(7, INFINITY);
  const int32_t slot = 0;
  const float gap = 0.0f;
  float stats[3];
  kCuda.store({stats, slots.data(), out.data(), embedded.data(), &slot, &gap, 1, 1, 1, s.tokens,
               s.width, s.dtype, 1});
  CHECK(stats[0] == 0.0f && stats[1] == INFINITY && std::isnan(stats[2]), "%g %g %g", stats[0],
        stats[1], stats[2]);
}

// Every element of a token belongs to one thread, whatever the width; CTAs stay within limits.
void shapes_cover_a_token() {
  for (int64_t vectors = 1; vectors <= 5000; ++vectors) {
    const cuda::TokenShape t = cuda::token_shape(vectors);
    const int threads = t.threads * t.tokens;
    CHECK(t.threads % 32 == 0 && threads <= cuda::kTokenThreads, "%d threads", threads);
    CHECK(t.items == 0 || int64_t{t.threads} * t.items >= vectors, "%d vectors", int(vectors));
    CHECK(t.items != 4 || vectors > cuda::kTokenThreads, "%d vectors", int(vectors));
    const cuda::ColumnShape c = cuda::column_shape(vectors);
    CHECK(c.threads % 32 == 0 && c.threads * c.tokens <= 256 && c.tokens >= 1, "%d threads",
          c.threads);
    CHECK(c.threads * c.tiles >= vectors && c.threads * (c.tiles - 1) < vectors, "%d vectors",
          int(vectors));
  }
}

void pieces_count_up_and_grids_have_a_limit() {
  uint32_t block = 0;
  for (uint32_t row = 0; row < 5; ++row) {
    for (uint32_t piece = 0; piece < 7; ++piece, ++block) {
      const cuda::Piece at = cuda::piece_of(block, 7);
      CHECK(at.row == row && at.piece == piece, "block %u", block);
    }
  }
  CHECK(cuda::grid_size(0x7fffffff, 1) == 0x7fffffff, "the largest grid");
  bool is_refused = false;
  try {
    cuda::grid_size(0x10000, 0x8000);
  } catch (const std::invalid_argument&) {
    is_refused = true;
  }
  CHECK(is_refused, "a grid of 2^31 CTAs");
  for (int64_t at = 0; at < 12; ++at) {
    int before = 0;
    for (int64_t j = at; j < at + 4; ++j) before += j < 9;
    CHECK(cuda::lanes_before(at, 9, 4) == before, "lanes from %d", int(at));
  }
}

}  // namespace
}  // namespace rapid3rt

int main() {
  using namespace rapid3rt;
  shapes_cover_a_token();
  pieces_count_up_and_grids_have_a_limit();
  sizes_of_nothing_do_nothing();
  a_small_spread_about_a_large_mean_is_seen();
  an_infinite_residual_keeps_its_mean();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t width : {1, 7, 8, 16, 203, 264}) ops_match_their_twins({5, width, dtype, 0});
    ops_match_their_twins({70, 128, dtype, 0});
  }
  // More vectors than threads, and more than registers hold.
  ops_match_their_twins({1, 2056, DType::kFloat32, 0});
  ops_match_their_twins({1, 4104, DType::kBFloat16, 0});
  ops_match_their_twins({1, 16400, DType::kFloat16, 0});
  ops_match_their_twins({1, 8205, DType::kFloat32, 0});
  std::puts("cuda rows: ok");
  return 0;
}
