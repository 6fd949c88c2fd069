"""Llamas from prompt to answer: tokens a second, bytes of the cache and peak bytes, with and without methods.

    python bench/bench_model.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

Three models, batch 1: ``small`` has random weights, 8 layers with heads of an 8B model (D=128) but fewer
(Hq=8, Hkv=2); ``8B`` random weights of the sizes of Llama-3.1-8B's layers, 4 of them on a processor, all 32
on a GPU; both in bfloat16. ``recall-lm`` is the trained model that ships with the package, in float32.
``prompt`` is one forward of the whole prompt, what a method scores, selects and quantizes there included;
``answer`` are 32 decode steps behind it. Cache bytes are those at the end; peak bytes are the most at once,
prompt and answer, above the model. ``DynamicCache`` is the model as it is, under sdpa; for ``small`` once in
float32 too, which is faster on some processors. QuantizedCache of transformers and kvpress join where they
are installed (bench/peers); 32 steps are fewer than QuantizedCache waits before it quantizes again.
Contenders take turns, each on a fresh cache, and the best times count. In ``small`` attention and the cache
weigh more than in a large model.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokencomp
import torch
from common import Row, command, estimate, now, peak_bytes
from tokencomp import methods
from tokencomp.cache import KeepAll
from tokencomp.eval.measure import cache_bytes
from torch import Tensor

sys.path += [str(Path(__file__).resolve().parent / "peers" / name) for name in ("kvpress", "quantized_cache")]

STEPS, ROUNDS, SHARE = 32, 3, 0.25
WARM = 256  # tokens of the prompt that warms up
BITS: dict[str, Any] = {"sinks": 4, "recent": 32, "edges": 0}
METHODS: dict[str, Any] = {
    "all kept": KeepAll(),
    "SnapKV, 25 %": methods.SnapKV(budget=SHARE),
    "A2SF, 25 %": methods.A2SF(budget=SHARE),
    "KeyDiff, 25 %": methods.KeyDiff(budget=SHARE),
    "int4": methods.Uniform(4, **BITS),
    "KIVI, 2 bits": methods.KIVI(2, **BITS),
    "Quest, 512 slots": methods.Quest(k=512),
    "XAttention": methods.XAttention(),
}
FEW = ("all kept", "SnapKV, 25 %", "int4", "XAttention")
PRESSES = ("kvpress-snapkv", "kvpress-keydiff")

Context = Callable[[], AbstractContextManager[Any]]  # in which the model is compressed


@dataclass(frozen=True)
class Stack:
    """A Llama of random weights and what is run on it."""

    name: str
    hidden: int
    inner: int
    layers: int
    hq: int
    hkv: int
    tokens: tuple[int, ...]  # of the prompts
    whole: bool = True  # all methods, and the model in float32 too; else few
    rounds: int = ROUNDS
    D: int = 128
    vocabulary: int = 256

    def model(self, device: str, dtype: torch.dtype) -> Any:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.hq, num_key_value_heads=self.hkv,
            head_dim=self.D, max_position_embeddings=131072,
        )  # fmt: skip
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # there and so from the start: weights of 8B are made once
        try:
            with torch.device(device):
                model: Any = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        return model.eval()


def stacks(device: str, quick: bool) -> list[Stack]:
    cpu = device == "cpu"
    small = Stack("small", 512, 1024, 8, 8, 2, (1024,) if quick else (4096,) if cpu else (4096, 32768))
    large = Stack(
        "8B", 4096, 14336, 4 if cpu else 32, 32, 8, (4096,) if cpu else (32768,), whole=False, rounds=2
    )
    return [small] if quick else [small, large]


def contenders(model: Any, *, whole: bool) -> dict[str, Context]:
    """Who is measured; names of peers do not begin with ours."""
    found: dict[str, Context] = {"DynamicCache": nullcontext}
    found |= {
        f"tokencomp {name}": partial(tokencomp.compress, model, method)
        for name, method in METHODS.items()
        if whole or name in FEW
    }
    for package, backend in (("optimum.quanto", "quanto"), ("hqq", "hqq")):
        if find_spec(package.partition(".")[0]) and find_spec(package):
            from quantized import Peer

            for bits in (4, 2) if whole else (4,):
                peer = Peer(f"QuantizedCache, {backend} {bits} bits", backend, bits)
                found[peer.name] = partial(peer.apply, model, 1.0, seed=0)
    if find_spec("kvpress"):
        import compare

        for press in compare.PRESSES:
            if press.name in PRESSES[: None if whole else 1]:
                found[f"{press.name}, 25 %"] = partial(press.apply, model, SHARE, seed=0)
    return found


@dataclass
class Run:
    """One prompt and its answer."""

    prompt: float  # seconds
    answer: float
    held: int
    peak: float  # 0: not measured


def generate(model: Any, ids: Tensor, *, watched: bool) -> Run:
    """``watched``: with its peak, which takes time, for memory is given back before."""
    peaks: list[float] = []
    device = "cuda" if ids.is_cuda else "cpu"
    with peak_bytes(device, peaks) if watched else nullcontext():
        begin = done(ids)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        between = done(ids)
        cache = out.past_key_values
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
        end = done(ids)
    return Run(between - begin, end - between, cache_bytes(cache), max(peaks, default=0.0))


def done(x: Tensor) -> float:
    """The time when the device has finished."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return now()


