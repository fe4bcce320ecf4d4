// Convolution by Toom and Cook's method, with less than half of the products: float32, channels-first as
// vocoders have it, same padding, any dilation.
//
// Taps are cut into segments of 4, outputs of one phase of the dilation into tiles of 4. Over a tile a
// segment is a product of polynomials, taken at 7 points (0, 1, -1, 1/2, -1/2, 2 and infinity):
//   y[4i + r] = sum_p a_p^r  sum_{c, s} U_p[c, s] V_p[c, i + s]
// V_p is tile i of x, U_p segment s of the taps. A segment is as long as a tile, so one V_p serves all
// segments, and at each point there is a convolution over tiles with as many taps as segments. The
// last segment of an odd kernel has no 4th tap and hence no product at infinity: 6, 13 and 20 products
// for 4 outputs of kernel 3, 7 and 11, which directly take 12, 28 and 44.
//
// Rounding: the points' powers are as apart as 1/8 and 8, which in float32 costs a factor of 4 against
// a direct convolution (measured, and the least of the sets of 7 that were tried).

#include "arguments.h"

namespace mfmjt {
namespace {

#if defined(__x86_64__)
#define TILE_NAME tile_avx512
#define TILE_TARGET MFMJT_AVX512
#define TILE_LANES 16
#define TILE_OUT 8
#include "conv1d_tile.h"

#define TILE_NAME tile_avx2
#define TILE_TARGET MFMJT_AVX2
#define TILE_LANES 8
#define TILE_OUT 4
#include "conv1d_tile.h"
#endif

constexpr int kPoints = 7;  // the last is infinity
constexpr double kAt[kPoints - 1] = {0, 1, -1, 0.5, -0.5, 2};
constexpr int64_t kTile = 4;
constexpr int64_t kReach = 1024;  // dilation times taps, at most
constexpr int64_t kOuts = 8;      // output channels that lie side by side in the weights
constexpr int64_t kLine = 48;     // flat positions (see Plan) of a register tile
constexpr int64_t kPanel = 96;    // flat positions whose V_p lie together in memory
constexpr int64_t kGroup = 32;    // output channels made at a time
constexpr int64_t kMany = 256;    // channels from which these, not samples, are shared among threads
constexpr int64_t kBlock = 192;   // flat positions of fewer channels at a time, at most

// Flat positions count tiles of all phases, of which neighbours lie together: tile i of phase f is at
// i * dilation + f, and the next tile of that phase `dilation` further on.
struct Plan {
  int64_t channels, outs, taps, samples, dilation, pad;
  int64_t segments;     // of the taps
  int64_t tiles;        // of one phase in a block
  int64_t blocks;       // of samples
  int64_t width;        // flat positions of a block's outputs
  int64_t panels, row;  // of V_p: (panel, channel, row), a row with what later segments see
  int64_t m_row;        // of products: (point, output channel, flat position)
  const float *x, *weight, *bias;
  float* y;

