"""The evaluation: intervals, bytes and peaks are what they claim, on tiny models and by hand."""

import dataclasses
import io
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tokencomp import eval as evaluation
from tokencomp.eval import Estimate, Report, Row, Table, baselines, compressors, evaluate, plots
from tokencomp.eval.kv import Cached
from tokencomp.eval.progress import progress
from tokencomp.zoo import tasks

# ---- compressors -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Custom:
    """A compressor from outside, which keeps everything and says half."""

    name: str = "custom"

    def apply(self, model: Any, budget: float, *, seed: int) -> AbstractContextManager[Any]:
        return nullcontext(self)

    def report(self) -> Report:
        return Report(24, (12.0, 6.0))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressors, "_registry", dict(compressors._registry))


def test_kinds_of_models() -> None:
    made = [tiny_models.llama(), tiny_models.vit(), tiny_models.llava()]
    assert [compressors.kind_of(model) for model in made] == ["keys", "patches", "visual"]
    with pytest.raises(TypeError, match="Llama, ViT or LLaVA, got Linear"):
        compressors.kind_of(torch.nn.Linear(1, 1))


def is_cached(name: str) -> bool:
    """Methods on pages: test_eval_kv.py."""
    return isinstance(compressors.get("keys", name), Cached)


@pytest.mark.usefixtures("registry")
def test_registered_compressors_are_found_by_name() -> None:
    assert [name for name in evaluation.known("keys") if not is_cached(name)] == ["random", "stride", "ends"]
    assert evaluation.known("visual")[:4] == ["random", "stride", "aim", "aim_merge"]
    assert {"todre", "divprune", "zoo_prune", "downsampling"} < set(evaluation.known("visual"))
    evaluation.register("keys", Custom())
    named = [name for name in evaluation.known("keys") if not is_cached(name)]
    assert named == ["random", "stride", "custom", "ends"]
    assert compressors.get("keys", "custom") == Custom()
    with pytest.raises(ValueError, match="name must be new for keys, got 'custom'"):
        evaluation.register("keys", Custom())
    with pytest.raises(ValueError, match="name must be new for keys, got 'none'"):
        evaluation.register("keys", Custom("none"))
    with pytest.raises(ValueError, match=r"kind must be one of \['keys', 'patches', 'visual'\], got 'x'"):
        evaluation.register("x", Custom())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one of \['none', 'random', 'stride', 'aim', .*, got 'custom'"):
        compressors.get("visual", "custom")


@pytest.mark.parametrize("kind", compressors.KINDS)
def test_reference_compressors_keep_what_they_report(kind: compressors.Kind) -> None:
    model = {"keys": tiny_models.llama, "patches": tiny_models.vit, "visual": tiny_models.llava}[kind]()
    image = torch.full((1, 16), tiny_models.IMAGE)
    inputs: dict[str, Any] = (
        {} if kind == "patches" else {"input_ids": image if kind == "visual" else image // 2}
    )
    if kind != "keys":
        inputs["pixel_values"] = torch.randn(1, 3, 32, 32)
    for name in evaluation.known(kind):
        if not isinstance(compressors.get(kind, name), baselines.KeysOnce | baselines.TokensOnce):
            continue  # test_eval_encoders.py, test_eval_kv.py
        kept = {}
        for seed in (0, 0, 1):
            with compressors.get(kind, name).apply(model, 0.3, seed=seed) as handle, torch.no_grad():
                with pytest.raises(RuntimeError, match="nothing to report"):
                    handle.report()
                model(**inputs)
                report = handle.report()
            assert report is not None
            assert report.total == 16
            assert set(report.kept) == {5.0}  # round(0.3 * 16)
            assert report.index is not None
            assert kept.setdefault(seed, report.index.tolist()) == report.index.tolist()
        assert (kept[0] != kept[1]) == (name == "random")


def test_padded_rows_keep_none_of_their_padding() -> None:
    model, mask = tiny_models.llama(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :8] = 0
    for name in evaluation.known("keys"):
        if is_cached(name):
            continue
        compressor = compressors.get("keys", name)
        with compressor.apply(model, 0.5, seed=0), torch.no_grad():
            model(input_ids=torch.ones(2, 20, dtype=torch.long), attention_mask=mask)
        with (
            compressor.apply(model, 0.9, seed=0),
            pytest.raises(ValueError, match="a row with 12 tokens without padding cannot keep 18"),
        ):
            model(input_ids=torch.ones(2, 20, dtype=torch.long), attention_mask=mask)


# ---- evaluate ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_table() -> Table:
    """Loss on bytes, of an untrained model with the vocabulary of text."""
    task = tasks.Text("text", prompt=40, scored=12)
    return evaluate(tiny_models.llama(512), task, ["ends", Custom()], (0.25, 0.5), samples=4, name="tiny")


def test_baselines_are_always_there(text_table: Table) -> None:
    found = [(row.method, row.budget) for row in text_table.rows]
    expected = [(m, b) for m in ("random", "stride", "ends", "custom") for b in (0.25, 0.5)]
    assert found == [("none", 1.0), *expected]
    assert not text_table.higher_is_better
    assert text_table.answers == 4 * 12
    with pytest.raises(KeyError, match=r"no row of 'other' at 0\.5"):
        text_table.row("other", 0.5)


def test_rows_say_what_was_measured(text_table: Table) -> None:
    none = text_table.row("none")
    assert none.kv_bytes == 2 * 3 * 2 * 40 * 8 * 4  # k and v, layers, heads, tokens, channels, float32
    assert (none.tokens_kept, none.tokens_total) == (40, 40)
    assert none.versus_random is None
    assert none.versus_none == Estimate(0.0, 0.0, 0.0)
    for method in ("random", "stride", "ends"):
        row = text_table.row(method, 0.25)
        assert row.kv_bytes == none.kv_bytes / 4
        assert row.kv_bytes <= 0.26 * none.kv_bytes
        assert (row.tokens_kept, row.kept_per_layer) == (10, (10.0, 10.0, 10.0))
        assert row.versus_none.mean == pytest.approx(row.score.mean - none.score.mean)
        assert row.peak_bytes > row.kv_bytes
    random = text_table.row("random", 0.5)
    assert random.versus_random is None
    against = text_table.row("ends", 0.5).versus_random
    assert against is not None
    assert against.mean == pytest.approx(text_table.row("ends", 0.5).score.mean - random.score.mean)
    custom = text_table.row("custom", 0.5)
    assert (custom.tokens_kept, custom.tokens_total, custom.kept_per_layer) == (9, 24, (12, 6))
    assert custom.scores == none.scores
    assert all(row.prefill_ms > 0 and row.decode_ms for row in text_table.rows)


def test_text_loss_is_that_of_one_forward(text_table: Table) -> None:
    model, task = tiny_models.llama(512), tasks.Text("text", prompt=40, scored=12)
    for sample, score in zip(task.samples(4, task.seed), text_table.row("none").scores, strict=True):
        assert sample.after is not None
        tokens = torch.cat([sample.prompt["input_ids"], sample.after], 1)
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, 40:-1]
        assert score == pytest.approx(
            torch.nn.functional.cross_entropy(logits, tokens[0, 41:]).item(), rel=1e-5
        )


def without_times(table: Table) -> list[Row]:
    return [dataclasses.replace(row, prefill_ms=0.0, decode_ms=0.0) for row in table.rows]


def test_the_seed_decides_everything_but_times(text_table: Table) -> None:
    model, task = tiny_models.llama(512), tasks.Text("text", prompt=40, scored=12)
    state = torch.random.get_rng_state()
    again = evaluate(model, task, ["ends", Custom()], (0.25, 0.5), samples=4, name="tiny", show=False)
    assert without_times(again) == without_times(text_table)
    assert torch.equal(state, torch.random.get_rng_state())
    other = evaluate(model, task, [], (0.25,), samples=4, seed=99, show=False)
    assert other.row("none").scores != text_table.row("none").scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compressors": ["todre"]}, r"one of \['none', 'random', 'stride', .*'ends'.*\], got 'todre'"),
        ({"budgets": (0.0,)}, r"in \(0, 1\], got 0.0"),
        ({"budgets": (1.5,)}, r"in \(0, 1\], got 1.5"),
        ({"budgets": ()}, "not be empty"),
        ({"samples": 1}, ">= 2 samples, got 1"),
    ],
)
def test_evaluate_refuses_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_models.llama(), tasks.Copying("copying"), **options)


