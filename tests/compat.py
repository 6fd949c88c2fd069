"""Runs the tests that depend on versions under several of torch and transformers, also ``make compat``:

    python tests/compat.py PYTHON [PYTHON ...] [-- PYTEST OPTION ...]

Each PYTHON is an interpreter, from 3.10 on, with pytest and another torch or transformers; the libraries are
those of the checkout, since they use stable ABIs.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPERATORS = (
    "test_native.py", "test_page_pool.py", "test_topk.py", "test_kcenter.py", "test_merge.py",
    "test_attention.py", "test_opcheck.py", "test_integrations_kv.py", "test_integrations_visual.py",
)  # fmt: skip
MODELS = (
    "test_adapters_llm.py", "test_adapters_llm_caches.py", "test_adapters_llm_quant.py",
    "test_adapters_llm_wrapped.py", "test_zoo.py",
    "test_adapters_vit.py", "test_adapters_vit_state.py", "test_adapters_vit_errors.py",
    "test_adapters_vit_zoo.py", "test_adapters_vlm_families.py", "test_adapters_vlm_cut.py",
    "test_adapters_vlm.py", "test_adapters_attention.py", "test_sparse_models.py", "test_planning.py",
)  # fmt: skip
ASK = """
import importlib.util, sys, torch, pytest
name = "none"
if importlib.util.find_spec("transformers"):
    import transformers
    name = transformers.__version__
print(f"python {sys.version_info[0]}.{sys.version_info[1]} torch {torch.__version__} transformers {name}")
"""


def main(arguments: list[str]) -> int:
    """Exit status: 0 where all pass."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    pythons, options = arguments[:cut], arguments[cut + 1 :]
    if not pythons:
        print(__doc__)
        return 2
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    failed = False
    for python in pythons:
        asked = subprocess.run([python, "-c", ASK], env=env, capture_output=True, text=True, check=False)
        if asked.returncode:
            print(f"{python}: cannot be used\n{asked.stderr}")
            return 1
        said, begin = asked.stdout.strip(), time.monotonic()
        files = OPERATORS if said.endswith("none") else (*OPERATORS, *MODELS)
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not emu"]
        command += [*options, *(f"tests/{name}" for name in files)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-300:]]
        print(f"{said}: {last[0]} ({time.monotonic() - begin:.0f} s)", flush=True)
        if done.returncode:
            failed = True
            print(
                "\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
