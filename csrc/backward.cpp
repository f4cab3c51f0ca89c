// perturb_embed backward: the upstream gradient is read once, a block of tokens at a time, and
// the latents are drawn a second time.
//
// A token's share of a weight's gradient is an outer product of its latents and its upstream rows,
// G_n = sum_m z_m^T g_m [K, D]:
//
//     lowrank  dU  = sum_n G_n
//     gated    dU  = sum_n gain_n * G_n       through the shift: sum_k U[k] * G_n[k]
//     affine   dUa = sum_n e_n * G_n          through the shift: sum_k Ua[k] * G_n[k]
//              dUb = sum_n G_n
//     mlp      dC  = sum_n G_n of the hidden units; dB and the gradient of h through g C^T
//     context  dU  = sum_n s_n * G_n          the gradient of s_n[k]: sum_d U[k, d] * G_n[k, d]
//
// Tokens are cut into chunks by the sizes alone, each with sums of its own that are added in
// order at the end: the same bits for any number of threads.

#include <algorithm>
#include <memory>
#include <vector>

#include "hidden.h"
#include "panels.h"
#include "perturb_embed.h"

namespace fastperturb {
namespace {

// Rows of the upstream gradient worked on at once. Rows lie a multiple of 4 KiB apart as a rule, so
// that a panel of more of them than the first cache has ways would push itself out; mlp's sums are
// larger and want fewer sweeps; diagonal goes through whole rows, one after the other.
int64_t block_rows(Family family) {
  if (family == Family::diagonal) return 32;
  return family == Family::mlp ? 16 : 8;
}

// Bounds on the chunks: work for many cores, and sums that stay small beside the upstream gradient.
constexpr int64_t MAX_CHUNKS = 64;
constexpr int64_t MIN_CHUNK_TOKENS = 32;

// A chunk's sums of the weights' gradients: the [K, D] ones, and mlp's dB or diagonal's ds.
struct Sums {
  Panels products;
  int64_t extra_size;
  Buffer extra;

  explicit Sums(const Problem& problem)
      : products(problem.family == Family::diagonal ? 0 : problem.inner_dim(), problem.dim,
                 problem.family == Family::affine ? 2 : 1),
        extra_size(problem.family == Family::diagonal ? round_up(problem.dim, LANES)
                   : problem.family == Family::mlp    ? problem.latent_dim * problem.hidden_dim
                                                      : 0),
        extra(extra_size) {}

  void add(const Sums& other) {
    products.add(other.products);
    for (int64_t i = 0; i < extra_size; ++i) extra[i] += other.extra[i];
  }
};

class Backward {
 public:
  Backward(const Problem& problem, const Upstream& upstream, const Gradients& gradients)
      : problem_(problem),
        upstream_(upstream),
        gradients_(gradients),
        block_(divide_up(block_rows(problem.family), problem.num_samples)),
        stride_(round_up(problem.inner_dim(), ROWS)),
        latent_stride_(round_up(problem.latent_dim, ROWS)),
        weights_(has_products() ? problem.inner_dim() : 0, problem.dim, is_affine() ? 2 : 1),
        transposed_(is_mlp() ? round_up(problem.dim, PANEL) : 0, problem.hidden_dim, 1) {
    if (problem.family == Family::gated || is_affine() || is_context()) {
      weights_.copy_in(problem.weights[0], problem.inner_dim(), problem.dim);
    }
    if (is_mlp()) transposed_.copy_in(problem.weights[2], problem.dim, problem.hidden_dim);
  }

