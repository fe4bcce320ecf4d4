// silu(gate) up: value, value and tangent, backward; one sweep each.
//
// Formulas: mfmjt/kernels/swiglu.py.

#include "common.h"
#include "ops.h"

namespace mfmjt {
namespace {

// 1 / (1 + e^-x); a NaN counts as a large number. As `exponential` in common.h with r of the other sign,
// but for what is far: the power of two ends at infinity and at zero, and so does the sigmoid.
template <class T>
MFMJT_BODY float sigmoid(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = static_cast<uint32_t>(std::min<int32_t>(static_cast<int32_t>(bits), 0x42b00000));  // 88
  bits = std::min<uint32_t>(bits, 0xc2b20000u);                                              // -89
  std::memcpy(&x, &bits, sizeof x);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const float shifted = shift - x * 0x1.715476p+0f;
  const float n = shifted - shift;
  const float r = x + n * 0x1.62e430p-1f;
  float p;
  if (std::is_same_v<T, float>) {
    p = 0x1.1062500p-7f;
    p = p * r - 0x1.572a64p-5f;
    p = p * r + 0x1.5557b0p-3f;
    p = p * r - 0x1.fffdfcp-2f;
    p = p * r + 1.0f;
    p = 1.0f - p * r;
  } else {
    p = 0x1.5224eap-5f;
    p = p * r - 0x1.571d1ep-3f;
    p = p * r + 0x1.0006b8p-1f;
    p = p * r - 1.0f;
    p = p * r + 1.0f;
  }
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // 2^n: the low bits of `shifted` are n, from -127 to 128
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return 1.0f / (1.0f + p * power);
}

template <class T>
MFMJT_BODY float value_of(float g, float u) {
  return g * sigmoid<T>(g) * u;
}

MFMJT_BODY void value(const float* gate, const float* up, float* y, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) y[i] = value_of<float>(gate[i], up[i]);
}

MFMJT_BODY void value(const bf16* gate, const bf16* up, bf16* y, int64_t begin, int64_t end) {
  const Word *g = words(gate + begin), *u = words(up + begin);
  Word* to = words(y + begin);
  const int64_t n = (end - begin) / 2;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = merge(value_of<bf16>(low(g[i]), low(u[i])), value_of<bf16>(high(g[i]), high(u[i])));
  }
  if (begin + 2 * n < end) {
    store(y + end - 1, value_of<bf16>(load(gate[end - 1]), load(up[end - 1])));
  }
}

struct Dual {
  float value, dot;
};

template <class T, bool has_gate_dot, bool has_up_dot>
MFMJT_BODY Dual dual_of(float g, float u, float g_dot, float u_dot) {
  const float sigma = sigmoid<T>(g), s = g * sigma;
  float dot = has_up_dot ? s * u_dot : 0.0f;
  if (has_gate_dot) dot += (sigma + s * (1.0f - sigma)) * (g_dot * u);
  return {s * u, dot};
}

template <bool has_gate_dot, bool has_up_dot>
MFMJT_BODY void tangent(
    const float* gate, const float* up, const float* gate_dot, const float* up_dot, float* y,
    float* y_dot, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const Dual d =
        dual_of<float, has_gate_dot, has_up_dot>(gate[i], up[i], gate_dot[i], up_dot[i]);
    y[i] = d.value;
    y_dot[i] = d.dot;
  }
}

