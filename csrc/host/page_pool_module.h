#pragma once

#include <pybind11/pybind11.h>

namespace tokencomp::host {

void add_page_pool(pybind11::module_& m);

}  // namespace tokencomp::host
