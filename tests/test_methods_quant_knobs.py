"""Methods that quantize the KV cache: what a store does with their answers, and what they refuse."""

import dataclasses
from typing import Any

import pytest
import torch
from kv_methods import Given, view_of
from quant_methods import NOTHING
from tokencomp.methods import A2SF, KIVI, QAQ, KVTuner, MiKV, QServe, SnapKV, Tiered, Uniform, ZipCache, ZipVL
from tokencomp.methods.kv import ChannelMaps, Keep, PageSpec
from tokencomp.reference.kv_tiers import Tiers, through

# --- what a store does with kinds -------------------------------------------------------------------------


def test_pages_are_formed_of_the_oldest_and_ordered() -> None:
    """Five of six asked-for slots in pages of two: four go; the first plain page stays in front."""
    tiers = Tiers([PageSpec("int8", "int8"), PageSpec("int2", "int2")], (1, 1, 12), 2)
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    k, v = x.clone(), x.clone()
    kind = torch.tensor([[[0, 1, 2, 1, 0, 1, 1, 2, 1, 0]]], dtype=torch.int32)
    index = torch.arange(10, dtype=torch.int32)[None, None]
    position = torch.arange(12)
    order = tiers.quantize(k, v, position, Keep(index, torch.tensor([[10]]), kind=kind), 0, 0)
    assert order.tolist() == [0, 4, 1, 3, 5, 6, 2, 7, 8, 9]
    assert tiers.kind[0, 0].tolist() == [0, 1, 2, 1, 0, 1, 1, 2, 0, 0, 0, 0]
    assert torch.equal(k[[0, 4, 8, 9]], x[[0, 4, 8, 9]])
    assert torch.equal(k[[1, 3]], through(x[[1, 3]], "int8", "channel", -1, None, None))
    assert torch.equal(v[[2, 7]], through(x[[2, 7]], "int2", "token", -1, None, None))
    again = k.clone()
    gone = Keep(torch.tensor([[[0, 1, 8, -1]]]), torch.tensor([[3]]), kind=torch.tensor([[[0, 2, 0, 0]]]))
    order = tiers.quantize(k, v, position, gone, 0, 0)
    assert order.tolist() == [1, 3, 0, 8]  # its page holds 3; two others do not fill more than a page
    assert torch.equal(k, again)  # nothing is quantized twice


