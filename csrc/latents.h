// The latents z of the noise contract (fastperturb/noise.py): Philox words to one of three
// distributions, many counters at a time.

#pragma once

#include <cstdint>
#include <vector>

#include "maths.h"
#include "philox.h"

namespace fastperturb {

enum class Distribution { gaussian, uniform, rademacher };

// The words, and the latents, of LANES counters: [lane of Philox][counter].
using Words = uint32_t[4][LANES];
using Latents = float[4][LANES];

inline float unit(uint32_t word) { return (static_cast<float>(word) + 0.5f) * 0x1p-32f; }

// Box-Muller as noise.py has it. Near u = 1 the radius is measured from 1; there
// ln(1 - x) = ln(fl(1 - x)) + (the rounding error of 1 - x), to fp32.
inline void box_muller(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  const float from_one = unit(~radius_word);
  const float one_minus = 1.0f - from_one;
  const float error = (1.0f - one_minus) - from_one;
  const bool near_one = radius_word >> 31;
  const float log_u = natural_log(near_one ? one_minus : unit(radius_word)) +
                      (near_one ? error : 0.0f);
  const float square = -2.0f * log_u;
  const float radius = __builtin_sqrtf(square > 0.0f ? square : 0.0f);
  const float turn = static_cast<float>(static_cast<int32_t>(angle_word)) + 0.5f;
  float sine, cosine;
  sine_cosine(turn * 1.4629180792671596e-9f, sine, cosine);  // 2 pi 2^-32
  first = radius * cosine;
  second = radius * sine;
}

template <Distribution distribution>
inline void to_latents(const Words& words, Latents& latents) {
  if constexpr (distribution == Distribution::gaussian) {
#pragma omp simd
    for (int i = 0; i < LANES; ++i) {
      box_muller(words[0][i], words[1][i], latents[0][i], latents[1][i]);
      box_muller(words[2][i], words[3][i], latents[2][i], latents[3][i]);
    }
  } else {
    for (int lane = 0; lane < 4; ++lane) {
#pragma omp simd
      for (int i = 0; i < LANES; ++i) {
        const uint32_t word = words[lane][i];
        latents[lane][i] = distribution == Distribution::uniform ? 1.7320508075688772f * (2.0f * unit(word) - 1.0f)
                                             : 1.0f - 2.0f * static_cast<float>(word >> 31);
      }
    }
  }
}

inline void to_latents(Distribution distribution, const Words& words, Latents& latents) {
  if (distribution == Distribution::gaussian) to_latents<Distribution::gaussian>(words, latents);
  if (distribution == Distribution::uniform) to_latents<Distribution::uniform>(words, latents);
  if (distribution == Distribution::rademacher) to_latents<Distribution::rademacher>(words, latents);
}

// The numbers that key the noise of a call, and the distribution of its latents.
struct NoiseKeys {
  Distribution distribution;
  Key key;
  bool sequence;    // one latent a sequence: the position counts as 0
  bool antithetic;  // sample 2j + 1 is the negative of sample 2j
  int64_t batch, length;
  const int64_t* samples;    // [M, B]
  const int64_t* rows;       // [B, T]
  const int64_t* positions;  // [B, T]
};

// Latents z [samples][stride] for one token at a time, stride = the latents a sample rounded up to
// whole Philox blocks. Latents past R are drawn too and never read.
class Sampler {
 public:
  Sampler(const NoiseKeys& keys, int64_t num_samples, int64_t stride)
      : keys_(keys),
        num_samples_(num_samples),
        blocks_(stride / 4),
        counters_(round_up(num_samples * blocks_, LANES)),
        block_(counters_),
        sample_(counters_),
        sign_(counters_),
        z_(4 * counters_) {
    for (int64_t i = 0; i < num_samples * blocks_; ++i) {
      block_[i] = static_cast<uint32_t>(i % blocks_);
    }
  }

  // Returns z of samples first..first + num_samples - 1 at token n = b * T + t.
  const float* draw(int64_t token, int64_t first_sample = 0) {
    const int64_t b = token / keys_.length;
    const uint32_t row = static_cast<uint32_t>(keys_.rows[token]);
    const uint32_t position =
        keys_.sequence ? 0 : static_cast<uint32_t>(keys_.positions[token]);
    const bool same_samples = b == drawn_batch_ && first_sample == drawn_first_;
    if (same_samples && row == drawn_row_ && position == drawn_position_) return z_;
    if (!same_samples) number_samples(b, first_sample);
    drawn_batch_ = b;
    drawn_first_ = first_sample;
    drawn_row_ = row;
    drawn_position_ = position;
    if (keys_.distribution == Distribution::gaussian) fill<Distribution::gaussian>(position, row);
    if (keys_.distribution == Distribution::uniform) fill<Distribution::uniform>(position, row);
    if (keys_.distribution == Distribution::rademacher) fill<Distribution::rademacher>(position, row);
    return z_;
  }

 private:
  void number_samples(int64_t b, int64_t first_sample) {
    for (int64_t m = 0; m < num_samples_; ++m) {
      const int64_t number = keys_.samples[(first_sample + m) * keys_.batch + b];
      const bool odd = keys_.antithetic && (number & 1);
      for (int64_t i = m * blocks_; i < (m + 1) * blocks_; ++i) {
        sample_[i] = static_cast<uint32_t>(odd ? number - 1 : number);
        sign_[i] = odd ? -1.0f : 1.0f;
      }
    }
  }

  template <Distribution distribution>
  void fill(uint32_t position, uint32_t row) {
    for (int64_t start = 0; start < counters_; start += LANES) {
      const uint32_t* block = &block_[start];
      const uint32_t* sample = &sample_[start];
      const float* sign = &sign_[start];
      Words words;
      Latents latents;
      WordVec counters[4] = {load_words(block), WordVec{} + position, load_words(sample),
                             WordVec{} + row};
      philox(counters, keys_.key);
      for (int lane = 0; lane < 4; ++lane) std::memcpy(words[lane], &counters[lane], sizeof(Vec));
      to_latents<distribution>(words, latents);
      float* z = z_ + 4 * start;
#pragma omp simd
      for (int i = 0; i < LANES; ++i) {
        z[4 * i] = latents[0][i] * sign[i];
        z[4 * i + 1] = latents[1][i] * sign[i];
        z[4 * i + 2] = latents[2][i] * sign[i];
        z[4 * i + 3] = latents[3][i] * sign[i];
      }
    }
  }

  const NoiseKeys keys_;
  const int64_t num_samples_, blocks_, counters_;
  std::vector<uint32_t> block_, sample_;
  std::vector<float> sign_;
  Buffer z_;
  int64_t drawn_batch_ = -1, drawn_first_ = -1;
  uint32_t drawn_row_ = 0, drawn_position_ = 0;
};

}  // namespace fastperturb