def test_needles_fill_a_table_by_depth() -> None:
    task = tasks.Needle("needle", length=64, facts=6)
    drawn = task.samples(6, 0)
    assert [sample.group for sample in drawn] == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]
    table = evaluate(tiny_models.llama(512), task, (), (0.5,), samples=10, show=False)
    assert all(list(row.groups) == ["0", "0.25", "0.5", "0.75", "1"] for row in table.rows)
    later = tasks.Needle("later", length=64, facts=6, unseen=2).samples(6, 0)
    for seen, unseen in zip(drawn, later, strict=True):
        assert unseen.after is not None
        whole = torch.cat([unseen.prompt["input_ids"], unseen.after], 1)
        assert torch.equal(seen.prompt["input_ids"], whole)
        assert torch.equal(seen.answer, unseen.answer)


# ---- results -----------------------------------------------------------------------------------------------


def test_json_round_trip(text_table: Table) -> None:
    assert Table.from_json(text_table.to_json()) == text_table
    with pytest.raises(ValueError, match="format must be 1"):
        Table.from_json('{"format": 2}')


def test_printed_table(text_table: Table) -> None:
    pytest.importorskip("rich", reason="tables need the extra eval")
    out = io.StringIO()
    dataclasses.replace(text_table, card_score=0.5, card_samples=77).print(out)
    said = out.getvalue()
    assert "tiny, text: loss (nats per token), 48 answers in 4 samples" in said
    assert "uncompressed on the card: 0.5000 of 77" in said
    none = text_table.row("none")
    assert f"{none.score.mean:.3f} [{none.score.low:.3f}, {none.score.high:.3f}]" in said
    assert f"{none.kv_bytes:,.0f}" in said
    assert all(method in said for method in ("random", "stride", "ends", "custom"))


