"""Train recall-lm: a 4-layer Llama that recalls facts from 2048 tokens, in about 25 minutes on one CPU core.

A schedule of stages, each left when the moving average of its accuracy is high enough: copying teaches the
model to look a token up (starting with recall learns nothing), then recall grows from 64 to 1024 tokens, and
a last stage of a fixed number of steps mixes 1024 and 2048 tokens, accumulates gradients and lowers the rate.
All is drawn from ``--seed`` and driven by the step, so that ``--resume`` continues the same run.

    python bench/zoo/train_recall_lm.py --minutes 40
    python bench/zoo/train_recall_lm.py --resume --minutes 20

Weights and card are written only if the held-out scores reach GOALS.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokencomp.zoo import recall
from torch import Generator, Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NAME = "recall-lm"
MUON_RATE, ADAM_RATE, WARM_UP, FINAL_RATE = 0.02, 2e-3, 50, 0.02
EMA, EMA_START = 0.95, 0.5
CHECK_EVERY, SAVE_SECONDS = 40, 60.0
PICK_SEED, CARD_SEED = 1_000_003, 2_000_003  # held out, for the best weights and for the card
GOALS = {1024: 0.98, 2048: 0.95}  # exact match
FACTS = {64: (6, 6), 128: (16, 8), 256: (32, 16), 512: (64, 32), 1024: (96, 48), 2048: (112, 64)}


@dataclass(frozen=True)
class Stage:
    """Batches of one kind: copying of ``(length, rows)``, or recall of FACTS at every length of a step."""

    task: str
    parts: tuple[tuple[int, int], ...]  # (length, rows), one micro-batch each
    leave: float  # moving average of the accuracy at which the stage is done; above 1: never


STAGES = (
    Stage("copying", ((32, 64),), 0.95),
    Stage("copying", ((64, 48),), 0.97),
    Stage("recall", ((64, 48),), 0.97),
    Stage("recall", ((128, 32),), 0.97),
    Stage("recall", ((256, 16),), 0.97),
    Stage("recall", ((512, 8),), 0.97),
    Stage("recall", ((1024, 4),), 0.97),
    Stage("recall", ((2048, 2), (1024, 3), (2048, 2)), 2.0),
)


def new_model(seed: int) -> Any:
    """The untrained model, 2.5M parameters, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=recall.VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=recall.BOS,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return LlamaForCausalLM(config)


def draw(task: str, length: int, rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """One micro-batch: tokens and labels ``[rows, length]``."""
    if task == "copying":
        return recall.copying(rows, length, generator)
    return recall.recall(rows, length, *FACTS[length], generator)


PLAIN = ("seed", "step", "stage", "stage_step", "tokens", "ema", "seconds", "best", "best_step", "best_model")


class Run:
    """A training run: model, optimisers, and where in the schedule it is."""

    def __init__(self, seed: int, final_steps: int) -> None:
        self.model = new_model(seed)
        self.generator = Generator().manual_seed(seed)
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            (matrices if parameter.ndim == 2 and "layers" in name else rest).append(parameter)
        self.muon = torch.optim.Muon(
            matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"
        )
        self.adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.final_steps = final_steps
        self.seed = seed
        self.step = self.stage = self.stage_step = self.tokens = 0
        self.ema = EMA_START
        self.seconds = 0.0
        self.best, self.best_step = -1.0, 0
        self.best_model: dict[str, Tensor] = {}

    def save(self, path: Path) -> None:
        """Write everything needed to go on; the file is whole or the old one."""
        state: dict[str, Any] = {name: getattr(self, name) for name in PLAIN}
        for name in ("model", "muon", "adam"):
            state[name] = getattr(self, name).state_dict()
        state["generator"] = self.generator.get_state()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in PLAIN:
            setattr(self, name, state[name])
        for name in ("model", "muon", "adam"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])

    @property
    def is_final(self) -> bool:
        return self.stage == len(STAGES) - 1

    @property
    def is_done(self) -> bool:
        return self.is_final and self.stage_step >= self.final_steps

    def rate(self) -> float:
        """Share of the full learning rate: warm-up, constant, and down to FINAL_RATE over the last stage."""
        warm = min(1.0, (self.step + 1) / WARM_UP)
        if not self.is_final:
            return warm
        left = max(0.0, 1.0 - self.stage_step / self.final_steps)
        return warm * (FINAL_RATE + (1.0 - FINAL_RATE) * left)

    def train_step(self) -> tuple[float, float]:
        """One step over all micro-batches of the stage: mean loss and share of right tokens."""
        stage, rate = STAGES[self.stage], self.rate()
        self.model.train()
        total, right = 0.0, []
        for length, rows in stage.parts:
            tokens, labels = draw(stage.task, length, rows, self.generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = self.model(input_ids=tokens, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=recall.IGNORE
            ) / len(stage.parts)
            loss.backward()
            total += loss.item()
            right.append(recall.hits(logits.detach(), labels))
            self.tokens += tokens.numel()
        optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (self.muon, MUON_RATE),
            (self.adam, ADAM_RATE),
        ]
        for optimizer, full in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = full * rate
            optimizer.step()
            optimizer.zero_grad()
        accuracy = torch.cat(right).float().mean().item()
        self.ema = EMA * self.ema + (1 - EMA) * accuracy
        self.step += 1
        self.stage_step += 1
        return total, accuracy

    def advance(self) -> bool:
        """Go to the next stage if this one is learnt."""
        if self.ema <= STAGES[self.stage].leave:
            return False
        self.stage, self.stage_step, self.ema = self.stage + 1, 0, EMA_START
        return True

    def keep_best(self, rows: int = 6) -> dict[int, float]:
        """Score on held-out samples (not those of the card) and remember the weights if they are the best."""
        self.model.eval()
        scores = {n: measure(self.model, n, rows, PICK_SEED)["score"] for n in GOALS}
        mean = sum(scores.values()) / len(scores)
        if mean >= self.best:
            self.best, self.best_step = mean, self.step
            self.best_model = {name: value.clone() for name, value in self.model.state_dict().items()}
        return scores


