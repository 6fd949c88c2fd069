"""Sparse methods on whole models: every family against masked attention in float64, padding, beams, rollback,
methods on the cache beside them, and what the report says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import decoders
import pytest
import tokencomp
import torch
from decoders import answer, decoder, left, prompt, steps
from kv_methods import KV_METHODS
from sparse_methods import ONE_LAYER, SPARSE_METHODS, Recorder
from tokencomp import methods
from tokencomp.block_lists import BlockLists, block_mask_to_csr, causal_blocks
from tokencomp.methods import SlotLists, Sparse, SparseView, Subset
from tokencomp.methods import sparse_select as select

pytest.importorskip("transformers", reason="models need the extra hf")
CLOSE = {"atol": 1e-4, "rtol": 1e-3}
STEPS = [*[1] * 5, 3, 1, 2, 1]
PAIRS = [(f, n) for f in decoders.FAMILIES for n in SPARSE_METHODS if n not in ONE_LAYER or f == "llama"]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Everything(Sparse):
    """Lists that name every slot, and prompts that list every block."""

    share: str = "kv"

    def choose(self, view: SparseView) -> SlotLists:
        heads = view.lengths.shape[1] if self.share == "kv" else view.q.shape[1]
        return select.parts(select.sink_slots(select.list_lengths(view, heads), view.size))

    def choose_prompt(self, view: SparseView) -> BlockLists:
        mask = causal_blocks(view.rows, view.size, 64, 64, view.q.device)
        return BlockLists(*block_mask_to_csr(mask.expand(len(view.q), 1, -1, -1)))


@dataclass(frozen=True)
class Drawn(Sparse):
    """Random blocks and columns, of as many heads as asked, and the diagonal; or a random subset."""

    heads: str = "one"

    def choose_prompt(self, view: SparseView) -> BlockLists | Subset:
        generator = torch.Generator().manual_seed(view.layer + view.size)
        batch, rows = len(view.q), view.rows
        if self.heads == "subset":
            share = torch.rand(batch, rows, generator=generator) < 0.5
            share &= torch.arange(rows) < (view.lengths[:, :1] - (view.size - rows))
            last = torch.where(share, torch.arange(rows), rows).sort(1).values
            return Subset(torch.where(last < rows, last, -1).int(), share.sum(1).int())
        count = {"one": 1, "kv": view.lengths.shape[1], "q": view.q.shape[1]}[self.heads]
        near = causal_blocks(rows, view.size, 64, 64, view.q.device)
        mask = torch.rand(batch, count, *near.shape, generator=generator) < 0.5
        mask[..., -1] = True
        drawn = torch.rand(batch, count, near.shape[0], view.size, generator=generator) < 0.1
        drawn &= ~mask.repeat_interleave(64, 3)[..., : view.size]
        return BlockLists(*block_mask_to_csr(mask & near), 64, 64, *block_mask_to_csr(drawn))


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_outputs_are_masked_attention(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chunks, single tokens and a few at once, with and without padding, by the lists in use."""
    model, method = decoder(family), SPARSE_METHODS[name]
    ids, mask = prompt(2, 100 + sum(STEPS)), left(2, 100 + sum(STEPS), 7)
    record = Recorder(monkeypatch)
    with tokencomp.compress(model, method, page=16) as handle:
        steps(model, ids, mask, [70, 30, *STEPS])
        report = handle.report()
    record.check(**CLOSE)
    if len(report.layers) > 1 or "tidal" not in name:
        assert any(isinstance(told, SlotLists) for told in record.told())
        assert 0 < report.density < 1


@pytest.mark.parametrize("name", [n for n in SPARSE_METHODS])
def test_padding_changes_nothing(name: str) -> None:
    """A row says the same with nine columns of padding before it and a longer neighbour beside it."""
    model, method = decoder(), SPARSE_METHODS[name]
    ids = torch.randperm(127, generator=torch.Generator().manual_seed(5))[None, :100] + 1
    ids = ids[:, : 84 + sum(STEPS)]
    pads = torch.zeros(1, 9, dtype=torch.long)
    padded, longer = torch.cat([pads, ids], 1), prompt(1, 9 + ids.shape[1])
    mask = torch.cat([torch.cat([pads, torch.ones_like(ids)], 1), torch.ones_like(longer)])
    first = ids.shape[1] - sum(STEPS)
    with tokencomp.compress(model, method, page=16):
        alone = steps(model, ids, None, [first, *STEPS])
        beside = steps(model, torch.cat([padded, longer]), mask, [9 + first, *STEPS])
    torch.testing.assert_close(beside[:1, 9:], alone, **CLOSE)


