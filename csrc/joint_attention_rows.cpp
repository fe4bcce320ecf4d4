// Attention in bfloat16 by rows of queries, where the CPU multiplies pairs of it (AVX-512 BF16): the
// products, the softmax between them, its tangent and its cotangent, without a matrix of scores in
// memory. Formulas: mfmjt/kernels/joint_attention.py.
//
// One product serves all: rows of a (pairs of bfloat16 along what is summed over, broadcast) times b,
// whose words hold two neighbours along it for 16 columns at a time; sums are floats. Scores stay
// floats, so that only P, W and the cotangent of S are rounded, as they enter the next product.

#include "common.h"
#include "ops.h"

#include <memory>

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of operands that GCC's header leaves so
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace mfmjt {

#if defined(__x86_64__)
namespace {

#define MFMJT_PAIRS __attribute__((target(MFMJT_AVX512 ",avx512bf16")))

constexpr int64_t kRows = 6;       // of a, whose 6 x 4 sums fill the registers
constexpr int64_t kQueries = 512;  // a task of the forward pass: packing keys is 1/100 of its work
constexpr int64_t kBytes = 1 << 19;  // of P and of the cotangent of S, kept by the backward pass

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// One head of (B, tokens, H, D), or nothing.
struct Matrix {
  const bf16* x = nullptr;
  int64_t stride = 0;
  const bf16* row(int64_t i) const { return x + i * stride; }
};

// A (B, tokens, H, D) tensor of any strides but dense rows.
struct Heads {
  const bf16* x = nullptr;
  int64_t batch = 0, token = 0, head = 0;
  explicit Heads(const Tensor& t)
      : x(data<bf16>(t)), batch(t.stride(0)), token(t.stride(1)), head(t.stride(2)) {}
  Heads() = default;
  Matrix at(int64_t b, int64_t h) const {
    return x == nullptr ? Matrix{} : Matrix{x + b * batch + h * head, token};
  }
};

MFMJT_PAIRS inline __m512bh pairs(__m512i x) { return (__m512bh)x; }

// 16 floats to bfloat16, and back as floats.
MFMJT_PAIRS inline __m512 rounded(__m512 x, bf16* to) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// e^x for x <= 0, relative error 3e-6; NaN where x is, zero for what is far below.
MFMJT_PAIRS inline __m512 power(__m512 x) {
  const __m512 t = _mm512_max_ps(_mm512_set1_ps(-200), _mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p0f)));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.33335581e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
  return _mm512_scalef_ps(p, n);
}

// `Step` words lie between neighbours along a row of a: it may be a panel, see Panels.
template <int R, int C, int Step>
MFMJT_PAIRS inline void tile(
    const bf16* a, int64_t a_row, const uint32_t* b, int64_t b_row, float* c, int64_t c_row,
    int64_t depth, bool add) {
  __m512 sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      sum[r][j] = add ? _mm512_loadu_ps(c + r * c_row + 16 * j) : _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    __m512i right[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) right[j] = _mm512_loadu_si512(b + k * b_row + 16 * j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(words(a + r * a_row)[k * Step]));
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], pairs(left), pairs(right[j]));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) _mm512_storeu_ps(c + r * c_row + 16 * j, sum[r][j]);
  }
}

template <int R, int Step>
MFMJT_PAIRS inline void tiles(
    const bf16* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t columns, float* c,
    int64_t c_row, int64_t depth, bool add) {
  int64_t j = 0;
  for (; j + 64 <= columns; j += 64) tile<R, 4, Step>(a, a_row, b + j, b_row, c + j, c_row, depth, add);
  for (; j < columns; j += 16) tile<R, 1, Step>(a, a_row, b + j, b_row, c + j, c_row, depth, add);
}