  bool many() const { return channels >= kMany; }
  bool infinite() const { return segments > 1; }
  int points() const { return infinite() ? kPoints : kPoints - 1; }
  int64_t segments_at(int point) const { return segments - (point == kPoints - 1); }
  int64_t v_point() const { return panels * channels * row; }
  int64_t m_point() const { return kGroup * m_row; }
  int64_t inputs() const { return (tiles + segments) * dilation; }  // flat positions that are read
  int64_t block_samples() const { return kTile * tiles * dilation; }
};

// Memory that a thread keeps for its next convolution: new pages cost more than what is done in them.
enum Use { kWeights, kInputs, kProducts, kSpread, kEdge, kUses };
float* scratch(Use use, int64_t size) {
  thread_local std::vector<float> kept[kUses];
  auto& buffer = kept[use];
  if (static_cast<int64_t>(buffer.size()) < size) buffer = std::vector<float>(size);
  return buffer.data();
}

// ---------------------------------------------------------------------------------------------
// Transforms

// The 4 samples of every tile, each to a row of its own; and back.
template <int64_t Dilation>
MFMJT_BODY void spread_chunks(const float* __restrict__ x, int64_t tiles, float* __restrict__ z,
                              int64_t z_row) {
  for (int64_t i = 0; i < tiles; ++i) {
    for (int64_t r = 0; r < kTile; ++r) {
      std::memcpy(z + r * z_row + i * Dilation, x + (kTile * i + r) * Dilation, 4 * Dilation);
    }
  }
}

template <int64_t Dilation>
MFMJT_BODY void join_chunks(const float* __restrict__ z, int64_t z_row, int64_t tiles,
                            float* __restrict__ y) {
  for (int64_t i = 0; i < tiles; ++i) {
    for (int64_t r = 0; r < kTile; ++r) {
      std::memcpy(y + (kTile * i + r) * Dilation, z + r * z_row + i * Dilation, 4 * Dilation);
    }
  }
}

MFMJT_BODY void spread_body(
    const float* __restrict__ x, int64_t dilation, int64_t tiles, float* __restrict__ z,
    int64_t z_row) {
  if (dilation == 1) {
    float *z0 = z, *z1 = z + z_row, *z2 = z + 2 * z_row, *z3 = z + 3 * z_row;
#pragma omp simd
    for (int64_t i = 0; i < tiles; ++i) {
      z0[i] = x[4 * i], z1[i] = x[4 * i + 1], z2[i] = x[4 * i + 2], z3[i] = x[4 * i + 3];
    }
  } else if (dilation == 3) {
    spread_chunks<3>(x, tiles, z, z_row);
  } else if (dilation == 5) {
    spread_chunks<5>(x, tiles, z, z_row);
  } else {
    for (int64_t i = 0; i < kTile * tiles; ++i) {
      std::memcpy(
          z + i % kTile * z_row + i / kTile * dilation, x + i * dilation,
          dilation * sizeof(float));
    }
  }
}

MFMJT_BODY void join_body(
    const float* __restrict__ z, int64_t z_row, int64_t dilation, int64_t samples,
    float* __restrict__ y) {
  const int64_t tiles = samples / (kTile * dilation);
  if (dilation == 1) {
    const float *z0 = z, *z1 = z + z_row, *z2 = z + 2 * z_row, *z3 = z + 3 * z_row;
#pragma omp simd
    for (int64_t i = 0; i < tiles; ++i) {
      y[4 * i] = z0[i], y[4 * i + 1] = z1[i], y[4 * i + 2] = z2[i], y[4 * i + 3] = z3[i];
    }
  } else if (dilation == 3) {
    join_chunks<3>(z, z_row, tiles, y);
  } else if (dilation == 5) {
    join_chunks<5>(z, z_row, tiles, y);
  } else {
    for (int64_t i = 0; i < kTile * tiles; ++i) {
      std::memcpy(
          y + i * dilation, z + i % kTile * z_row + i / kTile * dilation,
          dilation * sizeof(float));
    }
  }
  for (int64_t t = tiles * kTile * dilation; t < samples; ++t) {
    const int64_t chunk = t / dilation;
    y[t] = z[chunk % kTile * z_row + chunk / kTile * dilation + t % dilation];
  }
}

// V of `count` flat positions. With t[j] = x[j+1] - 2 x[j] the factor of point 2 is taken once for
// all others.
MFMJT_BODY void transform_body(
    const float* z, int64_t z_row, int64_t next, int64_t count, bool infinite, float* v,
    int64_t v_point) {
  const float *z0 = z, *z1 = z + z_row, *z2 = z + 2 * z_row, *z3 = z + 3 * z_row;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float x0 = z0[i], x1 = z1[i], x2 = z2[i], x3 = z3[i], x4 = z0[i + next];
    const float x5 = z1[i + next];
    const float t0 = x1 - 2 * x0, t1 = x2 - 2 * x1, t2 = x3 - 2 * x2, t3 = x4 - 2 * x3;
    const float t4 = x5 - 2 * x4;
    const float p = t3 - 0.25f * t1, q = t4 - 0.25f * t2;
    const float g = 0.5f * (t3 - t1), h = t4 - t2;
    v[i] = t4 - 1.25f * t2 + 0.25f * t0;
    v[i + v_point] = q + p;
    v[i + 2 * v_point] = q - p;
    v[i + 3 * v_point] = h + g;
    v[i + 4 * v_point] = h - g;
    v[i + 5 * v_point] = x5 - 1.25f * x3 + 0.25f * x1;
  }
  if (!infinite) return;
  v += 6 * v_point;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float x1 = z1[i], x2 = z2[i], x3 = z3[i], x4 = z0[i + next], x5 = z1[i + next];
    const float x6 = z2[i + next];
    const float t1 = x2 - 2 * x1, t3 = x4 - 2 * x3, t5 = x6 - 2 * x5;
    v[i] = t5 - 1.25f * t3 + 0.25f * t1;
  }
}

