// The Python module: which compiler, which instruction sets. The ops register themselves, each in its file.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "common.h"

namespace mfmjt {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

static std::atomic<int> current{static_cast<int>(best_isa())};

Isa isa() { return static_cast<Isa>(current.load(std::memory_order_relaxed)); }

void limit_isa(int level) { current = std::clamp(level, 0, static_cast<int>(best_isa())); }

}  // namespace mfmjt

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
