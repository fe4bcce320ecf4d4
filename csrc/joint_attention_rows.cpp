// Attention in bfloat16 by rows of queries, where the CPU multiplies pairs of it (AVX-512 BF16): the
// products, the softmax between them, its tangent and its cotangent, without a matrix of scores in
// memory. Formulas: mfmjt/kernels/joint_attention.py.
//
// One product serves all: rows of a (pairs of bfloat16 along what is summed over, broadcast) times b,
// whose words hold two neighbours along it for 16 columns at a time; sums are floats. Scores stay
// floats, so that only P, W and the cotangent of S are rounded, as they enter the next product.

#include "arguments.h"

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

#define MFMJT_BF16_DOT __attribute__((target(MFMJT_AVX512 ",avx512bf16")))

constexpr int64_t kRows = 6;       // of a, whose 6 x 4 sums fill the registers
constexpr int64_t kQueries = 512;  // a task of the forward pass: packing keys is 1/100 of its work
constexpr int64_t kBytes = 1 << 19;  // of P and of the cotangent of S, kept by the backward pass

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

MFMJT_BF16_DOT inline __m512bh pairs(__m512i x) { return (__m512bh)x; }

// 16 floats to bfloat16, and back as floats.
MFMJT_BF16_DOT inline __m512 rounded(__m512 x, bf16* to) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// e^x for x <= 0, relative error 3e-6; NaN where x is, zero for what is far below.
MFMJT_BF16_DOT inline __m512 power(__m512 x) {
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
MFMJT_BF16_DOT inline void tile(
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
MFMJT_BF16_DOT inline void tiles(
    const bf16* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t columns, float* c,
    int64_t c_row, int64_t depth, bool add) {
  int64_t j = 0;
  for (; j + 64 <= columns; j += 64) tile<R, 4, Step>(a, a_row, b + j, b_row, c + j, c_row, depth, add);
  for (; j < columns; j += 16) tile<R, 1, Step>(a, a_row, b + j, b_row, c + j, c_row, depth, add);
}

// c (rows, columns) = a b, or + a b; `depth` counts words, `columns` is a multiple of 16.
template <int Step = 1>
MFMJT_BF16_DOT void product(
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

MFMJT_BF16_DOT inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// The transpose of 16 x 16 words.
MFMJT_BF16_DOT inline void transpose(__m512i (&x)[16]) {
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

// The transpose of x (rows, width) for a product that sums over the width: to (width / 2, round_up(rows)).
MFMJT_BF16_DOT void pack_across(Matrix x, int64_t rows, int64_t width, uint32_t* to) {
  const int64_t width16 = round_up(rows, 16), half = width / 2;
  for (int64_t i = 0; i < width16; i += 16) {
    for (int64_t k = 0; k < half; k += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        block[r] = _mm512_setzero_si512();
        if (i + r < rows) {
          block[r] = _mm512_maskz_loadu_epi32(first(half - k), x.row(i + r) + 2 * k);
        }
      }
      transpose(block);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        if (k + j < half) _mm512_storeu_si512(to + (k + j) * width16 + i, block[j]);
      }
    }
  }
}

// X for a product that sums over the rows, less a number for each column: to (round_up(rows) / 2, round_up(width)).
MFMJT_BF16_DOT void pack_along(
    Matrix x, int64_t rows, int64_t width, uint32_t* to, const float* less = nullptr) {
  const int64_t width16 = round_up(width, 16);
  for (int64_t i = 0; i < round_up(rows, 16); i += 2) {
    for (int64_t j = 0; j < width16; j += 16) {
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
      _mm512_storeu_si512(to + i / 2 * width16 + j, word);
    }
  }
}

struct Sizes {
  int64_t batch, heads, queries, keys, width;
  float scale;
  int64_t keys16() const { return round_up(keys, 16); }
  int64_t width16() const { return round_up(width, 16); }
};

// Scores of a row, scaled and biased, -inf beyond the last key; returns the largest.
MFMJT_BF16_DOT inline float prepare(float* s, const Sizes& n, const float* bias) {
  __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 scale = _mm512_set1_ps(n.scale), none = top;
  for (int64_t j = 0; j < n.keys16(); j += 16) {
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

struct SoftmaxSums {
  float p, w;  // of a row of P and of W as rounded
  float lse;
};

// s to P in `p`, not yet divided by its sum; s_dot to W in `w` likewise.
MFMJT_BF16_DOT inline SoftmaxSums softmax(
    float* s, const float* s_dot, bf16* p, bf16* w, const Sizes& n, const float* bias) {
  const float top = prepare(s, n, bias);
  const float first = s_dot == nullptr ? 0 : *s_dot;
  const __m512 offset = _mm512_set1_ps(first);
  __m512 sum = _mm512_setzero_ps(), kept = sum, mean = sum;
  for (int64_t j = 0; j < n.keys16(); j += 16) {
    const __m512 x = power(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(top)));
    sum = _mm512_add_ps(sum, x);
    kept = _mm512_add_ps(kept, rounded(x, p + j));
    if (s_dot != nullptr) {
      _mm512_storeu_ps(s + j, x);
      mean = _mm512_fmadd_ps(x, _mm512_sub_ps(_mm512_loadu_ps(s_dot + j), offset), mean);
    }
  }
  const float total = _mm512_reduce_add_ps(sum);
  SoftmaxSums found{_mm512_reduce_add_ps(kept), 0, top + std::log(total)};
  if (s_dot == nullptr) return found;
  const __m512 center = _mm512_set1_ps(_mm512_reduce_add_ps(mean) / total);
  kept = _mm512_setzero_ps();
  for (int64_t j = 0; j < n.keys16(); j += 16) {
    const __m512 moved =
        _mm512_sub_ps(_mm512_sub_ps(_mm512_loadu_ps(s_dot + j), offset), center);
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(n.scale));
    kept = _mm512_add_ps(kept, rounded(_mm512_mul_ps(x, moved), w + j));
  }
  found.w = _mm512_reduce_add_ps(kept);
  return found;
}

MFMJT_BF16_DOT inline void write(
    const float* from, float factor, const float* other, float other_factor, int64_t width, bf16* to) {
  for (int64_t j = 0; j < width; j += 16) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + j), _mm512_set1_ps(factor));
    if (other != nullptr) {
      x = _mm512_fmadd_ps(_mm512_loadu_ps(other + j), _mm512_set1_ps(other_factor), x);
    }
    _mm256_mask_storeu_epi16(to + j, first(width - j), (__m256i)_mm512_cvtneps_pbh(x));
  }
}

