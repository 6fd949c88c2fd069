"""Scores the digit models as they ship, in stock code from bfloat16 weights, and writes weights and card."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cards import interval, round_weights, save
from digits_training import Run
from tokencomp.zoo import digits

DATA = (
    "scikit-learn load_digits (8 x 8 scans), split by image with seed 0: 1347 for training, 450 held out; "
    "canvases drawn anew for every step by tokencomp.zoo.digits"
)
# Canvases, of each kind of question; drawn from the 450 held-out digits: intervals do not speak of writers.
SAMPLES = {"digits-vlm": 1024, "digits-vit": 4096}
SEED = 7
GOALS = {"digits-vlm": 0.95, "digits-vit": 0.97}


def score(name: str, model: Any) -> list[dict[str, Any]]:
    """Held-out scores of the model as it is; no autocast. The first is the one GOALS is about."""
    samples = SAMPLES[name]

    def entry(task: str, metric: str, share: float, count: int) -> dict[str, Any]:
        made: dict[str, Any] = {"task": task, "metric": metric, "score": share, "samples": count}
        return made | {"seed": SEED, "interval_95": interval(share, count)}

    if name == "digits-vit":
        return [entry("digit", "accuracy", digits.vit_accuracy(model, samples, SEED), samples)]
    kinds = {kind: digits.vlm_exact_match(model, kind, samples, SEED) for kind in digits.KINDS}
    total = entry("all", "exact match", sum(kinds.values()) / len(kinds), samples * len(kinds))
    return [total] + [entry(kind, "exact match", share, samples) for kind, share in kinds.items()]


def export(name: str, model: Any, run: Run, options: argparse.Namespace) -> bool:
    """Rounds to bfloat16, scores, prints; writes into ``--zoo`` (else ``--out``) if the goal is reached."""
    minutes = round(run.elapsed() / 60, 1)
    model.set_attn_implementation("sdpa")
    model.eval()
    round_weights(model)
    scores = score(name, model)
    for entry in scores:
        print(json.dumps(entry), flush=True)
    if scores[0]["score"] < GOALS[name]:
        print(f"{name}: {scores[0]['score']:.4f} is below {GOALS[name]}, nothing written", flush=True)
        return False
    card = {"data": DATA, "command": command(options), "seed": options.seed, "steps": run.total}
    card |= {"minutes": minutes, "threads": options.threads, "scores": scores}
    print(f"wrote {save(name, model, card, options.zoo or options.out)}", flush=True)
    return True


def command(options: argparse.Namespace) -> str:
    """The options that decide what is trained, as they are typed."""
    script, steps = Path(sys.argv[0]).name, " ".join(map(str, options.steps))
    return f"python bench/zoo/{script} --seed {options.seed} --batch {options.batch} --steps {steps}"
