"""The models that ship: one card (``<name>.json``) and one file of weights (``<name>.safetensors``) each."""

import hashlib
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tokencomp.zoo.tasks import Task, tasks_of

QKV = {"q": "query", "k": "key", "v": "value"}
# What layers were called before ViT and CLIP were flattened: transformers 5.4.
OLDER = (
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", lambda found: f".attention.attention.{QKV[found[1]]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"^(vit\..*)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^(vit\..*)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"^model\.vision_tower\.", "model.vision_tower.vision_model."),
)
WEIGHTS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """Every model there is a card of, sorted."""
    return sorted(path.stem for path in WEIGHTS.glob("*.json"))


def card(name: str) -> dict[str, Any]:
    """What is known about a model: data, training command, steps, minutes, scores, checksum, configuration.

    Raises ValueError for an unknown name and RuntimeError for a card that cannot be read.
    """
    if name not in names():
        raise ValueError(f"zoo: name must be one of {names()}, got {name!r}")
    path = WEIGHTS / f"{name}.json"
    try:
        content = json.loads(path.read_text())
        needed = {"architecture", "config", "sha256"} - set(content)
    except (ValueError, TypeError) as error:
        raise RuntimeError(
            f"zoo: the card {path.name} is damaged ({error}); install tokencomp again"
        ) from error
    if needed:
        raise RuntimeError(f"zoo: the card {path.name} lacks {sorted(needed)}; install tokencomp again")
    return dict(content)


def load(name: str) -> tuple[Any, dict[str, Task]]:
    """The trained model, a ``transformers.PreTrainedModel`` in eval mode on the CPU, float32, and its tasks.

    The tasks are by name, see ``tokencomp.zoo.tasks``. The weights are stored as bfloat16 and read only if
    they are, byte for byte, those the card was written for. The state of torch's random generator is left as
    it is.

    Raises:
        ValueError: unknown name.
        ImportError: transformers or safetensors is not installed.
        RuntimeError: the file of weights is missing, damaged, or does not fit the model.
    """
    about = card(name)
    transformers, safetensors = _import("transformers"), _import("safetensors.torch")
    path = WEIGHTS / f"{name}.safetensors"
    data = path.read_bytes() if path.is_file() else b""
    found = hashlib.sha256(data).hexdigest()
    if found != about["sha256"]:
        state = f"has checksum {found[:12]}" if data else "is missing or empty, without a checksum"
        raise RuntimeError(
            f"zoo: {path.name} {state}, the card says {about['sha256'][:12]}; install tokencomp again"
        )
    weights = {key: value.float() for key, value in safetensors.load(data).items()}
    architecture = getattr(transformers, about["architecture"])
    with torch.random.fork_rng(devices=[]):
        model = architecture(architecture.config_class.from_dict(about["config"]))
    model.load_state_dict(_named_as(model, weights), strict=True)
    return model.eval(), tasks_of(name, about)


def _named_as(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weights``, named as this version of transformers does."""
    known = model.state_dict()
    return {key if key in known else _older(key): value for key, value in weights.items()}


def _older(key: str) -> str:
    for name, older in OLDER:
        key = re.sub(name, older, key)
    return key


def _import(module: str) -> ModuleType:
    """Import an optional dependency, or say in one line which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"zoo needs {package}: pip install 'tokencomp[hf]' ({error})") from error
