// mlp's hidden layer, which takes the latent's place in the other families.

#pragma once

#include "perturb_embed.h"

namespace fastperturb {

// hidden [H] = rest [H] + z [R] B [R, H].
inline void hidden_layer(const Problem& problem, const float* rest, const float* z,
                         float* hidden) {
  const int64_t H = problem.hidden_dim;
  const float* weight = problem.weights[1];
  std::memcpy(hidden, rest, H * sizeof(float));
  for (int64_t r = 0; r < problem.latent_dim; ++r) {
    const float* row = weight + r * H;
    const float factor = z[r];
#pragma omp simd
    for (int64_t h = 0; h < H; ++h) hidden[h] += factor * row[h];
  }
}

}  // namespace fastperturb
