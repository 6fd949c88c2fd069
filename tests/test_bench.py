"""The benches' own tools: how noisy a time is, which ratios got worse, what a run writes."""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import bench_model
import check
import common
import run
import scaling
from common import Ceilings, Row, Seconds

CEILINGS = Ceilings(40.0, 20.0, 200.0, 800.0)


def rows(ours: float, peer: float, noise: float = 0.0) -> list[Row]:
    return [
        Row("topk", "small", "tokencomp", Seconds(ours, noise), 0.0, 8e6),
        Row("topk", "small", "sort", peer, 0.0, 8e6, baseline=True),
    ]


def document(*args: Any, **kwargs: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(common.document("cpu", {"topk": CEILINGS}, rows(*args, **kwargs)))
    return found


def test_noise_is_what_odd_and_even_repeats_disagree_by(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 4.0, 3.0, 5.0])
    monkeypatch.setattr(common, "_seconds", lambda call, device: next(times))
    found = common.interleaved_seconds({"a": lambda _: None}, "cpu", repeats=4)["a"]
    assert found == 2.0
    assert Row("f", "c", "n", found, 0.0, 0.0).noise == 1.0  # 2 and 4
    times = iter([2.0, 4.0, 3.0])
    found = common.median_seconds(lambda _: None, "cpu", repeats=3)
    assert found == 3.0
    assert Row("f", "c", "n", found, 0.0, 0.0).noise == 0.5  # 2.5 and 4
    assert common.estimate([2.0], min).noise == 0.0


def test_ceilings_are_the_higher_ones_of_before_and_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([Ceilings(40.0, 20.0, 150.0, 800.0), Ceilings(30.0, 25.0, 200.0, 700.0)])
    monkeypatch.setattr(common, "measure_ceilings", lambda device: next(found))
    assert common.beside_ceilings("cpu", lambda: 7) == (7, Ceilings(40.0, 25.0, 200.0, 800.0))


def test_clock_of_the_processor() -> None:
    with common.clock(processor=True):
        seconds = common.median_seconds(lambda _: time.sleep(0.02), "cpu", repeats=3)
        assert seconds < 0.01
        assert common.machine("cpu")["clock"].startswith("processor")
    assert common.machine("cpu")["clock"] == "wall"
    assert common.median_seconds(lambda _: time.sleep(0.02), "cpu", repeats=3) > 0.01


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others do as they like")
@pytest.mark.parametrize(("kept", "pages"), [(True, range(64)), (False, range(16384, 20000))])
def test_freed_memory_stays_in_the_process(kept: bool, pages: range) -> None:
    script = """
import resource, sys
sys.path.insert(0, "bench")
import torch, common
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[1] == "True":
    assert common.keep_freed_memory()
for _ in range(4):
    torch.zeros(1 << 26, dtype=torch.int8)
before = faults()
torch.zeros(1 << 26, dtype=torch.int8)
print(faults() - before)
"""
    options: Any = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
    found = subprocess.run([sys.executable, "-c", script, str(kept)], **options)
    assert int(found.stdout) in pages


def test_results_are_one_line_a_row() -> None:
    text = common.document("cpu", {"topk": CEILINGS}, rows(1.0, 2.0, 0.25))
    found = json.loads(text)
    assert sum(line.startswith("  {") for line in text.splitlines()) == 2
    assert found["rows"][0] == {
        "family": "topk", "case": "small", "name": "tokencomp", "seconds": 1.0, "flops": 0.0, "bytes": 8e6,
        "baseline": False, "tokens": 0.0, "held": 0.0, "peak": 0.0, "noise": 0.25,
    }  # fmt: skip
    assert found["ceilings"]["topk"]["copy_alone_gbytes"] == 20.0
    assert json.loads(common.document("cpu", {}, []))["rows"] == []


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        ((1.0, 4.0), (1.0, 4.0), 0),
        ((1.0, 4.0), (1.0, 3.3), 0),  # 17 % less
        ((1.0, 4.0), (1.3, 4.0), 1),
        ((1.0, 4.0), (1.0, 3.0), 1),  # the peer got faster
        ((1.0, 4.0), (0.5, 4.0), 0),
        ((1.0, 4.0), (1.3, 4.0, 0.1), 0),  # 23 % less, 10 % of it noise
        ((1.0, 4.0, 0.1), (1.3, 4.0), 0),
        ((1.0, 4.0, 0.1), (2.0, 4.0, 0.1), 1),
    ],
)
def test_worse(old: tuple[float, ...], new: tuple[float, ...], status: int, capsys: Any) -> None:
    assert check.compare(document(*old), document(*new)) == status
    assert ("worse: topk: small: tokencomp x sort 4.00 -> " in capsys.readouterr().out) == bool(status)


