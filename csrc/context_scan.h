// The state of a context transform on raw pointers, with a [H] what it keeps of itself:
//
//     h_t = a h_(t-1) + (1 - a) x_t at a real token, where h_(t-1) counts as 0 if a document starts
//     h_t = h_(t-1) elsewhere, and h_(-1) = initial
//
// Its backward walks the other way, with l_t the gradient of h_t from t on:
//
//     dx_t = (1 - a) l_t,  da = sum_t l_t (h_(t-1) - x_t),  l_(t-1) = g_(t-1) + a l_t

#pragma once

#include <cstdint>

namespace fastperturb {

struct Scan {
  int64_t batch, length, width;
  const float* inputs;   // [B, T, H]
  const float* retain;   // [H]
  const bool* starts;    // [B, T], or nothing: nowhere
  const bool* real;      // [B, T], or nothing: everywhere
  const float* initial;  // [B, H], or nothing: 0
};

// states [B, T, H].
void context_scan(const Scan& scan, float* states);

// grad_inputs [B, T, H]; grad_retain [B, H], each row's part.
void context_scan_backward(const Scan& scan, const float* grad, const float* states,
                           float* grad_inputs, float* grad_retain);

}  // namespace fastperturb
