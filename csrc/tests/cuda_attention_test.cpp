// SPDX-License-Identifier: Apache-2.0
// The sm_80 attention kernel without a GPU: its index functions by themselves, then its very lines
// on an emulated machine, against sums in double. Operands end at a page that cannot be read.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "attention/sm80.h"
#include "cuda_machine.h"

namespace rapid3rt::cuda {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kLowest = -std::numeric_limits<double>::infinity();

// Memory that ends where a page without rights begins. Filled with NaN.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), used = (bytes + page - 1) / page * page;
    length_ = static_cast<size_t>(used + page);
    base_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(base_ != MAP_FAILED, "no memory");
    CHECK(mprotect(base_ + used, static_cast<size_t>(page), PROT_NONE) == 0, "no guard page");
    std::memset(base_, 0xff, static_cast<size_t>(used));
    data = base_ + used - bytes;
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }

  char* data;

 private:
  char* base_;
  size_t length_;
};

// --- index functions ---

template <int kDim>
void rows_of_shared_memory_lie_in_all_banks() {
  using Rows = SharedRows<kDim>;
  std::set<uint32_t> places;
  for (int row = 0; row < 128; ++row) {
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) places.insert(Rows::at(row, chunk));
  }
  CHECK(places.size() == 128 * Rows::kChunks && *places.rbegin() == 128 * Rows::kBytes - 16,
        "%zu places", places.size());
  for (int thread = 0; thread < 128; thread += 8) {  // a copy's eight lanes that go together
    std::set<uint32_t> banks;
    for (int i = thread; i < thread + 8; ++i) {
      banks.insert(Rows::at(i / Rows::kChunks, i % Rows::kChunks) / 16 % 8);
    }
    CHECK(banks.size() == 8, "copies share banks");
  }
  for (int n = 0; n < Rows::kChunks; ++n) {  // words of the output, 32 lanes at once
    std::set<uint32_t> banks;
    for (int lane = 0; lane < 32; ++lane) {
      const auto word = static_cast<uint32_t>(2 * fragment_column(lane));
      banks.insert((Rows::at(fragment_row(lane), n) + word) / 4 % 32);
    }
    CHECK(banks.size() == 32, "stores share banks");
  }
}

template <int kDim>
void moved_addresses_are_those_of_the_place() {
  using Rows = SharedRows<kDim>;
  const uint32_t base = 1024;
  for (int lane = 0; lane < 32; ++lane) {
    for (int rows = 0; rows < 8; ++rows) {
      for (int dims = 0; dims < kDim / 16; ++dims) {
        const int row = 16 * rows + lane % 16, chunk = 2 * dims + lane / 16;
        CHECK(Rows::moved(base + Rows::row_major(lane), rows, dims) == base + Rows::at(row, chunk),
              "lane %d, %d, %d", lane, rows, dims);
        const int key = 16 * rows + lane % 8 + lane / 16 * 8, part = 2 * dims + lane / 8 % 2;
        CHECK(Rows::moved(base + Rows::key_major(lane), rows, dims) == base + Rows::at(key, part),
              "lane %d, %d, %d", lane, rows, dims);
      }
    }
  }
}

// --- work ---

AttentionParams sizes(int64_t rows, int64_t heads, int64_t len_q, int64_t len_kv, int64_t block) {
  AttentionParams p{};
  p.num_rows = rows;
  p.num_heads = heads;
  p.len_q = len_q;
  p.len_kv = len_kv;
  p.block_q = p.block_kv = block;
  p.scale = 1;
  p.allow_skip = true;
  return p;
}

void rows_behind_a_single_token_lie_where_it_does() {
  AttentionParams p = sizes(1, 1, 1, 1, 64);
  p.q_strides.token = p.k_strides.token = p.v_strides.token = 1;  // of a transposed column
  const AttentionParams one = make_call(p, nullptr).params;
  CHECK(one.q_strides.token == 0 && one.k_strides.token == 0 && one.v_strides.token == 0, "moved");
  p.len_q = p.len_kv = 2;
  const AttentionParams two = make_call(p, nullptr).params;
  CHECK(two.q_strides.token == 1 && two.k_strides.token == 1, "strides of two tokens");
}

