// PagePool for Python: lists of pages are numpy arrays.
#include "host/page_pool_module.h"

#include <pybind11/numpy.h>

#include "host/page_pool.h"

namespace tokencomp::host {
namespace {

namespace py = pybind11;

// Any array or list of integers.
py::array_t<int64_t> pages_of(const char* method, const py::object& pages) {
  const py::array given = py::array::ensure(pages);
  if (!given) {
    PyErr_Clear();
    throw py::type_error("PagePool." + std::string(method) + ": pages must be integers, got " +
                         std::string(py::str(py::type::of(pages))));
  }
  const char kind = given.dtype().kind();
  if (given.size() > 0 && kind != 'i' && kind != 'u') {
    throw py::type_error("PagePool." + std::string(method) + ": pages must be integers, got " +
                         std::string(py::str(given.dtype())));
  }
  return py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(given);
}

py::array_t<int32_t> allocate(PagePool& pool, int64_t count) {
  if (count < 0) {
    throw py::value_error("PagePool.allocate: count must be >= 0, got " + std::to_string(count));
  }
  if (count > pool.capacity()) pool.allocate(count, nullptr);  // throws, before memory for so many is asked for
  py::array_t<int32_t> pages(count);
  pool.allocate(count, pages.mutable_data());
  return pages;
}

py::array_t<int64_t> refcount(const PagePool& pool, const py::object& pages) {
  const py::array_t<int64_t> given = pages_of("refcount", pages);
  py::array_t<int64_t> out(std::vector<py::ssize_t>(given.shape(), given.shape() + given.ndim()));
  for (py::ssize_t i = 0; i < given.size(); ++i) out.mutable_data()[i] = pool.refcount(given.data()[i]);
  return out;
}

py::dict statistics(const PagePool& pool) {
  py::dict d;
  d["capacity"] = pool.capacity();
  d["in_use"] = pool.in_use();
  d["free"] = pool.capacity() - pool.in_use();
  d["peak"] = pool.peak();
  d["allocations"] = pool.allocations();
  return d;
}

}  // namespace

void add_page_pool(py::module_& m) {
  py::register_exception<OutOfPages>(m, "OutOfPages", PyExc_MemoryError);
  py::class_<PagePool>(
      m, "PagePool",
      "Which pages of a pool are in use, and by how many rows. Pages are numbers from 0; lists of them "
      "are any integers, of any shape, in which -1 is skipped. A call that raises changes nothing.")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def("allocate", &allocate, py::arg("count"),
           "The ``count`` lowest free pages, ascending int32, each used once. Raises OutOfPages (a MemoryError).")
      .def(
          "retain",
          [](PagePool& pool, const py::object& pages) {
            const py::array_t<int64_t> list = pages_of("retain", pages);
            pool.retain(list.data(), list.size());
          },
          py::arg("pages"), "One use more of each page. Raises ValueError for a free page, IndexError for none.")
      .def(
          "free",
          [](PagePool& pool, const py::object& pages) {
            const py::array_t<int64_t> list = pages_of("free", pages);
            pool.free(list.data(), list.size());
          },
          py::arg("pages"),
          "One use less of each page; what nobody uses any more is free again. Raises ValueError for a page that is "
          "free already, IndexError for none.")
      .def("refcount", &refcount, py::arg("pages"), "How many use each page, in the shape of ``pages``; 0: free.")
      .def("grow", &PagePool::grow, py::arg("capacity"), "More pages; those there are stay as they are.")
      .def("statistics", &statistics,
           "Pages: capacity, in_use, free, peak (most in use at a time), allocations (ever).")
      .def_property_readonly("capacity", &PagePool::capacity)
      .def_property_readonly("in_use", &PagePool::in_use)
      .def_property_readonly("peak", &PagePool::peak);
}

}  // namespace tokencomp::host
