"""Shows that one build runs under several versions of Python and PyTorch. Run by hand by maintainers:

    python tests/abi_check.py PYTHON [PYTHON ...]

Each PYTHON is an interpreter with another minor version, or another torch. The same files, those built in
python/tokencomp, are imported by each; every one must give the same numbers. The operator library may need
nothing of PyTorch but the C symbols of its stable ABI, the native module nothing of Python but the limited
API, as its name promises.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "python"
LIBRARY, NATIVE = "tokencomp/lib/libtokencomp_cpu.so", "tokencomp/_native.abi3.so"
LIMITED = {"_Py_Dealloc", "_Py_NoneStruct"}  # what the macros of the limited API use, and is part of its ABI

RUN = """
import json, sys, torch, tokencomp
from tokencomp import native, ops
x = torch.arange(1 * 97 * 33, dtype=torch.float32).reshape(1, 97, 33).mul(0.37).sin()
out = {"version": f"python {sys.version_info[0]}.{sys.version_info[1]} torch {torch.__version__}"}
for dtype in ("float32", "float16", "bfloat16"):
    index, value = ops.kcenter_greedy(x.to(getattr(torch, dtype)), 12)
    out[dtype] = [index.tolist(), [round(v, 6) for v in value[0, 1:].tolist()]]
q, k = x[:, None, :8, :32].contiguous(), x[:, None, :, :32].contiguous()
out["lse"] = [round(v, 5) for v in ops.attention_lse(q, k).flatten().tolist()]
try:
    ops.kcenter_greedy(x, 600)
except RuntimeError as error:
    out["error"] = "k must be in [1, N=97], got 600" in str(error)
pool = native.PagePool(70)
pages = pool.allocate(66)
pool.free(pages[::2])
out["pool"] = [pool.statistics(), pool.refcount(range(70)).tolist(), pool.allocate(3).tolist()]
try:
    pool.allocate(100)
except native.OutOfPages as error:
    out["full"] = str(error)
out["plan"] = native.topk_cuda_plans(R=32, S=4096, element_bytes=2)
out["info"] = sorted(tokencomp.build_info())
print(json.dumps(out))
"""


def undefined(library: str) -> list[str]:
    """Symbols that a library needs."""
    command = ["nm", "-DC", "--undefined-only", PACKAGE / library]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    return listing.stdout.splitlines()


def private_symbols() -> list[str]:
    """What the native module needs of Python beyond the limited API, by its name."""
    needed = [line.split()[-1] for line in undefined(NATIVE)]
    return [name for name in needed if name.startswith("_Py") and name not in LIMITED]


def main(pythons: list[str]) -> int:
    """Exit status."""
    if len(pythons) < 2:
        print(__doc__)
        return 2
    foreign = [line for line in undefined(LIBRARY) if any(n in line for n in ("c10::", "at::", "torch::"))]
    private = private_symbols()
    size = (PACKAGE / LIBRARY).stat().st_size / 1e6
    print(f"{Path(LIBRARY).name}: {size:.1f} MB, C++ symbols of PyTorch needed: {len(foreign)}")
    print(f"{Path(NATIVE).name}: private symbols of Python needed: {private or 0}")
    results = []
    for python in pythons:
        env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
        done = subprocess.run([python, "-c", RUN], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{python}: failed\n{done.stderr}")
            return 1
        result = json.loads(done.stdout.splitlines()[-1])
        print(f"  {result.pop('version'):32} runs; error message as declared: {result['error']}")
        results.append(result)
    same = all(r == results[0] for r in results) and results[0]["error"]
    print("identical results under every version" if same else f"results differ: {results}")
    return int(not same or bool(foreign) or bool(private))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
