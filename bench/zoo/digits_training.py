"""What the two digit trainers share: optimisers, schedule, attention that is quick to train, checkpoints."""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Named = list[tuple[str, nn.Parameter]]
NOT_MUON = ("embed", "lm_head", "classifier", "head")
CHECKPOINT_SECONDS = 60.0


def arguments(description: str, name: str, batch: int, steps: list[int]) -> argparse.ArgumentParser:
    """The options that both trainers have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("out") / name, help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--minutes", type=float, help="stop, with a checkpoint, after so many minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--steps", type=int, nargs=len(steps), default=steps, help="of each stage")
    parser.add_argument("--zoo", type=Path, help="when finished, put weights and card into this folder")
    return parser


def named(module: nn.Module, prefix: str) -> Named:
    return [(prefix + name, parameter) for name, parameter in module.named_parameters()]


def rate(done: float, warm: float = 0.04, tail: float = 0.4) -> float:
    """Factor of the learning rate at ``done`` in [0, 1): warm-up, flat, linear decay to 2 %."""
    return min(1.0, done / warm + 0.02) if done < 1 - tail else max(0.02, (1 - done) / tail)


class Optimizer:
    """Muon on the hidden matrices, AdamW on everything else, gradients clipped at norm 1."""

    def __init__(self, parameters: Named, base: float) -> None:
        self.base, self.parameters = base, [parameter for _, parameter in parameters]
        hidden = [p for name, p in parameters if p.ndim == 2 and not any(word in name for word in NOT_MUON)]
        ids = {id(parameter) for parameter in hidden}
        rest = [parameter for parameter in self.parameters if id(parameter) not in ids]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                hidden, lr=base, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=base, betas=(0.9, 0.98), weight_decay=0.01),
        ]

    def step(self, loss: Tensor, factor: float) -> None:
        for part in self.parts:
            part.zero_grad()
            for group in part.param_groups:
                group["lr"] = self.base * factor
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            part.step()

    def state(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def restore(self, state: Iterable[dict[str, Any]]) -> None:
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


def sincos(side: int, dim: int) -> Tensor:
    """``[side * side, dim]`` 2-D sine and cosine positions, base 50: where position tables start from."""
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    wave = 50 ** -(torch.arange(dim // 4) / (dim // 4))
    return torch.cat(
        [f(axis.flatten()[:, None] * wave) for axis in (x, y) for f in (torch.sin, torch.cos)], 1
    )


def _plain_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q * options["scaling"]) @ k.transpose(-1, -2)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, -1e4)
        else:
            scores = scores + attention_mask
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(1, 2), None


def train_with_plain_attention(model: Any) -> None:
    """Until ``set_attn_implementation("sdpa")``: matrix products, whose backward is 3 times quicker on a CPU.

    The mask function is registered along with it: transformers passes no mask at all to an attention that has
    none, and a causal model turns bidirectional.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("tokencomp_training", _plain_attention)
    AttentionMaskInterface.register("tokencomp_training", eager_mask)
    model.set_attn_implementation("tokencomp_training")


class Run:
    """Counts steps and seconds across resumes, prints progress, writes ``checkpoint.pt`` every minute."""

    def __init__(
        self, options: argparse.Namespace, modules: dict[str, nn.Module], generator: torch.Generator
    ):
        self.out, self.modules, self.generator = options.out, modules, generator
        self.limit = float("inf") if options.minutes is None else options.minutes * 60
        self.stage, self.step, self.total, self.seconds = 0, 0, 0, 0.0
        self.began = self.saved = time.monotonic()
        self.earlier = 0.0
        self.optimizer_state: list[dict[str, Any]] | None = None
        self.averages: dict[str, float] | None = None
        self.out.mkdir(parents=True, exist_ok=True)
        if options.resume:
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.generator.set_state(state["generator"])
        self.stage, self.step, self.total = state["stage"], state["step"], state["total"]
        self.earlier, self.optimizer_state = state["seconds"], state["optimizer"]

    def elapsed(self) -> float:
        """Seconds of training, earlier runs included."""
        return self.earlier + time.monotonic() - self.began

    def save(self, optimizer: Optimizer | None) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "generator": self.generator.get_state(),
            "stage": self.stage,
            "step": self.step,
            "total": self.total,
            "seconds": self.elapsed(),
            "optimizer": optimizer.state() if optimizer else None,
        }
        torch.save(state, self.out / "checkpoint.tmp")
        os.replace(self.out / "checkpoint.tmp", self.out / "checkpoint.pt")
        self.saved = time.monotonic()

    def begin(self, optimizer: Optimizer) -> None:
        """Takes up the optimiser's state when the checkpoint lies in the middle of a stage."""
        if self.optimizer_state is not None:
            optimizer.restore(self.optimizer_state)
        self.optimizer_state, self.averages = None, None

    def tick(
        self, name: str, steps: int, loss: Tensor, shares: dict[str, Tensor], optimizer: Optimizer
    ) -> bool:
        """After each step; true when the time allowed is over."""
        self.step, self.total = self.step + 1, self.total + 1
        now = {key: float(value) for key, value in shares.items()}
        last = self.averages or now
        self.averages = {key: 0.95 * last[key] + 0.05 * value for key, value in now.items()}
        if self.step % 10 == 0 or self.step == steps:
            said = " ".join(f"{key} {value:.3f}" for key, value in self.averages.items())
            line = f"{name} {self.step}/{steps} {self.elapsed():.0f}s loss {loss.item():.3f} {said}"
            print(line, end="\r" if sys.stdout.isatty() and self.step < steps else "\n", flush=True)
        over = time.monotonic() - self.began > self.limit
        if over or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self.save(optimizer)
        return over

    def next_stage(self) -> None:
        self.stage, self.step = self.stage + 1, 0
        self.save(None)
