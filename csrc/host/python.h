// Python by its limited API, as of 3.10: the module built against any Python from there on runs under all of them.
#pragma once

#include <Python.h>

#include <stdexcept>

#include "host/page_pool.h"

#ifndef Py_LIMITED_API
#error "compile with -DPy_LIMITED_API=0x030A0000"
#endif

namespace tokencomp::host {

// Adds the type PagePool and its exception to a module.
bool add_page_pool(PyObject* module);

// tokencomp._native.OutOfPages, a MemoryError.
extern PyObject* out_of_pages;

// What `body` returns; what it throws becomes a Python exception.
template <class Body>
PyObject* guarded(Body&& body) {
  try {
    return body();
  } catch (const OutOfPages& error) {
    PyErr_SetString(out_of_pages, error.what());
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace tokencomp::host
