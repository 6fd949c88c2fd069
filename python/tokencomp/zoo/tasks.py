"""What the models that ship are judged on: small tasks in one shape, for the evaluation of any compressor.

A task draws samples from a seed and runs a model on one of them through its stock forward alone, so that
whatever acts on the model from outside (hooks, a context manager, a cache) takes part. It reports to a meter
when the prompt and the decoding run and which cache the prompt left; scores are what it returns.

Where a task measures what the model's card does, the same seed gives the same samples, and the uncompressed
score is the card's.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Generator, Tensor

from tokencomp.zoo import digits, recall, text

Metric = Literal["exact match", "accuracy", "loss"]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SINGLE = 4  # tokens of a given continuation that are fed one by one, the rest at once
DRAWN = 64  # digit canvases are drawn by so many, as for the cards
SEED = 7
VIT_GRID = 16  # patches a side


class Meter(Protocol):
    """What a task reports to while it runs."""

    def phase(self, name: str, tokens: int) -> AbstractContextManager[None]:
        """Around a forward: ``prefill`` or ``decode`` of ``tokens`` tokens."""

    def holds(self, cache: Any) -> None:
        """The cache as the prompt left it."""


class NoMeter:
    """Measures nothing."""

    def phase(self, name: str, tokens: int) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def holds(self, cache: Any) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class Sample:
    """One prompt of batch 1, and what is expected after it."""

    prompt: dict[str, Tensor]  # keyword arguments of the model's forward
    tokens: int  # that a compressor may drop
    answer: Tensor  # labels, or the tokens to generate
    after: Tensor | None = None  # [1, T] tokens that are fed after the prompt
    group: float | str | None = None  # for tables by group: the needle's depth, the kind of question
    grid: tuple[int, int] | None = None  # rows and columns of image tokens in ``pixel_values``


@dataclass(frozen=True)
class Task(ABC):
    """A way to draw samples and to score a model on one; see the module."""

    name: str
    samples_default: int = 16
    seed: int = SEED
    card_score: float | None = None  # of the uncompressed model, where its card measures the same
    card_samples: int = 0
    usual: bool = True  # run where no task is named
    metric: ClassVar[Metric] = "exact match"
    group_label: ClassVar[str] = ""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""
        return self.metric != "loss"

    @property
    def unit(self) -> str:
        """The metric with its unit, as axes are labelled."""
        return "loss (nats per token)" if self.metric == "loss" else self.metric

    @abstractmethod
    def samples(self, count: int, seed: int) -> list[Sample]:
        """The first ``count`` samples of ``seed``: more of them begin with the same."""

    @abstractmethod
    def score(self, model: Any, sample: Sample, meter: Meter) -> Tensor:
        """Scores of one sample, see ``run``."""

    @torch.no_grad()
    def run(self, model: Any, sample: Sample, meter: Meter | None = None) -> Tensor:
        """``[m]`` float64 on the CPU: the scores of one sample, one for each question or token."""
        scores = self.score(model, sample, meter or NoMeter())
        return scores.detach().double().cpu().flatten()


def _prefill(model: Any, sample: Sample, meter: Meter, **options: Any) -> Any:
    prompt = {name: value.to(model.device) for name, value in sample.prompt.items()}
    tokens = prompt["input_ids"].shape[1]
    with meter.phase("prefill", tokens):
        output = model(**prompt, use_cache=True, logits_to_keep=1, **options)
    meter.holds(output.past_key_values)
    return output


def greedy(model: Any, sample: Sample, count: int, meter: Meter) -> Tensor:
    """``[count]`` tokens the model continues the prompt with, each its first choice."""
    output = _prefill(model, sample, meter)
    if sample.after is not None and sample.after.shape[1] > 0:
        with meter.phase("append", sample.after.shape[1]):
            ids = sample.after.to(model.device)
            output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
    said = [output.logits[:, -1].argmax(-1, keepdim=True)]
    while len(said) < count:
        with meter.phase("decode", 1):
            output = model(input_ids=said[-1], past_key_values=output.past_key_values, use_cache=True)
            said.append(output.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(said, dim=1)[0].cpu()


def given(model: Any, sample: Sample, meter: Meter) -> Tensor:
    """Logits ``[1, T, V]`` of the tokens ``after`` the prompt: the first few one by one, then all others."""
    assert sample.after is not None
    cache, tokens = _prefill(model, sample, meter).past_key_values, sample.after.to(model.device)
    single = min(SINGLE, tokens.shape[1])
    logits = []
    for step in range(single):
        with meter.phase("decode", 1):
            output = model(input_ids=tokens[:, step : step + 1], past_key_values=cache, use_cache=True)
        logits.append(output.logits)
    if single < tokens.shape[1]:
        with meter.phase("append", tokens.shape[1] - single):
            logits.append(model(input_ids=tokens[:, single:], past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1).cpu()


def _split(tokens: Tensor, labels: Tensor, at: int) -> Sample:
    """A row of given tokens whose first ``at`` are the prompt."""
    return Sample({"input_ids": tokens[:, :at]}, at, labels[:, at:], tokens[:, at:])


@dataclass(frozen=True)
class Recall(Task):
    """Facts in filler are the prompt; then come questions, so that none is known when keys are dropped."""

    length: int = 1024
    facts: int = 96
    queries: int = 48
    distinct: bool = True  # questions about different facts; without it as ``recall.score`` draws them

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Rows of ``recall.recall``, each drawn by itself."""
        generator = Generator().manual_seed(seed)
        context = self.length - self.queries * recall.FACT_TOKENS
        made = [
            recall.recall(1, self.length, self.facts, self.queries, generator, distinct=self.distinct)
            for _ in range(count)
        ]
        return [_split(*row, context) for row in made]

    def score(self, model: Any, sample: Sample, meter: Meter) -> Tensor:
        """Whether each answer is right in both values."""
        return recall.exact_match(given(model, sample, meter), sample.answer)


