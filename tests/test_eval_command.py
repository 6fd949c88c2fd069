"""``python -m tokencomp eval``, run as users run it and with what they may get wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokencomp import cli
from tokencomp.eval import Table, known
from tokencomp.zoo import base

pytest.importorskip("transformers", reason="the zoo needs the extra hf")
pytest.importorskip("rich", reason="tables need the extra eval")
pytest.importorskip("matplotlib", reason="plots need the extra eval")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
ADAPTIVE = {"aim", "core_matching", "must_drop", "prumerge", "tcc", "todre_stage2"}
QUICK = ["eval", "--model", "digits-vit", "--samples", "3", "--budgets", "0.1,0.5"]


def test_command_prints_a_table_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, "--methods", "random,divprune", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "digits-vit, digits: accuracy, 3 answers in 3 samples" in said.out
    assert "uncompressed on the card: 0.97" in said.out
    names = ["digits-vit_digits.json", "digits-vit_digits_kept.png", "digits-vit_digits_quality.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    table = Table.from_json((tmp_path / "out" / names[0]).read_text())
    methods = ["none", *["random"] * 2, *["stride"] * 2, *["divprune"] * 2]
    assert [row.method for row in table.rows] == methods


def test_command_prints_json(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*QUICK, "--methods", "none", "--seed", "5", "--json"]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    table = Table.from_json(json.dumps(content))
    assert (table.seed, table.samples) == (5, 3)
    assert {row.method for row in table.rows} == {"none", "random", "stride"}
    assert not list(tmp_path.iterdir())


def test_command_runs_all_methods_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Each once for each of two tasks; the command's other options are tested with fewer."""
    arguments = ["eval", "--model", "digits-vlm", "--task", "cell", "is", "--samples", "2"]
    assert cli.main([*arguments, "--budgets", "0.2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [table["task"] for table in content] == ["cell", "is"]
    names = [row["method"] for row in content[0]["rows"]]
    assert names == ["none", *known("visual")]
    assert {row["method"] for row in content[0]["rows"] if row["adaptive"]} == ADAPTIVE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "nobody"],
            "name must be one of ['digits-vit', 'digits-vlm', 'recall-lm'], got 'nobody'",
        ),
        (
            ["--task", "cell", "colour"],
            "--task must be one of ['cell', 'count', 'is', 'largest', 'all'], got 'colour'",
        ),
        (["--methods", "random,h2o"], f"one of {['none', *known('visual')]}, got 'h2o'"),
        (
            ["--budgets", "0.1,half"],
            "--budgets must be numbers in (0, 1] separated by commas, got '0.1,half'",
        ),
        (["--budgets", "0.1,2"], "got '0.1,2'"),
        (["--device", "cuda"], "--device must be cpu where PyTorch sees no GPU, got 'cuda'"),
        (["--samples", "1"], "--samples must be >= 2, got 1"),
    ],
)
def test_command_lists_what_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["eval", "--model", "digits-vlm", *options]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize(
    ("missing", "extra"),
    [("rich", "eval"), ("matplotlib", "eval"), ("transformers", "hf"), ("sklearn.datasets", "demo")],
)
def test_command_names_the_missing_extra(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    missing: str,
    extra: str,
) -> None:
    from tokencomp.zoo import digits

    digits.bank.cache_clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main([*QUICK, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert f"pip install 'tokencomp[{extra}]'" in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_reports_damaged_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in base.WEIGHTS.glob("digits-vit.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "digits-vit.safetensors").open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(base, "WEIGHTS", tmp_path)
    assert cli.main(QUICK) == 1
    assert "checksum" in capsys.readouterr().err


def test_all_missing_extras_are_named_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("rich", "safetensors", "sklearn"):
        monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["eval", "--model", "digits-vit"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "eval needs rich, safetensors, scikit-learn: pip install 'tokencomp[eval,hf,demo]' ("
    )
    assert said.count("\n") == 1


def test_importing_the_package_needs_no_extra() -> None:
    extras = "{'transformers', 'rich', 'matplotlib', 'sklearn'}"
    script = f"import sys, tokencomp.cli; print({extras} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
