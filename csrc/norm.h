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
// cache by then: means first, centred products second. Nothing cancels, in float and for any offset.

template <class T, class Dot>
struct NormRow {
  const T *x, *shift, *scale;
  const Dot* x_dot;  // this and the next two are read by the tangent only
  const T *shift_dot, *scale_dot;
  T *y, *y_dot;
  float *mean, *rstd;
};

template <bool tangent, class T, class Dot>
MFMJT_BODY void norm_row(const NormRow<T, Dot>& r, int64_t width, float eps) {
  const float over = 1.0f / static_cast<float>(width);
  const T* x = r.x;
  const Dot* x_dot = r.x_dot;
  float sum = 0, sum_dot = 0;
#pragma omp simd reduction(+ : sum, sum_dot)
  for (int64_t i = 0; i < width; ++i) {
    sum += load(x[i]);
    if (tangent) sum_dot += load(x_dot[i]);
  }
  const float mean = sum * over, mean_dot = sum_dot * over;
  float square = 0, product = 0;
#pragma omp simd reduction(+ : square, product)
  for (int64_t i = 0; i < width; ++i) {
    const float centred = load(x[i]) - mean;
    square += centred * centred;
    if (tangent) product += centred * (load(x_dot[i]) - mean_dot);
  }
  const float rstd = 1.0f / std::sqrt(square * over + eps);
  const float share = product * over * rstd;  // mean(n x_dot)
  *r.mean = mean;
  *r.rstd = rstd;
  const T *shift = r.shift, *scale = r.scale, *shift_dot = r.shift_dot, *scale_dot = r.scale_dot;
  T *y = r.y, *y_dot = r.y_dot;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float n = (load(x[i]) - mean) * rstd, factor = 1.0f + load(scale[i]);
    store(y + i, n * factor + load(shift[i]));
    if (tangent) {
      const float n_dot = rstd * (load(x_dot[i]) - mean_dot - n * share);
      store(y_dot + i, n_dot * factor + n * load(scale_dot[i]) + load(shift_dot[i]));
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
  using Dot = std::conditional_t<gated, float, T>;
  const int64_t width = pass->width;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / pass->tokens, t = row % pass->tokens, at = row * width;
    NormRow<T, Dot> r{};
    r.x = pass->x.at(b, t);
    if (gated) {
      const T *x = r.x, *h = pass->h.at(b, t), *gate = pass->gate.at(b, t);
      T* total = pass->total + at;
      if (tangent) {
        const T *x_dot = pass->x_dot.at(b, t), *h_dot = pass->h_dot.at(b, t);
        const T* gate_dot = pass->gate_dot.at(b, t);
        T* total_dot = pass->total_dot + at;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          const float g = load(gate[i]), a = load(h[i]);
          store(total + i, load(x[i]) + g * a);
          const float dot = load(x_dot[i]) + load(gate_dot[i]) * a + g * load(h_dot[i]);
          store(total_dot + i, dot);
          scratch[i] = dot;
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          store(total + i, load(x[i]) + load(gate[i]) * load(h[i]));
        }
      }
      r.x = total;
    }
    r.shift = pass->shift.at(b, t);
    r.scale = pass->scale.at(b, t);
    if (tangent) {
      if constexpr (gated) {
        r.x_dot = scratch;
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
      float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
      for (int64_t i = 0; i < width; ++i) {
        const float n_bar = load(y_bar[i]) * (1.0f + load(scale[i]));
        sum += n_bar;
        product += n_bar * ((load(x[i]) - mean) * rstd);
      }
      const float mean_bar = sum * over, share = product * over;
      T* x_bar = pass->x_bar + at;
      if (gated) {
        const T *total_bar = pass->total_bar.at(b, t), *h = pass->h.at(b, t);
        const T* gate = pass->gate.at(b, t);
        T *h_bar = pass->h_bar + at, *gate_bar = pass->gate_bar + at;
        if (gate_sum == nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const float n = (load(x[i]) - mean) * rstd;
            const float n_bar = load(y_bar[i]) * (1.0f + load(scale[i]));
            const float bar = load(total_bar[i]) + rstd * (n_bar - mean_bar - n * share);
            store(x_bar + i, bar);
            store(h_bar + i, bar * load(gate[i]));
            store(gate_bar + i, bar * load(h[i]));
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const float n = (load(x[i]) - mean) * rstd;
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
          const float n = (load(x[i]) - mean) * rstd;
          const float n_bar = load(y_bar[i]) * (1.0f + load(scale[i]));
          store(x_bar + i, rstd * (n_bar - mean_bar - n * share));
        }
      }
      if (scale_sum == nullptr) {
        T* scale_bar = pass->scale_bar + at;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          store(scale_bar + i, load(y_bar[i]) * ((load(x[i]) - mean) * rstd));
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          scale_sum[i] += load(y_bar[i]) * ((load(x[i]) - mean) * rstd);
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
