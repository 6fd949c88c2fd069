# pybind11 as the package that pip installed for TOKENCOMP_PYTHON.
execute_process(COMMAND ${TOKENCOMP_PYTHON} -m pybind11 --cmakedir
                OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _failed)
if(_failed)
  message(FATAL_ERROR "pybind11 is not installed for ${TOKENCOMP_PYTHON}: pip install pybind11")
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 REQUIRED CONFIG PATHS ${pybind11_DIR} NO_DEFAULT_PATH)
