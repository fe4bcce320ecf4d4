// silu(gate) up: value, value and tangent, backward; one sweep each.
//
// Formulas: mfmjt/kernels/swiglu.py. exp is 2^n e^r with r in [-ln 2 / 2, ln 2 / 2] and a polynomial,
// because the library's is a call per element; relative error 1e-7.

#include "common.h"
#include "ops.h"

namespace mfmjt {
namespace {

MFMJT_BODY float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;  // written so that NaN stays NaN
  x = x < -87.0f ? -87.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const float shifted = x * 0x1.715476p+0f + shift;
  const float n = shifted - shift;
  const float r = (x - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 0x1.6d7542p-10f;
  p = p * r + 0x1.120e94p-7f;
  p = p * r + 0x1.55541cp-5f;
  p = p * r + 0x1.5554f4p-3f;
  p = p * r + 0x1.000000p-1f;
  p = p * r * r + r;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // 2^n: the low bits of `shifted` are n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power + power;
}

MFMJT_BODY float sigmoid(float x) {
  const float y = 1.0f / (1.0f + exponential(-x));
  return x < -88.0f ? 0.0f : y;
}

template <class T>
MFMJT_BODY void value(const T* gate, const T* up, T* y, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float g = load(gate[i]);
    store(y + i, g * sigmoid(g) * load(up[i]));
  }
}

template <class T, bool has_gate_dot, bool has_up_dot>
MFMJT_BODY void tangent(
    const T* gate, const T* up, const T* gate_dot, const T* up_dot, T* y, T* y_dot, int64_t begin,
    int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float g = load(gate[i]), u = load(up[i]), sigma = sigmoid(g), s = g * sigma;
    float dot = 0;
    if (has_gate_dot) dot += (sigma + s * (1.0f - sigma)) * load(gate_dot[i]) * u;
    if (has_up_dot) dot += s * load(up_dot[i]);
    store(y + i, s * u);
    store(y_dot + i, dot);
  }
}

template <class T>
MFMJT_BODY void backward(
    const T* y_bar, const T* gate, const T* up, T* gate_bar, T* up_bar, int64_t begin,
    int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float bar = load(y_bar[i]), g = load(gate[i]), sigma = sigmoid(g), s = g * sigma;
    store(up_bar + i, bar * s);
    store(gate_bar + i, bar * load(up[i]) * (sigma + s * (1.0f - sigma)));
  }
}

}  // namespace

Tensor swiglu_fwd(Tensor gate, Tensor up) {
  check_tensor("swiglu_fwd", "gate", gate);
  check_same("swiglu_fwd", "up", up, gate);
  const Tensor g = dense(gate), u = dense(up);
  Tensor y = new_like(gate);
  by_dtype(gate, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      Clones<&value<T>>::run(data<T>(g), data<T>(u), mutable_data<T>(y), begin, end);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_jvp(
    Tensor gate, Tensor up, Maybe gate_dot, Maybe up_dot) {
  constexpr const char* op = "swiglu_jvp";
  check_tensor(op, "gate", gate);
  check_same(op, "up", up, gate);
  if (gate_dot) check_same(op, "gate_dot", *gate_dot, gate);
  if (up_dot) check_same(op, "up_dot", *up_dot, gate);
  const Tensor g = dense(gate), u = dense(up);
  const Tensor g_dot = gate_dot ? dense(*gate_dot) : g, u_dot = up_dot ? dense(*up_dot) : u;
  Tensor y = new_like(gate), y_dot = new_like(gate);
  by_dtype(gate, [&](auto zero) {
    using T = decltype(zero);
    auto* run = gate_dot && up_dot ? &Clones<&tangent<T, true, true>>::run
                : gate_dot         ? &Clones<&tangent<T, true, false>>::run
                : up_dot           ? &Clones<&tangent<T, false, true>>::run
                                   : &Clones<&tangent<T, false, false>>::run;
    parallel_for(gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      run(data<T>(g), data<T>(u), data<T>(g_dot), data<T>(u_dot), mutable_data<T>(y),
          mutable_data<T>(y_dot), begin, end);
    });
  });
  return {y, y_dot};
}

std::tuple<Tensor, Tensor> swiglu_bwd(Tensor y_bar, Tensor gate, Tensor up) {
  constexpr const char* op = "swiglu_bwd";
  check_tensor(op, "gate", gate);
  check_same(op, "up", up, gate);
  check_same(op, "y_bar", y_bar, gate);
  const Tensor bar = dense(y_bar), g = dense(gate), u = dense(up);
  Tensor gate_bar = new_like(gate), up_bar = new_like(gate);
  by_dtype(gate, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      Clones<&backward<T>>::run(
          data<T>(bar), data<T>(g), data<T>(u), mutable_data<T>(gate_bar), mutable_data<T>(up_bar),
          begin, end);
    });
  });
  return {gate_bar, up_bar};
}

}  // namespace mfmjt
