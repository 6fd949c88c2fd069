"""The trainer of recall-lm: its draws are what they claim, the loss falls, and an interrupted run goes on."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import ROOT
from torch import Generator, Tensor

pytest.importorskip("transformers", reason="the model is from transformers")
pytest.importorskip("safetensors", reason="weights are saved with safetensors")
sys.path.insert(0, str(ROOT / "bench" / "zoo"))

import recall_scores
import train_recall_lm
from tokencomp.zoo import recall, text
from train_recall_lm import Part, Run, Stage

STAGES = (
    Stage((Part("copying", 16, 16, 256),), 0.3),  # left after its first step: the average starts at 0.5
    Stage((Part("recall", 64, 64, 128),), 0.3),
    Stage((Part("varied recall", 64, 96, 192), Part("text", 32, 48, 96)), steps=2, new_bytes=True),
    Stage((Part("far recall", 64, 96, 192), Part("copying", 16, 24, 64)), steps=4, rate=0.5),
)
STEPS = [1, 1, 2, 4]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of seconds, with a cheap score that rises and falls."""

    def pick(model: Any) -> tuple[float, str]:
        return model.lm_head.weight.sum().sin().item(), "score"

    monkeypatch.setattr(train_recall_lm, "STAGES", STAGES)
    monkeypatch.setattr(train_recall_lm, "WARM_UP", 2)
    monkeypatch.setattr(train_recall_lm, "CHECK_EVERY", 1)
    monkeypatch.setattr(train_recall_lm, "pick", pick)


def told(run: Run) -> dict[str, Any]:
    """All of a run that must not depend on where it was interrupted."""
    state: dict[str, Any] = {name: getattr(run, name) for name in ("step", "tokens", "ema", "stage_steps")}
    state |= {"best": run.best, "best_step": run.best_step, "generator": run.generator.get_state().tolist()}
    for name, weights in (("model", run.model.state_dict()), ("best", run.best_model)):
        state |= {f"{name}.{key}": value.tolist() for key, value in weights.items() if "layers.1" in key}
    return state


@pytest.mark.usefixtures("short")
def test_a_run_in_pieces_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after every step, each piece in a new object, across stages and checks; to the bit."""
    straight = Run(1)
    train_recall_lm.train(straight, float("inf"), tmp_path / "straight.pt")
    assert straight.stage_steps == STEPS
    assert straight.step == sum(STEPS)
    path, pieces = tmp_path / "pieces.pt", 0
    run = Run(1)
    while not run.is_done:
        run = Run(1)
        if path.exists():
            run.load(path)
        train_recall_lm.train(run, 1e-6, path)
        pieces += 1
    assert pieces >= straight.step
    assert told(run) == told(straight)
    other = Run(2)
    train_recall_lm.train(other, float("inf"), tmp_path / "other.pt")
    assert told(other) != told(straight)
    with pytest.raises(ValueError, match=r"pieces\.pt is of a run with seed 1, not 2"):
        Run(2).load(path)
    monkeypatch.setattr(train_recall_lm, "STAGES", STAGES[1:])
    with pytest.raises(ValueError, match=r"pieces\.pt is of a run with schedule"):
        Run(1).load(path)


@pytest.mark.usefixtures("short")
def test_the_best_weights_are_those_of_the_best_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.7, 0.3, 0.2])
    seen: list[Tensor] = []

    def pick(model: Any) -> tuple[float, str]:
        seen.append(model.lm_head.weight.detach().clone())
        return next(scores), "score"

    monkeypatch.setattr(train_recall_lm, "pick", pick)
    run = Run(1)
    train_recall_lm.train(run, float("inf"), tmp_path / "run.pt")
    assert (run.best, run.best_step) == (0.7, sum(STEPS[:3]) + 2)
    assert torch.equal(run.best_model["lm_head.weight"], seen[1])
    assert not torch.equal(run.best_model["lm_head.weight"], seen[3])


def test_the_loss_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_recall_lm, "STAGES", (Stage((Part("copying", 16, 16, 256),)),))
    monkeypatch.setattr(train_recall_lm, "WARM_UP", 2)
    run = Run(1)
    losses = [run.train_step()["copying"][0][0] for _ in range(7)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.usefixtures("short")
def test_bytes_start_anew_with_the_stage_that_has_text() -> None:
    """Their rows and those rows' moments alone; the output rows are then no longer all alike."""
    run = Run(1)
    for run.stage in (0, 1):
        for _ in range(3):
            run.train_step()
    head = run.model.lm_head.weight
    before, parameters = head.detach().clone(), run.adam.state[head]
    run.advance()
    assert run.stage == 2
    assert torch.equal(head[: recall.BYTES], before[: recall.BYTES])
    assert (head[recall.BYTES :] != before[recall.BYTES :]).all()
    for moment in ("exp_avg", "exp_avg_sq"):
        assert (parameters[moment][recall.BYTES :] == 0).all()
        assert (parameters[moment][: recall.BYTES] != 0).any()
    kept = head.detach().clone()
    run.advance()
    assert torch.equal(head, kept)


