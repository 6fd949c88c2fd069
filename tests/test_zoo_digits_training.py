"""The trainers of the digit models: packed questions equal single prompts, and an interrupted run goes on."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import ROOT
from torch import Generator

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("transformers", reason="the models are from transformers")
pytest.importorskip("safetensors", reason="weights are saved with safetensors")
sys.path.insert(0, str(ROOT / "bench" / "zoo"))

import train_digits_vit
import train_digits_vlm
from digits_training import Run, rate
from tokencomp.zoo import digits

VIT_STEPS, VLM_STEPS = [2, 1, 1, 1], [1, 2, 2, 1]


def test_packed_questions_are_single_prompts() -> None:
    """Training's block mask and positions give the logits of the stock model, one prompt a question."""
    torch.manual_seed(0)
    trainer = train_digits_vlm.Trainer(Generator().manual_seed(1))
    trainer.model.eval()
    pixels, cells = digits.vlm_canvases(3, Generator().manual_seed(2))
    questions, last = train_digits_vlm.packed(cells, Generator().manual_seed(3))
    every = torch.arange(digits.IMAGE_TOKENS).expand(3, -1)
    begin = torch.full((3, 1), digits.TOKEN["<bos>"])
    image = torch.full((3, digits.IMAGE_TOKENS), digits.TOKEN["<image>"])
    train_digits_vlm.train_with_plain_attention(trainer.model)
    with torch.no_grad():
        mine = trainer.answer(trainer.encode(pixels)[:, 1:], every, questions)
        trainer.model.set_attn_implementation("sdpa")
        for k, end in enumerate(last.tolist()):
            ids = torch.cat([begin, image, questions[:, k, : end + 2]], 1)
            stock = trainer.model(input_ids=ids, pixel_values=pixels, logits_to_keep=2).logits
            torch.testing.assert_close(mine[:, k, end : end + 2], stock, atol=2e-4, rtol=1e-4)


def test_all_patches_are_the_stock_vit() -> None:
    torch.manual_seed(0)
    trainer = train_digits_vit.Trainer(Generator().manual_seed(1))
    trainer.model.eval()
    pixels, _ = digits.vit_canvases(3, Generator().manual_seed(2))
    kept = torch.arange(train_digits_vit.PATCHES).expand(3, 1, -1)
    with torch.no_grad():
        mine = trainer.model.classifier(trainer.encode(pixels, kept)[:, 0])
        torch.testing.assert_close(mine, trainer.model(pixel_values=pixels).logits, atol=1e-5, rtol=1e-5)


def test_the_window_holds_the_digit() -> None:
    scene = digits.vit_scenes(digits.bank("train"), 200, Generator().manual_seed(4))
    window = train_digits_vit.inside_window(scene.centre, Generator().manual_seed(5))
    assert (window.sum(1) == train_digits_vit.WINDOW**2).all()
    middle = torch.stack([train_digits_vit.COLUMN, train_digits_vit.ROW], 1) * 4 + 2
    under = ((middle - scene.centre[:, None]).abs() < 0.3 * scene.size[:, None, None]).all(-1)
    assert (window | ~under).all()


def run_of(script: Any, out: Path, steps: list[int], **options: Any) -> Any:
    """Trains until the end or ``minutes``: the trainer, its run, and whether it ended."""
    space = Namespace(**{"out": out, "steps": steps, "resume": False, "minutes": None, "batch": 4} | options)
    torch.manual_seed(0)
    trainer = script.Trainer(Generator().manual_seed(1))
    modules = {"model": trainer.model, "patch_head": trainer.patch_head}
    if script is train_digits_vlm:
        modules = trainer.modules()
    run = Run(space, modules, trainer.generator)
    return trainer, run, script.train(trainer, run, space)


@pytest.mark.parametrize(
    ("script", "steps"), [(train_digits_vit, VIT_STEPS), (train_digits_vlm, VLM_STEPS)], ids=["vit", "vlm"]
)
def test_an_interrupted_run_goes_on(script: Any, steps: list[int], tmp_path: Path) -> None:
    """Stopped after each step and resumed, it ends with the weights of a run without a break."""
    whole, _, done = run_of(script, tmp_path / "whole", steps)
    assert done
    trainer, run, done = run_of(script, tmp_path / "parts", steps, minutes=0)
    assert (done, run.total) == (False, 1)
    for total in range(2, sum(steps) + 1):
        trainer, run, done = run_of(script, tmp_path / "parts", steps, resume=True, minutes=0)
        assert (done, run.total) == (False, total)
    trainer, run, done = run_of(script, tmp_path / "parts", steps, resume=True)
    assert (done, run.total) == (True, sum(steps))
    for (name, one), other in zip(whole.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_rate_warms_up_and_decays() -> None:
    factors = [rate(done / 1000) for done in range(1000)]
    assert factors[0] == 0.02
    assert max(factors) == 1.0
    assert factors[300] == 1.0
    assert factors[800] == pytest.approx(0.5)
    assert factors[-1] == 0.02
