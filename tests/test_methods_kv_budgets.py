"""Budgets of methods on the KV cache: tokens, shares, bytes; what is refused, and how."""

from typing import Any

import pytest
import torch
from kv_methods import KV_METHODS, Given, view_of
from tokencomp import methods
from tokencomp.methods import (
    A2SF,
    CRITIC,
    D2O,
    EMS,
    H2O,
    RKV,
    AdaKV,
    CaM,
    KVCompress,
    KVCrush,
    LazyEviction,
    PagedEviction,
    PrefixKV,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    kv,
)
from tokencomp.reference.kv_policy import run_policy


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("1.5 GB", 1_500_000_000),
        ("300MB", 3 * 10**8),
        ("7kib", 7168),
        ("5B", 5),
        ("1KB", 1000),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert kv.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "2", "GiB", "2 TiB", "-1GB", "1e9B", "2GiBs", "MIB", "1 I B"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(ValueError, match=r"budget: bytes must look like '2GiB', '1\.5GB' or '300MB', got"):
        kv.parse_bytes(text)
    with pytest.raises(ValueError, match="bytes must look like"):
        H2O(text)


def test_slots() -> None:
    assert kv.slots_of(7, 1000, 4) == 7
    assert kv.slots_of(0.25, 10, 4) == 2  # half to even
    assert kv.slots_of(0.001, 10, 4) == 1
    sizes = {"rows": 16, "slot_bytes": 256}
    assert kv.slots_of("1MiB", 10, 4, **sizes) == 2**20 // (4 * 16 * 256)
    assert kv.slots_of("1MB", 10, 4, **sizes, page=16) == 1_000_000 // (4 * 16 * 256) // 16 * 16
    assert kv.slots_of("100KB", 10, 4, **sizes, page=16) == 6  # less than a page
    with pytest.raises(ValueError, match="bytes need layers, rows and slot_bytes >= 1, got 4, 1 and 0"):
        kv.slots_of("1MiB", 10, 4)