void work_ids_count_rows_heads_and_blocks() {
  AttentionParams p = sizes(2, 3, 300, 10, 128);
  std::vector<uint8_t> mode = {0, 1, 2, 2, 1, 0};
  p.mode = mode.data();
  const AttentionCall call = make_call(p, nullptr);
  CHECK(call.num_items == 18 && call.num_q == 3, "%u items", call.num_items);
  for (int32_t row = 0, id = 0; row < 2; ++row) {
    for (int32_t head = 0; head < 3; ++head) {
      for (int32_t block = 0; block < 3; ++block, ++id) {
        const Work w = work_at(call, static_cast<uint32_t>(id));
        CHECK(w.row == row && w.head == head && w.first_query == 128 * block, "id %d", id);
        CHECK(w.num_queries == (block < 2 ? 128 : 44), "id %d: %d queries", id, w.num_queries);
        CHECK(static_cast<int>(w.mode) == mode[row * 3 + head], "id %d", id);
      }
    }
  }
  std::vector<int32_t> order(18);
  for (int32_t i = 0; i < 18; ++i) order[i] = 17 - i;
  p.order = order.data();
  p.allow_skip = false;
  const AttentionCall turned = make_call(p, nullptr);
  CHECK(work_at(turned, 17).first_query == 0 && work_at(turned, 0).first_query == 256, "order");
  CHECK(work_at(turned, 17 - 6).mode == Mode::kDense, "nothing may stay unwritten");
  order[3] = 18;
  order[4] = -1;
  CHECK(work_at(turned, 3).mode == Mode::kSkip && work_at(turned, 4).mode == Mode::kSkip,
        "an id out of range is no work");
}

void every_position_is_taken_once() {
  for (const uint32_t num_items : {1u, 5u, 64u, 1000u}) {
    for (const uint32_t num_ctas : {1u, 3u, 132u}) {
      for (const bool is_queue : {false, true}) {
        std::vector<int> taken(num_items);
        uint32_t counter = 0;
        for (uint32_t cta = 0; cta < num_ctas; ++cta) {
          for (uint32_t at = cta; at < num_items;) {
            ++taken[at];
            at = next_position(at, num_ctas, is_queue, is_queue ? counter++ : 0);
          }
        }
        CHECK(std::count(taken.begin(), taken.end(), 1) == num_items, "%u items", num_items);
      }
    }
  }
  // Positions beyond the last do not wrap around.
  const uint32_t last = std::numeric_limits<int32_t>::max();
  CHECK(next_position(last - 1, 528, false, 0) > last, "wrapped");
}

template <int kBlock>
void a_walk_visits_the_listed_keys_that_exist() {
  std::mt19937 random(7);
  for (int round = 0; round < 3000; ++round) {
    const int32_t len_kv = static_cast<int32_t>(random() % 700);
    AttentionParams p = sizes(1, 1, kBlock, len_kv, kBlock);
    const int32_t num_kv = (len_kv + kBlock - 1) / kBlock;
    const int32_t kv_len = static_cast<int32_t>(random() % 800) - 50;
    p.kv_len = round % 3 == 0 ? nullptr : &kv_len;
    std::vector<int32_t> index;
    for (int32_t block = 0; block < num_kv; ++block) {
      if (random() % 2 == 0) index.push_back(block);
    }
    // What no list should hold must lead nowhere.
    if (round % 5 == 0) {
      for (const int32_t wrong : {num_kv, -1, std::numeric_limits<int32_t>::max(),
                                  std::numeric_limits<int32_t>::min(), num_kv + 33554432}) {
        index.push_back(wrong);
      }
    }
    const int32_t listed = static_cast<int32_t>(index.size());
    const int32_t count = round % 7 == 0 ? listed + 3 : round % 11 == 0 ? -2 : listed;
    p.list_len = listed;
    index.push_back(0);  // beyond the list
    p.index = index.data();
    p.count = &count;
    const Mode mode = round % 4 == 0 ? Mode::kDense : Mode::kList;
    const int32_t limit = p.kv_len == nullptr ? len_kv : std::clamp(kv_len, int32_t{0}, len_kv);
    std::vector<int32_t> want, got;
    for (int32_t i = 0; i < (mode == Mode::kDense ? num_kv : std::clamp(count, 0, listed)); ++i) {
      const int64_t block = mode == Mode::kDense ? i : index[i];
      for (int64_t key = block * kBlock; key < block * kBlock + kBlock; ++key) {
        if (key >= 0 && key < limit) want.push_back(static_cast<int32_t>(key));
      }
    }
    KeyWalk<kBlock> walk(p, {0, 0, 0, 1, mode});
    for (Step step = walk.next(); step.num_keys > 0; step = walk.next()) {
      CHECK(step.num_keys <= kStepKeys, "%d keys", step.num_keys);
      for (int32_t i = 0; i < step.num_keys; ++i) got.push_back(step.first + i);
    }
    CHECK(got == want, "round %d: %zu keys, not %zu", round, got.size(), want.size());
    CHECK(walk.next().num_keys == 0, "a walk that is over stays so");
  }
  const AttentionParams without = sizes(1, 1, kBlock, 300, kBlock);
  CHECK(KeyWalk<kBlock>(without, {0, 0, 0, 1, Mode::kList}).next().num_keys == 0, "no lists");
}

