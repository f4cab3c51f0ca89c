// log, sine, cosine, exp and erf in fp32 without branches or calls, so that loops over them
// become SIMD. Each is good to about two units in the last place on the range that is named.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace fastperturb {

// ln x for normal x > 0: x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)) (Cephes logf).
inline float natural_log(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const float f = bit_cast<float>(bits - exponent * (1 << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  p = p * f * square - 2.12194440e-4f * e - 0.5f * square;
  return f + p + 0.693359375f * e;
}

// sin a and cos a for |a| <= pi, from polynomials on a - k pi/2, |a - k pi/2| <= pi/4.
inline void sine_cosine(float a, float& sine, float& cosine) {
  const float shifted = a * 0.636619772f + 12582912.0f;  // 1.5 * 2^23: the low bits hold k
  const float k = shifted - 12582912.0f;
  const uint32_t quadrant = bit_cast<uint32_t>(shifted);
  float r = a - k * 1.5703125f;
  r = r - k * 4.837512969970703125e-4f;
  r = r - k * 7.54978995489188216e-8f;
  const float square = r * r;
  float s = -1.9515295891e-4f * square + 8.3321608736e-3f;
  s = s * square - 1.6666654611e-1f;
  s = s * square * r + r;
  float c = 2.443315711809948e-5f * square - 1.388731625493765e-3f;
  c = c * square + 4.166664568298827e-2f;
  c = c * square * square - 0.5f * square + 1.0f;
  const bool swapped = quadrant & 1;
  const uint32_t flip_sine = (quadrant & 2) << 30;
  const uint32_t flip_cosine = ((quadrant + 1) & 2) << 30;
  sine = bit_cast<float>(bit_cast<uint32_t>(swapped ? c : s) ^ flip_sine);
  cosine = bit_cast<float>(bit_cast<uint32_t>(swapped ? s : c) ^ flip_cosine);
}

// e^x for -87 <= x <= 88, in a float or in all lanes of a Vec: x = n ln 2 + r (Cephes expf).
template <class Word, class Float>
inline Float exp_in_range(Float x) {
  const Float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits hold n
  const Float n = shifted - 12582912.0f;
  Float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Word scale = (bit_cast<Word>(shifted) + 127) << 23;
  return p * bit_cast<Float>(scale);
}

// e^x for x <= 0; below -87 it stays at e^-87.
inline float exp_of_negative(float x) { return exp_in_range<uint32_t>(x < -87.0f ? -87.0f : x); }

// e^x for x near or below 0, in all lanes; 0 below -87, at -inf too.
inline Vec exp_or_zero(Vec x) {
  const Vec lowest = Vec{} - 87.0f;
  return x < lowest ? Vec{} : exp_in_range<WordVec>(x < lowest ? lowest : x);
}

// tanh x: a polynomial in x near 0, from e^-2|x| beyond (Cephes tanhf).
inline Vec hyperbolic_tangent(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec decay = exp_or_zero(-2.0f * size);
  const Vec far = (1.0f - decay) / (1.0f + decay);
  const Vec square = x * x;
  Vec near = -5.70498872745e-3f * square + 2.06390887954e-2f;
  near = near * square - 5.37397155531e-2f;
  near = near * square + 1.33314422036e-1f;
  near = near * square - 3.33332819422e-1f;
  near = near * square * x + x;
  return size > 0.625f ? (x < 0.0f ? -far : far) : near;
}

// erf x: a polynomial in x near 0, 1 - exp(polynomial) beyond (N. Juffa's coefficients).
inline float error_function(float x) {
  const float size = __builtin_fabsf(x);
  const float t = size < 4.0f ? size : 4.0f;
  const float square = x * x;
  float far = -1.72853470e-5f * t + 3.83197126e-4f;
  far = far * t - 3.88396438e-3f;
  far = far * t + 2.42546219e-2f;
  far = far * t - 1.06777877e-1f;
  far = far * t - 6.34846687e-1f;
  far = far * t - 1.28717512e-1f;
  far = far * t - t;
  far = __builtin_copysignf(1.0f - exp_of_negative(far), x);
  float near = -5.96761703e-4f;
  near = near * square + 4.99119423e-3f;
  near = near * square - 2.67681349e-2f;
  near = near * square + 1.12819925e-1f;
  near = near * square - 3.76125336e-1f;
  near = near * square + 1.28379166e-1f;
  near = near * x + x;
  return size > 0.927734375f ? far : near;
}

inline float gelu(float x) { return 0.5f * x * (1.0f + error_function(x * 0.707106781f)); }

inline float gelu_slope(float x) {
  const float density = 0.398942280f * exp_of_negative(-0.5f * x * x);
  return 0.5f * (1.0f + error_function(x * 0.707106781f)) + x * density;
}

}  // namespace fastperturb
