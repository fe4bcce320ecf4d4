// The ops, as bindings.cpp names them to PyTorch; what they mean stands in mfmjt/kernels/<op>.py.
#pragma once

#include "common.h"

namespace mfmjt {

using Maybe = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> adaln_fwd(Tensor x, Tensor shift, Tensor scale, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_jvp(
    Tensor x, Tensor shift, Tensor scale, Maybe x_dot, Maybe shift_dot, Maybe scale_dot,
    double eps);
std::tuple<Tensor, Tensor, Tensor> adaln_bwd(
    Tensor y_bar, Tensor x, Tensor shift, Tensor scale, Tensor mean, Tensor rstd);

// (B, C, N), channels-first.
Tensor conv1d_fwd(Tensor x, Tensor weight, Maybe bias, int64_t dilation);
Tensor conv1d_toom(Tensor x, Tensor weight, Maybe bias, int64_t dilation);

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_fwd(
    Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_jvp(
    Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, Maybe x_dot, Maybe h_dot,
    Maybe gate_dot, Maybe shift_dot, Maybe scale_dot, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_bwd(
    Maybe total_bar, Maybe y_bar, Tensor total, Tensor h, Tensor gate, Tensor shift, Tensor scale,
    Tensor mean, Tensor rstd);

// In place, over rows of scores (G, R, M).
Tensor joint_attention_softmax(Tensor s, Maybe s_dot, Maybe bias, double scale);
Tensor joint_attention_softmax_bar(
    Tensor s, Tensor p_bar, Maybe bias, Tensor lse, double scale);
// bfloat16 (B, N, H, D), for CPUs with products of its pairs.
std::tuple<Tensor, Tensor, Tensor> joint_attention_rows(
    Tensor q, Tensor k, Tensor v, Maybe q_dot, Maybe k_dot, Maybe v_dot, Maybe bias, double scale);
std::tuple<Tensor, Tensor, Tensor> joint_attention_rows_bar(
    Tensor o_bar, Tensor q, Tensor k, Tensor v, Tensor lse, Maybe bias, double scale);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_fwd(
    Tensor qkv, Tensor q_weight, Tensor k_weight, Maybe rope, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_jvp(
    Tensor qkv, Tensor qkv_dot, Tensor q_weight, Tensor k_weight, Maybe rope, double eps);
std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_bwd(
    Maybe q_bar, Maybe k_bar, Maybe v_bar, Tensor qkv, Tensor q_weight, Tensor k_weight,
    Maybe rope, Tensor q_rstd, Tensor k_rstd);

Tensor snake_fwd(Tensor x, Tensor alpha, Tensor beta);

Tensor swiglu_fwd(Tensor gate, Tensor up);
std::tuple<Tensor, Tensor> swiglu_jvp(Tensor gate, Tensor up, Maybe gate_dot, Maybe up_dot);
std::tuple<Tensor, Tensor> swiglu_bwd(Tensor y_bar, Tensor gate, Tensor up);

}  // namespace mfmjt
