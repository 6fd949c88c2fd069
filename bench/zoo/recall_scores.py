"""What recall-lm is measured on: the entries of its card, its goals, and the score that picks weights."""

import platform
from collections.abc import Callable
from typing import Any

from cards import interval
from tokencomp.zoo import recall, text
from torch import Tensor

Model = Callable[..., Any]
Entry = dict[str, Any]
PICK_SEED, CARD_SEED = 1_000_003, 2_000_003  # held out, for the best weights and for the card
FACTS = {64: (6, 6), 128: (16, 8), 256: (32, 16), 512: (64, 32), 1024: (96, 48), 2048: (112, 64)}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDED = {
    ("recall", 1024): 0.98,
    ("recall", 2048): 0.95,
}  # lowest score of a task at a length; below, no card
GOALS = {  # missing one of these is told in the card
    **NEEDED,
    **{("recall", length): 0.97 for length in (64, 128, 256, 512)},
    ("needle", 2048): 0.93,
    ("copying", 64): 0.90,
    ("copying", 256): 0.90,
}


def recall_entry(model: Model, length: int, rows: int, seed: int, distinct: bool = False) -> Entry:
    """FACTS at ``length``: exact match over answers, and over tokens."""
    facts, queries = FACTS[length]
    exact, single = recall.score(model, length, facts, queries, rows, seed, distinct=distinct)
    made = _entry("distinct recall" if distinct else "recall", length, "exact match", exact, rows, seed)
    made |= {"token_accuracy": single.double().mean().item()}
    return made | {"facts": facts, "queries": queries, "distinct": distinct}


def needle_entry(model: Model, length: int, depth: float, rows: int, seed: int) -> Entry:
    """One question at the end about the fact at ``depth``, among as many facts as in ``recall_entry``."""
    facts = FACTS[length][0]
    exact, _ = recall.score(model, length, facts, 1, rows, seed, depth=depth)
    made = _entry("needle", length, "exact match", exact, rows, seed)
    return made | {"facts": facts, "queries": 1, "depth": depth}


def copying_entry(model: Model, length: int, rows: int, seed: int) -> Entry:
    """Copying with random periods: over labelled tokens."""
    right = recall.copying_score(model, length, rows, seed)
    return _entry("copying", length, "token accuracy", right, rows, seed)


def text_entry(model: Model, length: int, rows: int, seed: int) -> Entry:
    """Loss on held-out text, with its standard deviation from window to window."""
    losses = text.row_losses(model, length, rows, seed)
    return {
        "task": "text",
        "length": length,
        "nats_per_byte": losses.mean().item(),
        "deviation": losses.std().item(),
        "rows": rows,
        "seed": seed,
        "python": platform.python_version(),
        "bytes": {split: len(text.corpus(split)) for split in text.SPLITS},
    }


def card_scores(model: Model, rows: int) -> tuple[list[Entry], Entry]:
    """All scores of the card, those of GOALS first, and the loss on text. Fewer rows at 2048 tokens."""
    scores = [recall_entry(model, n, rows // 2 if n > 1024 else rows, CARD_SEED) for n in FACTS]
    scores += [needle_entry(model, 2048, depth, rows, CARD_SEED) for depth in DEPTHS]
    scores += [copying_entry(model, n, rows, CARD_SEED) for n in (64, 256)]
    scores += [recall_entry(model, n, rows // 2, CARD_SEED, distinct=True) for n in (1024, 2048)]
    return scores, text_entry(model, 1024, rows, CARD_SEED)


def missed(scores: list[Entry], goals: dict[tuple[str, int], float]) -> list[str]:
    """The goals that are not reached, in words."""
    told = []
    for entry in scores:
        goal = goals.get((entry["task"], entry["length"]), 0.0)
        if entry["score"] < goal:
            where = f", depth {entry['depth']}" if "depth" in entry else ""
            told.append(f"{entry['task']} at {entry['length']} tokens{where}: {entry['score']:.4f} < {goal}")
    return told


def pick(model: Model) -> tuple[float, str]:
    """A quick score on held-out samples that are not those of the card: mean share right, less nats / 10."""
    shares = {f"recall {n}": recall_entry(model, n, 6, PICK_SEED)["score"] for n in (64, 1024, 2048)}
    for depth in (0.0, 0.5):
        shares[f"needle {depth}"] = needle_entry(model, 2048, depth, 6, PICK_SEED)["score"]
    shares["copying 64"] = copying_entry(model, 64, 6, PICK_SEED)["score"]
    nats = text.text_loss(model, 512, 6, PICK_SEED)
    told = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    return sum(shares.values()) / len(shares) - nats / 10, f"{told}, text {nats:.3f} nats per byte"


def _entry(task: str, length: int, metric: str, right: Tensor, rows: int, seed: int) -> Entry:
    share, samples = right.double().mean().item(), len(right)
    made: Entry = {"task": task, "length": length, "metric": metric, "score": share, "samples": samples}
    if samples == rows:  # answers of one row are not independent
        made["interval_95"] = interval(share, samples)
    return made | {"rows": rows, "seed": seed}
