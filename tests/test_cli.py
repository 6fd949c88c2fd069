"""The command line, run as users run it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokencomp
import torch
from backends import ROOT
from tokencomp import cli, methods, ops

PACKAGE = Path(tokencomp.__file__).resolve().parent.parent


def run(*arguments: str, folder: Path, blocked: str = "") -> subprocess.CompletedProcess[str]:
    """``python -m tokencomp``, optionally with one package hidden."""
    hide = f"import sys; sys.modules[{blocked!r}] = None; " if blocked else "import sys; "
    program = (
        hide
        + f"sys.argv = ['tokencomp', *{arguments!r}]; "
        + "import runpy; runpy.run_module('tokencomp', run_name='__main__')"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_demo_prints_tables_and_draws_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("sklearn")
    done = run("demo", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    pictures = re.findall(r"picture: (\S+)", done.stdout)
    assert pictures == ["out/demo_china.png", "out/demo_flower.png"]
    for picture in pictures:
        with image.open(tmp_path / picture) as sheet:
            assert sheet.width > 3 * 640
            assert sheet.height > 2 * 416
            assert len(sheet.convert("RGB").getcolors(1 << 24)) > 10_000  # photographs, not blank panels
    radius = {
        name: float(r)
        for name, r in re.findall(r"^  (k-center|random|uniform).*?(\d\.\d{3})", done.stdout, re.M)
    }
    assert radius["k-center"] < min(radius["random"], radius["uniform"])
    assert len(re.findall(r"x faster than the PyTorch loop", done.stdout)) == 2


@pytest.mark.slow
def test_demo_as_json(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    pytest.importorskip("sklearn")
    done = run("demo", "--json", "--keep", "0.05", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [photo["picture"] for photo in said["photos"]] == ["out/demo_china.png", "out/demo_flower.png"]
    for photo in said["photos"]:
        assert photo["kept"] == round(0.05 * photo["tokens"])
        assert len(photo["quality"]["random"]) == 20
    assert {table["model"] for table in said["models"]} == {"recall-lm", "digits-vit", "digits-vlm"}


@pytest.mark.parametrize("missing", ["sklearn.datasets", "PIL"])
def test_demo_says_what_it_needs(tmp_path: Path, missing: str) -> None:
    done = run("demo", folder=tmp_path, blocked=missing)
    assert done.returncode == 1
    assert "demo: needs scikit-learn and pillow" in done.stderr
    assert "pip install 'tokencomp[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_refuses_a_bad_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--keep", "0"]) == 2
    assert "--keep must be in (0, 1], got 0.0" in capsys.readouterr().err


def test_info_names_back_ends_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert tokencomp.__version__ in said
    assert re.search(r"^cpu back end +loaded$", said, re.M)
    assert re.search(r"^cuda back end +(loaded|not loaded: .+)$", said, re.M)
    assert re.search(
        rf"^instruction set +{tokencomp.cpu_features()['active']} \(available: scalar", said, re.M
    )


def test_info_as_json_lists_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["torch"] == torch.__version__
    schemas = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tokencomp::")
    }
    assert set(said["operators"]) == {name.split(".")[0] for name in schemas}
    assert all("cpu" in back_ends for back_ends in said["operators"].values())
    assert said["back_ends"]["cuda"]["loaded"] == all("cuda" in b for b in said["operators"].values())


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--json"]) == 0
    said = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert list(said) == [method.name for method in methods.all_methods()]
    knobs = {knob["name"]: knob for knob in said["snapkv"]["knobs"]}
    assert knobs["window"] == {
        "name": "window", "required": False, "default": 32,
        "help": "last queries that score; their tokens always stay",
    }  # fmt: skip


def test_methods_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    said = capsys.readouterr().out
    for entry in methods.all_methods():
        source = f"arXiv {entry.paper}" if entry.paper else "baseline"
        assert f"{entry.name}  ({entry.cls.__name__}, {source})" in said
        assert all(knob.help in said for knob in entry.knobs)


def test_the_installed_command_is_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert '\n[project.scripts]\ntokencomp = "tokencomp.__main__:run"\n' in project
    from tokencomp.__main__ import run

    monkeypatch.setattr("sys.argv", ["/somewhere/bin/tokencomp", "methods", "nothing like it"])
    assert run() == 2
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/tokencomp", "no such command"])
    with pytest.raises(SystemExit):
        run()
    assert "usage: tokencomp " in capsys.readouterr().err


def test_one_method_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "snapkv", "h2o"]) == 0
    said = capsys.readouterr().out
    assert said.count("arXiv") == 2
    assert "snapkv  (SnapKV, arXiv 2404.14469)" in said
    assert cli.main(["methods", "h2o", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == ["h2o"]
    assert cli.main(["methods", "SnapKv"]) == 2
    assert "got name 'SnapKv' (did you mean 'snapkv'?), expected" in capsys.readouterr().err


def test_no_command_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert "usage: python -m tokencomp" in said
    assert "what fits" in said


def test_an_old_pytorch_is_named(tmp_path: Path) -> None:
    program = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.9.1'); import tokencomp"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stderr.splitlines()[-1] == "ImportError: tokencomp needs PyTorch >= 2.10, found 2.9.1"


def test_operators_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["operators", "--json"]) == 0
    said = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert sorted(said) == sorted(ops.__all__)
    assert said["topk_select"]["family"] == "topk"
    assert said["topk_select"]["schema"].startswith("tokencomp::topk_select(Tensor score, ")


def test_a_reader_may_go(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = f"{sys.executable} -m tokencomp methods | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["frobnicate"])
    assert stop.value.code == 2
    assert "invalid choice: 'frobnicate'" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_writes_results(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--quick", "--check", "--out", "RESULTS.md"]
    done = run("bench", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "RESULTS.md").read_text()
    assert "- cpu: " in said
    assert "## kcenter" in said
    assert "Quick run" in said


def test_bench_outside_a_checkout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(ROOT / "elsewhere" / "python" / "tokencomp" / "cli.py"))
    assert cli.main(["bench"]) == 1
    assert "this installation is not in one" in capsys.readouterr().err


def test_a_missing_build_is_one_readable_error(tmp_path: Path) -> None:
    """A checkout that was never built: the first import says how to build it."""
    package = tmp_path / "tokencomp"
    package.mkdir()
    for name in ("__init__.py", "_load.py"):
        (package / name).write_text((PACKAGE / "tokencomp" / name).read_text())
    done = subprocess.run(
        [sys.executable, "-c", "import tokencomp"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "ImportError: tokencomp: the native module is not usable" in done.stderr
    assert "pip install -e . --no-build-isolation" in done.stderr


def test_demo_quality_by_hand() -> None:
    demo = pytest.importorskip("tokencomp.demo")
    x = torch.tensor([[[1.0, 0], [0, 2], [3, 3]]])
    kept, _ = ops.kcenter_greedy(x, 2, first="index0")
    assert kept.tolist() == [[0, 1]]
    measured = demo.quality(x, kept[0].long())
    assert measured.radius == pytest.approx(1 - 0.5**0.5)
    assert measured.similarity == pytest.approx((2 + 0.5**0.5) / 3)
