"""What the examples share: options, models that ship or any of Hugging Face, questions with known answers."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokencomp import zoo
from torch import Tensor

FILLER = (
    "The river was slow and brown that summer, and nobody hurried. ",
    "A cart went by with hay, then another, and the dust settled again. ",
    "Someone in the kitchen was telling a story that had no end. ",
)


def options(about: str, model: str, **more: dict[str, Any]) -> argparse.Namespace:
    """``--model``, ``--out`` and ``--seed``, and ``more`` options with the settings of ``add_argument``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", default=model, help="one that ships, a Hugging Face id, or a local folder")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out/)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and samples (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def run(main: Callable[[], None]) -> None:
    """Run an example. What is not installed, found or supported ends it in one message, no traceback."""
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is known."""

    prompt: Tensor  # [1, T]
    answer: Any  # token ids [A] for a model that ships, a string for others
    tokenizer: Any = None

    @property
    def length(self) -> int:
        """Tokens to generate."""
        return 12 if self.tokenizer is not None else len(self.answer)

    def right(self, said: Tensor) -> bool:
        """Whether the new tokens ``[N]`` are or hold the answer."""
        if self.tokenizer is None:
            return torch.equal(said[: len(self.answer)].cpu(), self.answer)
        return self.answer in self.tokenizer.decode(said, skip_special_tokens=True)


def language_model(name: str, device: str, tokens: int, count: int, seed: int) -> tuple[Any, list[Question]]:
    """A model and questions about one fact at several depths of prompts of about ``tokens`` tokens."""
    if name in zoo.names():
        model, _ = zoo.load(name)
        return model.to(device), [_recall(tokens, i / max(1, count - 1), seed + i) for i in range(count)]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
    return model, [_passkey(tokenizer, tokens, i / max(1, count - 1), seed + i, device) for i in range(count)]


def _recall(tokens: int, depth: float, seed: int) -> Question:
    ids, _ = zoo.recall.recall(1, tokens, 48, 1, torch.Generator().manual_seed(seed), depth)
    return Question(ids[:, :-2], ids[0, -2:])


def _passkey(tokenizer: Any, tokens: int, depth: float, seed: int, device: str) -> Question:
    """Filler with one sentence about a number, and the question for it."""
    key = str(10000 + 7919 * (seed + 1) % 90000)
    ask = "\nWhat is the secret number? The secret number is"
    sentences: list[str] = []
    room = tokens - len(tokenizer(ask).input_ids) - 16
    while len(tokenizer("".join(sentences)).input_ids) < room:
        sentences += FILLER
    sentences.insert(round(depth * len(sentences)), f"The secret number is {key}. ")
    ids = tokenizer("".join(sentences) + ask, return_tensors="pt").input_ids
    return Question(ids.to(device), key, tokenizer)


@dataclass(frozen=True)
class Answers:
    """What a model said to all questions."""

    right: int
    seconds: float
    report: Any = None  # of the last question


def ask(model: Any, questions: list[Question], handle: Any = None) -> Answers:
    """Generate greedily; ``handle`` is what ``tokencomp.compress`` gave."""
    right, begin = 0, time.perf_counter()
    for question in questions:
        prompt = question.prompt.to(model.device)
        said = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=question.length, do_sample=False
        )
        right += question.right(said[0, prompt.shape[1] :])
    seconds = time.perf_counter() - begin
    return Answers(right, seconds, handle.report() if handle is not None else None)


def own_bytes(model: Any, tokens: int) -> int:
    """What the model's own cache holds of so many tokens."""
    cache = model(torch.ones(1, 2, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(t.nbytes // 2 * tokens for layer in layers for t in (layer.keys, layer.values))


def chart(
    path: Path, title: str, labels: list[str], bars: list[float], right: list[float], unit: str
) -> None:
    """Horizontal bars with the share of right answers beside them."""
    try:
        import matplotlib
    except ImportError as error:
        sys.exit(f"the picture needs matplotlib: pip install 'tokencomp[eval]' ({error})")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(labels) + 1.4), layout="constrained")
    drawn = axes.barh(labels, bars, color=["#4c72b0" if share >= 0.999 else "#c44e52" for share in right])
    axes.bar_label(drawn, [f" {share:.0%} right" for share in right])
    axes.set(title=title, xlabel=unit)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
