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

// Sums run over the channels of one token in one sweep over its row, of what is left when the mean of
// the first few is taken off (`centre`); the mean that remains (`rest`) is taken off the results. So a
// large offset costs no digits, and a constant row is normalised to zeros. Where those few alone are far
// off, squares lose to `rest` what they come to times C / kFew: they are part of the variance too.

// What a value and its tangent come to at one element; the latter 0 where there is none.
struct Dual {
  float value, dot;
};

// Neighbours are summed apart, as many as the widest vectors hold: a loop over them is one addition
// of vectors, and what the compiler makes of a reduction ends in one addition after the other.
constexpr int64_t kWide = 16;
constexpr int64_t kFew = 2 * kWide;  // elements or words

MFMJT_BODY float sum_of(const float* lanes) {
  typedef float Four __attribute__((vector_size(16)));
  Four four[kWide / 4];
  std::memcpy(four, lanes, sizeof four);
  const Four sum = (four[0] + four[1]) + (four[2] + four[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <bool tangent>
struct Sums {
  float value[kWide] = {}, square[kWide] = {}, dot[kWide] = {}, product[kWide] = {};

  MFMJT_BODY void add(int64_t lane, Dual a, Dual centre) {
    const float moved = a.value - centre.value;
    value[lane] += moved;
    square[lane] += moved * moved;
    if (tangent) {
      const float moved_dot = a.dot - centre.dot;
      dot[lane] += moved_dot;
      product[lane] += moved * moved_dot;
    }
  }
};

// A row of which the norm is taken: x itself.
template <bool tangent, class T>
struct OneRow {
  const T *x, *x_dot;

  template <class Lane>
  MFMJT_BODY Dual at(Lane lane, int64_t i) const {
    float dot = 0;
    if constexpr (tangent) dot = mfmjt::at(lane, x_dot, i);
    return {mfmjt::at(lane, x, i), dot};
  }
  MFMJT_BODY void keep(Single, int64_t, Dual&) const {}
  MFMJT_BODY void keep(int64_t, Dual&, Dual&) const {}
};

// The sum of the residual and the gated update, which is kept; its value goes into the norm as it is
// stored, its tangent as it was computed.
template <bool tangent, class T>
struct SumRow {
  const T *x, *h, *gate, *x_dot, *h_dot, *gate_dot;
  T *total, *total_dot;
  Scratch dots;  // for bfloat16

  template <class Lane>
  MFMJT_BODY Dual at(Lane lane, int64_t i) const {
    const float g = mfmjt::at(lane, gate, i), a = mfmjt::at(lane, h, i);
    float dot = 0;
    if constexpr (tangent) {
      dot = mfmjt::at(lane, x_dot, i) + mfmjt::at(lane, gate_dot, i) * a +
            g * mfmjt::at(lane, h_dot, i);
    }
    return {mfmjt::at(lane, x, i) + g * a, dot};
  }
  MFMJT_BODY void keep(Single lane, int64_t i, Dual& a) const {
    store(total + i, a.value);
    a.value = load(total[i]);
    if constexpr (tangent) {
      store(total_dot + i, a.dot);
      if constexpr (kLanes<T> == 2) mfmjt::at(lane, dots, i) = a.dot;
    }
  }
  MFMJT_BODY void keep(int64_t i, Dual& a, Dual& b) const {
    const uint32_t word = merge(a.value, b.value);
    words(total)[i] = word;
    a.value = low(word);
    b.value = high(word);
    if constexpr (tangent) {
      mfmjt::at(Low{}, dots, i) = a.dot;
      mfmjt::at(High{}, dots, i) = b.dot;
      words(total_dot)[i] = merge(a.dot, b.dot);
    }
  }
};

// Lane `lane` of the sums gets element or word i of the row.
template <bool tangent, class T, class Row>
MFMJT_BODY void add_to(Sums<tangent>& sums, const Row& row, int64_t lane, int64_t i, Dual centre) {
  Dual a = row.at(First<T>{}, i);
  if constexpr (kLanes<T> == 2) {
    Dual b = row.at(High{}, i);
    row.keep(i, a, b);
    sums.add(lane, b, centre);
  } else {
    row.keep(Single{}, i, a);
  }
  sums.add(lane, a, centre);
}

// What the sums of a row come to.
struct Moments {
  Dual centre, rest;
  float rstd, share;  // share: mean(n x_dot)
};

template <bool tangent, class T, class Row>
MFMJT_BODY Moments moments_of(const Row& row, int64_t width, float eps) {
  const int64_t groups = width / kLanes<T>;
  Dual centre{0, 0};
  if (groups >= kWide) {
    const int64_t few = groups >= kFew ? kFew : kWide;
    float value[kWide] = {}, dot[kWide] = {};
    for (int64_t k = 0; k < few; k += kWide) {
#pragma omp simd
      for (int64_t j = 0; j < kWide; ++j) {
        const Dual a = row.at(First<T>{}, k + j);
        value[j] += a.value;
        dot[j] += a.dot;
      }
    }
    const float over = 1.0f / static_cast<float>(few);
    centre = {sum_of(value) * over, tangent ? sum_of(dot) * over : 0.0f};
  } else {
    for (int64_t j = 0; j < width; ++j) {
      const Dual a = row.at(Single{}, j);
      centre.value += a.value;
      centre.dot += a.dot;
    }
    centre.value /= static_cast<float>(width);
    centre.dot /= static_cast<float>(width);
  }
  Sums<tangent> sums;
  int64_t i = 0;
  for (; i + kWide <= groups; i += kWide) {
#pragma omp simd
    for (int64_t j = 0; j < kWide; ++j) add_to<tangent, T>(sums, row, j, i + j, centre);
  }
  for (; i < groups; ++i) add_to<tangent, T>(sums, row, i % kWide, i, centre);
  for (i *= kLanes<T>; i < width; ++i) {
    Dual a = row.at(Single{}, i);
    row.keep(Single{}, i, a);
    sums.add(0, a, centre);
  }
  const float over = 1.0f / static_cast<float>(width);
  Moments m{centre, {sum_of(sums.value) * over, 0}, 0, 0};
  const float variance = sum_of(sums.square) * over - m.rest.value * m.rest.value;
  m.rstd = 1.0f / std::sqrt(std::max(variance, 0.0f) + eps);
  if (tangent) {
    m.rest.dot = sum_of(sums.dot) * over;
    m.share = (sum_of(sums.product) * over - m.rest.value * m.rest.dot) * m.rstd;
  }
  return m;
}

template <class T, class Dot>
struct NormRow {
  const T *x, *shift, *scale;
  Dot x_dot;  // this and the next two are read by the tangent only
  const T *shift_dot, *scale_dot;
  T *y, *y_dot;
};

template <bool tangent, class T, class Dot, class Lane>
MFMJT_BODY Dual modulated(const NormRow<T, Dot>& r, const Moments& m, Lane lane, int64_t i) {
  const float n = (at(lane, r.x, i) - m.centre.value - m.rest.value) * m.rstd;
  const float factor = 1.0f + at(lane, r.scale, i);
  float dot = 0;
  if constexpr (tangent) {
    const float n_dot = m.rstd * (at(lane, r.x_dot, i) - m.centre.dot - m.rest.dot - n * m.share);
    dot = n_dot * factor + n * at(lane, r.scale_dot, i) + at(lane, r.shift_dot, i);
  }
  return {n * factor + at(lane, r.shift, i), dot};
}

template <bool tangent, class T, class Dot>
MFMJT_BODY void norm_row(const NormRow<T, Dot>& r, const Moments& m, int64_t width) {
  const int64_t groups = width / kLanes<T>;
  T *y = r.y, *y_dot = r.y_dot;
#pragma omp simd
  for (int64_t i = 0; i < groups; ++i) {
    const Dual a = modulated<tangent>(r, m, First<T>{}, i);
    if constexpr (kLanes<T> == 2) {
      const Dual b = modulated<tangent>(r, m, High{}, i);
      words(y)[i] = merge(a.value, b.value);
      if (tangent) words(y_dot)[i] = merge(a.dot, b.dot);
    } else {
      y[i] = a.value;
      if (tangent) y_dot[i] = a.dot;
    }
  }
  for (int64_t i = groups * kLanes<T>; i < width; ++i) {
    const Dual a = modulated<tangent>(r, m, Single{}, i);
    store(y + i, a.value);
    if (tangent) store(y_dot + i, a.dot);
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
  constexpr bool kept = gated && kLanes<T> == 2;
  using Dot = std::conditional_t<kept, Scratch, const T*>;
  const int64_t width = pass->width;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / pass->tokens, t = row % pass->tokens, at = row * width;
    NormRow<T, Dot> r{};
    r.x = pass->x.at(b, t);
    const T* x_dot = tangent ? pass->x_dot.at(b, t) : nullptr;
    if constexpr (kept) {
      r.x_dot = Scratch{scratch, width / 2};
    } else if constexpr (gated) {
      r.x_dot = pass->total_dot + at;
    } else {
      r.x_dot = x_dot;
    }
    Moments m;
    if constexpr (gated) {
      SumRow<tangent, T> sum{r.x, pass->h.at(b, t), pass->gate.at(b, t), x_dot, nullptr, nullptr,
                             pass->total + at, pass->total_dot + at, Scratch{scratch, width / 2}};
      if (tangent) {
        sum.h_dot = pass->h_dot.at(b, t);
        sum.gate_dot = pass->gate_dot.at(b, t);
      }
      m = moments_of<tangent, T>(sum, width, pass->eps);
      r.x = sum.total;
    } else {
      m = moments_of<tangent, T>(OneRow<tangent, T>{r.x, x_dot}, width, pass->eps);
    }
    r.shift = pass->shift.at(b, t);
    r.scale = pass->scale.at(b, t);
    if (tangent) {
      r.shift_dot = pass->shift_dot.at(b, t);
      r.scale_dot = pass->scale_dot.at(b, t);
      r.y_dot = pass->y_dot + at;
    }
    r.y = pass->y + at;
    pass->mean[row] = m.centre.value + m.rest.value;
    pass->rstd[row] = m.rstd;
    norm_row<tangent>(r, m, width);
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
