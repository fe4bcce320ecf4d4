#include "common.h"

#include <atomic>

namespace mfmjt {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

namespace {
std::atomic<int> current{static_cast<int>(best_isa())};
}

Isa isa() { return static_cast<Isa>(current.load(std::memory_order_relaxed)); }

void limit_isa(int level) { current = std::clamp(level, 0, static_cast<int>(best_isa())); }

std::vector<float> to_floats(const Tensor& t) {
  const Tensor t_dense = dense(t);
  std::vector<float> values(t.numel());
  by_dtype(t, [&](auto zero) {
    const auto* from = data<decltype(zero)>(t_dense);
    for (size_t i = 0; i < values.size(); ++i) values[i] = load(from[i]);
  });
  return values;
}

}  // namespace mfmjt
