// Layer norm and modulation, shared by the ops that end in them (mfmjt/kernels/_norm.py).
#pragma once

#include "common.h"

namespace mfmjt {

struct Shape {
  int64_t batch, tokens, width;
};

inline Shape shape_of(const char* op, const char* name, const Tensor& x) {
  check_tensor(op, name, x);
  check_rank(op, name, x, 3);
  return {x.size(0), x.size(1), x.size(2)};
}

// Checked rows of an argument that goes with x.
template <class T>
Rows<T> rows(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_dtype(op, name, t, x);
  return Rows<T>(op, name, t, x.size(0), x.size(1), x.size(2));
}
template <class T>
Rows<T> rows(
    const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x,
    const std::vector<T>& zeros) {
  return t ? rows<T>(op, name, *t, x) : Rows<T>(zeros.data());
}

// Sums run over the channels of one token in two sweeps over its row, which is in the first-level
// cache by then: means first, centred products second, and with them what rounding left in the mean
// (`rest`). So a large offset costs no digits, and a constant row is normalised to zeros.

// What a value and its tangent come to at one element; the latter 0 where there is none.
struct Dual {
  float value, dot;
};

template <class T, class Dot>
struct NormRow {
  const T *x, *shift, *scale;
  Dot x_dot;  // this and the next two are read by the tangent only
  const T *shift_dot, *scale_dot;
  T *y, *y_dot;
  float *mean, *rstd;
};

// Summands of the second sweep.
struct Products {
  float rest, square, dot;
};

// The three sweeps at one element; each needs what the one before it found.
template <bool tangent, class T, class Dot>
struct NormRowAt {
  NormRow<T, Dot> r;
  float mean = 0, mean_dot = 0, rest = 0, rstd = 0, share = 0;

  template <class Lane>
  MFMJT_BODY Dual sums(Lane lane, int64_t i) const {
    float dot = 0;
    if constexpr (tangent) dot = at(lane, r.x_dot, i);
    return {at(lane, r.x, i), dot};
  }
  template <class Lane>
  MFMJT_BODY Products products(Lane lane, int64_t i) const {
    const float centred = at(lane, r.x, i) - mean;
    float dot = 0;
    if constexpr (tangent) dot = centred * (at(lane, r.x_dot, i) - mean_dot);
    return {centred, centred * centred, dot};
  }
  template <class Lane>
  MFMJT_BODY Dual result(Lane lane, int64_t i) const {
    const float n = (at(lane, r.x, i) - mean - rest) * rstd, factor = 1.0f + at(lane, r.scale, i);
    float dot = 0;
    if constexpr (tangent) {
      const float n_dot = rstd * (at(lane, r.x_dot, i) - mean_dot - n * share);
      dot = n_dot * factor + n * at(lane, r.scale_dot, i) + at(lane, r.shift_dot, i);
    }
    return {n * factor + at(lane, r.shift, i), dot};
  }
};

template <bool tangent, class T, class Dot>
MFMJT_BODY void norm_row(const NormRow<T, Dot>& r, int64_t width, float eps) {
  const float over = 1.0f / static_cast<float>(width);
  const int64_t groups = width / kLanes<T>;
  NormRowAt<tangent, T, Dot> row{r};
  float sum = 0, sum_dot = 0;
#pragma omp simd reduction(+ : sum, sum_dot)
  for (int64_t i = 0; i < groups; ++i) {
    Dual a = row.sums(First<T>{}, i);
    if constexpr (kLanes<T> == 2) {
      const Dual b = row.sums(High{}, i);
      a.value += b.value;
      a.dot += b.dot;
    }
    sum += a.value;
    sum_dot += a.dot;
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    const Dual a = row.sums(Single{}, i);
    sum += a.value;
    sum_dot += a.dot;
  }
  row.mean = sum * over;
  row.mean_dot = sum_dot * over;
  float rest = 0, square = 0, product = 0;
#pragma omp simd reduction(+ : rest, square, product)
  for (int64_t i = 0; i < groups; ++i) {
    Products a = row.products(First<T>{}, i);
    if constexpr (kLanes<T> == 2) {
      const Products b = row.products(High{}, i);
      a.rest += b.rest;
      a.square += b.square;
      a.dot += b.dot;
    }
    rest += a.rest;
    square += a.square;
    product += a.dot;
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    const Products a = row.products(Single{}, i);
    rest += a.rest;
    square += a.square;
    product += a.dot;
  }
  row.rest = rest * over;
  const float variance = square * over - row.rest * row.rest;
  row.rstd = 1.0f / std::sqrt(std::max(variance, 0.0f) + eps);
  row.share = product * over * row.rstd;  // mean(n x_dot)
  *r.mean = row.mean + row.rest;
  *r.rstd = row.rstd;
  T *y = r.y, *y_dot = r.y_dot;
#pragma omp simd
  for (int64_t i = 0; i < groups; ++i) {
    const Dual a = row.result(First<T>{}, i);
    if constexpr (kLanes<T> == 2) {
      const Dual b = row.result(High{}, i);
      words(y)[i] = merge(a.value, b.value);
      if (tangent) words(y_dot)[i] = merge(a.dot, b.dot);
    } else {
      y[i] = a.value;
      if (tangent) y_dot[i] = a.dot;
    }
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    const Dual a = row.result(Single{}, i);
    store(y + i, a.value);
    if (tangent) store(y_dot + i, a.dot);
  }
}

// The sum of the residual and the gated update.
template <bool tangent, class T>
struct SumAt {
  const T *x, *h, *gate, *x_dot, *h_dot, *gate_dot;

