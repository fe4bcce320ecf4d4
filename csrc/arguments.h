// Checked arguments, rows of strided tensors, and new tensors.
//
// Messages name the op and the argument; they reach Python as a RuntimeError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "common.h"

namespace mfmjt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

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

// The sizes are those of `shape`, and so is the rank.
template <class Shape>
void check_shape(const char* op, const char* name, const Tensor& t, const Shape& shape) {
  check_rank(op, name, t, static_cast<int64_t>(shape.size()));
  for (size_t d = 0; d < shape.size(); ++d) check_size(op, name, t, d, shape[d]);
}

inline void check_same(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_dtype(op, name, t, like);
  check_shape(op, name, t, like.sizes());
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// What a forward op returned for backward: float32, contiguous, of exactly these sizes.
inline const float* statistic(
    const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  check_tensor(op, name, t);
  require(t.scalar_type() == ScalarType::Float, op, name, " must be float32");
  check_shape(op, name, t, sizes);
  require(t.is_contiguous(), op, name, " must be contiguous");
  return data<float>(t);
}

// Call f(float) or f(bf16) by the dtype of a checked tensor.
template <class F>
void by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float) {
    f(float{});
  } else {
    f(bf16{});
  }
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A float or bfloat16 tensor of any strides as floats.
inline std::vector<float> to_floats(const Tensor& t) {
  const Tensor t_dense = dense(t);
  std::vector<float> values(t.numel());
  by_dtype(t, [&](auto zero) {
    const auto* from = data<decltype(zero)>(t_dense);
    for (size_t i = 0; i < values.size(); ++i) values[i] = load(from[i]);
  });
  return values;
}

// A contiguous tensor on the CPU. Not by new_empty, which PyTorch looks up by name and dispatches: that
// takes 0.7 us longer for each result.
inline Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype = ScalarType::Float) {
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
  return new_tensor({sizes.begin(), sizes.end()}, like.scalar_type());
}

// A new tensor like another in `to`; returns where its elements are.
template <class T, class To>
T* new_data(To& to, const Tensor& like) {
  const Tensor t = new_like(like);
  to = t;
  return mutable_data<T>(t);
}

// A (B, N, C) tensor read row by row: any strides, broadcast axes included, but dense rows. An absent
// one reads as zeros, so that a kernel needs no variant for every combination of tangents.
template <class T>
class RowReader {
 public:
  RowReader() = default;
  // Rows of an argument that goes with x (B, N, C): one for each token or, unless `whole`, for each
  // sample; or for each token the one of those (B, S, C) that `picks` names.
  RowReader(
      const char* op, const char* name, const Tensor& t, const Tensor& x, bool whole = false,
      const int64_t* picks = nullptr)
      : kept_(t), picks_(picks) {
    check_dtype(op, name, t, x);
    check_rank(op, name, t, 3);
    check_size(op, name, t, 2, x.size(2));
    check_size(op, name, t, 0, x.size(0));
    per_token_ = t.size(1) == x.size(1);
    const bool fits = per_token_ || picks != nullptr || (!whole && t.size(1) == 1);
    if (!fits) check_size(op, name, t, 1, x.size(1));
    if (t.stride(2) != 1 && x.size(2) > 1) kept_ = torch::stable::contiguous(t);
    pointer_ = data<T>(*kept_);
    stride_[0] = kept_->size(0) == 1 ? 0 : kept_->stride(0);
    stride_[1] = kept_->size(1) == 1 ? 0 : kept_->stride(1);
  }
  RowReader(
      const char* op, const char* name, const Maybe& t, const Tensor& x,
      const std::vector<T>& zeros, bool whole = false, const int64_t* picks = nullptr) {
    if (t) {
      *this = RowReader(op, name, *t, x, whole, picks);
    } else {
      pointer_ = zeros.data();
    }
  }

  const T* at(int64_t b, int64_t n) const {
    if (picks_ != nullptr) n = picks_[n];
    return pointer_ + b * stride_[0] + n * stride_[1];
  }
  bool per_token() const { return per_token_; }

 private:
  Maybe kept_;
  const T* pointer_ = nullptr;
  const int64_t* picks_ = nullptr;
  int64_t stride_[2] = {0, 0};
  bool per_token_ = true;
};

}  // namespace mfmjt