// --- the kernel ---

struct Case {
  int64_t num_rows, num_heads, len_q, len_kv;
  double density;
  float scale;
  bool is_ragged = false, has_order = false, allow_skip = true, shares_lists = false;
};

// How it is run, which must not matter.
struct Run {
  bool is_queue;
  uint32_t num_ctas, seed;
};

struct Result {
  std::vector<uint16_t> out;
  std::vector<float> lse;
};

// q, k, v and out are [rows, tokens, heads, kDim + 8]; the gaps and all keys that may not be read
// are NaN, and memory ends with the last key that may be read.
template <class T, int kDim, int kBlock>
class Problem {
 public:
  Problem(const Case& c, uint32_t seed)
      : c_(c),
        random_(seed),
        kv_len_(make_lengths()),
        q_(bytes(c.num_rows * c.len_q)),
        k_(bytes((c.num_rows - 1) * c.len_kv + kv_len_.back())),
        v_(bytes((c.num_rows - 1) * c.len_kv + kv_len_.back())) {
    for (int64_t row = 0; row < c.num_rows; ++row) {
      fill(q_, row * c.len_q, c.len_q);
      fill(k_, row * c.len_kv, kv_len_[row]);
      fill(v_, row * c.len_kv, kv_len_[row]);
    }
    make_lists();
  }

  Result run(const Run& r, bool has_lse = true) {
    Result result{std::vector<uint16_t>(c_.num_rows * c_.len_q * token(), 0xffff),
                  std::vector<float>(c_.num_rows * c_.num_heads * c_.len_q, kNan)};
    AttentionParams p = sizes(c_.num_rows, c_.num_heads, c_.len_q, c_.len_kv, kBlock);
    p.out = result.out.data();
    p.lse = has_lse ? result.lse.data() : nullptr;
    p.q = q_.data;
    p.k = k_.data;
    p.v = v_.data;
    p.mode = mode_.data();
    p.count = count_.data();
    p.index = index_.data();
    p.order = c_.has_order ? order_.data() : nullptr;
    p.kv_len = c_.is_ragged ? kv_len_.data() : nullptr;
    p.out_strides = p.q_strides = {c_.len_q * token(), kDim + 8, token()};
    p.k_strides = p.v_strides = {c_.len_kv * token(), kDim + 8, token()};
    p.head_dim = kDim;
    p.list_len = list_len();
    p.count_row = c_.shares_lists ? 0 : c_.num_heads * num_q();
    p.count_head = c_.shares_lists ? 0 : num_q();
    p.index_strides = {p.count_row * list_len(), p.count_head * list_len(), list_len()};
    p.scale = c_.scale;
    p.allow_skip = c_.allow_skip;
    uint32_t counter = 0;
    const AttentionCall call = make_call(p, r.is_queue ? &counter : nullptr);
    using Kernel = Sm80Attention<EmulatedMachine, T, kDim, kBlock>;
    for (uint32_t cta = 0; cta < r.num_ctas; ++cta) {
      EmulatedCta emulated(Kernel::kSharedBytes, cta, r.num_ctas, r.seed + cta);
      emulated.run([&] { Kernel(call).run(); });
    }
    return result;
  }

  void check(const Result& got) const {
    for (int64_t row = 0; row < c_.num_rows; ++row) {
      for (int64_t head = 0; head < c_.num_heads; ++head) {
        for (int64_t i = 0; i < c_.len_q; ++i) check_query(got, row, head, i);
      }
    }
  }