// c (rows, columns) = a b, or + a b; `depth` counts words, `columns` is a multiple of 16.
template <int Step = 1>
MFMJT_PAIRS void product(
    const bf16* a, int64_t a_row, int64_t rows, const uint32_t* b, int64_t b_row, int64_t columns,
    float* c, int64_t c_row, int64_t depth, bool add = false) {
  for (int64_t i = 0; i < rows;) {
    const int64_t left = rows - i;
    const auto part = left >= kRows ? tiles<kRows, Step>
                      : left >= 4   ? tiles<4, Step>
                      : left >= 2   ? tiles<2, Step>
                                    : tiles<1, Step>;
    part(a + i * a_row, a_row, b, b_row, columns, c + i * c_row, c_row, depth, add);
    i += left >= kRows ? kRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
  }
}

MFMJT_PAIRS inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// The transpose of 16 x 16 words.
MFMJT_PAIRS inline void turn(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    y[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// The transpose of x (rows, width) for a product that sums over the width: to (width / 2, up(rows)).
MFMJT_PAIRS void pack_across(Matrix x, int64_t rows, int64_t width, uint32_t* to) {
  const int64_t wide = up(rows, 16), half = width / 2;
  for (int64_t i = 0; i < wide; i += 16) {
    for (int64_t k = 0; k < half; k += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        block[r] = _mm512_setzero_si512();
        if (i + r < rows) {
          block[r] = _mm512_maskz_loadu_epi32(first(half - k), x.row(i + r) + 2 * k);
        }
      }
      turn(block);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        if (k + j < half) _mm512_storeu_si512(to + (k + j) * wide + i, block[j]);
      }
    }
  }
}

// X for a product that sums over the rows, less a number for each column: to (up(rows) / 2, up(width)).
MFMJT_PAIRS void pack_along(
    Matrix x, int64_t rows, int64_t width, uint32_t* to, const float* less = nullptr) {
  const int64_t wide = up(width, 16);
  for (int64_t i = 0; i < up(rows, 16); i += 2) {
    for (int64_t j = 0; j < wide; j += 16) {
      const __mmask16 mask = first(width - j);
      __m512i word = _mm512_setzero_si512();
      for (int64_t half = 0; half < 2 && i + half < rows; ++half) {
        const __m256i values = _mm256_maskz_loadu_epi16(mask, x.row(i + half) + j);
        __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16);
        if (less != nullptr) {
          const __m512 moved = _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_loadu_ps(less + j));
          bits = _mm512_slli_epi32(
              _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(moved)), 16);
        }
        word = _mm512_or_si512(word, half == 0 ? _mm512_srli_epi32(bits, 16) : bits);
      }
      _mm512_storeu_si512(to + i / 2 * wide + j, word);
    }
  }
}

struct Sizes {
  int64_t batch, heads, queries, keys, width;
  float scale;
  int64_t deep() const { return up(keys, 16); }
  int64_t wide() const { return up(width, 16); }
};

// Scores of a row, scaled and biased, -inf beyond the last key; returns the largest.
MFMJT_PAIRS inline float prepare(float* s, const Sizes& n, const float* bias) {
  __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 scale = _mm512_set1_ps(n.scale), none = top;
  for (int64_t j = 0; j < n.deep(); j += 16) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(s + j), scale);
    if (bias != nullptr) x = _mm512_add_ps(x, _mm512_loadu_ps(bias + j));
    if (j + 16 > n.keys) {
      x = _mm512_mask_mov_ps(none, first(n.keys - j), x);
    }
    _mm512_storeu_ps(s + j, x);
    top = _mm512_max_ps(top, x);
  }
  return _mm512_reduce_max_ps(top);
}

struct Sums {
  float p, w;  // of a row of P and of W as rounded
  float lse;
};

