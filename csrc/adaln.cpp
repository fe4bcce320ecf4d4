// Layer norm without learned affine, then shift and scale: value, value and tangent, backward.
//
// One sweep over memory each: 2 B N C elements for the value, 4 B N C with the tangent, besides the
// modulations. Formulas: mfmjt/kernels/adaln.py.

#include "norm.h"

namespace mfmjt {
namespace {

std::tuple<Tensor, Tensor, Tensor> adaln_fwd(
    Tensor x, Tensor shift, Tensor scale, double eps, Maybe rows) {
  const auto out =
      norm_forward<false, false>("adaln_fwd", {x, {}, {}, shift, scale}, {}, eps, rows);
  return {out.y, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_jvp(
    Tensor x, Tensor shift, Tensor scale, Maybe x_dot, Maybe shift_dot, Maybe scale_dot,
    double eps, Maybe rows) {
  const auto out = norm_forward<false, true>(
      "adaln_jvp", {x, {}, {}, shift, scale}, {x_dot, {}, {}, shift_dot, scale_dot}, eps, rows);
  return {out.y, out.y_dot, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> adaln_bwd(
    Tensor y_bar, Tensor x, Tensor shift, Tensor scale, Tensor mean, Tensor rstd, Maybe rows) {
  const auto bars = norm_bars<false>(
      "adaln_bwd", "x", {}, y_bar, {x, {}, {}, shift, scale}, mean, rstd, rows);
  return {*bars.x, *bars.shift, *bars.scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mfmjt_cpu, m) {
  m.def(
      "adaln_fwd(Tensor x, Tensor shift, Tensor scale, float eps, Tensor? rows) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "adaln_jvp(Tensor x, Tensor shift, Tensor scale, Tensor? x_dot, Tensor? shift_dot, "
      "Tensor? scale_dot, float eps, Tensor? rows) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adaln_bwd(Tensor y_bar, Tensor x, Tensor shift, Tensor scale, Tensor mean, Tensor rstd, "
      "Tensor? rows) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mfmjt_cpu, CPU, m) {
  m.impl("adaln_fwd", TORCH_BOX(&adaln_fwd));
  m.impl("adaln_jvp", TORCH_BOX(&adaln_jvp));
  m.impl("adaln_bwd", TORCH_BOX(&adaln_bwd));
}

}  // namespace mfmjt
