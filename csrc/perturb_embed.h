// perturb_embed on raw pointers: a call's inputs, and its two passes.
//
// With n = b T + t a token, e its embedding (read once for all M samples) and z [R] its latent:
//
//     diagonal  e + s z                      weights: s rho [D]
//     lowrank   e + z U                      weights: U rho [R, D]
//     gated     e + gain_n (z U)             weights: U [R, D];           per token: gain [N, D]
//     affine    e + e (z Ua) + z Ub          weights: Ua, Ub rho [R, D]
//     mlp       e + (gelu(h_n + z B) - gelu(h_n)) C
//                                            weights: C rho [H, D], B [R, H] (in the backward
//                                            C^T rho [D, H] as well); per token: h [N, H]
//     context   e + (z * s_n) U              weights: U rho [R, D];       per token: s [N, R]
//
// The caller has folded the embedding scale rho in, and made gain and h, which depend on the token
// alone, by GEMMs, and s, which depends on those before it. Forward and backward each move about one output, M N D elements, to or
// from memory and spend 2 M N K D flops, K = R, or H for mlp, with the latents made twice.

#pragma once

#include <cstdint>

#include "latents.h"
#include "parallel.h"

namespace fastperturb {

enum class Family { diagonal, lowrank, gated, affine, mlp, context };

struct Problem {
  Family family;
  NoiseKeys noise;
  int64_t num_samples, tokens, dim, latent_dim, hidden_dim;
  DType dtype;         // of the source, the output and the upstream gradient
  const void* source;  // the table [V, D] and ids [N], or embeddings [N, D] and no ids
  int64_t source_stride;
  const int64_t* ids;
  const bool* mask;  // [N], or nothing: every token is perturbed
  const float* weights[3];
  const float* per_token;

  int64_t source_row(int64_t token) const { return (ids ? ids[token] : token) * source_stride; }
  bool perturbs(int64_t token) const { return !mask || mask[token]; }
  // The rows of the product with the [*, D] weights: the latents, or mlp's hidden units.
  int64_t inner_dim() const { return family == Family::mlp ? hidden_dim : latent_dim; }
};

// The upstream gradient [M, B, T, D], its last dimension dense.
struct Upstream {
  const void* data;
  int64_t sample_stride, batch_stride, position_stride;
};

// Where the backward writes, in fp32. Slots: one gradient for all tokens, or one a row b.
struct Gradients {
  bool per_row;
  float* weights[2];     // [slots, K, D] each; diagonal [slots, D]; mlp's C and B
  float* upstream_sum;   // [N, D] sum_m g, or nothing
  float* through_shift;  // gated, affine: sum_m g * (z U or z Ua) [N, D], or nothing
                         // mlp, context: the gradient of h [N, H], of s [N, R]
};

// out [M, N, D]; squared_shift [M, N], |T(e, z) - e|^2, or nothing.
void forward(const Problem& problem, void* out, float* squared_shift);

void backward(const Problem& problem, const Upstream& upstream, const Gradients& gradients);

// table [V, D] row v = the sum of the rows [N, D] with ids[i] = v, in the order of `order`, which
// sorts the ids. Rows of the table that no id names are left alone.
void scatter_rows(const float* rows, const int64_t* ids, const int64_t* order, int64_t count,
                  int64_t dim, DType dtype, void* table);

}  // namespace fastperturb