struct RowsForward {
  Sizes n;
  Heads q, k, v, q_dot, k_dot, v_dot;
  const float* bias;  // (B, round_up(keys)), added to scaled scores; or null
  bf16 *o, *o_dot;    // (B, queries, H, D), contiguous
  float* lse;         // (B, H, queries)
  bool moves() const { return q_dot.x != nullptr || k_dot.x != nullptr; }
};

// Rows [begin, end) of one head.
MFMJT_BF16_DOT void forward(const RowsForward& f, int64_t b, int64_t h, int64_t begin, int64_t end) {
  const Sizes& n = f.n;
  const int64_t keys16 = n.keys16(), width16 = n.width16(), half = n.width / 2;
  const Matrix q = f.q.at(b, h), q_dot = f.q_dot.at(b, h);
  std::vector<uint32_t> k(half * keys16), v(keys16 / 2 * width16), k_dot, v_dot;
  pack_across(f.k.at(b, h), n.keys, n.width, k.data());
  pack_along(f.v.at(b, h), n.keys, n.width, v.data());
  if (f.k_dot.x != nullptr) {
    k_dot.resize(half * keys16);
    pack_across(f.k_dot.at(b, h), n.keys, n.width, k_dot.data());
  }
  if (f.v_dot.x != nullptr) {
    v_dot.resize(keys16 / 2 * width16);
    pack_along(f.v_dot.at(b, h), n.keys, n.width, v_dot.data());
  }
  const bool moves = f.moves(), dual = f.o_dot != nullptr;
  std::vector<float> s(kRows * keys16), s_dot(moves ? kRows * keys16 : 0), o(kRows * width16), o_dot(kRows * width16);
  std::vector<bf16> p(kRows * keys16), w(moves ? kRows * keys16 : 0);
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t rows = std::min(kRows, end - i);
    product(q.row(i), q.stride, rows, k.data(), keys16, keys16, s.data(), keys16, half);
    if (q_dot.x != nullptr) {
      product(q_dot.row(i), q_dot.stride, rows, k.data(), keys16, keys16, s_dot.data(), keys16, half);
    }
    if (f.k_dot.x != nullptr) {
      product(
          q.row(i), q.stride, rows, k_dot.data(), keys16, keys16, s_dot.data(), keys16, half,
          q_dot.x != nullptr);
    }
    SoftmaxSums sums[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      float* moved = moves ? s_dot.data() + r * keys16 : nullptr;
      bf16* to = moves ? w.data() + r * keys16 : nullptr;
      const float* bias = f.bias == nullptr ? nullptr : f.bias + b * keys16;
      sums[r] = softmax(s.data() + r * keys16, moved, p.data() + r * keys16, to, n, bias);
      f.lse[(b * n.heads + h) * n.queries + i + r] = sums[r].lse;
    }
    product(p.data(), keys16, rows, v.data(), width16, width16, o.data(), width16, keys16 / 2);
    if (moves) product(w.data(), keys16, rows, v.data(), width16, width16, o_dot.data(), width16, keys16 / 2);
    if (f.v_dot.x != nullptr) {
      product(p.data(), keys16, rows, v_dot.data(), width16, width16, o_dot.data(), width16, keys16 / 2, moves);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float inverse_sum = 1 / sums[r].p, *from = o.data() + r * width16;
      const int64_t at = ((b * n.queries + i + r) * n.heads + h) * n.width;
      write(from, inverse_sum, nullptr, 0, n.width, f.o + at);
      // rows of W have sum zero, which rounding takes away
      if (dual) {
        write(
            o_dot.data() + r * width16, inverse_sum, from, -sums[r].w * inverse_sum * inverse_sum,
            n.width, f.o_dot + at);
      }
    }
  }
}

