// Gated residual add and layer norm of the sum: value, value and tangent, backward.
//
// The boundary between two sub-layers in one sweep: 4 B N C elements for the value, 8 B N C with the
// tangent, besides the modulations. Formulas: mfmjt/kernels/gated_residual_adaln.py.

#include "norm.h"

namespace mfmjt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_fwd(
    Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, double eps, Maybe rows) {
  const auto out = norm_forward<true, false>(
      "gated_residual_adaln_fwd", {x, h, gate, shift, scale}, {}, eps, rows);
  return {out.total, out.y, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_jvp(
    Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, Maybe x_dot, Maybe h_dot,
    Maybe gate_dot, Maybe shift_dot, Maybe scale_dot, double eps, Maybe rows) {
  const auto out = norm_forward<true, true>(
      "gated_residual_adaln_jvp", {x, h, gate, shift, scale},
      {x_dot, h_dot, gate_dot, shift_dot, scale_dot}, eps, rows);
  return {out.total, out.total_dot, out.y, out.y_dot, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_bwd(
    Maybe total_bar, Maybe y_bar, Tensor total, Tensor h, Tensor gate, Tensor shift, Tensor scale,
    Tensor mean, Tensor rstd, Maybe rows) {
  const auto bars = norm_bars<true>(
      "gated_residual_adaln_bwd", "total", total_bar, y_bar, {total, h, gate, shift, scale}, mean,
      rstd, rows);
  return {*bars.x, *bars.h, *bars.gate, *bars.shift, *bars.scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mfmjt_cpu, m) {
  m.def(
      "gated_residual_adaln_fwd(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, "
      "float eps, Tensor? rows) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_residual_adaln_jvp(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, "
      "Tensor? x_dot, Tensor? h_dot, Tensor? gate_dot, Tensor? shift_dot, Tensor? scale_dot, "
      "float eps, Tensor? rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_residual_adaln_bwd(Tensor? total_bar, Tensor? y_bar, Tensor total, Tensor h, "
      "Tensor gate, Tensor shift, Tensor scale, Tensor mean, Tensor rstd, Tensor? rows) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mfmjt_cpu, CPU, m) {
  m.impl("gated_residual_adaln_fwd", TORCH_BOX(&gated_residual_adaln_fwd));
  m.impl("gated_residual_adaln_jvp", TORCH_BOX(&gated_residual_adaln_jvp));
  m.impl("gated_residual_adaln_bwd", TORCH_BOX(&gated_residual_adaln_bwd));
}

}  // namespace mfmjt
