// perturb_embed forward: a block of tokens at a time, all M samples of each, so that a token's
// embedding comes from memory once. Finished rows go past the cache where the output is too big
// to stay in it. The squared length of a shift, where it is wanted, is summed lane by lane on the
// way: the output has the same bits with it and without.

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <vector>

#include "hidden.h"
#include "panels.h"
#include "perturb_embed.h"

namespace fastperturb {
namespace {

// Rows per block: enough to fill register tiles when M is small, few enough to stay in cache.
constexpr int64_t BLOCK_ROWS = 32;

// Outputs of at least this many bytes are written past the cache.
constexpr int64_t STREAMING_BYTES = 8 << 20;

// Asks for huge pages under a big output: a fresh one is then faulted in by 2 MiB and not by
// 4 KiB, which otherwise takes longer than to write it. Advice only; the result is the same.
void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(data), PAGE);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
struct Row {
  const T* embedding;
  const float* gain;
  T* out;
  float* squared_shift;
};

template <class T>
class Forward {
 public:
  Forward(const Problem& problem, T* out, float* squared_shift)
      : problem_(problem),
        source_(static_cast<const T*>(problem.source)),
        out_(out),
        squared_shift_(squared_shift) {
    const int64_t row_bytes = problem.dim * sizeof(T);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && row_bytes % 64 == 0;
    streaming_ = aligned && problem.num_samples * problem.tokens * row_bytes >= STREAMING_BYTES;
  }

  void run() const {
    const int64_t block = divide_up(BLOCK_ROWS, problem_.num_samples);
    const int64_t blocks = divide_up(problem_.tokens, block);
    if (problem_.family == Family::diagonal) {
      parallel(blocks, [&](int64_t begin, int64_t end) { perturb_diagonally(begin, end, block); });
      return;
    }
    Panels weights(problem_.inner_dim(), problem_.dim, is_affine() ? 2 : 1);
    for (int which = 0; which <= is_affine(); ++which) {
      weights.copy_in(problem_.weights[which], problem_.inner_dim(), problem_.dim, which);
    }
    parallel(blocks, [&](int64_t begin, int64_t end) { perturb(begin, end, block, weights); });
  }

 private:
  bool is_affine() const { return problem_.family == Family::affine; }
  int64_t end_of(int64_t block_index, int64_t block) const {
    const int64_t end = (block_index + 1) * block;
    return end < problem_.tokens ? end : problem_.tokens;
  }
  T* row(int64_t sample, int64_t token) const {
    return out_ + (sample * problem_.tokens + token) * problem_.dim;
  }
  float* squared_shift(int64_t sample, int64_t token) const {
    return squared_shift_ ? squared_shift_ + sample * problem_.tokens + token : nullptr;
  }
  const T* embedding(int64_t token) const { return source_ + problem_.source_row(token); }

  void copy(int64_t token) const {
    for (int64_t m = 0; m < problem_.num_samples; ++m) {
      std::memcpy(row(m, token), embedding(token), problem_.dim * sizeof(T));
      if (squared_shift_) *squared_shift(m, token) = 0.0f;
    }
  }

  void put(T* to, Vec value, int64_t count) const {
    if (streaming_) return store_streaming(to, value);
    store_some(to, value, count);
  }

  // out = e + s z, a sample's rows of the block together.
  void perturb_diagonally(int64_t begin, int64_t end, int64_t block) const {
    Sampler sampler(problem_.noise, 1, round_up(problem_.dim, 4), block);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * block, last = end_of(index, block);
      for (int64_t n = first; n < last; ++n) {
        if (!problem_.perturbs(n)) copy(n);
      }
      for (int64_t m = 0; m < problem_.num_samples; ++m) {
        for (int64_t n = first; n < last; ++n) {
          if (!problem_.perturbs(n)) continue;
          const float* z = sampler.draw(n, m, n - first);
          if (squared_shift_) perturb_row<true>(m, n, z);
          else perturb_row<false>(m, n, z);
        }
      }
    }
    streaming_fence();
  }

  template <bool measured>
  void perturb_row(int64_t sample, int64_t token, const float* z) const {
    const T* from = embedding(token);
    T* to = row(sample, token);
    const float* scales = problem_.weights[0];
    Vec squares = {};
    for (int64_t d = 0; d < problem_.dim; d += LANES) {
      const int64_t left = problem_.dim - d;
      const Vec scale = load_some(scales + d, left), latent = load_some(z + d, left);
      if constexpr (measured) squares += square_of_product(scale, latent);
      put(to + d, load_some(from + d, left) + scale * latent, left);
    }
    if constexpr (measured) *squared_shift(sample, token) = sum_of_lanes(squares);
  }

  // (a b)^2 without the product a b, which would no longer be fused with the sum e + a b.
  static Vec square_of_product(Vec a, Vec b) { return (a * a) * (b * b); }