def test_limit() -> None:
    assert check.compare(document(1.0, 4.0), document(1.1, 4.0), 0.05) == 1


def test_what_cannot_be_compared(capsys: Any) -> None:
    old, new = document(1.0, 4.0), document(1.0, 4.0)
    new["machine"]["threads"] = "64"
    assert check.compare(old, new) == 2
    assert "threads is 64, was" in capsys.readouterr().out
    new = document(1.0, 4.0)
    new["rows"][0]["case"] = new["rows"][1]["case"] = "large"
    assert check.compare(old, new) == 2
    new["rows"] += old["rows"]
    assert check.compare(new, old) == 0
    assert "topk: 1 ratios, on average 1.00 of before; 1 not measured any more" in capsys.readouterr().out


def test_check_reads_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    files[0].write_text(json.dumps(document(1.0, 4.0)))
    files[1].write_text(json.dumps(document(2.0, 4.0)))
    monkeypatch.setattr(sys, "argv", ["check.py", *map(str, files)])
    assert check.main() == 1
    monkeypatch.setattr(sys, "argv", ["check.py", *map(str, reversed(files))])
    assert check.main() == 0


def test_table_of_models_has_tokens_and_bytes() -> None:
    found = common.table([Row("m", "prompt", "a", 0.5, 0.0, 0.0, tokens=100, held=3e6, peak=5e6)], CEILINGS)
    assert found.splitlines()[0] == "| case |  | ms | tokens/s | cache MB | peak MB |"
    assert found.splitlines()[2] == "| prompt | a | 500.000 | 200.0 | 3.00 | 5 |"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks")
