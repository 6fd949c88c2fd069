"""The models that ship: they load as stored, damage is noticed, and their cards hold."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokencomp import zoo
from tokencomp.zoo import base, recall, text
from torch import Tensor

SAMPLE_ROWS = {1024: 4, 2048: 2}  # of a score that is measured again; 8 at other lengths
NEEDLE_ROWS = 6  # at every depth
SIZE_BUDGET = 16 << 20  # bytes of all weights together


# ---- loading -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of its own: one untrained model, ``tiny``, saved as models are saved."""
    transformers = pytest.importorskip("transformers", reason="the zoo needs the extra hf")
    safetensors = pytest.importorskip("safetensors.torch", reason="the zoo needs the extra hf")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    weights = {key: value.bfloat16() for key, value in model.state_dict().items()}
    data = safetensors.save(weights)
    (tmp_path / "tiny.safetensors").write_bytes(data)
    write_card(tmp_path, data, config.to_diff_dict())
    monkeypatch.setattr(base, "WEIGHTS", tmp_path)
    return tmp_path


def write_card(folder: Path, data: bytes, config: dict[str, Any]) -> None:
    content = {
        "architecture": "LlamaForCausalLM",
        "config": config,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / "tiny.json").write_text(json.dumps(content))


def test_load_gives_the_stored_weights_in_float32(folder: Path) -> None:
    from safetensors.torch import load_file

    before = torch.get_rng_state()
    model, tasks = zoo.load("tiny")
    assert tasks == {}
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    stored = load_file(folder / "tiny.safetensors")
    assert set(stored) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[key].float())


def test_damaged_weights_are_never_loaded(folder: Path) -> None:
    path = folder / "tiny.safetensors"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for damaged in (good[:-7], good[: len(good) // 2], b"", bytes(flipped), good + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(RuntimeError, match="checksum"):
            zoo.load("tiny")
    path.unlink()
    with pytest.raises(RuntimeError, match="checksum"):
        zoo.load("tiny")
    path.write_bytes(good)
    zoo.load("tiny")


def test_weights_of_another_model_do_not_load(folder: Path) -> None:
    from safetensors.torch import load, save

    about = zoo.card("tiny")
    weights = load((folder / "tiny.safetensors").read_bytes())
    weights.pop("lm_head.weight")
    (folder / "tiny.safetensors").write_bytes(save(weights))
    write_card(folder, save(weights), about["config"])
    with pytest.raises(RuntimeError, match="lm_head"):
        zoo.load("tiny")


def test_damaged_card(folder: Path) -> None:
    text = (folder / "tiny.json").read_text()
    (folder / "tiny.json").write_text(text[: len(text) // 2])
    with pytest.raises(RuntimeError, match=r"card tiny\.json is damaged"):
        zoo.load("tiny")
    (folder / "tiny.json").write_text('{"architecture": "LlamaForCausalLM", "config": {}}')
    with pytest.raises(RuntimeError, match=r"lacks .'sha256'."):
        zoo.load("tiny")


def test_unknown_name_lists_the_known_ones(folder: Path) -> None:
    shutil.copy(folder / "tiny.json", folder / "other.json")
    for call in (zoo.load, zoo.card):
        for name in ("nobody", "../tiny", ""):
            with pytest.raises(ValueError, match=r"one of \['other', 'tiny'\], got"):
                call(name)


@pytest.mark.parametrize("missing", ["transformers", "safetensors"])
def test_missing_extra_is_named_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"^zoo needs .*pip install 'tokencomp\[hf\]'") as caught:
        zoo.load("tiny")
    assert missing in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importing_the_zoo_imports_no_transformers() -> None:
    script = (
        "import sys, tokencomp.zoo as z; z.names(); print({'transformers', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the models that ship ----------------------------------------------------------------------------------


def test_weights_stay_small() -> None:
    weights = {path.stem: path.stat().st_size for path in base.WEIGHTS.glob("*.safetensors")}
    assert set(weights) == set(zoo.names())
    assert sum(weights.values()) <= SIZE_BUDGET


@pytest.mark.parametrize("name", zoo.names())
def test_card_is_complete(name: str) -> None:
    about = zoo.card(name)
    assert {"data", "command", "steps", "minutes", "scores", "sha256", "architecture", "config"} <= set(about)
    assert about["scores"]
    for score in about["scores"]:
        assert 0.0 <= score["score"] <= 1.0
        assert score["samples"] >= 100


def model_of(name: str) -> Any:
    return zoo.load(name)[0]


def measured(model: Any, entry: dict[str, Any]) -> Tensor:
    """The first answers of the card's own sample."""
    length, task = entry["length"], entry["task"]
    rows = SAMPLE_ROWS.get(length, 8)
    if task == "copying":
        return recall.copying_score(model, length, rows, entry["seed"])
    rows = NEEDLE_ROWS if task == "needle" else rows
    options = {key: entry[key] for key in ("depth", "distinct") if key in entry}
    return recall.score(model, length, entry["facts"], entry["queries"], rows, entry["seed"], **options)[0]


@pytest.mark.parametrize("name", [name for name in zoo.names() if name.startswith("recall")])
def test_recall_scores_are_those_of_the_card(name: str) -> None:
    """On the first rows of the card's own sample: no more than 3 sigma of a binomial below the card."""
    pytest.importorskip("transformers", reason="the zoo needs the extra hf")
    model, about = model_of(name), zoo.card(name)
    scores: dict[str, list[float]] = {}
    answers: dict[str, list[Tensor]] = {}
    for entry in about["scores"]:  # needles together, as one depth has too few of them
        key = entry["task"] if entry["task"] == "needle" else str(entry)
        scores.setdefault(key, []).append(entry["score"])
        answers.setdefault(key, []).append(measured(model, entry))
    for key, right in answers.items():
        score, samples = sum(scores[key]) / len(scores[key]), torch.cat(right).double()
        margin = 3 * math.sqrt(max(score * (1 - score), 1 / len(samples)) / len(samples))
        assert samples.mean().item() >= score - margin, key


@pytest.mark.parametrize("name", [name for name in zoo.names() if name.startswith("recall")])
def test_text_loss_is_that_of_the_card(name: str) -> None:
    """On the first windows of the card's sample, within 4 standard errors. Other Pythons differ."""
    pytest.importorskip("transformers", reason="the zoo needs the extra hf")
    about, rows = zoo.card(name)["text"], 12
    loss = text.text_loss(model_of(name), about["length"], rows, about["seed"])
    assert abs(loss - about["nats_per_byte"]) <= 4 * about["deviation"] / math.sqrt(rows)