template <bool has_gate_dot, bool has_up_dot>
MFMJT_BODY void tangent(
    const bf16* gate, const bf16* up, const bf16* gate_dot, const bf16* up_dot, bf16* y,
    bf16* y_dot, int64_t begin, int64_t end) {
  const Word *g = words(gate + begin), *u = words(up + begin);
  const Word *g_dot = words(gate_dot + begin), *u_dot = words(up_dot + begin);
  Word *to = words(y + begin), *to_dot = words(y_dot + begin);
  const int64_t n = (end - begin) / 2, last = end - 1;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Dual a = dual_of<bf16, has_gate_dot, has_up_dot>(
        low(g[i]), low(u[i]), low(g_dot[i]), low(u_dot[i]));
    const Dual b = dual_of<bf16, has_gate_dot, has_up_dot>(
        high(g[i]), high(u[i]), high(g_dot[i]), high(u_dot[i]));
    to[i] = merge(a.value, b.value);
    to_dot[i] = merge(a.dot, b.dot);
  }
  if (begin + 2 * n < end) {
    const Dual d = dual_of<bf16, has_gate_dot, has_up_dot>(
        load(gate[last]), load(up[last]), load(gate_dot[last]), load(up_dot[last]));
    store(y + last, d.value);
    store(y_dot + last, d.dot);
  }
}

// Cotangents of gate and up.
template <class T>
MFMJT_BODY std::pair<float, float> bars_of(float bar, float g, float u) {
  const float sigma = sigmoid<T>(g), s = g * sigma;
  return {bar * u * (sigma + s * (1.0f - sigma)), bar * s};
}

MFMJT_BODY void backward(
    const float* y_bar, const float* gate, const float* up, float* gate_bar, float* up_bar,
    int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const auto bars = bars_of<float>(y_bar[i], gate[i], up[i]);
    gate_bar[i] = bars.first;
    up_bar[i] = bars.second;
  }
}

MFMJT_BODY void backward(
    const bf16* y_bar, const bf16* gate, const bf16* up, bf16* gate_bar, bf16* up_bar,
    int64_t begin, int64_t end) {
  const Word *bar = words(y_bar + begin), *g = words(gate + begin), *u = words(up + begin);
  Word *to_gate = words(gate_bar + begin), *to_up = words(up_bar + begin);
  const int64_t n = (end - begin) / 2, last = end - 1;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto a = bars_of<bf16>(low(bar[i]), low(g[i]), low(u[i]));
    const auto b = bars_of<bf16>(high(bar[i]), high(g[i]), high(u[i]));
    to_gate[i] = merge(a.first, b.first);
    to_up[i] = merge(a.second, b.second);
  }
  if (begin + 2 * n < end) {
    const auto bars = bars_of<bf16>(load(y_bar[last]), load(gate[last]), load(up[last]));
    store(gate_bar + last, bars.first);
    store(up_bar + last, bars.second);
  }
}

// What is compiled for each instruction set
template <class T>
MFMJT_BODY void value_body(const T* gate, const T* up, T* y, int64_t begin, int64_t end) {
  value(gate, up, y, begin, end);
}
template <class T, bool has_gate_dot, bool has_up_dot>
MFMJT_BODY void tangent_body(
    const T* gate, const T* up, const T* gate_dot, const T* up_dot, T* y, T* y_dot, int64_t begin,
    int64_t end) {
  tangent<has_gate_dot, has_up_dot>(gate, up, gate_dot, up_dot, y, y_dot, begin, end);
}
template <class T>
MFMJT_BODY void backward_body(
    const T* y_bar, const T* gate, const T* up, T* gate_bar, T* up_bar, int64_t begin,
    int64_t end) {
  backward(y_bar, gate, up, gate_bar, up_bar, begin, end);
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
      Clones<&value_body<T>>::run(data<T>(g), data<T>(u), mutable_data<T>(y), begin, end);
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
    auto* run = gate_dot && up_dot ? &Clones<&tangent_body<T, true, true>>::run
                : gate_dot         ? &Clones<&tangent_body<T, true, false>>::run
                : up_dot           ? &Clones<&tangent_body<T, false, true>>::run
                                   : &Clones<&tangent_body<T, false, false>>::run;
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
      Clones<&backward_body<T>>::run(
          data<T>(bar), data<T>(g), data<T>(u), mutable_data<T>(gate_bar), mutable_data<T>(up_bar),
          begin, end);
    });
  });
  return {gate_bar, up_bar};
}

}  // namespace mfmjt
