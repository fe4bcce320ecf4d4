// Split planar qkv, RMS-normalize q and k over the head, rotate adjacent pairs: value, value and
// tangent, backward; one sweep each. Formulas: mfmjt/kernels/qk_norm_rope.py.

#include "arguments.h"

namespace mfmjt {
namespace {

struct QkvShape {
  int64_t batch, tokens, heads, width;
};

// The weights of q and k and each token's cosines and sines, even and odd elements apart, so that
// the loops over a head are without strides but for the pairs themselves.
struct Constants {
  std::vector<float> weight[2], cosine, sine;
};

Constants constants_of(
    const char* op, const Tensor& q_weight, const Tensor& k_weight, const Maybe& rope,
    const QkvShape& s) {
  require(s.width % 2 == 0, op, "qkv must have an even head width, got ", s.width);
  Constants c;
  const int64_t half = s.width / 2;
  for (int part = 0; part < 2; ++part) {
    const Tensor& weight = part == 0 ? q_weight : k_weight;
    const char* name = part == 0 ? "q_weight" : "k_weight";
    check_tensor(op, name, weight);
    check_shape(op, name, weight, std::vector{s.width});
    const auto interleaved = to_floats(weight);
    c.weight[part].resize(s.width);
    for (int64_t i = 0; i < half; ++i) {
      c.weight[part][i] = interleaved[2 * i];
      c.weight[part][half + i] = interleaved[2 * i + 1];
    }
  }
  if (rope) {
    check_tensor(op, "rope", *rope);
    check_shape(op, "rope", *rope, std::vector<int64_t>{s.tokens, half, 2});
    const auto pairs = to_floats(*rope);
    c.cosine.resize(s.tokens * half);
    c.sine.resize(s.tokens * half);
    for (size_t i = 0; i < c.cosine.size(); ++i) {
      c.cosine[i] = pairs[2 * i];
      c.sine[i] = pairs[2 * i + 1];
    }
  } else {
    c.cosine.assign(half, 1.0f);
    c.sine.assign(half, 0.0f);
  }
  return c;
}

QkvShape shape_of(const char* op, const char* name, const Tensor& qkv) {
  check_tensor(op, name, qkv);
  check_rank(op, name, qkv, 5);
  check_size(op, name, qkv, 2, 3);
  return {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)};
}

template <class T>
struct ForwardPass {
  int64_t tokens, heads, width, rope_step;  // rope_step: width / 2, or 0 where there is no rope
  float eps;
  const T *qkv, *qkv_dot;
  const float *weight[2], *cosine, *sine;
  T *out[3], *out_dot[3];
  float* rstd[2];
};

template <class T, bool tangent>
MFMJT_BODY void forward_rows(const ForwardPass<T>* pass, int64_t begin, int64_t end) {
  const int64_t heads = pass->heads, width = pass->width, half = width / 2;
  const float inverse_width = 1.0f / static_cast<float>(width);
  for (int64_t row = begin; row < end; ++row) {
    const float* cosine = pass->cosine + row % pass->tokens * pass->rope_step;
    const float* sine = pass->sine + row % pass->tokens * pass->rope_step;
    for (int part = 0; part < 2; ++part) {
      const float *w_even = pass->weight[part], *w_odd = w_even + half;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t from = ((row * 3 + part) * heads + head) * width;
        const int64_t to = (row * heads + head) * width;
        const T *x = pass->qkv + from, *x_dot = tangent ? pass->qkv_dot + from : nullptr;
        float square = 0, product = 0;
#pragma omp simd reduction(+ : square, product)
        for (int64_t i = 0; i < width; ++i) {
          const float value = load(x[i]);
          square += value * value;
          if (tangent) product += value * load(x_dot[i]);
        }
        const float rstd = 1.0f / std::sqrt(square * inverse_width + pass->eps);
        const float projection = product * inverse_width * rstd * rstd;
        pass->rstd[part][row * heads + head] = rstd;
        T *y = pass->out[part] + to, *y_dot = tangent ? pass->out_dot[part] + to : nullptr;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const float x0 = load(x[2 * i]), x1 = load(x[2 * i + 1]);
          const float w0 = w_even[i] * rstd, w1 = w_odd[i] * rstd, c = cosine[i], s = sine[i];
          const float y0 = x0 * w0, y1 = x1 * w1;
          store(y + 2 * i, y0 * c - y1 * s);
          store(y + 2 * i + 1, y0 * s + y1 * c);
          if (tangent) {
            const float d0 = (load(x_dot[2 * i]) - x0 * projection) * w0;
            const float d1 = (load(x_dot[2 * i + 1]) - x1 * projection) * w1;
            store(y_dot + 2 * i, d0 * c - d1 * s);
            store(y_dot + 2 * i + 1, d0 * s + d1 * c);
          }
        }
      }
    }
    const int64_t n = heads * width, from = (row * 3 + 2) * n;
    std::memcpy(pass->out[2] + row * n, pass->qkv + from, n * sizeof(T));
    if (tangent) std::memcpy(pass->out_dot[2] + row * n, pass->qkv_dot + from, n * sizeof(T));
  }
}