// s to P in `p`, not yet divided by its sum; s_dot to W in `w` likewise.
MFMJT_PAIRS inline Sums softmax(
    float* s, const float* s_dot, bf16* p, bf16* w, const Sizes& n, const float* bias) {
  const float top = prepare(s, n, bias);
  const float first = s_dot == nullptr ? 0 : *s_dot;
  const __m512 offset = _mm512_set1_ps(first);
  __m512 sum = _mm512_setzero_ps(), kept = sum, mean = sum;
  for (int64_t j = 0; j < n.deep(); j += 16) {
    const __m512 x = power(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(top)));
    sum = _mm512_add_ps(sum, x);
    kept = _mm512_add_ps(kept, rounded(x, p + j));
    if (s_dot != nullptr) {
      _mm512_storeu_ps(s + j, x);
      mean = _mm512_fmadd_ps(x, _mm512_sub_ps(_mm512_loadu_ps(s_dot + j), offset), mean);
    }
  }
  const float total = _mm512_reduce_add_ps(sum);
  Sums found{_mm512_reduce_add_ps(kept), 0, top + std::log(total)};
  if (s_dot == nullptr) return found;
  const __m512 centre = _mm512_set1_ps(_mm512_reduce_add_ps(mean) / total);
  kept = _mm512_setzero_ps();
  for (int64_t j = 0; j < n.deep(); j += 16) {
    const __m512 moved =
        _mm512_sub_ps(_mm512_sub_ps(_mm512_loadu_ps(s_dot + j), offset), centre);
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(n.scale));
    kept = _mm512_add_ps(kept, rounded(_mm512_mul_ps(x, moved), w + j));
  }
  found.w = _mm512_reduce_add_ps(kept);
  return found;
}

MFMJT_PAIRS inline void write(
    const float* from, float factor, const float* other, float other_factor, int64_t width, bf16* to) {
  for (int64_t j = 0; j < width; j += 16) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + j), _mm512_set1_ps(factor));
    if (other != nullptr) {
      x = _mm512_fmadd_ps(_mm512_loadu_ps(other + j), _mm512_set1_ps(other_factor), x);
    }
    _mm256_mask_storeu_epi16(to + j, first(width - j), (__m256i)_mm512_cvtneps_pbh(x));
  }
}

struct Forward {
  Sizes n;
  Heads q, k, v, q_dot, k_dot, v_dot;
  const float* bias;  // (B, up(keys)), added to scaled scores; or null
  bf16 *o, *o_dot;    // (B, queries, H, D), contiguous
  float* lse;         // (B, H, queries)
  bool moves() const { return q_dot.x != nullptr || k_dot.x != nullptr; }
};

// Rows [begin, end) of one head.
MFMJT_PAIRS void forward(const Forward& f, int64_t b, int64_t h, int64_t begin, int64_t end) {
  const Sizes& n = f.n;
  const int64_t deep = n.deep(), wide = n.wide(), half = n.width / 2;
  const Matrix q = f.q.at(b, h), q_dot = f.q_dot.at(b, h);
  std::vector<uint32_t> k(half * deep), v(deep / 2 * wide), k_dot, v_dot;
  pack_across(f.k.at(b, h), n.keys, n.width, k.data());
  pack_along(f.v.at(b, h), n.keys, n.width, v.data());
  if (f.k_dot.x != nullptr) {
    k_dot.resize(half * deep);
    pack_across(f.k_dot.at(b, h), n.keys, n.width, k_dot.data());
  }
  if (f.v_dot.x != nullptr) {
    v_dot.resize(deep / 2 * wide);
    pack_along(f.v_dot.at(b, h), n.keys, n.width, v_dot.data());
  }
  const bool moves = f.moves(), dual = f.o_dot != nullptr;
  std::vector<float> s(kRows * deep), s_dot(moves ? kRows * deep : 0), o(kRows * wide), o_dot(kRows * wide);
  std::vector<bf16> p(kRows * deep), w(moves ? kRows * deep : 0);
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t rows = std::min(kRows, end - i);
    product(q.row(i), q.stride, rows, k.data(), deep, deep, s.data(), deep, half);
    if (q_dot.x != nullptr) {
      product(q_dot.row(i), q_dot.stride, rows, k.data(), deep, deep, s_dot.data(), deep, half);
    }
    if (f.k_dot.x != nullptr) {
      product(
          q.row(i), q.stride, rows, k_dot.data(), deep, deep, s_dot.data(), deep, half,
          q_dot.x != nullptr);
    }
    Sums sums[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      float* moved = moves ? s_dot.data() + r * deep : nullptr;
      bf16* to = moves ? w.data() + r * deep : nullptr;
      const float* bias = f.bias == nullptr ? nullptr : f.bias + b * deep;
      sums[r] = softmax(s.data() + r * deep, moved, p.data() + r * deep, to, n, bias);
      f.lse[(b * n.heads + h) * n.queries + i + r] = sums[r].lse;
    }
    product(p.data(), deep, rows, v.data(), wide, wide, o.data(), wide, deep / 2);
    if (moves) product(w.data(), deep, rows, v.data(), wide, wide, o_dot.data(), wide, deep / 2);
    if (f.v_dot.x != nullptr) {
      product(p.data(), deep, rows, v_dot.data(), wide, wide, o_dot.data(), wide, deep / 2, moves);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float over = 1 / sums[r].p, *from = o.data() + r * wide;
      const int64_t at = ((b * n.queries + i + r) * n.heads + h) * n.width;
      write(from, over, nullptr, 0, n.width, f.o + at);
      // rows of W have sum zero, which rounding takes away
      if (dual) write(o_dot.data() + r * wide, over, from, -sums[r].w * over * over, n.width, f.o_dot + at);
    }
  }
}

