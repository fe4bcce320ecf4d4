// Convolution with few channels and any dilation, channels-first as vocoders have it, same padding.
//
// float32 alone, and up to 32 channels: there oneDNN reaches half of its limit; with more of them, in
// bfloat16 and without AVX2 it is no slower. Here blocks of samples of all channels are laid side by
// side once, zeros beyond the ends included, so that rows neither share cache sets nor need a test,
// and register tiles of output channels x samples sweep channels and taps.

#include "common.h"
#include "ops.h"

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

using Tile = void(
    const float* x, int64_t x_row, int64_t channels, int64_t taps, int64_t dilation,
    const float* weight, int64_t weight_step, const float* bias, float* y, int64_t y_row,
    int64_t outs, int64_t samples);

constexpr int64_t kBlock = 480;  // samples: 10 tiles of 48, 20 of 24

struct Plan {
  int64_t channels, outs, taps, dilation, samples, blocks, out_tile, sample_tile, row;
  const float* x;
  float* y;
  const float *weight, *bias;  // (tiles, C, K, out_tile), (tiles, out_tile)
  Tile* tile;
};

void lay_out(const float* x, float* block, int64_t begin, const Plan* p) {
  const int64_t pad = p->taps / 2 * p->dilation, first = begin - pad, end = first + p->row;
  const int64_t from = std::clamp<int64_t>(first, 0, p->samples);
  const int64_t to = std::clamp<int64_t>(end, from, p->samples);
  for (int64_t c = 0; c < p->channels; ++c) {
    const float* row = x + c * p->samples;
    float* out = block + c * p->row;
    std::fill(out, out + (from - first), 0.0f);
    std::memcpy(out + (from - first), row + from, (to - from) * sizeof(float));
    std::fill(out + (to - first), out + p->row, 0.0f);
  }
}

void convolve(const Plan& p, int64_t begin, int64_t end) {
  std::vector<float> block(p.channels * p.row);
  const int64_t tiles = (p.outs + p.out_tile - 1) / p.out_tile;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.blocks, start = item % p.blocks * kBlock;
    lay_out(p.x + b * p.channels * p.samples, block.data(), start, &p);
    const int64_t stop = std::min(start + kBlock, p.samples);
    for (int64_t t = start; t < stop; t += p.sample_tile) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t o = tile * p.out_tile;
        p.tile(
            block.data() + (t - start), p.row, p.channels, p.taps, p.dilation,
            p.weight + o * p.channels * p.taps, p.out_tile, p.bias + o,
            p.y + (b * p.outs + o) * p.samples + t, p.samples, std::min(p.out_tile, p.outs - o),
            std::min(p.sample_tile, stop - t));
      }
    }
  }
}

}  // namespace

Tensor conv1d_fwd(Tensor x, Tensor weight, Maybe bias, int64_t dilation) {
  constexpr const char* op = "conv1d_fwd";
  check_tensor(op, "x", x);
  require(x.scalar_type() == ScalarType::Float, op, "x must be float32");
  check_rank(op, "x", x, 3);
  check_dtype(op, "weight", weight, x);
  check_rank(op, "weight", weight, 3);
  check_size(op, "weight", weight, 1, x.size(1));
  const int64_t channels = x.size(1), samples = x.size(2);
  const int64_t outs = weight.size(0), taps = weight.size(2);
  require(taps % 2 == 1, op, "weight must have an odd number of taps, got ", taps);
  require(dilation > 0, op, "dilation must be positive, got ", dilation);
  int64_t reach = 0;
  require(
      !__builtin_mul_overflow(taps - 1, dilation, &reach) && reach <= (1 << 20), op,
      "dilation of ", dilation, " is too large");
  if (bias) {
    check_dtype(op, "bias", *bias, x);
    check_rank(op, "bias", *bias, 1);
    check_size(op, "bias", *bias, 0, outs);
  }
  require(isa() != Isa::portable, op, "x is on a CPU without AVX2, where PyTorch's is no slower");

  const bool wide = isa() == Isa::avx512;
  const int64_t out_tile = wide ? 8 : 4, sample_tile = wide ? 48 : 24;
  const int64_t tiles = (outs + out_tile - 1) / out_tile;
  const auto w = to_floats(weight);
  std::vector<float> packed(tiles * channels * taps * out_tile), offsets(tiles * out_tile);
  for (int64_t o = 0; o < outs; ++o) {
    const int64_t at = o / out_tile * channels * taps * out_tile + o % out_tile;
    for (int64_t i = 0; i < channels * taps; ++i) {
      packed[at + i * out_tile] = w[o * channels * taps + i];
    }
  }
  if (bias) {
    const auto values = to_floats(*bias);
    std::copy(values.begin(), values.end(), offsets.begin());
  }
  const Tensor x_dense = dense(x);
  Tensor y = new_like(x, {x.size(0), outs, samples}, x.scalar_type());
  Plan plan{};
  plan.channels = channels;
  plan.outs = outs;
  plan.taps = taps;
  plan.dilation = dilation;
  plan.samples = samples;
  plan.blocks = (samples + kBlock - 1) / kBlock;
  plan.out_tile = out_tile;
  plan.sample_tile = sample_tile;
  plan.row = (kBlock + reach + 15) / 16 * 16;
  plan.x = data<float>(x_dense);
  plan.y = mutable_data<float>(y);
  plan.weight = packed.data();
  plan.bias = offsets.data();
#if defined(__x86_64__)
  plan.tile = wide ? &tile_avx512<3> : &tile_avx2<3>;
#endif
  parallel_for(x.size(0) * plan.blocks, 1,
      [&](int64_t begin, int64_t end) { convolve(plan, begin, end); });
  return y;
}

}  // namespace mfmjt