  template <class Lane>
  MFMJT_BODY Dual result(Lane lane, int64_t i) const {
    const float g = at(lane, gate, i), a = at(lane, h, i);
    float dot = 0;
    if constexpr (tangent) {
      dot = at(lane, x_dot, i) + at(lane, gate_dot, i) * a + g * at(lane, h_dot, i);
    }
    return {at(lane, x, i) + g * a, dot};
  }
};

template <bool tangent, class T>
MFMJT_BODY void sum_row(
    const SumAt<tangent, T>& row, T* total, T* total_dot, Scratch dots, int64_t width) {
  const int64_t groups = width / kLanes<T>;
#pragma omp simd
  for (int64_t i = 0; i < groups; ++i) {
    const Dual a = row.result(First<T>{}, i);
    if (tangent) at(First<T>{}, dots, i) = a.dot;
    if constexpr (kLanes<T> == 2) {
      const Dual b = row.result(High{}, i);
      words(total)[i] = merge(a.value, b.value);
      if (tangent) {
        at(High{}, dots, i) = b.dot;
        words(total_dot)[i] = merge(a.dot, b.dot);
      }
    } else {
      total[i] = a.value;
      if (tangent) total_dot[i] = a.dot;
    }
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    const Dual a = row.result(Single{}, i);
    store(total + i, a.value);
    if (tangent) {
      at(Single{}, dots, i) = a.dot;
      store(total_dot + i, a.dot);
    }
  }
}

// What a pass over B N tokens needs, for both ops; `h` and its kin are those of the gated residual.
template <class T>
struct NormPass {
  int64_t tokens = 0, width = 0;
  float eps = 0;
  Rows<T> x, h, gate, shift, scale;
  Rows<T> x_dot, h_dot, gate_dot, shift_dot, scale_dot;
  T *total = nullptr, *total_dot = nullptr, *y = nullptr, *y_dot = nullptr;
  float *mean = nullptr, *rstd = nullptr;
};

template <class T, bool gated, bool tangent>
MFMJT_BODY void norm_pass(const NormPass<T>* pass, float* scratch, int64_t begin, int64_t end) {
  // The sum's tangent goes into the norm as it was computed, not as it was stored.
  using Dot = std::conditional_t<gated, Scratch, const T*>;
  const int64_t width = pass->width;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / pass->tokens, t = row % pass->tokens, at = row * width;
    NormRow<T, Dot> r{};
    r.x = pass->x.at(b, t);
    const Scratch dots{scratch, width / 2};
    if constexpr (gated) {
      SumAt<tangent, T> sum{r.x, pass->h.at(b, t), pass->gate.at(b, t), nullptr, nullptr, nullptr};
      if (tangent) {
        sum.x_dot = pass->x_dot.at(b, t);
        sum.h_dot = pass->h_dot.at(b, t);
        sum.gate_dot = pass->gate_dot.at(b, t);
      }
      T* total = pass->total + at;
      sum_row(sum, total, tangent ? pass->total_dot + at : nullptr, dots, width);
      r.x = total;
    }
    r.shift = pass->shift.at(b, t);
    r.scale = pass->scale.at(b, t);
    if (tangent) {
      if constexpr (gated) {
        r.x_dot = dots;
      } else {
        r.x_dot = pass->x_dot.at(b, t);
      }
      r.shift_dot = pass->shift_dot.at(b, t);
      r.scale_dot = pass->scale_dot.at(b, t);
      r.y_dot = pass->y_dot + at;
    }
    r.y = pass->y + at;
    r.mean = pass->mean + row;
    r.rstd = pass->rstd + row;
    norm_row<tangent>(r, width, pass->eps);
  }
}

template <class T, bool gated, bool tangent>
void run_norm_pass(const NormPass<T>& pass, int64_t batch) {
  const int64_t grain = std::max<int64_t>(1, kGrain / pass.width);
  parallel_for(batch * pass.tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(gated && tangent ? pass.width : 0);
    Clones<&norm_pass<T, gated, tangent>>::run(&pass, scratch.data(), begin, end);
  });
}

// Backward. Cotangents of broadcast modulations are summed over the tokens of a sample: by chunks of
// a fixed number of tokens, then over chunks in order, so that threads change nothing.
constexpr int64_t kChunk = 64;
inline int64_t chunks_of(const Shape& s) { return (s.tokens + kChunk - 1) / kChunk; }

template <class T>
struct NormBackward {
  int64_t tokens = 0, width = 0, chunks = 0;  // chunks of each sample
  Rows<T> total_bar, y_bar, x, h, gate, scale;
  const float *mean = nullptr, *rstd = nullptr;
  T *x_bar = nullptr, *h_bar = nullptr;
  T *gate_bar = nullptr, *scale_bar = nullptr;  // where there is a row per token
  float *gate_sum = nullptr, *shift_sum = nullptr, *scale_sum = nullptr;  // else (B chunks, C)
};

