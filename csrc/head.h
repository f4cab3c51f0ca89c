// The row passes of the multi-sample heads, which run between two GEMMs on a block of products
// hidden W^T of some rows with a vocabulary block; fastperturb/ops/torch/rows.py defines each.
// Everything is fp32, and each writes over the products.

#pragma once

#include <cstdint>

namespace fastperturb {

// How products become logits l = softcap * tanh((product + bias) * scale / softcap).
struct LogitOptions {
  int64_t start;      // the number of the block's first vocabulary entry
  const float* bias;  // [width], or nothing
  float scale;
  float softcap;  // 0: none
};

// [samples, tokens, width]; the log-prob's passes take samples = 1.
struct Products {
  float* data;
  int64_t samples, tokens, width;
};

// Each row's log-sum-exp, and then, in the same order, its rounding error.
using LogSums = const float*;  // [2, samples, tokens]

struct RunningSoftmax {
  float *peak, *other_sum, *target_logit;  // [tokens]
  float* entropy_sum;                      // [tokens], or nothing
};

// With `want_weights`, the products become the weights of the second GEMM. total [tokens, dim], if
// there is one, is rescaled to the new peaks.
void online_softmax(const Products& products, const LogitOptions& options, const int64_t* target,
                    const RunningSoftmax& running, bool want_weights, float* total, int64_t dim);

void grad_logits(const Products& products, const LogitOptions& options, const int64_t* target,
                 LogSums lse, const float* upstream);

// The quadratic passes compare samples of different groups, of `strata` samples each.
void quadratic_dot(const Products& products, const LogitOptions& options, LogSums lse,
                   const float* row_weights, int64_t strata, float* dot_others);

void quadratic_grad_logits(const Products& products, const LogitOptions& options,
                           const int64_t* target, LogSums lse, const float* row_weights,
                           const float* dot, const float* upstream, int64_t strata);

}  // namespace fastperturb
