// Nothing of Python: what module.cpp needs to compile where only the kernels are wanted.
#pragma once

struct PyObject;
struct PyMethodDef {
  const char* name;
  PyObject* (*function)(PyObject*, PyObject*);
  int flags;
  const char* doc;
};
struct PyModuleDef {
  int base;
  const char *name, *doc;
  long size;
  PyMethodDef* methods;
  const void *slots, *traverse, *clear, *free;
};

#define PyModuleDef_HEAD_INIT 0
#define METH_NOARGS 0
#define METH_O 0
#define Py_RETURN_NONE return nullptr
#define PyMODINIT_FUNC extern "C" PyObject*
inline PyObject* const PyExc_ValueError = nullptr;
template <class... Args>
PyObject* Py_BuildValue(const char*, Args...) {
  return nullptr;
}
inline const char* PyUnicode_AsUTF8AndSize(PyObject*, long*) { return nullptr; }
inline void PyErr_Format(PyObject*, const char*, const char*) {}
inline PyObject* PyModule_Create(PyModuleDef*) { return nullptr; }
