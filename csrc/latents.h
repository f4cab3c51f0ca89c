// The latents z of the noise contract (fastperturb/noise.py): Philox words to one of three
// distributions, many counters at a time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "maths.h"
#include "philox.h"
#include "quantile.h"

namespace fastperturb {

enum class Distribution { gaussian, uniform, rademacher };

// The words, and the latents, of LANES counters: [lane of Philox][counter].
using Words = WordVec[4];
using Latents = Vec[4];

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

// The fields GF(2^k), as noise.py has them.
constexpr uint32_t FIELDS[9] = {0b1,      0b11,      0b111,      0b1011,     0b10011,
                                0b100101, 0b1000011, 0b10000011, 0b100011011};

// The samples of a stratified group, 2^degree; 2^0 means independent samples.
struct Strata {
  uint32_t count = 1, degree = 0;
};

// A word's place is u = (stratum + unit(word)) / count in units of 2^-32, rounded down: the bits of
// the stratum, then the word's first. A quantile takes v, the distance to the nearer end of (0, 1).
inline float stratified_gaussian(uint32_t place, uint32_t word, Strata strata) {
  const bool upper = place >> 31;
  const uint32_t from_end = (upper ? ~place : place) >> (32 - strata.degree);
  const float share = 1.0f / static_cast<float>(strata.count);
  const float v = (static_cast<float>(from_end) + unit(upper ? ~word : word)) * share;
  return __builtin_copysignf(quantile_by_formula(v), upper ? 1.0f : -1.0f);
}

inline void stratified_by_formula(const Words& places, const Words& words, Strata strata,
                                  Latents& latents) {
  for (int lane = 0; lane < 4; ++lane) {
#pragma omp simd
    for (int i = 0; i < LANES; ++i) {
      latents[lane][i] = stratified_gaussian(places[lane][i], words[lane][i], strata);
    }
  }
}

#ifdef __AVX2__
typedef int32_t SignedVec __attribute__((vector_size(LANES * 4)));  // fast to convert

// From v = 2^-15 on, the word's last bits, which a place lacks, change z by less than 1e-6.
constexpr float LEAST_FOUR_V = 0x1p-13f;

inline Vec four_v_of(WordVec place) {
  const WordVec from_end = place < ~place ? place : ~place;
  return __builtin_convertvector((SignedVec)from_end, Vec) * 0x1p-30f + 0x1p-31f;
}

inline Vec stratified_by_pieces(WordVec place) {
  const WordVec size = bit_cast<WordVec>(quantile_by_pieces(four_v_of(place))) & 0x7fffffffu;
  return bit_cast<Vec>(size | (~place & 0x80000000u));
}

// Chooses between formula and pieces by a latent's own v, whatever is drawn beside it. Out of line,
// because few calls come here: one of 256 with 16 LANES.
[[gnu::noinline]] inline void stratified_by_both(const Words& places, const Words& words,
                                                 Strata strata, Latents& latents) {
  stratified_by_formula(places, words, strata, latents);
  for (int lane = 0; lane < 4; ++lane) {
    const Vec pieces = stratified_by_pieces(places[lane]);
    latents[lane] = four_v_of(places[lane]) < LEAST_FOUR_V ? latents[lane] : pieces;
  }
}
#endif

template <Distribution distribution>
inline void to_stratified(const Words& places, const Words& words, Strata strata,
                          Latents& latents) {
  if constexpr (distribution != Distribution::gaussian) {
    return to_latents<distribution>(places, latents);
  }
#ifdef __AVX2__
  Vec least = Vec{} + 2.0f;
  for (int lane = 0; lane < 4; ++lane) {
    const Vec four_v = four_v_of(places[lane]);
    least = four_v < least ? four_v : least;
  }
  if (any_below(least, LEAST_FOUR_V)) [[unlikely]] {
    return stratified_by_both(places, words, strata, latents);
  }
  for (int lane = 0; lane < 4; ++lane) latents[lane] = stratified_by_pieces(places[lane]);
#else
  stratified_by_formula(places, words, strata, latents);
#endif
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
  Strata strata;
  int64_t batch, length;
  const int64_t* samples;    // [M, B]
  const int64_t* rows;       // [B, T]
  const int64_t* positions;  // [B, T]
  // z is mean + deviation times the noise, where there is a mean [B, T, latent_dim].
  const float* mean;
  int64_t mean_batch_stride, mean_position_stride, latent_dim;
  float deviation;

  bool is_stratified() const { return strata.count > 1; }
};

// Latents z [samples][stride] for one token at a time, stride = the latents a sample rounded up to
// whole Philox blocks. Latents past R are drawn too and never read. The words of stratified groups
// are drawn once for the samples of a group that follow each other, and kept for `slots` tokens.
class Sampler {
 public:
  Sampler(const NoiseKeys& keys, int64_t num_samples, int64_t stride, int64_t slots = 1)
      : keys_(keys),
        num_samples_(num_samples),
        stride_(stride),
        blocks_(stride / 4),
        counters_(round_up(num_samples * blocks_, LANES)),
        block_(counters_),
        sample_(counters_),
        sign_(counters_),
        noise_(4 * counters_),
        z_(keys.mean ? 4 * counters_ : 0),
        groups_(keys.is_stratified() ? slots : 0) {
    for (int64_t i = 0; i < num_samples * blocks_; ++i) {
      block_[i] = static_cast<uint32_t>(i % blocks_);
    }
    if (!keys.is_stratified()) return;
    group_.resize(counters_);
    group_index_.resize(counters_);
    spread_.resize(num_samples > 1 ? 4 * counters_ : 0);
    multiples_.resize(keys.strata.degree * counters_);
  }

