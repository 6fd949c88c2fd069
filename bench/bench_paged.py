"""Decoders on the paged cache against their own cache, in one run.

    python bench/bench_paged.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

A random Llama of two layers with the heads of an 8B model (Hq=32, Hkv=8, D=128) and a small rest:
attention is what takes time. ``step``: one decode step of the whole model; ``DynamicCache`` is the model as
it is, under sdpa, the others are ``tokencomp.compress`` with every token kept, and a quarter of the prompt.
``evict``: what scoring, selecting and storing a quarter of a prompt takes beside the attention of that layer
over the prompt, which is in the table as the peer. Contenders take turns and the best time counts.
"""

from collections.abc import Callable
from typing import Any

import tokencomp
import torch
from common import Row, command, interleaved_seconds
from tokencomp import attention, methods
from tokencomp.cache import KeepAll

D, LAYERS, SHARE = 128, 2, 0.25
HEADS = (32, 8)  # query and key-value heads of an 8B model
METHODS: dict[str, Any] = {
    "SnapKV": methods.SnapKV(budget=SHARE),
    "A2SF": methods.A2SF(budget=SHARE),
    "H2O": methods.H2O(budget=SHARE),
}


def decoder(device: str, heads: tuple[int, int]) -> Any:
    """The model, bfloat16."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=D, max_position_embeddings=65536,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    return model.eval().to(device, torch.bfloat16)


@torch.no_grad()
def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows: list[Row] = []
    for tokens in (512,) if quick else (2048, 8192):
        rows += steps(device, tokens, checked=checked)
    if quick:
        return rows + evictions(device, 512, HEADS)
    # a quarter of the heads at 32768 tokens: the shares are the same, and the bench ends
    return rows + evictions(device, 8192, HEADS) + evictions(device, 32768, (8, 2))


def steps(device: str, tokens: int, *, checked: bool) -> list[Row]:
    """A decode step behind a prompt of ``tokens``."""
    ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    plain = decoder(device, HEADS)
    cache = plain(ids, use_cache=True, logits_to_keep=1).past_key_values
    calls: dict[str, Callable[[int], Any]] = {"DynamicCache": _step(plain, cache, ids)}
    contenders = {"tokencomp, all kept": KeepAll(), **{f"tokencomp {n}, 25 %": m for n, m in METHODS.items()}}
    for name, method in contenders.items():
        model = decoder(device, HEADS)
        handle = tokencomp.compress(model, method)
        model(ids, use_cache=True, logits_to_keep=1)
        calls[name] = _step(model, handle.cache, ids)
    if checked:
        found = {name: call(0).logits.float() for name, call in calls.items()}
        torch.testing.assert_close(found["tokencomp, all kept"], found["DynamicCache"], atol=0.05, rtol=0.05)
    best = interleaved_seconds(calls, device, repeats=60, budget=20.0)
    query_heads, heads = HEADS
    case = f"step B=1 Hq={query_heads} Hkv={heads} D={D} layers={LAYERS} S={tokens} bfloat16"
    held = 4.0 * LAYERS * heads * D * tokens
    return [
        Row("paged", case, name, seconds, held * query_heads / heads, held, baseline=name == "DynamicCache")
        for name, seconds in best.items()
    ]


def _step(model: Any, cache: Any, ids: torch.Tensor) -> Callable[[int], Any]:
    return lambda _: model(ids[:, :1], past_key_values=cache, use_cache=True)


def evictions(device: str, tokens: int, heads: tuple[int, int]) -> list[Row]:
    """The eviction that ends a prompt, and the attention of one layer over it."""
    ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, h, tokens, D, generator=generator).to(device, torch.bfloat16) for h in heads)
    calls: dict[str, Callable[[int], Any]] = {
        "prefill": lambda _: attention.attend(q, k, k, is_causal=True, enable_gqa=True)
    }
    best = interleaved_seconds(calls, device, repeats=3, budget=1.0)
    for name, method in METHODS.items():
        best[f"tokencomp {name}, 25 %"] = _eviction(device, method, ids, heads)
    case = f"evict B=1 Hq={heads[0]} Hkv={heads[1]} D={D} S={tokens} bfloat16, one layer"
    flops, held = 2.0 * heads[0] * D * tokens * tokens, 4.0 * heads[1] * D * tokens
    return [
        Row("paged", case, name, seconds, flops, held, baseline=name == "prefill")
        for name, seconds in best.items()
    ]


def _eviction(device: str, method: Any, ids: torch.Tensor, heads: tuple[int, int]) -> float:
    """Seconds of the quicker of the layers."""
    model = decoder(device, heads)
    with tokencomp.compress(model, method) as handle:
        model(ids, use_cache=True, logits_to_keep=1)
        report = handle.report()
    return float(min(layer.seconds for layer in report.layers))


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
