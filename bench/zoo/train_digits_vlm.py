"""Trains digits-vlm: a CLIP tower, a projector and a Llama that answer questions about digits in a grid.

Four stages, counted in steps (``--steps``): the tower inside single cells, the tower on whole canvases, the
projector and the Llama behind the frozen tower with 4 random patches of each cell, everything with all
patches. Each image carries all the questions of ``QUESTIONS``; a block mask lets each see the image and
itself alone, which is the same function as that many prompts.

    python bench/zoo/train_digits_vlm.py --zoo python/tokencomp/zoo/weights
"""

import argparse
from typing import Any

import torch
from digits_export import export
from digits_training import Named, Optimizer, Run, arguments, named, rate, sincos, train_with_plain_attention
from tokencomp.zoo import digits
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

NAME = "digits-vlm"
SIDE, PATCH, CELLS = digits.VLM_SIDE, 8, digits.VLM_CELLS**2
GRID = SIDE // PATCH
PATCHES = GRID * GRID
PER_CELL = PATCHES // CELLS
WIDTH, TEXT_WIDTH = 128, 192
CLASSES = digits.EMPTY + 1
QUESTIONS = ("cell", "cell", "count", "is", "is", "is", "largest", "row", "col")
STEPS = [300, 450, 1300, 300]
STAGES = ("tower/cell", "tower/canvas", "text", "joint")
RATES, TAILS = (2e-3, 2e-3, 2e-3, 1e-3), (0.4, 0.4, 0.2, 0.6)

