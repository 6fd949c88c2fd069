#!/usr/bin/env bash
# Everything a machine with a GPU can tell, in one command (make gpu-check PYTHON=python3 OUT=folder): build for the GPU
# present, conformance of the instruction wrappers first, the CUDA tests, the sanitizer, the benches as JSON into OUT.
# No network, no virtual environment; goes on after a failure, so that one run tells all, and fails at the end.
# STEPS="build loads tests" runs some steps only, each with all the time there is.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
export PYTHONPATH=$PWD/python PYTHONUNBUFFERED=1 TOKENCOMP_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
status=0

deadline=530  # seconds for everything: under 9 minutes

step() {  # step NAME SECONDS COMMAND...: runs under a time limit, keeps the log, remembers failures
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  if [ -n "${STEPS:-}" ]; then
    [[ " $STEPS " == *" $name "* ]] || return
    limit=$deadline
  fi
  [ "$limit" -le $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
  [ "$limit" -gt 0 ] || { echo "== $name: not run, out of time"; status=1; return; }
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  tail -n 15 "$OUT/$name.log"
  echo "== $name: exit $code after $((SECONDS - begin)) s"
  [ $code -eq 0 ] || status=1
}

if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  capability=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
  [ "$capability" = 9.0 ] && capability=9.0a
  export TORCH_CUDA_ARCH_LIST=$capability
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader || true
echo "building for $TORCH_CUDA_ARCH_LIST"

step build 200 "$PYTHON" setup.py -q build_ext --inplace
[ -f python/tokencomp/lib/libtokencomp_cuda.so ] || { echo "the CUDA library was not built"; exit 1; }
step build_tests 150 cmake --build build/cmake --target tokencomp_test_cuda -j "$MAX_JOBS"
# A library that does not load would turn every CUDA test into a skip.
step loads 30 "$PYTHON" -c "
import tokencomp
from tokencomp import _load
cuda = _load.libraries()['cuda']
assert cuda.loaded, cuda.reason"
step conformance 60 "$PYTHON" -m pytest -q -m cuda tests/emu
step tests 150 "$PYTHON" -m pytest -q -m "cuda and not slow" tests --ignore tests/emu
step bench 150 "$PYTHON" bench/run.py --device cuda --check --skip model --out "$OUT/bench.md" --json "$OUT/bench.json"
step model 90 "$PYTHON" bench/bench_model.py --device cuda --check --out "$OUT/model.json"
if command -v compute-sanitizer >/dev/null; then
  step memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" tests/sanitize.py
  step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 1 "$PYTHON" tests/sanitize.py
fi
exit $status
