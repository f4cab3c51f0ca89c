// The inverse of the normal distribution function: -z at u = v and z at u = 1 - v, v in (0, 1/2].

#pragma once

#include "maths.h"

namespace fastperturb {

// As noise.py has it: z = q P(q^2 / (q^2 + 8)) with q^2 = -2 ln(4 v (1 - v)), for v >= 2^-41.
constexpr float QUANTILE[8] = {0.8862251270853458f,  0.04212094886404203f, 0.030528105440190374f,
                               0.08575752667691486f, -0.2316465484484066f, 0.5729471920348647f,
                               -0.6643732588295643f, 0.2759865173191161f};

inline float quantile_by_formula(float v) {
  // Near v = 1/2, ln 4v(1 - v) is that of 1 - x^2.
  const float x = 1.0f - 2.0f * v;
  const float square = x * x;
  const float one_minus = 1.0f - square;
  const float error = (1.0f - one_minus) - square;
  const bool central = v > 0.25f;
  const float log = natural_log(central ? one_minus : 4.0f * v * (1.0f - v)) +
                    (central ? error : 0.0f);
  const float squared = log < 0.0f ? -2.0f * log : 0.0f;
  const float argument = squared / (squared + 8.0f);
  float p = QUANTILE[7];
  for (int i = 6; i >= 0; --i) p = p * argument + QUANTILE[i];
  return __builtin_sqrtf(squared) * p;
}

#ifdef __AVX2__
// Polynomials for 2^-16 <= v <= 1/2, one for each octave. Column c has the coefficients of z at
// v = 2^(c - 17) (2 - t), 0 < t <= 1, constant first; column 0 is for v = 1/2 alone, where z = 0.
// They need no logarithm, root or division, and a permutation looks up LANES coefficients at once.
//
// Each is the minimax fit of degree 6 in fp64 to scipy.special.ndtri, by least squares on 4,000
// Chebyshev points of t whose weights are multiplied by their errors 400 times (Lawson). Rounded
// to fp32 they are good to 6e-7. The last has no constant, so that errors vanish with z.
alignas(64) constexpr float PIECES[7][16] = {
    {0.0f, 4.00877285f, 3.84193087f, 3.66832948f, 3.48710442f, 3.29719353f, 3.0972693f, 2.88563514f,
     2.6600678f, 2.41755939f, 2.15387511f, 1.86273229f, 1.53412092f, 1.15034986f, 0.674490213f,
     0.0f},
    {0.0f, 0.118068457f, 0.122670323f, 0.127836734f, 0.133690998f, 0.140397206f, 0.148179144f,
     0.157351092f, 0.168370411f, 0.181932449f, 0.19915469f, 0.221968323f, 0.254060209f,
     0.303573281f, 0.393314302f, 0.62662375f},
    {0.0f, 0.0283074882f, 0.0292834491f, 0.03036277f, 0.0315642133f, 0.0329113938f, 0.0344343111f,
     0.0361714326f, 0.0381722227f, 0.0404995158f, 0.0432287939f, 0.0464318059f, 0.0500879288f,
     0.0536217764f, 0.0528305024f, 0.000601771346f},
    {0.0f, 0.00715549104f, 0.00739744585f, 0.00766438944f, 0.00796072837f, 0.00829197746f,
     0.00866511278f, 0.00908906199f, 0.00957536884f, 0.010139077f, 0.0107998867f, 0.011583765f,
     0.0125274761f, 0.0137164118f, 0.0158222653f, 0.0374337099f},
    {0.0f, 0.00828268379f, 0.00853504334f, 0.00881096628f, 0.00911422726f, 0.00944946706f,
     0.00982245337f, 0.0102404375f, 0.0107126357f, 0.0112508861f, 0.0118705435f, 0.0125916097f,
     0.0134399692f, 0.0144460117f, 0.0155646317f, 0.00957089011f},
    {0.0f, -0.00471794931f, -0.00485516386f, -0.00500457035f, -0.00516802212f, -0.00534777483f,
     -0.00554660475f, -0.0057679615f, -0.00601618318f, -0.00629678508f, -0.00661686203f,
     -0.00698563736f, -0.00741519546f, -0.00792124681f, -0.00851341337f, -0.00668891333f},
    {0.0f, 0.00370003236f, 0.00381026627f, 0.00393054914f, 0.00406244816f, 0.00420788443f,
     0.00436923187f, 0.00454945862f, 0.00475231791f, 0.00498260884f, 0.00524653308f, 0.00555217406f,
     0.00591010042f, 0.00633403938f, 0.00684037432f, 0.0069479458f},
};

// The coefficients in columns whose numbers are the last four bits.
inline Vec look_up(const float (&coefficients)[16], WordVec column) {
#ifdef __AVX512F__
  return (Vec)_mm512_permutexvar_ps((__m512i)column, (__m512)load(coefficients));
#else
  const __m256 low = _mm256_permutevar8x32_ps((__m256)load(coefficients), (__m256i)column);
  const __m256 high = _mm256_permutevar8x32_ps((__m256)load(coefficients + 8), (__m256i)column);
  return (Vec)_mm256_blendv_ps(low, high, (__m256)(column << 28));
#endif
}

inline Vec quantile_by_pieces(Vec four_v) {
  const WordVec bits = bit_cast<WordVec>(four_v), column = bits >> 23;
  const Vec t = 2.0f - bit_cast<Vec>((bits & 0x7fffffu) | 0x3f800000u);
  Vec z = look_up(PIECES[6], column);
  for (int power = 5; power >= 0; --power) z = z * t + look_up(PIECES[power], column);
  return z;
}

inline bool any_below(Vec values, float bound) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(bound), _CMP_LT_OQ) != 0;
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)values, _mm256_set1_ps(bound), _CMP_LT_OQ)) != 0;
#endif
}
#endif

}  // namespace fastperturb