def test_tokens_that_no_grid_holds_stay_exact() -> None:
    """A page with one would be NaN. The row's maps are those of its first page."""
    tiers = Tiers([PageSpec("int4", "int4")], (1, 1, 8), 2)
    k, v = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    k[2, 1], v[4, 0] = torch.inf, 1e5
    keep = Keep(torch.arange(8)[None, None].int(), torch.tensor([[8]]), kind=torch.ones(1, 1, 8).int())
    scale = ChannelMaps(v_scale=torch.tensor([[[0.5, 1, 1, 1]]]))  # brings 1e5 within reach
    for maps, exact in ((None, [2, 4]), (scale, [2, 7])):
        tiers = Tiers(tiers.formats, (1, 1, 8), 2)
        tiers.quantize(k.clone(), v.clone(), torch.arange(8), dataclasses.replace(keep, maps=maps), 0, 0)
        assert (tiers.kind[0, 0] == 0).nonzero().flatten().tolist() == exact


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Uniform(5), r"page_spec: k_bits must be one of \[2, 3, 4, 8\], got 5"),
        (lambda: Uniform(4, 16), r"page_spec: v_bits must be one of \[2, 3, 4, 8\], got 16"),
        (lambda: Uniform(every=-1), "Uniform: every must be a count >= 0, got -1"),
        (lambda: Uniform(recent=0.5), "Uniform: recent must be a count >= 0, got 0.5"),  # type: ignore[arg-type]
        (lambda: Uniform(edges=-1), "Uniform: edges must be a count >= 0, got -1"),
        (lambda: Uniform(rotate="k"), "Uniform: rotate must be 'none', 'keys' or 'both', got 'k'"),  # type: ignore[arg-type]
        (lambda: Uniform(k_axis="x"), "Uniform: k_axis must be 'token' or 'channel', got 'x'"),  # type: ignore[arg-type]
        (lambda: Uniform(rotate="keys"), "k_axis must be 'token' with rotate='keys', got 'channel'"),
        (lambda: KIVI(1), "page_spec: k_bits must be one of"),
        (lambda: QServe(alpha=2), r"QServe: alpha must be in \[0, 1\], got 2"),
        (lambda: MiKV(1.5), r"MiKV: keep must be in \[0, 1\], got 1.5"),
        (lambda: MiKV(newest=-1), r"MiKV: newest must be in \[0, 1\], got -1"),
        (lambda: MiKV(low=8), "MiKV: low must be 2, 3 or 4, got 8"),
        (lambda: MiKV(low=4, high=4), "MiKV: high must be 16, 8 or 4, and more than low=4, got 4"),
        (lambda: ZipCache(ratio=2), r"ZipCache: ratio must be in \[0, 1\], got 2"),
        (lambda: ZipCache(norm="x"), "ZipCache: norm must be one of .*, got 'x'"),  # type: ignore[arg-type]
        (lambda: ZipCache(probes=0), r"ZipCache: probes must be in \(0, 1\], got 0"),
        (lambda: ZipCache(drawn=2), r"ZipCache: drawn must be in \[0, 1\], got 2"),
        (lambda: ZipCache(high=2), "ZipCache: high must be more than low=2, got 2"),
        (lambda: ZipVL(tau=2), r"ZipVL: tau must be in \[0, 1\], got 2"),
        (lambda: KVTuner(()), "KVTuner: table must be of one pair of bits at least"),
        (lambda: QAQ(error=0), "QAQ: error must be > 0, got 0"),
        (lambda: QAQ(high=3), "QAQ: high must be 4 or 8, got 3"),
        (lambda: Tiered(tiers={16: 0.5, 4: 0.6}), "Tiered: tiers must be shares that add up to 1"),
        (lambda: Tiered(tiers={4: 0.5, "evict": 0.2}), "Tiered: tiers must be shares that add up to 1"),
        (lambda: Tiered(tiers={"evict": 1.0}), "Tiered: tiers must be shares .*, not all of them evicted"),
        (lambda: Tiered(tiers={5: 1.0}), r"Tiered: tiers must be shares in \[0, 1\] by \[16, 8, 4, 3, 2, 'e"),
        (lambda: Tiered(budget=20), "Tiered: budget must be >= 132 slots, the protected ones"),
        (lambda: Tiered(budget="2"), "bytes must look like"),
        (lambda: Tiered(SnapKV(1.0), recent=8), "Tiered: recent must be >= the scorer's window=32, got 8"),
        (lambda: Tiered(budget="9KB").resolve(999, 2, rows=2, slot_bytes=64, page=16), "budget='9KB'"),
    ],
)  # fmt: skip
def test_bad_knobs(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_tiered_takes_a_mapping_and_hands_its_schedule_on() -> None:
    method = Tiered(A2SF(1.0, gamma=0.9), {"evict": 0.2, 2: 0.4, 16: 0.05, 4: 0.35}, every=7)
    assert method.tiers == ((16, 0.05), (4, 0.35), (2, 0.4), ("evict", 0.2))
    assert method.method == A2SF(1.0, gamma=0.9, every=7)
    assert method == Tiered(A2SF(1.0, gamma=0.9), every=7)
    assert method.resolve(1000, 2) == (800, 800)
    assert method.resolve(140, 1) == (132,)  # what is protected stays
    scores = torch.arange(8.0).expand(1, 2, 8)
    given = Tiered(Given(1.0, scores=scores), {4: 0.5, "evict": 0.5}, **NOTHING)
    keep = given.evict(view_of([[8, 8]], page=4))
    assert keep is not None
    assert keep.index[..., :4].tolist() == [[[4, 5, 6, 7]] * 2]
    assert keep.kind is not None
    assert keep.kind[..., :4].tolist() == [[[1, 1, 1, 1]] * 2]