def measure(every: dict[str, tuple[Any, Context]], ids: Tensor, rounds: int, facts: str) -> list[Row]:
    """Rows of all contenders, each a model and its context; turn 0 warms up, turn 1 watches peaks."""
    runs: dict[str, list[Run]] = {}
    for turn in range(rounds + 1):
        for name, (model, context) in every.items():
            with context():
                found = generate(model, ids if turn else ids[:, :WARM], watched=turn == 1)
            if turn:
                runs.setdefault(name, []).append(found)
    tokens, rows = ids.shape[1], []
    for part, count in (("prompt", tokens), ("answer", STEPS)):
        case = f"{part} of {count}" + (f" behind {tokens}" if part == "answer" else "") + f" {facts}"
        rows += [
            Row(
                "model", case, name, estimate([getattr(run, part) for run in several], min), 0.0, 0.0,
                baseline=not name.startswith("tokencomp"), tokens=float(count), held=float(several[0].held),
                peak=several[0].peak,
            )
            for name, several in runs.items()
        ]  # fmt: skip
    return rows


def prompt(tokens: int, vocabulary: int, device: str) -> Tensor:
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def of_stack(stack: Stack, device: str, *, checked: bool) -> list[Row]:
    model = stack.model(device, torch.bfloat16)
    if checked:
        check(model, device)
    every = {name: (model, context) for name, context in contenders(model, whole=stack.whole).items()}
    if stack.whole:
        every["DynamicCache, float32"] = (stack.model(device, torch.float32), nullcontext)
    facts = f"{stack.name} B=1 Hq={stack.hq} Hkv={stack.hkv} D={stack.D} layers={stack.layers} bfloat16"
    rows: list[Row] = []
    for tokens in stack.tokens:
        ids = prompt(tokens, stack.vocabulary, device)
        rows += show(measure(every, ids, stack.rounds, facts))
    return rows


def of_recall(device: str) -> list[Row]:
    """The trained model on its longest prompt."""
    from tokencomp import zoo

    model = zoo.load("recall-lm")[0].to(device)
    every = {name: (model, context) for name, context in contenders(model, whole=True).items()}
    ids = prompt(model.config.max_position_embeddings - STEPS, model.config.vocab_size, device)
    return show(measure(every, ids, ROUNDS, "recall-lm B=1 Hq=4 Hkv=2 D=64 layers=4 float32"))


def show(rows: list[Row]) -> list[Row]:
    times = ", ".join(f"{r.name} {r.tokens / r.seconds:.0f}" for r in rows)
    print(f"{rows[0].case}, tokens/s: {times}", file=sys.stderr)
    return rows


def check(model: Any, device: str) -> None:
    """With every token kept the model says what it said."""
    ids = prompt(300, 256, device)
    want = model(ids).logits.float()
    with tokencomp.compress(model, KeepAll()):
        got = model(ids, use_cache=True).logits.float()
    error = ((got - want).norm() / want.norm()).item()
    if not error < 0.02:
        raise SystemExit(f"model: logits with every token kept are off by {error:.3g} of their size")


@torch.no_grad()
def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows = [row for stack in stacks(device, quick) for row in of_stack(stack, device, checked=checked)]
    return rows if quick else rows + of_recall(device)


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
