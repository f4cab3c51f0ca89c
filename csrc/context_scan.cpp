// The state of a context transform: a thread walks a row's tokens, LANES entries of the state at a
// time, so that the same bits come out for any number of threads.

#include "context_scan.h"

#include "parallel.h"
#include "vectors.h"

namespace fastperturb {
namespace {

// Some entries of one row's state.
struct Entries {
  int64_t row, first, count;  // count: up to LANES
};

template <class Body>
void for_each(const Scan& scan, const Body& body) {
  const int64_t blocks = divide_up(scan.width, LANES);
  parallel(scan.batch * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * LANES, left = scan.width - first;
      body(Entries{i / blocks, first, left < LANES ? left : LANES});
    }
  });
}

Vec initial_state(const Scan& scan, const Entries& entries) {
  if (!scan.initial) return Vec{};
  return load_some(scan.initial + entries.row * scan.width + entries.first, entries.count);
}

}  // namespace

void context_scan(const Scan& scan, float* states) {
  for_each(scan, [&](const Entries& entries) {
    const Vec retain = load_some(scan.retain + entries.first, entries.count);
    Vec state = initial_state(scan, entries);
    for (int64_t t = 0; t < scan.length; ++t) {
      const int64_t token = entries.row * scan.length + t;
      const int64_t at = token * scan.width + entries.first;
      if (!scan.real || scan.real[token]) {
        if (scan.starts && scan.starts[token]) state = Vec{};
        const Vec input = load_some(scan.inputs + at, entries.count);
        state = retain * state + (1.0f - retain) * input;
      }
      store_some(states + at, state, entries.count);
    }
  });
}

void context_scan_backward(const Scan& scan, const float* grad, const float* states,
                           float* grad_inputs, float* grad_retain) {
  for_each(scan, [&](const Entries& entries) {
    const Vec retain = load_some(scan.retain + entries.first, entries.count);
    const Vec initial = initial_state(scan, entries);
    Vec through = {}, of_retain = {};
    for (int64_t t = scan.length - 1; t >= 0; --t) {
      const int64_t token = entries.row * scan.length + t;
      const int64_t at = token * scan.width + entries.first;
      through += load_some(grad + at, entries.count);
      Vec of_input = {};
      if (!scan.real || scan.real[token]) {
        const bool starts = scan.starts && scan.starts[token];
        Vec before = t > 0 ? load_some(states + at - scan.width, entries.count) : initial;
        if (starts) before = Vec{};
        of_retain += through * (before - load_some(scan.inputs + at, entries.count));
        of_input = (1.0f - retain) * through;
        through = starts ? Vec{} : retain * through;
      }
      store_some(grad_inputs + at, of_input, entries.count);
    }
    store_some(grad_retain + entries.row * scan.width + entries.first, of_retain, entries.count);
  });
}

}  // namespace fastperturb
