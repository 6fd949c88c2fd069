"""The boundaries of the house: where things live, how big they are, and that families are complete."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from backends import ROOT
from tokencomp import methods

CSRC, PACKAGE = ROOT / "csrc", ROOT / "python" / "tokencomp"
FAMILIES = re.findall(r'#include "op/(\w+)\.h"', (CSRC / "ops.cpp").read_text())
SOURCES = {".h", ".cpp", ".cu", ".py", ".cmake", ".sh"}
SKIPPED = {"build", "out", "dist", "lib"}
FILE_LINES, FUNCTION_LINES = 400, 80

# Folders of one family; `core` and a second CUDA file for newer GPUs are optional.
COMPLETE = (
    "csrc/op/{}.h",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "python/tokencomp/ops/{}.py",
    "python/tokencomp/reference/{}.py",
    "tests/test_{}.py",
    "bench/bench_{}.py",
)


def sources() -> list[Path]:
    files = [
        p for top in ("csrc", "python", "tests", "bench", "cmake") for p in sorted((ROOT / top).rglob("*"))
    ]
    return [
        p
        for p in files
        if p.suffix in SOURCES and p.is_file() and not SKIPPED & set(p.relative_to(ROOT).parts)
    ]


def code(path: Path) -> str:
    """The text without comments."""
    text = path.read_text()
    if path.suffix not in {".h", ".cpp", ".cu"}:
        return text
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def holders(pattern: str, files: Iterable[Path]) -> set[str]:
    return {str(p.relative_to(ROOT)) for p in files if re.search(pattern, code(p), flags=re.MULTILINE)}


def allowed(found: set[str], *globs: str) -> None:
    outside = {path for path in found if not any(Path(path).match(glob) for glob in globs)}
    assert not outside, f"only allowed in {', '.join(globs)}"


NATIVE = [p for p in sources() if p.is_relative_to(CSRC)]


def test_there_are_families() -> None:
    assert FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_complete(family: str) -> None:
    missing = [path.format(family) for path in COMPLETE if not (ROOT / path.format(family)).is_file()]
    assert not missing


def test_torch_headers_only_at_the_boundary() -> None:
    found = holders(r"^\s*#\s*include\s*[<\"](torch|ATen|c10)/", NATIVE)
    per_family = [
        f"csrc/{folder}/{family}.{end}"
        for family in FAMILIES
        for folder, end in (("cpu", "cpp"), ("cuda", "cu"))
    ]
    per_family += [f"csrc/cuda/{family}_sm90.cu" for family in FAMILIES]
    assert found, "the pattern finds nothing"
    allowed(
        found,
        "csrc/ops.cpp",
        "csrc/op/*.h",
        "csrc/cpu/parallel.cpp",
        "csrc/host/*",
        "csrc/cuda/arch/launch.h",
        *per_family,
    )


def test_intrinsics_only_in_simd_headers() -> None:
    found = holders(r"immintrin|\b_mm\d*_|\b_tile_|arm_neon", NATIVE)
    assert found, "the pattern finds nothing"
    allowed(found, "csrc/cpu/simd*.h")


def test_assembly_only_in_the_architecture_folder() -> None:
    found = holders(r"\basm\b", NATIVE)
    assert found, "the pattern finds nothing"
    allowed(found, "csrc/cuda/arch/*.h", "csrc/emu/*")


def test_launches_and_shared_memory_only_in_the_architecture_folder() -> None:
    allowed(holders(r"<<<|__shared__", NATIVE), "csrc/cuda/arch/*.h", "csrc/emu/*")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_includes_another(family: str) -> None:
    others = "|".join(other for other in FAMILIES if other != family) or "$^"
    own = [p for p in NATIVE if re.match(rf"{family}(_|\.|$)", p.name)]
    assert own
    assert not holders(rf"#\s*include\s*\"(op|core|cpu|cuda)/({others})[_.]", own)


def test_methods_and_adapters_use_the_wrappers() -> None:
    """Our operators are reached through one module; methods and adapters know only ``tokencomp.ops``."""
    python = [p for p in sources() if p.is_relative_to(PACKAGE)]
    found = holders(r"torch\.ops\b(?!\.tokencomp[.`*]|\.aten\.)", python)
    allowed(found, "python/tokencomp/_load.py", "python/tokencomp/ops/_namespace.py")
    allowed(
        holders(r"getattr\(torch|torch\.ops\.tokencomp\.\w+\(", python), "python/tokencomp/ops/_namespace.py"
    )


def test_adapters_contain_no_maths() -> None:
    adapters = [p for p in sources() if p.is_relative_to(PACKAGE / "adapters")]
    maths = r"\b(softmax|matmul|einsum|bmm|topk|argsort|cdist|normalize|sqrt|exp|log)\(|[\w)\]] *@ *\w"
    assert re.search(maths, "q @ k.mT")
    assert not re.search(maths, "x\n@property")
    assert not holders(maths, [p for p in adapters if not p.name.startswith("__")])


def test_one_file_a_method() -> None:
    shared = {"__init__", "attention", "base", "layers", "matching", "pruning", "schedule"}
    shared |= {"eviction", "kv", "kv_attention", "prompts", "quantizing", "sparse", "sparse_select", "visual"}
    shared |= {"decoder", "decoder_attention", "density"}
    shared |= {"encoder"}
    files = {p.stem for p in (PACKAGE / "methods").glob("*.py")} - shared
    assert {entry.cls.__module__.rpartition(".")[2] for entry in methods.all_methods()} == files


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_size_budget(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = (node.end_lineno or 0) - node.lineno + 1 - len(docstring.splitlines())
                assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_nothing_names_a_machine() -> None:
    folders = r"(?<![\w.])/(home|work|root|Users|mnt|tmp/\w)[/\w]"
    hosts = r"\bhttps?://(?!arxiv\.org|github\.com|pytorch\.org)[\w.]*"
    here = Path(__file__).name
    assert not holders(f"{folders}|{hosts}", [p for p in sources() if p.name != here])
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *(ROOT / "bench").glob("*.md"), ROOT / "Makefile"]
    assert not holders(folders, [p for p in texts if p.is_file()])


def test_every_public_function_is_documented() -> None:
    python = [p for p in sources() if p.is_relative_to(PACKAGE) and p.name != "__main__.py"]
    missing = []
    for path in python:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(path.name)
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{path.name}: {node.name}")
    assert not missing
