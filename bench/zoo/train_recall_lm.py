"""Train recall-lm: a 4-layer Llama that recalls facts from 2048 tokens, copies, and continues text.

A schedule of stages, each left when the moving average of its accuracy is high enough: copying teaches the
model to look a token up (starting with recall learns nothing), then recall grows from 64 to 1024 tokens. Two
stages of a fixed number of steps follow, each step of recall of all kinds at 64 to 2048 tokens, copying and
text, with a falling rate. All is drawn from ``--seed`` and driven by the step, so that ``--resume`` continues
the same run to the bit.

    python bench/zoo/train_recall_lm.py --minutes 20
    python bench/zoo/train_recall_lm.py --resume

Weights and card are written only if the held-out scores are those NEEDED by ``recall_scores.py``.
"""

import argparse
import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cards import round_weights, save
from recall_scores import FACTS, GOALS, NEEDED, PICK_SEED, card_scores, missed, pick
from tokencomp.zoo import recall, text
from torch import Generator, Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NAME = "recall-lm"
MUON_RATE, ADAM_RATE, WARM_UP, FINAL_RATE = 0.02, 2e-3, 50, 0.02
EMA, EMA_START = 0.95, 0.5
PRINT_EVERY, CHECK_EVERY, SAVE_SECONDS = 10, 50, 60.0
DATA = (
    "tokencomp.zoo.recall: synthetic copying and associative recall, drawn from a seed; tokencomp.zoo.text: "
    "docstrings and licence of the Python standard library, split by module"
)
NOTES = [
    "bf16 autocast in training; scores are those of the stored bfloat16 weights in float32",
    "minutes are those of training on one core of two, shared with other work, without scores of the card",
]


@dataclass(frozen=True)
class Part:
    """A micro-batch: so many tokens of a kind, in rows of a length drawn from ``[shortest, longest]``."""

    kind: str
    shortest: int
    longest: int
    tokens: int


@dataclass(frozen=True)
class Stage:
    """The micro-batches of one step, and how long: until the accuracy is there, or for a number of steps."""

    parts: tuple[Part, ...]
    leave: float = 2.0  # moving average of the accuracy at which the stage is done; above 1: never
    steps: int = 0  # after which it is done, the rate falling over them; 0: not by steps
    rate: float = 1.0  # share of the full learning rate that it begins with
    new_bytes: bool = False  # text is new