template <bool tangent>
void run_forward(
    const QkvShape& s, const Tensor& qkv, const Tensor& qkv_dot, const Constants& c, double eps,
    std::vector<Tensor>& out, std::vector<Tensor>& out_dot, std::vector<Tensor>& rstd) {
  by_dtype(qkv, [&](auto zero) {
    using T = decltype(zero);
    ForwardPass<T> pass{};
    pass.tokens = s.tokens;
    pass.heads = s.heads;
    pass.width = s.width;
    pass.rope_step = static_cast<int64_t>(c.cosine.size()) == s.width / 2 ? 0 : s.width / 2;
    pass.eps = static_cast<float>(eps);
    pass.qkv = data<T>(qkv);
    if (tangent) pass.qkv_dot = data<T>(qkv_dot);
    pass.cosine = c.cosine.data();
    pass.sine = c.sine.data();
    for (int part = 0; part < 3; ++part) {
      out.push_back(new_tensor({s.batch, s.tokens, s.heads, s.width}, qkv.scalar_type()));
      pass.out[part] = mutable_data<T>(out[part]);
      if (tangent) {
        out_dot.push_back(new_like(out[part]));
        pass.out_dot[part] = mutable_data<T>(out_dot[part]);
      }
      if (part < 2) {
        pass.weight[part] = c.weight[part].data();
        rstd.push_back(new_tensor({s.batch, s.tokens, s.heads, 1}));
        pass.rstd[part] = mutable_data<float>(rstd[part]);
      }
    }
    const int64_t grain = std::max<int64_t>(1, kGrain / (3 * s.heads * s.width));
    parallel_for(s.batch * s.tokens, grain, [&](int64_t begin, int64_t end) {
      Clones<&forward_rows<T, tangent>>::run(&pass, begin, end);
    });
  });
}

// Cotangents arrive from attention in any layout; rows of a head are dense.
template <class T>
struct HeadBars {
  Tensor kept;
  const T* pointer = nullptr;  // null: no gradient arrived
  int64_t stride[3] = {0, 0, 0};

  HeadBars() = default;
  HeadBars(const char* op, const char* name, const Maybe& t, const Tensor& qkv,
       const QkvShape& s) {
    if (!t) return;
    check_dtype(op, name, *t, qkv);
    check_shape(op, name, *t, std::vector{s.batch, s.tokens, s.heads, s.width});
    kept = t->stride(3) == 1 ? *t : torch::stable::contiguous(*t);
    pointer = data<T>(kept);
    for (int64_t d = 0; d < 3; ++d) stride[d] = kept.stride(d);
  }
  const T* at(int64_t b, int64_t t, int64_t h) const {
    return pointer + b * stride[0] + t * stride[1] + h * stride[2];
  }
};