struct Backward {
  Sizes n;
  Heads q, k, v, o_bar;
  const float *bias, *lse;
  bf16 *q_bar, *k_bar, *v_bar;
};

// A matrix of queries x keys for a product that sums over the queries: words of two neighbours among
// these, in panels of 16 keys, (up(keys) / 16, queries / 2, 16). A panel of the block of queries stays
// in the first-level cache, and its rows come by in the order in which they are made.
struct Panels {
  uint32_t* x;
  int64_t pairs;
  uint32_t* at(int64_t pair, int64_t key) const { return x + (key / 16 * pairs + pair) * 16; }
};

// Two vectors of floats as words, low halves first.
MFMJT_PAIRS inline __m512i rounded_pairs(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
MFMJT_PAIRS inline __m512i interleaved(__m512i halves) {
  alignas(64) static constexpr uint16_t order[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}

// Of two rows: S to P in `s` and `p`; returns how P weighs the precursors o_bar v^T of the cotangent
// of S, less the first of each.
struct Centres {
  float low, high;
};
MFMJT_PAIRS inline Centres powers_bar(
    float* s, const float* bar, const float* lse, const Sizes& n, const float* bias, Panels p,
    int64_t pair) {
  const int64_t deep = n.deep();
  const __m512 scale = _mm512_set1_ps(n.scale);
  const __m512 sum[2] = {_mm512_set1_ps(lse[0]), _mm512_set1_ps(lse[1])};
  const __m512 offset[2] = {_mm512_set1_ps(bar[0]), _mm512_set1_ps(bar[deep])};
  __m512 mean[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t j = 0; j < deep; j += 16) {
    const __m512 shift = bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(bias + j);
    __m512 x[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m512 score = _mm512_fmadd_ps(_mm512_loadu_ps(s + r * deep + j), scale, shift);
      x[r] = _mm512_maskz_mov_ps(first(n.keys - j), power(_mm512_sub_ps(score, sum[r])));
      _mm512_storeu_ps(s + r * deep + j, x[r]);
      const __m512 moved = _mm512_sub_ps(_mm512_loadu_ps(bar + r * deep + j), offset[r]);
      mean[r] = _mm512_fmadd_ps(x[r], moved, mean[r]);
    }
    _mm512_storeu_si512(p.at(pair, j), interleaved(rounded_pairs(x[0], x[1])));
  }
  return {_mm512_reduce_add_ps(mean[0]), _mm512_reduce_add_ps(mean[1])};
}

// Of two rows: P and those precursors to the cotangent of S, as rows and as words of a panel.
MFMJT_PAIRS inline void scores_bar(
    const float* p, const float* bar, Centres centres, const Sizes& n, bf16* rows, Panels ds,
    int64_t pair) {
  const int64_t deep = n.deep();
  const __m512 scale = _mm512_set1_ps(n.scale);
  const __m512 offset[2] = {_mm512_set1_ps(bar[0]), _mm512_set1_ps(bar[deep])};
  const __m512 centre[2] = {_mm512_set1_ps(centres.low), _mm512_set1_ps(centres.high)};
  for (int64_t j = 0; j < deep; j += 16) {
    __m512 x[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m512 moved = _mm512_sub_ps(_mm512_loadu_ps(bar + r * deep + j), offset[r]);
      const __m512 weight = _mm512_mul_ps(_mm512_loadu_ps(p + r * deep + j), scale);
      x[r] = _mm512_mul_ps(weight, _mm512_sub_ps(moved, centre[r]));
    }
    const __m512i halves = rounded_pairs(x[0], x[1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + j), _mm512_castsi512_si256(halves));
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(rows + deep + j), _mm512_extracti64x4_epi64(halves, 1));
    _mm512_storeu_si512(ds.at(pair, j), interleaved(halves));
  }
}

// Means of the columns of keys, zero where small: taking them off costs a rounding. It is nothing to
// q_bar, as rows of the cotangent of S have sum zero, but for rounding.
MFMJT_PAIRS void common_part(Matrix k, const Sizes& n, float* mean) {
  std::vector<float> size(n.width);
  for (int64_t i = 0; i < n.keys; ++i) {
    const bf16* row = k.row(i);
#pragma omp simd
    for (int64_t j = 0; j < n.width; ++j) {
      const float x = load(row[j]);
      mean[j] += x;
      size[j] += std::fabs(x);
    }
  }
  for (int64_t j = 0; j < n.width; ++j) {
    mean[j] = 2 * std::fabs(mean[j]) > size[j] ? mean[j] / static_cast<float>(n.keys) : 0;
  }
}

// What a thread keeps for one head after another: as it is, for it is written before it is read.
struct Room {
  int64_t block;  // queries at a time: whole tiles, and an even number
  std::unique_ptr<uint32_t[]> k_across, v_across, k_along, q_along, p, ds;
  std::unique_ptr<float[]> mean, s, bar, q_bar, k_bar, v_bar;
  std::unique_ptr<bf16[]> ds_rows;

  explicit Room(const Sizes& n) {
    const int64_t deep = n.deep(), wide = n.wide(), half = n.width / 2;
    block = std::min(up(n.queries, 48), std::max<int64_t>(48, kBytes / (2 * deep) / 48 * 48));
    k_across.reset(new uint32_t[half * deep]), v_across.reset(new uint32_t[half * deep]);
    k_along.reset(new uint32_t[deep / 2 * wide]), q_along.reset(new uint32_t[up(block, 16) / 2 * wide]);
    p.reset(new uint32_t[block / 2 * deep]), ds.reset(new uint32_t[block / 2 * deep]);
    mean.reset(new float[wide]), q_bar.reset(new float[kRows * wide]);
    s.reset(new float[kRows * deep]), bar.reset(new float[kRows * deep]);
    k_bar.reset(new float[deep * wide]), v_bar.reset(new float[deep * wide]);
    ds_rows.reset(new bf16[kRows * deep]);
  }
};

// x (keys, up(width)) = the transpose of a matrix in panels times the rows of a block, or + that.
MFMJT_PAIRS void product_of_panels(
    Panels a, int64_t pairs, const uint32_t* b, const Sizes& n, float* x, bool add) {
  for (int64_t j = 0; j < n.keys; j += 16) {
    product<16>(
        reinterpret_cast<const bf16*>(a.at(0, j)), 2, 16, b, n.wide(), n.wide(), x + j * n.wide(),
        n.wide(), pairs, add);
  }
}

MFMJT_PAIRS void backward(const Backward& f, Room& room, int64_t b, int64_t h) {
  const Sizes& n = f.n;
  const int64_t deep = n.deep(), wide = n.wide(), half = n.width / 2;
  const Matrix q = f.q.at(b, h), k = f.k.at(b, h), o_bar = f.o_bar.at(b, h);
  const float* bias = f.bias == nullptr ? nullptr : f.bias + b * deep;
  std::fill_n(room.mean.get(), wide, 0.0f);
  common_part(k, n, room.mean.get());
  pack_across(k, n.keys, n.width, room.k_across.get());
  pack_across(f.v.at(b, h), n.keys, n.width, room.v_across.get());
  pack_along(k, n.keys, n.width, room.k_along.get(), room.mean.get());

  const Panels p{room.p.get(), room.block / 2}, ds{room.ds.get(), room.block / 2};
  float *s = room.s.get(), *bar = room.bar.get(), *q_bar = room.q_bar.get();
  bf16* ds_rows = room.ds_rows.get();
  for (int64_t begin = 0; begin < n.queries; begin += room.block) {
    const int64_t count = std::min(room.block, n.queries - begin);
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t rows = std::min(kRows, count - i);
      product(
          q.row(begin + i), q.stride, rows, room.k_across.get(), deep, deep, s, deep, half);
      product(
          o_bar.row(begin + i), o_bar.stride, rows, room.v_across.get(), deep, deep, bar, deep,
          half);
      float lse[kRows];
      std::copy_n(f.lse + (b * n.heads + h) * n.queries + begin + i, rows, lse);
      if (rows % 2 == 1) {  // a row of which P is zero beside the last
        lse[rows] = std::numeric_limits<float>::infinity();
        std::fill_n(s + rows * deep, deep, 0.0f);
        std::fill_n(bar + rows * deep, deep, 0.0f);
      }
      for (int64_t r = 0; r < rows; r += 2) {
        const int64_t pair = (i + r) / 2;
        float *p_rows = s + r * deep, *bars = bar + r * deep;
        const Centres centres = powers_bar(p_rows, bars, lse + r, n, bias, p, pair);
        scores_bar(p_rows, bars, centres, n, ds_rows + r * deep, ds, pair);
      }
      product(ds_rows, deep, rows, room.k_along.get(), wide, wide, q_bar, wide, deep / 2);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = ((b * n.queries + begin + i + r) * n.heads + h) * n.width;
        write(q_bar + r * wide, 1, nullptr, 0, n.width, f.q_bar + at);
      }
    }
    const int64_t pairs = up(count, 2) / 2;
    pack_along({o_bar.row(begin), o_bar.stride}, count, n.width, room.q_along.get());
    product_of_panels(p, pairs, room.q_along.get(), n, room.v_bar.get(), begin > 0);
    pack_along({q.row(begin), q.stride}, count, n.width, room.q_along.get());
    product_of_panels(ds, pairs, room.q_along.get(), n, room.k_bar.get(), begin > 0);
  }
  for (int64_t i = 0; i < n.keys; ++i) {
    const int64_t at = ((b * n.keys + i) * n.heads + h) * n.width;
    write(room.k_bar.get() + i * wide, 1, nullptr, 0, n.width, f.k_bar + at);
    write(room.v_bar.get() + i * wide, 1, nullptr, 0, n.width, f.v_bar + at);
  }
}

}  // namespace
#endif