  // Where one logit is far above all others its value is the output. Dense problems of one row.
  void check_largest(const Result& got) const {
    const double rounding = std::is_same_v<T, float16> ? 0x1p-11 : 0x1p-8;
    int64_t sure = 0;
    for (int64_t head = 0; head < c_.num_heads; ++head) {
      for (int64_t i = 0; i < c_.len_q; ++i) {
        double top = kLowest, second = kLowest;
        int64_t largest = 0;
        for (int64_t key = 0; key < c_.len_kv; ++key) {
          double sum = 0;
          for (int64_t d = 0; d < kDim; ++d) {
            sum += double(element(q_, c_.len_q, 0, head, i, d)) *
                   element(k_, c_.len_kv, 0, head, key, d);
          }
          if (sum > top)
            second = top, top = sum, largest = key;
          else
            second = std::max(second, sum);
        }
        const float lse = got.lse[head * c_.len_q + i];
        CHECK(std::fabs(lse - top * c_.scale) <= 1e-5 * std::fabs(top * c_.scale),
              "lse of query %ld is %g, not %g", long(i), lse, top * c_.scale);
        if (top - second <= 1e-4 * std::fabs(top)) continue;
        ++sure;
        for (int64_t d = 0; d < kDim; ++d) {
          const double want = element(v_, c_.len_kv, 0, head, largest, d);
          const double value = to_float(T{got.out[i * token() + head * (kDim + 8) + d]});
          CHECK(std::fabs(value - want) <= 4 * rounding * std::fabs(want),
                "output of query %ld, channel %ld is %g, not %g", long(i), long(d), value, want);
        }
      }
    }
    CHECK(10 * sure > 9 * c_.num_heads * c_.len_q, "%ld queries are sure", long(sure));
  }

  // The first `num_keys` keys get logits of -inf from every query.
  void hide(int64_t num_keys) {
    for (int64_t i = 0; i < c_.num_rows * c_.len_q * token(); i += kDim + 8) {
      from_float(1.0f, q_.as<T>()[i]);
    }
    for (int64_t i = 0; i < num_keys * token(); i += kDim + 8) {
      from_float(-std::numeric_limits<float>::infinity(), k_.as<T>()[i]);
    }
  }

  void make_all_dense() { std::fill(mode_.begin(), mode_.end(), uint8_t{0}); }
  void make_all_full_lists() {
    std::fill(mode_.begin(), mode_.end(), uint8_t{1});
    std::fill(count_.begin(), count_.end(), static_cast<int32_t>(num_kv()));
    for (size_t i = 0; i < index_.size(); ++i) {
      index_[i] = static_cast<int32_t>(i % static_cast<size_t>(list_len()));
    }
  }

 private:
  int64_t num_q() const { return ceil_div(c_.len_q, kBlock); }
  int64_t num_kv() const { return ceil_div(c_.len_kv, kBlock); }
  int64_t list_len() const { return std::max<int64_t>(num_kv(), 1); }
  int64_t token() const { return c_.num_heads * (kDim + 8); }
  int64_t bytes(int64_t tokens) const { return tokens == 0 ? 0 : 2 * (tokens * token() - 8); }

  std::vector<int32_t> make_lengths() {
    std::vector<int32_t> lengths(c_.num_rows, static_cast<int32_t>(c_.len_kv));
    if (!c_.is_ragged) return lengths;
    for (int32_t& n : lengths) n = static_cast<int32_t>(random_() % (c_.len_kv + 1));
    return lengths;
  }

  void fill(Guarded& memory, int64_t first, int64_t tokens) {
    std::normal_distribution<float> normal;
    T* const data = memory.as<T>();
    for (int64_t i = first; i < first + tokens; ++i) {
      for (int64_t head = 0; head < c_.num_heads; ++head) {
        for (int64_t d = 0; d < kDim; ++d) {
          from_float(normal(random_), data[i * token() + head * (kDim + 8) + d]);
        }
      }
    }
  }

