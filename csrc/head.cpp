// A thread owns whole rows (for the quadratic passes whole tokens, all M samples of each), whose
// part of a block is a few KiB and stays in its first level of cache between two looks at it.

#include "head.h"

#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "maths.h"
#include "parallel.h"
#include "vectors.h"

namespace fastperturb {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Products that are logits already.
struct PlainLogits {
  static constexpr bool as_is = true;
  Vec logit(Vec product, int64_t, int64_t) const { return product; }
  Vec slope(Vec) const { return Vec{} + 1.0f; }
};

// Products that take a bias, a scale or a soft cap to become logits.
struct MappedLogits {
  static constexpr bool as_is = false;
  const LogitOptions& options;

  Vec logit(Vec product, int64_t column, int64_t count) const {
    if (options.bias) product += load_some(options.bias + column, count);
    product *= options.scale;
    return options.softcap ? options.softcap * hyperbolic_tangent(product / options.softcap)
                           : product;
  }
  // dl / d(product * scale) where the logit is l.
  Vec slope(Vec l) const {
    if (!options.softcap) return Vec{} + 1.0f;
    const Vec tanh = l / options.softcap;
    return 1.0f - tanh * tanh;
  }
};

template <class Body>
void with_logits(const LogitOptions& options, const Body& body) {
  if (options.bias || options.scale != 1.0f || options.softcap) {
    body(MappedLogits{options});
  } else {
    body(PlainLogits{});
  }
}

// body(column, count) over a row's columns, LANES at a time.
template <class Body>
inline void over_columns(int64_t width, const Body& body) {
  int64_t column = 0;
  for (; column + LANES <= width; column += LANES) body(column, LANES);
  if (column < width) body(column, width - column);
}

// Lanes past the row's end hold logits of -inf, whose exp is 0.
inline Vec masked(Vec value, int64_t count) {
  for (int64_t lane = count; lane < LANES; ++lane) value[lane] = -INFINITE;
  return value;
}

inline float sum(Vec value) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += value[lane];
  return total;
}

inline float largest(Vec value) {
  float result = value[0];
  for (int lane = 1; lane < LANES; ++lane) result = value[lane] > result ? value[lane] : result;
  return result;
}

template <class Map>
void add_row(const Map& map, float* products, float* scratch, int64_t width, int64_t column_y,
             const RunningSoftmax& running, int64_t row, bool want_weights, float* total,
             int64_t dim) {
  float* logits = products;
  Vec top = Vec{} - INFINITE;
  over_columns(width, [&](int64_t column, int64_t count) {
    const Vec l = map.logit(load_some(products + column, count), column, count);
    if constexpr (!Map::as_is) store_some(scratch + column, l, count);
    const Vec within = masked(l, count);
    top = within > top ? within : top;
  });
  if constexpr (!Map::as_is) logits = scratch;

  const float old_peak = running.peak[row], old_target = running.target_logit[row];
  const float block_peak = largest(top);
  const float peak = block_peak > old_peak ? block_peak : old_peak;
  const float rescale = peak > old_peak ? std::exp(old_peak - peak) : 1.0f;

  // The target is summed apart from the others, so that 1 - p_y is no difference.
  const bool has_target = column_y >= 0 && column_y < width;
  const float target = has_target ? logits[column_y] : 0.0f;
  if (has_target) logits[column_y] = -INFINITE;
  Vec other_sum = {}, entropy_sum = {};
  const bool want_entropy = running.entropy_sum;
  over_columns(width, [&](int64_t column, int64_t count) {
    const Vec l = masked(load_some(logits + column, count), count);
    const Vec below = l - peak;
    const Vec q = exp_or_zero(below);
    other_sum += q;
    if (want_entropy) entropy_sum += q * (below > -FLT_MAX ? below : Vec{} - FLT_MAX);
    if (want_weights) store_some(products + column, q * map.slope(l), count);
  });
  if (has_target && want_weights) products[column_y] = 0.0f;
  if (has_target && !want_weights) logits[column_y] = target;

  if (want_entropy) {
    // Each earlier term q (l - peak) grows by q times the step to the new peak. The sum of all
    // earlier q includes the target's.
    const float target_q = old_target == old_target ? std::exp(old_target - old_peak) : 0.0f;
    const float step = old_peak - peak > -FLT_MAX ? old_peak - peak : -FLT_MAX;
    const float earlier = running.other_sum[row] + target_q;
    float value = rescale * (running.entropy_sum[row] + step * earlier);
    value += sum(entropy_sum);
    const float below = target - peak;
    if (has_target && below > -FLT_MAX) value += std::exp(below) * below;
    running.entropy_sum[row] = value;
  }
  if (has_target) running.target_logit[row] = target;
  running.other_sum[row] = running.other_sum[row] * rescale + sum(other_sum);
  running.peak[row] = peak;
  if (total && rescale != 1.0f) {
    for (int64_t d = 0; d < dim; ++d) total[d] *= rescale;
  }
}

