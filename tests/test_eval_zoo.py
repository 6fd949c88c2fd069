"""The tasks of the models that ship: uncompressed they score as the cards say, and baselines cost quality."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from tokencomp import zoo
from tokencomp.eval import Bootstrap, Table, evaluate
from tokencomp.zoo import digits, recall, tasks

pytest.importorskip("transformers", reason="the zoo needs the extra hf")
BUDGETS = (0.1, 0.3, 0.6)
SAMPLES = {"recall-lm": 4, "digits-vit": 48, "digits-vlm": 32}
TASKS = {"recall-lm": ["recall-card"], "digits-vit": ["digits"], "digits-vlm": ["cell"]}


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    if any(name.startswith("digits") for name in zoo.names()):
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return {name: zoo.load(name) for name in zoo.names()}


@pytest.fixture(scope="module")
def tables(loaded: dict[str, Any]) -> list[Table]:
    found = []
    for name, chosen in TASKS.items():
        model, known = loaded[name]
        for task in chosen:
            found.append(evaluate(model, known[task], (), BUDGETS, samples=SAMPLES[name], name=name))
    return found


def test_there_are_tasks_for_every_model(loaded: dict[str, Any]) -> None:
    assert set(TASKS) == set(loaded)
    for name, (_, known) in loaded.items():
        assert set(TASKS[name]) <= set(known)
        assert any(task.usual for task in known.values())
        assert all(key == task.name for key, task in known.items())
    assert list(loaded["digits-vlm"][1]) == [*digits.KINDS, "all"]


def test_recall_is_scored_as_for_the_card(loaded: dict[str, Any]) -> None:
    """The same seed gives the same rows, and prompt, steps and the rest at once the same answers."""
    model, known = loaded["recall-lm"]
    task = known["recall-card"]
    exact, _ = recall.score(model, task.length, task.facts, task.queries, 2, task.seed)
    found = [task.run(model, sample) for sample in task.samples(2, task.seed)]
    assert torch.equal(torch.cat(found), exact.double())
    card = next(entry for entry in zoo.card("recall-lm")["scores"] if entry["length"] == task.length)
    assert (task.card_score, task.card_samples, task.seed) == (card["score"], card["samples"], card["seed"])


def test_recall_asks_about_distinct_facts(loaded: dict[str, Any]) -> None:
    sample = loaded["recall-lm"][1]["recall"].samples(1, 0)[0]
    assert sample.after is not None
    questions = sample.after.view(-1, recall.FACT_TOKENS)
    assert (questions[:, 0] == recall.QUERY).all()
    assert len(questions[:, 1].unique()) == len(questions)
    assert (sample.prompt["input_ids"] != recall.QUERY).all()


@pytest.mark.parametrize("kind", digits.KINDS)
def test_questions_are_scored_as_for_the_card(loaded: dict[str, Any], kind: str) -> None:
    model, known = loaded["digits-vlm"]
    task = known[kind]
    batch = digits.vlm_batch(kind, tasks.DRAWN, torch.Generator().manual_seed(task.seed))
    found = [task.run(model, sample) for sample in task.samples(12, task.seed)]
    assert torch.equal(torch.cat(found), digits.vlm_matches(model, batch).double()[:12])


def test_all_questions_take_turns(loaded: dict[str, Any]) -> None:
    known = loaded["digits-vlm"][1]
    mixed = known["all"].samples(10, 3)
    for i, sample in enumerate(mixed):
        alone = known[digits.KINDS[i % 4]].samples(3, 3)[i // 4]
        assert torch.equal(sample.prompt["input_ids"], alone.prompt["input_ids"])
        assert torch.equal(sample.prompt["pixel_values"], alone.prompt["pixel_values"])
        assert (sample.group, alone.group) == (digits.KINDS[i % 4], None)
    assert known["all"].card_score == zoo.card("digits-vlm")["scores"][0]["score"]
    assert not known["all"].usual


def test_canvases_are_scored_as_for_the_card(loaded: dict[str, Any]) -> None:
    model, known = loaded["digits-vit"]
    task = known["digits"]
    found = torch.cat([task.run(model, sample) for sample in task.samples(tasks.DRAWN, task.seed)])
    assert found.mean().item() == digits.vit_accuracy(model, tasks.DRAWN, task.seed)
    more = task.samples(70, task.seed)
    assert torch.equal(more[3].prompt["pixel_values"], task.samples(4, task.seed)[3].prompt["pixel_values"])
    assert len(more) == 70


def test_uncompressed_scores_are_those_of_the_cards(tables: list[Table]) -> None:
    """On the first samples of the card: within 3 sigma of a binomial."""
    for table in tables:
        assert table.card_score is not None
        score, count = table.card_score, table.answers
        margin = 3 * math.sqrt(max(score * (1 - score), 1 / count) / count)
        assert abs(table.row("none").score.mean - score) <= margin, f"{table.model}, {table.task}"


@pytest.mark.parametrize("method", ["random", "stride"])
def test_baselines_degrade_with_the_budget(tables: list[Table], method: str) -> None:
    """Fewer tokens are never better by more than the interval of the paired difference; 10 % is worse."""
    for table in tables:
        rows = [table.row(method, budget) for budget in BUDGETS] + [table.row("none")]
        resampling = Bootstrap(table.samples, 0)
        for fewer, more in itertools.pairwise(rows):
            gain = resampling.difference(np.array(more.scores), np.array(fewer.scores))
            assert gain.high >= 0, f"{table.model}, {table.task}: {fewer.budget} beats {more.budget}"
            assert fewer.tokens_kept < more.tokens_kept
            assert fewer.kv_bytes is None or more.kv_bytes is None or fewer.kv_bytes < more.kv_bytes
    lost = [table.row("random", BUDGETS[0]).versus_none.high for table in tables]
    assert max(lost) < 0, "a tenth of the tokens, at random, is worse beyond doubt on every task"


def test_bytes_follow_the_budget(tables: list[Table]) -> None:
    table = next(table for table in tables if table.model == "recall-lm")
    none = table.row("none")
    assert none.kv_bytes is not None
    for row in table.rows:
        assert row.kv_bytes == round(row.budget * 832) / 832 * none.kv_bytes
    vit = next(table for table in tables if table.model == "digits-vit")
    assert all(row.kv_bytes is None and row.decode_ms is None for row in vit.rows)
    assert vit.row("random", 0.1).peak_bytes < 0.5 * vit.row("none").peak_bytes
    assert len(vit.row("random", 0.1).kept_tokens) == 26