def measure(model: Callable[..., Any], length: int, rows: int, seed: int) -> dict[str, Any]:
    """Recall of FACTS at ``length`` on ``rows`` held-out rows: exact match over answers, and over tokens."""
    facts, queries = FACTS[length]
    exact, single = recall.score(model, length, facts, queries, rows, seed)
    return {
        "task": "recall",
        "length": length,
        "facts": facts,
        "queries": queries,
        "metric": "exact match",
        "score": exact.double().mean().item(),
        "samples": len(exact),
        "token_accuracy": single.double().mean().item(),
        "rows": rows,
        "seed": seed,
    }


def write(run: Run, out: Path, command: str, rows: int) -> bool:
    """Measure the best weights as they ship (bfloat16); write them and their card if GOALS are reached."""
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in run.best_model.items()}
    run.model.load_state_dict({name: value.float() for name, value in weights.items()})
    run.model.eval()
    scores = [measure(run.model, n, max(1, rows * 1024 // max(n, 1024)), CARD_SEED) for n in FACTS]
    print(*(json.dumps(score) for score in scores), sep="\n", flush=True)
    if any(score["score"] < GOALS.get(score["length"], 0.0) for score in scores):
        print(f"goals not reached, nothing written: {GOALS}", flush=True)
        return False
    out.mkdir(parents=True, exist_ok=True)
    data = save(weights, metadata={"format": "pt"})
    (out / f"{NAME}.safetensors").write_bytes(data)
    card = {
        "name": NAME,
        "architecture": "LlamaForCausalLM",
        "parameters": sum(value.numel() for value in weights.values()),
        "data": "tokencomp.zoo.recall: synthetic copying and associative recall, drawn from a seed",
        "command": command,
        "seed": run.seed,
        "steps": run.step,
        "best_step": run.best_step,
        "minutes": round(run.seconds / 60, 1),
        "tokens": run.tokens,
        "tokens_per_second": round(run.tokens / run.seconds),
        "scores": scores,
        "sha256": hashlib.sha256(data).hexdigest(),
        "config": run.model.config.to_diff_dict(),
    }
    (out / f"{NAME}.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"wrote {NAME} ({len(data)} bytes) into {out}", flush=True)
    return True


def train(run: Run, minutes: float, checkpoint: Path) -> None:
    """Train until the schedule ends or ``minutes`` are over, with a checkpoint every minute."""
    begin = saved = time.monotonic()
    before = run.seconds
    while not run.is_done and time.monotonic() - begin < 60 * minutes:
        loss, accuracy = run.train_step()
        now = time.monotonic()
        run.seconds = before + now - begin
        if run.step % 10 == 0:
            stage = STAGES[run.stage]
            shape = "+".join(str(length) for length, _ in stage.parts)
            print(
                f"{run.seconds:6.0f} s  step {run.step:5d}  {stage.task} {shape} [{run.stage_step}]  "
                f"loss {loss:.3f}  accuracy {accuracy:.3f}  mean {run.ema:.3f}  "
                f"{run.tokens / run.seconds:.0f} tokens/s",
                flush=True,
            )
        if run.advance() or now - saved > SAVE_SECONDS:
            run.save(checkpoint)
            saved = now
        if run.is_final and (run.stage_step % CHECK_EVERY == 0 or run.is_done):
            print(f"        held-out exact match {run.keep_best()}, best mean {run.best:.4f}", flush=True)
    run.save(checkpoint)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long, with a checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help=f"below {PICK_SEED}")
    parser.add_argument("--final-steps", type=int, default=250, help="length of the last stage")
    parser.add_argument("--rows", type=int, default=96, help="samples a score in the card is measured on")
    parser.add_argument("--state", type=Path, default=Path("build/zoo/recall-lm.pt"), help="checkpoint")
    parser.add_argument("--out", type=Path, default=Path("python/tokencomp/zoo/weights"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not 0 <= options.seed < PICK_SEED:
        parser.error("--seed: seeds from PICK_SEED on are held out")
    run = Run(options.seed, options.final_steps)
    if options.resume:
        run.load(options.state)
    train(run, options.minutes, options.state)
    if not run.best_model:  # the last stage was not reached
        print(f"stopped at stage {run.stage + 1} of {len(STAGES)}; --resume goes on", flush=True)
        return 1
    command = f"python bench/zoo/{Path(__file__).name} --seed {run.seed} --final-steps {run.final_steps}"
    command += f" --threads {options.threads}"
    return 0 if write(run, options.out, command, options.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