def test_the_rate_warms_up_and_falls_over_stages_of_fixed_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_recall_lm, "STAGES", (STAGES[0], Stage(STAGES[0].parts, steps=100, rate=0.5)))
    run = Run(0)
    rates = []
    for run.step in (0, 24, 49, 1000):
        rates.append(run.rate())
    assert rates == pytest.approx([0.02, 0.5, 1.0, 1.0])
    run.stage = 1
    last = train_recall_lm.FINAL_RATE
    for run.stage_step, expected in ((0, 0.5), (50, (0.5 + last) / 2), (100, last)):
        assert run.rate() == pytest.approx(expected)


@pytest.mark.parametrize("length", [64, 100, 512, 2048])
def test_varied_recall_varies(length: int) -> None:
    """Single questions at both ends and between, many questions, distinct ones, few facts and many."""
    generator = Generator().manual_seed(length)
    queries, facts, places = set(), set(), []
    for _ in range(300):
        tokens, labels = train_recall_lm.varied_recall(1, length, generator)
        assert tokens.shape == (1, length)
        asked = int((tokens == recall.QUERY).sum())
        assert int((labels != recall.IGNORE).sum()) == 2 * asked
        queries.add(asked)
        facts.add(int((tokens == recall.FACT).sum()))
        if asked == 1:
            key = tokens[0, -3]
            places.append(int((tokens[0] == key).nonzero()[0]) / length)
    assert min(queries) == 1
    assert max(queries) >= min(64, length // 8) - 2
    assert max(facts) >= 0.9 * min(recall.KEY_COUNT, (length - 5) // 4)
    assert min(facts) < 0.5 * max(facts)
    first, last = 2 / length, (length - 4) / length - 6 / length
    assert sum(place <= first for place in places) > 3
    assert sum(place >= last for place in places) > 3
    assert sum(0.25 < place < 0.75 for place in places) > 10


@pytest.mark.parametrize("length", [64, 100, 512, 2048])
def test_far_recall_asks_for_the_very_first_fact(length: int) -> None:
    generator = Generator().manual_seed(length)
    counts = set()
    for _ in range(40):
        (row,), (label,) = train_recall_lm.far_recall(1, length, generator)
        facts = int((row == recall.FACT).sum())
        assert row.shape == label.shape == (length,)
        counts.add(facts)
        stated = row[1 : 1 + 4 * facts].view(facts, 4)
        asked = row[length - 4 * facts :].view(facts, 4)
        assert (stated[:, 0] == recall.FACT).all()
        assert (asked[:, 0] == recall.QUERY).all()
        assert sorted(stated[:, 1:].tolist()) == sorted(asked[:, 1:].tolist())
        between = row[1 + 4 * facts : length - 4 * facts]
        assert ((between >= recall.FILLER) & (between < recall.BYTES)).all()
        wanted = torch.full_like(asked, recall.IGNORE)
        wanted[:, 2:] = asked[:, 2:]
        assert torch.equal(label[length - 4 * facts :], wanted.flatten())
        assert (label[: length - 4 * facts] == recall.IGNORE).all()
    assert max(counts) > 0.8 * min(64, (length - 1) // 8)
    assert min(counts) < 0.3 * min(64, (length - 1) // 8)


def test_text_is_drawn_from_the_training_split() -> None:
    tokens, _ = train_recall_lm.draw(Part("text", 64, 64, 256), Generator().manual_seed(0))
    assert tokens.shape == (4, 64)
    train, held_out = (text.corpus(split).numpy().tobytes() for split in text.SPLITS)
    for row in tokens:
        piece = bytes((row[1:] - recall.BYTES).tolist())
        assert piece in train
        assert piece not in held_out


def test_every_part_fills_its_tokens() -> None:
    for stage in train_recall_lm.STAGES:
        for part in stage.parts:
            for seed in range(3):
                tokens, _ = train_recall_lm.draw(part, Generator().manual_seed(seed))
                assert part.shortest <= tokens.shape[1] <= part.longest
                assert part.tokens - tokens.shape[1] < tokens.numel() <= part.tokens


def test_a_missed_goal_is_told() -> None:
    good: list[dict[str, Any]] = [
        {"task": "recall", "length": 1024, "score": 0.98},
        {"task": "recall", "length": 7, "score": 0.1},  # no goal
    ]
    assert recall_scores.missed(good, recall_scores.GOALS) == []
    bad = [*good, {"task": "needle", "length": 2048, "depth": 0.5, "score": 0.9}]
    said = recall_scores.missed(bad, recall_scores.GOALS)
    assert said == ["needle at 2048 tokens, depth 0.5: 0.9000 < 0.93"]
    assert recall_scores.missed(bad, recall_scores.NEEDED) == []