struct RowsBackward {
  Sizes n;
  Heads q, k, v, o_bar;
  const float *bias, *lse;
  bf16 *q_bar, *k_bar, *v_bar;
};

// A matrix of queries x keys for a product that sums over the queries: words of two neighbours among
// these, in panels of 16 keys, (round_up(keys) / 16, queries / 2, 16). A panel of the block of queries stays
// in the first-level cache, and its rows come by in the order in which they are made.
struct Panels {
  uint32_t* x;
  int64_t pairs;
  uint32_t* at(int64_t pair, int64_t key) const { return x + (key / 16 * pairs + pair) * 16; }
};

// Two vectors of floats as words, low halves first.
MFMJT_BF16_DOT inline __m512i rounded_pairs(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
MFMJT_BF16_DOT inline __m512i interleaved(__m512i halves) {
  alignas(64) static constexpr uint16_t order[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}

// Of two rows: S to P in `s` and `p`; returns how P weighs the precursors o_bar v^T of the cotangent
// of S, less the first of each.
struct Centers {
  float low, high;
};
MFMJT_BF16_DOT inline Centers powers_bar(
    float* s, const float* bar, const float* lse, const Sizes& n, const float* bias, Panels p,
    int64_t pair) {
  const int64_t keys16 = n.keys16();
  const __m512 scale = _mm512_set1_ps(n.scale);
  const __m512 sum[2] = {_mm512_set1_ps(lse[0]), _mm512_set1_ps(lse[1])};
  const __m512 offset[2] = {_mm512_set1_ps(bar[0]), _mm512_set1_ps(bar[keys16])};
  __m512 mean[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t j = 0; j < keys16; j += 16) {
    const __m512 shift = bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(bias + j);
    __m512 x[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m512 score = _mm512_fmadd_ps(_mm512_loadu_ps(s + r * keys16 + j), scale, shift);
      x[r] = _mm512_maskz_mov_ps(first(n.keys - j), power(_mm512_sub_ps(score, sum[r])));
      _mm512_storeu_ps(s + r * keys16 + j, x[r]);
      const __m512 moved = _mm512_sub_ps(_mm512_loadu_ps(bar + r * keys16 + j), offset[r]);
      mean[r] = _mm512_fmadd_ps(x[r], moved, mean[r]);
    }
    _mm512_storeu_si512(p.at(pair, j), interleaved(rounded_pairs(x[0], x[1])));
  }
  return {_mm512_reduce_add_ps(mean[0]), _mm512_reduce_add_ps(mean[1])};
}

// Of two rows: P and those precursors to the cotangent of S, as rows and as words of a panel.
MFMJT_BF16_DOT inline void scores_bar(
    const float* p, const float* bar, Centers centers, const Sizes& n, bf16* rows, Panels ds,
    int64_t pair) {
  const int64_t keys16 = n.keys16();
  const __m512 scale = _mm512_set1_ps(n.scale);
  const __m512 offset[2] = {_mm512_set1_ps(bar[0]), _mm512_set1_ps(bar[keys16])};
  const __m512 center[2] = {_mm512_set1_ps(centers.low), _mm512_set1_ps(centers.high)};
  for (int64_t j = 0; j < keys16; j += 16) {
    __m512 x[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m512 moved = _mm512_sub_ps(_mm512_loadu_ps(bar + r * keys16 + j), offset[r]);
      const __m512 weight = _mm512_mul_ps(_mm512_loadu_ps(p + r * keys16 + j), scale);
      x[r] = _mm512_mul_ps(weight, _mm512_sub_ps(moved, center[r]));
    }
    const __m512i halves = rounded_pairs(x[0], x[1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + j), _mm512_castsi512_si256(halves));
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(rows + keys16 + j), _mm512_extracti64x4_epi64(halves, 1));
    _mm512_storeu_si512(ds.at(pair, j), interleaved(halves));
  }
}

// Means of the columns of keys, zero where small: taking them off costs a rounding. It is nothing to
// q_bar, as rows of the cotangent of S have sum zero, but for rounding.
MFMJT_BF16_DOT void common_part(Matrix k, const Sizes& n, float* mean) {
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
struct Workspace {
  int64_t block;  // queries at a time: whole tiles, and an even number
  std::unique_ptr<uint32_t[]> k_across, v_across, k_along, q_along, p, ds;
  std::unique_ptr<float[]> mean, s, bar, q_bar, k_bar, v_bar;
  std::unique_ptr<bf16[]> ds_rows;

  explicit Workspace(const Sizes& n) {
    const int64_t keys16 = n.keys16(), width16 = n.width16(), half = n.width / 2;
    block = std::min(round_up(n.queries, 48), std::max<int64_t>(48, kBytes / (2 * keys16) / 48 * 48));
    k_across.reset(new uint32_t[half * keys16]), v_across.reset(new uint32_t[half * keys16]);
    k_along.reset(new uint32_t[keys16 / 2 * width16]), q_along.reset(new uint32_t[round_up(block, 16) / 2 * width16]);
    p.reset(new uint32_t[block / 2 * keys16]), ds.reset(new uint32_t[block / 2 * keys16]);
    mean.reset(new float[width16]), q_bar.reset(new float[kRows * width16]);
    s.reset(new float[kRows * keys16]), bar.reset(new float[kRows * keys16]);
    k_bar.reset(new float[keys16 * width16]), v_bar.reset(new float[keys16 * width16]);
    ds_rows.reset(new bf16[kRows * keys16]);
  }
};

// x (keys, round_up(width)) = the transpose of a matrix in panels times the rows of a block, or + that.
MFMJT_BF16_DOT void product_of_panels(
    Panels a, int64_t pairs, const uint32_t* b, const Sizes& n, float* x, bool add) {
  for (int64_t j = 0; j < n.keys; j += 16) {
    product<16>(
        reinterpret_cast<const bf16*>(a.at(0, j)), 2, 16, b, n.width16(), n.width16(), x + j * n.width16(),
        n.width16(), pairs, add);
  }
}

MFMJT_BF16_DOT void backward(const RowsBackward& f, Workspace& space, int64_t b, int64_t h) {
  const Sizes& n = f.n;
  const int64_t keys16 = n.keys16(), width16 = n.width16(), half = n.width / 2;
  const Matrix q = f.q.at(b, h), k = f.k.at(b, h), o_bar = f.o_bar.at(b, h);
  const float* bias = f.bias == nullptr ? nullptr : f.bias + b * keys16;
  std::fill_n(space.mean.get(), width16, 0.0f);
  common_part(k, n, space.mean.get());
  pack_across(k, n.keys, n.width, space.k_across.get());
  pack_across(f.v.at(b, h), n.keys, n.width, space.v_across.get());
  pack_along(k, n.keys, n.width, space.k_along.get(), space.mean.get());

  const Panels p{space.p.get(), space.block / 2}, ds{space.ds.get(), space.block / 2};
  float *s = space.s.get(), *bar = space.bar.get(), *q_bar = space.q_bar.get();
  bf16* ds_rows = space.ds_rows.get();
  for (int64_t begin = 0; begin < n.queries; begin += space.block) {
    const int64_t count = std::min(space.block, n.queries - begin);
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t rows = std::min(kRows, count - i);
      product(
          q.row(begin + i), q.stride, rows, space.k_across.get(), keys16, keys16, s, keys16, half);
      product(
          o_bar.row(begin + i), o_bar.stride, rows, space.v_across.get(), keys16, keys16, bar, keys16,
          half);
      float lse[kRows];
      std::copy_n(f.lse + (b * n.heads + h) * n.queries + begin + i, rows, lse);
      if (rows % 2 == 1) {  // a row of which P is zero beside the last
        lse[rows] = std::numeric_limits<float>::infinity();
        std::fill_n(s + rows * keys16, keys16, 0.0f);
        std::fill_n(bar + rows * keys16, keys16, 0.0f);
      }
      for (int64_t r = 0; r < rows; r += 2) {
        const int64_t pair = (i + r) / 2;
        float *p_rows = s + r * keys16, *bars = bar + r * keys16;
        const Centers centers = powers_bar(p_rows, bars, lse + r, n, bias, p, pair);
        scores_bar(p_rows, bars, centers, n, ds_rows + r * keys16, ds, pair);
      }
      product(ds_rows, keys16, rows, space.k_along.get(), width16, width16, q_bar, width16, keys16 / 2);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = ((b * n.queries + begin + i + r) * n.heads + h) * n.width;
        write(q_bar + r * width16, 1, nullptr, 0, n.width, f.q_bar + at);
      }
    }
    const int64_t pairs = round_up(count, 2) / 2;
    pack_along({o_bar.row(begin), o_bar.stride}, count, n.width, space.q_along.get());
    product_of_panels(p, pairs, space.q_along.get(), n, space.v_bar.get(), begin > 0);
    pack_along({q.row(begin), q.stride}, count, n.width, space.q_along.get());
    product_of_panels(ds, pairs, space.q_along.get(), n, space.k_bar.get(), begin > 0);
  }
  for (int64_t i = 0; i < n.keys; ++i) {
    const int64_t at = ((b * n.keys + i) * n.heads + h) * n.width;
    write(space.k_bar.get() + i * width16, 1, nullptr, 0, n.width, f.k_bar + at);
    write(space.v_bar.get() + i * width16, 1, nullptr, 0, n.width, f.v_bar + at);
  }
}

}  // namespace
#endif

