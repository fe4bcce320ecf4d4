// What lies between the matrix products of attention, row by row and in place: the softmax, its
// tangent, its cotangent. The products are PyTorch's. Formulas: mfmjt/kernels/joint_attention.py.

#include "arguments.h"
#include "exponential.h"

namespace mfmjt {
namespace {

template <class T>
struct SoftmaxPass {
  int64_t rows, width;  // rows of each head
  float scale;
  T *s, *dot;           // (G, R, M): scores, and their tangent or the cotangent of p
  const T* bias;        // (G or 1, R or 1, M), added to scale s; -inf hides, whatever s is
  int64_t bias_head, bias_row;  // its strides
  float* lse;           // (G, R), the log of each row's sum of exp
};

constexpr uint32_t kHidden = 0xff800000u;  // -inf, compared as an integer: see exponential.h

// One row; p is room for it in the order of sweeps.
template <class T, bool masked>
struct ScoreRow {
  T *s, *dot;
  const T* bias;
  Scratch p;
  float scale, first;  // `first`: any of `dot`, taken off before sums, lest a common offset take digits
  float top = -std::numeric_limits<float>::infinity(), inverse_sum = 0, center = 0;

  template <class Lane>
  MFMJT_BODY float score(Lane lane, int64_t i) const {
    const float a = at(lane, s, i) * scale;
    if constexpr (!masked) return a;
    return shown(lane, i, a + at(lane, bias, i), kHidden);
  }
  template <class Lane>
  MFMJT_BODY float shown(Lane lane, int64_t i, float x, uint32_t instead) const {
    return float_of(bits_of(at(lane, bias, i)) == kHidden ? instead : bits_of(x));
  }
  template <class Lane>
  MFMJT_BODY float power(Lane lane, int64_t i) const {
    return exponential<T>(at(lane, p, i) - top);
  }
  template <class Lane>
  MFMJT_BODY float moved(Lane lane, int64_t i) const {  // tangent or cotangent of the row
    return at(lane, p, i) * inverse_sum * scale * (shifted(lane, i) - center);
  }
  template <class Lane>
  MFMJT_BODY float shifted(Lane lane, int64_t i) const {
    const float a = at(lane, dot, i) - first;
    if constexpr (!masked) return a;
    return shown(lane, i, a, 0);
  }
};

template <bool tangent, class T, bool masked>
MFMJT_BODY float softmax_row(ScoreRow<T, masked> row, int64_t width) {
  const int64_t groups = width / kLanes<T>;
  float top = row.top;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < groups; ++i) {
    const float a = row.score(First<T>{}, i);
    at(First<T>{}, row.p, i) = a;
    top = a > top ? a : top;
    if constexpr (kLanes<T> == 2) {
      const float b = row.score(High{}, i);
      at(High{}, row.p, i) = b;
      top = b > top ? b : top;
    }
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    const float a = row.score(Single{}, i);
    at(Single{}, row.p, i) = a;
    top = a > top ? a : top;
  }
  if (masked && bits_of(top) == kHidden) top = 0;
  row.top = top;
  float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < groups; ++i) {
    const float a = row.power(First<T>{}, i);
    at(First<T>{}, row.p, i) = a;
    sum += a;
    if constexpr (tangent) product += a * row.shifted(First<T>{}, i);
    if constexpr (kLanes<T> == 2) {
      const float b = row.power(High{}, i);
      at(High{}, row.p, i) = b;
      sum += b;
      if constexpr (tangent) product += b * row.shifted(High{}, i);
    }
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    const float a = row.power(Single{}, i);
    at(Single{}, row.p, i) = a;
    sum += a;
    if constexpr (tangent) product += a * row.shifted(Single{}, i);
  }
  if (masked && sum == 0) sum = 1;
  row.inverse_sum = 1.0f / sum;
  row.center = product * row.inverse_sum;
#pragma omp simd
  for (int64_t i = 0; i < groups; ++i) {
    if constexpr (kLanes<T> == 2) {
      words(row.s)[i] = merge(at(Low{}, row.p, i) * row.inverse_sum, at(High{}, row.p, i) * row.inverse_sum);
      if constexpr (tangent) words(row.dot)[i] = merge(row.moved(Low{}, i), row.moved(High{}, i));
    } else {
      row.s[i] = at(Single{}, row.p, i) * row.inverse_sum;
      if constexpr (tangent) row.dot[i] = row.moved(Single{}, i);
    }
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    store(row.s + i, at(Single{}, row.p, i) * row.inverse_sum);
    if constexpr (tangent) store(row.dot + i, row.moved(Single{}, i));
  }
  return top + std::log(sum);
}