// y of `count` flat positions, each of a tile's 4 samples in a row of its own.
MFMJT_BODY void inverse_body(
    const float* m, int64_t m_point, int64_t count, bool infinite, float bias, float* z,
    int64_t z_row) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float a = m[i + m_point], b = m[i + 2 * m_point];
    const float c = m[i + 3 * m_point], d = m[i + 4 * m_point], e = m[i + 5 * m_point];
    const float even = a + b, odd = a - b, near_even = c + d, near_odd = c - d;
    z[i] = bias + ((m[i] + e) + (even + near_even));
    z[i + z_row] = bias + (odd + 0.5f * near_odd + 2 * e);
    z[i + 2 * z_row] = bias + (even + 0.25f * near_even + 4 * e);
    z[i + 3 * z_row] = bias + (odd + 0.125f * near_odd + 8 * e);
  }
  if (!infinite) return;
  z += 3 * z_row;
  m += 6 * m_point;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) z[i] += m[i];
}

struct Scales {
  double of[kPoints][kTile] = {};
  Scales() {
    for (int a = 0; a < kPoints - 1; ++a) {
      double product = 1;
      for (int b = 0; b < kPoints - 1; ++b) product *= a == b ? 1 : kAt[a] - kAt[b];
      for (int64_t j = 0; j < kTile; ++j) of[a][j] = std::pow(kAt[a], j) / product;
    }
    of[kPoints - 1][kTile - 1] = 1;
  }
};

const Scales& scales() {
  static const Scales kept;
  return kept;
}

// Size of the weights of `outs` output channels, and where in them those of a point begin. They are
// (point, outs / 8, channels, segments, 8).
int64_t weights(const Plan& p, int64_t outs, int point = kPoints) {
  const int64_t one = round_up(outs, kOuts) * p.channels;
  return one * (point * p.segments - (point == kPoints));
}

// U of 8 output channels at all points: a segment's value there, over what the point's Lagrange
// polynomial is divided by. In doubles, rounded once.
MFMJT_BODY void weight_body(
    const float* weight, int64_t outs, int64_t channels, int64_t taps, int64_t segments, float* u,
    int64_t u_point, float* infinite) {
  const auto& scale = scales().of;
  double w[kTile][kOuts] = {};
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t some = std::min(kTile, taps - s * kTile);
      for (int64_t o = 0; o < outs; ++o) {
        const float* from = weight + (o * channels + c) * taps + s * kTile;
        for (int64_t j = 0; j < some; ++j) w[j][o] = from[j];
      }
      for (int64_t j = some; j < kTile; ++j) std::fill(w[j], w[j] + kOuts, 0.0);
      for (int a = 0; a < kPoints - 1; ++a) {
        float* to = u + a * u_point + (c * segments + s) * kOuts;
        const double *f = scale[a], f0 = f[0], f1 = f[1], f2 = f[2], f3 = f[3];
#pragma omp simd
        for (int64_t o = 0; o < kOuts; ++o) {
          to[o] = static_cast<float>(f0 * w[0][o] + f1 * w[1][o] + f2 * w[2][o] + f3 * w[3][o]);
        }
      }
      if (s + 1 == segments) continue;  // it has no 4th tap
      float* to = infinite + (c * (segments - 1) + s) * kOuts;
      for (int64_t o = 0; o < kOuts; ++o) to[o] = static_cast<float>(w[kTile - 1][o]);
    }
  }
}

void transform_weight(const Plan& p, int64_t first, int64_t outs, float* u) {
  for (int64_t out = 0; out < outs; out += kOuts) {
    Clones<&weight_body>::run(
        p.weight + (first + out) * p.channels * p.taps, std::min(kOuts, outs - out), p.channels,
        p.taps, p.segments, u + out * p.channels * p.segments, weights(p, outs, 1),
        u + weights(p, outs, kPoints - 1) + out * p.channels * (p.segments - 1));
  }
}