STAGES = (
    Stage((Part("copying", 32, 32, 2048),), 0.90),
    Stage((Part("copying", 64, 64, 3072),), 0.95),
    Stage((Part("recall", 64, 64, 3072),), 0.95),
    Stage((Part("recall", 128, 128, 4096),), 0.95),
    Stage((Part("recall", 256, 256, 4096),), 0.95),
    Stage((Part("recall", 512, 512, 4096),), 0.95),
    Stage((Part("recall", 1024, 1024, 4096),), 0.95),
    Stage(
        (
            Part("varied recall", 2048, 2048, 2048),
            Part("varied recall", 2048, 2048, 2048),
            Part("varied recall", 1024, 1024, 2048),
            Part("varied recall", 64, 512, 1024),
            Part("copying", 16, 256, 1024),
            Part("text", 512, 1024, 4096),
        ),
        steps=450,
        new_bytes=True,
    ),
    Stage(
        (
            Part("far recall", 2048, 2048, 2048),
            Part("varied recall", 2048, 2048, 2048),
            Part("varied recall", 1024, 1024, 2048),
            Part("varied recall", 64, 512, 2048),
            Part("far recall", 64, 512, 1024),
            Part("copying", 16, 256, 1024),
            Part("text", 512, 1024, 2048),
        ),
        steps=100,
        rate=0.25,
    ),
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


def draw(part: Part, generator: Generator) -> tuple[Tensor, Tensor]:
    """One micro-batch: tokens and labels ``[rows, length]``."""
    length = part.shortest
    if part.longest > length:
        length = int(torch.randint(length, part.longest + 1, (), generator=generator))
    rows = part.tokens // length
    if part.kind == "copying":
        return recall.copying(rows, length, generator)
    if part.kind == "text":
        return text.windows(rows, length, generator, "train")
    if part.kind == "recall":
        return recall.recall(rows, length, *FACTS[length], generator)
    if part.kind == "far recall":
        return far_recall(rows, length, generator)
    return varied_recall(rows, length, generator)


def varied_recall(rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Recall with up to 64 questions, half of the time about distinct facts, or, 1 time in 5, with a needle.

    Facts and questions are any number that fits, large ones being the likelier. Needles lie at the very ends
    more often than by chance, since a uniform depth hardly ever asks for them.
    """
    kind, share, filled, place, repeated = torch.rand(5, generator=generator).tolist()
    queries = 1 if kind < 0.2 else 1 + int(share**0.5 * min(64, length // 8))
    places = (length - queries * recall.FACT_TOKENS - 1) // recall.FACT_TOKENS
    facts = max(1, round(min(places, recall.KEY_COUNT) * filled**0.5))
    if kind < 0.2:
        depth = min(1.0, max(0.0, 1.5 * place - 0.25))
        return recall.recall(rows, length, facts, queries, generator, depth)
    distinct = repeated < 0.5
    queries = min(queries, facts) if distinct else queries
    return recall.recall(rows, length, facts, queries, generator, distinct=distinct)


def far_recall(rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Facts from the first token on, without a gap, and at the end a question about each, in any order.

    By chance alone few questions are about what lies at the very beginning.
    """
    queries = int(torch.randint(1, min(64, (length - 1) // 8) + 1, (), generator=generator))
    end = 1 + queries * recall.FACT_TOKENS
    near = end + queries * recall.FACT_TOKENS
    tokens, labels = recall.recall(rows, near, queries, queries, generator, distinct=True)
    filler = torch.randint(recall.FILLER, recall.BYTES, (rows, length - near), generator=generator)
    nothing = torch.full_like(filler, recall.IGNORE)
    tokens = torch.cat([tokens[:, :end], filler, tokens[:, end:]], dim=1)
    return tokens, torch.cat([labels[:, :end], nothing, labels[:, end:]], dim=1)


Progress = dict[str, list[tuple[float, float]]]  # loss and accuracy of the micro-batches of each kind


FIXED = ("seed", "schedule")
PLAIN = ("step", "stage", "stage_step", "stage_steps", "tokens", "ema", "seconds")
BEST = ("best", "best_step", "best_model")


class Run:
    """A training run: model, optimisers, and where in the schedule it is."""

    def __init__(self, seed: int) -> None:
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
        self.seed, self.schedule = seed, hashlib.sha256(repr(STAGES).encode()).hexdigest()
        self.step = self.stage = self.stage_step = self.tokens = 0
        self.stage_steps: list[int] = []  # of the stages that are done
        self.ema = EMA_START
        self.seconds = 0.0
        self.best, self.best_step = float("-inf"), 0
        self.best_model: dict[str, Tensor] = {}

    def save(self, path: Path) -> None:
        """Write everything needed to go on; the file is whole or the old one."""
        state: dict[str, Any] = {name: getattr(self, name) for name in (*FIXED, *PLAIN, *BEST)}
        for name in ("model", "muon", "adam"):
            state[name] = getattr(self, name).state_dict()
        state["generator"] = self.generator.get_state()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what ``save`` wrote; ValueError where that is another run."""
        state = torch.load(path, weights_only=True)
        for name in FIXED:
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"{path.name} is of a run with {name} {state[name]}, not {getattr(self, name)}"
                )
        for name in (*PLAIN, *BEST):
            setattr(self, name, state[name])
        for name in ("model", "muon", "adam"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])

    @property
    def is_done(self) -> bool:
        return self.stage == len(STAGES)

    @property
    def is_check(self) -> bool:
        """Whether the weights after this step, of the last stage, may be the best."""
        return self.stage == len(STAGES) - 1 and (self.stage_step % CHECK_EVERY == 0 or self.is_learnt)

    @property
    def is_learnt(self) -> bool:
        stage = STAGES[self.stage]
        return self.ema > stage.leave or 0 < stage.steps <= self.stage_step

    def rate(self) -> float:
        """Share of the full learning rate: warm-up, then constant or falling to FINAL_RATE over the stage."""
        warm, stage = min(1.0, (self.step + 1) / WARM_UP), STAGES[self.stage]
        if not stage.steps:
            return warm * stage.rate
        left = max(0.0, 1.0 - self.stage_step / stage.steps)
        return warm * (FINAL_RATE + (stage.rate - FINAL_RATE) * left)

    def train_step(self) -> Progress:
        """One step over all micro-batches of the stage, each of the same weight."""
        parts, rate = STAGES[self.stage].parts, self.rate()
        self.model.train()
        progress: Progress = {}
        for part in parts:
            tokens, labels = draw(part, self.generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = self.model(input_ids=tokens, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=recall.IGNORE
            )
            (loss / len(parts)).backward()
            accuracy = recall.hits(logits.detach(), labels).float().mean().item()
            progress.setdefault(part.kind, []).append((loss.item(), accuracy))
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
        shares = [share for entries in progress.values() for _, share in entries]
        self.ema = EMA * self.ema + (1 - EMA) * sum(shares) / len(shares)
        self.step += 1
        self.stage_step += 1
        return progress

    def advance(self) -> None:
        """Go to the next stage."""
        self.stage_steps.append(self.stage_step)
        self.stage, self.stage_step, self.ema = self.stage + 1, 0, EMA_START
        if not self.is_done and STAGES[self.stage].new_bytes:
            self.renew_bytes()

    @torch.no_grad()
    def renew_bytes(self) -> None:
        """Let the bytes start anew. Being wrong all the time so far pushed all their output rows one way."""
        embedding, head = self.model.model.embed_tokens.weight, self.model.lm_head.weight
        known = embedding[recall.KEYS : recall.FILLER].std()
        for weight, scale in ((embedding, known), (head, self.model.config.initializer_range)):
            rows = weight[recall.BYTES :]
            rows.copy_(torch.randn(rows.shape, generator=self.generator) * scale)
            for moment in ("exp_avg", "exp_avg_sq"):
                self.adam.state[weight][moment][recall.BYTES :] = 0.0

    def keep_best(self) -> str:
        """Score on held-out samples (not those of the card) and remember the weights if they are the best."""
        self.model.eval()
        score, told = pick(self.model)
        if score >= self.best:
            self.best, self.best_step = score, self.step
            self.best_model = {name: value.clone() for name, value in self.model.state_dict().items()}
        return told


def write(run: Run, out: Path, command: str, rows: int, threads: int) -> bool:
    """Measure the best weights as they ship (bfloat16); write them and their card if they are good enough."""
    run.model.load_state_dict(run.best_model)
    run.model.eval()
    round_weights(run.model)
    scores, loss = card_scores(run.model, rows)
    for entry in [*scores, loss]:
        print(entry, flush=True)
    if missed(scores, NEEDED):
        print(f"nothing written, goals not reached: {'; '.join(missed(scores, NEEDED))}", flush=True)
        return False
    card = {"data": DATA, "command": command, "notes": NOTES, "seed": run.seed, "steps": run.step}
    card |= {"stage_steps": run.stage_steps, "best_step": run.best_step}
    card |= {"minutes": round(run.seconds / 60, 1), "threads": threads, "tokens": run.tokens}
    card |= {"tokens_per_second": round(run.tokens / run.seconds), "scores": scores, "text": loss}
    card |= {"goals_missed": missed(scores, GOALS)}
    print(f"wrote {save(NAME, run.model, card, out)}", flush=True)
    return True


def train(run: Run, minutes: float, checkpoint: Path) -> None:
    """Train until the schedule ends or ``minutes`` are over, with a checkpoint every minute."""
    begin = saved = time.monotonic()
    before = run.seconds
    recent: Progress = {}
    while not run.is_done and time.monotonic() - begin < 60 * minutes:
        for kind, entries in run.train_step().items():
            recent.setdefault(kind, []).extend(entries)
        if run.step % PRINT_EVERY == 0:
            print(line(run, recent), flush=True)
            recent = {}
        if run.is_check:
            print(f"        held out: {run.keep_best()}; best {run.best:.4f}", flush=True)
        now = time.monotonic()
        run.seconds = before + now - begin
        if learnt := run.is_learnt:
            run.advance()
        if learnt or now - saved > SAVE_SECONDS:
            run.save(checkpoint)
            saved = now
    run.save(checkpoint)


def line(run: Run, recent: Progress) -> str:
    """Where the run is, with mean loss and accuracy of each kind since the last line."""
    told = []
    for kind, entries in recent.items():
        loss, share = (sum(column) / len(entries) for column in zip(*entries, strict=True))
        told.append(f"{kind} {loss:.3f} {share:.3f}")
    at = (
        f"{run.seconds:6.0f} s  step {run.step:5d}  stage {run.stage + 1} of {len(STAGES)} [{run.stage_step}]"
    )
    speed = f"{run.tokens / max(run.seconds, 1e-9):.0f} tokens/s"
    return "  ".join([at, *told, f"mean {run.ema:.3f}", speed])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, with a checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help=f"below {PICK_SEED}")
    parser.add_argument("--rows", type=int, default=128, help="samples a score in the card is measured on")
    parser.add_argument("--state", type=Path, default=Path("build/zoo/recall-lm.pt"), help="checkpoint")
    parser.add_argument("--out", type=Path, default=Path("python/tokencomp/zoo/weights"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not 0 <= options.seed < PICK_SEED:
        parser.error("--seed: seeds from PICK_SEED on are held out")
    run = Run(options.seed)
    if options.resume:
        run.load(options.state)
    train(run, options.minutes, options.state)
    if not run.is_done:
        print(f"stopped in stage {run.stage + 1} of {len(STAGES)}; --resume goes on", flush=True)
        return 1
    command = f"python bench/zoo/{Path(__file__).name}"
    for name in ("threads", "seed"):
        if (value := getattr(options, name)) != parser.get_default(name):
            command += f" --{name} {value}"
    return 0 if write(run, options.out, command, options.rows, options.threads) else 1


if __name__ == "__main__":
    sys.exit(main())