  // Returns z of samples first..first + num_samples - 1 at token n = b * T + t.
  const float* draw(int64_t token, int64_t first_sample = 0, int64_t slot = 0) {
    const int64_t b = token / keys_.length;
    const uint32_t row = static_cast<uint32_t>(keys_.rows[token]);
    const uint32_t position =
        keys_.sequence ? 0 : static_cast<uint32_t>(keys_.positions[token]);
    const bool same_samples = b == drawn_batch_ && first_sample == drawn_first_;
    if (!same_samples || row != drawn_row_ || position != drawn_position_) {
      if (!same_samples) number_samples(b, first_sample);
      drawn_batch_ = b;
      drawn_first_ = first_sample;
      drawn_row_ = row;
      drawn_position_ = position;
      if (keys_.distribution == Distribution::gaussian) fill<Distribution::gaussian>(slot);
      if (keys_.distribution == Distribution::uniform) fill<Distribution::uniform>(slot);
      if (keys_.distribution == Distribution::rademacher) fill<Distribution::rademacher>(slot);
    }
    if (!keys_.mean) return noise_;
    move_to_mean(keys_.mean + b * keys_.mean_batch_stride +
                 token % keys_.length * keys_.mean_position_stride);
    return z_;
  }

 private:
  // The words of the groups that the samples are in, at one token: [lane][run of samples][block].
  struct Groups {
    std::vector<uint32_t> numbers, words;
    uint32_t row = 0, position = 0;
  };

  void number_samples(int64_t b, int64_t first_sample) {
    group_numbers_.clear();
    for (int64_t m = 0; m < num_samples_; ++m) {
      const int64_t number = keys_.samples[(first_sample + m) * keys_.batch + b];
      const bool odd = keys_.antithetic && (number & 1);
      for (int64_t i = m * blocks_; i < (m + 1) * blocks_; ++i) {
        sample_[i] = static_cast<uint32_t>(odd ? number - 1 : number);
        sign_[i] = odd ? -1.0f : 1.0f;
      }
      if (keys_.is_stratified()) number_member(m, number);
    }
  }

  // Finds the group of a sample, and j x^i for its number j within it, so that a j is their sum
  // over the bits i of a. They are in the first bits, as in a place.
  void number_member(int64_t m, int64_t number) {
    const uint32_t degree = keys_.strata.degree;
    const uint32_t group = static_cast<uint32_t>(number) >> degree;
    if (group_numbers_.empty() || group_numbers_.back() != group) {
      std::fill_n(&group_[group_numbers_.size() * blocks_], blocks_, group);
      group_numbers_.push_back(group);
    }
    const int64_t first = (group_numbers_.size() - 1) * blocks_;
    uint32_t multiple = static_cast<uint32_t>(number) & (keys_.strata.count - 1);
    for (uint32_t bit = 0; bit < degree; ++bit) {
      std::fill_n(&multiples_[bit * counters_ + m * blocks_], blocks_, multiple << (32 - degree));
      multiple <<= 1;
      multiple ^= multiple >> degree ? FIELDS[degree] : 0;
    }
    for (int64_t q = 0; q < blocks_; ++q) {
      group_index_[m * blocks_ + q] = static_cast<uint32_t>(first + q);
    }
  }

