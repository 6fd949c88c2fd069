"""Data of recall-lm: copying, and recall of facts scattered in filler, drawn from a ``torch.Generator``.

Everything is one vocabulary of 512 tokens: BOS, FACT and QUERY marks, 128 keys, 64 values, 56 of filler, and
256 for the bytes of ``tokencomp.zoo.text``.
``labels`` follow the Hugging Face convention: the label at position t is the token at position t, to be
predicted from the tokens before it; IGNORE where nothing is asked.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

VOCABULARY = 512
BOS, FACT, QUERY = 0, 1, 2
KEYS, KEY_COUNT = 8, 128  # tokens 8..135
VALUES, VALUE_COUNT = 136, 64  # tokens 136..199
FILLER = 200  # tokens 200..255
BYTES = 256  # token 256 + b is byte b of text
IGNORE = -100
FACT_TOKENS = 4  # FACT key value value; a question is as long: QUERY key value value
SHORTEST_PERIOD = 4


def copying(batch: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows of distinct keys and values that repeat after a random period: ``(tokens, labels)``.

    Both ``[batch, length]`` int64. Each row draws its period p from ``[4, length // 2]`` (at most 192, there
    being no more distinct tokens); labels start at position p + 1, the first that can be known.

    Raises ValueError for ``batch < 1`` or ``length < 8``.
    """
    if batch < 1 or length < 2 * SHORTEST_PERIOD:
        raise ValueError(f"copying: batch must be >= 1 and length >= 8, got {batch} and {length}")
    distinct = KEY_COUNT + VALUE_COUNT
    longest = min(length // 2, distinct)
    period = torch.randint(SHORTEST_PERIOD, longest + 1, (batch, 1), generator=generator)
    order = torch.rand(batch, distinct, generator=generator).argsort(dim=1) + KEYS
    position = torch.arange(length)
    tokens = order.gather(1, position % period)
    return tokens, torch.where(position > period, tokens, IGNORE)


def recall(
    batch: int,
    length: int,
    facts: int,
    queries: int,
    generator: Generator,
    depth: float | None = None,
    distinct: bool = False,
) -> tuple[Tensor, Tensor]:
    """Associative recall of several facts: ``(tokens, labels)``, both ``[batch, length]`` int64.

    A row is BOS, then filler with ``facts`` facts (FACT key value value, keys distinct) at random places that
    do not overlap, then ``queries`` questions (QUERY key value value) about facts drawn with replacement. The
    two values of each question are labelled, everything else is IGNORE.

    With ``depth`` in [0, 1] one fact, the needle, lies at that share of the way from the first place to the
    last, and every question is about it; the other facts are distractors (none for ``facts=1``).

    With ``distinct`` no two questions are about the same fact, so that no answer can be read off an earlier
    one. Then ``queries`` is at most ``facts``, and 1 with ``depth``, which has one fact to ask about.

    Raises ValueError where the facts do not fit, are more than there are keys, or too few for the questions.
    """
    context = length - queries * FACT_TOKENS
    places = (context - 1) // FACT_TOKENS
    if batch < 1 or queries < 1 or not 1 <= facts <= min(places, KEY_COUNT):
        raise ValueError(
            f"recall: needs batch >= 1, queries >= 1 and 1 <= facts <= {max(0, min(places, KEY_COUNT))} in "
            f"{length} tokens with {queries} queries, got batch {batch} and {facts} facts"
        )
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"recall: depth must be in [0, 1], got {depth!r}")
    askable = facts if depth is None else 1
    if distinct and queries > askable:
        raise ValueError(
            f"recall: distinct questions must be <= {askable}, the facts asked about, got {queries}"
        )
    tokens = torch.randint(FILLER, BYTES, (batch, length), generator=generator)
    tokens[:, 0] = BOS
    keys = torch.rand(batch, KEY_COUNT, generator=generator).argsort(dim=1)[:, :facts] + KEYS
    values = torch.randint(VALUES, VALUES + VALUE_COUNT, (batch, facts, 2), generator=generator)
    entries = torch.cat([torch.full((batch, facts, 1), FACT), keys[..., None], values], dim=2)

    rank = torch.rand(batch, places, generator=generator)
    if depth is not None:
        rank[:, round(depth * (places - 1))] = -1.0  # sorts first: the place of fact 0, the needle
    start = rank.argsort(dim=1)[:, :facts] * FACT_TOKENS + 1
    where = start[..., None] + torch.arange(FACT_TOKENS)
    tokens.scatter_(1, where.flatten(1), entries.flatten(1))

    if distinct:
        asked = torch.rand(batch, askable, generator=generator).argsort(dim=1)[:, :queries]
    else:
        asked = torch.randint(0, askable, (batch, queries), generator=generator)
    questions = entries.gather(1, asked[..., None].expand(-1, -1, FACT_TOKENS)).clone()
    questions[..., 0] = QUERY
    tokens[:, context:] = questions.flatten(1)
    answers = torch.full_like(questions, IGNORE)
    answers[..., 2:] = questions[..., 2:]
    labels = torch.full_like(tokens, IGNORE)
    labels[:, context:] = answers.flatten(1)
    return tokens, labels


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Which labelled tokens the model ranks first: ``[labelled]`` bool, row after row.

    ``logits`` ``[B, T, V]`` of all positions, ``labels`` ``[B, T]``.
    """
    target = labels[:, 1:]
    asked = target != IGNORE
    return logits[:, :-1].argmax(dim=-1)[asked] == target[asked]


def exact_match(logits: Tensor, labels: Tensor) -> Tensor:
    """Which answers are right in every token: ``[answers]`` bool, row after row.

    An answer is a run of labelled tokens; ``logits`` and ``labels`` are those of ``hits``. The true first
    value is given when the second is asked, but an answer counts only if both are right, as it does when
    it is generated greedily.
    """
    asked = labels[:, 1:] != IGNORE
    before = torch.nn.functional.pad(asked, (1, 0))[:, :-1]
    run = (asked & ~before).flatten().cumsum(0)[asked.flatten()] - 1
    right = hits(logits, labels)
    wrong = torch.zeros(int(run[-1]) + 1 if len(run) else 0, dtype=torch.int64, device=labels.device)
    return wrong.scatter_add_(0, run, (~right).long()) == 0


def score(
    model: Callable[..., Any],
    length: int,
    facts: int,
    queries: int,
    rows: int,
    seed: int,
    depth: float | None = None,
    distinct: bool = False,
) -> tuple[Tensor, Tensor]:
    """Answers of a causal language model to ``recall`` of ``rows`` rows drawn from ``seed``.

    Returns bool ``exact_match`` ``[rows * queries]`` and ``hits`` ``[rows * queries * 2]``. One row at a
    time, so that the same seed with more rows begins with the same samples.
    """

    def row(generator: Generator) -> tuple[Tensor, Tensor]:
        return recall(1, length, facts, queries, generator, depth, distinct)

    answers = [(exact_match(*answer), hits(*answer)) for answer in _answers(model, row, rows, seed)]
    exact, single = zip(*answers, strict=True)
    return torch.cat(exact), torch.cat(single)


def copying_score(model: Callable[..., Any], length: int, rows: int, seed: int) -> Tensor:
    """``hits`` of a causal language model on ``copying`` of ``rows`` rows drawn from ``seed``."""

    def row(generator: Generator) -> tuple[Tensor, Tensor]:
        return copying(1, length, generator)

    return torch.cat([hits(*answer) for answer in _answers(model, row, rows, seed)])


@torch.no_grad()
def _answers(
    model: Callable[..., Any],
    row: Callable[[Generator], tuple[Tensor, Tensor]],
    rows: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """``(logits, labels)`` of each of ``rows`` rows."""
    generator = Generator().manual_seed(seed)
    for _ in range(rows):
        tokens, labels = row(generator)
        yield model(input_ids=tokens, use_cache=False).logits, labels
