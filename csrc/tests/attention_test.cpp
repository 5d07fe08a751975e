// SPDX-License-Identifier: Apache-2.0
// block_sparse_attention without Python, for sanitizers: every instruction set that this machine
// has, against sums in double. Operands end at a page that cannot be read, so that a vector that
// reaches beyond the last key that may be read is a crash, whatever a sanitizer instruments.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "isa.h"
#include "ops.h"

namespace rapid3rt {

double exp2_error_avx2(int degree);
double exp2_error_avx512(int degree);

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Memory that ends where a page without rights begins. Filled with NaN.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), used = (bytes + page - 1) / page * page;
    length_ = used + page;
    base_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(base_ != MAP_FAILED, "no memory");
    CHECK(mprotect(base_ + used, page, PROT_NONE) == 0, "no guard page");
    std::memset(base_, 0xff, used);
    data = base_ + used - bytes;
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data;

 private:
  char* base_;
  int64_t length_;
};

struct Case {
  int64_t num_heads, len_q, len_kv, kv_len, head_dim, block;
  DType dtype;
  double density;
  float scale;
  float last_key =
      1;  // keys grow from the first one to so many times as much, and logits with them
};

// One row; q, k and v are [tokens, heads, head_dim] and end with the last token that may be read.
class Problem {
 public:
  Problem(const Case& c, uint32_t seed)
      : c_(c),
        element_(element_bytes(c.dtype)),
        q_(c.len_q * token_bytes()),
        k_(c.kv_len * token_bytes()),
        v_(c.kv_len * token_bytes()),
        random_(seed) {
    fill(q_, c.len_q, wide_q_);
    fill(k_, c.kv_len, wide_k_, c.last_key);
    fill(v_, c.kv_len, wide_v_);
    const int64_t num_q = ceil_div(c.len_q, c.block), num_kv = ceil_div(c.len_kv, c.block);
    index_.assign(c.num_heads * num_q * num_kv, -7);
    std::bernoulli_distribution listed(c.density);
    for (int64_t i = 0; i < c.num_heads * num_q; ++i) {
      int32_t count = 0;
      for (int64_t block = 0; block < num_kv; ++block) {
        if (listed(random_)) index_[i * num_kv + count++] = static_cast<int32_t>(block);
      }
      count_.push_back(count);
    }
    for (int64_t head = 0; head < c.num_heads; ++head) mode_.push_back(head % 3 == 2 ? 0 : 1);
    compute_truth(num_q, num_kv);
  }

  void check(Isa isa, int num_threads) {
    force_isa(isa);
    Guarded out(c_.len_q * token_bytes());
    std::vector<float> lse(c_.num_heads * c_.len_q, kNan);
    const int32_t kv_len = static_cast<int32_t>(c_.kv_len);
    AttentionParams p{};
    p.out = out.data;
    p.lse = lse.data();
    p.q = q_.data;
    p.k = k_.data;
    p.v = v_.data;
    p.mode = mode_.data();
    p.count = count_.data();
    p.index = index_.data();
    p.kv_len = &kv_len;
    p.num_rows = 1;
    p.num_heads = c_.num_heads;
    p.len_q = c_.len_q;
    p.len_kv = c_.len_kv;
    p.head_dim = c_.head_dim;
    p.block_q = p.block_kv = c_.block;
    p.out_strides = p.q_strides = p.k_strides =
        p.v_strides = {0, c_.head_dim, c_.num_heads * c_.head_dim};
    const int64_t num_q = ceil_div(c_.len_q, c_.block);
    p.list_len = ceil_div(c_.len_kv, c_.block);
    p.index_strides = {0, num_q * p.list_len, p.list_len};
    p.count_head = num_q;
    p.scale = c_.scale;
    p.dtype = c_.dtype;
    p.num_threads = num_threads;
    block_sparse_attention(p);

    const double step = c_.dtype == DType::kFloat32   ? 2e-6
                        : c_.dtype == DType::kFloat16 ? 1e-3
                                                      : 1e-2;
    // A logit is a sum of rounded products, and what it is off by scales its weight.
    const double logit_error = largest_logit_ * std::ldexp(1.0, -23);
    const std::vector<float> got = widen(out, c_.len_q);
    for (int64_t head = 0; head < c_.num_heads; ++head) {
      for (int64_t i = 0; i < c_.len_q; ++i) {
        const double want_lse = lse_[head * c_.len_q + i], got_lse = lse[head * c_.len_q + i];
        CHECK(want_lse == got_lse || std::fabs(want_lse - got_lse) < 1e-4 + logit_error,
              "%s: lse of head %ld, query %ld is %g, not %g", name(isa), long(head), long(i),
              got_lse, want_lse);
        for (int64_t d = 0; d < c_.head_dim; ++d) {
          const int64_t at = (i * c_.num_heads + head) * c_.head_dim + d;
          CHECK(std::fabs(got[at] - truth_[at]) <= 4 * (step + logit_error),
                "%s: output of head %ld, query %ld, channel %ld is %g, not %g", name(isa),
                long(head), long(i), long(d), got[at], truth_[at]);
        }
      }
    }
  }

