// The row passes of the multi-sample heads, which run between two GEMMs on a block of products
// hidden W^T of some rows with some words; fastperturb/ops/torch_rows.py says what each computes.
// Everything is fp32, and each writes over the products.

#pragma once

#include <cstdint>

namespace fastperturb {

// How products become logits l = softcap * tanh((product + bias) * scale / softcap).
struct Logits {
  int64_t start;      // the number of the block's first word
  const float* bias;  // [width], or nothing
  float scale;
  float softcap;  // 0: none
};

// [samples, tokens, width]; the log-prob's passes take samples = 1.
struct Products {
  float* data;
  int64_t samples, tokens, width;
};

// Each row's log-sum-exp, and then, in the same order, what its rounding took off it.
using LogSums = const float*;  // [2, samples, tokens]

struct Running {
  float *peak, *others, *at_target;  // [tokens]
  float* spread;                     // [tokens], or nothing
};

// With `write`, the products become the weights of the second GEMM. total [tokens, dim], if there
// is one, is rescaled to the new peaks.
void gather(const Products& products, const Logits& options, const int64_t* target,
            const Running& running, bool write, float* total, int64_t dim);

void pull(const Products& products, const Logits& options, const int64_t* target, LogSums lse,
          const float* upstream);

void couple(const Products& products, const Logits& options, LogSums lse,
            const float* row_weights, float* crossed);

void quadratic_pull(const Products& products, const Logits& options, const int64_t* target,
                    LogSums lse, const float* row_weights, const float* dots,
                    const float* upstream);

}  // namespace fastperturb