  void make_lists() {
    for (int64_t i = 0; i < c_.num_rows * c_.num_heads; ++i) {
      mode_.push_back(static_cast<uint8_t>(random_() % 8 == 0 ? 2 : random_() % 4 != 0));
    }
    std::bernoulli_distribution listed(c_.density);
    const int64_t lists = num_q() * (c_.shares_lists ? 1 : c_.num_rows * c_.num_heads);
    index_.assign(lists * list_len(), std::numeric_limits<int32_t>::max());
    for (int64_t i = 0; i < lists; ++i) {
      int32_t count = 0;
      for (int64_t block = 0; block < num_kv(); ++block) {
        if (listed(random_)) index_[i * list_len() + count++] = static_cast<int32_t>(block);
      }
      count_.push_back(count);
    }
    order_.resize(c_.num_rows * c_.num_heads * num_q());
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), random_);
  }

  float element(const Guarded& memory, int64_t tokens, int64_t row, int64_t head, int64_t i,
                int64_t d) const {
    return to_float(memory.as<T>()[(row * tokens + i) * token() + head * (kDim + 8) + d]);
  }

  std::vector<int64_t> keys_of(int64_t row, int64_t head, int64_t query) const {
    const int64_t list =
        (c_.shares_lists ? 0 : (row * c_.num_heads + head) * num_q()) + query / kBlock;
    const auto begin = index_.begin() + list * list_len();
    std::vector<int64_t> keys;
    for (int64_t key = 0; key < kv_len_[row]; ++key) {
      if (mode_[row * c_.num_heads + head] != 1 ||
          std::count(begin, begin + count_[list], key / kBlock) != 0) {
        keys.push_back(key);
      }
    }
    return keys;
  }

  // An output may be off by its own rounding, and by those of all weights.
  void check_query(const Result& got, int64_t row, int64_t head, int64_t i) const {
    const double rounding = std::is_same_v<T, float16> ? 0x1p-11 : 0x1p-8;
    const uint16_t* const out = &got.out[(row * c_.len_q + i) * token() + head * (kDim + 8)];
    const float lse = got.lse[(row * c_.num_heads + head) * c_.len_q + i];
    for (int64_t d = kDim; d < kDim + 8; ++d) CHECK(out[d] == 0xffff, "a gap was written");
    if (mode_[row * c_.num_heads + head] == 2 && c_.allow_skip) {
      for (int64_t d = 0; d < kDim; ++d) CHECK(out[d] == 0xffff, "a skipped head was written");
      CHECK(std::isnan(lse), "a skipped lse was written");
      return;
    }
    std::vector<int64_t> keys = keys_of(row, head, i);
    std::vector<double> weights;
    double top = kLowest, total = 0, largest = 0;
    for (const int64_t key : keys) {
      double sum = 0, size = 0;
      for (int64_t d = 0; d < kDim; ++d) {
        const double product = double(element(q_, c_.len_q, row, head, i, d)) *
                               element(k_, c_.len_kv, row, head, key, d);
        sum += product;
        size += std::fabs(product);
      }
      weights.push_back(sum * c_.scale);
      top = std::max(top, sum * c_.scale);
      if (std::isfinite(sum)) largest = std::max(largest, size * std::fabs(c_.scale));
    }
    if (top == kLowest) keys.clear(), weights.clear();
    for (double& w : weights) total += w = std::exp(w - top);
    // A logit may be off by a few roundings of float, which scales its weight.
    const double slack = 0x1p-21 * (1 + largest);
    const double want_lse = top + std::log(total);
    CHECK(keys.empty() ? lse == want_lse : std::fabs(lse - want_lse) <= slack + 1e-5,
          "lse of row %ld, head %ld, query %ld is %g, not %g", long(row), long(head), long(i), lse,
          want_lse);
    for (int64_t d = 0; d < kDim; ++d) {
      double want = 0, size = 0;
      for (size_t j = 0; j < keys.size(); ++j) {
        const double value = element(v_, c_.len_kv, row, head, keys[j], d);
        want += weights[j] / total * value;
        size += weights[j] / total * std::fabs(value);
      }
      // Weights below 2^-14 are rounded to multiples of 2^-24 in float16.
      const double bound =
          1.01 * rounding * (std::fabs(want) + size) + 2 * slack * size + 4 * keys.size() * 0x1p-25;
      const double value = to_float(T{out[d]});
      CHECK(std::fabs(value - want) <= bound,
            "output of row %ld, head %ld, query %ld, channel %ld is %g, not %g", long(row),
            long(head), long(i), long(d), value, want);
    }
  }

  Case c_;
  std::mt19937 random_;
  std::vector<int32_t> kv_len_;
  Guarded q_, k_, v_;
  std::vector<uint8_t> mode_;
  std::vector<int32_t> count_, index_, order_;
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <class T, int kDim, int kBlock>
void attention_is_right_and_reads_nothing_else(uint32_t seed) {
  const float scale = 1 / std::sqrt(float(kDim));
  const Case cases[] = {
      {1, 1, 1, 1, 1.0, scale},
      {1, 2, 70, 63, 1.0, scale, false, true},
      {2, 2, 129, 129, 0.5, scale, true, true},
      {1, 3, 40, 260, 0.6, -scale, true},
      {2, 1, 64, 200, 0.4, 30 * scale, false, false, false},
      {2, 3, 65, 191, 0.7, scale, true, true, true, true},
      {1, 1, 200, 65, 0.0, scale},
      {1, 2, 130, 128, 0.8, 0.0f, true, true, false},
      {2, 2, 3, 0, 0.5, scale},
  };
  for (const Case& c : cases) {
    Problem<T, kDim, kBlock> problem(c, seed++);
    const Result queue = problem.run({true, 1 + seed % 3, seed});
    problem.check(queue);
    const Result fixed = problem.run({false, 1 + (seed + 1) % 3, seed + 77});
    CHECK(queue.out == fixed.out && same(queue.lse, fixed.lse), "the schedule changes the result");
    CHECK(problem.run({true, 1, seed}, false).out == queue.out, "lse changes the output");
  }
}

