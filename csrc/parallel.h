#pragma once

#include <cstdint>
#include <functional>

namespace fastperturb {

// body(begin, end) over [0, count), on torch's threads.
void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body);

}  // namespace fastperturb
