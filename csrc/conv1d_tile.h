// One register tile of a convolution, for the instruction set that the including file names:
//   TILE_NAME, TILE_TARGET, TILE_LANES, TILE_OUT (output channels).
// `Vectors` of samples. Weights are (C, K, weight_step), of which the tile takes the first TILE_OUT.
// Included once per instruction set, hence no include guard: vectors wider than the baseline's exist
// only inside functions of that target.

template <int Vectors>
__attribute__((noinline, target(TILE_TARGET))) void TILE_NAME(
    const float* x, int64_t x_row, int64_t channels, int64_t taps, int64_t dilation,
    const float* weight, int64_t weight_step, const float* bias, float* y, int64_t y_row,
    int64_t outs, int64_t samples) {
  typedef float Vector __attribute__((vector_size(4 * TILE_LANES), aligned(4), may_alias));
  Vector sum[TILE_OUT][Vectors];
#pragma GCC unroll 16
  for (int o = 0; o < TILE_OUT; ++o) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[o][v] = Vector{} + bias[o];
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < taps; ++k) {
      const float* from = x + c * x_row + k * dilation;
      Vector in[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        in[v] = *reinterpret_cast<const Vector*>(from + v * TILE_LANES);
      }
#pragma GCC unroll 16
      for (int o = 0; o < TILE_OUT; ++o) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[o][v] += in[v] * weight[o];
      }
      weight += weight_step;
    }
  }
  constexpr int64_t width = Vectors * TILE_LANES;
  if (outs == TILE_OUT && samples == width) {
#pragma GCC unroll 16
    for (int o = 0; o < TILE_OUT; ++o) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        *reinterpret_cast<Vector*>(y + o * y_row + v * TILE_LANES) = sum[o][v];
      }
    }
    return;
  }
  float out[TILE_OUT][width];
#pragma GCC unroll 16
  for (int o = 0; o < TILE_OUT; ++o) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      *reinterpret_cast<Vector*>(&out[o][v * TILE_LANES]) = sum[o][v];
    }
  }
  for (int64_t o = 0; o < outs; ++o) {
    std::memcpy(y + o * y_row, out[o], samples * sizeof(float));
  }
}

#undef TILE_NAME
#undef TILE_TARGET
#undef TILE_LANES
#undef TILE_OUT
