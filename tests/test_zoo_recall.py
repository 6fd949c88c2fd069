"""The data of recall-lm: samples are what they claim, seeds decide them, and scores count what is right."""

from typing import Any

import pytest
import torch
from tokencomp.zoo import recall
from torch import Generator, Tensor


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def facts_of(row: Tensor, context: int) -> list[tuple[int, int, int, int]]:
    """``(place, key, value, value)`` of every fact of a row, read from its tokens alone."""
    places = (row[:context] == recall.FACT).nonzero()[:, 0].tolist()
    return [(place, *row[place + 1 : place + 4].tolist()) for place in places]


# ---- copying -----------------------------------------------------------------------------------------------


def test_copying_repeats_distinct_tokens_after_a_random_period() -> None:
    tokens, labels = recall.copying(64, 40, seeded())
    assert tokens.shape == labels.shape == (64, 40)
    assert tokens.dtype == labels.dtype == torch.int64
    assert ((tokens >= recall.KEYS) & (tokens < recall.FILLER)).all()
    periods = set()
    for row, label in zip(tokens, labels, strict=True):
        period = int((label == recall.IGNORE).sum()) - 1  # the token at the period itself cannot be known
        assert len(set(row[:period].tolist())) == period
        assert torch.equal(row[period:], row[:-period])
        assert torch.equal(label[period + 1 :], row[period + 1 :])
        periods.add(period)
    assert min(periods) >= recall.SHORTEST_PERIOD
    assert max(periods) <= 20
    assert len(periods) > 10


def test_copying_of_rows_longer_than_the_vocabulary() -> None:
    tokens, labels = recall.copying(4, 600, seeded())
    assert (labels != recall.IGNORE).sum(1).ge(600 - recall.KEY_COUNT - recall.VALUE_COUNT - 1).all()
    assert tokens.max() < recall.FILLER


# ---- recall ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "facts", "queries"), [(64, 6, 6), (128, 24, 7), (1024, 96, 48), (33, 1, 5)]
)
def test_recall_answers_follow_from_the_facts(length: int, facts: int, queries: int) -> None:
    tokens, labels = recall.recall(3, length, facts, queries, seeded())
    context = length - 4 * queries
    assert tokens.shape == labels.shape == (3, length)
    assert (labels[:, :context] == recall.IGNORE).all()
    for row, label in zip(tokens, labels, strict=True):
        found = facts_of(row, context)
        answers = {key: (first, second) for _, key, first, second in found}
        assert len(found) == len(answers) == facts  # keys are distinct
        assert all(recall.KEYS <= key < recall.VALUES for key in answers)
        assert all(recall.VALUES <= value < recall.FILLER for pair in answers.values() for value in pair)
        assert row[0] == recall.BOS
        inside = torch.zeros(context, dtype=torch.bool)
        inside[0] = True
        for place, *_ in found:
            assert not inside[place : place + 4].any()  # facts do not overlap
            inside[place : place + 4] = True
        assert (row[:context][~inside] >= recall.FILLER).all()
        for question, answer in zip(row[context:].view(-1, 4), label[context:].view(-1, 4), strict=True):
            mark, key, *values = question.tolist()
            assert mark == recall.QUERY
            assert tuple(values) == answers[key]
            assert answer.tolist() == [recall.IGNORE, recall.IGNORE, *values]


@pytest.mark.parametrize("facts", [16, 32])
def test_distinct_questions_are_about_different_facts(facts: int) -> None:
    tokens, labels = recall.recall(32, 256, facts, 16, seeded(), distinct=True)
    asked = tokens[:, 256 - 64 :].view(32, 16, 4)[..., 1]
    assert all(len(set(row.tolist())) == 16 for row in asked)
    assert len({tuple(row.tolist()) for row in asked}) == 32  # in any order
    repeated, _ = recall.recall(32, 256, facts, 16, seeded())
    keys = repeated[:, 256 - 64 :].view(32, 16, 4)[..., 1]
    assert any(len(set(row.tolist())) < 16 for row in keys)  # the test can fail
    for row, label in zip(tokens, labels, strict=True):
        answers = {key: (first, second) for _, key, first, second in facts_of(row, 192)}
        for question in row[192:].view(-1, 4).tolist():
            assert tuple(question[2:]) == answers[question[1]]
        assert torch.equal(label[label != recall.IGNORE], row[192:].view(-1, 4)[:, 2:].flatten())


def test_a_distinct_question_may_be_about_the_needle() -> None:
    tokens, _ = recall.recall(4, 64, 5, 1, seeded(), depth=0.0, distinct=True)
    assert torch.equal(tokens[:, 2:5], tokens[:, -3:])


def test_recall_asks_about_different_facts_in_any_order() -> None:
    tokens, _ = recall.recall(16, 256, 32, 16, seeded())
    asked = tokens[:, 256 - 64 :].view(16, 16, 4)[..., 1]
    assert all(len(set(row.tolist())) > 8 for row in asked)
    places = [[place for place, *_ in facts_of(row, 192)] for row in tokens]
    assert len({tuple(row) for row in places}) == 16


@pytest.mark.parametrize("facts", [1, 20])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_recall_puts_the_needle_at_its_depth(depth: float, facts: int) -> None:
    tokens, labels = recall.recall(5, 204, facts, 2, seeded(), depth=depth)
    context, last = 196, 1 + 4 * 47  # 48 places fit behind BOS
    for row, label in zip(tokens, labels, strict=True):
        found = facts_of(row, context)
        assert len(found) == facts
        asked = row[context + 1]
        (needle,) = [fact for fact in found if fact[1] == asked]
        assert abs(needle[0] - (1 + depth * (last - 1))) <= 2
        for question in row[context:].view(-1, 4).tolist():
            assert question[1:] == list(needle[1:])
        assert (label != recall.IGNORE).sum() == 4


