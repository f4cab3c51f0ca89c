// One SIMD vector of floats, and its loads and stores in the dtypes of the tables.
//
// GCC and clang vector extensions: the compiler picks the instructions, and arithmetic on `Vec`
// is plain `+` and `*`. Everything is computed in fp32 and rounded once, to nearest even.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fastperturb {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t WordVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfwordVec __attribute__((vector_size(LANES * 2)));

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class DType { float32, bfloat16, float16 };

// body(data) with the data as what they are.
template <class Void, class Body>
inline void visit(DType dtype, Void* data, const Body& body) {
  constexpr bool constant = std::is_const_v<Void>;
  switch (dtype) {
    case DType::float32:
      return body(static_cast<std::conditional_t<constant, const float, float>*>(data));
    case DType::bfloat16:
      return body(static_cast<std::conditional_t<constant, const BFloat16, BFloat16>*>(data));
    case DType::float16:
      return body(static_cast<std::conditional_t<constant, const Half, Half>*>(data));
  }
}

// Cache-line aligned floats, zero at the start.
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = (static_cast<size_t>(size) * sizeof(float) / 64 + 1) * 64;
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes);
  }
  float* data() const { return data_.get(); }
  operator float*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float[], Free> data_;
};

constexpr int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }
constexpr int64_t round_up(int64_t value, int64_t step) { return divide_up(value, step) * step; }

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The sum of the lanes, halves folded onto each other.
inline float sum_of_lanes(Vec value) {
  float lanes[LANES];
  std::memcpy(lanes, &value, sizeof(value));
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[half + i];
  }
  return lanes[0];
}

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline WordVec load_words(const uint32_t* from) {
  WordVec value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline Vec load(const BFloat16* from) {
  HalfwordVec bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bit_cast<Vec>(__builtin_convertvector(bits, WordVec) << 16);
}

inline HalfwordVec round_to_bfloat16(Vec value) {
  const WordVec bits = bit_cast<WordVec>(value);
  const WordVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WordVec is_nan = bit_cast<WordVec>((bits & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), HalfwordVec);
}

inline Vec load(const Half* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  typedef _Float16 HalfVec __attribute__((vector_size(LANES * 2)));
  HalfVec value;
  std::memcpy(&value, from, sizeof(value));
  return __builtin_convertvector(value, Vec);
#endif
}

inline HalfwordVec round_to_half(Vec value) {
#if defined(__AVX512F__)
  return (HalfwordVec)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfwordVec)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  typedef _Float16 HalfVec __attribute__((vector_size(LANES * 2)));
  return bit_cast<HalfwordVec>(__builtin_convertvector(value, HalfVec));
#endif
}

inline Vec rounded(Vec value, const float*) { return value; }
inline HalfwordVec rounded(Vec value, const BFloat16*) { return round_to_bfloat16(value); }
inline HalfwordVec rounded(Vec value, const Half*) { return round_to_half(value); }

template <class T>
inline void store(T* to, Vec value) {
  const auto bits = rounded(value, to);
  std::memcpy(to, &bits, sizeof(bits));
}

// Past the cache: `to` must be aligned to the vector's size in T.
template <class T>
inline void store_streaming(T* to, Vec value) {
  const auto bits = rounded(value, to);
#if defined(__AVX512F__)
  if constexpr (sizeof(bits) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(bits));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(bits));
  }
#elif defined(__AVX__)
  if constexpr (sizeof(bits) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(bits));
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(bits));
  }
#else
  std::memcpy(to, &bits, sizeof(bits));
#endif
}

// After streaming stores, before another thread reads them.
inline void streaming_fence() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

// The ragged end of a row: the first `count` lanes.
template <class T>
inline Vec load_some(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T lanes[LANES] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_some(T* to, Vec value, int64_t count) {
  if (count >= LANES) return store(to, value);
  T lanes[LANES];
  store(lanes, value);
  std::memcpy(to, lanes, count * sizeof(T));
}

}  // namespace fastperturb
