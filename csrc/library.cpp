// The operators of `torch.ops.fastperturb_cpp`, against torch's stable ABI.
//
// They check nothing that their callers in fastperturb/ops/cpp/ guarantee: CPU tensors, contiguous
// but for the upstream gradient and the rows of the table, counters and ids in int64, weights,
// logits and their statistics in fp32.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "combine.h"
#include "context_scan.h"
#include "head.h"
#include "perturb_embed.h"

namespace fastperturb {

void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* read(const OptionalTensor& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}

float* write(const OptionalTensor& tensor) {
  return tensor ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Half,
                      "the C++ kernels take float32, bfloat16 and float16");
      return DType::float16;
  }
}

Distribution parse_distribution(const std::string& name) {
  if (name == "gaussian") return Distribution::gaussian;
  if (name == "uniform") return Distribution::uniform;
  STD_TORCH_CHECK(name == "rademacher", "no distribution of the latent called ", name);
  return Distribution::rademacher;
}

Estimator parse_estimator(const std::string& name) {
  if (name == "jensen") return Estimator::jensen;
  if (name == "iwae") return Estimator::iwae;
  if (name == "jvi") return Estimator::jvi;
  STD_TORCH_CHECK(name == "jvi_clip", "no estimator called ", name);
  return Estimator::jvi_clip;
}

Family parse_family(const std::string& name) {
  if (name == "diagonal") return Family::diagonal;
  if (name == "lowrank") return Family::lowrank;
  if (name == "gated") return Family::gated;
  if (name == "affine") return Family::affine;
  if (name == "context") return Family::context;
  STD_TORCH_CHECK(name == "mlp", "no transform called ", name);
  return Family::mlp;
}

Problem make_problem(const Tensor& source, const OptionalTensor& ids, const OptionalTensor& mask,
                     const Tensor& seed, const Tensor& samples, const Tensor& rows,
                     const Tensor& positions, const std::vector<Tensor>& weights,
                     const OptionalTensor& per_token, const std::string& family,
                     const std::string& latent, bool sequence, bool antithetic, int64_t strata,
                     const OptionalTensor& mean, double deviation) {
  Problem problem = {};
  const uint64_t key = static_cast<uint64_t>(*read<int64_t>(seed));
  problem.family = parse_family(family);
  problem.noise.distribution = parse_distribution(latent);
  problem.noise.key = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  problem.noise.sequence = sequence;
  problem.noise.antithetic = antithetic;
  problem.noise.strata = {static_cast<uint32_t>(strata),
                          static_cast<uint32_t>(__builtin_ctzll(strata))};
  problem.noise.batch = positions.size(0);
  problem.noise.length = positions.size(1);
  problem.noise.samples = read<int64_t>(samples);
  problem.noise.rows = read<int64_t>(rows);
  problem.noise.positions = read<int64_t>(positions);
  problem.num_samples = samples.size(0);
  problem.tokens = positions.numel();
  problem.dim = source.size(1);
  problem.dtype = dtype_of(source);
  problem.source = source.const_data_ptr();
  problem.source_stride = source.stride(0);
  problem.ids = read<int64_t>(ids);
  problem.mask = read<bool>(mask);
  problem.per_token = read<float>(per_token);
  for (size_t i = 0; i < weights.size(); ++i) problem.weights[i] = read<float>(weights[i]);
  const bool is_mlp = problem.family == Family::mlp;
  problem.latent_dim = weights[is_mlp ? 1 : 0].size(0);
  problem.hidden_dim = is_mlp ? weights[0].size(0) : 0;
  problem.noise.latent_dim = problem.latent_dim;
  problem.noise.mean = read<float>(mean);
  problem.noise.mean_batch_stride = mean ? mean->stride(0) : 0;
  problem.noise.mean_position_stride = mean ? mean->stride(1) : 0;
  problem.noise.deviation = static_cast<float>(deviation);
  return problem;
}

// The registered passes. Each takes the arguments of make_problem between its own.
template <class... Call>
struct EmbedOps {
  static void forward(Tensor out, Call... call, OptionalTensor squared_shift) {
    fastperturb::forward(make_problem(call...), out.mutable_data_ptr(), write(squared_shift));
  }

  static void backward(Tensor grad, Call... call, bool per_row, std::vector<Tensor> grad_weights,
                       OptionalTensor upstream_sum, OptionalTensor through_shift) {
    const Upstream upstream = {grad.const_data_ptr(), grad.stride(0), grad.stride(1),
                               grad.stride(2)};
    Gradients gradients = {per_row, {}, write(upstream_sum), write(through_shift)};
    for (size_t i = 0; i < grad_weights.size(); ++i) gradients.weights[i] = write(grad_weights[i]);
    fastperturb::backward(make_problem(call...), upstream, gradients);
  }
};

template <class... Call>
EmbedOps<std::decay_t<Call>...> ops_around(Problem (*)(Call...));