namespace {

bool has_pairs() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && isa() == Isa::avx512;
#else
  return false;
#endif
}

void check_heads(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t tokens) {
  check_tensor(op, name, t);
  require(t.scalar_type() == ScalarType::BFloat16, op, name, " must be bfloat16");
  check_rank(op, name, t, 4);
  check_size(op, name, t, 0, like.size(0));
  check_size(op, name, t, 1, tokens);
  check_size(op, name, t, 2, like.size(2));
  check_size(op, name, t, 3, like.size(3));
  require(t.stride(3) == 1 && t.stride(1) < (1 << 26), op, name, " must have dense heads");
}

// The bias with rows of whole vectors.
std::vector<float> padded_bias(const char* op, const Maybe& bias, int64_t batch, int64_t keys) {
  if (!bias) return {};
  const float* from = statistic(op, "bias", *bias, {batch, keys});
  const int64_t deep = (keys + 15) / 16 * 16;
  std::vector<float> rows(batch * deep);
  for (int64_t b = 0; b < batch; ++b) std::copy_n(from + b * keys, keys, rows.data() + b * deep);
  return rows;
}

void check_all(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  require(has_pairs(), op, "this CPU has no products of bfloat16 pairs");
  check_tensor(op, "q", q);
  check_rank(op, "q", q, 4);
  check_heads(op, "q", q, q, q.size(1));
  check_tensor(op, "k", k);
  check_rank(op, "k", k, 4);
  check_heads(op, "k", k, q, k.size(1));
  check_heads(op, "v", v, q, k.size(1));
  require(q.size(3) % 2 == 0, op, "q must have an even width");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> joint_attention_rows(
    Tensor q, Tensor k, Tensor v, Maybe q_dot, Maybe k_dot, Maybe v_dot, Maybe bias, double scale) {
  constexpr const char* op = "joint_attention_rows";
  check_all(op, q, k, v);
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), keys = k.size(1);
  if (q_dot) check_heads(op, "q_dot", *q_dot, q, queries);
  if (k_dot) check_heads(op, "k_dot", *k_dot, q, keys);
  if (v_dot) check_heads(op, "v_dot", *v_dot, q, keys);
  const std::vector<float> rows = padded_bias(op, bias, batch, keys);
  const bool dual = q_dot || k_dot || v_dot;
  const std::vector<int64_t> shape{batch, queries, heads, q.size(3)};
  Tensor o = new_like(q, shape, ScalarType::BFloat16);
  Tensor o_dot = dual ? new_like(q, shape, ScalarType::BFloat16) : new_like(q, {0}, ScalarType::BFloat16);
  Tensor lse = new_like(q, {batch, heads, queries}, ScalarType::Float);
#if defined(__x86_64__)
  Forward f{};
  f.n = {batch, heads, queries, keys, q.size(3), static_cast<float>(scale)};
  f.q = Heads(q), f.k = Heads(k), f.v = Heads(v);
  if (q_dot) f.q_dot = Heads(*q_dot);
  if (k_dot) f.k_dot = Heads(*k_dot);
  if (v_dot) f.v_dot = Heads(*v_dot);
  f.bias = bias ? rows.data() : nullptr;
  f.o = mutable_data<bf16>(o);
  f.o_dot = dual ? mutable_data<bf16>(o_dot) : nullptr;
  f.lse = mutable_data<float>(lse);
  const int64_t blocks = (queries + kQueries - 1) / kQueries;
  const int64_t block = up((queries + blocks - 1) / blocks, kRows);
  parallel_for(batch * heads * blocks, 1, [&](int64_t item, int64_t stop) {
    for (; item < stop; ++item) {
      const int64_t head = item / blocks, begin = item % blocks * block;
      forward(f, head / heads, head % heads, begin, std::min(begin + block, queries));
    }
  });
#else
  (void)scale;
#endif
  return {o, o_dot, lse};
}

