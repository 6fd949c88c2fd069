"""The sets of tokens that kvpress keeps and those that our methods keep, layer by layer and head by head.

One random Llama, one prompt: kvpress compresses its cache; our methods get the queries, keys and values of
the same forward. Every set must be the same. See README.md for the environment.
"""

from typing import Any

import kvpress
import torch
import transformers
from tokencomp import methods
from tokencomp.reference.kv_policy import run_policy
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LAYERS, TOKENS = 3, 200
RATIOS = (0.3, 0.5)


def pairs(ratio: float) -> dict[str, tuple[Any, Any]]:
    """A press and the method with the same conventions."""
    kept = int(TOKENS * (1 - ratio))
    return {
        "KNorm": (kvpress.KnormPress(ratio), methods.KNorm(kept)),
        "KeyDiff": (kvpress.KeyDiffPress(ratio), methods.KeyDiff(kept)),
        "LagKV": (
            kvpress.LagKVPress(ratio, lag_size=32, cross_scoring=True),
            methods.LagKV(kept, lag=32, across=True),
        ),
        "StreamingLLM": (kvpress.StreamingLLMPress(ratio, n_sink=4), methods.StreamingLLM(kept, sinks=4)),
        "TOVA": (kvpress.TOVAPress(ratio), methods.TOVA(kept, recent=1)),
        "SnapKV, window 64": (
            kvpress.SnapKVPress(ratio),
            methods.SnapKV(kept, window=64, kernel=5, pool="avg"),
        ),
        "SnapKV, window 16": (
            kvpress.SnapKVPress(ratio, window_size=16),
            methods.SnapKV(kept, window=16, kernel=5, pool="avg"),
        ),
        "H2O, corrected": (
            kvpress.ObservedAttentionPress(ratio),
            methods.H2O(kept, recent=0, corrected=True),
        ),
    }


def model() -> Any:
    """Weights from a seed, float32."""
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM(config)
    return made.eval()


def watched(llama: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of every layer, as attention gets them."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append((query, key, value))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)

    AttentionInterface.register("watched", attend)
    AttentionMaskInterface.register("watched", masking_utils.sdpa_mask)
    llama.set_attn_implementation("watched")
    llama(ids, use_cache=False)
    return found


def kept_by(press: Any, llama: Any, ids: Tensor, keys: list[Tensor]) -> list[list[list[int]]]:
    """``[layer][head]`` ascending positions of the keys that are left in the cache."""
    eager = isinstance(press, kvpress.ObservedAttentionPress)
    llama.set_attn_implementation("eager" if eager else "sdpa")
    with press(llama):
        cache = llama(ids, use_cache=True).past_key_values
    found = []
    for layer, all_keys in zip(cache.layers, keys, strict=True):
        distance = torch.cdist(layer.keys[0], all_keys[0], compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.amin(-1).max() < 1e-4, "a key that was not in the prompt"
        found.append(distance.argmin(-1).sort(-1).values.tolist())
    return found


@torch.no_grad()
def main() -> None:
    """Print a line a method; raise where sets differ."""
    llama = model()
    ids = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))[None]  # equal tokens would tie
    layers = watched(llama, ids)
    for ratio in RATIOS:
        for name, (press, method) in pairs(ratio).items():
            theirs = kept_by(press, llama, ids, [k for _, k, _ in layers])
            for layer, (q, k, v) in enumerate(layers):
                trace = run_policy(
                    method, q, k, v, chunks=[TOKENS], layer=layer, layers=LAYERS, dtype=torch.float32
                )
                if trace.held[0][0] != theirs[layer]:
                    raise SystemExit(f"{name}, {ratio:.0%} removed: layer {layer} keeps other tokens")
            print(f"{name}, {ratio:.0%} removed: the same tokens in all layers and heads")


if __name__ == "__main__":
    main()
