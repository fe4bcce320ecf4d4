// Anti-aliased SnakeBeta: twice the rate by 6 taps a phase, x + sin(a x)^2 / b, back by 12 taps.
//
// Channels-first (B, C, T), each row by itself. The doubled rate goes by in pairs, the q-th of them
// even[q] and odd[q-1], for both come of x[q-3 .. q+2]. With f the 12 taps, and x, even, odd
// continued by their last value, and k = 0..5,
//   even[q] = act(2 sum_k f[2k] x[q-3+k]),   odd[q-1] = act(2 sum_k f[2k+1] x[q-3+k])
//   y[i]    = sum_k f[2k+1] even[i-2+k] + f[2k] odd[i-3+k]
// The taps are symmetric: f[2k], k = 0..5, backwards are f[2k+1]. By sums and differences of them
// there are half of the products: with s_k = (f[2k] + f[2k+1]) / 2, d_k = (f[2k] - f[2k+1]) / 2 and
// k = 0..2,
//   S = sum_k s_k (x[q-3+k] + x[q+2-k]),     D = sum_k d_k (x[q-3+k] - x[q+2-k])
//   even[q] = act(2 (S + D)),                odd[q-1] = act(2 (S - D))
// and back likewise from even + odd and odd - even. The factor 2 is shared out, sqrt(2) to each
// filter, so that the constants are the same; what is between them is smaller by sqrt(2).
// One read and one write of x, against 13 passes over doubled memory op by op.

#include "arguments.h"

#if defined(__x86_64__)
#if !defined(__clang__)  // of operands that GCC's header leaves undefined
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace mfmjt {
namespace {

constexpr const char* kOp = "snake_fwd";
constexpr double kRoot = 1.4142135623730951;
// Half of a Kaiser-windowed sinc: cutoff a quarter of the doubled rate, transition 0.3, sum one.
constexpr double kTaps[6] = {0x1.09f0d2p-9,  0x1.33ac88p-7, -0x1.a2810ep-6,
                             -0x1.d85448p-5, 0x1.075114p-3, 0x1.c5d8cap-2};
constexpr float sum_of_taps(int k) {
  return static_cast<float>((kTaps[2 * k] + kTaps[2 * k + 1]) / kRoot);
}
constexpr float difference_of_taps(int k) {
  return static_cast<float>((kTaps[2 * k] - kTaps[2 * k + 1]) / kRoot);
}
constexpr float kSums[3] = {sum_of_taps(0), sum_of_taps(1), sum_of_taps(2)};
constexpr float kDifferences[3] = {
    difference_of_taps(0), difference_of_taps(1), difference_of_taps(2)};
constexpr int64_t kStretch = 4096;  // outputs

// Minimax polynomials of sin(pi r) / r in r^2 for r in [-1/2, 1/2], relative errors 5e-9 and 9e-7.
template <class T>
constexpr int kTerms = std::is_same_v<T, float> ? 5 : 4;
constexpr double kSine5[5] = {
    0x1.3dafeap-4, -0x1.324ccap-1, 0x1.4668b0p+1, -0x1.4abbc2p+2, 0x1.921fb6p+1};
constexpr double kSine4[4] = {-0x1.1de616p-1, 0x1.4594d8p+1, -0x1.4ab628p+2, 0x1.921f9cp+1};

struct Channel {
  float turns;    // sqrt(2) frequency / pi
  float sine[5];  // the polynomial times the root of height / sqrt(2)
};

template <class T>
Channel channel_of(double alpha, double beta) {
  const double height = 1 / (std::exp(beta) + 1e-9), root = std::sqrt(height / kRoot);
  Channel channel = {static_cast<float>(kRoot * std::exp(alpha) / M_PI), {}};
  for (int i = 0; i < kTerms<T>; ++i) {
    channel.sine[i] = static_cast<float>(root * (kTerms<T> == 5 ? kSine5 : kSine4)[i]);
  }
  return channel;
}

template <class T>
MFMJT_BODY float activate(float u, const Channel& channel) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const float turns = u * channel.turns;
  const float r = turns - ((turns + shift) - shift);
  float z = r * r;
  z = z > 0.25f ? 0.25f : z;  // beyond 2^22 turns r is noise; keep it bounded, and NaN a NaN
  float p = channel.sine[0];
  for (int i = 1; i < kTerms<T>; ++i) p = p * z + channel.sine[i];
  return u + z * (p * p);
}

// x from `first` on, continued by its ends.
template <class T>
MFMJT_BODY void copy(const T* x, int64_t length, int64_t first, int64_t count, float* to) {
  const int64_t end = first + count;
  const int64_t from = std::clamp<int64_t>(0, first, end), past = std::clamp(length, first, end);
  const float left = load(x[0]), right = load(x[length - 1]);
  for (int64_t i = first; i < from; ++i) to[i - first] = left;
#pragma omp simd
  for (int64_t i = from; i < past; ++i) to[i - first] = load(x[i]);
  for (int64_t i = past; i < end; ++i) to[i - first] = right;
}

// Of pairs from the q-th on, those that reach beyond an end are twice what is at it. `last` is that
// of the right end, for those pairs that come in later calls.
inline void repeat_ends(
    float* sum, float* difference, int64_t q, int64_t count, int64_t length, float& last) {
  if (q <= 0) {
    const float even = sum[-q] - difference[-q];
    for (int64_t i = 0; i <= -q; ++i) sum[i] = even, difference[i] = 0;
  }
  for (int64_t i = std::max<int64_t>(length - q, 0); i < count; ++i) {
    if (q + i == length) last = sum[i] + difference[i];
    sum[i] = last, difference[i] = 0;
  }
}

// y[begin .. end) of a row, in plain loops by way of the first-level cache.
template <class T>
void stretch(const T* x, T* y, int64_t begin, int64_t end, int64_t length, Channel channel) {
  constexpr int64_t most = 1024, pad = 16;  // loops run in whole vectors, over their end
  alignas(64) float padded[most + 2 * pad], sum[most + 2 * pad], difference[most + 2 * pad];
  constexpr const float *s = kSums, *d = kDifferences;
  float last = 0;
  for (; begin < end; begin += most) {
    const int64_t n = std::min(end - begin, most), count = (n + 5 + pad - 1) / pad * pad;
    copy(x, length, begin - 5, count + 5, padded);
#pragma omp simd aligned(sum, difference : 64)
    for (int64_t i = 0; i < count; ++i) {
      const float* w = padded + i;
      const float a = s[0] * (w[0] + w[5]) + s[1] * (w[1] + w[4]) + s[2] * (w[2] + w[3]);
      const float b = d[0] * (w[0] - w[5]) + d[1] * (w[1] - w[4]) + d[2] * (w[2] - w[3]);
      const float even = activate<T>(a + b, channel), odd = activate<T>(a - b, channel);
      sum[i] = even + odd;
      difference[i] = odd - even;
    }
    repeat_ends(sum, difference, begin - 2, n + 5, length, last);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float *v = sum + i, *w = difference + i;
      const float a = s[0] * (v[0] + v[5]) + s[1] * (v[1] + v[4]) + s[2] * (v[2] + v[3]);
      const float b = d[0] * (w[0] - w[5]) + d[1] * (w[1] - w[4]) + d[2] * (w[2] - w[3]);
      store(y + begin + i, a + b);
    }
  }
}

