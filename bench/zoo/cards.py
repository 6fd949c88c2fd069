"""How a trained model becomes one that ships: rounded to bfloat16, weights and card written side by side."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def round_weights(model: Any) -> None:
    """Make the weights those that are stored: every parameter rounded to bfloat16, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


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
    """The 95 % Wilson interval of a share of independent samples."""
    z = 1.96
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2)) / (1 + z * z / samples)
    return [round(middle - half, 4), round(middle + half, 4)]