 private:
  static const char* name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }
  int64_t token_bytes() const { return c_.num_heads * c_.head_dim * element_; }

  void fill(Guarded& memory, int64_t tokens, std::vector<float>& wide, float last = 1) {
    std::normal_distribution<float> normal;
    const int64_t row = c_.num_heads * c_.head_dim;
    with_type(c_.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < tokens * row; ++i) {
        T value{};
        from_float(normal(random_) * (1 + (last - 1) * float(i / row) / float(tokens)), value);
        std::memcpy(memory.data + i * sizeof(T), &value, sizeof(T));
      }
    });
    wide = widen(memory, tokens);
  }

  std::vector<float> widen(const Guarded& memory, int64_t tokens) const {
    std::vector<float> wide(tokens * c_.num_heads * c_.head_dim);
    with_type(c_.dtype, [&](auto type) {
      using T = decltype(type);
      for (size_t i = 0; i < wide.size(); ++i) {
        T value;
        std::memcpy(&value, memory.data + i * sizeof(T), sizeof(T));
        wide[i] = to_float(value);
      }
    });
    return wide;
  }

  void compute_truth(int64_t num_q, int64_t num_kv) {
    const int64_t dim = c_.head_dim, token = c_.num_heads * dim;
    truth_.assign(c_.len_q * token, 0.0);
    lse_.assign(c_.num_heads * c_.len_q, -std::numeric_limits<double>::infinity());
    for (int64_t head = 0; head < c_.num_heads; ++head) {
      for (int64_t i = 0; i < c_.len_q; ++i) {
        const int64_t list = head * num_q + i / c_.block;
        std::vector<int64_t> keys;
        for (int64_t key = 0; key < c_.kv_len; ++key) {
          const auto begin = index_.begin() + list * num_kv;
          const bool is_listed =
              std::find(begin, begin + count_[list], key / c_.block) != begin + count_[list];
          if (mode_[head] == 0 || is_listed) keys.push_back(key);
        }
        if (keys.empty()) continue;
        std::vector<double> logits;
        for (const int64_t key : keys) {
          double sum = 0;
          for (int64_t d = 0; d < dim; ++d) {
            sum +=
                double(wide_q_[i * token + head * dim + d]) * wide_k_[key * token + head * dim + d];
          }
          logits.push_back(sum * c_.scale);
          largest_logit_ = std::max(largest_logit_, std::fabs(logits.back()));
        }
        const double top = *std::max_element(logits.begin(), logits.end());
        double total = 0;
        for (const double logit : logits) total += std::exp(logit - top);
        lse_[head * c_.len_q + i] = top + std::log(total);
        for (size_t j = 0; j < keys.size(); ++j) {
          const double weight = std::exp(logits[j] - top) / total;
          for (int64_t d = 0; d < dim; ++d) {
            truth_[i * token + head * dim + d] +=
                weight * wide_v_[keys[j] * token + head * dim + d];
          }
        }
      }
    }
  }

  Case c_;
  int64_t element_;
  Guarded q_, k_, v_;
  std::mt19937 random_;
  std::vector<float> wide_q_, wide_k_, wide_v_;
  std::vector<int32_t> count_, index_;
  std::vector<uint8_t> mode_;
  std::vector<double> truth_, lse_;
  double largest_logit_ = 0;
};