  // The other families: rows of coefficients (z, or mlp's hidden units) times the weights.
  void perturb(int64_t begin, int64_t end, int64_t block, const Panels& weights) const {
    const int64_t M = problem_.num_samples, K = problem_.inner_dim();
    const int64_t stride = round_up(K, 4);
    Sampler sampler(problem_.noise, M, round_up(problem_.latent_dim, 4));
    Buffer coefficients(round_up(block * M, ROWS) * stride);
    std::vector<Row<T>> rows;
    for (int64_t index = begin; index < end; ++index) {
      rows.clear();
      for (int64_t n = index * block; n < end_of(index, block); ++n) {
        if (!problem_.perturbs(n)) {
          copy(n);
          continue;
        }
        fill_coefficients(n, sampler.draw(n), coefficients + rows.size() * stride, stride);
        const bool gated = problem_.family == Family::gated;
        const float* gain = gated ? problem_.per_token + n * problem_.dim : nullptr;
        for (int64_t m = 0; m < M; ++m) {
          rows.push_back({embedding(n), gain, row(m, n), squared_shift(m, n)});
        }
      }
      for (size_t start = 0; start < rows.size(); start += ROWS) {
        const int64_t count = rows.size() - start < ROWS ? rows.size() - start : ROWS;
        perturb_rows(&rows[start], count, coefficients + start * stride, stride, weights);
      }
    }
    streaming_fence();
  }

  void fill_coefficients(int64_t token, const float* z, float* to, int64_t stride) const {
    if (problem_.family == Family::context) {
      const float* scale = problem_.per_token + token * problem_.latent_dim;
      for (int64_t m = 0; m < problem_.num_samples; ++m) {
#pragma omp simd
        for (int64_t r = 0; r < problem_.latent_dim; ++r) {
          to[m * stride + r] = z[m * stride + r] * scale[r];
        }
      }
      return;
    }
    if (problem_.family != Family::mlp) {
      std::memcpy(to, z, problem_.num_samples * stride * sizeof(float));
      return;
    }
    const int64_t H = problem_.hidden_dim;
    const float* rest = problem_.per_token + token * H;
    for (int64_t m = 0; m < problem_.num_samples; ++m) {
      float* hidden = to + m * stride;
      hidden_layer(problem_, rest, z + m * round_up(problem_.latent_dim, 4), hidden);
#pragma omp simd
      for (int64_t h = 0; h < H; ++h) hidden[h] = gelu(hidden[h]) - gelu(rest[h]);
    }
  }

  void perturb_rows(const Row<T>* rows, int64_t count, const float* coefficients, int64_t stride,
                    const Panels& weights) const {
    switch (problem_.family) {
      case Family::gated:
        return perturb_tile<Family::gated>(rows, count, coefficients, stride, weights);
      case Family::affine:
        return perturb_tile<Family::affine>(rows, count, coefficients, stride, weights);
      default:
        return perturb_tile<Family::lowrank>(rows, count, coefficients, stride, weights);
    }
  }

  template <Family family>
  void perturb_tile(const Row<T>* rows, int64_t count, const float* coefficients, int64_t stride,
                    const Panels& weights) const {
    if (squared_shift_) perturb_tile<family, true>(rows, count, coefficients, stride, weights);
    else perturb_tile<family, false>(rows, count, coefficients, stride, weights);
  }

  template <Family family, bool measured>
  void perturb_tile(const Row<T>* rows, int64_t count, const float* coefficients, int64_t stride,
                    const Panels& weights) const {
    Vec squares[ROWS] = {};
    for (int64_t index = 0; index < weights.count(); ++index) {
      Tile products = {};
      multiply(products, coefficients, stride, weights.panel(index), problem_.inner_dim());
      const int64_t start = index * weights.width(), left = problem_.dim - start;
      if (count == ROWS && left >= weights.width()) {
        // Constant bounds keep the tile in registers.
        for (int i = 0; i < ROWS; ++i) {
          finish<family, measured, true>(rows[i], start, PANEL, products[i], squares[i]);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          finish<family, measured, false>(rows[i], start, left, products[i], squares[i]);
        }
      }
    }
    if constexpr (measured) {
      for (int64_t i = 0; i < count; ++i) *rows[i].squared_shift = sum_of_lanes(squares[i]);
    }
  }

  // One row of a tile: the columns from `start`, of which `left` are there. `products` are those
  // with the weights, 0 in columns that are not there.
  template <Family family, bool measured, bool whole>
  void finish(const Row<T>& row, int64_t start, int64_t left, const Vec (&products)[VECS],
              Vec& squares) const {
    constexpr int V = family == Family::affine ? 1 : VECS;
    for (int v = 0; v < V; ++v) {
      const int64_t d = start + v * LANES, count = whole ? LANES : left - v * LANES;
      if (count <= 0) return;
      const Vec e = load_some(row.embedding + d, count);
      Vec perturbed, square;
      if constexpr (family == Family::gated) {
        const Vec gain = load_some(row.gain + d, count);
        perturbed = e + gain * products[v];
        square = square_of_product(gain, products[v]);
      } else {
        const Vec shift = family == Family::affine ? products[0] * e + products[1] : products[v];
        perturbed = e + shift;
        square = shift * shift;
      }
      if constexpr (measured) squares += square;
      put(row.out + d, perturbed, count);
    }
  }

  const Problem& problem_;
  const T* source_;
  T* out_;
  float* squared_shift_;
  bool streaming_;
};

}  // namespace

void forward(const Problem& problem, void* out, float* squared_shift) {
  visit(problem.dtype, out, [&](auto* data) {
    advise_huge_pages(data, problem.num_samples * problem.tokens * problem.dim * sizeof(*data));
    Forward(problem, data, squared_shift).run();
  });
}

}  // namespace fastperturb