def point(method: str, cost: float, score: float) -> Row:
    exact = Estimate(score, score, score)
    return Row(method, 0.5, exact, exact, None, 1, 2, (1.0,), cost * 1024, 1.0, 1.0, 1, 1, (score,))


@pytest.mark.parametrize("sign", [1, -1])
def test_pareto_front_by_hand(text_table: Table, sign: int) -> None:
    points = [("a", 1, 0.1), ("b", 2, 0.5), ("c", 2, 0.4), ("d", 3, 0.5), ("e", 4, 0.9), ("f", 5, 0.8)]
    rows = tuple(point(method, cost, sign * score) for method, cost, score in points)
    table = dataclasses.replace(text_table, rows=rows, higher_is_better=sign > 0)
    assert [row.method for row in plots.pareto(table)] == ["a", "b", "e"]


def picture(path: Path) -> np.ndarray[Any, Any]:
    from matplotlib.image import imread

    return np.asarray(imread(path))


def test_plots_are_drawn(text_table: Table, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra eval")
    groups = {"0": 0.25, "0.5": 0.5, "1": 1.0}
    image = torch.rand(3, 32, 32)
    rows = [dataclasses.replace(row, groups=groups, kept_tokens=(0, 5, 6)) for row in text_table.rows]
    table = dataclasses.replace(text_table, rows=tuple(rows), grid=(4, 4), picture=image, group_label="depth")
    written = table.save(tmp_path / "new")
    names = ["tiny_text.json", "tiny_text_quality.png", "tiny_text_kept.png", "tiny_text_groups.png"]
    assert [path.name for path in written] == names
    assert Table.from_json(written[0].read_text()) == table
    for path in written[1:]:
        drawn = picture(path)
        assert min(drawn.shape[:2]) > 300
        assert len(np.unique(drawn.reshape(-1, drawn.shape[2]), axis=0)) > 50
    assert [path.name for path in text_table.save(tmp_path)] == names[:2]


def test_many_methods_have_a_panel_each(text_table: Table) -> None:
    """So that lines can be told apart; kept tokens go on below, and groups have a line a method."""
    pytest.importorskip("matplotlib", reason="plots need the extra eval")
    some = text_table.row("random", 0.5)
    names = ["random", "stride", *(f"method {i}" for i in range(plots.MANY))]
    rows = [text_table.row("none"), *(dataclasses.replace(some, method=name) for name in names)]
    rows.append(dataclasses.replace(some, method="own", budget=1.0, adaptive=True))
    rows = [dataclasses.replace(row, groups={"is": 1.0, "cell": 0.5}) for row in rows]
    image = torch.rand(3, 32, 32)
    table = dataclasses.replace(text_table, rows=tuple(rows), grid=(4, 4), picture=image)

    titles = [axes.get_title() for axes in plots.quality(table).axes if axes.get_visible()]
    assert titles == [*names[2:], "own"]
    shown = [axes.get_title() for axes in plots.overlay(table).axes if axes.get_title()]
    assert shown == ["all tokens", *names[: plots.MANY], "all tokens", *names[plots.MANY :]]
    panel, _ = plots.heat_map(table).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["none", *names]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["is", "cell"]


def test_overlay_dims_what_is_dropped() -> None:
    image = np.full((8, 8, 3), 0.5, dtype=np.float32)
    shown = plots._dimmed(image, (0, 3), (2, 2))
    kept = np.kron(np.eye(2), np.ones((4, 4))).astype(bool)
    assert (shown[kept] == 0.5).all()
    assert (shown[~kept] != 0.5).all()


# ---- progress and extras -----------------------------------------------------------------------------------


def test_progress_is_silent_when_short_and_says_lines_when_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 3))
    with progress("short", 3) as advance:
        for _ in range(3):
            advance()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("tokencomp.eval.progress.time.monotonic", lambda: next(now))
    for show in (True, False):
        with progress("long", 10, show) as advance:
            for _ in range(10):
                advance()
        assert ("long: 1 of 10, about " in capsys.readouterr().err) == show


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="bars need the extra eval")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, now = Terminal(), iter(range(10_000))
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("tokencomp.eval.progress.time.monotonic", lambda: next(now))
    with progress("work", 9) as advance:
        for _ in range(9):
            advance()
    assert "work" in terminal.getvalue()
    assert "9/9" in terminal.getvalue()


@pytest.mark.parametrize(("missing", "call"), [("rich", "print"), ("matplotlib", "save")])
def test_missing_extras_are_named_in_one_line(
    text_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, call: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ImportError, match=rf"^eval needs {missing}: pip install 'tokencomp\[eval\]'"
    ) as caught:
        text_table.print(io.StringIO()) if call == "print" else text_table.save(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
