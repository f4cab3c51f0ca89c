// Philox-4x32-10 (Salmon et al., 2011), the same words as fastperturb/noise.py.
//
// A round is two 32 x 32 -> 64 bit products. SIMD units multiply so only on 64-bit lanes, which
// ignore their upper halves: a vector of counters is worked as its even and its odd lanes, each
// with garbage above the 32 bits that count, and put together again at the end.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace fastperturb {

struct Key {
  uint32_t low;
  uint32_t high;
};

typedef uint64_t WideVec __attribute__((vector_size(LANES * 4)));

// The low 32 bits of each lane times `factor`: 64 bits.
inline WideVec multiply(WideVec lanes, uint32_t factor) {
#if defined(__AVX512F__)
  return (WideVec)_mm512_mul_epu32((__m512i)lanes, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (WideVec)_mm256_mul_epu32((__m256i)lanes, _mm256_set1_epi64x(factor));
#else
  return (lanes & 0xffffffffu) * static_cast<uint64_t>(factor);
#endif
}

inline void philox_round(WideVec (&c)[4], Key key) {
  const WideVec product0 = multiply(c[0], 0xD2511F53u);
  const WideVec product2 = multiply(c[2], 0xCD9E8D57u);
  c[0] = (product2 >> 32) ^ c[1] ^ static_cast<uint64_t>(key.low);
  c[1] = product2;
  c[2] = (product0 >> 32) ^ c[3] ^ static_cast<uint64_t>(key.high);
  c[3] = product0;
}

// Ten rounds on LANES counters (c0, c1, c2, c3), in place.
inline void philox(WordVec (&counters)[4], Key key) {
  WideVec even[4], odd[4];
  for (int lane = 0; lane < 4; ++lane) {
    even[lane] = bit_cast<WideVec>(counters[lane]);
    odd[lane] = even[lane] >> 32;
  }
  for (int round = 0; round < 10; ++round) {
    philox_round(even, key);
    philox_round(odd, key);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  for (int lane = 0; lane < 4; ++lane) {
    counters[lane] = bit_cast<WordVec>((even[lane] & 0xffffffffu) | (odd[lane] << 32));
  }
}

}  // namespace fastperturb