// The softmax p of all samples of a token in LANES columns, and S = sum_k r_k p_k.
template <class Map>
inline Vec probabilities(const Map& map, const Products& products, int64_t token, int64_t column,
                         int64_t count, LogSums lse, const float* row_weights, Vec* p,
                         Vec* slopes) {
  Vec S = {};
  for (int64_t m = 0; m < products.samples; ++m) {
    const int64_t row = m * products.tokens + token;
    const float* data = products.data + row * products.width;
    const Vec l = masked(map.logit(load_some(data + column, count), column, count), count);
    p[m] = exp_or_zero(l - lse[row] - lse[products.samples * products.tokens + row]);
    if (slopes) slopes[m] = map.slope(l);
    S += row_weights[row] * p[m];
  }
  return S;
}

// body(m, S - S_k) for every sample m = k of a token: S_k is the part of S from its own group.
template <class Body>
inline void for_others(const Products& products, int64_t token, const float* row_weights, Vec S,
                       const Vec* p, int64_t strata, const Body& body) {
  for (int64_t first = 0; first < products.samples; first += strata) {
    Vec others = S;
    for (int64_t m = first; m < first + strata; ++m) {
      others -= row_weights[m * products.tokens + token] * p[m];
    }
    for (int64_t m = first; m < first + strata; ++m) body(m, others);
  }
}

}  // namespace

void online_softmax(const Products& products, const LogitOptions& options, const int64_t* target,
                    const RunningSoftmax& running, bool want_weights, float* total, int64_t dim) {
  with_logits(options, [&](const auto& map) {
    parallel(products.tokens, [&](int64_t begin, int64_t end) {
      Buffer scratch(products.width);
      for (int64_t row = begin; row < end; ++row) {
        add_row(map, products.data + row * products.width, scratch, products.width,
                target[row] - options.start, running, row, want_weights,
                total ? total + row * dim : nullptr, dim);
      }
    });
  });
}

void grad_logits(const Products& products, const LogitOptions& options, const int64_t* target,
                 LogSums lse, const float* upstream) {
  with_logits(options, [&](const auto& map) {
    parallel(products.tokens, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        float* data = products.data + row * products.width;
        const float factor = upstream[row] * options.scale;
        const int64_t column_y = target[row] - options.start;
        float at_target = 0;
        over_columns(products.width, [&](int64_t column, int64_t count) {
          const Vec l = masked(map.logit(load_some(data + column, count), column, count), count);
          const Vec slope = map.slope(l);
          const Vec p = exp_or_zero(l - lse[row] - lse[products.tokens + row]);
          store_some(data + column, -factor * slope * p, count);
          const int64_t lane = column_y - column;
          if (lane >= 0 && lane < count) at_target = factor * slope[lane];
        });
        if (column_y >= 0 && column_y < products.width) data[column_y] += at_target;
      }
    });
  });
}

void quadratic_dot(const Products& products, const LogitOptions& options, LogSums lse,
                   const float* row_weights, int64_t strata, float* dot_others) {
  const int64_t M = products.samples;
  with_logits(options, [&](const auto& map) {
    parallel(products.tokens, [&](int64_t begin, int64_t end) {
      std::vector<Vec> p(M), sums(M);
      for (int64_t token = begin; token < end; ++token) {
        sums.assign(M, Vec{});
        over_columns(products.width, [&](int64_t column, int64_t count) {
          const Vec S = probabilities(map, products, token, column, count, lse, row_weights,
                                      p.data(), nullptr);
          for_others(products, token, row_weights, S, p.data(), strata,
                     [&](int64_t m, Vec others) { sums[m] += p[m] * others; });
        });
        for (int64_t m = 0; m < M; ++m) dot_others[m * products.tokens + token] += sum(sums[m]);
      }
    });
  });
}

void quadratic_grad_logits(const Products& products, const LogitOptions& options,
                           const int64_t* target, LogSums lse, const float* row_weights,
                           const float* dot, const float* upstream, int64_t strata) {
  const int64_t M = products.samples;
  const float pair_weight = 2.0f / (M * (M - strata));
  with_logits(options, [&](const auto& map) {
    parallel(products.tokens, [&](int64_t begin, int64_t end) {
      std::vector<Vec> p(M), slopes(M);
      for (int64_t token = begin; token < end; ++token) {
        const float factor = upstream[token] * options.scale;
        const int64_t column_y = target[token] - options.start;
        over_columns(products.width, [&](int64_t column, int64_t count) {
          const Vec S = probabilities(map, products, token, column, count, lse, row_weights,
                                      p.data(), slopes.data());
          const int64_t lane = column_y - column;
          for_others(products, token, row_weights, S, p.data(), strata,
                     [&](int64_t m, Vec others) {
            const int64_t row = m * products.tokens + token;
            const float r = row_weights[row];
            Vec g = -pair_weight * r * others;
            if (lane >= 0 && lane < count) g[lane] += 2.0f / M * r;
            const Vec grad = factor * slopes[m] * p[m] * (g - dot[row]);
            store_some(products.data + row * products.width + column, grad, count);
          });
        });
      }
    });
  });
}

}  // namespace fastperturb
