// mlp's hidden layer: what stands where the latent stands in the other families.

#pragma once

#include "perturb_embed.h"

namespace fastperturb {

// hidden [H] = still [H] + z [R] B [R, H].
inline void hidden_layer(const Problem& problem, const float* still, const float* z,
                         float* hidden) {
  const int64_t H = problem.hidden_dim;
  const float* weight = problem.weights[1];
  std::memcpy(hidden, still, H * sizeof(float));
  for (int64_t r = 0; r < problem.latent_dim; ++r) {
    const float* row = weight + r * H;
    const float factor = z[r];
#pragma omp simd
    for (int64_t h = 0; h < H; ++h) hidden[h] += factor * row[h];
  }
}

inline void apply_gelu(const float* x, float* y, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = gelu(x[i]);
}

inline void apply_gelu_slope(const float* x, float* y, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = gelu_slope(x[i]);
}

}  // namespace fastperturb