// `top` is the row's log-sum, so that the powers are probabilities at once.
template <class T, bool masked>
MFMJT_BODY void softmax_bar_row(ScoreRow<T, masked> row, int64_t width) {
  const int64_t groups = width / kLanes<T>;
  float product = 0;
#pragma omp simd reduction(+ : product)
  for (int64_t i = 0; i < groups; ++i) {
    const float a = exponential<T>(row.score(First<T>{}, i) - row.top);
    at(First<T>{}, row.p, i) = a;
    product += a * row.shifted(First<T>{}, i);
    if constexpr (kLanes<T> == 2) {
      const float b = exponential<T>(row.score(High{}, i) - row.top);
      at(High{}, row.p, i) = b;
      product += b * row.shifted(High{}, i);
    }
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    const float a = exponential<T>(row.score(Single{}, i) - row.top);
    at(Single{}, row.p, i) = a;
    product += a * row.shifted(Single{}, i);
  }
  row.inverse_sum = 1;
  row.center = product;
#pragma omp simd
  for (int64_t i = 0; i < groups; ++i) {
    if constexpr (kLanes<T> == 2) {
      words(row.s)[i] = merge(at(Low{}, row.p, i), at(High{}, row.p, i));
      words(row.dot)[i] = merge(row.moved(Low{}, i), row.moved(High{}, i));
    } else {
      row.s[i] = at(Single{}, row.p, i);
      row.dot[i] = row.moved(Single{}, i);
    }
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    store(row.s + i, at(Single{}, row.p, i));
    store(row.dot + i, row.moved(Single{}, i));
  }
}

enum class What { value, tangent, cotangent };

template <class T, What what, bool masked>
MFMJT_BODY void rows_body(const SoftmaxPass<T>* pass, float* scratch, int64_t begin, int64_t end) {
  const int64_t width = pass->width;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at_bias = i / pass->rows * pass->bias_head + i % pass->rows * pass->bias_row;
    ScoreRow<T, masked> row{pass->s + i * width, pass->dot == nullptr ? nullptr : pass->dot + i * width,
                            masked ? pass->bias + at_bias : nullptr, {scratch, width / 2}, pass->scale, 0};
    if constexpr (what != What::value) row.first = row.shifted(Single{}, 0);
    if constexpr (what == What::cotangent) {
      row.top = pass->lse[i];
      softmax_bar_row(row, width);
    } else {
      pass->lse[i] = softmax_row<what == What::tangent>(row, width);
    }
  }
}

template <class T, What what>
void run(const char* op, const Tensor& s, T* dot, const Maybe& bias, float* lse, double scale) {
  SoftmaxPass<T> pass{};
  pass.rows = s.size(1);
  pass.width = s.size(2);
  pass.scale = static_cast<float>(scale);
  pass.s = mutable_data<T>(s);
  pass.dot = dot;
  pass.lse = lse;
  if (bias) {
    check_dtype(op, "bias", *bias, s);
    check_rank(op, "bias", *bias, 3);
    const int64_t heads = bias->size(0), rows = bias->size(1);
    check_shape(
        op, "bias", *bias,
        std::vector{heads == 1 ? 1 : s.size(0), rows == 1 ? 1 : pass.rows, pass.width});
    require(bias->is_contiguous(), op, "bias must be contiguous");
    pass.bias = data<T>(*bias);
    pass.bias_head = heads == 1 ? 0 : rows * pass.width;
    pass.bias_row = rows == 1 ? 0 : pass.width;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / pass.width);
  parallel_for(s.size(0) * pass.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(pass.width);
    if (pass.bias == nullptr) {
      Clones<&rows_body<T, what, false>>::run(&pass, scratch.data(), begin, end);
    } else {
      Clones<&rows_body<T, what, true>>::run(&pass, scratch.data(), begin, end);
    }
  });
}

// Scores, or what has their shape: written in place.
void check_scores(const char* op, const char* name, const Tensor& t, const Tensor& s) {
  check_same(op, name, t, s);
  check_rank(op, name, t, 3);
  require(t.is_contiguous(), op, name, " must be contiguous");
}

Tensor joint_attention_softmax(Tensor s, Maybe s_dot, Maybe bias, double scale) {
  constexpr const char* op = "joint_attention_softmax";
  check_scores(op, "s", s, s);
  if (s_dot) check_scores(op, "s_dot", *s_dot, s);
  Tensor lse = new_tensor({s.size(0), s.size(1)});
  by_dtype(s, [&](auto zero) {
    using T = decltype(zero);
    float* to = mutable_data<float>(lse);
    if (s_dot) {
      run<T, What::tangent>(op, s, mutable_data<T>(*s_dot), bias, to, scale);
    } else {
      run<T, What::value>(op, s, static_cast<T*>(nullptr), bias, to, scale);
    }
  });
  return lse;
}

Tensor joint_attention_softmax_bar(Tensor s, Tensor p_bar, Maybe bias, Tensor lse, double scale) {
  constexpr const char* op = "joint_attention_softmax_bar";
  check_scores(op, "s", s, s);
  check_scores(op, "p_bar", p_bar, s);
  const float* sums = statistic(op, "lse", lse, {s.size(0), s.size(1)});
  by_dtype(s, [&](auto zero) {
    using T = decltype(zero);
    run<T, What::cotangent>(
        op, s, mutable_data<T>(p_bar), bias, const_cast<float*>(sums), scale);
  });
  return s;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mfmjt_cpu, m) {
  m.def(
      "joint_attention_softmax(Tensor(a!) s, Tensor(b!)? s_dot, Tensor? bias, float scale) "
      "-> Tensor");
  m.def(
      "joint_attention_softmax_bar(Tensor(a!) s, Tensor(b!) p_bar, Tensor? bias, Tensor lse, "
      "float scale) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(mfmjt_cpu, CPU, m) {
  m.impl("joint_attention_softmax", TORCH_BOX(&joint_attention_softmax));
  m.impl("joint_attention_softmax_bar", TORCH_BOX(&joint_attention_softmax_bar));
}

}  // namespace mfmjt