#if defined(__x86_64__)
namespace avx512 {
#define SNAKE_TARGET MFMJT_AVX512
#define SNAKE_LANES 16
#include "snake_tile.h"
}  // namespace avx512

namespace avx2 {
#define SNAKE_TARGET MFMJT_AVX2
#define SNAKE_LANES 8
#include "snake_tile.h"
}  // namespace avx2
#endif

template <class T>
auto stretch_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::stretch<T>;
  if (isa() == Isa::avx2) return avx2::stretch<T>;
#endif
  return stretch<T>;
}

Tensor snake_fwd(Tensor x, Tensor alpha, Tensor beta) {
  check_tensor(kOp, "x", x);
  check_rank(kOp, "x", x, 3);
  const int64_t channels = x.size(1), length = x.size(2), rows = x.size(0) * channels;
  for (const auto& [name, t] : {std::pair{"alpha", &alpha}, {"beta", &beta}}) {
    check_tensor(kOp, name, *t);
    check_shape(kOp, name, *t, std::vector{channels});
  }

  const Tensor x_dense = dense(x);
  Tensor y = new_like(x);
  const auto a = to_floats(alpha), b = to_floats(beta);
  const int64_t stretches = (length + kStretch - 1) / kStretch;
  by_dtype(x, [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x_dense);
    T* to = mutable_data<T>(y);
    const auto run = stretch_for_this_cpu<T>();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::min(length, kStretch));
    parallel_for(rows * stretches, grain, [&](int64_t item, int64_t stop) {
      Channel channel = {};
      for (int64_t known = -1; item < stop; ++item) {
        const int64_t r = item / stretches, begin = item % stretches * kStretch;
        if (r != known) channel = channel_of<T>(a[r % channels], b[r % channels]);
        known = r;
        run(from + r * length, to + r * length, begin, std::min(begin + kStretch, length), length,
            channel);
      }
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mfmjt_cpu, m) {
  m.def("snake_fwd(Tensor x, Tensor alpha, Tensor beta) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mfmjt_cpu, CPU, m) { m.impl("snake_fwd", TORCH_BOX(&snake_fwd)); }

}  // namespace mfmjt