namespace {

bool has_bf16_dot() {
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
  check_shape(op, name, t, std::vector{like.size(0), tokens, like.size(2), like.size(3)});
  require(t.stride(3) == 1 && t.stride(1) < (1 << 26), op, name, " must have dense heads");
}

// The bias with rows of whole vectors.
std::vector<float> padded_bias(const char* op, const Maybe& bias, int64_t batch, int64_t keys) {
  if (!bias) return {};
  const float* from = statistic(op, "bias", *bias, {batch, keys});
  const int64_t keys16 = (keys + 15) / 16 * 16;
  std::vector<float> rows(batch * keys16);
  for (int64_t b = 0; b < batch; ++b) std::copy_n(from + b * keys, keys, rows.data() + b * keys16);
  return rows;
}

void check_all(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  require(has_bf16_dot(), op, "this CPU has no products of bfloat16 pairs");
  check_tensor(op, "q", q);
  check_rank(op, "q", q, 4);
  check_heads(op, "q", q, q, q.size(1));
  check_tensor(op, "k", k);
  check_rank(op, "k", k, 4);
  check_heads(op, "k", k, q, k.size(1));
  check_heads(op, "v", v, q, k.size(1));
  require(q.size(3) % 2 == 0, op, "q must have an even width");
}

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
  Tensor o = new_tensor(shape, ScalarType::BFloat16), lse = new_tensor({batch, heads, queries});
  Tensor o_dot = new_tensor(dual ? shape : std::vector<int64_t>{0}, ScalarType::BFloat16);
#if defined(__x86_64__)
  RowsForward f{};
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
  const int64_t block = round_up((queries + blocks - 1) / blocks, kRows);
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
  Tensor q_bar = new_tensor({batch, queries, heads, q.size(3)}, ScalarType::BFloat16);
  Tensor k_bar = new_tensor({batch, keys, heads, q.size(3)}, ScalarType::BFloat16);
  Tensor v_bar = new_tensor({batch, keys, heads, q.size(3)}, ScalarType::BFloat16);
#if defined(__x86_64__)
  RowsBackward f{};
  f.n = {batch, heads, queries, keys, q.size(3), static_cast<float>(scale)};
  f.q = Heads(q), f.k = Heads(k), f.v = Heads(v), f.o_bar = Heads(o_bar);
  f.bias = bias ? rows.data() : nullptr;
  f.lse = sums;
  f.q_bar = mutable_data<bf16>(q_bar);
  f.k_bar = mutable_data<bf16>(k_bar);
  f.v_bar = mutable_data<bf16>(v_bar);
  parallel_for(batch * heads, 1, [&](int64_t item, int64_t stop) {
    Workspace space(f.n);
    for (; item < stop; ++item) backward(f, space, item / heads, item % heads);
  });
#else
  (void)sums, (void)scale;
#endif
  return {q_bar, k_bar, v_bar};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mfmjt_cpu, m) {
  m.def(
      "joint_attention_rows(Tensor q, Tensor k, Tensor v, Tensor? q_dot, Tensor? k_dot, "
      "Tensor? v_dot, Tensor? bias, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "joint_attention_rows_bar(Tensor o_bar, Tensor q, Tensor k, Tensor v, Tensor lse, "
      "Tensor? bias, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mfmjt_cpu, CPU, m) {
  m.impl("joint_attention_rows", TORCH_BOX(&joint_attention_rows));
  m.impl("joint_attention_rows_bar", TORCH_BOX(&joint_attention_rows_bar));
}

}  // namespace mfmjt
