// The one file that names things to Python: ops to the dispatcher, facts of the build to the module.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(mfmjt_cpu, m) {
  m.def("adaln_fwd(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adaln_jvp(Tensor x, Tensor shift, Tensor scale, Tensor? x_dot, Tensor? shift_dot, "
      "Tensor? scale_dot, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adaln_bwd(Tensor y_bar, Tensor x, Tensor shift, Tensor scale, Tensor mean, Tensor rstd) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, int dilation) -> Tensor");
  m.def("conv1d_toom(Tensor x, Tensor weight, Tensor? bias, int dilation) -> Tensor");
  m.def(
      "gated_residual_adaln_fwd(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_residual_adaln_jvp(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, "
      "Tensor? x_dot, Tensor? h_dot, Tensor? gate_dot, Tensor? shift_dot, Tensor? scale_dot, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_residual_adaln_bwd(Tensor? total_bar, Tensor? y_bar, Tensor total, Tensor h, "
      "Tensor gate, Tensor shift, Tensor scale, Tensor mean, Tensor rstd) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "joint_attention_softmax(Tensor(a!) s, Tensor(b!)? s_dot, Tensor? bias, float scale) "
      "-> Tensor");
  m.def(
      "joint_attention_softmax_bar(Tensor(a!) s, Tensor(b!) p_bar, Tensor? bias, Tensor lse, "
      "float scale) -> Tensor(a!)");
  m.def(
      "joint_attention_rows(Tensor q, Tensor k, Tensor v, Tensor? q_dot, Tensor? k_dot, "
      "Tensor? v_dot, Tensor? bias, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "joint_attention_rows_bar(Tensor o_bar, Tensor q, Tensor k, Tensor v, Tensor lse, "
      "Tensor? bias, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "qk_norm_rope_fwd(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor? rope, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "qk_norm_rope_jvp(Tensor qkv, Tensor qkv_dot, Tensor q_weight, Tensor k_weight, "
      "Tensor? rope, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "qk_norm_rope_bwd(Tensor? q_bar, Tensor? k_bar, Tensor? v_bar, Tensor qkv, Tensor q_weight, "
      "Tensor k_weight, Tensor? rope, Tensor q_rstd, Tensor k_rstd) -> (Tensor, Tensor, Tensor)");
  m.def("snake_fwd(Tensor x, Tensor alpha, Tensor beta) -> Tensor");
  m.def("swiglu_fwd(Tensor gate, Tensor up) -> Tensor");
  m.def(
      "swiglu_jvp(Tensor gate, Tensor up, Tensor? gate_dot, Tensor? up_dot) -> (Tensor, Tensor)");
  m.def("swiglu_bwd(Tensor y_bar, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mfmjt_cpu, CPU, m) {
  m.impl("adaln_fwd", TORCH_BOX(&mfmjt::adaln_fwd));
  m.impl("adaln_jvp", TORCH_BOX(&mfmjt::adaln_jvp));
  m.impl("adaln_bwd", TORCH_BOX(&mfmjt::adaln_bwd));
  m.impl("conv1d_fwd", TORCH_BOX(&mfmjt::conv1d_fwd));
  m.impl("conv1d_toom", TORCH_BOX(&mfmjt::conv1d_toom));
  m.impl("gated_residual_adaln_fwd", TORCH_BOX(&mfmjt::gated_residual_adaln_fwd));
  m.impl("gated_residual_adaln_jvp", TORCH_BOX(&mfmjt::gated_residual_adaln_jvp));
  m.impl("gated_residual_adaln_bwd", TORCH_BOX(&mfmjt::gated_residual_adaln_bwd));
  m.impl("joint_attention_rows", TORCH_BOX(&mfmjt::joint_attention_rows));
  m.impl("joint_attention_rows_bar", TORCH_BOX(&mfmjt::joint_attention_rows_bar));
  m.impl("joint_attention_softmax", TORCH_BOX(&mfmjt::joint_attention_softmax));
  m.impl("joint_attention_softmax_bar", TORCH_BOX(&mfmjt::joint_attention_softmax_bar));
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&mfmjt::qk_norm_rope_fwd));
  m.impl("qk_norm_rope_jvp", TORCH_BOX(&mfmjt::qk_norm_rope_jvp));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&mfmjt::qk_norm_rope_bwd));
  m.impl("snake_fwd", TORCH_BOX(&mfmjt::snake_fwd));
  m.impl("swiglu_fwd", TORCH_BOX(&mfmjt::swiglu_fwd));
  m.impl("swiglu_jvp", TORCH_BOX(&mfmjt::swiglu_jvp));
  m.impl("swiglu_bwd", TORCH_BOX(&mfmjt::swiglu_bwd));
}

namespace {

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512"};

const char* isa_name(mfmjt::Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue(
      "{s:s,s:s,s:s}", "compiler", __VERSION__, "cpu", isa_name(mfmjt::best_isa()), "used",
      isa_name(mfmjt::isa()));
}

PyObject* limit_isa(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) return nullptr;
  for (int level = 0; level < 3; ++level) {
    if (std::strcmp(text, kIsaNames[level]) == 0) {
      mfmjt::limit_isa(level);
      Py_RETURN_NONE;
    }
  }
  PyErr_Format(PyExc_ValueError, "instruction set must be portable, avx2 or avx512, got %s", text);
  return nullptr;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "Compiler, and the instruction sets found and used."},
    {"limit_isa", limit_isa, METH_O, "Use no better instruction set than this; for tests."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "CPU kernels of mfmjt.", -1, methods,
    nullptr,               nullptr, nullptr,                 nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