_row, _column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
_span = GRID // digits.VLM_CELLS
CELL_OF = ((_row // _span) * digits.VLM_CELLS + _column // _span).flatten()  # [PATCHES]
BY_CELL = torch.argsort(CELL_OF, stable=True)  # patches, those of a cell together


def build() -> Any:
    """The untrained model; its position table starts from sines and cosines."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(digits.VOCABULARY),
        hidden_size=TEXT_WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        pad_token_id=digits.TOKEN["<pad>"],
        bos_token_id=digits.TOKEN["<bos>"],
        eos_token_id=digits.TOKEN["<eos>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=digits.TOKEN["<image>"],
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    table = model.model.vision_tower.embeddings.position_embedding.weight
    table.data[1:] = 0.3 * sincos(GRID, WIDTH)
    return model


class Trainer:
    """The model with two heads that are thrown away: one on each patch, one on CLS."""

    def __init__(self, generator: Generator) -> None:
        self.generator, self.model = generator, build()
        inner = self.model.model
        self.tower, self.projector, self.llama = (
            inner.vision_tower,
            inner.multi_modal_projector,
            inner.language_model,
        )
        self.patch_head = nn.Linear(WIDTH, CLASSES + CELLS)
        self.cls_head = nn.Linear(WIDTH, digits.CLASSES)
        self.digits = digits.bank("train")

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "patch_head": self.patch_head, "cls_head": self.cls_head}

    def parameters(self, stage: int) -> Named:
        vision = (
            named(self.tower, "tower.") + named(self.patch_head, "head.") + named(self.cls_head, "cls_head.")
        )
        text = named(self.projector, "projector.") + named(self.llama, "llama.")
        text += named(self.model.lm_head, "lm_head.")
        return vision if stage < 2 else text if stage == 2 else text + vision

    def encode(self, pixels: Tensor, per_cell: bool = False) -> Tensor:
        """Last hidden states ``[B, 1 + PATCHES, C]``, or ``[B * CELLS, PER_CELL, C]`` seen cell by cell."""
        hidden: Tensor = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        if per_cell:
            hidden = hidden[:, 1:][:, BY_CELL].reshape(-1, PER_CELL, WIDTH)
        for layer in self.tower.encoder.layers:
            hidden = layer(hidden, None)
        return hidden

    def dense_loss(self, hidden: Tensor, cells: Tensor, per_cell: bool) -> tuple[Tensor, Tensor]:
        """Each patch names its cell's content and its cell, CLS the digits present.

        Returns:
            The loss and the share of patches on digits that name them.
        """
        cell = CELL_OF[BY_CELL] if per_cell else CELL_OF
        logits = self.patch_head(hidden if per_cell else hidden[:, 1:]).float().reshape(-1, CLASSES + CELLS)
        content = cells[:, cell].flatten()
        loss = cross_entropy(logits[:, :CLASSES], content)
        loss = loss + 0.2 * cross_entropy(logits[:, CLASSES:], cell.repeat(len(cells)))
        if not per_cell:
            present = torch.zeros(len(cells), CLASSES).scatter_(1, cells, 1.0)[:, : digits.CLASSES]
            said = self.cls_head(self.tower.post_layernorm(hidden[:, 0])).float()
            loss = loss + 0.5 * binary_cross_entropy_with_logits(said, present)
        right = (logits[:, :CLASSES].argmax(-1) == content)[content != digits.EMPTY]
        return loss, right.float().mean()

    def answer(self, features: Tensor, kept: Tensor, questions: Tensor) -> Tensor:
        """Logits ``[B, K, L, V]`` of the K questions ``[B, K, L]`` behind the patches ``kept`` ``[B, I]``."""
        batch, number, length = questions.shape
        index = kept[..., None].expand(-1, -1, TEXT_WIDTH)
        image = self.projector(features).gather(1, index)
        start = self.llama.embed_tokens(torch.full((batch, 1), digits.TOKEN["<bos>"]))
        states = torch.cat([start, image, self.llama.embed_tokens(questions.flatten(1))], 1)
        asked = (PATCHES + 1 + torch.arange(length)).repeat(number).expand(batch, -1)
        positions = torch.cat([torch.zeros(batch, 1, dtype=torch.long), kept + 1, asked], 1)
        prefix = 1 + kept.shape[1]
        block = torch.arange(1, number + 1).repeat_interleave(length)
        block = torch.cat([torch.zeros(prefix, dtype=torch.long), block])
        place = torch.arange(len(block))
        seen = (place <= place[:, None]) & ((block == 0) | (block == block[:, None]))
        mask = torch.zeros(seen.shape).masked_fill(~seen, -1e4)[None, None]
        out = self.llama(inputs_embeds=states, attention_mask=mask, position_ids=positions, use_cache=False)
        logits: Tensor = self.model.lm_head(out.last_hidden_state[:, prefix:])
        return logits.view(batch, number, length, -1).float()

    def tower_step(self, batch: int, per_cell: bool) -> tuple[Tensor, dict[str, Tensor]]:
        few, many, jitter = (7, 9, 1.0) if per_cell else (1, 9, 2.5)  # dense canvases are easier
        pixels, cells = digits.grid_canvases(
            self.digits, batch, self.generator, fewest=few, most=many, jitter=jitter
        )
        loss, right = self.dense_loss(self.encode(pixels, per_cell), cells, per_cell)
        return loss, {"digits": right}

    def text_step(self, batch: int, frozen: bool) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, cells = digits.grid_canvases(self.digits, batch, self.generator)
        questions, last = packed(cells, self.generator)
        with torch.set_grad_enabled(not frozen):
            hidden = self.encode(pixels)
        order = torch.rand(batch, CELLS, PER_CELL, generator=self.generator).argsort(-1)
        order = order[..., : 4 if frozen else PER_CELL]
        kept = BY_CELL.view(CELLS, -1)[torch.arange(CELLS)[None, :, None], order].flatten(1).sort(1).values
        logits = self.answer(hidden[:, 1:], kept, questions)
        each = torch.arange(len(QUESTIONS))
        answers, said, ended = questions[:, each, last + 1], logits[:, each, last], logits[:, each, last + 1]
        loss = cross_entropy(said.flatten(0, 1), answers.flatten())
        end = torch.full((answers.numel(),), digits.TOKEN["<eos>"])
        loss = loss + 0.1 * cross_entropy(ended.flatten(0, 1), end)
        if not frozen:
            loss = loss + 0.3 * self.dense_loss(hidden, cells, False)[0]
        right = (said.argmax(-1) == answers).float().mean(0)
        columns = {
            kind: [i for i, q in enumerate(QUESTIONS) if q == kind] for kind in dict.fromkeys(QUESTIONS)
        }
        return loss, {kind: right[column].mean() for kind, column in columns.items()}

    def step(self, stage: int, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        if stage < 2:
            return self.tower_step(batch, per_cell=stage == 0)
        return self.text_step(batch, frozen=stage == 2)


def packed(cells: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Questions with answer and ``<eos>``, padded, ``[B, K, L]``, and where each question ends ``[K]``."""
    asked = [digits.ask(cells, kind, generator) for kind in QUESTIONS]
    length = max(question.shape[1] for question, _ in asked) + 2
    tokens = torch.full((len(cells), len(QUESTIONS), length), digits.TOKEN["<pad>"])
    for k, (question, answer) in enumerate(asked):
        end = question.shape[1]
        tokens[:, k, :end], tokens[:, k, end] = question, answer
        tokens[:, k, end + 1] = digits.TOKEN["<eos>"]
    return tokens, torch.tensor([question.shape[1] - 1 for question, _ in asked])


def train(trainer: Trainer, run: Run, options: argparse.Namespace) -> bool:
    """All stages that are left; false when the time allowed ran out."""
    train_with_plain_attention(trainer.model)
    trainer.model.train()
    while run.stage < len(STAGES):
        stage, steps = run.stage, options.steps[run.stage]
        optimizer = Optimizer(trainer.parameters(stage), RATES[stage])
        run.begin(optimizer)
        while run.step < steps:
            with torch.autocast("cpu", torch.bfloat16):
                loss, shares = trainer.step(stage, options.batch)
            optimizer.step(loss, rate(run.step / steps, tail=TAILS[stage]))
            if run.tick(STAGES[stage], steps, loss, shares, optimizer):
                return False
        run.next_stage()
    return True


def main() -> None:
    options = arguments(__doc__.splitlines()[0], NAME, batch=32, steps=STEPS).parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    trainer = Trainer(Generator().manual_seed(options.seed + 1))
    run = Run(options, trainer.modules(), trainer.generator)
    if train(trainer, run, options):
        export(NAME, trainer.model, run, options)
    else:
        print(f"stopped after {run.total} steps; go on with --resume")


if __name__ == "__main__":
    main()
