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

// Products that are logits as they stand.
struct Plain {
  static constexpr bool as_is = true;
  Vec logit(Vec product, int64_t, int64_t) const { return product; }
  Vec slope(Vec) const { return Vec{} + 1.0f; }
};

struct Bent {
  static constexpr bool as_is = false;
  const Logits& options;

  Vec logit(Vec product, int64_t column, int64_t count) const {
    if (options.bias) product += load_some(options.bias + column, count);
    product *= options.scale;
    return options.softcap ? options.softcap * hyperbolic_tangent(product / options.softcap)
                           : product;
  }
  // dl / d(product * scale) where the logit is l.
  Vec slope(Vec l) const {
    if (!options.softcap) return Vec{} + 1.0f;
    const Vec bent = l / options.softcap;
    return 1.0f - bent * bent;
  }
};

template <class Body>
void with_logits(const Logits& options, const Body& body) {
  if (options.bias || options.scale != 1.0f || options.softcap) {
    body(Bent{options});
  } else {
    body(Plain{});
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
void gather_row(const Map& map, float* products, float* scratch, int64_t width, int64_t column_y,
                const Running& running, int64_t row, bool write, float* total, int64_t dim) {
  float* logits = products;
  Vec top = Vec{} - INFINITE;
  over_columns(width, [&](int64_t column, int64_t count) {
    const Vec l = map.logit(load_some(products + column, count), column, count);
    if constexpr (!Map::as_is) store_some(scratch + column, l, count);
    const Vec seen = masked(l, count);
    top = seen > top ? seen : top;
  });
  if constexpr (!Map::as_is) logits = scratch;

  const float old_peak = running.peak[row], old_target = running.at_target[row];
  const float block_peak = largest(top);
  const float peak = block_peak > old_peak ? block_peak : old_peak;
  const float rescale = peak > old_peak ? std::exp(old_peak - peak) : 1.0f;

  // The target is summed apart from the others, so that 1 - p_y is no difference.
  const bool has_target = column_y >= 0 && column_y < width;
  const float target = has_target ? logits[column_y] : 0.0f;
  if (has_target) logits[column_y] = -INFINITE;
  Vec others = {}, spread = {};
  const bool wants_spread = running.spread;
  over_columns(width, [&](int64_t column, int64_t count) {
    const Vec l = masked(load_some(logits + column, count), count);
    const Vec below = l - peak;
    const Vec q = exp_or_zero(below);
    others += q;
    if (wants_spread) spread += q * (below > -FLT_MAX ? below : Vec{} - FLT_MAX);
    if (write) store_some(products + column, q * map.slope(l), count);
  });
  if (has_target && write) products[column_y] = 0.0f;
  if (has_target && !write) logits[column_y] = target;

  if (wants_spread) {
    const float met = old_target == old_target ? std::exp(old_target - old_peak) : 0.0f;
    const float step = old_peak - peak > -FLT_MAX ? old_peak - peak : -FLT_MAX;
    float value = rescale * (running.spread[row] + step * (running.others[row] + met));
    value += sum(spread);
    const float below = target - peak;
    if (has_target && below > -FLT_MAX) value += std::exp(below) * below;
    running.spread[row] = value;
  }
  if (has_target) running.at_target[row] = target;
  running.others[row] = running.others[row] * rescale + sum(others);
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

}  // namespace

void gather(const Products& products, const Logits& options, const int64_t* target,
            const Running& running, bool write, float* total, int64_t dim) {
  with_logits(options, [&](const auto& map) {
    parallel(products.tokens, [&](int64_t begin, int64_t end) {
      Buffer scratch(products.width);
      for (int64_t row = begin; row < end; ++row) {
        gather_row(map, products.data + row * products.width, scratch, products.width,
                   target[row] - options.start, running, row, write,
                   total ? total + row * dim : nullptr, dim);
      }
    });
  });
}

void pull(const Products& products, const Logits& options, const int64_t* target, LogSums lse,
          const float* upstream) {
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

void couple(const Products& products, const Logits& options, LogSums lse,
            const float* row_weights, float* crossed) {
  const int64_t M = products.samples;
  with_logits(options, [&](const auto& map) {
    parallel(products.tokens, [&](int64_t begin, int64_t end) {
      std::vector<Vec> p(M), sums(M);
      for (int64_t token = begin; token < end; ++token) {
        for (Vec& each : sums) each = Vec{};
        over_columns(products.width, [&](int64_t column, int64_t count) {
          const Vec S = probabilities(map, products, token, column, count, lse, row_weights,
                                      p.data(), nullptr);
          for (int64_t m = 0; m < M; ++m) {
            sums[m] += p[m] * (S - row_weights[m * products.tokens + token] * p[m]);
          }
        });
        for (int64_t m = 0; m < M; ++m) crossed[m * products.tokens + token] += sum(sums[m]);
      }
    });
  });
}

void quadratic_pull(const Products& products, const Logits& options, const int64_t* target,
                    LogSums lse, const float* row_weights, const float* dots,
                    const float* upstream) {
  const int64_t M = products.samples;
  const float coupling = 2.0f / (M * (M - 1));
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
          for (int64_t m = 0; m < M; ++m) {
            const int64_t row = m * products.tokens + token;
            const float r = row_weights[row];
            Vec g = -coupling * r * (S - r * p[m]);
            if (lane >= 0 && lane < count) g[lane] += 2.0f / M * r;
            const Vec grad = factor * slopes[m] * p[m] * (g - dots[row]);
            store_some(products.data + row * products.width + column, grad, count);
          }
        });
      }
    });
  });
}

}  // namespace fastperturb
