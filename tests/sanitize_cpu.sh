#!/usr/bin/env bash
# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer: builds it into build/sanitize, the first time in
# half an hour, then runs a command with it; without one, calls of every operator and the fuzz test:
#   bash tests/sanitize_cpu.sh [command]        PYTHON=python3 JOBS=2
set -eu
cd "$(dirname "$0")/.."
PYTHON=$(realpath -s "$(command -v "${PYTHON:-python3}")")
PATH=$(dirname "$PYTHON"):$PATH
folder=build/sanitize
package=$PWD/$folder/package

cmake -G Ninja -S . -B $folder -DTOKENCOMP_SANITIZE=ON -DTOKENCOMP_CUDA=0 -DTOKENCOMP_PYTHON="$PYTHON" \
  -DPython_EXECUTABLE="$PYTHON" -DTOKENCOMP_OUTPUT="$package/tokencomp" >/dev/null
rm -rf "$package"
cp -r python "$package"
rm -rf "$package"/tokencomp/lib "$package"/tokencomp/_*.so
cmake --build $folder --target package -j "${JOBS:-2}"

# Python itself is not instrumented, so the runtimes come first; libstdc++ beside them, or they miss its exceptions.
for library in asan ubsan stdc++; do
  preload="${preload:-} $(g++ -print-file-name=lib$library.so)"
done
export PYTHONPATH=$package PYTHONMALLOC=malloc LD_PRELOAD="$preload"
export ASAN_OPTIONS=detect_leaks=0:max_allocation_size_mb=8192:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
if [ $# -gt 0 ]; then
  exec "$@"
fi
"$PYTHON" tests/sanitize.py cpu
"$PYTHON" tests/fuzz.py 2000
