"""Decoders whose caches move tokens into quantized pages."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import tokencomp
import torch
from cache_methods import KeepAll, Newest, pages_are_exact
from decoders import answer, decoder, left, prompt, steps
from tokencomp.cache import LayerStore
from tokencomp.methods.kv import Keep, KVView, PageSpec
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="models need the extra hf")

INT8 = (PageSpec("int8", "int8"),)
INT4 = (PageSpec("int8", "int8"), PageSpec("int4", "int4"))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Recent(KeepAll):
    """All but the newest ``recent`` tokens and the first ``sinks`` are quantized, the older half of all that
    were seen as the last format says, others as the first does; what is older than ``window`` goes.
    """

    formats: Sequence[PageSpec] = INT8
    recent: int = 16
    sinks: int = 0
    window: int = 10**6
    rotation: Literal["none", "keys", "both"] = "none"

    def after_prefill(self, view: KVView) -> Keep | None:
        return None if view.more else self.evict(view)

    def after_step(self, view: KVView) -> Keep | None:
        return self.evict(view)

    def evict(self, view: KVView) -> Keep | None:
        assert view.kind is not None
        slot = torch.arange(view.position.shape[2])
        seen = torch.tensor(view.seen)[:, None, None]
        age = seen - 1 - view.position
        there = (slot < view.lengths[..., None]) & ((age < self.window) | (view.position < self.sinks))
        old = there & (age >= self.recent) & (view.position >= self.sinks)
        kind = torch.where(old, torch.where(view.position * 2 < seen, len(self.formats), 1), 0)
        order = (~there).to(torch.int8).argsort(dim=2, stable=True)
        count = there.sum(2).int()
        index = torch.where(slot < count[..., None], order, -1).int()
        return Keep(index, count, ragged=True, kind=kind.gather(2, order).int())


def stores(cache: Any) -> list[LayerStore]:
    return [paged.layer.store for paged in cache.paged]


def more(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of further tokens, one by one."""
    return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])], 1)


