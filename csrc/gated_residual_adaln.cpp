// Gated residual add and layer norm of the sum: value, value and tangent, backward.
//
// The boundary between two sub-layers in one sweep: 4 B N C elements for the value, 8 B N C with the
// tangent, besides the modulations. Formulas: mfmjt/kernels/gated_residual_adaln.py.

#include "norm.h"
#include "ops.h"

namespace mfmjt {
namespace {

template <class T>
NormPass<T> pass_of(
    const char* op, const Tensor& x, const Tensor& h, const Tensor& gate, const Tensor& shift,
    const Tensor& scale, double eps) {
  check_same(op, "h", h, x);
  NormPass<T> pass;
  pass.tokens = x.size(1);
  pass.width = x.size(2);
  pass.eps = static_cast<float>(eps);
  pass.x = rows<T>(op, "x", x, x);
  pass.h = rows<T>(op, "h", h, x);
  pass.gate = rows<T>(op, "gate", gate, x);
  pass.shift = rows<T>(op, "shift", shift, x);
  pass.scale = rows<T>(op, "scale", scale, x);
  return pass;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_fwd(
    Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, double eps) {
  constexpr const char* op = "gated_residual_adaln_fwd";
  const Shape s = shape_of(op, "x", x);
  Tensor total = new_like(x), y = new_like(x);
  Tensor mean = new_like(x, {s.batch, s.tokens, 1}, ScalarType::Float), rstd = new_like(mean);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    auto pass = pass_of<T>(op, x, h, gate, shift, scale, eps);
    pass.total = mutable_data<T>(total);
    pass.y = mutable_data<T>(y);
    pass.mean = mutable_data<float>(mean);
    pass.rstd = mutable_data<float>(rstd);
    run_norm_pass<T, true, false>(pass, s.batch);
  });
  return {total, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_jvp(
    Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, Maybe x_dot,
    Maybe h_dot, Maybe gate_dot, Maybe shift_dot,
    Maybe scale_dot, double eps) {
  constexpr const char* op = "gated_residual_adaln_jvp";
  const Shape s = shape_of(op, "x", x);
  Tensor total = new_like(x), total_dot = new_like(x), y = new_like(x), y_dot = new_like(x);
  Tensor mean = new_like(x, {s.batch, s.tokens, 1}, ScalarType::Float), rstd = new_like(mean);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> zeros(s.width);
    auto pass = pass_of<T>(op, x, h, gate, shift, scale, eps);
    pass.x_dot = rows<T>(op, "x_dot", x_dot, x, zeros);
    pass.h_dot = rows<T>(op, "h_dot", h_dot, x, zeros);
    pass.gate_dot = rows<T>(op, "gate_dot", gate_dot, x, zeros);
    pass.shift_dot = rows<T>(op, "shift_dot", shift_dot, x, zeros);
    pass.scale_dot = rows<T>(op, "scale_dot", scale_dot, x, zeros);
    pass.total = mutable_data<T>(total);
    pass.total_dot = mutable_data<T>(total_dot);
    pass.y = mutable_data<T>(y);
    pass.y_dot = mutable_data<T>(y_dot);
    pass.mean = mutable_data<float>(mean);
    pass.rstd = mutable_data<float>(rstd);
    run_norm_pass<T, true, true>(pass, s.batch);
  });
  return {total, total_dot, y, y_dot, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_bwd(
    Maybe total_bar, Maybe y_bar, Tensor total, Tensor h,
    Tensor gate, Tensor shift, Tensor scale, Tensor mean, Tensor rstd) {
  constexpr const char* op = "gated_residual_adaln_bwd";
  const Shape s = shape_of(op, "total", total);
  check_same(op, "h", h, total);
  Tensor x_bar = new_like(total), h_bar = new_like(total), gate_bar, shift_bar, scale_bar;
  by_dtype(total, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> zeros(s.width);
    NormBackward<T> pass;
    pass.tokens = s.tokens;
    pass.width = s.width;
    pass.chunks = chunks_of(s);
    pass.total_bar = rows<T>(op, "total_bar", total_bar, total, zeros);
    pass.y_bar = rows<T>(op, "y_bar", y_bar, total, zeros);
    pass.x = rows<T>(op, "total", total, total);
    pass.h = rows<T>(op, "h", h, total);
    pass.gate = rows<T>(op, "gate", gate, total);
    pass.scale = rows<T>(op, "scale", scale, total);
    pass.mean = statistic(op, "mean", mean, {s.batch, s.tokens, 1});
    pass.rstd = statistic(op, "rstd", rstd, {s.batch, s.tokens, 1});
    pass.x_bar = mutable_data<T>(x_bar);
    pass.h_bar = mutable_data<T>(h_bar);
    Summed gate_sum(gate, pass.gate.whole(), s), scale_sum(scale, pass.scale.whole(), s);
    pass.gate_sum = gate_sum.sums();
    pass.gate_bar = gate_sum.rows<T>();
    pass.scale_sum = scale_sum.sums();
    pass.scale_bar = scale_sum.rows<T>();
    // Where there is a shift for every token, its cotangent is y_bar; the caller puts it there.
    const bool shift_whole = rows<T>(op, "shift", shift, total).whole();
    Summed shift_sum(
        shift_whole && y_bar ? new_like(total, {0}, total.scalar_type()) : shift, shift_whole, s);
    pass.shift_sum = shift_sum.sums();
    run_norm_backward<T, true>(pass, s.batch);
    gate_bar = gate_sum.finish<T>();
    scale_bar = scale_sum.finish<T>();
    shift_bar = shift_sum.finish<T>();
    if (shift_whole && !y_bar) torch::stable::zero_(shift_bar);
  });
  return {x_bar, h_bar, gate_bar, shift_bar, scale_bar};
}

}  // namespace mfmjt
