// perturb_embed forward: a block of tokens at a time, all M samples of each, so that a token's
// embedding comes from memory once. Finished rows go past the cache where the output is too big
// to stay in it.

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
};

template <class T>
class Forward {
 public:
  Forward(const Problem& problem, T* out)
      : problem_(problem), source_(static_cast<const T*>(problem.source)), out_(out) {
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
  const T* embedding(int64_t token) const { return source_ + problem_.source_row(token); }

  void copy(int64_t token) const {
    for (int64_t m = 0; m < problem_.num_samples; ++m) {
      std::memcpy(row(m, token), embedding(token), problem_.dim * sizeof(T));
    }
  }

  void put(T* to, Vec value, int64_t count) const {
    if (streaming_) return store_streaming(to, value);
    store_some(to, value, count);
  }

  // out = e + s z, a sample's rows of the block together.
  void perturb_diagonally(int64_t begin, int64_t end, int64_t block) const {
    Sampler sampler(problem_.noise, 1, round_up(problem_.dim, 4));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * block, last = end_of(index, block);
      for (int64_t n = first; n < last; ++n) {
        if (!problem_.perturbs(n)) copy(n);
      }
      for (int64_t m = 0; m < problem_.num_samples; ++m) {
        for (int64_t n = first; n < last; ++n) {
          if (problem_.perturbs(n)) perturb_row(embedding(n), sampler.draw(n, m), row(m, n));
        }
      }
    }
    streaming_fence();
  }

  void perturb_row(const T* from, const float* z, T* to) const {
    const float* scale = problem_.weights[0];
    for (int64_t d = 0; d < problem_.dim; d += LANES) {
      const int64_t left = problem_.dim - d;
      const Vec perturbed =
          load_some(from + d, left) + load_some(scale + d, left) * load_some(z + d, left);
      put(to + d, perturbed, left);
    }
  }

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
        for (int64_t m = 0; m < M; ++m) rows.push_back({embedding(n), gain, row(m, n)});
      }
      for (size_t start = 0; start < rows.size(); start += ROWS) {
        const int64_t count = rows.size() - start < ROWS ? rows.size() - start : ROWS;
        perturb_rows(&rows[start], count, coefficients + start * stride, stride, weights);
      }
    }
    streaming_fence();
  }

  void fill_coefficients(int64_t token, const float* z, float* to, int64_t stride) const {
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
    for (int64_t index = 0; index < weights.count(); ++index) {
      Tile shift = {};
      multiply(shift, coefficients, stride, weights.panel(index), problem_.inner_dim());
      const int64_t start = index * weights.width(), left = problem_.dim - start;
      if (count == ROWS && left >= weights.width()) {
        // Constant bounds keep the tile in registers.
        for (int i = 0; i < ROWS; ++i) finish<family, true>(rows[i], start, PANEL, shift[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) finish<family, false>(rows[i], start, left, shift[i]);
      }
    }
  }

  // One row of a tile: the columns from `start`, of which `left` are there.
  template <Family family, bool whole>
  void finish(const Row<T>& row, int64_t start, int64_t left, const Vec (&shift)[VECS]) const {
    constexpr int V = family == Family::affine ? 1 : VECS;
    for (int v = 0; v < V; ++v) {
      const int64_t d = start + v * LANES, count = whole ? LANES : left - v * LANES;
      if (count <= 0) return;
      const Vec e = load_some(row.embedding + d, count);
      Vec perturbed = e + shift[v];
      if constexpr (family == Family::gated) {
        perturbed = e + load_some(row.gain + d, count) * shift[v];
      } else if constexpr (family == Family::affine) {
        perturbed = e + shift[0] * e + shift[1];
      }
      put(row.out + d, perturbed, count);
    }
  }

  const Problem& problem_;
  const T* source_;
  T* out_;
  bool streaming_;
};

}  // namespace

void forward(const Problem& problem, void* out) {
  visit(problem.dtype, out, [&](auto* data) {
    advise_huge_pages(data, problem.num_samples * problem.tokens * problem.dim * sizeof(*data));
    Forward(problem, data).run();
  });
}

}  // namespace fastperturb