std::tuple<Tensor, Tensor, Tensor> joint_attention_rows_bar(
    Tensor o_bar, Tensor q, Tensor k, Tensor v, Tensor lse, Maybe bias, double scale) {
  constexpr const char* op = "joint_attention_rows_bar";
  check_all(op, q, k, v);
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), keys = k.size(1);
  check_heads(op, "o_bar", o_bar, q, queries);
  const float* sums = statistic(op, "lse", lse, {batch, heads, queries});
  const std::vector<float> rows = padded_bias(op, bias, batch, keys);
  Tensor q_bar = new_like(q, {batch, queries, heads, q.size(3)}, ScalarType::BFloat16);
  Tensor k_bar = new_like(q, {batch, keys, heads, q.size(3)}, ScalarType::BFloat16);
  Tensor v_bar = new_like(q, {batch, keys, heads, q.size(3)}, ScalarType::BFloat16);
#if defined(__x86_64__)
  Backward f{};
  f.n = {batch, heads, queries, keys, q.size(3), static_cast<float>(scale)};
  f.q = Heads(q), f.k = Heads(k), f.v = Heads(v), f.o_bar = Heads(o_bar);
  f.bias = bias ? rows.data() : nullptr;
  f.lse = sums;
  f.q_bar = mutable_data<bf16>(q_bar);
  f.k_bar = mutable_data<bf16>(k_bar);
  f.v_bar = mutable_data<bf16>(v_bar);
  parallel_for(batch * heads, 1, [&](int64_t item, int64_t stop) {
    Room room(f.n);
    for (; item < stop; ++item) backward(f, room, item / heads, item % heads);
  });
#else
  (void)sums, (void)scale;
#endif
  return {q_bar, k_bar, v_bar};
}

}  // namespace mfmjt