@dataclass(frozen=True)
class Needle(Task):
    """One fact among others is asked for at the end of the prompt and decoded greedily.

    So that methods that look at the question can. The prompt runs uncompressed and so gives the first value
    itself, and the question's own keys hold what it found; what is measured is the second value, and both
    have to be right. With ``unseen`` the question is fed after the keys were dropped. Samples take turns in
    depth.
    """

    length: int = 1024  # of the prompt and the answer's two tokens
    facts: int = 96
    unseen: int = 0  # of the prompt's last tokens, how many follow the compression: 2 are the whole question
    group_label: ClassVar[str] = "needle depth"

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Rows with the needle at each depth of ``DEPTHS`` in turn."""
        generator, made = Generator().manual_seed(seed), []
        for i in range(count):
            depth = DEPTHS[i % len(DEPTHS)]
            tokens, _ = recall.recall(1, self.length, self.facts, 1, generator, depth)
            end = self.length - 2
            seen = end - self.unseen
            prompt, rest = {"input_ids": tokens[:, :seen]}, tokens[:, seen:end]
            made.append(Sample(prompt, seen, tokens[0, end:], rest, group=depth))
        return made

    def score(self, model: Any, sample: Sample, meter: Meter) -> Tensor:
        """1 if both values are right."""
        return (greedy(model, sample, len(sample.answer), meter) == sample.answer).all()[None]


@dataclass(frozen=True)
class Copying(Task):
    """A row repeats after a random period of at most half of it; the second half is to be predicted."""

    length: int = 64
    metric: ClassVar[Metric] = "accuracy"

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Rows of ``recall.copying``."""
        generator = Generator().manual_seed(seed)
        made = [recall.copying(1, self.length, generator) for _ in range(count)]
        return [_split(*row, self.length // 2) for row in made]

    def score(self, model: Any, sample: Sample, meter: Meter) -> Tensor:
        """Whether each token of the second half but its first is the model's first choice."""
        return recall.hits(given(model, sample, meter), sample.answer)


@dataclass(frozen=True)
class Text(Task):
    """The loss on bytes of held-out text, given those before."""

    prompt: int = 768
    scored: int = 256
    metric: ClassVar[Metric] = "loss"

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Windows of ``text.windows``: the prompt, and one byte more than is scored."""
        generator = Generator().manual_seed(seed)
        length = self.prompt + 1 + self.scored
        made = [text.windows(1, length, generator) for _ in range(count)]
        return [_split(*row, self.prompt) for row in made]

    def score(self, model: Any, sample: Sample, meter: Meter) -> Tensor:
        """The loss of each byte after the first."""
        logits = given(model, sample, meter)[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, sample.answer[0, 1:], reduction="none")


@dataclass(frozen=True)
class Classify(Task):
    """Which digit is on a canvas."""

    metric: ClassVar[Metric] = "accuracy"

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Canvases of ``digits.vit_canvases``."""
        generator, made = Generator().manual_seed(seed), list[Sample]()
        while len(made) < count:
            pixels, labels = digits.vit_canvases(DRAWN, generator)
            side = VIT_GRID
            made += [
                Sample({"pixel_values": pixels[i : i + 1]}, side * side, labels[i : i + 1], grid=(side, side))
                for i in range(DRAWN)
            ]
        return made[:count]

    def score(self, model: Any, sample: Sample, meter: Meter) -> Tensor:
        """1 if the digit is the model's first choice."""
        pixels = sample.prompt["pixel_values"].to(model.device)
        with meter.phase("prefill", sample.tokens):
            said: Tensor = model(pixel_values=pixels).logits.argmax(-1).cpu()
        return said == sample.answer


@dataclass(frozen=True)
class Ask(Task):
    """One kind of question about a canvas of digits, answered with one token and the end."""

    group_label: ClassVar[str] = "kind of question"
    kind: str = "cell"  # or "all": the kinds take turns

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Canvases and questions of ``digits.vlm_batch``."""
        if self.kind == "all":
            each = [self._of_kind(kind, -(-count // len(digits.KINDS)), seed) for kind in digits.KINDS]
            return [sample for turn in zip(*each, strict=True) for sample in turn][:count]
        return self._of_kind(self.kind, count, seed)

    def _of_kind(self, kind: str, count: int, seed: int) -> list[Sample]:
        generator, made = Generator().manual_seed(seed), list[Sample]()
        side = round(digits.IMAGE_TOKENS**0.5)
        while len(made) < count:
            batch = digits.vlm_batch(kind, DRAWN, generator)
            for i in range(DRAWN):
                row = slice(i, i + 1)
                prompt = {"input_ids": batch.prompts[row], "pixel_values": batch.pixels[row]}
                answer = torch.stack([batch.answers[i], torch.tensor(digits.TOKEN["<eos>"])])
                group = kind if self.kind == "all" else None
                made.append(Sample(prompt, digits.IMAGE_TOKENS, answer, group=group, grid=(side, side)))
        return made[:count]

    def score(self, model: Any, sample: Sample, meter: Meter) -> Tensor:
        """1 if the answer and then the end are generated."""
        return (greedy(model, sample, len(sample.answer), meter) == sample.answer).all()[None]


def tasks_of(model: str, card: Mapping[str, Any]) -> dict[str, Task]:
    """The tasks of a model of the zoo, by name, given its card. None for other models."""

    def same(task: str, **facts: Any) -> dict[str, Any]:
        """What the card says about the same measurement: its seed and its score."""
        for entry in card.get("scores", []):
            if entry["task"] == task and all(entry.get(key) == value for key, value in facts.items()):
                found = {"card_score": entry["score"], "card_samples": entry["samples"]}
                return found | {"seed": entry["seed"]}
        return {}

    made: list[Task] = []
    if model == "recall-lm":
        short, long = {"length": 1024}, {"length": 2048}
        far: dict[str, Any] = {"length": 2048, "facts": 112, "queries": 64}
        made = [
            Recall("recall", 10, **same("distinct recall", **short)),
            Needle("needle", 15),
            Needle("needle-unseen", 15, unseen=2),
            Copying("copying", 16),
            Text("text", 6),
            Recall("recall-2048", 6, usual=False, **far, **same("distinct recall", **long)),
            Recall("recall-card", 12, usual=False, distinct=False, **same("recall", **short)),
            Recall("recall-card-2048", 6, usual=False, distinct=False, **far, **same("recall", **long)),
        ]
    elif model == "digits-vit":
        made = [Classify("digits", 128, **same("digit"))]
    elif model == "digits-vlm":
        made = [Ask(kind, 32, kind=kind, **same(kind)) for kind in digits.KINDS]
        made.append(Ask("all", 128, kind="all", usual=False, **same("all")))
    return {task.name: task for task in made}
