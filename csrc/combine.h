// The combine step on raw pointers: the M log-probs of every column to a value, M weights and
// statistics of the samples. A column is a token, or a sequence. fastperturb/ops/combine.py has the
// equations.
//
// A column costs M exponentials, for jvi and jvi_clip M logarithms as well, and moves M floats in
// and M + 3 out.

#pragma once

#include <cstdint>

namespace fastperturb {

enum class Estimator { jensen, iwae, jvi, jvi_clip };

struct Combination {
  Estimator estimator;
  int64_t num_samples, batch, length;
  const float* log_probs;  // [M, B, T], its last dimension dense
  int64_t sample_stride, batch_stride;
  const bool* mask;  // [B, T]
  // The columns are the N = B T tokens, or the N = B sequences.
  float *value, *log_marginal, *effective_samples;  // [N]
  float* weights;                                   // [M, N]
};

void combine_tokens(const Combination& problem);

// Each sequence's labelled log-probs are summed first, and their differences taken, in fp64.
void combine_sequences(const Combination& problem);

}  // namespace fastperturb
