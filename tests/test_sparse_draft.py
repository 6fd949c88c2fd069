"""Draft models: prompts that one shortened, caches that a drafted answer chose."""

from collections.abc import Iterator

import pytest
import tokencomp
import torch
from decoders import answer, decoder, left, prompt, steps
from tokencomp import adapters, methods, recipes
from tokencomp.methods import SpecKV, SpecPC

pytest.importorskip("transformers", reason="models need the extra hf")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_spec_pc_worked_example() -> None:
    score = torch.tensor([[0.1, 0, 0.9, 0, 0, 0, 0.5, 0, 0, 0.2, 0, 0.3]])
    pooled = recipes.pool_scores(score[None], 3, kind="max")[0]
    method = SpecPC(keep=6, window=2, kernel=3)
    assert method.select(pooled).tolist() == [0, 1, 2, 3, 10, 11]
    assert SpecPC(keep=12, window=2, kernel=3).select(pooled).tolist() == list(range(12))


def test_shorten_prompt_scores_with_every_layer_from_the_first() -> None:
    """Against scores from the eager attention of the draft."""
    draft, ids = decoder(), prompt(1, 80)
    method = SpecPC(keep=24, window=4, kernel=3, first=1)
    short = adapters.shorten_prompt(draft, ids, method)
    draft.set_attn_implementation("eager")
    attentions = draft(ids, output_attentions=True).attentions
    ramp = torch.linspace(0, 1, 4)[:, None]
    score = torch.stack([(a[0, :, -4:] * ramp).amax((0, 1)) for a in attentions[1:]]).amax(0)
    pooled = recipes.pool_scores(score[None, None], 3, kind="max")[0]
    assert torch.equal(short, ids[:, method.select(pooled)])
    assert short.shape == (1, 24)
    assert torch.equal(short[:, -4:], ids[:, -4:])
    assert torch.equal(adapters.shorten_prompt(draft, ids[:, :20], method), ids[:, :20])


