#include "combine.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "maths.h"
#include "parallel.h"

namespace fastperturb {

namespace {

// Stands for the log-prob of an impossible label, so that weights stay finite.
constexpr float LOWEST = -1e30f;
// Columns that one thread takes at a time.
constexpr int64_t SHARE = 64 * LANES;

typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));

// ln x for normal x > 0, NaN for NaN.
inline Vec log(Vec x) {
  float lanes[LANES];
  store(lanes, x);
#pragma omp simd
  for (int i = 0; i < LANES; ++i) lanes[i] = natural_log(lanes[i]);
  return x == x ? load(lanes) : x;
}

// The sum of term(m) over [first, last), pairwise.
template <class Term>
Vec sum(int64_t first, int64_t last, const Term& term) {
  if (last - first > 8) {
    const int64_t middle = first + (last - first) / 2;
    return sum(first, middle, term) + sum(middle, last, term);
  }
  Vec total = {};
  for (int64_t m = first; m < last; ++m) total += term(m);
  return total;
}

// LANES columns side by side.
class Block {
 public:
  explicit Block(const Combination& problem)
      : problem_(problem),
        M_(problem.num_samples),
        log_probs_(M_ * LANES),
        weights_(M_ * LANES) {}

  // Combines the `count` columns from `column` on, whose log-probs of sample 0 lie at `from`.
  void run(const float* from, int64_t column, int64_t count) {
    for (int64_t m = 0; m < M_; ++m) {
      const Vec value = load_some(from + m * problem_.sample_stride, count);
      store(log_probs_ + m * LANES, value < LOWEST ? Vec{} + LOWEST : value);
    }
    find_peaks();
    iwae();
    if (problem_.estimator == Estimator::jensen) jensen();
    if (problem_.estimator == Estimator::jvi || problem_.estimator == Estimator::jvi_clip) jvi();
    if (problem_.estimator == Estimator::jvi_clip) clip();
    write(column, count);
  }

 private:
  Vec log_prob(int64_t m) const { return load(log_probs_ + m * LANES); }
  Vec weight(int64_t m) const { return load(weights_ + m * LANES); }
  void set_weight(int64_t m, Vec value) { store(weights_ + m * LANES, value); }

  template <class Term>
  Vec sum(const Term& term) const {
    return fastperturb::sum(0, M_, term);
  }

  // The largest log-prob, which sample has it, and the largest of the others.
  void find_peaks() {
    peak_ = log_prob(0);
    which_ = IntVec{};
    second_ = Vec{} - std::numeric_limits<float>::infinity();
    for (int64_t m = 1; m < M_; ++m) {
      const Vec value = log_prob(m);
      const auto higher = value > peak_;
      second_ = higher ? peak_ : (value > second_ ? value : second_);
      which_ = higher ? IntVec{} + static_cast<int32_t>(m) : which_;
      peak_ = higher ? value : peak_;
    }
  }

  auto is_peak(int64_t m) const { return which_ == static_cast<int32_t>(m); }

  // Values are kept as differences to the peak.
  void iwae() {
    const Vec total = sum([&](int64_t m) {
      const Vec term = exp_or_zero(log_prob(m) - peak_);
      set_weight(m, term);
      return term;
    });
    const Vec squares = sum([&](int64_t m) {
      const Vec share = weight(m) / total;
      set_weight(m, share);
      return share * share;
    });
    log_total_ = log(total);
    log_marginal_ = value_ = log_total_ - std::log(static_cast<float>(M_));
    effective_ = 1.0f / squares;
  }

  void jensen() {
    const float share = 1.0f / M_;
    value_ = share * sum([&](int64_t m) { return log_prob(m) - peak_; });
    for (int64_t m = 0; m < M_; ++m) set_weight(m, Vec{} + share);
  }

  void jvi() {
    const float M = M_, share = (M - 1) / M;
    const auto other = [&](int64_t m, Vec value) { return is_peak(m) ? Vec{} : value; };
    // 1 - w of the peak is a sum over the others, from the largest of which they are measured.
    const auto against_second = [&](int64_t m) {
      return other(m, exp_or_zero(log_prob(m) - second_));
    };
    const Vec rest = sum(against_second);
    const Vec log_rest = second_ - peak_ + log(rest) - log_total_;
    const auto odds = [&](int64_t m) {
      const Vec w = other(m, weight(m));
      return w / (1.0f - w);
    };
    const Vec all_odds = sum(odds);
    const Vec logs = sum([&](int64_t m) { return log(1.0f - other(m, weight(m))); });
    value_ = log_marginal_ + (M - 1) * std::log(share) - share * (logs + log_rest);
    for (int64_t m = 0; m < M_; ++m) {
      const Vec peaks = 2 - 1 / M - share * all_odds;
      const Vec others = 3 - 2 / M - share * (all_odds - odds(m));
      const Vec lost = share * against_second(m) / rest;
      set_weight(m, is_peak(m) ? weight(m) * peaks : weight(m) * others - lost);
    }
  }

