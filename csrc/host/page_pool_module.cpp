// PagePool for Python. Lists of pages come and go as bytes of int64 and int32: arrays are `tokencomp.native`'s matter.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "host/python.h"

namespace tokencomp::host {

PyObject* out_of_pages = nullptr;

namespace {

struct Object {
  PyObject_HEAD PagePool* pool;
};

PagePool& pool_of(PyObject* self) { return *reinterpret_cast<Object*>(self)->pool; }

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

// A list of pages as Python gave it.
struct Pages {
  const int64_t* data = nullptr;
  Py_ssize_t count = 0;

  bool read(PyObject* bytes) {
    char* memory;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(bytes, &memory, &size)) return false;
    data = reinterpret_cast<const int64_t*>(memory);  // behind the header of a bytes object: aligned to 8
    count = size / Py_ssize_t(sizeof(int64_t));
    return true;
  }
};

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject*) {
  long long capacity;
  if (!PyArg_ParseTuple(arguments, "L:PagePool", &capacity)) return nullptr;
  return guarded([&]() -> PyObject* {
    auto pool = std::make_unique<PagePool>(capacity);
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    PyObject* self = allocate(type, 0);
    if (self) reinterpret_cast<Object*>(self)->pool = pool.release();
    return self;
  });
}

void destroy(PyObject* self) {
  delete reinterpret_cast<Object*>(self)->pool;
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* allocate(PyObject* self, PyObject* argument) {
  const long long count = PyLong_AsLongLong(argument);
  if (count == -1 && PyErr_Occurred()) return nullptr;
  return guarded([&]() -> PyObject* {
    PagePool& pool = pool_of(self);
    if (count < 0) {
      throw std::invalid_argument("PagePool.allocate: count must be >= 0, got " + std::to_string(count));
    }
    if (count > pool.capacity()) pool.allocate(count, nullptr);  // throws, before memory for so many is asked for
    PyObject* pages = PyByteArray_FromStringAndSize(nullptr, Py_ssize_t(count * sizeof(int32_t)));
    if (!pages) return nullptr;
    try {
      pool.allocate(count, reinterpret_cast<int32_t*>(PyByteArray_AsString(pages)));
    } catch (...) {
      Py_DECREF(pages);
      throw;
    }
    return pages;
  });
}

PyObject* retain(PyObject* self, PyObject* argument) {
  Pages pages;
  if (!pages.read(argument)) return nullptr;
  return guarded([&] {
    pool_of(self).retain(pages.data, pages.count);
    return none();
  });
}

PyObject* free_(PyObject* self, PyObject* argument) {
  Pages pages;
  if (!pages.read(argument)) return nullptr;
  return guarded([&] {
    pool_of(self).free(pages.data, pages.count);
    return none();
  });
}

PyObject* refcount(PyObject* self, PyObject* argument) {
  Pages pages;
  if (!pages.read(argument)) return nullptr;
  return guarded([&]() -> PyObject* {
    std::vector<int64_t> uses;
    for (Py_ssize_t i = 0; i < pages.count; ++i) uses.push_back(pool_of(self).refcount(pages.data[i]));
    const char* memory = reinterpret_cast<const char*>(uses.data());
    return PyByteArray_FromStringAndSize(memory, Py_ssize_t(uses.size() * sizeof(int64_t)));
  });
}

PyObject* grow(PyObject* self, PyObject* argument) {
  const long long capacity = PyLong_AsLongLong(argument);
  if (capacity == -1 && PyErr_Occurred()) return nullptr;
  return guarded([&] {
    pool_of(self).grow(capacity);
    return none();
  });
}

PyObject* statistics(PyObject* self, PyObject*) {
  const PagePool& pool = pool_of(self);
  return Py_BuildValue("{s:L,s:L,s:L,s:L,s:L}", "capacity", (long long)pool.capacity(), "in_use",
                       (long long)pool.in_use(), "free", (long long)(pool.capacity() - pool.in_use()), "peak",
                       (long long)pool.peak(), "allocations", (long long)pool.allocations());
}

PyObject* capacity(PyObject* self, void*) { return PyLong_FromLongLong(pool_of(self).capacity()); }
PyObject* in_use(PyObject* self, void*) { return PyLong_FromLongLong(pool_of(self).in_use()); }
PyObject* peak(PyObject* self, void*) { return PyLong_FromLongLong(pool_of(self).peak()); }

PyMethodDef methods[] = {{"allocate", allocate, METH_O, nullptr}, {"retain", retain, METH_O, nullptr},
                         {"free", free_, METH_O, nullptr},        {"refcount", refcount, METH_O, nullptr},
                         {"grow", grow, METH_O, nullptr},         {"statistics", statistics, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyGetSetDef properties[] = {{"capacity", capacity, nullptr, nullptr, nullptr},
                            {"in_use", in_use, nullptr, nullptr, nullptr},
                            {"peak", peak, nullptr, nullptr, nullptr},
                            {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(make)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                       {Py_tp_methods, methods},
                       {Py_tp_getset, properties},
                       {0, nullptr}};

PyType_Spec spec = {"tokencomp._native.PagePool", sizeof(Object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

bool add_page_pool(PyObject* module) {
  out_of_pages = PyErr_NewException("tokencomp.native.OutOfPages", PyExc_MemoryError, nullptr);
  PyObject* type = PyType_FromSpec(&spec);
  if (!out_of_pages || !type) return false;
  Py_INCREF(out_of_pages);  // one for the module, one for `guarded`
  return !PyModule_AddObject(module, "OutOfPages", out_of_pages) && !PyModule_AddObject(module, "PagePool", type);
}

}  // namespace tokencomp::host
