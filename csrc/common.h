// What every op needs: checked tensors, loops over torch's threads, and one body for several CPUs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace mfmjt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------
// Instruction sets. A kernel is one always_inline body of plain loops (`omp simd`); Clones<body>
// compiles it once per instruction set and calls the copy for this CPU. Not `target_clones`: its
// resolvers run before a sanitizer is ready, and a level could not be forced by a test.

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

struct bf16 {
  uint16_t bits;
};

MFMJT_BODY float load(float x) { return x; }
MFMJT_BODY float load(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MFMJT_BODY void store(float* to, float value) { *to = value; }
MFMJT_BODY void store(bf16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// Two neighbours of bfloat16 as the halves of one 32-bit word: a shift and a mask widen them and a
// merge stores them, where single ones cost a vector loop permutations (a third of the time of every
// bfloat16 sweep). Which half is which element depends on the byte order, so kernels treat both alike.
// Rounding is that of `store` without its care for NaN: they stay NaN but where the bits of the
// payload are all set, which is so of none that comes of bfloat16 inputs.
typedef uint32_t Word __attribute__((aligned(2), may_alias));

MFMJT_BODY float low(Word word) { return load(bf16{static_cast<uint16_t>(word)}); }
MFMJT_BODY float high(Word word) {
  const uint32_t bits = word & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
MFMJT_BODY uint32_t rounded_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
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

// A row of floats in the order in which the sweeps over a row of T come by: what is first in its
// word, then what is second, then a last odd one.
struct Scratch {
  float* values;
  int64_t half;
};
MFMJT_BODY float& at(Single, const Scratch& x, int64_t i) { return x.values[i]; }
MFMJT_BODY float& at(Low, const Scratch& x, int64_t i) { return x.values[i]; }
MFMJT_BODY float& at(High, const Scratch& x, int64_t i) { return x.values[x.half + i]; }

// exp(x) for x up to 88; a NaN counts as a large number of its sign. It is 2^n e^r with r in
// [-ln 2 / 2, ln 2 / 2] and a polynomial, because the library's is a call per element: relative error
// 1e-7 (5e-6 where T, which results are rounded to, is bfloat16), to which rounding adds 2e-9 |x|.
// Written in integers where a comparison of floats would have the compiler split a loop's body into
// masked parts.
template <class T>
MFMJT_BODY float exponential(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits & 0x80000000u;
  bits &= 0x7fffffffu;
  bits = (bits < 0x42b00000u ? bits : 0x42b00000u) | sign;  // 88: at -88, 2^n below makes 0
  std::memcpy(&x, &bits, sizeof x);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const float shifted = x * 0x1.715476p+0f + shift;
  const float n = shifted - shift;
  const float r = x - n * 0x1.62e430p-1f;
  float p;
  if (std::is_same_v<T, float>) {
    p = 0x1.1062500p-7f;
    p = p * r + 0x1.572a64p-5f;
    p = p * r + 0x1.5557b0p-3f;
    p = p * r + 0x1.fffdfcp-2f;
  } else {
    p = 0x1.5224eap-5f;
    p = p * r + 0x1.571d1ep-3f;
    p = p * r + 0x1.0006b8p-1f;
  }
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // 2^n: the low bits of `shifted` are n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// ---------------------------------------------------------------------------------------------
// Arguments. Messages name the op and the argument; they reach Python as a RuntimeError.

template <class... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "mfmjt_cpu::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_tensor(const char* op, const char* name, const Tensor& t) {
  require(t.defined(), op, name, " is not a tensor");
  require(t.is_cpu(), op, name, " must be on the CPU");
  const ScalarType dtype = t.scalar_type();
  require(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, name,
      " must be float32 or bfloat16, got ", torch::headeronly::toString(dtype));
  require(t.numel() > 0, op, name, " is empty");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_tensor(op, name, t);
  require(
      t.scalar_type() == like.scalar_type(), op, name, " must be ",
      torch::headeronly::toString(like.scalar_type()), ", got ",
      torch::headeronly::toString(t.scalar_type()));
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank) {
  require(t.dim() == rank, op, name, " must have ", rank, " dimensions, got ", t.dim());
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t n) {
  require(
      t.size(dim) == n, op, name, " must have size ", n, " in dimension ", dim, ", got ",
      t.size(dim));
}

inline void check_same(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_dtype(op, name, t, like);
  check_rank(op, name, t, like.dim());
  for (int64_t d = 0; d < like.dim(); ++d) check_size(op, name, t, d, like.size(d));
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
// What a forward op returned for backward: float32, contiguous, of exactly these sizes.
inline const float* statistic(
    const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  check_tensor(op, name, t);
  require(t.scalar_type() == ScalarType::Float, op, name, " must be float32");
  check_rank(op, name, t, static_cast<int64_t>(sizes.size()));
  for (size_t d = 0; d < sizes.size(); ++d) check_size(op, name, t, d, sizes[d]);
  require(t.is_contiguous(), op, name, " must be contiguous");
  return data<float>(t);
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Contiguous, on the CPU as `like` is. Not by new_empty, which PyTorch looks up by name and dispatches:
// that takes 0.7 us longer for each result.
inline Tensor new_like(const Tensor&, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {
    strides[d] = stride;
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code,
      aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}
inline Tensor new_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return new_like(like, {sizes.begin(), sizes.end()}, like.scalar_type());
}

// A float or bfloat16 tensor of any strides as floats.
std::vector<float> to_floats(const Tensor& t);

// A (B, N, C) tensor read row by row: any strides, broadcast axes included, but dense rows. An absent
// one reads as zeros, so that a kernel needs no variant for every combination of tangents.
template <class T>
class Rows {
 public:
  Rows() = default;
  Rows(const char* op, const char* name, const Tensor& t, int64_t batch, int64_t n, int64_t width)
      : kept_(t) {
    check_rank(op, name, t, 3);
    check_size(op, name, t, 2, width);
    for (int64_t d = 0; d < 2; ++d) {
      const int64_t size = d == 0 ? batch : n;
      if (d == 0 || t.size(d) != 1) check_size(op, name, t, d, size);
    }
    if (t.stride(2) != 1 && width > 1) kept_ = torch::stable::contiguous(t);
    pointer_ = data<T>(kept_);
    stride_[0] = kept_.size(0) == 1 ? 0 : kept_.stride(0);
    stride_[1] = kept_.size(1) == 1 ? 0 : kept_.stride(1);
    whole_ = t.size(1) == n;
  }
  explicit Rows(const T* zeros) : pointer_(zeros) {}

  const T* at(int64_t b, int64_t n) const { return pointer_ + b * stride_[0] + n * stride_[1]; }
  bool whole() const { return whole_; }  // a row per token, not one for all tokens of a sample

 private:
  Tensor kept_;
  const T* pointer_ = nullptr;
  int64_t stride_[2] = {0, 0};
  bool whole_ = true;
};

// Call f(float) or f(bf16) by the dtype of a checked tensor.
template <class F>
void by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float) {
    f(float{});
  } else {
    f(bf16{});
  }
}

// f(begin, end) for parts of a range, on PyTorch's threads. Each has a share of the range, and whoever is
// through with his own goes on with parts of the others': a thread that sleeps takes up to a hundred
// microseconds to wake, as long as a short kernel runs.
template <class F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int64_t kMost = 256, kParts = 4;  // threads; parts of a share
  const int64_t threads = std::min<int64_t>(
      {torch::stable::get_num_threads(), kMost, (size + grain - 1) / grain});
  if (threads <= 1) return f(0, size);
  Share shares[kMost];
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next.store(size * t / threads, std::memory_order_relaxed);
    shares[t].end = size * (t + 1) / threads;
  }
  const int64_t part = std::max(grain, size / (threads * kParts));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t t = first; t < first + threads; ++t) {
      Share& share = shares[t % threads];
      for (int64_t i; (i = share.next.fetch_add(part, std::memory_order_relaxed)) < share.end;) {
        f(i, std::min(i + part, share.end));
      }
    }
  });
}

// Work below this many elements is not worth waking a thread for.
#ifndef MFMJT_GRAIN
#define MFMJT_GRAIN (1 << 14)
#endif
constexpr int64_t kGrain = MFMJT_GRAIN;

}  // namespace mfmjt
