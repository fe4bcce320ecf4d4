// Layer norm and modulation, shared by the ops that end in them (mfmjt/kernels/_norm.py).
#pragma once

#include "arguments.h"

namespace mfmjt {

// Sums run over the channels of one token in one sweep over its row, of what is left when the mean of
// the first few is taken off (`center`); the mean that remains (`rest`) is taken off the results. So a
// large offset costs no digits, and a constant row is normalized to zeros. Where those few alone are far
// off, squares lose to `rest` what they come to times C / kFew: they are part of the variance too.

// Neighbours are summed apart, as many as the widest vectors hold: a loop over them is one addition
// of vectors, and what the compiler makes of a reduction ends in one addition after the other.
constexpr int64_t kVector = 16;
constexpr int64_t kFew = 2 * kVector;  // elements or words

MFMJT_BODY float sum_of(const float* lanes) {
  typedef float Four __attribute__((vector_size(16)));
  Four four[kVector / 4];
  std::memcpy(four, lanes, sizeof four);
  const Four sum = (four[0] + four[1]) + (four[2] + four[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <bool tangent>
struct RowSums {
  float value[kVector] = {}, square[kVector] = {}, dot[kVector] = {}, product[kVector] = {};

  MFMJT_BODY void add(int64_t lane, Dual a, Dual center) {
    const float moved = a.value - center.value;
    value[lane] += moved;
    square[lane] += moved * moved;
    if (tangent) {
      const float moved_dot = a.dot - center.dot;
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
MFMJT_BODY void add_to(RowSums<tangent>& sums, const Row& row, int64_t lane, int64_t i, Dual center) {
  Dual a = row.at(First<T>{}, i);
  if constexpr (kLanes<T> == 2) {
    Dual b = row.at(High{}, i);
    row.keep(i, a, b);
    sums.add(lane, b, center);
  } else {
    row.keep(Single{}, i, a);
  }
  sums.add(lane, a, center);
}

// What the sums of a row come to.
struct Moments {
  Dual center, rest;
  float rstd, projection;  // projection: mean(n x_dot)
};

template <bool tangent, class T, class Row>
MFMJT_BODY Moments moments_of(const Row& row, int64_t width, float eps) {
  const int64_t groups = width / kLanes<T>;
  Dual center{0, 0};
  if (groups >= kVector) {
    const int64_t few = groups >= kFew ? kFew : kVector;
    float value[kVector] = {}, dot[kVector] = {};
    for (int64_t k = 0; k < few; k += kVector) {
#pragma omp simd
      for (int64_t j = 0; j < kVector; ++j) {
        const Dual a = row.at(First<T>{}, k + j);
        value[j] += a.value;
        dot[j] += a.dot;
      }
    }
    const float inverse = 1.0f / static_cast<float>(few);
    center = {sum_of(value) * inverse, tangent ? sum_of(dot) * inverse : 0.0f};
  } else {
    for (int64_t j = 0; j < width; ++j) {
      const Dual a = row.at(Single{}, j);
      center.value += a.value;
      center.dot += a.dot;
    }
    center.value /= static_cast<float>(width);
    center.dot /= static_cast<float>(width);
  }
  RowSums<tangent> sums;
  int64_t i = 0;
  for (; i + kVector <= groups; i += kVector) {
#pragma omp simd
    for (int64_t j = 0; j < kVector; ++j) add_to<tangent, T>(sums, row, j, i + j, center);
  }
  for (; i < groups; ++i) add_to<tangent, T>(sums, row, i % kVector, i, center);
  for (i *= kLanes<T>; i < width; ++i) {
    Dual a = row.at(Single{}, i);
    row.keep(Single{}, i, a);
    sums.add(0, a, center);
  }
  const float inverse_width = 1.0f / static_cast<float>(width);
  Moments m{center, {sum_of(sums.value) * inverse_width, 0}, 0, 0};
  const float variance = sum_of(sums.square) * inverse_width - m.rest.value * m.rest.value;
  m.rstd = 1.0f / std::sqrt(std::max(variance, 0.0f) + eps);
  if (tangent) {
    m.rest.dot = sum_of(sums.dot) * inverse_width;
    m.projection = (sum_of(sums.product) * inverse_width - m.rest.value * m.rest.dot) * m.rstd;
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
  const float n = (at(lane, r.x, i) - m.center.value - m.rest.value) * m.rstd;
  const float factor = 1.0f + at(lane, r.scale, i);
  float dot = 0;
  if constexpr (tangent) {
    const float n_dot = m.rstd * (at(lane, r.x_dot, i) - m.center.dot - m.rest.dot - n * m.projection);
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
  RowReader<T> x, h, gate, shift, scale;
  RowReader<T> x_dot, h_dot, gate_dot, shift_dot, scale_dot;
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
    pass->mean[row] = m.center.value + m.rest.value;
    pass->rstd[row] = m.rstd;
    norm_row<tangent>(r, m, width);
  }
}

// The inputs of both ops, or their tangents; `h` and `gate` are those of the gated residual.
struct NormInputs {
  Maybe x, h, gate, shift, scale;
};

// For each token the row of modulations (B, S, C) that it picks, and for each row its tokens.
class Picks {
 public:
  Picks() = default;
  Picks(const char* op, const Maybe& rows, const NormInputs& in) {
    if (!rows) return;
    require(rows->is_cpu() && rows->dim() == 1, op, "rows must be (N,), on the CPU");
    check_size(op, "rows", *rows, 0, in.x->size(1));
    const ScalarType dtype = rows->scalar_type();
    require(
        dtype == ScalarType::Long || dtype == ScalarType::Int, op, "rows must be int64 or int32");
    for (const Maybe& m : {in.gate, in.shift, in.scale}) {
      if (m) check_size(op, "a modulation whose rows are picked", *m, 1, in.scale->size(1));
    }
    const Tensor t = dense(*rows);
    const int64_t n = t.numel();
    row_of_.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      row_of_[i] = dtype == ScalarType::Long ? data<int64_t>(t)[i] : data<int32_t>(t)[i];
      const bool there = row_of_[i] >= 0 && row_of_[i] < in.scale->size(1);
      require(there, op, "rows must be 0 to ", in.scale->size(1) - 1, ", got ", row_of_[i]);
    }
  }

  const int64_t* row_of() const { return row_of_.empty() ? nullptr : row_of_.data(); }

  // Sort tokens by their rows, and in order: those of row s are tokens()[starts()[s]] and on.
  void sort(int64_t rows) {
    starts_.assign(rows + 1, 0);
    tokens_.resize(row_of_.size());
    for (int64_t s : row_of_) ++starts_[s + 1];
    for (int64_t s = 0; s < rows; ++s) starts_[s + 1] += starts_[s];
    std::vector<int64_t> next(starts_);
    for (size_t i = 0; i < row_of_.size(); ++i) tokens_[next[row_of_[i]]++] = i;
  }
  const int64_t* tokens() const { return tokens_.data(); }
  const int64_t* starts() const { return starts_.data(); }

 private:
  std::vector<int64_t> row_of_, tokens_, starts_;
};

struct NormResults {
  Tensor total, total_dot, y, y_dot, mean, rstd;
};

template <bool gated, bool tangent>
NormResults norm_forward(
    const char* op, const NormInputs& in, const NormInputs& dots, double eps, const Maybe& rows) {
  const Tensor& x = *in.x;
  check_tensor(op, "x", x);
  check_rank(op, "x", x, 3);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  const Picks picks(op, rows, in);
  const int64_t* row_of = picks.row_of();
  NormResults out;
  out.mean = new_tensor({batch, tokens, 1});
  out.rstd = new_tensor({batch, tokens, 1});
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> zeros(tangent ? width : 0);
    NormPass<T> pass;
    pass.tokens = tokens;
    pass.width = width;
    pass.eps = static_cast<float>(eps);
    pass.x = {op, "x", x, x};
    pass.shift = {op, "shift", *in.shift, x, false, row_of};
    pass.scale = {op, "scale", *in.scale, x, false, row_of};
    pass.y = new_data<T>(out.y, x);
    pass.mean = mutable_data<float>(out.mean);
    pass.rstd = mutable_data<float>(out.rstd);
    if constexpr (tangent) {
      pass.x_dot = {op, "x_dot", dots.x, x, zeros};
      pass.shift_dot = {op, "shift_dot", dots.shift, x, zeros, false, row_of};
      pass.scale_dot = {op, "scale_dot", dots.scale, x, zeros, false, row_of};
      pass.y_dot = new_data<T>(out.y_dot, x);
    }
    if constexpr (gated) {
      pass.h = {op, "h", *in.h, x, true};
      pass.gate = {op, "gate", *in.gate, x, false, row_of};
      pass.total = new_data<T>(out.total, x);
    }
    if constexpr (gated && tangent) {
      pass.h_dot = {op, "h_dot", dots.h, x, zeros};
      pass.gate_dot = {op, "gate_dot", dots.gate, x, zeros, false, row_of};
      pass.total_dot = new_data<T>(out.total_dot, x);
    }
    const int64_t grain = std::max<int64_t>(1, kGrain / width);
    parallel_for(batch * tokens, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(gated && tangent ? width : 0);
      Clones<&norm_pass<T, gated, tangent>>::run(&pass, scratch.data(), begin, end);
    });
  });
  return out;
}

// Backward. Cotangents of broadcast modulations are summed over the tokens of a sample, by chunks; those
// of rows that are picked over the tokens of each, which then are the chunk.

template <class T>
struct NormBackward {
  int64_t tokens = 0, width = 0, chunks = 0;  // chunks of each sample
  const int64_t *order = nullptr, *starts = nullptr;  // of `Picks`
  RowReader<T> total_bar, y_bar, x, h, gate, scale;
  const float *mean = nullptr, *rstd = nullptr;
  T *x_bar = nullptr, *h_bar = nullptr;
  T *gate_bar = nullptr, *shift_bar = nullptr, *scale_bar = nullptr;  // where there is a row per token
  float *gate_sum = nullptr, *shift_sum = nullptr, *scale_sum = nullptr;  // else (B chunks, C)
};

template <class T, bool gated>
MFMJT_BODY void norm_backward(
    const NormBackward<T>* pass, float* scratch, int64_t begin, int64_t end) {
  const int64_t width = pass->width;
  const float inverse_width = 1.0f / static_cast<float>(width);
  const bool picked = pass->order != nullptr;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t b = chunk / pass->chunks, c = chunk % pass->chunks;
    const int64_t first = picked ? pass->starts[c] : c * kChunk;
    const int64_t last = picked ? pass->starts[c + 1] : std::min(first + kChunk, pass->tokens);
    float* gate_sum = pass->gate_sum == nullptr ? nullptr : pass->gate_sum + chunk * width;
    float* shift_sum = pass->shift_sum == nullptr ? nullptr : pass->shift_sum + chunk * width;
    float* scale_sum = pass->scale_sum == nullptr ? nullptr : pass->scale_sum + chunk * width;
    if (picked) {
      std::fill(scratch, scratch + 3 * width, 0.0f);
      gate_sum = scratch;
      shift_sum = scratch + width;
      scale_sum = scratch + 2 * width;
    }
    for (int64_t k = first; k < last; ++k) {
      const int64_t t = picked ? pass->order[k] : k;
      const int64_t row = b * pass->tokens + t, at = row * width;
      const T *y_bar = pass->y_bar.at(b, t), *x = pass->x.at(b, t), *scale = pass->scale.at(b, t);
      const float mean = pass->mean[row], rstd = pass->rstd[row];
      float left = 0, sum = 0, product = 0;
#pragma omp simd reduction(+ : left, sum, product)
      for (int64_t i = 0; i < width; ++i) {
        const float n_bar = load(y_bar[i]) * (1.0f + load(scale[i])), centered = load(x[i]) - mean;
        left += centered;
        sum += n_bar;
        product += n_bar * centered;
      }
      const float rest = left * inverse_width, mean_bar = sum * inverse_width;
      const float projection = rstd * (product * inverse_width - rest * mean_bar);
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
            const float bar = load(total_bar[i]) + rstd * (n_bar - mean_bar - n * projection);
            store(x_bar + i, bar);
            store(h_bar + i, bar * load(gate[i]));
            store(gate_bar + i, bar * load(h[i]));
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const float n = (load(x[i]) - mean - rest) * rstd;
            const float n_bar = load(y_bar[i]) * (1.0f + load(scale[i]));
            const float bar = load(total_bar[i]) + rstd * (n_bar - mean_bar - n * projection);
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
          store(x_bar + i, rstd * (n_bar - mean_bar - n * projection));
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
    if (picked) {
      T *shift_bar = pass->shift_bar + chunk * width, *scale_bar = pass->scale_bar + chunk * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        store(shift_bar + i, shift_sum[i]);
        store(scale_bar + i, scale_sum[i]);
      }
      if (gated) {
        T* gate_bar = pass->gate_bar + chunk * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(gate_bar + i, gate_sum[i]);
      }
    }
  }
}

// A modulation's cotangent: written by the kernel where there is a row per token, else summed by it.
template <class T>
class ModulationBar {
 public:
  ModulationBar(const Tensor& like, bool per_token, int64_t chunks)
      : result_(new_like(like)), sums_(per_token ? 0 : like.size(0) * chunks * like.size(2)) {}
  float* sums() { return sums_.empty() ? nullptr : sums_.data(); }
  T* rows() { return mutable_data<T>(result_); }
  Tensor finish() {
    if (sums_.empty()) return result_;
    const int64_t batch = result_.size(0), width = result_.size(2);
    const int64_t chunks = static_cast<int64_t>(sums_.size()) / (batch * width);
    T* to = rows();
    for (int64_t b = 0; b < batch; ++b) {
      float* total = sums_.data() + b * chunks * width;
      for (int64_t c = 1; c < chunks; ++c) {
        for (int64_t i = 0; i < width; ++i) total[i] += total[c * width + i];
      }
      for (int64_t i = 0; i < width; ++i) store(to + b * width + i, total[i]);
    }
    return result_;
  }

 private:
  Tensor result_;
  std::vector<float> sums_;
};

// Cotangents of the inputs. `in.x` is what the norm was taken of; the op calls it `name`.
template <bool gated>
NormInputs norm_bars(
    const char* op, const char* name, const Maybe& total_bar, const Maybe& y_bar,
    const NormInputs& in, const Tensor& mean, const Tensor& rstd, const Maybe& rows) {
  const Tensor& x = *in.x;
  check_tensor(op, name, x);
  check_rank(op, name, x, 3);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  Picks picks(op, rows, in);
  const int64_t* row_of = picks.row_of();
  const bool picked = row_of != nullptr;
  if (picked) picks.sort(in.scale->size(1));
  NormInputs bars;
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> zeros(width);
    NormBackward<T> pass;
    pass.tokens = tokens;
    pass.width = width;
    pass.chunks = picked ? in.scale->size(1) : chunks_of(tokens);
    if (picked) {
      pass.order = picks.tokens();
      pass.starts = picks.starts();
    }
    pass.y_bar = {op, "y_bar", y_bar, x, zeros, true};
    pass.x = {op, name, x, x};
    pass.scale = {op, "scale", *in.scale, x, false, row_of};
    pass.mean = statistic(op, "mean", mean, {batch, tokens, 1});
    pass.rstd = statistic(op, "rstd", rstd, {batch, tokens, 1});
    // A single channel is normalized to zero; a large rstd would make its rounding count.
    const std::vector<float> none(width == 1 ? batch * tokens : 0);
    if (width == 1) pass.rstd = none.data();
    pass.x_bar = new_data<T>(bars.x, x);
    std::optional<ModulationBar<T>> gate_bar;
    if constexpr (gated) {
      pass.total_bar = {op, "total_bar", total_bar, x, zeros, true};
      pass.h = {op, "h", *in.h, x, true};
      pass.gate = {op, "gate", *in.gate, x, false, row_of};
      pass.h_bar = new_data<T>(bars.h, x);
      gate_bar.emplace(*in.gate, picked || pass.gate.per_token(), pass.chunks);
      pass.gate_sum = gate_bar->sums();
      pass.gate_bar = gate_bar->rows();
    }
    ModulationBar<T> scale_bar(*in.scale, picked || pass.scale.per_token(), pass.chunks);
    pass.scale_sum = scale_bar.sums();
    pass.scale_bar = scale_bar.rows();
    // The cotangent of a shift for every token is y_bar: the result is empty, and the caller knows.
    const bool per_token =
        !picked && RowReader<T>(op, "shift", *in.shift, x).per_token();
    const bool is_y_bar = per_token && y_bar;
    ModulationBar<T> shift_bar(
        is_y_bar ? new_tensor({0}, x.scalar_type()) : *in.shift, picked || per_token, pass.chunks);
    pass.shift_sum = shift_bar.sums();
    pass.shift_bar = shift_bar.rows();
    const int64_t chunk = picked ? 1 : kChunk;
    parallel_for(
        batch * pass.chunks, std::max<int64_t>(1, kGrain / (chunk * width)),
        [&](int64_t begin, int64_t end) {
          std::vector<float> scratch(picked ? 3 * width : 0);
          Clones<&norm_backward<T, gated>>::run(&pass, scratch.data(), begin, end);
        });
    if (gated) bars.gate = gate_bar->finish();
    bars.shift = shift_bar.finish();
    bars.scale = scale_bar.finish();
    if (per_token && !is_y_bar) torch::stable::zero_(*bars.shift);
  });
  return bars;
}

}  // namespace mfmjt
