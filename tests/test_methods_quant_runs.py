"""What all methods that quantize the KV cache have in common, and MiKV's control arms."""

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from kv_methods import random_qkv
from quant_methods import INNER, PAGE, PROBED, PROMPT, QUANT_METHODS, STEPS, rows, run, uncompressed
from tokencomp import methods
from tokencomp.methods import A2SF, MiKV, Tiered, Uniform
from tokencomp.methods.quantizing import page_format

METHODS = pytest.mark.parametrize("name", QUANT_METHODS)
EVICTS = {name for name, method in QUANT_METHODS.items() if isinstance(method, Tiered)}


def test_every_method_is_tested() -> None:
    listed = {m.cls for m in methods.all_methods() if m.stage == "kv-quant"}
    assert {type(m) for m in QUANT_METHODS.values()} == listed
    assert all(isinstance(m, methods.KVMethod) for m in QUANT_METHODS.values())


@METHODS
def test_tokens_are_quantized_once_in_whole_pages_and_never_when_protected(
    cpu_backend: Backend, name: str
) -> None:
    method, sides = QUANT_METHODS[name], random_qkv(tokens=PROMPT + STEPS, dim=16)
    exact = uncompressed(*sides)
    with cpu_backend.active():
        trace = run(name, *sides)
    before: list[dict[int, int]] = [{} for _ in range(4)]
    for forward in range(len(trace.held)):
        seen = PROMPT + forward
        now = list(rows(trace, forward))
        for old, row in zip(before, now, strict=True):
            tiers = Counter(row.values())
            assert all(count % PAGE == 0 for kind, count in tiers.items() if kind)
            assert all(row[p] == kind for p, kind in old.items() if kind and p in row)
            assert set(row) >= {0, 1, *range(seen - method.recent, seen)}  # sinks and recent tokens
            assert not any(row[p] for p in (0, 1, *range(seen - method.recent, seen)))
            if name not in EVICTS:
                assert set(row) == set(range(seen))
            if method.every == 4 and forward % 4:
                assert all(row[p] == old[p] for p in old)
        before = now
    if method.formats:
        assert any(kind for row in before for kind in row.values())
    assert (trace.output[:, :, :PROMPT] - exact[:, :, :PROMPT]).norm() < 1e-4


@METHODS
def test_what_is_not_protected_is_quantized(name: str) -> None:
    """All but a page, what came since, and what the method keeps exact."""
    method, trace = QUANT_METHODS[name], run(name)
    for forward in range(len(trace.held)):
        seen = PROMPT + forward
        for row in rows(trace, forward):
            exact = sum(kind == 0 for kind in row.values())
            most = max(sum(method.protected(seen)), len(row) - sum(method.split(len(row))))
            slack = (len(method.specs) or 1) * (PAGE - 1) + max(method.every - 1, 0)
            assert exact <= most + slack


@METHODS
def test_ragged_batch_is_its_rows(name: str) -> None:
    """Left and right padding change nothing: a padded sequence is compressed as it would be alone."""
    pad = 17
    q, k, v = random_qkv(tokens=PROMPT + STEPS, dim=16)
    left = torch.ones(2, PROMPT + STEPS, dtype=torch.bool)
    left[1, :pad] = False
    right = torch.ones(2, PROMPT + STEPS, dtype=torch.bool)
    right[1, PROMPT - pad : PROMPT] = False
    moved = [t.clone() for t in (q, k, v)]
    for t in moved:
        t[1, :, : PROMPT - pad] = t[1, :, pad:PROMPT].clone()
    both = run(name, q, k, v, valid=left), run(name, *moved, valid=right)
    assert (both[0].held, both[0].kinds) == (both[1].held, both[1].kinds)
    first = run(name, q[:1], k[:1], v[:1])
    second = run(name, *(t[1:, :, pad:] for t in (q, k, v)), chunks=[PROMPT - pad])
    for i, alone in enumerate((first, second)):
        assert [held[i] for held in both[0].held] == [held[0] for held in alone.held]
        assert [kinds[i] for kinds in both[0].kinds] == [kinds[0] for kinds in alone.kinds]
    torch.testing.assert_close(both[0].output[1:, :, PROMPT:], second.output[:, :, PROMPT - pad :])