@pytest.mark.parametrize("share", ["kv", "q"])
@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_all_tokens_listed_is_dense(family: str, share: str) -> None:
    """To the bit where the step's kernel is asked, and in prompts that all went through one kernel."""
    model, ids, mask = decoder(family), prompt(2, 110), left(2, 110, 7)
    found = []
    for method in (methods.StreamingLLM(1000, every=1), Everything(share)):
        with tokencomp.compress(model, method, page=16) as handle:
            found.append(steps(model, ids, mask, [70, 20, *[1] * 12, 3, 5])[mask.bool()])
            report = handle.report()
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    assert all(layer.sparse and layer.sparse.density == 1 for layer in report.layers)
    assert all(layer.sparse and layer.sparse.dense_steps == 0 for layer in report.layers)


@pytest.mark.parametrize("heads", ["one", "kv", "q", "subset"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_prompts_are_masked_attention(family: str, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First prompts and chunks behind rows of different lengths, with padding in them."""
    model, ids, mask = decoder(family), prompt(2, 300), left(2, 300, 21)
    mask[1, 150:160] = 0
    record = Recorder(monkeypatch)
    with tokencomp.compress(model, Drawn(heads), page=16) as handle:
        steps(model, ids, mask, [140, 80, 75, 5])
        report = handle.report()
    record.check(**CLOSE)
    for layer in report.layers:
        assert layer.sparse is not None
        assert (layer.sparse.prompts, layer.sparse.dense_prompts) == (3, 0)
        assert layer.sparse.prompt_density < 1


def test_chunks_behind_heads_of_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads hold different numbers of tokens: their lists are taken apart, and dense ones are as before."""
    model, ids = decoder(), prompt(2, 220)
    found = []
    kept = methods.AdaKV(methods.SnapKV(30, window=4))
    with tokencomp.compress(model, kept, page=16):
        found.append(steps(model, ids, None, [100, 120]))
    for _ in range(2):
        with tokencomp.compress(model, kept, Everything(), page=16) as handle:
            found.append(steps(model, ids, None, [100, 120]))
            assert any(len(set(row)) > 1 for layer in handle.report().layers for row in layer.prompt)
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("kept", ["h2o", "snapkv-decode", "adakv-decode", "random", "kv-compress"])
@pytest.mark.parametrize("name", SPARSE_METHODS)
def test_with_a_method_on_the_cache(name: str, kept: str) -> None:
    """In either order the same; the budget holds, and what is read is less than what is kept."""
    model, ids, mask = decoder(), prompt(2, 160), left(2, 160, 5)
    evicting, found = KV_METHODS[kept], []
    for order in ((evicting, SPARSE_METHODS[name]), (SPARSE_METHODS[name], evicting)):
        with tokencomp.compress(model, *order, page=16) as handle:
            found.append(steps(model, ids, mask, [140, *[1] * 12, 3, *[1] * 5])[mask.bool()])
            report = handle.report()
    assert torch.equal(*found)
    assert report.evictions > 0
    assert report.method == f"{type(evicting).__name__} + {type(SPARSE_METHODS[name]).__name__}"
    assert found[0].isfinite().all()
    assert report.density < 1


@pytest.mark.parametrize("kept", ["h2o", "a2sf-exact", "tova", "snapkv-decode"])
def test_lists_of_everything_keep_what_dense_attention_keeps(kept: str) -> None:
    """Methods that score with log-sum-exps of prompts or logits of steps find the same in sparse ones."""
    model, ids, mask, found = decoder(), prompt(2, 100), left(2, 100, 5), []
    for given in ((KV_METHODS[kept],), (KV_METHODS[kept], Everything())):
        with tokencomp.compress(model, *given, page=16) as handle:
            steps(model, ids, mask, [70, 16, *[1] * 14])
            stores = [paged.layer.store for paged in handle.cache.paged]
            found.append([(store.host_lengths.tolist(), store.position().tolist()) for store in stores])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", SPARSE_METHODS)
def test_beams_reorder_what_is_remembered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each beam after a swap goes on as a sequence that was alone; its lists follow it."""
    model, method = decoder(), SPARSE_METHODS[name]
    ids = prompt(2, 96)
    swapped = torch.tensor([1, 0, 1])
    with tokencomp.compress(model, method, page=16) as handle:
        cache = handle.new_cache()
        steps(model, ids[:, :84], None, [80, *[1] * 4], cache)
        cache.reorder_cache(swapped)
        rest = ids[swapped]
        said = [
            model(input_ids=rest[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(84, 96)
        ]
        alone = steps(model, ids, None, [80, *[1] * 16])
    torch.testing.assert_close(torch.cat(said, 1), alone[swapped][:, 84:], **CLOSE)


@pytest.mark.parametrize("name", [n for n in SPARSE_METHODS if not n.startswith("token-select")])
def test_rollback_leaves_no_trace(name: str) -> None:
    """Tokens that were taken back are as if they had never come (selections that are reused may differ)."""
    model, method = decoder(), SPARSE_METHODS[name]
    ids, others = prompt(2, 96), prompt(2, 96, seed=4)
    with tokencomp.compress(model, method, page=16) as handle:
        straight = steps(model, ids, None, [80, *[1] * 16])[:, 83:]
        cache = handle.new_cache()
        steps(model, ids[:, :83], None, [80, *[1] * 3], cache)
        model(input_ids=others[:, 83:88], past_key_values=cache, use_cache=True)
        cache.crop(-5)
        said = [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(83, 96)
        ]
    torch.testing.assert_close(torch.cat(said, 1), straight, **CLOSE)


@pytest.mark.parametrize("name", ["quest", "token-select", "tidal"])
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}, {"do_sample": True}],
    ids=["beams", "lookup", "sampling"],
)  # prompt lookup of transformers 5.4 fails without an end token
def test_generate(name: str, how: dict[str, Any]) -> None:
    model, ids = decoder(), prompt(1, 60)
    with tokencomp.compress(model, SPARSE_METHODS[name], page=16) as handle:
        out = answer(model, ids, **how)
        assert handle.report().density < 1
        assert f"{handle.report().density:.1%} of the slots read" in str(handle.report())
    assert out.shape == (1, 84)


def test_report_counts_what_was_read() -> None:
    """Quest with 3 pages of 4 slots in layers 1 and 2; layer 0 is dense, and said to be."""
    model, ids = decoder(), prompt(1, 61)
    with tokencomp.compress(model, methods.Quest(k=12, chunk=4, dense=1), page=16) as handle:
        steps(model, ids, None, [59, 1, 1])
        first, second, _ = (layer.sparse for layer in handle.report().layers)
        side = handle.cache.memory().side
        handle.cache.reset()
        assert handle.cache.memory().side < side
    assert first is not None
    assert second is not None
    assert (first.steps, first.dense_steps, first.density, first.slots) == (2, 2, 1.0, 60.5)
    assert (second.steps, second.dense_steps, second.chosen, second.reused) == (2, 0, 2, 0)
    assert second.slots == (12 + 9) / 2  # the newest page has 4 slots, then 1
    assert second.density == pytest.approx((12 + 9) / (60 + 61))
    assert (second.prompts, second.dense_prompts, second.prompt_density) == (1, 1, 1.0)


def test_copies_and_moves_of_a_cache() -> None:
    """A copy goes on by itself, as the original does."""
    import copy

    model, ids = decoder(), prompt(2, 70)
    with tokencomp.compress(model, SPARSE_METHODS["tidal"], page=16) as handle:
        cache = handle.new_cache()
        steps(model, ids[:, :66], None, [64, 1, 1], cache)
        other = copy.deepcopy(cache)
        assert other.paged[0].layer.reader.shared is other.state.shared
        assert other.state.shared is not cache.state.shared
        said = [
            model(input_ids=ids[:, 66:67], past_key_values=c, use_cache=True).logits
            for c in (cache, other.to("cpu"))
        ]
    assert torch.equal(*said)


def test_what_does_not_go_together() -> None:
    model, quest, h2o = decoder(), methods.Quest(), methods.H2O()
    for given, message in (
        ((quest, methods.TidalDecode()), r"at most one sparse method, got Quest\(.*TidalDecode"),
        ((h2o, methods.A2SF()), r"at most one method on the KV cache, got H2O"),
        ((h2o, quest, methods.A2SF()), r"at most one method on the KV cache"),
        ((methods.ToMe(r=2), quest), r"ToMe\(.*\) is a method of encoders and goes with no other"),
        ((), r"expected one method, got 0"),
        ((methods.Quest,), r"an object, tokencomp\.methods\.Quest\(\.\.\.\), got <class"),
    ):
        with pytest.raises(TypeError, match=message):
            tokencomp.compress(model, *given)
    with pytest.raises(ValueError, match=r"Quest restricts our attention; use attention='paged'"):
        tokencomp.compress(model, quest, attention="model")
    with pytest.raises(TypeError, match=r"Quest is a method of decoders, which take no dense"):
        tokencomp.compress(model, quest, dense=True)


def test_lists_of_wrong_heads_are_refused() -> None:
    @dataclass(frozen=True)
    class Odd(Sparse):
        def choose(self, view: SparseView) -> SlotLists:
            return select.parts(select.sink_slots(view.lengths[:, :1], 4))

    model = decoder()
    with (
        tokencomp.compress(model, Odd(), page=16),
        pytest.raises(ValueError, match=r"lists must be for 2 kv heads or 8 query heads, got 1"),
    ):
        steps(model, prompt(1, 20), None, [19, 1])
