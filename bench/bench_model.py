"""A small Llama from prompt to answer: tokens a second and what the cache holds, with and without methods.

    python bench/bench_model.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

Random weights, bfloat16, 8 layers with heads of an 8B model (D=128) but fewer (Hq=8, Hkv=2), batch 1.
``prompt`` is one forward of the whole prompt, what a method scores, selects and quantizes there included;
``answer`` are 32 decode steps behind it. Bytes are those of the cache at the end. ``DynamicCache`` is the
model as it is, under sdpa, and once in float32, which is faster on some processors. QuantizedCache of
transformers and kvpress join where they are installed, each in an environment of its own (bench/peers); 32
steps are fewer than QuantizedCache waits before it quantizes again. Contenders take turns, each on a fresh
cache, and the best times count. Weights are few: attention and the cache weigh more than in a large model.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokencomp
import torch
from common import Row, command, estimate, now
from tokencomp import methods
from tokencomp.cache import KeepAll
from tokencomp.eval.measure import cache_bytes
from torch import Tensor

sys.path += [str(Path(__file__).resolve().parent / "peers" / name) for name in ("kvpress", "quantized_cache")]

HQ, HKV, D, LAYERS = 8, 2, 128, 8
STEPS, ROUNDS, SHARE, VOCABULARY = 32, 3, 0.25, 256
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

Context = Callable[[], AbstractContextManager[Any]]  # in which the model is compressed


def model_of(device: str, dtype: torch.dtype) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=LAYERS,
        num_attention_heads=HQ, num_key_value_heads=HKV, head_dim=D, max_position_embeddings=65536,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    return model.eval().to(device, dtype)


def contenders(model: Any) -> dict[str, Context]:
    """Who is measured; names of peers do not begin with ours."""
    found: dict[str, Context] = {"DynamicCache": nullcontext}
    found |= {
        f"tokencomp {name}": partial(tokencomp.compress, model, method) for name, method in METHODS.items()
    }
    for package, backend in (("optimum.quanto", "quanto"), ("hqq", "hqq")):
        if find_spec(package.partition(".")[0]) and find_spec(package):
            from quantized import Peer

            for bits in (4, 2):
                peer = Peer(f"QuantizedCache, {backend} {bits} bits", backend, bits)
                found[peer.name] = partial(peer.apply, model, 1.0, seed=0)
    if find_spec("kvpress"):
        from compare import PRESSES

        for press in PRESSES:
            if press.name in ("kvpress-snapkv", "kvpress-keydiff"):
                found[f"{press.name}, 25 %"] = partial(press.apply, model, SHARE, seed=0)
    return found


def generate(model: Any, ids: Tensor) -> tuple[float, float, int]:
    """Seconds of the prompt and of the answer, and bytes of the cache behind both."""
    begin = done(ids)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    between = done(ids)
    cache = out.past_key_values
    for _ in range(STEPS):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
    return between - begin, done(ids) - between, cache_bytes(cache)


def done(x: Tensor) -> float:
    """The time when the device has finished."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return now()


def measure(model: Any, wide: Any, tokens: int, device: str) -> list[Row]:
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    runs: dict[str, list[tuple[float, float, int]]] = {}
    every = {name: (model, context) for name, context in contenders(model).items()}
    every["DynamicCache, float32"] = (wide, nullcontext)
    for turn in range(ROUNDS + 1):
        for name, (who, context) in every.items():
            with context():
                found = generate(who, ids if turn else ids[:, :WARM])
            if turn:
                runs.setdefault(name, []).append(found)
    rows = []
    for i, (part, count) in enumerate((("prompt", tokens), ("answer", STEPS))):
        case = f"{part} of {count}" + f" behind {tokens}" * i
        case += f" B=1 Hq={HQ} Hkv={HKV} D={D} layers={LAYERS} bfloat16"
        rows += [
            Row(
                "model", case, name, estimate([run[i] for run in several], min), 0.0, 0.0,
                baseline=not name.startswith("tokencomp"), tokens=float(count), held=float(several[0][2]),
            )
            for name, several in runs.items()
        ]  # fmt: skip
    return rows


def check(model: Any, device: str) -> None:
    """With every token kept the model says what it said."""
    ids = torch.randint(VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(2)).to(device)
    want = model(ids).logits.float()
    with tokencomp.compress(model, KeepAll()):
        got = model(ids, use_cache=True).logits.float()
    error = ((got - want).norm() / want.norm()).item()
    if not error < 0.02:
        raise SystemExit(f"model: logits with every token kept are off by {error:.3g} of their size")


@torch.no_grad()
def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    model, wide = (model_of(device, dtype) for dtype in (torch.bfloat16, torch.float32))
    if checked:
        check(model, device)
    rows: list[Row] = []
    for tokens in (1024,) if quick else (4096,) if device == "cpu" else (4096, 32768):
        measured = measure(model, wide, tokens, device)
        rows += measured
        times = ", ".join(f"{r.name} {r.tokens / r.seconds:.0f}" for r in measured)
        print(f"{tokens} tokens, tokens/s: {times}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
