"""Shows that one built operator library runs under several PyTorch versions. Run by hand by maintainers:

    python tests/abi_check.py PYTHON [PYTHON ...]

Each PYTHON is an interpreter with another torch (for instance one virtual environment with torch 2.10 and one
with 2.13). The same file, python/tokencomp/lib/libtokencomp_cpu.so, is loaded by each; every one must give
the same picks, and the library may need nothing of PyTorch but the C symbols of the stable ABI.
"""

import json
import subprocess
import sys
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "python/tokencomp/lib/libtokencomp_cpu.so"

RUN = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
x = torch.arange(1 * 97 * 33, dtype=torch.float32).reshape(1, 97, 33).mul(0.37).sin()
out = {"torch": torch.__version__}
for dtype in ("float32", "float16", "bfloat16"):
    index, value = torch.ops.tokencomp.kcenter_greedy(x.to(getattr(torch, dtype)), 12)
    out[dtype] = [index.tolist(), [round(v, 6) for v in value[0, 1:].tolist()]]
try:
    torch.ops.tokencomp.kcenter_greedy(x, 600)
except RuntimeError as error:
    out["error"] = "k must be in [1, N=97], got 600" in str(error)
print(json.dumps(out))
"""


def foreign_symbols(library: Path) -> list[str]:
    """Undefined symbols that belong to PyTorch's C++ side: there must be none."""
    listing = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    return [
        line for line in listing.stdout.splitlines() if any(n in line for n in ("c10::", "at::", "torch::"))
    ]


def main(pythons: list[str]) -> int:
    if len(pythons) < 2:
        print(__doc__)
        return 2
    foreign = foreign_symbols(LIBRARY)
    size = LIBRARY.stat().st_size / 1e6
    print(f"{LIBRARY.name}: {size:.1f} MB, C++ symbols of PyTorch needed: {len(foreign)}")
    results = []
    for python in pythons:
        done = subprocess.run([python, "-c", RUN, LIBRARY], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{python}: failed\n{done.stderr}")
            return 1
        result = json.loads(done.stdout.splitlines()[-1])
        print(f"  torch {result.pop('torch'):16} runs; error message as declared: {result['error']}")
        results.append(result)
    same = all(r == results[0] for r in results) and results[0]["error"]
    print("identical results under every version" if same else f"results differ: {results}")
    return int(not same or bool(foreign))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