// V of a block, of some channels.
void transform_inputs(
    const Plan& p, int64_t b, int64_t block, int64_t begin, int64_t end, float* v) {
  const int64_t inputs = p.inputs(), span = kTile * inputs;
  const int64_t z_row = (p.panels - 1) * kPanel + p.row + p.dilation;
  const int64_t first = block * p.block_samples() - p.pad;
  const int64_t from = std::clamp<int64_t>(first, 0, p.samples);
  const int64_t to = std::clamp<int64_t>(first + span, from, p.samples);
  float* z = scratch(kSpread, kTile * z_row);
  float* edge = scratch(kEdge, span);
  for (int64_t c = begin; c < end; ++c) {
    const float* x = p.x + (b * p.channels + c) * p.samples;
    if (to - from < span) {
      std::fill(edge, edge + (from - first), 0.0f);
      std::memcpy(edge + (from - first), x + from, (to - from) * sizeof(float));
      std::fill(edge + (to - first), edge + span, 0.0f);
      x = edge;
    } else {
      x += first;
    }
    Clones<&spread_body>::run(x, p.dilation, p.tiles + p.segments, z, z_row);
    for (int64_t panel = 0; panel < p.panels; ++panel) {
      Clones<&transform_body>::run(
          z + panel * kPanel, z_row, p.dilation, p.row, p.infinite(),
          v + (panel * p.channels + c) * p.row, p.v_point());
    }
  }
}

// y of a block, of some output channels, from their products.
void transform_outputs(
    const Plan& p, int64_t b, int64_t block, int64_t first, int64_t outs, const float* m) {
  const int64_t start = block * p.block_samples(), z_row = round_up(p.width, 16);
  const int64_t samples = std::min(p.block_samples(), p.samples - start);
  float* z = scratch(kSpread, kTile * z_row);
  for (int64_t o = 0; o < outs; ++o) {
    Clones<&inverse_body>::run(
        m + o * p.m_row, p.m_point(), p.width, p.infinite(), p.bias[first + o], z, z_row);
    Clones<&join_body>::run(
        z, z_row, p.dilation, samples, p.y + (b * p.outs + first + o) * p.samples + start);
  }
}

// ---------------------------------------------------------------------------------------------
// Products

template <int Vectors>
void multiply_some(
    const Plan& p, int64_t segments, [[maybe_unused]] const float* v, const float* u, int64_t outs,
    float* m) {
  [[maybe_unused]] static constexpr float zeros[kOuts] = {};
  const int64_t u_step = kOuts * p.channels * segments, m_step = kOuts * p.m_row;
  for (int64_t o = 0; o < outs; o += kOuts, u += u_step, m += m_step) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) {
      tile_avx512<Vectors>(
          v, p.row, p.channels, segments, p.dilation, u, kOuts, zeros, m, p.m_row, 8, 16 * Vectors);
      continue;
    }
    for (int64_t half = 0; half < kOuts; half += 4) {
      for (int64_t t = 0; t < 16 * Vectors; t += 8 * Vectors) {
        tile_avx2<Vectors>(
            v + t, p.row, p.channels, segments, p.dilation, u + half, kOuts, zeros,
            m + half * p.m_row + t, p.m_row, 4, 8 * Vectors);
      }
    }
#endif
  }
}