def test_generators_are_functions_of_the_generator() -> None:
    for draw in (
        lambda generator: recall.copying(4, 64, generator),
        lambda generator: recall.recall(4, 128, 16, 8, generator),
        lambda generator: recall.recall(4, 128, 16, 8, generator, depth=0.5),
        lambda generator: recall.recall(4, 128, 16, 8, generator, distinct=True),
    ):
        torch.manual_seed(1)
        first = draw(seeded(3))
        torch.manual_seed(2)
        again, other = draw(seeded(3)), draw(seeded(4))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])
        same = seeded(3)
        assert not torch.equal(draw(same)[0], draw(same)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"facts": 13}, r"1 <= facts <= 7 .*got batch 1 and 13 facts"),
        ({"facts": 0}, "facts"),
        ({"queries": 0}, "queries"),
        ({"queries": 16}, "facts <= 0"),
        ({"batch": 0}, "batch"),
        ({"depth": 1.5}, r"depth must be in \[0, 1\], got 1.5"),
        ({"length": 4096, "facts": 129}, "facts <= 128"),
        ({"distinct": True}, "distinct questions must be <= 3, the facts asked about, got 8"),
        ({"distinct": True, "depth": 0.5}, "distinct questions must be <= 1"),
    ],
)
def test_recall_refuses_what_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"batch": 1, "length": 64, "facts": 3, "queries": 8, "generator": seeded()}
    recall.recall(**good)
    with pytest.raises(ValueError, match=message):
        recall.recall(**(good | arguments))


def test_copying_refuses_rows_without_room() -> None:
    with pytest.raises(ValueError, match="length >= 8, got 1 and 7"):
        recall.copying(1, 7, seeded())


# ---- scores ------------------------------------------------------------------------------------------------


def perfect(labels: Tensor) -> Tensor:
    """Logits that rank every labelled token first."""
    wanted = torch.roll(labels, -1, dims=1).clamp(min=0)
    return torch.nn.functional.one_hot(wanted, recall.VOCABULARY).float()


def test_an_answer_counts_only_if_every_token_is_right() -> None:
    _, labels = recall.recall(3, 64, 6, 5, seeded())
    logits = perfect(labels)
    assert recall.exact_match(logits, labels).tolist() == [True] * 15
    assert recall.hits(logits, labels).tolist() == [True] * 30
    at = int((labels[1] != recall.IGNORE).nonzero()[3])  # second token of the second answer of row 1
    logits[1, at - 1] = 0
    expected = [True] * 15
    expected[5 + 1] = False
    assert recall.exact_match(logits, labels).tolist() == expected
    assert int((~recall.hits(logits, labels)).sum()) == 1
    _, copies = recall.copying(3, 64, seeded())
    logits = perfect(copies)
    logits[2, -2] = 0  # an answer runs to the end of its row
    assert recall.exact_match(logits, copies).tolist() == [True, True, False]
    nothing = torch.full((2, 8), recall.IGNORE)
    assert recall.exact_match(torch.zeros(2, 8, recall.VOCABULARY), nothing).tolist() == []


def test_score_reads_the_model() -> None:
    """A model that knows the answers gets all of them, one that knows none gets none; the seed fixes both."""

    class Oracle:
        def __init__(self, knows: bool) -> None:
            self.knows, self.seen = knows, []

        def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
            self.seen.append(input_ids)
            told = torch.nn.functional.one_hot(torch.roll(input_ids, -1, dims=1), recall.VOCABULARY).float()
            return type("Output", (), {"logits": told if self.knows else -told})

    oracle = Oracle(True)
    exact, single = recall.score(oracle, 64, 6, 5, 3, 9)
    assert exact.tolist() == [True] * 15
    assert single.tolist() == [True] * 30
    assert not recall.score(Oracle(False), 64, 6, 5, 3, 9)[0].any()
    longer = Oracle(True)
    recall.score(longer, 64, 6, 5, 4, 9)
    assert all(torch.equal(a, b) for a, b in zip(oracle.seen, longer.seen[:3], strict=True))
    other = Oracle(True)
    recall.score(other, 64, 6, 5, 3, 10)
    assert not any(torch.equal(a, b) for a, b in zip(oracle.seen, other.seen, strict=True))


def test_scores_of_other_draws() -> None:
    """Whoever repeats what followed the same token last copies rightly, and finds a fact that is alone."""

    def induction(input_ids: Tensor, use_cache: bool) -> Any:
        """What followed the last time that this token was seen."""
        (row,) = input_ids.tolist()
        logits = torch.zeros(1, len(row), recall.VOCABULARY)
        for now in range(len(row)):
            before = [at for at in range(now) if row[at] == row[now]]
            if before:
                logits[0, now, row[before[-1] + 1]] = 1
        return type("Output", (), {"logits": logits})

    right = recall.copying_score(induction, 40, 3, 9)
    _, labels = recall.copying(1, 40, seeded(9))
    assert right.all()
    assert len(right) > int((labels != recall.IGNORE).sum())  # of three rows
    distinct, _ = recall.score(induction, 64, 6, 5, 3, 9, distinct=True)
    assert len(distinct) == 15
    (needle,), (first, second) = recall.score(induction, 200, 1, 1, 1, 9, depth=0.0)
    assert needle
    assert first
    assert second
