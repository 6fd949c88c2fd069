"""The press that scores by column sums, beside eager attention and kvpress' own presses."""

from typing import Any

import pytest
import torch
from torch import Tensor

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed (0.5.5 needs transformers < 5.3)")
transformers = pytest.importorskip("transformers")

from tokencomp.integrations.kvpress import ColumnSumPress  # noqa: E402

LAYERS, HEADS, GROUPS, TOKENS = 2, 8, 2, 61


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(i)) for i in (1, 2)])


@torch.no_grad()
def attention(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices and keys of every layer, by eager attention."""
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True, use_cache=True)
    return list(out.attentions), [layer.keys for layer in out.past_key_values.layers]


@torch.no_grad()
def kept(press: Any, model: Any, ids: Tensor, keys: list[Tensor], kind: str = "sdpa", **options: Any) -> Any:
    """``[layer][sequence][head]`` ascending positions of what a press leaves."""
    model.set_attn_implementation(kind)
    with press(model):
        cache = model(ids, use_cache=True, **options).past_key_values
    found = []
    for layer, full in zip(cache.layers, keys, strict=True):
        distance = torch.cdist(layer.keys, full, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.amin(-1).max() < 1e-4
        found.append(distance.argmin(-1).sort(-1).values.tolist())
    return found


def by_hand(matrices: list[Tensor], press: ColumnSumPress) -> list[list[list[list[int]]]]:
    """The same sets from the matrices, in float64."""
    count = int(TOKENS * (1 - press.compression_ratio))
    weight = press.gamma ** torch.arange(TOKENS - 1, -1, -1, dtype=torch.float64)
    seen = torch.stack([weight[j:].sum() for j in range(TOKENS)])
    sets = []
    for p in matrices:
        score = (p.double() * weight[:, None]).sum(2).unflatten(1, (GROUPS, -1)).mean(2)
        if press.corrected:
            score = score / seen
        score[..., : press.sinks] = torch.inf
        score[..., TOKENS - press.recent :] = torch.inf
        sets.append(score.topk(count).indices.sort(-1).values.tolist())
    return sets


PRESSES = (
    ColumnSumPress(0.5),
    ColumnSumPress(0.5, gamma=0.95, recent=8, sinks=2),
    ColumnSumPress(0.3, corrected=True),
    ColumnSumPress(0.7, gamma=0.8, corrected=True),
)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("press", PRESSES, ids=str)
def test_sets_are_those_of_eager_matrices(model: Any, ids: Tensor, press: ColumnSumPress, kind: str) -> None:
    matrices, keys = attention(model, ids)
    assert kept(press, model, ids, keys, kind) == by_hand(matrices, press)


def test_observed_attention_without_eager(model: Any, ids: Tensor) -> None:
    _, keys = attention(model, ids)
    theirs = kept(kvpress.ObservedAttentionPress(0.4), model, ids, keys, "eager")
    assert kept(ColumnSumPress(0.4, corrected=True), model, ids, keys) == theirs


def test_column_sums_are_taken_where_attention_returns_them(model: Any, ids: Tensor) -> None:
    """``attn_implementation="tokencomp"`` itself needs a newer transformers than kvpress 0.5.5 allows."""
    matrices, keys = attention(model, ids)
    layer, press = model.model.layers[1].self_attn, ColumnSumPress(0.5)
    score = press.score(layer, ids, keys[1], keys[1], matrices[1].sum(2), {})
    assert score.topk(int(TOKENS * 0.5)).indices.sort(-1).values.tolist() == by_hand(matrices, press)[1]
    with pytest.raises(
        ValueError, match=r"ColumnSumPress: gamma must be 1 where column sums are given, got 0.9"
    ):
        ColumnSumPress(0.5, gamma=0.9).score(layer, ids, keys[1], keys[1], matrices[1].sum(2), {})


def test_a_wrapper_takes_it(model: Any, ids: Tensor) -> None:
    press = kvpress.AdaKVPress(ColumnSumPress(0.5, gamma=0.95, recent=4))
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), press(model):
        said = model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert said.shape == (1, TOKENS + 3)
    masked = model.model.layers[0].self_attn.masked_key_indices
    assert len(masked[0]) == GROUPS * (TOKENS - int(TOKENS * 0.5))
    assert int(masked[2].max()) < TOKENS - 4


@pytest.mark.parametrize("knobs", [{"gamma": 0.0}, {"gamma": 1.5}, {"sinks": -1}, {"recent": -2}])
def test_wrong_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ColumnSumPress: .* must be"):
        ColumnSumPress(0.5, **knobs)


def test_windows_are_refused(ids: Tensor) -> None:
    config = transformers.MistralConfig(
        vocab_size=TOKENS, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=16,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"keys of the layer must be of all 61 tokens, got 1\d keys"):
        kept(ColumnSumPress(0.5), model, ids, [])
    with pytest.raises(ValueError, match="attention of 61 tokens must be dense, got a sliding window of 16"):
        kept(ColumnSumPress(0.5), model, ids, [], past_key_values=transformers.DynamicCache())