template <class T, int kDim, int kBlock>
void a_full_list_is_dense_attention() {
  Problem<T, kDim, kBlock> problem({1, 2, 100, 203, 0.5f, 0.1f, true}, 5);
  problem.make_all_dense();
  const Result dense = problem.run({true, 2, 1});
  problem.check(dense);
  problem.make_all_full_lists();
  const Result listed = problem.run({true, 1, 2});
  CHECK(dense.out == listed.out && same(dense.lse, listed.lse), "a full list is not dense");
}

template <class T, int kDim, int kBlock>
void logits_may_be_infinite() {
  Problem<T, kDim, kBlock> problem({1, 2, 40, 150, 1.0, 0.1f}, 6);
  problem.hide(100);  // the first step and a part of the next
  problem.check(problem.run({true, 1, 1}));
  problem.hide(150);
  problem.check(problem.run({true, 1, 2}));
}

// From 1e9 on a float is more than an exponent away from the next: weights are 0 or 1.
template <class T, int kDim, int kBlock>
void huge_logits_choose_the_largest() {
  for (const float scale : {1e7f, 1e8f, 1e9f, 1e10f, 1e20f, 1e34f}) {
    Problem<T, kDim, kBlock> problem({1, 2, 40, 300, 1.0, scale}, 7);
    problem.make_all_dense();
    problem.check_largest(problem.run({true, 1, 1}));
  }
}

template <class T, int kDim>
void both_blocks(uint32_t seed) {
  attention_is_right_and_reads_nothing_else<T, kDim, 64>(seed);
  attention_is_right_and_reads_nothing_else<T, kDim, 128>(seed + 1000);
  a_full_list_is_dense_attention<T, kDim, 64>();
  a_full_list_is_dense_attention<T, kDim, 128>();
  logits_may_be_infinite<T, kDim, 64>();
  logits_may_be_infinite<T, kDim, 128>();
  huge_logits_choose_the_largest<T, kDim, 64>();
  huge_logits_choose_the_largest<T, kDim, 128>();
}

}  // namespace
}  // namespace rapid3rt::cuda

int main(int argc, char** argv) {
  using namespace rapid3rt;
  using namespace rapid3rt::cuda;
  rows_of_shared_memory_lie_in_all_banks<64>();
  rows_of_shared_memory_lie_in_all_banks<128>();
  moved_addresses_are_those_of_the_place<64>();
  moved_addresses_are_those_of_the_place<128>();
  rows_behind_a_single_token_lie_where_it_does();
  work_ids_count_rows_heads_and_blocks();
  every_position_is_taken_once();
  a_walk_visits_the_listed_keys_that_exist<64>();
  a_walk_visits_the_listed_keys_that_exist<128>();
  const auto seed = static_cast<uint32_t>(argc > 1 ? std::atoi(argv[1]) : 0);
  both_blocks<bfloat16, 64>(seed + 10);
  both_blocks<bfloat16, 128>(seed + 20);
  both_blocks<float16, 64>(seed + 30);
  both_blocks<float16, 128>(seed + 40);
  std::printf("cuda attention: ok\n");
}