def test_spec_kv_worked_example() -> None:
    q = torch.tensor([[[[1.0, 0], [0, 1]]]])
    k = torch.tensor([[[[2.0, 0], [0, 1], [0, 0], [1, 1], [0, 2], [1, 0]]]])
    plain = recipes.window_score(q, k, kernel=1, rows="max", heads="kv_max")
    expected = torch.tensor([0.449960, 0.181576, 0.109393, 0.221861])
    torch.testing.assert_close(plain[0, 0, :4], expected, atol=1e-5, rtol=0)
    pooled = recipes.window_score(q, k, kernel=3, pool="avg", rows="max", heads="kv_max")
    expected = torch.tensor([0.210512, 0.246977, 0.170944, 0.110418])
    torch.testing.assert_close(pooled[0, 0, :4], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lookahead", [0, 6])
def test_draft_prefill_leaves_the_budget(lookahead: int) -> None:
    """The window's tokens are there, the draft's are not, and the last token is decoded first."""
    model, draft, ids = decoder(), decoder(num_hidden_layers=1), prompt(1, 60)
    with tokencomp.compress(model, SpecKV(20, window=4, lookahead=lookahead), page=16) as handle:
        cache = adapters.draft_prefill(handle, draft, ids)
        assert cache.get_seq_length() == 59
        for layer in cache.paged:
            store = layer.layer.store
            assert store.host_lengths.tolist() == [[20, 20]]
            position = store.position()[..., :20]
            assert position.max() == 58
            assert (position[..., -4:] == torch.arange(55, 59)).all()
        out = answer(model, ids, past_key_values=cache, max_new_tokens=5)
    assert torch.equal(out[:, :60], ids)
    assert out.shape == (1, 65)


def test_draft_prefill_of_a_short_prompt_is_the_model_itself() -> None:
    model, draft, ids = decoder(), decoder(num_hidden_layers=1), prompt(1, 30)
    expected = answer(model, ids, max_new_tokens=8)
    with tokencomp.compress(model, SpecKV(64, window=4, lookahead=5), page=16) as handle:
        cache = adapters.draft_prefill(handle, draft, ids)
        assert torch.equal(answer(model, ids, past_key_values=cache, max_new_tokens=8), expected)


def test_what_drafts_refuse() -> None:
    draft, ids = decoder(num_hidden_layers=1), prompt(2, 20)
    method = SpecPC(keep=10, window=2, first=0)
    with pytest.raises(ValueError, match=r"shorten_prompt: input_ids must be .* n >= 2, got \[2, 20\]"):
        adapters.shorten_prompt(draft, ids, method)
    with pytest.raises(ValueError, match=r"SpecPC: first must be < layers=1, got 8"):
        adapters.shorten_prompt(draft, ids[:1], SpecPC(keep=10, window=2))
    with (
        tokencomp.compress(draft, methods.SnapKV(10, window=4)) as handle,
        pytest.raises(ValueError, match="draft_prefill: the handle must be of SpecKV, got SnapKV"),
    ):
        adapters.draft_prefill(handle, draft, ids[:1])
    for make, message in (
        (lambda: SpecPC(keep=8), r"SpecPC: keep must be >= window=64, got 8"),
        (lambda: SpecPC(kernel=0), r"SpecPC: kernel must be >= 1, got 0"),
        (lambda: SpecKV(lookahead=-1), r"SpecKV: lookahead must be >= 0, got -1"),
        (lambda: SpecKV(every=4), r"SpecKV: every must be 0: it compresses prompts, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


TIDAL = methods.TidalDecode(k=6, first=0, again=2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [5, 14])
def test_recomputed_tokens_are_dense_ones(count: int, padded: bool) -> None:
    """Keys after a correction are those of a dense run, and so are the logits; before, they are not."""
    model, ids = decoder(), prompt(2, 50)
    mask = left(2, 50, 6) if padded else torch.ones_like(ids)
    with tokencomp.compress(model, methods.StreamingLLM(100), page=16) as handle:
        logits = steps(model, ids, mask, [50 - count, *[1] * count])[:, -1]
        dense = [paged.layer.store.gather()[0] for paged in handle.cache.paged]
    with tokencomp.compress(model, TIDAL, page=16) as handle:
        steps(model, ids, mask, [50 - count, *[1] * count])
        polluted = handle.cache.paged[2].layer.store.gather()[0]
        assert not torch.allclose(polluted, dense[2], atol=1e-3)
        found = adapters.recompute_newest(handle, ids, count, attention_mask=mask if padded else None)
        for paged, expected in zip(handle.cache.paged, dense, strict=True):
            torch.testing.assert_close(paged.layer.store.gather()[0], expected, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(found, logits, atol=2e-4, rtol=1e-3)
        assert not any(paged.layer.reader.paused for paged in handle.cache.paged)


def test_correction_of_every_step_is_dense_generation() -> None:
    """With every=1 each token is read again densely; with every=4 the steps between are sparse."""
    model, ids, mask = decoder(), prompt(2, 30), left(2, 30, 4)
    expected = answer(model, ids, mask, max_new_tokens=12)
    sparse = []
    with tokencomp.compress(model, TIDAL, page=16) as handle:
        for every in (1, 4):
            processor = adapters.Correction(handle, every, mask)
            out = answer(model, ids, mask, max_new_tokens=12, logits_processor=[processor])
            sparse.append(out)
            assert out.shape == expected.shape
            assert handle.report().density < 1
    assert torch.equal(sparse[0], expected)


def test_what_corrections_refuse() -> None:
    model, ids = decoder(), prompt(1, 30)
    with tokencomp.compress(model, TIDAL, methods.H2O(16), page=16) as handle:
        steps(model, ids, None, [29, 1])
        with pytest.raises(ValueError, match="the cache must keep every token, H2O evicts some"):
            adapters.recompute_newest(handle, ids, 1)
    with tokencomp.compress(model, TIDAL, page=16) as handle:
        steps(model, ids, None, [29, 1])
        with pytest.raises(ValueError, match=r"input_ids must be \[B, 30\], got \[1, 29\]"):
            adapters.recompute_newest(handle, ids[:, 1:], 1)
        with pytest.raises(ValueError, match=r"count must be in \[1, n=30\), got 30"):
            adapters.recompute_newest(handle, ids, 30)
        with pytest.raises(ValueError, match="Correction: every must be >= 1, got 0"):
            adapters.Correction(handle, 0)
