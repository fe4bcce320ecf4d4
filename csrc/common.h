// Instruction sets, storage types and threads, for every kernel.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace mfmjt {

// ---------------------------------------------------------------------------------------------
// Instruction sets. A kernel is one always_inline body of plain loops (`omp simd`); Clones<body>
// compiles it once per instruction set and calls the copy for this CPU. Not `target_clones`: its
// resolvers run before a sanitizer is ready, and a test could not force a level.

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

Isa isa();            // what kernels run on: the best this CPU has, unless limited
Isa best_isa();       // what this CPU has
void limit_isa(int);  // for tests: no better than this from now on

#define MFMJT_BODY inline __attribute__((always_inline))

#if defined(__x86_64__)
#define MFMJT_AVX2 "avx2,fma,f16c,bmi,bmi2"
#define MFMJT_AVX512 "avx512f,avx512bw,avx512dq,avx512vl," MFMJT_AVX2
#endif

template <auto body, class Signature = decltype(body)>
struct Clones;

template <auto body, class... Args>
struct Clones<body, void (*)(Args...)> {
  static __attribute__((noinline)) void portable(Args... args) { body(args...); }
#if defined(__x86_64__)
  static __attribute__((noinline, target(MFMJT_AVX2))) void avx2(Args... args) { body(args...); }
  static __attribute__((noinline, target(MFMJT_AVX512))) void avx512(Args... args) {
    body(args...);
  }
#endif
  static void run(Args... args) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return avx512(args...);
    if (isa() == Isa::avx2) return avx2(args...);
#endif
    portable(args...);
  }
};

// ---------------------------------------------------------------------------------------------
// Storage. Kernels compute in float and store float or bfloat16.

MFMJT_BODY uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
MFMJT_BODY float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct bf16 {
  uint16_t bits;
};

// The bits of a float rounded to bfloat16, to nearest and ties to even, in the upper half.
MFMJT_BODY uint32_t rounded_bits(float value) {
  const uint32_t bits = bits_of(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

MFMJT_BODY float load(float x) { return x; }
MFMJT_BODY float load(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

MFMJT_BODY void store(float* to, float value) { *to = value; }
MFMJT_BODY void store(bf16* to, float value) {
  to->bits = static_cast<uint16_t>(value == value ? rounded_bits(value) >> 16 : 0x7fc0u);
}

// Two neighbours of bfloat16 as the halves of one 32-bit word: a shift and a mask widen them and a
// merge stores them, where single ones cost a vector loop permutations (a third of the time of every
// bfloat16 sweep). Which half is which element depends on the byte order, so kernels treat both alike.
// A merge leaves out the care of `store` for NaN: only a NaN whose payload has all bits set is lost,
// and none that comes of bfloat16 inputs has.
typedef uint32_t Word __attribute__((aligned(2), may_alias));

MFMJT_BODY float low(Word word) { return load(bf16{static_cast<uint16_t>(word)}); }
MFMJT_BODY float high(Word word) { return float_of(word & 0xffff0000u); }
MFMJT_BODY uint32_t merge(float low, float high) {
  return (rounded_bits(low) >> 16) | (rounded_bits(high) & 0xffff0000u);
}
MFMJT_BODY const Word* words(const bf16* x) { return reinterpret_cast<const Word*>(x); }
MFMJT_BODY Word* words(bf16* x) { return reinterpret_cast<Word*>(x); }

// Sweeps over a row of either type. An index counts elements (Single; all there is for float) or words,
// of which Low and High are the halves.
struct Single {};
struct Low {};
struct High {};
template <class T>
constexpr int64_t kLanes = std::is_same_v<T, bf16> ? 2 : 1;
template <class T>
using First = std::conditional_t<std::is_same_v<T, bf16>, Low, Single>;

template <class T>
MFMJT_BODY float at(Single, const T* x, int64_t i) {
  return load(x[i]);
}
MFMJT_BODY float at(Low, const bf16* x, int64_t i) { return low(words(x)[i]); }
MFMJT_BODY float at(High, const bf16* x, int64_t i) { return high(words(x)[i]); }

// A row of floats in the order in which a sweep over a row of T meets them: first halves of words,
// then second halves, then a last odd element.
struct Scratch {
  float* values;
  int64_t half;
};
MFMJT_BODY float& at(Single, const Scratch& x, int64_t i) { return x.values[i]; }
MFMJT_BODY float& at(Low, const Scratch& x, int64_t i) { return x.values[i]; }
MFMJT_BODY float& at(High, const Scratch& x, int64_t i) { return x.values[x.half + i]; }

// A value and its tangent at one element; the tangent is 0 where there is none.
struct Dual {
  float value, dot;
};

// ---------------------------------------------------------------------------------------------
// Threads

// Work below this many elements is not worth waking a thread for.
#ifndef MFMJT_GRAIN
#define MFMJT_GRAIN (1 << 14)
#endif
constexpr int64_t kGrain = MFMJT_GRAIN;

// Sums over tokens are made by chunks of a fixed number of them, then over the chunks in order, so that
// the number of threads changes nothing.
constexpr int64_t kChunk = 64;
inline int64_t chunks_of(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Call f(begin, end) for parts of a range, on PyTorch's threads. Each thread has a range of its own and,
// once through with it, goes on with parts of the others': a thread that sleeps takes up to a hundred
// microseconds to wake, as long as a short kernel runs.
template <class F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int64_t kMostThreads = 256, kPartsPerRange = 4;
  const int64_t threads = std::min<int64_t>(
      {torch::stable::get_num_threads(), kMostThreads, (size + grain - 1) / grain});
  if (threads <= 1) return f(0, size);
  Range ranges[kMostThreads];
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next.store(size * t / threads, std::memory_order_relaxed);
    ranges[t].end = size * (t + 1) / threads;
  }
  const int64_t part = std::max(grain, size / (threads * kPartsPerRange));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t t = first; t < first + threads; ++t) {
      Range& range = ranges[t % threads];
      for (int64_t i; (i = range.next.fetch_add(part, std::memory_order_relaxed)) < range.end;) {
        f(i, std::min(i + part, range.end));
      }
    }
  });
}

}  // namespace mfmjt