  void run() const {
    if (gradients_.per_row) {
      const int64_t length = problem_.noise.length;
      parallel(problem_.noise.batch, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) write(*sum(b * length, (b + 1) * length), b);
      });
      return;
    }
    const int64_t chunk = divide_up(problem_.tokens, num_chunks());
    const int64_t count = divide_up(problem_.tokens, chunk);
    std::vector<std::unique_ptr<Sums>> sums(count);
    parallel(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sums[i] = sum(i * chunk, std::min((i + 1) * chunk, problem_.tokens));
      }
    });
    for (int64_t i = 1; i < count; ++i) sums[0]->add(*sums[i]);
    write(*sums[0], 0);
  }

 private:
  bool is_affine() const { return problem_.family == Family::affine; }
  bool is_mlp() const { return problem_.family == Family::mlp; }
  bool is_context() const { return problem_.family == Family::context; }
  bool has_products() const { return problem_.family != Family::diagonal; }

  int64_t num_chunks() const {
    const int64_t upstream_rows = problem_.num_samples * problem_.tokens;
    const int64_t by_memory = upstream_rows / (4 * stride_);
    const int64_t by_work = problem_.tokens / MIN_CHUNK_TOKENS;
    return std::max<int64_t>(1, std::min({MAX_CHUNKS, by_memory, by_work}));
  }

  // body(row) with an upstream row in its own dtype. Only the loads know the dtypes; everything
  // else is compiled once.
  template <class Body>
  void with_upstream(int64_t sample, int64_t token, const Body& body) const {
    const int64_t b = token / problem_.noise.length, t = token % problem_.noise.length;
    const int64_t offset = sample * upstream_.sample_stride + b * upstream_.batch_stride +
                           t * upstream_.position_stride;
    visit(problem_.dtype, upstream_.data, [&](auto* data) { body(data + offset); });
  }

  std::unique_ptr<Sums> sum(int64_t begin, int64_t end) const {
    auto sums = std::make_unique<Sums>(problem_);
    switch (problem_.family) {
      case Family::diagonal:
        sum_diagonally(begin, end, *sums);
        break;
      case Family::lowrank:
        sum_products<Family::lowrank>(begin, end, *sums);
        break;
      case Family::gated:
        sum_products<Family::gated>(begin, end, *sums);
        break;
      case Family::affine:
        sum_products<Family::affine>(begin, end, *sums);
        break;
      case Family::mlp:
        sum_products<Family::mlp>(begin, end, *sums);
        break;
      case Family::context:
        sum_products<Family::context>(begin, end, *sums);
        break;
    }
    return sums;
  }

  void write(const Sums& sums, int64_t slot) const {
    const int64_t K = problem_.inner_dim(), D = problem_.dim;
    if (problem_.family == Family::diagonal) {
      std::memcpy(gradients_.weights[0] + slot * D, sums.extra, D * sizeof(float));
      return;
    }
    for (int which = 0; which <= is_affine(); ++which) {
      sums.products.copy_out(gradients_.weights[which] + slot * K * D, K, D, which);
    }
    if (is_mlp()) {
      std::memcpy(gradients_.weights[1] + slot * sums.extra_size, sums.extra,
                  sums.extra_size * sizeof(float));
    }
  }

  // ds = sum g z, a sample's rows of a block together.
  void sum_diagonally(int64_t begin, int64_t end, Sums& sums) const {
    Sampler sampler(problem_.noise, 1, round_up(problem_.dim, LANES), block_);
    Buffer block_sum(sums.extra_size);
    for (int64_t first = begin; first < end; first += block_) {
      const int64_t last = std::min(first + block_, end);
      std::memset(block_sum, 0, sums.extra_size * sizeof(float));
      for (int64_t m = 0; m < problem_.num_samples; ++m) {
        for (int64_t n = first; n < last; ++n) {
          if (!problem_.perturbs(n)) continue;
          const float* z = sampler.draw(n, m, n - first);
          with_upstream(m, n, [&](const auto* g) { add_product(g, z, block_sum); });
        }
      }
      sum_upstream(first, last);
#pragma omp simd
      for (int64_t d = 0; d < sums.extra_size; ++d) sums.extra[d] += block_sum[d];
    }
  }

  template <class T>
  void add_product(const T* g, const float* z, float* to) const {
    for (int64_t d = 0; d < problem_.dim; d += LANES) {
      accumulate(to + d, load_some(g + d, problem_.dim - d) * load(z + d));
    }
  }

  // sum_m g, where wanted, of rows that were read a moment ago.
  void sum_upstream(int64_t first, int64_t last) const {
    if (!gradients_.upstream_sum) return;
    for (int64_t n = first; n < last; ++n) {
      float* to = gradients_.upstream_sum + n * problem_.dim;
      std::memset(to, 0, problem_.dim * sizeof(float));
      for (int64_t m = 0; m < problem_.num_samples; ++m) {
        with_upstream(m, n, [&](const auto* g) {
          for (int64_t d = 0; d < problem_.dim; d += LANES) {
            const int64_t left = problem_.dim - d;
            store_some(to + d, load_some(to + d, left) + load_some(g + d, left), left);
          }
        });
      }
    }
  }

  // The families with a [K, D] weight. `tokens` are a block's perturbed tokens; their rows of
  // coefficients (z, or mlp's hidden units) and of the upstream gradient are numbered j M + m.
  struct Workspace {
    std::vector<int64_t> tokens;
    Sampler sampler;
    Buffer latents, coefficients, staged, hidden, grad_hidden, grad_scale;

    explicit Workspace(const Backward& pass)
        : sampler(pass.problem_.noise, pass.problem_.num_samples, pass.latent_stride_),
          latents(pass.rows() * pass.latent_stride_),
          coefficients(pass.is_mlp() ? pass.rows() * pass.stride_ : 0),
          staged(pass.rows() * PANEL),
          hidden(pass.is_mlp() ? pass.rows() * pass.problem_.hidden_dim : 0),
          grad_hidden(pass.is_mlp() ? pass.rows() * pass.transposed_.count() * PANEL : 0),
          grad_scale(pass.is_context() ? pass.block_ * pass.stride_ * LANES : 0) {}
  };

  int64_t rows() const { return round_up(block_ * problem_.num_samples, ROWS); }

  template <Family family>
  void sum_products(int64_t begin, int64_t end, Sums& sums) const {
    Workspace work(*this);
    for (int64_t first = begin; first < end; first += block_) {
      const int64_t last = std::min(first + block_, end);
      draw(first, last, work);
      if constexpr (family == Family::mlp) make_hidden(work);
      const float* coefficients = family == Family::mlp ? work.coefficients : work.latents;
      for (int64_t index = 0; index < weights_.count(); ++index) {
        stage<family>(index, work);
        if constexpr (family == Family::gated || family == Family::affine) {
          add_modulated<family>(index, coefficients, work, sums);
        } else if constexpr (family == Family::context) {
          add_scaled(index, work, sums);
        } else {
          add_plain(index, coefficients, work, sums);
        }
        if constexpr (family == Family::mlp) add_to_grad_hidden(index, work);
      }
      if constexpr (family == Family::mlp) finish_hidden(work, sums);
      if constexpr (family == Family::context) finish_scale(work);
      sum_upstream(first, last);
    }
  }

  void draw(int64_t first, int64_t last, Workspace& work) const {
    const int64_t size = problem_.num_samples * latent_stride_;
    work.tokens.clear();
    for (int64_t n = first; n < last; ++n) {
      if (problem_.perturbs(n)) {
        std::memcpy(work.latents + work.tokens.size() * size, work.sampler.draw(n),
                    size * sizeof(float));
        work.tokens.push_back(n);
      } else if (gradients_.through_shift) {
        const int64_t width = is_mlp()       ? problem_.hidden_dim
                              : is_context() ? problem_.latent_dim
                                             : problem_.dim;
        std::memset(gradients_.through_shift + n * width, 0, width * sizeof(float));
      }
    }
  }

  // Copies one panel of the block's upstream rows to fp32, beside each other.
  template <Family family>
  void stage(int64_t index, Workspace& work) const {
    constexpr int64_t width = family == Family::affine ? LANES : PANEL;
    const int64_t start = index * width, left = problem_.dim - start;
    float* to = work.staged;
    for (int64_t token : work.tokens) {
      for (int64_t m = 0; m < problem_.num_samples; ++m, to += width) {
        with_upstream(m, token, [&](const auto* g) {
          for (int64_t d = 0; d < width; d += LANES) {
            store(to + d, d < left ? load_some(g + start + d, left - d) : Vec{});
          }
        });
      }
    }
  }

  template <int V>
  void store_columns(float* row, int64_t start, const Vec (&values)[V]) const {
    for (int v = 0; v < V; ++v) {
      const int64_t d = start + v * LANES;
      if (d < problem_.dim) store_some(row + d, values[v], problem_.dim - d);
    }
  }

  void add_plain(int64_t index, const float* coefficients, const Workspace& work,
                 Sums& sums) const {
    const int64_t count = work.tokens.size() * problem_.num_samples;
    for (int64_t k = 0; k < stride_; k += ROWS) {
      Tile product = {};
      add_outer(product, coefficients + k, stride_, work.staged, count);
      float* to = sums.products.panel(index) + k * PANEL;
      for (int row = 0; row < ROWS; ++row) {
        for (int v = 0; v < VECS; ++v) accumulate(to + row * PANEL + v * LANES, product[row][v]);
      }
    }
  }

  template <Family family>
  void add_modulated(int64_t index, const float* coefficients, const Workspace& work,
                     Sums& sums) const {
    constexpr int V = family == Family::affine ? 1 : VECS;
    const int64_t M = problem_.num_samples, start = index * V * LANES;
    for (size_t j = 0; j < work.tokens.size(); ++j) {
      const int64_t token = work.tokens[j];
      Vec modulation[V], through[V] = {};
      load_modulation<family>(token, start, modulation);
      for (int64_t k = 0; k < stride_; k += ROWS) {
        Vec product[ROWS][V] = {};
        add_outer(product, coefficients + j * M * stride_ + k, stride_,
                  work.staged + j * M * V * LANES, M);
        const float* weight = weights_.panel(index) + k * PANEL;
        float* to = sums.products.panel(index) + k * PANEL;
        for (int row = 0; row < ROWS; ++row) {
          for (int v = 0; v < V; ++v) {
            const int64_t at = row * PANEL + v * LANES;
            accumulate(to + at, modulation[v] * product[row][v]);
            through[v] += load(weight + at) * product[row][v];
          }
          if (family == Family::affine) accumulate(to + row * PANEL + LANES, product[row][0]);
        }
      }
      if (gradients_.through_shift) {
        store_columns<V>(gradients_.through_shift + token * problem_.dim, start, through);
      }
    }
  }

  // gated: the gain; affine: the embedding.
  template <Family family, int V>
  void load_modulation(int64_t token, int64_t start, Vec (&modulation)[V]) const {
    for (int v = 0; v < V; ++v) {
      const int64_t d = start + v * LANES, left = problem_.dim - d;
      if (left <= 0) {
        modulation[v] = Vec{};
      } else if constexpr (family == Family::gated) {
        modulation[v] = load_some(problem_.per_token + token * problem_.dim + d, left);
      } else {
        const int64_t offset = problem_.source_row(token) + d;
        visit(problem_.dtype, problem_.source,
              [&](auto* source) { modulation[v] = load_some(source + offset, left); });
      }
    }
  }

  // context, one panel of columns. The gradient of s is summed over the columns lane by lane.
  void add_scaled(int64_t index, Workspace& work, Sums& sums) const {
    const int64_t M = problem_.num_samples, R = problem_.latent_dim;
    for (size_t j = 0; j < work.tokens.size(); ++j) {
      const float* scale = problem_.per_token + work.tokens[j] * R;
      for (int64_t k = 0; k < stride_; k += ROWS) {
        Tile product = {};
        add_outer(product, work.latents + j * M * stride_ + k, stride_,
                  work.staged + j * M * PANEL, M);
        const float* weight = weights_.panel(index) + k * PANEL;
        float* to = sums.products.panel(index) + k * PANEL;
        for (int row = 0; row < ROWS; ++row) {
          const float factor = k + row < R ? scale[k + row] : 0.0f;
          Vec through = {};
          for (int v = 0; v < VECS; ++v) {
            const int64_t at = row * PANEL + v * LANES;
            accumulate(to + at, factor * product[row][v]);
            through += load(weight + at) * product[row][v];
          }
          accumulate(work.grad_scale + (j * stride_ + k + row) * LANES, through);
        }
      }
    }
  }

  // context after the panels.
  void finish_scale(Workspace& work) const {
    const int64_t R = problem_.latent_dim;
    for (size_t j = 0; j < work.tokens.size(); ++j) {
      for (int64_t r = 0; r < R; ++r) {
        const float* lanes = work.grad_scale + (j * stride_ + r) * LANES;
        gradients_.through_shift[work.tokens[j] * R + r] = sum_of_lanes(load(lanes));
      }
    }
    std::memset(work.grad_scale, 0, block_ * stride_ * LANES * sizeof(float));
  }

  // mlp before the panels: x = h + z B, and gelu(x) - gelu(h) as the coefficients.
  void make_hidden(Workspace& work) const {
    const int64_t M = problem_.num_samples, H = problem_.hidden_dim;
    for (size_t j = 0; j < work.tokens.size(); ++j) {
      const float* rest = problem_.per_token + work.tokens[j] * H;
      for (int64_t row = j * M; row < static_cast<int64_t>(j + 1) * M; ++row) {
        float* hidden = work.hidden + row * H;
        float* coefficients = work.coefficients + row * stride_;
        hidden_layer(problem_, rest, work.latents + row * latent_stride_, hidden);
#pragma omp simd
        for (int64_t h = 0; h < H; ++h) coefficients[h] = gelu(hidden[h]) - gelu(rest[h]);
      }
    }
    const int64_t size = rows() * transposed_.count() * PANEL;
    std::memset(work.grad_hidden, 0, size * sizeof(float));
  }

  // mlp, one panel of columns: grad_hidden [rows, H] += g C^T.
  void add_to_grad_hidden(int64_t index, Workspace& work) const {
    const int64_t count = work.tokens.size() * problem_.num_samples;
    const int64_t width = transposed_.count() * PANEL;
    for (int64_t panel = 0; panel < transposed_.count(); ++panel) {
      const float* weight = transposed_.panel(panel) + index * PANEL * PANEL;
      for (int64_t row = 0; row < count; row += ROWS) {
        Tile product = {};
        multiply(product, work.staged + row * PANEL, PANEL, weight, PANEL);
        for (int i = 0; i < ROWS; ++i) {
          float* to = work.grad_hidden + (row + i) * width + panel * PANEL;
          for (int v = 0; v < VECS; ++v) accumulate(to + v * LANES, product[i][v]);
        }
      }
    }
  }

  // mlp after the panels: with p = g C^T, dx = p * gelu'(x); dB += z^T dx;
  // dh = sum_m dx - gelu'(h) * sum_m p.
  void finish_hidden(Workspace& work, Sums& sums) const {
    const int64_t M = problem_.num_samples, H = problem_.hidden_dim;
    const int64_t width = transposed_.count() * PANEL;
    for (size_t j = 0; j < work.tokens.size(); ++j) {
      const float* rest = problem_.per_token + work.tokens[j] * H;
      float* grad_rest = gradients_.through_shift + work.tokens[j] * H;
      std::memset(grad_rest, 0, H * sizeof(float));
      for (int64_t row = j * M; row < static_cast<int64_t>(j + 1) * M; ++row) {
        const float* hidden = work.hidden + row * H;
        float* grad = work.grad_hidden + row * width;
#pragma omp simd
        for (int64_t h = 0; h < H; ++h) {
          const float through_gelu = grad[h] * gelu_slope(hidden[h]);
          grad_rest[h] += through_gelu - grad[h] * gelu_slope(rest[h]);
          grad[h] = through_gelu;
        }
        add_latent_outer(work.latents + row * latent_stride_, grad, sums.extra);
      }
    }
  }

  void add_latent_outer(const float* z, const float* grad, float* to) const {
    const int64_t H = problem_.hidden_dim;
    for (int64_t r = 0; r < problem_.latent_dim; ++r) {
      const float factor = z[r];
#pragma omp simd
      for (int64_t h = 0; h < H; ++h) to[r * H + h] += factor * grad[h];
    }
  }

  const Problem& problem_;
  const Upstream& upstream_;
  const Gradients& gradients_;
  const int64_t block_, stride_, latent_stride_;
  Panels weights_, transposed_;
};

}  // namespace

void backward(const Problem& problem, const Upstream& upstream, const Gradients& gradients) {
  Backward(problem, upstream, gradients).run();
}

void scatter_rows(const float* rows, const int64_t* ids, const int64_t* order, int64_t count,
                  int64_t dim, DType dtype, void* table) {
  parallel(count, [&](int64_t begin, int64_t end) {
    Buffer sum(round_up(dim, LANES));
    for (int64_t first = begin; first < end; ++first) {
      const int64_t id = ids[order[first]];
      if (first > 0 && ids[order[first - 1]] == id) continue;
      std::memset(sum, 0, dim * sizeof(float));
      for (int64_t i = first; i < count && ids[order[i]] == id; ++i) {
        const float* row = rows + order[i] * dim;
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) sum[d] += row[d];
      }
      visit(dtype, table, [&](auto* data) {
        for (int64_t d = 0; d < dim; d += LANES) {
          store_some(data + id * dim + d, load(sum + d), dim - d);
        }
      });
    }
  });
}

}  // namespace fastperturb
