"""Scores the digit models as they ship, in stock code from bfloat16 weights, and writes weights and card."""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from digits_training import Run
from safetensors.torch import save_file
from tokencomp.zoo import digits

DATA = (
    "scikit-learn load_digits (8 x 8 scans), split by image with seed 0: 1347 for training, 450 held out; "
    "canvases drawn anew for every step by tokencomp.zoo.digits"
)
SAMPLES = {"digits-vlm": 1024, "digits-vit": 4096}  # canvases; of each kind of question
SEED = 7
GOALS = {"digits-vlm": 0.95, "digits-vit": 0.97}


def save(name: str, model: Any, card: dict[str, Any], folder: Path) -> Path:
    """Writes weights (``<name>.safetensors``, bfloat16) and card (``<name>.json``), returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.bfloat16().contiguous() for key, value in model.state_dict().items()}
    file = folder / f"{name}.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)
    card = {
        "name": name,
        "architecture": type(model).__name__,
        **card,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "config": model.config.to_diff_dict(),
    }
    (folder / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")
    return file


def interval(share: float, samples: int) -> list[float]:
    """The 95 % Wilson interval of a share: of canvases drawn from the 450 held-out digits, not of writers."""
    z = 1.96
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2)) / (1 + z * z / samples)
    return [round(middle - half, 4), round(middle + half, 4)]


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
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
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