void attention_is_right_and_reads_nothing_else() {
  uint32_t seed = 0;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t block : {32, 64, 128}) {
      for (const int64_t head_dim : {8, 24, 32, 64, 128}) {
        for (const int64_t len : {1, 17, 31, 65, 130, 203}) {
          const int64_t len_kv = len + static_cast<int64_t>(seed % 3) * 40;
          const int64_t kv_len =
              seed % 2 == 0 ? len_kv : len_kv - static_cast<int64_t>(seed) % len_kv;
          const float scale = (seed % 5 == 4 ? -1.0f : 1.0f) / std::sqrt(float(head_dim));
          Problem problem({3, len, len_kv, kv_len, head_dim, block, dtype, 0.6, scale}, seed++);
          for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
            problem.check(static_cast<Isa>(isa), 1 + static_cast<int>(seed % 2));
          }
        }
      }
    }
  }
}

// Logits that outgrow any base that was chosen before they were known.
void rising_logits_do_not_overflow() {
  uint32_t seed = 1;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t head_dim : {32, 64, 128}) {
      for (const float last_key : {8.0f, 60.0f}) {
        const float scale = 1 / std::sqrt(float(head_dim));
        Problem problem({3, 70, 1100, 1093, head_dim, 32, dtype, 0.7, scale, last_key}, seed++);
        for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
          problem.check(static_cast<Isa>(isa), 1);
        }
      }
    }
  }
}

// Enough work for two threads: three heads, whose tiles they share, and so many that each takes
// whole ones.
void threads_share_heads_or_take_whole_ones() {
  uint32_t seed = 1;
  for (const int64_t num_heads : {3, 12}) {
    for (const int64_t head_dim : {64, 128}) {
      const float scale = 1 / std::sqrt(float(head_dim));
      Problem problem({num_heads, 290, 490, 477, head_dim, 32, DType::kBFloat16, 0.6, scale},
                      seed++);
      for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
        problem.check(static_cast<Isa>(isa), 2);
      }
    }
  }
}

void exp2_is_as_exact_as_stated() {
  for (const auto& [degree, bound] : {std::pair<int, double>{4, 3.2e-6}, {5, 2.5e-7}}) {
#ifdef RAPID3RT_AVX2
    const double avx2 = best_isa() >= Isa::kAvx2 ? exp2_error_avx2(degree) : 0;
    CHECK(avx2 >= 0 && avx2 < bound, "avx2, degree %d: %g", degree, avx2);
#endif
#ifdef RAPID3RT_AVX512
    const double avx512 = best_isa() >= Isa::kAvx512 ? exp2_error_avx512(degree) : 0;
    CHECK(avx512 >= 0 && avx512 < bound, "avx512, degree %d: %g", degree, avx512);
    std::printf("exp2, degree %d: relative error %.2g (avx2), %.2g (avx512)\n", degree, avx2,
                avx512);
#endif
  }
}

}  // namespace
}  // namespace rapid3rt

int main() {
  rapid3rt::exp2_is_as_exact_as_stated();
  rapid3rt::attention_is_right_and_reads_nothing_else();
  rapid3rt::rising_logits_do_not_overflow();
  rapid3rt::threads_share_heads_or_take_whole_ones();
  std::printf("attention: ok up to %s\n",
              rapid3rt::kIsaNames[static_cast<int>(rapid3rt::best_isa())]);
}
