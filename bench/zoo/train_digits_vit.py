"""Trains digits-vit: a ViT that names one real digit among clutter, from 256 patches and CLS.

One schedule without a break, in four phases counted in steps (``--steps``): four digits on a canvas, each
seen by its own CLS in its own quarter; one digit and clutter, seen through a window of 10 x 10 patches that
holds the digit; the window and 60 random patches; all patches. Patches are left out after the embeddings, so
that each keeps its position, and the model that comes out runs in stock code. A head on every patch, thrown
away at the end, names the digit under it.

    python bench/zoo/train_digits_vit.py --zoo python/tokencomp/zoo/weights
"""

import argparse
from typing import Any

import torch
from digits_export import export
from digits_training import Optimizer, Run, arguments, named, rate, sincos, train_with_plain_attention
from tokencomp.zoo import digits
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

NAME = "digits-vit"
PATCH, WIDTH, HEAD = 4, 128, 32
GRID = digits.VIT_SIDE // PATCH
PATCHES = GRID * GRID
QUARTERS = 2  # a side
WINDOW, OTHERS = 10, 60  # patches: a side, beside it
STEPS = [300, 800, 650, 350]
PHASES = ("quarters", "window", "window+", "canvas")
RATE, DENSE_WEIGHT = 2e-3, 0.5
NOTHING = digits.CLASSES  # what a patch beside the digit names

ROW, COLUMN = (
    index.flatten() for index in torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
)
QUARTER_OF = (ROW // (GRID // QUARTERS)) * QUARTERS + COLUMN // (GRID // QUARTERS)
BY_QUARTER = torch.argsort(QUARTER_OF, stable=True).view(QUARTERS**2, -1)  # [4, 64] patches


def build() -> Any:
    """The untrained model; its position table starts from sines and cosines."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=WIDTH // HEAD,
        intermediate_size=3 * WIDTH,
        image_size=digits.VIT_SIDE,
        patch_size=PATCH,
        num_channels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = digits.CLASSES
    model = ViTForImageClassification(config)
    with torch.no_grad():
        embeddings = model.vit.embeddings
        embeddings.position_embeddings.normal_(0, 0.02)
        embeddings.position_embeddings[0, 1:] += 0.3 * sincos(GRID, WIDTH)
        embeddings.cls_token.normal_(0, 0.02)
    return model


class Trainer:
    """The model and the head on its patches."""

    def __init__(self, generator: Generator) -> None:
        self.generator, self.model = generator, build()
        self.patch_head = nn.Linear(WIDTH, digits.CLASSES + 1)
        self.digits = digits.bank("train")

    def encode(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """Last hidden states ``[B * S, 1 + K, C]`` of CLS and the patches ``kept`` ``[B, S, K]``.

        Each of an image's S sets of patches is seen alone.
        """
        embedded = self.model.vit.embeddings(pixels)
        batch, sets, number = kept.shape
        index = kept.reshape(batch, -1, 1).expand(-1, -1, WIDTH)
        patches = embedded[:, 1:].gather(1, index).view(batch * sets, number, WIDTH)
        hidden = torch.cat([embedded[:, :1].repeat_interleave(sets, 0), patches], 1)
        for layer in self.model.vit.layers:
            hidden = layer(hidden)
        states: Tensor = self.model.vit.layernorm(hidden)
        return states

    def step(self, phase: int, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and accuracy of CLS and of the patches on a digit."""
        pixels, kept, labels, dense = self.quarters(batch) if phase == 0 else self.scenes(phase, batch)
        hidden = self.encode(pixels, kept)
        said, on_patches = self.model.classifier(hidden[:, 0]).float(), self.patch_head(hidden[:, 1:]).float()
        loss = cross_entropy(said, labels) + DENSE_WEIGHT * cross_entropy(
            on_patches.flatten(0, 1), dense.flatten()
        )
        on = dense != NOTHING
        shares = {
            "accuracy": (said.argmax(-1) == labels).float().mean(),
            "patches": (on_patches.argmax(-1) == dense)[on].float().mean(),
        }
        return loss, shares

    def quarters(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four digits on each of ``batch / 4`` canvases: as many sequences as in the other phases."""
        number = max(1, batch // QUARTERS**2)
        full = QUARTERS**2
        pixels, cells = digits.grid_canvases(
            self.digits, number, self.generator, side=QUARTERS, fewest=full, most=full
        )
        labels = cells.flatten()
        dense = labels[:, None].expand(-1, BY_QUARTER.shape[1])
        return pixels, BY_QUARTER.expand(number, -1, -1), labels, dense

    def scenes(self, phase: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One digit a canvas: pixels, patches that enter ``[B, 1, K]``, labels, the patches' labels."""
        scene = digits.vit_scenes(self.digits, batch, self.generator)
        order = torch.rand(batch, PATCHES, generator=self.generator)
        number = PATCHES
        if phase < 3:
            order = order + inside_window(scene.centre, self.generator)
            number = WINDOW * WINDOW + (OTHERS if phase == 2 else 0)
        kept = order.topk(number, 1).indices
        away = (torch.stack([COLUMN, ROW], 1) * PATCH + PATCH / 2 - scene.centre[:, None]).abs()
        under = (away < 0.42 * scene.size[:, None, None]).all(-1)
        dense = torch.where(under, scene.labels[:, None], NOTHING).gather(1, kept)
        return scene.pixels, kept[:, None], scene.labels, dense


def inside_window(centre: Tensor, generator: Generator) -> Tensor:
    """``[B, PATCHES]`` bool: WINDOW x WINDOW patches round the digit at ``centre`` (x, y), a bit off."""
    shift = torch.randint(-1, 2, centre.shape, generator=generator)
    low = ((centre / PATCH).round() - WINDOW // 2 + shift).clamp(0, GRID - WINDOW)[:, None]
    place = torch.stack([COLUMN, ROW], 1)
    return ((place >= low) & (place < low + WINDOW)).all(-1)


def train(trainer: Trainer, run: Run, options: argparse.Namespace) -> bool:
    """All steps that are left; false when the time allowed ran out."""
    train_with_plain_attention(trainer.model)
    trainer.model.train()
    parameters = named(trainer.model, "") + named(trainer.patch_head, "patch_head.")
    optimizer = Optimizer(parameters, RATE)
    run.begin(optimizer)
    total = sum(options.steps)
    ends = [sum(options.steps[: phase + 1]) for phase in range(len(PHASES))]
    while run.stage == 0 and run.step < total:
        phase = sum(run.step >= end for end in ends)
        with torch.autocast("cpu", torch.bfloat16):
            loss, shares = trainer.step(phase, options.batch)
        optimizer.step(loss, rate(run.step / total))
        if run.tick(PHASES[phase], total, loss, shares, optimizer):
            return False
    if run.stage == 0:
        run.next_stage()
    return True


def main() -> None:
    options = arguments(__doc__.splitlines()[0], NAME, batch=64, steps=STEPS).parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    trainer = Trainer(Generator().manual_seed(options.seed + 1))
    modules = {"model": trainer.model, "patch_head": trainer.patch_head}
    run = Run(options, modules, trainer.generator)
    if train(trainer, run, options):
        export(NAME, trainer.model, run, options)
    else:
        print(f"stopped after {run.total} steps; go on with --resume")


if __name__ == "__main__":
    main()