def test_peak_is_what_was_held_at_once_inside() -> None:
    found: list[float] = []
    with common.peak_bytes("cpu", found):
        _ = torch.ones(1 << 24) + torch.ones(1 << 24)  # 64 MiB each
    with common.peak_bytes("cpu", found):
        torch.ones(1 << 23)
    assert [round(size / 2**25) for size in found] == [6, 1]


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two benches, one of which fails; results go to the folder."""
    monkeypatch.setitem(sys.modules, "bench_topk", SimpleNamespace(run=lambda *_, **__: rows(1.0, 4.0)))

    def fail(*_: Any, **__: Any) -> None:
        raise SystemExit("topk: not what the reference selects")

    monkeypatch.setitem(sys.modules, "bench_score", SimpleNamespace(run=fail))
    monkeypatch.setattr(run, "HERE", tmp_path / "bench")
    monkeypatch.setattr(run, "families", lambda: ["score", "topk"])
    monkeypatch.setattr(common, "measure_ceilings", lambda device: CEILINGS)
    return tmp_path / "bench"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", *arguments])
    return run.main()


def test_run_goes_on_after_a_failure(benches: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch) == 1
    text = (benches / "RESULTS.md").read_text()
    assert "**Failed: score.**" in text
    assert "| small | tokencomp | 1000.000 | 4.00 |" in text
    assert "peers besides torch: transformers " in text
    assert "failed: score" in capsys.readouterr().out


def test_run_compares_with_what_was_kept(benches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = benches / "results" / "cpu.json"
    assert call(monkeypatch, "--only", "topk", "--json", str(kept)) == 0
    assert call(monkeypatch, "--only", "topk") == 0
    assert not (benches / "RESULTS.md").exists()  # a part goes elsewhere
    assert (benches.parent / "build" / "bench" / "RESULTS.md").exists()
    monkeypatch.setitem(sys.modules, "bench_topk", SimpleNamespace(run=lambda *_, **__: rows(2.0, 4.0)))
    assert call(monkeypatch, "--only", "topk") == 1
    assert call(monkeypatch, "--skip", "score") == 1
    for unknown in (("--only", "toopk"), ("--skip", "scores")):
        with pytest.raises(SystemExit):
            call(monkeypatch, *unknown)


def test_every_bench_has_a_command() -> None:
    for name in run.families():
        text = (ROOT / "bench" / f"bench_{name}.py").read_text()
        assert "raise SystemExit(command(run, __doc__" in text, name
        assert "argparse" not in text, name


def test_order_is_that_of_large_sizes() -> None:
    sizes = [2**i for i in range(8, 14)]
    assert scaling.order({n: 1e-9 * n**2 for n in sizes}) == pytest.approx(2.0)
    assert scaling.order({n: 1e-3 + 1e-12 * n for n in sizes}) == pytest.approx(0.0, abs=0.01)
    assert scaling.order({n: 1e-3 if n < 2000 else 1e-9 * n for n in sizes}) == pytest.approx(1.0)


def test_curves_that_are_too_steep(tmp_path: Path) -> None:
    curves = {"paged_decode": {n: 1e-6 * n for n in (1, 2, 4)}, "sdpa": {n: 1e-6 * n**3 for n in (1, 2, 4)}}
    assert scaling.too_steep({"decode": curves}) == []
    steep = {"decode": curves | {"of 512 slots": {n: 1e-6 * n for n in (1, 2, 4)}}}
    assert scaling.too_steep(steep) == ["decode: of 512 slots grows with order 1.00, designed for 0"]
    assert "| decode | sdpa | tokens | 1 to 4 | 0.001 to 0.064 | 3.00 | peer |" in list(scaling.table(steep))
    scaling.draw(steep, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("family", scaling.FAMILIES, ids=lambda family: family.name)
def test_curves_of_a_family_run(family: scaling.Family) -> None:
    calls = family.calls(512 if family.along == "tokens" else family.sizes[0])
    assert list(calls) == list(family.orders)
    for call in calls.values():
        call(0)


def test_model_from_prompt_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: bench_model.METHODS[name] for name in ("all kept", "KeyDiff, 25 %")}
    small = bench_model.Stack("small", 128, 128, 2, 4, 2, (1024,), rounds=2)
    changed = {"STEPS": 3, "METHODS": chosen, "stacks": lambda device, quick: [small]}
    for name, value in changed.items():
        monkeypatch.setattr(bench_model, name, value)
    found = {(row.case[:6], row.name): row for row in bench_model.run("cpu", quick=True, checked=True)}
    assert found["answer", "tokencomp all kept"].tokens == 3
    exact, kept = (found["prompt", f"tokencomp {name}"].held for name in chosen)
    of_a_token = 2 * 2 * small.hkv * small.D * 2  # keys and values of two layers
    assert found["prompt", "DynamicCache"].held == of_a_token * (1024 + 3)
    assert found["prompt", "DynamicCache, float32"].held == 2 * found["prompt", "DynamicCache"].held
    assert kept < 0.5 * exact


def test_stacks_have_the_sizes_they_are_named_for() -> None:
    small, large = bench_model.stacks("cpu", quick=False)
    assert (large.hidden, large.inner, large.hq, large.hkv, large.D) == (4096, 14336, 32, 8, 128)
    assert bench_model.stacks("cuda", quick=False)[1].layers == 32
    few = bench_model.contenders(None, whole=False)
    assert [name for name in few if name.startswith("tokencomp")] == [
        f"tokencomp {n}" for n in bench_model.FEW
    ]
    assert set(few) < set(bench_model.contenders(None, whole=small.whole))