@METHODS
def test_a_chunked_prompt_is_the_prompt(name: str) -> None:
    """Where chunks are announced, and no probes are drawn; lse and logits may be missing."""
    whole = run(name)
    chunked = run(name, chunks=[23, 40, 1], hold=True)
    if name not in PROBED:
        assert (chunked.held[2:], chunked.kinds[2:]) == (whole.held, whole.kinds)
        torch.testing.assert_close(chunked.output[:, :, PROMPT:], whole.output[:, :, PROMPT:])
    else:
        assert [len(row) for row in chunked.kinds[-1][0]] == [len(row) for row in whole.kinds[-1][0]]
    alone = run(name, give=False)
    assert (alone.held, alone.kinds) == (whole.held, whole.kinds)
    assert torch.equal(run(name).output, whole.output)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The same tokens as float32 arithmetic on the same numbers; rotated keys round before they get codes."""
    q, k, v = (t.to(dtype) for t in random_qkv(tokens=PROMPT + STEPS, dim=16))
    trace, same = run(name, q, k, v), run(name, q.float(), k.float(), v.float())
    assert all(t.dtype in (torch.float32, torch.int32) for t in trace.state.values())
    error = (trace.output - same.output).norm() / same.output.norm()
    assert error < (0.1 if QUANT_METHODS[name].rotation == "none" else 0.5)
    assert (trace.held[0], trace.kinds[0]) == (same.held[0], same.kinds[0])


@METHODS
def test_a_second_prompt_and_cuts_after_every_chunk(name: str) -> None:
    q, k, v = random_qkv(tokens=130, dim=16)
    trace = run(name, q, k, v, chunks=[64, -9, 20])
    assert trace.output.isfinite().all()
    many = run(name, q, k, v, chunks=[31, 7, 40, 2])
    assert many.output.isfinite().all()
    if QUANT_METHODS[name].formats:
        assert 3 in many.evicted or 2 in many.evicted
    steps = run(name, q, k, v, chunks=[64], steps=2)
    assert steps.output.isfinite().all()
    if name != "tiered-share":  # half of no prompt cannot hold what is protected
        assert run(name, *(t[:, :, :40] for t in (q, k, v)), chunks=[]).output.isfinite().all()


@METHODS
def test_bytes_are_those_of_the_pages(name: str) -> None:
    """``stored_bytes`` against what a trace holds; where the tokens decide, it is the most there may be."""
    method, trace = QUANT_METHODS[name], run(name, chunks=[PROMPT, -STEPS])
    for row in rows(trace, 0):
        tiers = Counter(row.values())
        found = -(-tiers.pop(0, 0) // PAGE) * PAGE * 2 * 16 * 4
        for kind, count in tiers.items():
            found += count // PAGE * page_format(method.formats[kind - 1], PAGE, 16).page_bytes
        want = method.stored_bytes(len(row), 1, head_dim=16, page=PAGE, element_bytes=4)
        if name.startswith(("zipvl", "qaq")):
            assert found <= want + PAGE * 7 * 2 * 16 * 4
        else:
            assert found == want


@METHODS
def test_methods_are_values(name: str) -> None:
    method = QUANT_METHODS[name]
    assert hash(method) == hash(type(method)(**vars(method)))
    assert method.resolve(100, 3) == (100,) * 3 or name in EVICTS
    with pytest.raises(AttributeError):
        method.recent = 3


# --- MiKV -------------------------------------------------------------------------------------------------


def test_mikv_that_keeps_all_is_the_plain_cache() -> None:
    """Token by token, bit for bit; it has no quantized pages at all."""
    q, k, v = random_qkv(tokens=PROMPT + STEPS, dim=16)
    method = MiKV(1.0, sinks=0, recent=0, edges=0, every=1)
    trace = run(method, q, k, v)
    assert method.formats == ()
    assert trace.evicted == []
    plain = run(Uniform(4, recent=10**6), q, k, v)
    assert torch.equal(trace.output, plain.output)
    torch.testing.assert_close(trace.output, uncompressed(q, k, v))


@pytest.mark.parametrize("balance", [False, True])
def test_mikv_that_keeps_nothing_is_plain_rounding(balance: bool) -> None:
    """Whatever the scores: in one page a token all are quantized at once."""
    own: dict[str, Any] = {"sinks": 0, "recent": 0, "edges": 0, "every": 1}
    low = run(MiKV(0.0, low=2, group=8, balance=balance, **own), page=1)
    plain = run(Uniform(2, k_axis="token", k_group=8, v_group=8, balance=balance, **own), page=1)
    assert torch.equal(low.output, plain.output)
    assert all(kind == 1 for row in rows(low) for kind in row.values())


@pytest.mark.parametrize("keep", [0.2, 0.5])
@pytest.mark.parametrize("page", [1, 4])
def test_mikv_ratio_holds_at_each_step(keep: float, page: int) -> None:
    method = MiKV(keep, sinks=0, recent=0, edges=0, every=1)
    trace = run(method, page=page)
    for forward in range(len(trace.held)):
        seen = PROMPT + forward
        for row in rows(trace, forward):
            high = sum(kind == 0 for kind in row.values())
            assert 0 <= high - int(keep * seen + 1e-9) < page
            newest = int(0.5 * int(keep * seen + 1e-9) + 1e-9)
            assert all(row[p] == 0 for p in range(seen - newest, seen))


# --- Tiered -----------------------------------------------------------------------------------------------


def test_tiered_shares() -> None:
    """Of 200 tokens, the best half exact, then 8, 4 and 2 bits, the worst fifth gone."""
    q, k, v = random_qkv(1, 4, 2, 200, 16)
    method = Tiered(A2SF(1.0), {16: 0.5, 8: 0.1, 4: 0.1, 2: 0.1, "evict": 0.2}, **INNER | {"recent": 20})
    trace = run(method, q, k, v, chunks=[200])
    for head, row in enumerate(rows(trace)):
        assert Counter(row.values()) == {0: 100, 1: 20, 2: 20, 3: 20}
        worth = trace.state["score"][0, head, :160]
        score = dict(zip(trace.held[-1][0][head], worth.tolist(), strict=True))
        tiers = [[score[p] for p, kind in row.items() if kind == k and 2 <= p < 180] for k in (0, 1, 2, 3)]
        assert all(min(better) >= max(worse) for better, worse in itertools.pairwise(tiers))


@pytest.mark.parametrize("every", [1, 4])
def test_tiered_bytes_are_never_exceeded(every: int) -> None:
    """Pages of all layers, quantized and not, at each moment; and most of the budget is used."""
    q, k, v = random_qkv(2, 4, 2, 240, 16)
    layers, limit = 2, 60_000
    method = Tiered(A2SF(1.0), {16: 0.1, 4: 0.4, 2: 0.5}, f"{limit}B", **INNER | {"every": every})
    trace = run(method, q, k, v, chunks=[160], layers=layers)
    used = []
    for forward in range(len(trace.held)):
        total = 0
        for row in rows(trace, forward):
            tiers = Counter(row.values())
            total += -(-tiers.pop(0) // PAGE) * PAGE * 2 * 16 * 4
            for kind, count in tiers.items():
                total += count // PAGE * page_format(method.formats[kind - 1], PAGE, 16).page_bytes
        used.append(layers * total)
    assert 0.7 * limit < max(used) <= limit
    held = [len(row) for row in rows(trace)]
    assert 2 * held[0] * 2 * 16 * 4 * 4 > limit  # more tokens than would fit without quantizing


def test_tiered_lets_stale_pages_go() -> None:
    """With a fixed number of tokens, quantized pages that nobody attends to any more make room."""
    q, k, v = random_qkv(1, 2, 1, 300, 16)
    method = Tiered(A2SF(1.0, gamma=0.5), {4: 1.0}, 40, **INNER)
    trace = run(method, q, k, v, chunks=[60])
    assert all(len(row) <= 40 + 3 for row in rows(trace))
    positions = sorted(next(rows(trace)))
    assert sum(p > 150 for p in positions) >= 30
    assert replace(method, budget=0.5).resolve(60, 2) == (30, 30)
