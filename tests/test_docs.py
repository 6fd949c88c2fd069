"""Every Python block of the README and of docs runs, and prints what stands below it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokencomp import methods, methods_table, operators_reference, ops

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```\n(.*?)```\n)?", re.S)
NUMBERS = re.compile(r"\d+\.\d+ s\b|\d+\.\d+ ms\b")


# One process a page: importing takes longer than most blocks. Names, folder and seed are each block's own.
RUN = """
import contextlib, io, json, os, sys, torch
torch.set_num_threads(2)
seed, printed = torch.initial_seed(), []
for number, code in enumerate(json.load(sys.stdin)):
    torch.manual_seed(seed)
    os.chdir(sys.argv[1])
    os.mkdir(f"{number}")
    os.chdir(f"{number}")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, f"<block {number}>", "exec"), {"__name__": "__main__"})
    printed.append(said.getvalue())
json.dump(printed, sys.stdout)
"""


def blocks(page: Path) -> list[tuple[str, str | None]]:
    """Code, and what it prints where that is shown."""
    return [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]


def without_times(text: str) -> str:
    return NUMBERS.sub("# s", text).strip()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="models need the extra hf")
    pytest.importorskip("PIL", reason="pictures need the extra demo")
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, timeout=600,
        input=json.dumps([code for code, _ in blocks(page)]),
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for (code, shown), printed in zip(blocks(page), json.loads(run.stdout), strict=True):
        if shown is not None:
            assert without_times(printed) == without_times(shown), code


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 250


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_methods_is_that_of_the_registry() -> None:
    """``python -m tokencomp methods --markdown docs`` after a change."""
    assert (ROOT / "docs" / "methods.md").read_text() == methods_table.markdown()
    readme = (ROOT / "README.md").read_text()
    assert methods_table.MARKS[0] in readme
    assert readme == methods_table.with_short(readme)
    pages = methods_table.pages()
    assert {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} == set(pages)
    for group, page in pages.items():
        assert (ROOT / "docs" / "methods" / f"{group}.md").read_text() == page
        assert page.count("\n") <= 400, f"{group}: make two groups of it"
    named = re.findall(r"^## (\w+)$", "".join(pages.values()), re.M)
    assert sorted(named) == sorted(entry.name for entry in methods.all_methods())


def test_marks_are_filled_and_nothing_else_changes() -> None:
    begin, end = methods_table.MARKS
    filled = methods_table.with_short(f"a\n{begin}old\n{end}\nb\n")
    assert filled == f"a\n{begin}\n{methods_table.short()}{end}\nb\n"
    assert methods_table.with_short(filled) == filled
    assert methods_table.with_short("no marks") == "no marks"


def test_the_reference_of_operators_is_that_of_the_docstrings() -> None:
    """``python -m tokencomp operators --markdown docs/operators`` after a change."""
    pages = operators_reference.pages()
    assert {page.stem for page in (ROOT / "docs" / "operators").glob("*.md")} == set(pages)
    for family, page in pages.items():
        assert (ROOT / "docs" / "operators" / f"{family}.md").read_text() == page
    assert sorted(re.findall(r"^## (\w+)$", "".join(pages.values()), re.M)) == sorted(ops.__all__)