def close(got: Tensor, want: Tensor, share: float) -> None:
    """Root mean square of the error within ``share`` of how much the numbers vary."""
    assert float((got - want).square().mean().sqrt()) <= share * float(want.std())


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "gpt_oss"])
def test_answers_are_nearly_those_without_compression(family: str) -> None:
    model, ids = decoder(family), prompt(2, 60)
    want = steps(model, ids, None, [40, *[1] * 20])
    with tokencomp.compress(model, Recent(), page=16) as handle:
        got = steps(model, ids, None, [40, *[1] * 20])
        report = handle.report()
    close(got, want, 0.12)
    assert [kind.name for kind in report.memory.kinds] == ["float32", "int8"]
    assert report.memory.kinds[1].tokens == len(report.layers) * 2 * 2 * 32
    assert not torch.equal(got[:, 45:], want[:, 45:])


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_steps_attend_to_what_is_held(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense attention to the slots as ``gather`` shows them, causal by position; logits are by slot too."""
    seen, decode = [], LayerStore.decode

    def checked(self: LayerStore, q: Tensor, **options: Any) -> Any:
        found = decode(self, q, **{**options, "logits": True})
        k, v = (x.repeat_interleave(4, 1) for x in self.gather())
        position = self.position()[..., : self.size].repeat_interleave(4, 1)[:, :, None]
        there = (torch.arange(self.size) < self.lengths[..., None]).repeat_interleave(4, 1)[:, :, None]
        newest = position.masked_fill(~there, -1).amax(-1, keepdim=True)
        row = newest - torch.arange(q.shape[2]).flip(0)[:, None]
        logits = (q @ k.mT * options["scale"]).masked_fill((position > row) | ~there, -torch.inf)
        torch.testing.assert_close(found.logits[..., : self.size], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.output, logits.softmax(-1) @ v, rtol=1e-4, atol=1e-4)
        assert self.tiers is not None
        seen.append(bool((self.tiers.layout.lead & (self.rows.host_lengths < 16 + tokens)).any()))
        return decode(self, q, **options)

    monkeypatch.setattr(LayerStore, "decode", checked)
    model, ids, mask = decoder(), prompt(2, 50 + 12 * tokens), left(2, 50 + 12 * tokens)
    with tokencomp.compress(model, Recent(sinks=2, recent=8), page=16):
        steps(model, ids, mask, [50, *[tokens] * 12])
    assert len(seen) == 12 * 3
    assert any(seen) or tokens == 1  # the newest tokens began in a page that leads


def test_generate_says_the_same_in_eight_bits() -> None:
    model, ids = decoder(), prompt(2, 50)
    want = answer(model, ids, max_new_tokens=16)
    with tokencomp.compress(model, Recent(), page=16) as handle:
        assert torch.equal(answer(model, ids, max_new_tokens=16), want)
        pages_are_exact(handle.cache)


@pytest.mark.parametrize(
    "method", [Recent(), Recent(formats=INT4, sinks=4, recent=20), Recent(formats=INT4, window=40)]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, method: Recent) -> None:
    """A padded sequence answers as it does alone: quantized pages hold its tokens, and no padding."""
    model, ids = decoder(), prompt(1, 60)
    other = prompt(1, 67, seed=5)
    pads = torch.zeros(1, 7, dtype=torch.long)
    own, real = (ids[:, :41], torch.ones(1, 41, dtype=torch.long))
    first = torch.cat([pads, own] if side == "left" else [own, pads], 1)
    mask = torch.cat([pads, real] if side == "left" else [real, pads], 1)
    mask = torch.cat([mask, torch.ones(1, 19, dtype=torch.long)], 1)
    wide = torch.cat([torch.cat([first, ids[:, 41:]], 1), other[:, :67]])
    both = torch.cat([mask, torch.ones(1, 67, dtype=torch.long)])
    with tokencomp.compress(model, method, page=16) as handle:
        alone = steps(model, ids, None, [41, *[1] * 19])
        lone = [store.host_lengths[0].tolist() for store in stores(handle.cache)]
        kinds = [store.kinds()[0, :, : store.size] for store in stores(handle.cache)]
        padded = steps(model, wide, both, [48, *[1] * 19])
        assert lone == [store.host_lengths[0].tolist() for store in stores(handle.cache)]
        for store, kind in zip(stores(handle.cache), kinds, strict=True):
            assert torch.equal(store.kinds()[0, :, : kind.shape[1]], kind)
        pages_are_exact(handle.cache)
    close(padded[:1][both[:1].bool()], alone[0], 2e-2)  # a rounding may make another code


def test_demoted_tokens_are_never_quantized_again() -> None:
    """The bytes of a page stay what they were when it came, wherever it moves to."""
    model, ids = decoder(), prompt(2, 150)
    known: dict[Any, Tensor] = {}
    with tokencomp.compress(model, Recent(formats=INT4, sinks=3, window=90), page=16) as handle:
        cache = handle.new_cache()
        steps(model, ids[:, :50], None, [50], cache)
        for t in range(50, 150):
            model(ids[:, t : t + 1], past_key_values=cache)
            for layer, store in enumerate(stores(cache)):
                assert store.tiers is not None
                starts = store.tiers.position[..., ::16]
                for (b, h), count in zip(
                    torch.ones(2, 2).nonzero().tolist(), store.tiers.count.ravel().tolist(), strict=True
                ):
                    for i in range(count):
                        entry = int(store.tiers.entries[b, h, i])
                        data = store.pool.quantized[(entry >> 28) - 1].data[entry & ((1 << 28) - 1)]
                        first = known.setdefault(
                            (layer, b, h, int(starts[b, h, i]), entry >> 28), data.clone()
                        )
                        assert torch.equal(first, data)
        pages_are_exact(cache)
    kinds = {key[-1] for key in known}
    assert kinds == {1, 2}
    assert len(known) > 3 * 2 * 2 * 5


def test_beams_share_quantized_pages() -> None:
    model, ids = decoder(), prompt(2, 50)
    alone = []
    with tokencomp.compress(model, Recent(formats=INT4), page=16) as handle:
        said = answer(model, ids, num_beams=3, max_new_tokens=40)
        pages_are_exact(handle.cache)
        store = stores(handle.cache)[0]
        shared = [
            int(pool.book.refcount(store.pages_of(i)).max()) for i, pool in enumerate(store.pool.quantized, 1)
        ]
        for row in ids:
            alone.append(answer(model, row[None], num_beams=3, max_new_tokens=40)[0])
    assert max(shared) >= 3
    assert torch.equal(said, torch.stack(alone))


def test_crop_leaves_no_trace_while_nothing_moves() -> None:
    model, ids, mask = decoder(), prompt(2, 80), left(2, 80)
    with tokencomp.compress(model, Recent(recent=20), page=16) as handle:
        cache = handle.new_cache()
        steps(model, ids[:, :60], mask[:, :60], [60], cache)
        forward = {
            "input_ids": ids[:, 60:64], "attention_mask": mask[:, :64], "past_key_values": cache,
            "position_ids": (mask.cumsum(1) - 1)[:, 60:64],
        }  # fmt: skip
        first = model(**forward).logits
        cache.crop(-4)
        again = model(**forward).logits
        pages_are_exact(cache)
    close(again, first, 1e-4)


def test_crop_through_quantized_pages() -> None:
    model, ids = decoder(), prompt(2, 80)
    want = steps(model, ids, None, [70, *[1] * 10])
    with tokencomp.compress(model, Recent(recent=8), page=16) as handle:
        cache = handle.new_cache()
        steps(model, ids, None, [70, *[1] * 10], cache)
        cache.crop(-40)
        for store in stores(cache):
            assert store.host_lengths.tolist() == [[40, 40]] * 2
            assert store.tokens(1) == 4 * 32
            position = store.position()[..., :40].sort().values
            assert torch.equal(position, torch.arange(40).int().expand(2, 2, 40))
        pages_are_exact(cache)
        got = more(model, ids[:, 40:], cache)
    close(got, want[:, 40:], 0.15)


@pytest.mark.parametrize("chunks", ["each", "last"])
@pytest.mark.parametrize("sizes", [[30, 20, 9, 1], [30, 12, 3, 8, 6, 1], [9, 9, 9, 9, 9, 9, 6]])
def test_prompts_in_chunks_and_on_top_of_quantized_pages(sizes: list[int], chunks: Any) -> None:
    model, ids, mask = decoder(), prompt(2, 60), left(2, 60)
    want = steps(model, ids, mask, [60])
    with tokencomp.compress(model, Recent(sinks=2, recent=9), page=16, chunks=chunks) as handle:
        got = steps(model, ids, mask, sizes)
        pages_are_exact(handle.cache)
        assert all(store.tokens(1) > 0 for store in stores(handle.cache))
    close(got[mask.bool()], want[mask.bool()], 0.15)


@pytest.mark.parametrize("tokens", [2, 5, 8])
def test_steps_of_several_tokens_are_causal(tokens: int) -> None:
    """Also where the newest tokens began in the page that leads."""
    model, ids = decoder(), prompt(1, 50 + 6 * tokens)
    with tokencomp.compress(model, Recent(sinks=2, recent=20), page=16) as handle:
        several = steps(model, ids, None, [50, *[tokens] * 6])
        begun = [store.tiers for store in stores(handle.cache)]
        single = steps(model, ids, None, [50, *[1] * 6 * tokens])
    close(several, single, 0.1)
    assert all(tiers is not None and tiers.layout.lead.all() for tiers in begun)


@pytest.mark.parametrize("rotation", ["keys", "both"])
def test_rotated_pages(rotation: Any) -> None:
    model, ids, mask = decoder(), prompt(2, 60), left(2, 60)
    want = steps(model, ids, mask, [40, *[1] * 20])
    with tokencomp.compress(model, Recent(rotation=rotation, sinks=1), page=16) as handle:
        got = steps(model, ids, mask, [40, *[1] * 20])
        store = stores(handle.cache)[0]
        k, v = store.gather()
    with tokencomp.compress(model, Recent(sinks=1), page=16) as handle:
        steps(model, ids, mask, [40, *[1] * 20])
        plain = stores(handle.cache)[0].gather()
    close(got[mask.bool()], want[mask.bool()], 0.12)
    close(tokencomp.ops.hadamard(k), plain[0], 0.1)
    close(tokencomp.ops.hadamard(v) if rotation == "both" else v, plain[1], 0.1)
    assert float((k - plain[0]).abs().max()) > 1


def test_rotation_without_quantized_pages_changes_nothing() -> None:
    model, ids = decoder(), prompt(2, 40)
    want = steps(model, ids, None, [20, *[1] * 20])
    with tokencomp.compress(model, KeepAll(rotation="both"), page=16):
        close(steps(model, ids, None, [20, *[1] * 20]), want, 1e-4)


def test_copies_moves_and_resets() -> None:
    model, ids = decoder(), prompt(2, 70)
    with tokencomp.compress(model, Recent(formats=INT4), page=16) as handle:
        cache = handle.new_cache()
        steps(model, ids[:, :50], None, [50], cache)
        other = copy.deepcopy(cache).to("cpu")
        assert torch.equal(more(model, ids[:, 50:], other), more(model, ids[:, 50:], cache))
        for each in (cache, other):
            pages_are_exact(each)
        other.batch_repeat_interleave(2)
        other.batch_select_indices(torch.tensor([0, 3]))
        pages_are_exact(other)
        assert torch.equal(more(model, ids[:, :1], other), more(model, ids[:, :1], cache))
        cache.reset()
        assert cache.memory().used == 0
        assert torch.equal(
            steps(model, ids[:, :50], None, [50], cache), steps(model, ids[:, :50], None, [50])
        )


def test_the_limit_holds_over_all_pools() -> None:
    """And a step that finds no room leaves the cache as it was."""
    model, ids = decoder(), prompt(1, 200)
    with tokencomp.compress(model, Recent(formats=INT4), page=16) as handle:
        steps(model, ids[:, :150], None, [50, *[1] * 100])
        needed = handle.cache.memory().used
    limit = needed + 3000
    with tokencomp.compress(model, Recent(formats=INT4), page=16, memory_limit=limit) as handle:
        cache, seen = handle.new_cache(), 50
        steps(model, ids[:, :50], None, [50], cache)
        error = ""
        while seen < 200 and not error:
            before = cache.get_seq_length(), [store.host_lengths.copy() for store in stores(cache)]
            try:
                model(ids[:, seen : seen + 1], past_key_values=cache)
                seen += 1
            except MemoryError as full:
                error = str(full)
            assert cache.memory().capacity <= limit
        assert f"the limit of {limit} bytes" in error
        assert seen > 90
        assert cache.get_seq_length() == before[0] == seen
        for store, lengths in zip(stores(cache), before[1], strict=True):
            assert (store.host_lengths == lengths).all()
        pages_are_exact(cache)
    with (
        tokencomp.compress(model, Recent(formats=INT4), page=16, memory_limit=9000) as handle,
        pytest.raises(MemoryError, match="the limit of 9000 bytes"),
    ):
        model(ids, past_key_values=handle.new_cache())


def test_two_thousand_steps_hold_what_a_hundred_do() -> None:
    model = decoder(num_hidden_layers=1, max_position_embeddings=4096)
    token = prompt(1, 1)
    held = []
    with tokencomp.compress(model, Recent(formats=INT4, sinks=2, window=80), page=16) as handle:
        cache = handle.new_cache()
        model(prompt(1, 100), past_key_values=cache)
        for t in range(2000):
            model(token, past_key_values=cache)
            if t % 100 == 99:
                memory = cache.memory()
                held.append((memory.capacity, memory.side))
                pages_are_exact(cache)
    assert cache.get_seq_length() == 2100
    assert max(held[1:]) <= max(held[:5])
    assert memory.kinds[1].tokens > 0
    assert memory.kinds[2].tokens == 0  # the older half of all that was seen has gone


def test_the_report_tells_types_and_bits() -> None:
    model, ids = decoder(), prompt(1, 100)
    with tokencomp.compress(model, Recent(formats=INT4), page=16) as handle:
        steps(model, ids, None, [100])
        report, cache = handle.report(), handle.cache
    memory = report.memory
    tokens, bits = [[kind.tokens for kind in memory.kinds], [kind.bits for kind in memory.kinds]]
    assert tokens == [3 * 2 * 20, 3 * 2 * 32, 3 * 2 * 48]
    assert bits[0] == 32
    for i, pool in enumerate(stores(cache)[0].pool.quantized, 1):
        assert bits[i] == pool.page_bytes * 8 / (2 * 16 * 8)
        assert memory.kinds[i].bytes == memory.kinds[i].pages * pool.data[0].numel()
    mean = sum(n * b for n, b in zip(tokens, bits, strict=True)) / sum(tokens)
    assert report.bits == memory.bits == pytest.approx(mean)
    assert memory.used == sum(kind.bytes for kind in memory.kinds)
    assert memory.capacity == sum(
        own.data.untyped_storage().nbytes()
        for pool in cache.state.pools.values()
        for own in (pool, *pool.quantized)
    )
    assert [layer.bits for layer in report.layers] == [pytest.approx(mean)] * 3
    assert f"({120} tokens in float32, {192} tokens in int8, {288} tokens in int4: {mean:.2f} bits" in str(
        report
    )
    assert sum(layer.bytes for layer in report.layers) == memory.used + memory.side


def test_what_is_refused() -> None:
    model = decoder()
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (
            Recent(),
            {"attention": "model"},
            "Recent quantizes or rotates pages, which needs attention='paged'",
        ),
        (KeepAll(rotation="keys"), {"attention": "model"}, "which needs attention='paged'"),
        (Newest(rerotates=True, formats=INT8), {}, "Newest moves keys to other positions"),
        (Newest(rerotates=True, rotation="keys"), {}, "Newest moves keys to other positions"),
        (Recent(formats=INT8 * 8), {}, "Recent must have at most 7 formats, got 8"),
    ]
    for method, options, message in refused:
        with pytest.raises(ValueError, match=message):
            tokencomp.compress(model, method, **options)
    odd = decoder("qwen3", head_dim=24)
    with (
        tokencomp.compress(odd, KeepAll(rotation="both")),
        pytest.raises(ValueError, match="head dimension must be a power of two, got 24"),
    ):
        odd(prompt())
    wrong = Recent(formats=(PageSpec("int4", "int4", k_group=5),))
    with tokencomp.compress(model, wrong, page=16) as handle:
        cache = handle.new_cache()
        with pytest.raises(RuntimeError, match=r"group must be -1 \(all\) or divide the tokens S=16"):
            model(prompt(1, 60), past_key_values=cache)
        assert cache.memory().used == 0
