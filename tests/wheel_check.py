"""Shows that a wheel works installed alone. Run by hand by maintainers, and by ``make wheel``:

    python tests/wheel_check.py PYTHON WHEEL

PYTHON, any from 3.10 on, has torch and pip, and no tokencomp that this finds: the wheel goes, without network
or dependencies, into an empty folder, which is all that is added to its path.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CHECK = """
import sys, torch, tokencomp
from pathlib import Path
assert Path(tokencomp.__file__).is_relative_to(sys.argv[1]), tokencomp.__file__
x = torch.randn(1, 64, 32)
ours = tokencomp.ops.kcenter_greedy(x, 8)[0]
assert torch.equal(ours, tokencomp.reference.kcenter_greedy(x, 8)[0].int())
with torch.no_grad():
    q = torch.randn(1, 4, 16, 64)
    near = tokencomp.scaled_dot_product_attention(q, q, q, is_causal=True)
    near = getattr(near, "output", near)
    exact = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.allclose(near, exact, atol=1e-5)
try:
    import transformers
except ImportError:
    print("models: not tried, no transformers")
else:
    from tokencomp import methods, zoo
    model, _ = zoo.load("recall-lm")
    ids, _ = zoo.recall.recall(1, 512, 24, 1, torch.Generator().manual_seed(3), 0.25)
    with tokencomp.compress(model, methods.SnapKV(budget=128)) as handle:
        said = model.generate(ids[:, :-2], attention_mask=torch.ones_like(ids[:, :-2]), max_new_tokens=2)
        assert torch.equal(said[0, -2:], ids[0, -2:])
        print(handle.report())
"""
NEEDED = (
    "py.typed",
    "_native.abi3.so",
    "lib/libtokencomp_cpu.so",
    "zoo/weights/",
    "planning/command.py",
    "cli.py",
)


def main(python: str, wheel: str) -> int:
    """Exit status."""
    if not Path(wheel).name.endswith(".whl") or "-cp310-abi3-" not in Path(wheel).name:
        print(f"{wheel}: not a wheel for every Python from 3.10 on")
        return 1
    names = zipfile.ZipFile(wheel).namelist()
    missing = [part for part in NEEDED if not any(f"tokencomp/{part}" in name for name in names)]
    outside = [name for name in names if not name.startswith(("tokencomp/", "tokencomp-"))]
    if missing or outside:
        print(f"{wheel}: missing {missing}, outside the package {outside}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder, wheel]
        subprocess.run([python, *install], check=True)
        env = {**os.environ, "PYTHONPATH": folder}
        for arguments in (
            ["-c", CHECK, folder],
            ["-m", "tokencomp", "info"],
            ["-m", "tokencomp", "methods", "--json"],
            [f"{folder}/bin/tokencomp", "--version"],
            *([["-m", "tokencomp", "demo"]] if _demo_can_run(python) else []),
        ):
            done = subprocess.run(
                [python, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{' '.join(arguments[:3])}: failed\n{done.stderr}")
                return 1
            print("\n".join(done.stdout.splitlines()[:8]))
    size = Path(wheel).stat().st_size / 1e6
    print(f"{Path(wheel).name}: {size:.1f} MB, {len(names)} files, works")
    return 0


def _demo_can_run(python: str) -> bool:
    found = subprocess.run([python, "-c", "import sklearn, PIL"], capture_output=True, check=False)
    if found.returncode:
        print("demo: not tried, no scikit-learn or pillow")
    return not found.returncode


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(
        main(*(str(Path(p).absolute()) for p in (shutil.which(sys.argv[1]) or sys.argv[1], sys.argv[2])))
    )