template <class T>
struct BackwardPass {
  int64_t rows, tokens, heads, width, rope_step;
  const T* qkv;
  HeadBars<T> bars[3];
  const float *weight[2], *cosine, *sine, *rstd[2];
  T* qkv_bar;
  float* sums;  // (chunks, 2, D), even elements before odd ones
};

template <class T>
MFMJT_BODY void backward_rows(const BackwardPass<T>* pass, int64_t begin, int64_t end) {
  const int64_t heads = pass->heads, width = pass->width, half = width / 2, n = heads * width;
  const float inverse_width = 1.0f / static_cast<float>(width);
  for (int64_t row = begin * kChunk; row < std::min(end * kChunk, pass->rows); ++row) {
    const int64_t b = row / pass->tokens, t = row % pass->tokens;
    const float *cosine = pass->cosine + t * pass->rope_step, *sine = pass->sine + t * pass->rope_step;
    for (int part = 0; part < 2; ++part) {
      T* bars = pass->qkv_bar + (row * 3 + part) * n;
      if (pass->bars[part].pointer == nullptr) {
        std::memset(bars, 0, n * sizeof(T));
        continue;
      }
      const float *w_even = pass->weight[part], *w_odd = w_even + half;
      float *even_sum = pass->sums + (row / kChunk * 2 + part) * width, *odd_sum = even_sum + half;
      for (int64_t head = 0; head < heads; ++head) {
        const T *y_bar = pass->bars[part].at(b, t, head);
        const T *x = pass->qkv + (row * 3 + part) * n + head * width;
        const float rstd = pass->rstd[part][row * heads + head];
        float product = 0;
#pragma omp simd reduction(+ : product)
        for (int64_t i = 0; i < half; ++i) {
          const float b0 = load(y_bar[2 * i]), b1 = load(y_bar[2 * i + 1]);
          const float g0 = b0 * cosine[i] + b1 * sine[i], g1 = b1 * cosine[i] - b0 * sine[i];
          const float p0 = g0 * (load(x[2 * i]) * rstd), p1 = g1 * (load(x[2 * i + 1]) * rstd);
          even_sum[i] += p0;
          odd_sum[i] += p1;
          product += p0 * w_even[i] + p1 * w_odd[i];
        }
        const float projection = product * inverse_width;
        T* x_bar = bars + head * width;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const float b0 = load(y_bar[2 * i]), b1 = load(y_bar[2 * i + 1]);
          const float g0 = b0 * cosine[i] + b1 * sine[i], g1 = b1 * cosine[i] - b0 * sine[i];
          const float n0 = load(x[2 * i]) * rstd, n1 = load(x[2 * i + 1]) * rstd;
          store(x_bar + 2 * i, rstd * (w_even[i] * g0 - n0 * projection));
          store(x_bar + 2 * i + 1, rstd * (w_odd[i] * g1 - n1 * projection));
        }
      }
    }
    T* v_bars = pass->qkv_bar + (row * 3 + 2) * n;
    if (pass->bars[2].pointer == nullptr) {
      std::memset(v_bars, 0, n * sizeof(T));
    } else {
      for (int64_t head = 0; head < heads; ++head) {
        std::memcpy(v_bars + head * width, pass->bars[2].at(b, t, head), width * sizeof(T));
      }
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_fwd(
    Tensor qkv, Tensor q_weight, Tensor k_weight, Maybe rope, double eps) {
  constexpr const char* op = "qk_norm_rope_fwd";
  const QkvShape s = shape_of(op, "qkv", qkv);
  const Constants c = constants_of(op, q_weight, k_weight, rope, s);
  std::vector<Tensor> out, none, rstd;
  run_forward<false>(s, dense(qkv), qkv, c, eps, out, none, rstd);
  return {out[0], out[1], out[2], rstd[0], rstd[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_jvp(
    Tensor qkv, Tensor qkv_dot, Tensor q_weight, Tensor k_weight, Maybe rope, double eps) {
  constexpr const char* op = "qk_norm_rope_jvp";
  const QkvShape s = shape_of(op, "qkv", qkv);
  check_same(op, "qkv_dot", qkv_dot, qkv);
  const Constants c = constants_of(op, q_weight, k_weight, rope, s);
  std::vector<Tensor> out, dot, rstd;
  run_forward<true>(s, dense(qkv), dense(qkv_dot), c, eps, out, dot, rstd);
  return {out[0], dot[0], out[1], dot[1], out[2], dot[2], rstd[0], rstd[1]};
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_bwd(
    Maybe q_bar, Maybe k_bar, Maybe v_bar, Tensor qkv, Tensor q_weight, Tensor k_weight,
    Maybe rope, Tensor q_rstd, Tensor k_rstd) {
  constexpr const char* op = "qk_norm_rope_bwd";
  const QkvShape s = shape_of(op, "qkv", qkv);
  const Constants c = constants_of(op, q_weight, k_weight, rope, s);
  const Tensor x = dense(qkv);
  Tensor qkv_bar = new_like(qkv), weight_bars[2] = {new_like(q_weight), new_like(k_weight)};
  const int64_t rows = s.batch * s.tokens, chunks = chunks_of(rows);
  std::vector<float> sums(chunks * 2 * s.width);
  by_dtype(qkv, [&](auto zero) {
    using T = decltype(zero);
    BackwardPass<T> pass{};
    pass.rows = rows;
    pass.tokens = s.tokens;
    pass.heads = s.heads;
    pass.width = s.width;
    pass.rope_step = rope ? s.width / 2 : 0;
    pass.qkv = data<T>(x);
    pass.bars[0] = HeadBars<T>(op, "q_bar", q_bar, qkv, s);
    pass.bars[1] = HeadBars<T>(op, "k_bar", k_bar, qkv, s);
    pass.bars[2] = HeadBars<T>(op, "v_bar", v_bar, qkv, s);
    pass.weight[0] = c.weight[0].data();
    pass.weight[1] = c.weight[1].data();
    pass.cosine = c.cosine.data();
    pass.sine = c.sine.data();
    pass.rstd[0] = statistic(op, "q_rstd", q_rstd, {s.batch, s.tokens, s.heads, 1});
    pass.rstd[1] = statistic(op, "k_rstd", k_rstd, {s.batch, s.tokens, s.heads, 1});
    pass.qkv_bar = mutable_data<T>(qkv_bar);
    pass.sums = sums.data();
    const int64_t grain = std::max<int64_t>(1, kGrain / (kChunk * 3 * s.heads * s.width));
    parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
      Clones<&backward_rows<T>>::run(&pass, begin, end);
    });
  });
  const int64_t half = s.width / 2;
  for (int part = 0; part < 2; ++part) {
    by_dtype(weight_bars[part], [&](auto zero) {
      using T = decltype(zero);
      T* bar = mutable_data<T>(weight_bars[part]);
      for (int64_t i = 0; i < s.width; ++i) {
        float sum = 0;
        for (int64_t k = 0; k < chunks; ++k) sum += sums[(k * 2 + part) * s.width + i];
        store(bar + (i < half ? 2 * i : 2 * (i - half) + 1), sum);
      }
    });
  }
  return {qkv_bar, weight_bars[0], weight_bars[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mfmjt_cpu, m) {
  m.def(
      "qk_norm_rope_fwd(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor? rope, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "qk_norm_rope_jvp(Tensor qkv, Tensor qkv_dot, Tensor q_weight, Tensor k_weight, "
      "Tensor? rope, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "qk_norm_rope_bwd(Tensor? q_bar, Tensor? k_bar, Tensor? v_bar, Tensor qkv, Tensor q_weight, "
      "Tensor k_weight, Tensor? rope, Tensor q_rstd, Tensor k_rstd) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mfmjt_cpu, CPU, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&qk_norm_rope_fwd));
  m.impl("qk_norm_rope_jvp", TORCH_BOX(&qk_norm_rope_jvp));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
}

}  // namespace mfmjt
