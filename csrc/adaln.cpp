// Layer norm without learned affine, then shift and scale: value, value and tangent, backward.
//
// One sweep over memory each: 2 B N C elements for the value, 4 B N C with the tangent, besides the
// modulations. Formulas: mfmjt/kernels/adaln.py.

#include "norm.h"
#include "ops.h"

namespace mfmjt {
namespace {

template <class T>
NormPass<T> pass_of(
    const char* op, const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  NormPass<T> pass;
  pass.tokens = x.size(1);
  pass.width = x.size(2);
  pass.eps = static_cast<float>(eps);
  pass.x = rows<T>(op, "x", x, x);
  pass.shift = rows<T>(op, "shift", shift, x);
  pass.scale = rows<T>(op, "scale", scale, x);
  return pass;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> adaln_fwd(Tensor x, Tensor shift, Tensor scale, double eps) {
  constexpr const char* op = "adaln_fwd";
  const Shape s = shape_of(op, "x", x);
  Tensor y = new_like(x), mean = new_like(x, {s.batch, s.tokens, 1}, ScalarType::Float);
  Tensor rstd = new_like(mean);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    auto pass = pass_of<T>(op, x, shift, scale, eps);
    pass.y = mutable_data<T>(y);
    pass.mean = mutable_data<float>(mean);
    pass.rstd = mutable_data<float>(rstd);
    run_norm_pass<T, false, false>(pass, s.batch);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_jvp(
    Tensor x, Tensor shift, Tensor scale, Maybe x_dot,
    Maybe shift_dot, Maybe scale_dot, double eps) {
  constexpr const char* op = "adaln_jvp";
  const Shape s = shape_of(op, "x", x);
  Tensor y = new_like(x), y_dot = new_like(x);
  Tensor mean = new_like(x, {s.batch, s.tokens, 1}, ScalarType::Float), rstd = new_like(mean);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> zeros(s.width);
    auto pass = pass_of<T>(op, x, shift, scale, eps);
    pass.x_dot = rows<T>(op, "x_dot", x_dot, x, zeros);
    pass.shift_dot = rows<T>(op, "shift_dot", shift_dot, x, zeros);
    pass.scale_dot = rows<T>(op, "scale_dot", scale_dot, x, zeros);
    pass.y = mutable_data<T>(y);
    pass.y_dot = mutable_data<T>(y_dot);
    pass.mean = mutable_data<float>(mean);
    pass.rstd = mutable_data<float>(rstd);
    run_norm_pass<T, false, true>(pass, s.batch);
  });
  return {y, y_dot, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> adaln_bwd(
    Tensor y_bar, Tensor x, Tensor shift, Tensor scale, Tensor mean, Tensor rstd) {
  constexpr const char* op = "adaln_bwd";
  const Shape s = shape_of(op, "x", x);
  check_same(op, "y_bar", y_bar, x);
  Tensor x_bar = new_like(x), shift_bar, scale_bar;
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    NormBackward<T> pass;
    pass.tokens = s.tokens;
    pass.width = s.width;
    pass.chunks = chunks_of(s);
    const std::vector<T> zeros(s.width);
    pass.y_bar = rows<T>(op, "y_bar", y_bar, x);
    pass.x = rows<T>(op, "x", x, x);
    pass.scale = rows<T>(op, "scale", scale, x);
    pass.mean = statistic(op, "mean", mean, {s.batch, s.tokens, 1});
    pass.rstd = statistic(op, "rstd", rstd, {s.batch, s.tokens, 1});
    pass.x_bar = mutable_data<T>(x_bar);
    Summed scale_sum(scale, pass.scale.whole(), s);
    pass.scale_sum = scale_sum.sums();
    pass.scale_bar = scale_sum.rows<T>();
    // Where there is a shift for every token, its cotangent is y_bar; the caller puts it there.
    const bool shift_whole = rows<T>(op, "shift", shift, x).whole();
    Summed shift_sum(shift_whole ? new_like(x, {0}, x.scalar_type()) : shift, shift_whole, s);
    pass.shift_sum = shift_sum.sums();
    run_norm_backward<T, false>(pass, s.batch);
    shift_bar = shift_sum.finish<T>();
    scale_bar = scale_sum.finish<T>();
  });
  return {x_bar, shift_bar, scale_bar};
}

}  // namespace mfmjt
