// Anti-aliased SnakeBeta: twice the rate by 6 taps a phase, x + sin(a x)^2 / b, back by 12 taps.
//
// Channels-first (B, C, T), each row by itself, in blocks that stay in the first-level cache. In the
// two phases of the doubled rate, with f the 12 taps and x, even, odd continued by their last value:
//   even[i] = act(2 sum_j f[2j+1] x[i+2-j]),   odd[i] = act(2 sum_j f[2j] x[i+3-j]),     j = 0..5
//   y[i]    = sum_j f[2j+1] even[i+j-2] + f[2j] odd[i+j-3]
// One read and one write of x, against 13 passes over doubled memory op by op.

#include "common.h"
#include "ops.h"

namespace mfmjt {
namespace {

constexpr const char* kOp = "snake_fwd";
// Kaiser-windowed sinc: cutoff a quarter of the doubled rate, transition 0.3, sum one.
constexpr float kTaps[12] = {
    0x1.09f0d2p-9f, 0x1.33ac88p-7f, -0x1.a2810ep-6f, -0x1.d85448p-5f,
    0x1.075114p-3f, 0x1.c5d8cap-2f, 0x1.c5d8cap-2f,  0x1.075114p-3f,
    -0x1.d85448p-5f, -0x1.a2810ep-6f, 0x1.33ac88p-7f, 0x1.09f0d2p-9f};
constexpr int64_t kBlock = 1024;  // outputs; the block's 4 buffers take 16 KiB
constexpr int64_t kHalo = 3;      // of even and odd on each side; twice that of x
constexpr int64_t kPad = 16;      // loops run in whole vectors, over their end

struct Row {  // what a channel needs
  float turns_hi, turns_lo;  // frequency / pi as a sum of two floats
  float height;              // 1 / (exp(beta) + 1e-9)
};

// sin(pi r)^2 for r in [-1/2, 1/2] given r; relative error 2e-7. The coefficients are the minimax
// polynomial of sin(pi r) / r in r^2 (its own error 5e-9).
MFMJT_BODY float sine_squared(float r) {
  float z = r * r;
  z = z > 0.25f ? 0.25f : z;  // beyond 2^22 turns r is noise; keep its square bounded, and NaN a NaN
  float p = 0x1.3dafeap-4f;
  p = p * z + -0x1.324ccap-1f;
  p = p * z + 0x1.4668b0p+1f;
  p = p * z + -0x1.4abbc2p+2f;
  p = p * z + 0x1.921fb6p+1f;
  return z * (p * p);
}

MFMJT_BODY float activate(float u, Row row) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const float whole = (u * row.turns_hi + shift) - shift;
  const float r = (u * row.turns_hi - whole) + u * row.turns_lo;
  return u + row.height * sine_squared(r);
}

template <class T>
MFMJT_BODY void snake_body(
    const T* __restrict__ x, T* __restrict__ y, int64_t begin, int64_t end, int64_t length,
    Row row) {
  alignas(64) float wide[kBlock + 2 * kPad], even[kBlock + 2 * kPad], odd[kBlock + 2 * kPad];
  constexpr const float* f = kTaps;
  const int64_t n = end - begin, first = begin - 2 * kHalo, last = end + 2 * kHalo + kPad;
  const int64_t inside_begin = std::max<int64_t>(first, 0), inside_end = std::min(last, length);
  const float left = load(x[0]), right = load(x[length - 1]);
  for (int64_t i = first; i < 0; ++i) wide[i - first] = left;
#pragma omp simd
  for (int64_t i = inside_begin; i < inside_end; ++i) wide[i - first] = load(x[i]);
  for (int64_t i = length; i < last; ++i) wide[i - first] = right;

  const int64_t count = (n + 2 * kHalo + kPad - 1) / kPad * kPad;
#pragma omp simd aligned(even, odd : 64)
  for (int64_t i = 0; i < count; ++i) {
    const float* w = wide + i;
    float e = 2 * f[11] * w[0], o = 2 * f[10] * w[1];
    e += 2 * f[9] * w[1], o += 2 * f[8] * w[2];
    e += 2 * f[7] * w[2], o += 2 * f[6] * w[3];
    e += 2 * f[5] * w[3], o += 2 * f[4] * w[4];
    e += 2 * f[3] * w[4], o += 2 * f[2] * w[5];
    e += 2 * f[1] * w[5], o += 2 * f[0] * w[6];
    even[i] = activate(e, row);
    odd[i] = activate(o, row);
  }
  // even[i] and odd[i] stand for position begin - kHalo + i
  const int64_t zero = kHalo - begin, past = length - begin + kHalo;
  for (int64_t i = 0; i < zero; ++i) even[i] = odd[i] = even[zero];
  for (int64_t i = past; i < n + 2 * kHalo; ++i) even[i] = odd[i] = odd[past - 1];

#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float *e = even + i, *o = odd + i;
    float a = f[1] * e[1], b = f[0] * o[0];
    a += f[3] * e[2], b += f[2] * o[1];
    a += f[5] * e[3], b += f[4] * o[2];
    a += f[7] * e[4], b += f[6] * o[3];
    a += f[9] * e[5], b += f[8] * o[4];
    a += f[11] * e[6], b += f[10] * o[5];
    store(y + begin + i, a + b);
  }
}

}  // namespace

Tensor snake_fwd(Tensor x, Tensor alpha, Tensor beta) {
  check_tensor(kOp, "x", x);
  check_rank(kOp, "x", x, 3);
  const int64_t channels = x.size(1), length = x.size(2), rows = x.size(0) * channels;
  for (const auto& [name, t] : {std::pair{"alpha", &alpha}, {"beta", &beta}}) {
    check_tensor(kOp, name, *t);
    check_rank(kOp, name, *t, 1);
    check_size(kOp, name, *t, 0, channels);
  }

  const Tensor x_dense = dense(x);
  Tensor y = new_like(x);
  const auto a = to_floats(alpha), b = to_floats(beta);
  std::vector<Row> params(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double turns = std::exp(static_cast<double>(a[c])) / M_PI;
    const float hi = static_cast<float>(turns);
    params[c] = {
        hi, static_cast<float>(turns - hi),
        static_cast<float>(1 / (std::exp(static_cast<double>(b[c])) + 1e-9))};
  }
  const int64_t blocks = (length + kBlock - 1) / kBlock;
  by_dtype(x, [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x_dense);
    T* to = mutable_data<T>(y);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::min(length, kBlock));
    parallel_for(rows * blocks, grain, [&](int64_t item, int64_t stop) {
      for (; item < stop; ++item) {
        const int64_t row = item / blocks, begin = item % blocks * kBlock;
        Clones<&snake_body<T>>::run(
            from + row * length, to + row * length, begin, std::min(begin + kBlock, length), length,
            params[row % channels]);
      }
    });
  });
  return y;
}

}  // namespace mfmjt