using Embed = decltype(ops_around(&make_problem));

void scatter_rows_op(Tensor table, Tensor rows, Tensor ids, Tensor order) {
  scatter_rows(read<float>(rows), read<int64_t>(ids), read<int64_t>(order), ids.numel(),
               table.size(1), dtype_of(table), table.mutable_data_ptr());
}

void combine_op(Tensor value, Tensor log_marginal, Tensor effective_samples, Tensor weights,
                Tensor log_probs, Tensor mask, std::string estimator, bool sequence) {
  const Combination problem = {parse_estimator(estimator),
                               log_probs.size(0),
                               log_probs.size(1),
                               log_probs.size(2),
                               read<float>(log_probs),
                               log_probs.stride(0),
                               log_probs.stride(1),
                               read<bool>(mask),
                               write(value),
                               write(log_marginal),
                               write(effective_samples),
                               write(weights)};
  if (sequence) combine_sequences(problem);
  else combine_tokens(problem);
}

Scan make_scan(const Tensor& inputs, const Tensor& retain, const OptionalTensor& starts,
               const OptionalTensor& real, const OptionalTensor& initial) {
  return {inputs.size(0),      inputs.size(1),   inputs.size(2),
          read<float>(inputs), read<float>(retain), read<bool>(starts),
          read<bool>(real),    read<float>(initial)};
}

void context_scan_op(Tensor states, Tensor inputs, Tensor retain, OptionalTensor starts,
                     OptionalTensor real, OptionalTensor initial) {
  context_scan(make_scan(inputs, retain, starts, real, initial), write(states));
}

void context_scan_backward_op(Tensor grad_inputs, Tensor grad_retain, Tensor grad, Tensor states,
                              Tensor inputs, Tensor retain, OptionalTensor starts,
                              OptionalTensor real, OptionalTensor initial) {
  context_scan_backward(make_scan(inputs, retain, starts, real, initial), read<float>(grad),
                        read<float>(states), write(grad_inputs), write(grad_retain));
}

Products make_products(const Tensor& products) {
  const bool is_many = products.dim() == 3;
  return {write(products), is_many ? products.size(0) : 1, products.size(is_many),
          products.size(is_many + 1)};
}

LogitOptions make_options(int64_t start, const OptionalTensor& bias, double scale, double softcap) {
  return {start, read<float>(bias), static_cast<float>(scale), static_cast<float>(softcap)};
}

void online_softmax_op(Tensor products, int64_t start, OptionalTensor bias, double scale,
                       double softcap, Tensor target, Tensor peak, Tensor other_sum,
                       Tensor target_logit, OptionalTensor entropy_sum, bool want_weights,
                       OptionalTensor total) {
  online_softmax(make_products(products), make_options(start, bias, scale, softcap),
                 read<int64_t>(target),
                 {write(peak), write(other_sum), write(target_logit), write(entropy_sum)},
                 want_weights, write(total), total ? total->size(1) : 0);
}

void grad_logits_op(Tensor products, int64_t start, OptionalTensor bias, double scale,
                    double softcap, Tensor target, Tensor lse, Tensor upstream) {
  grad_logits(make_products(products), make_options(start, bias, scale, softcap),
              read<int64_t>(target), read<float>(lse), read<float>(upstream));
}

void quadratic_dot_op(Tensor products, int64_t start, OptionalTensor bias, double scale,
                      double softcap, Tensor lse, Tensor row_weights, int64_t strata,
                      Tensor dot_others) {
  quadratic_dot(make_products(products), make_options(start, bias, scale, softcap),
                read<float>(lse), read<float>(row_weights), strata, write(dot_others));
}

void quadratic_grad_logits_op(Tensor products, int64_t start, OptionalTensor bias, double scale,
                              double softcap, Tensor target, Tensor lse, Tensor row_weights,
                              Tensor dot, Tensor upstream, int64_t strata) {
  quadratic_grad_logits(make_products(products), make_options(start, bias, scale, softcap),
                        read<int64_t>(target), read<float>(lse), read<float>(row_weights),
                        read<float>(dot), read<float>(upstream), strata);
}

// For the tests: words [n, 4] of counters, and latents [n, 4] of words.
void philox_op(Tensor words, Tensor counters, Tensor seed) {
  const uint64_t key = static_cast<uint64_t>(*read<int64_t>(seed));
  const int64_t* from = read<int64_t>(counters);
  int64_t* to = static_cast<int64_t*>(words.mutable_data_ptr());
  const int64_t count = counters.size(0);
  for (int64_t start = 0; start < count; start += LANES) {
    const int64_t left = count - start < LANES ? count - start : LANES;
    WordVec block[4] = {};
    for (int64_t i = 0; i < 4 * left; ++i) block[i % 4][i / 4] = from[4 * start + i];
    philox(block, {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)});
    for (int64_t i = 0; i < 4 * left; ++i) to[4 * start + i] = block[i % 4][i / 4];
  }
}