  // Draws a factor a and a shift c for each latent of each group, packed as c 2^(32 - k) + a.
  const Groups& draw_groups(int64_t slot) {
    Groups& groups = groups_[slot];
    if (groups.row == drawn_row_ && groups.position == drawn_position_ &&
        groups.numbers == group_numbers_) {
      return groups;
    }
    groups.numbers = group_numbers_;
    groups.row = drawn_row_;
    groups.position = drawn_position_;
    const int64_t size = round_up(groups.numbers.size() * blocks_, LANES);
    groups.words.resize(4 * size);
    const Strata strata = keys_.strata;
    for (int64_t start = 0; start < size; start += LANES) {
      Words words = {load_words(&block_[start]) | 0x80000000u, WordVec{} + drawn_position_,
                     load_words(&group_[start]), WordVec{} + drawn_row_};
      philox(words, keys_.key);
      for (int lane = 0; lane < 4; ++lane) {
        const WordVec shift = words[lane] << (32 - strata.degree);
        const WordVec factor = 1 + (((words[lane] >> 8) * (strata.count - 1)) >> 24);
        const WordVec packed = shift | factor;
        std::memcpy(&groups.words[lane * size + start], &packed, sizeof packed);
      }
    }
    return groups;
  }

  template <Distribution distribution>
  void fill(int64_t slot) {
    if (keys_.is_stratified()) fill_strata<distribution>(spread(draw_groups(slot)));
    else fill_independently<distribution>();
  }

  // Out of line, as fill_strata is: a pass that holds both runs out of registers in both.
  template <Distribution distribution>
  [[gnu::noinline]] void fill_independently() {
    for (int64_t start = 0; start < counters_; start += LANES) {
      Words words;
      Latents latents;
      draw_words(start, words);
      to_latents<distribution>(words, latents);
      keep(start, latents);
    }
  }

  template <Distribution distribution>
  [[gnu::noinline]] void fill_strata(const uint32_t* group_words) {
    for (int64_t start = 0; start < counters_; start += LANES) {
      Words words, places;
      Latents latents;
      draw_words(start, words);
      find_places(group_words, start, words, places);
      to_stratified<distribution>(places, words, keys_.strata, latents);
      keep(start, latents);
    }
  }

  // Finds the stratum a j xor c of each word, and so its place.
  void find_places(const uint32_t* group_words, int64_t start, const Words& words,
                   Words& places) const {
    const Strata strata = keys_.strata;
    Words pair;
    for (int lane = 0; lane < 4; ++lane) {
      pair[lane] = load_words(group_words + lane * counters_ + start);
      places[lane] = (pair[lane] & 0xff000000u) | words[lane] >> strata.degree;
    }
    for (uint32_t bit = 0; bit < strata.degree; ++bit) {
      const WordVec multiple = load_words(&multiples_[bit * counters_ + start]);
      for (int lane = 0; lane < 4; ++lane) {
        places[lane] = (pair[lane] & (1u << bit)) != 0 ? places[lane] ^ multiple : places[lane];
      }
    }
  }

  // Returns the groups' words by counter. A sample alone has its group's in their own order.
  const uint32_t* spread(const Groups& groups) {
    if (num_samples_ == 1) return groups.words.data();
    const int64_t size = groups.words.size() / 4;
    for (int lane = 0; lane < 4; ++lane) {
      for (int64_t i = 0; i < counters_; ++i) {
        spread_[lane * counters_ + i] = groups.words[lane * size + group_index_[i]];
      }
    }
    return spread_.data();
  }

  // Writes the latents of LANES counters, with their samples' signs, in the order of r.
  void keep(int64_t start, const Latents& latents) {
    const float* sign = &sign_[start];
    float* z = noise_ + 4 * start;
#pragma omp simd
    for (int i = 0; i < LANES; ++i) {
      z[4 * i] = latents[0][i] * sign[i];
      z[4 * i + 1] = latents[1][i] * sign[i];
      z[4 * i + 2] = latents[2][i] * sign[i];
      z[4 * i + 3] = latents[3][i] * sign[i];
    }
  }

  void draw_words(int64_t start, Words& words) const {
    words[0] = load_words(&block_[start]);
    words[1] = WordVec{} + drawn_position_;
    words[2] = load_words(&sample_[start]);
    words[3] = WordVec{} + drawn_row_;
    philox(words, keys_.key);
  }

  void move_to_mean(const float* mean) {
    for (int64_t m = 0; m < num_samples_; ++m) {
      const float* noise = noise_ + m * stride_;
      float* z = z_ + m * stride_;
#pragma omp simd
      for (int64_t r = 0; r < keys_.latent_dim; ++r) z[r] = mean[r] + keys_.deviation * noise[r];
    }
  }

  const NoiseKeys keys_;
  const int64_t num_samples_, stride_, blocks_, counters_;
  std::vector<uint32_t> block_, sample_, group_, group_index_, spread_, multiples_, group_numbers_;
  std::vector<float> sign_;
  Buffer noise_, z_;
  std::vector<Groups> groups_;
  int64_t drawn_batch_ = -1, drawn_first_ = -1;
  uint32_t drawn_row_ = 0, drawn_position_ = 0;
};

}  // namespace fastperturb