// The products of a block at every point, of some output channels.
void multiply(const Plan& p, const float* v, const float* u, int64_t outs, float* m) {
  for (int a = 0; a < p.points(); ++a, v += p.v_point(), m += p.m_point()) {
    const int64_t segments = p.segments_at(a);
    const float* at = u + weights(p, outs, a);
    for (int64_t t = 0; t < p.width; t += kLine) {
      const float* from = v + t / kPanel * p.channels * p.row + t % kPanel;
      if (p.width - t > 32) {
        multiply_some<3>(p, segments, from, at, outs, m + t);
      } else if (p.width - t > 16) {
        multiply_some<2>(p, segments, from, at, outs, m + t);
      } else {
        multiply_some<1>(p, segments, from, at, outs, m + t);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------

// Few channels: weights once, then blocks of samples shared among threads.
void convolve_few(const Plan& p, int64_t batch) {
  const int64_t groups = (p.outs + kGroup - 1) / kGroup, one = weights(p, kGroup);
  float* u = scratch(kWeights, groups * one);
  for (int64_t g = 0; g < groups; ++g) {
    transform_weight(p, g * kGroup, std::min(kGroup, p.outs - g * kGroup), u + g * one);
  }
  parallel_for(batch * p.blocks, 1, [&](int64_t begin, int64_t end) {
    float* v = scratch(kInputs, p.points() * p.v_point());
    float* m = scratch(kProducts, p.points() * p.m_point());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.blocks, block = item % p.blocks;
      transform_inputs(p, b, block, 0, p.channels, v);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t outs = std::min(kGroup, p.outs - g * kGroup);
        multiply(p, v, u + g * one, outs, m);
        transform_outputs(p, b, block, g * kGroup, outs, m);
      }
    }
  });
}

// Many: for one block after the other first inputs, then outputs shared among threads, each with the
// weights that it needs.
void convolve_many(const Plan& p, int64_t batch) {
  float* v = scratch(kInputs, p.points() * p.v_point());
  for (int64_t item = 0; item < batch * p.blocks; ++item) {
    const int64_t b = item / p.blocks, block = item % p.blocks;
    parallel_for(p.channels, 16, [&](int64_t begin, int64_t end) {
      transform_inputs(p, b, block, begin, end, v);
    });
    parallel_for((p.outs + kGroup - 1) / kGroup, 1, [&](int64_t begin, int64_t end) {
      float* u = scratch(kWeights, weights(p, kGroup));
      float* m = scratch(kProducts, p.points() * p.m_point());
      for (int64_t g = begin; g < end; ++g) {
        const int64_t outs = std::min(kGroup, p.outs - g * kGroup);
        transform_weight(p, g * kGroup, outs, u);
        multiply(p, v, u, outs, m);
        transform_outputs(p, b, block, g * kGroup, outs, m);
      }
    });
  }
}

// Blocks of samples such that little is computed twice or for nothing, and two threads get as much.
void cut(Plan& p) {
  const int64_t tiles = (p.samples + kTile * p.dilation - 1) / (kTile * p.dilation);
  const int64_t widest = p.many() ? std::max<int64_t>(96, (512 * 768) / p.channels) : kBlock;
  const int64_t least = (tiles * p.dilation + widest - 1) / widest;
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int64_t blocks = least; blocks < least + 8; ++blocks) {
    const int64_t each = (tiles + blocks - 1) / blocks, width = each * p.dilation;
    const int64_t cost = (blocks + (p.many() ? 0 : blocks % 2)) * round_up(width, 16);
    if (cost < best) {
      best = cost;
      p.blocks = blocks;
      p.tiles = each;
      p.width = width;
    }
  }
  p.panels = (p.width + kPanel - 1) / kPanel;
  const int64_t panel = std::min(kPanel, round_up(p.width, 16));
  p.row = panel + round_up((p.segments - 1) * p.dilation, 16);
  p.m_row = round_up(p.width, 16);
}

Tensor conv1d_toom(Tensor x, Tensor weight, Maybe bias, int64_t dilation) {
  constexpr const char* op = "conv1d_toom";
  check_tensor(op, "x", x);
  require(x.scalar_type() == ScalarType::Float, op, "x must be float32");
  check_rank(op, "x", x, 3);
  check_dtype(op, "weight", weight, x);
  check_rank(op, "weight", weight, 3);
  check_size(op, "weight", weight, 1, x.size(1));
  const int64_t taps = weight.size(2);
  require(taps % 2 == 1, op, "weight must have an odd number of taps, got ", taps);
  require(dilation > 0, op, "dilation must be positive, got ", dilation);
  int64_t reach = 0;
  require(
      !__builtin_mul_overflow(taps, dilation, &reach) && reach <= kReach, op,
      "dilation of ", dilation, " is too large");
  Plan p{};
  p.channels = x.size(1);
  p.samples = x.size(2);
  p.outs = weight.size(0);
  p.taps = taps;
  p.dilation = dilation;
  p.pad = taps / 2 * dilation;
  p.segments = (taps + kTile - 1) / kTile;
  if (bias) {
    check_dtype(op, "bias", *bias, x);
    check_shape(op, "bias", *bias, std::vector{p.outs});
  }
  require(isa() != Isa::portable, op, "x is on a CPU without AVX2, where PyTorch's is no slower");

  cut(p);
  std::vector<float> offsets(p.outs);
  if (bias) offsets = to_floats(*bias);
  const Tensor x_dense = dense(x), weight_dense = dense(weight);
  Tensor y = new_tensor({x.size(0), p.outs, p.samples});
  p.x = data<float>(x_dense);
  p.weight = data<float>(weight_dense);
  p.bias = offsets.data();
  p.y = mutable_data<float>(y);
  if (p.many()) {
    convolve_many(p, x.size(0));
  } else {
    convolve_few(p, x.size(0));
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mfmjt_cpu, m) {
  m.def("conv1d_toom(Tensor x, Tensor weight, Tensor? bias, int dilation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mfmjt_cpu, CPU, m) { m.impl("conv1d_toom", TORCH_BOX(&conv1d_toom)); }

}  // namespace mfmjt