void latents_op(Tensor latents, Tensor words, std::string latent) {
  const Distribution distribution = parse_distribution(latent);
  const int64_t* from = read<int64_t>(words);
  float* to = static_cast<float*>(latents.mutable_data_ptr());
  const int64_t count = words.size(0);
  for (int64_t start = 0; start < count; start += LANES) {
    const int64_t left = count - start < LANES ? count - start : LANES;
    Words block = {};
    Latents z;
    for (int64_t i = 0; i < 4 * left; ++i) block[i % 4][i / 4] = from[4 * start + i];
    to_latents(distribution, block, z);
    for (int64_t i = 0; i < 4 * left; ++i) to[4 * start + i] = z[i % 4][i / 4];
  }
}

}  // namespace
}  // namespace fastperturb

// The arguments of make_problem and make_scan, and those that say how products become logits.
#define EMBED_CALL                                                                           \
  "Tensor source, Tensor? ids, Tensor? mask, Tensor seed, Tensor samples, Tensor rows, "      \
  "Tensor positions, Tensor[] weights, Tensor? per_token, str family, str latent, "           \
  "bool sequence, bool antithetic, int strata, Tensor? mean, float deviation"
#define SCAN "Tensor inputs, Tensor retain, Tensor? starts, Tensor? real, Tensor? initial"
#define LOGIT_OPTIONS "int start, Tensor? bias, float scale, float softcap"

STABLE_TORCH_LIBRARY(fastperturb_cpp, m) {
  m.def("forward(Tensor(a!) out, " EMBED_CALL ", Tensor(b!)? squared_shift) -> ()");
  m.def("backward(Tensor grad, " EMBED_CALL
        ", bool per_row, Tensor(a!)[] grad_weights, Tensor(b!)? upstream_sum, "
        "Tensor(c!)? through_shift) -> ()");
  m.def("scatter_rows(Tensor(a!) table, Tensor rows, Tensor ids, Tensor order) -> ()");
  m.def(
      "combine(Tensor(a!) value, Tensor(b!) log_marginal, Tensor(c!) effective_samples, "
      "Tensor(d!) weights, Tensor log_probs, Tensor mask, str estimator, bool sequence) -> ()");
  m.def("context_scan(Tensor(a!) states, " SCAN ") -> ()");
  m.def("context_scan_backward(Tensor(a!) grad_inputs, Tensor(b!) grad_retain, Tensor grad, "
        "Tensor states, " SCAN ") -> ()");
  m.def("head_online_softmax(Tensor(a!) products, " LOGIT_OPTIONS
        ", Tensor target, Tensor(b!) peak, Tensor(c!) other_sum, Tensor(d!) target_logit, "
        "Tensor(e!)? entropy_sum, bool want_weights, Tensor(f!)? total) -> ()");
  m.def("head_grad_logits(Tensor(a!) products, " LOGIT_OPTIONS
        ", Tensor target, Tensor lse, Tensor upstream) -> ()");
  m.def("head_quadratic_dot(Tensor products, " LOGIT_OPTIONS
        ", Tensor lse, Tensor row_weights, int strata, Tensor(a!) dot_others) -> ()");
  m.def("head_quadratic_grad_logits(Tensor(a!) products, " LOGIT_OPTIONS
        ", Tensor target, Tensor lse, Tensor row_weights, Tensor dot, Tensor upstream, "
        "int strata) -> ()");
  m.def("philox(Tensor(a!) words, Tensor counters, Tensor seed) -> ()");
  m.def("latents(Tensor(a!) latents, Tensor words, str latent) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastperturb_cpp, CPU, m) {
  m.impl("forward", TORCH_BOX(&fastperturb::Embed::forward));
  m.impl("backward", TORCH_BOX(&fastperturb::Embed::backward));
  m.impl("scatter_rows", TORCH_BOX(&fastperturb::scatter_rows_op));
  m.impl("combine", TORCH_BOX(&fastperturb::combine_op));
  m.impl("context_scan", TORCH_BOX(&fastperturb::context_scan_op));
  m.impl("context_scan_backward", TORCH_BOX(&fastperturb::context_scan_backward_op));
  m.impl("head_online_softmax", TORCH_BOX(&fastperturb::online_softmax_op));
  m.impl("head_grad_logits", TORCH_BOX(&fastperturb::grad_logits_op));
  m.impl("head_quadratic_dot", TORCH_BOX(&fastperturb::quadratic_dot_op));
  m.impl("head_quadratic_grad_logits", TORCH_BOX(&fastperturb::quadratic_grad_logits_op));
  m.impl("philox", TORCH_BOX(&fastperturb::philox_op));
  m.impl("latents", TORCH_BOX(&fastperturb::latents_op));
}