template <class T, bool gated>
MFMJT_BODY void norm_backward(const NormBackward<T>* pass, int64_t begin, int64_t end) {
  const int64_t width = pass->width;
  const float over = 1.0f / static_cast<float>(width);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t b = chunk / pass->chunks, first = chunk % pass->chunks * kChunk;
    float* gate_sum = pass->gate_sum == nullptr ? nullptr : pass->gate_sum + chunk * width;
    float* shift_sum = pass->shift_sum == nullptr ? nullptr : pass->shift_sum + chunk * width;
    float* scale_sum = pass->scale_sum == nullptr ? nullptr : pass->scale_sum + chunk * width;
    for (int64_t t = first; t < std::min(first + kChunk, pass->tokens); ++t) {
      const int64_t row = b * pass->tokens + t, at = row * width;
      const T *y_bar = pass->y_bar.at(b, t), *x = pass->x.at(b, t), *scale = pass->scale.at(b, t);
      const float mean = pass->mean[row], rstd = pass->rstd[row];
      float left = 0, sum = 0, product = 0;
#pragma omp simd reduction(+ : left, sum, product)
      for (int64_t i = 0; i < width; ++i) {
        const float n_bar = load(y_bar[i]) * (1.0f + load(scale[i])), centred = load(x[i]) - mean;
        left += centred;
        sum += n_bar;
        product += n_bar * centred;
      }
      const float rest = left * over, mean_bar = sum * over;
      const float share = rstd * (product * over - rest * mean_bar);
      T* x_bar = pass->x_bar + at;
      if (gated) {
        const T *total_bar = pass->total_bar.at(b, t), *h = pass->h.at(b, t);
        const T* gate = pass->gate.at(b, t);
        T *h_bar = pass->h_bar + at, *gate_bar = pass->gate_bar + at;
        if (gate_sum == nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const float n = (load(x[i]) - mean - rest) * rstd;
            const float n_bar = load(y_bar[i]) * (1.0f + load(scale[i]));
            const float bar = load(total_bar[i]) + rstd * (n_bar - mean_bar - n * share);
            store(x_bar + i, bar);
            store(h_bar + i, bar * load(gate[i]));
            store(gate_bar + i, bar * load(h[i]));
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const float n = (load(x[i]) - mean - rest) * rstd;
            const float n_bar = load(y_bar[i]) * (1.0f + load(scale[i]));
            const float bar = load(total_bar[i]) + rstd * (n_bar - mean_bar - n * share);
            store(x_bar + i, bar);
            store(h_bar + i, bar * load(gate[i]));
            gate_sum[i] += bar * load(h[i]);
          }
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          const float n = (load(x[i]) - mean - rest) * rstd;
          const float n_bar = load(y_bar[i]) * (1.0f + load(scale[i]));
          store(x_bar + i, rstd * (n_bar - mean_bar - n * share));
        }
      }
      if (scale_sum == nullptr) {
        T* scale_bar = pass->scale_bar + at;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          store(scale_bar + i, load(y_bar[i]) * ((load(x[i]) - mean - rest) * rstd));
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          scale_sum[i] += load(y_bar[i]) * ((load(x[i]) - mean - rest) * rstd);
        }
      }
      if (shift_sum != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) shift_sum[i] += load(y_bar[i]);
      }
    }
  }
}

template <class T, bool gated>
void run_norm_backward(const NormBackward<T>& pass, int64_t batch) {
  parallel_for(batch * pass.chunks, std::max<int64_t>(1, kGrain / (kChunk * pass.width)),
      [&](int64_t begin, int64_t end) {
        Clones<&norm_backward<T, gated>>::run(&pass, begin, end);
      });
}

// A modulation's cotangent while it is being summed, and as a tensor of the modulation's shape.
class Summed {
 public:
  // `whole`: a row per token, which the kernel writes itself.
  Summed(const Tensor& like, bool whole, const Shape& s)
      : result_(new_like(like)), batch_(s.batch), chunks_(chunks_of(s)), width_(s.width) {
    if (!whole) sums_.resize(batch_ * chunks_ * width_);
  }
  float* sums() { return sums_.empty() ? nullptr : sums_.data(); }
  template <class T>
  T* rows() {
    return mutable_data<T>(result_);
  }
  template <class T>
  Tensor finish() {
    if (!sums_.empty()) {
      T* to = mutable_data<T>(result_);
      for (int64_t b = 0; b < batch_; ++b) {
        float* total = sums_.data() + b * chunks_ * width_;
        for (int64_t c = 1; c < chunks_; ++c) {
          for (int64_t i = 0; i < width_; ++i) total[i] += total[c * width_ + i];
        }
        for (int64_t i = 0; i < width_; ++i) store(to + b * width_ + i, total[i]);
      }
    }
    return result_;
  }

 private:
  Tensor result_;
  int64_t batch_, chunks_, width_;
  std::vector<float> sums_;
};

}  // namespace mfmjt