  void clip() {
    const Vec total = sum([&](int64_t m) {
      const Vec value = weight(m);
      set_weight(m, value < 0.0f ? Vec{} : value);
      return weight(m);
    });
    for (int64_t m = 0; m < M_; ++m) set_weight(m, weight(m) / total);
  }

  // Columns without a label get 0.
  void write(int64_t column, int64_t count) const {
    IntVec labelled = {};
    for (int64_t i = 0; i < count; ++i) labelled[i] = problem_.mask[column + i];
    const auto put = [&](float* to, Vec value) {
      store_some(to + column, labelled != 0 ? value : Vec{}, count);
    };
    const int64_t columns = problem_.batch * problem_.length;
    put(problem_.value, value_ + peak_);
    put(problem_.log_marginal, log_marginal_ + peak_);
    put(problem_.effective_samples, effective_);
    for (int64_t m = 0; m < M_; ++m) put(problem_.weights + m * columns, weight(m));
  }

  const Combination& problem_;
  const int64_t M_;
  Buffer log_probs_, weights_;  // [M, LANES]
  Vec peak_, second_, log_total_, value_, log_marginal_, effective_;
  IntVec which_;
};

// The sum of the labelled ones of x [size].
double labelled_sum(const float* x, const bool* mask, int64_t size) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t t = 0; t < size; ++t) total += mask[t] ? static_cast<double>(x[t]) : 0.0;
  return total;
}

}  // namespace

void combine_tokens(const Combination& problem) {
  const bool dense = problem.batch_stride == problem.length;  // then all rows are one
  const int64_t rows = dense ? 1 : problem.batch;
  const int64_t length = dense ? problem.batch * problem.length : problem.length;
  const int64_t shares = divide_up(length, SHARE);  // of a row
  parallel(rows * shares, [&](int64_t begin, int64_t end) {
    Block block(problem);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / shares, first = index % shares * SHARE;
      const int64_t last = first + SHARE < length ? first + SHARE : length;
      for (int64_t t = first; t < last; t += LANES) {
        const float* from = problem.log_probs + row * problem.batch_stride + t;
        block.run(from, row * length + t, last - t < LANES ? last - t : LANES);
      }
    }
  });
}

void combine_sequences(const Combination& problem) {
  const int64_t M = problem.num_samples, B = problem.batch;
  std::vector<float> differences(M * B);  // to the peak
  std::vector<double> peaks(B);
  const auto labelled = std::make_unique<bool[]>(B);
  parallel(B, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(M);
    for (int64_t b = begin; b < end; ++b) {
      const bool* mask = problem.mask + b * problem.length;
      labelled[b] = std::memchr(mask, true, problem.length) != nullptr;
      for (int64_t m = 0; m < M; ++m) {
        const float* row =
            problem.log_probs + m * problem.sample_stride + b * problem.batch_stride;
        const double total = labelled_sum(row, mask, problem.length);
        sums[m] = total < LOWEST ? LOWEST : total;
        if (m == 0 || sums[m] > peaks[b]) peaks[b] = sums[m];
      }
      for (int64_t m = 0; m < M; ++m) {
        differences[m * B + b] = static_cast<float>(sums[m] - peaks[b]);
      }
    }
  });
  Combination sums = problem;
  sums.batch = 1;
  sums.length = B;
  sums.log_probs = differences.data();
  sums.sample_stride = sums.batch_stride = B;
  sums.mask = labelled.get();
  combine_tokens(sums);
  for (int64_t b = 0; b < B; ++b) {
    if (!labelled[b]) continue;
    problem.value[b] = static_cast<float>(problem.value[b] + peaks[b]);
    problem.log_marginal[b] = static_cast<float>(problem.log_marginal[b] + peaks[b]);
  }
}

}  // namespace fastperturb