def test_bytes_pay_for_what_comes_between_evictions() -> None:
    """A run never holds more than it may, at the widest moment before an eviction."""
    held = []
    for every in (1, 4):
        q, k, v = (torch.randn(2, 2, 60, 8) for _ in range(3))
        trace = run_policy(StreamingLLM("10KiB", every=every), q, k, v, chunks=[40], layers=2)
        held.append(max(sum(len(row) for rows in now for row in rows) for now in trace.held))
        assert held[-1] * 2 * 64 <= 10 * 2**10  # both layers, 8 + 8 floats a slot
    assert held == [80, 80]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: H2O(0), "H2O: budget must be >= 1 slots, the protected ones .sinks . recent., got 0"),
        (lambda: H2O(-3), "H2O: budget must be >= 1 slots"),
        (
            lambda: H2O(1.5),
            r"H2O: budget must be a count >= 1, a share in \(0, 1\] or bytes such as '2GiB', got",
        ),
        (lambda: H2O(float("nan")), "H2O: budget must be a count"),
        (lambda: H2O(True), "H2O: budget must be a count"),
        (lambda: H2O(None), "H2O: budget must be a count"),  # type: ignore[arg-type]
        (lambda: StreamingLLM(3, sinks=4), "StreamingLLM: budget must be >= 4 slots, the protected ones"),
        (lambda: SnapKV(31), "SnapKV: budget must be >= 32 slots, .* got 31"),
        (lambda: SnapKV(33, sinks=2), "SnapKV: budget must be >= 34 slots, .* got 33"),
        (lambda: A2SF(18, recent=16, sinks=3), "A2SF: budget must be >= 19 slots"),
        (lambda: LazyEviction(63), "LazyEviction: budget must be >= 64 slots"),
        (lambda: AdaKV(SnapKV(40), budget=20), "SnapKV: budget must be >= 32 slots"),
        (lambda: EMS(15), "EMS: budget must be >= 16 slots"),
        (lambda: H2O(9, every=-1), "H2O: every must be >= 0, got -1"),
        (lambda: H2O(9, recent=1.5), r"H2O: recent must be a count or a share in \[0, 1\], got 1.5"),
        (lambda: H2O(9, recent=-1), "H2O: sinks and recent must be >= 0"),
        (lambda: A2SF(99, gamma=0.0), r"A2SF: gamma must be in \(0, 1\], got 0.0"),
        (lambda: A2SF(99, truncate=-1), "A2SF: truncate must be >= 0, got -1"),
        (lambda: SnapKV(99, window=0), "SnapKV: window must be >= 1, got 0"),
        (lambda: SnapKV(99, kernel=0), r"SnapKV: kernel must be in \[1, 4096\], got 0"),
        (lambda: SnapKV(99, pool="sum"), "SnapKV: pool must be 'avg' or 'max', got 'sum'"),  # type: ignore[arg-type]
        (lambda: PyramidKV(beta=0), "PyramidKV: beta must be >= 1, got 0"),
        (lambda: AdaKV(alpha=2), r"AdaKV: alpha must be in \[0, 1\], got 2"),
        (lambda: AdaKV(form="x"), "AdaKV: form must be 'exact' or 'code', got 'x'"),  # type: ignore[arg-type]
        (lambda: RKV(99, trade_off=2), r"RKV: trade_off must be in \[0, 1\], got 2"),
        (lambda: RKV(99, threshold=1), r"RKV: threshold must be in \[0, 1\), got 1"),
        (lambda: RKV(99, kernel=0), r"RKV: kernel must be in \[1, 4096\], got 0"),
        (lambda: LazyEviction(99, every=0), "LazyEviction: every must be >= 1, got 0"),
        (lambda: LazyEviction(99, alpha=0), "LazyEviction: alpha must be > 0, got 0"),
        (lambda: LazyEviction(99, form="x"), "LazyEviction: form must be 'code' or 'paper'"),  # type: ignore[arg-type]
        (lambda: KVCrush(share=2), r"KVCrush: share must be in \[0, 1\], got 2"),
        (lambda: KVCrush(page=-1), "KVCrush: page must be >= 0, got -1"),
        (lambda: KVCrush(recent=-1), "KVCrush: sinks and recent must be >= 0, got -1"),
        (lambda: PrefixKV(100), r"PrefixKV: budget must be a share in \(0, 1\] .a float., got 100"),
        (
            lambda: PrefixKV(0.5, forget=(0.2, 0.2)),
            "PrefixKV: mean of forget must be 1 - budget=0.500, got 0.200",
        ),
        (lambda: PrefixKV(0.5, forget=(1.0, 0.0)), r"PrefixKV: forget must be shares in \[0, 1\)"),
        (lambda: PrefixKV(0.5, forget=(0.5,)).resolve(9, 2), "PrefixKV: forget must be of 2 layers, got 1"),
        (lambda: PrefixKV.calibrate([], 0.5), "PrefixKV.calibrate: scores must be of one sample at least"),
        (lambda: CRITIC(99, weights=(1, 1, 0)), "CRITIC: weights must be >= 0 and adding up to 1"),
        (lambda: EMS(99, window=0), "EMS: window must be >= 1, got 0"),
        (lambda: EMS(99, ratio=-1), "EMS: ratio must be >= 0, got -1"),
        (lambda: D2O(beta=2), r"D2O: beta must be in \[0, 1\], got 2"),
        (lambda: CaM(targets=0), "CaM: targets must be >= 1, got 0"),
        (lambda: CaM(against="x"), "CaM: against must be 'max' or 'mean', got 'x'"),  # type: ignore[arg-type]
        (lambda: KVCompress(99, scored=-1), "KVCompress: scored must be >= 0, got -1"),
        (lambda: KVCompress(99, page=-1), "KVCompress: page must be >= 0, got -1"),
        (lambda: PagedEviction(99, page=-1), "PagedEviction: page must be >= 0, got -1"),
        (lambda: PagedEviction(99, every=2), "PagedEviction: every must be 0 or 1, got 2"),
    ],
)
def test_bad_knobs(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_budgets_too_small_for_a_prompt() -> None:
    """A share that cannot hold the protected slots is refused; a prompt that fits is not looked at."""
    method = SnapKV(0.1)
    assert method.resolve(320, 2) == (32, 32)
    with pytest.raises(ValueError, match=r"SnapKV: budget must be >= 32 slots, .* got 30 .budget=0.1."):
        method.resolve(300, 2)
    with pytest.raises(ValueError, match=r"SnapKV: budget must be >= 32 slots, .* got 8 .budget='8KiB'."):
        SnapKV("8KiB").resolve(300, 2, rows=4, slot_bytes=128)
    with pytest.raises(ValueError, match=r"KVCrush: budget must be >= 20 slots, the protected ones"):
        KVCrush(budget=19).resolve(300, 2)
    assert SnapKV("8KiB").resolve(8, 2, rows=4, slot_bytes=128) == (8, 8)
    with pytest.raises(ValueError, match=r"PyramidKV: budget must be >= 32 slots, .* got 30"):
        PyramidKV(SnapKV(0.1)).resolve(300, 2)


def test_kvcrush_needs_room_for_whole_pages() -> None:
    scores = torch.rand(1, 1, 64)
    method = KVCrush(Given(21, scores=scores), sinks=4, recent=16, page=16)
    with pytest.raises(
        ValueError, match="KVCrush: budget must be >= 32 slots, sinks and recent in pages of 16, got 21"
    ):
        method.evict(view_of([[64]]))


def test_adakv_needs_scores_of_heads() -> None:
    method = AdaKV(methods.TOVA(4))
    with pytest.raises(ValueError, match="each of the 2 kv heads, TOVA has one set a layer"):
        method.select(view_of([[9, 9]]), torch.zeros(1, 1, 9), [4])


@pytest.mark.parametrize("name", KV_METHODS)
def test_queries_have_to_be_shown(name: str) -> None:
    """A cache behind a foreign attention shows none: methods that look at some refuse it."""
    method = KV_METHODS[name]
    state = {key: torch.full((1, 2, 40), side.fill, dtype=side.dtype) for key, side in method.sides.items()}
    view = view_of([[40, 40]], state=state)
    if method.queries == 0:
        method.after_prefill(view)
        return
    with pytest.raises(ValueError, match=r": q of the view must be all queries of the forward, got none"):
        method.after_prefill(view)


def test_wrappers_hand_on_budget_and_schedule() -> None:
    method = AdaKV(PyramidKV(SnapKV(64, window=8), every=4), budget=128)
    assert method.budget == 128
    assert method.every == 4
    assert method.method.method == SnapKV(128, window=8, every=4)  # type: ignore[attr-defined]
    assert method == AdaKV(PyramidKV(SnapKV(128, window=8, every=4)))
    assert "SnapKV(budget=128" in repr(method)
    plain = {"needs_logits", "needs_lse", "queries", "rerotates", "sides", "evicts_prompts"}
    for inner in (H2O(9), StreamingLLM(9, rerotate=True), LazyEviction(99)):
        assert all(getattr(D2O(inner), name) == getattr(inner, name) for name in plain)


@pytest.mark.parametrize("name", KV_METHODS)
def test_methods_are_values(name: str) -> None:
    """Hashable and immutable: one may serve many models at once."""
    method = KV_METHODS[name]
    assert hash(method) == hash(type(method)(**vars(method)))
    with pytest.raises(AttributeError):
        method.budget = 3
