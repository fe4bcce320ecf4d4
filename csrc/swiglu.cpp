// silu(gate) up: value, value and tangent, backward; one sweep each.
//
// Formulas: mfmjt/kernels/swiglu.py.

#include "arguments.h"
#include "exponential.h"

namespace mfmjt {
namespace {

template <class T>
MFMJT_BODY float value_of(float g, float u) {
  return g * sigmoid<T>(g) * u;
}

template <class T>
MFMJT_BODY void value(const T* gate, const T* up, T* y, int64_t begin, int64_t end) {
  if constexpr (kLanes<T> == 1) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) y[i] = value_of<T>(gate[i], up[i]);
  } else {
    const Word *g = words(gate + begin), *u = words(up + begin);
    Word* to = words(y + begin);
    const int64_t n = (end - begin) / 2, last = end - 1;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      to[i] = merge(value_of<T>(low(g[i]), low(u[i])), value_of<T>(high(g[i]), high(u[i])));
    }
    if (begin + 2 * n < end) store(y + last, value_of<T>(load(gate[last]), load(up[last])));
  }
}

template <class T, bool has_gate_dot, bool has_up_dot>
MFMJT_BODY Dual dual_of(float g, float u, float g_dot, float u_dot) {
  const float sigma = sigmoid<T>(g), s = g * sigma;
  float dot = has_up_dot ? s * u_dot : 0.0f;
  if (has_gate_dot) dot += (sigma + s * (1.0f - sigma)) * (g_dot * u);
  return {s * u, dot};
}

template <class T, bool has_gate_dot, bool has_up_dot>
MFMJT_BODY void tangent(
    const T* gate, const T* up, const T* gate_dot, const T* up_dot, T* y, T* y_dot, int64_t begin,
    int64_t end) {
  constexpr auto dual = dual_of<T, has_gate_dot, has_up_dot>;
  if constexpr (kLanes<T> == 1) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const Dual d = dual(gate[i], up[i], gate_dot[i], up_dot[i]);
      y[i] = d.value;
      y_dot[i] = d.dot;
    }
  } else {
    const Word *g = words(gate + begin), *u = words(up + begin);
    const Word *g_dot = words(gate_dot + begin), *u_dot = words(up_dot + begin);
    Word *to = words(y + begin), *to_dot = words(y_dot + begin);
    const int64_t n = (end - begin) / 2, last = end - 1;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Dual a = dual(low(g[i]), low(u[i]), low(g_dot[i]), low(u_dot[i]));
      const Dual b = dual(high(g[i]), high(u[i]), high(g_dot[i]), high(u_dot[i]));
      to[i] = merge(a.value, b.value);
      to_dot[i] = merge(a.dot, b.dot);
    }
    if (begin + 2 * n < end) {
      const Dual d =
          dual(load(gate[last]), load(up[last]), load(gate_dot[last]), load(up_dot[last]));
      store(y + last, d.value);
      store(y_dot + last, d.dot);
    }
  }
}

// Cotangents of gate and up.
template <class T>
MFMJT_BODY std::pair<float, float> bars_of(float bar, float g, float u) {
  const float sigma = sigmoid<T>(g), s = g * sigma;
  return {bar * u * (sigma + s * (1.0f - sigma)), bar * s};
}

template <class T>
MFMJT_BODY void backward(
    const T* y_bar, const T* gate, const T* up, T* gate_bar, T* up_bar, int64_t begin,
    int64_t end) {
  if constexpr (kLanes<T> == 1) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const auto bars = bars_of<T>(y_bar[i], gate[i], up[i]);
      gate_bar[i] = bars.first;
      up_bar[i] = bars.second;
    }
  } else {
    const Word *bar = words(y_bar + begin), *g = words(gate + begin), *u = words(up + begin);
    Word *to_gate = words(gate_bar + begin), *to_up = words(up_bar + begin);
    const int64_t n = (end - begin) / 2, last = end - 1;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const auto a = bars_of<T>(low(bar[i]), low(g[i]), low(u[i]));
      const auto b = bars_of<T>(high(bar[i]), high(g[i]), high(u[i]));
      to_gate[i] = merge(a.first, b.first);
      to_up[i] = merge(a.second, b.second);
    }
    if (begin + 2 * n < end) {
      const auto bars = bars_of<T>(load(y_bar[last]), load(gate[last]), load(up[last]));
      store(gate_bar + last, bars.first);
      store(up_bar + last, bars.second);
    }
  }
}

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

std::tuple<Tensor, Tensor> swiglu_jvp(Tensor gate, Tensor up, Maybe gate_dot, Maybe up_dot) {
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mfmjt_cpu, m) {
  m.def("swiglu_fwd(Tensor gate, Tensor up) -> Tensor");
  m.def(
      "swiglu_jvp(Tensor gate, Tensor up, Tensor? gate_dot, Tensor? up_dot) -> (Tensor, Tensor)");
  m.def("swiglu_bwd(Tensor y_bar, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mfmjt_cpu, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&swiglu_fwd));
  m.impl("swiglu_jvp", TORCH_BOX(&swiglu_jvp));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd));
}

}  // namespace mfmjt
