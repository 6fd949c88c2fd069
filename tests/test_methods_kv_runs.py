"""What all methods on the KV cache have in common: budgets held, order, padding, chunks, ties, NaN."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from kv_methods import DRAWN, KV_METHODS, PAGE, Given, kept, random_qkv, view_of
from tokencomp.methods import A2SF, H2O, AdaKV, eviction
from tokencomp.methods.kv import KVView
from tokencomp.reference.kv_policy import Trace, run_policy

PROMPT, STEPS, HEADS = 64, 14, 2
METHODS = pytest.mark.parametrize("name", KV_METHODS)


def run(name: str, *sides: Any, **options: Any) -> Trace:
    options = {"chunks": [PROMPT], "page": PAGE} | options
    return run_policy(KV_METHODS[name], *(sides or random_qkv(tokens=PROMPT + STEPS)), **options)


@METHODS
def test_budgets_hold(cpu_backend: Backend, name: str) -> None:
    """After each eviction no more than the budget, between them ``every`` more; what is protected stays."""
    method = KV_METHODS[name]
    with cpu_backend.active():
        trace = run(name)
    slots = method.resolve(PROMPT, 1)[0]
    for forward, held in enumerate(trace.held):
        seen, now = PROMPT + forward, forward in trace.evicted
        for rows in held:
            total = sum(map(len, rows))
            share = slots if method.every and name not in ("prefixkv",) else slots + forward
            if name == "prefixkv":
                share = int(0.25 * seen) + 1
            if forward == 0 and name == "lazy":
                share = PROMPT
            slack = 0 if now or forward == 0 or not method.every else max(method.every, PAGE)
            if name == "lazy" and not any(f <= forward for f in trace.evicted):
                slack = PROMPT
            assert total <= HEADS * (share + slack)
            for row in rows:
                assert row == sorted(set(row))
                assert row[-1] < seen
                sinks, recent = method.protected(slots)
                if now:
                    assert set(row) >= {*range(sinks), *range(seen - recent, seen)}
    assert trace.evicted
    if method.every == 0:
        assert trace.evicted == [0]


@METHODS
def test_everything_stays_where_it_fits(name: str) -> None:
    """Output and keys are those of full attention."""
    method = replace(KV_METHODS[name], budget=1.0)
    q, k, v = random_qkv(tokens=40)
    trace = run_policy(method, q, k, v, chunks=[40], page=PAGE)
    assert trace.evicted == []
    assert trace.held == [[[[*range(40)]] * 2] * 2]
    group = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(trace.output, group)


@METHODS
def test_ragged_batch_is_its_rows(name: str) -> None:
    """Left and right padding change nothing: a padded sequence is compressed as it would be alone."""
    pad = 17
    q, k, v = random_qkv(tokens=PROMPT + STEPS)
    left = torch.ones(2, PROMPT + STEPS, dtype=torch.bool)
    left[1, :pad] = False
    right = torch.ones(2, PROMPT + STEPS, dtype=torch.bool)
    right[1, PROMPT - pad : PROMPT] = False
    moved = [t.clone() for t in (q, k, v)]
    for t in moved:
        t[1, :, : PROMPT - pad] = t[1, :, pad:PROMPT].clone()
    both = run(name, q, k, v, valid=left), run(name, *moved, valid=right)
    assert both[0].held == both[1].held
    if name in DRAWN:
        return
    first = run(name, q[:1], k[:1], v[:1])
    second = run(name, *(t[1:, :, pad:] for t in (q, k, v)), chunks=[PROMPT - pad])
    assert [held[0] for held in both[0].held] == [held[0] for held in first.held]
    assert [held[1] for held in both[0].held] == [held[0] for held in second.held]
    torch.testing.assert_close(both[0].output[1:, :, PROMPT:], second.output[:, :, PROMPT - pad :])


@METHODS
def test_a_chunked_prompt_is_the_prompt(name: str) -> None:
    """Where chunks are announced; else every chunk is evicted from, within the same budget."""
    whole = run(name)
    assert run(name, chunks=[23, 40, 1], hold=True).held[2:] == whole.held
    assert run(name, give=False).held == whole.held  # lse and logits not given: computed
    if isinstance(KV_METHODS[name].budget, int):
        each = run(name, chunks=[23, 40, 1])
        assert max(sum(map(len, rows)) for rows in each.held[2]) <= HEADS * KV_METHODS[name].budget


@METHODS
def test_steps_of_two_tokens(name: str) -> None:
    """A decode step may bring several tokens: the same accumulated state as in single ones."""
    method = KV_METHODS[name]
    q, k, v = random_qkv(tokens=20)
    roomy = replace(method, budget=1.0) if name in ("prefixkv",) else replace(method, budget=90)
    one = run_policy(roomy, q, k, v, chunks=[12], page=PAGE)
    two = run_policy(roomy, q, k, v, chunks=[12], page=PAGE, steps=2)
    if name == "lazy":
        return  # its clock counts steps
    assert one.held[-1] == two.held[-1] or name == "prefixkv"
    for key, state in one.state.items():
        torch.testing.assert_close(two.state[key], state)


@METHODS
def test_runs_repeat(name: str) -> None:
    first, again = run(name), run(name)
    assert first.held == again.held
    assert torch.equal(first.output, again.output)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """States stay float32; what is kept is what float32 arithmetic on the same numbers keeps."""
    q, k, v = (t.to(dtype) for t in random_qkv(tokens=PROMPT + STEPS))
    trace = run(name, q, k, v)
    same = run(name, q.float(), k.float(), v.float())
    assert all(t.dtype in (torch.float32, torch.int32) for t in trace.state.values())
    if name not in ("ems-keys", "d2o-adakv", "ems", "d2o", "cam", "cam-mean"):  # merging rounds to the dtype
        assert trace.held == same.held


@METHODS
def test_a_second_prompt(name: str) -> None:
    """Turns of a conversation: budgets of all seen; windows start anew where steps went unrecorded."""
    q, k, v = random_qkv(tokens=110)
    method = KV_METHODS[name]
    trace = run_policy(method, q, k, v, chunks=[64, -9, 20], page=PAGE)
    assert trace.output.isfinite().all()
    if not method.evicts_prompts:
        return
    slots = method.resolve(93, 1)[0]
    assert 10 in trace.evicted
    assert all(sum(map(len, rows)) <= HEADS * slots for rows in trace.held[10])
    assert {90, 91, 92} & set(trace.held[10][0][0]) or name in ("tova", "keydiff", "knorm", "random")


def test_ties_go_to_the_lower_slot(cpu_backend: Backend) -> None:
    with cpu_backend.active():
        for scores in (torch.zeros(1, 2, 9), torch.zeros(1, 1, 9), torch.full((1, 2, 9), float("nan"))):
            keep = Given(4, scores=scores, sinks=1, recent=2).evict(view_of([[9, 9]]))
            assert kept(keep) == [[[0, 1, 7, 8]] * 2]


def test_nan_goes_first(cpu_backend: Backend) -> None:
    scores = torch.tensor([[[1.0, float("nan"), -5.0, float("-inf"), 3.0]]])
    with cpu_backend.active():
        assert kept(Given(3, scores=scores).evict(view_of([[5]]))) == [[[0, 2, 4]]]


def test_rows_of_different_budgets(cpu_backend: Backend) -> None:
    """Shares of 16, 40 and 4 tokens; recent windows are shares as well. A short row is kept whole."""
    lengths = [[16, 16], [40, 40], [4, 4]]
    scores = torch.arange(40.0).flip(0).expand(3, 2, 40)
    with cpu_backend.active():
        keep = Given(0.25, scores=scores, recent=0.5).evict(view_of(lengths))
    assert kept(keep) == [[[0, 1, 14, 15]] * 2, [[*range(5), *range(35, 40)]] * 2, [[0]] * 2]
    with cpu_backend.active():
        keep = Given(10, scores=scores).evict(view_of(lengths))
    assert kept(keep) == [[[*range(10)]] * 2, [[*range(10)]] * 2, [[0, 1, 2, 3]] * 2]


def test_ragged_heads_are_scored_on_their_own() -> None:
    """Heads that hold different numbers of slots: the accumulated score is that of each head alone."""
    q, k, v = random_qkv(1, 4, 2, 60)
    method = AdaKV(H2O(0.3, every=1, recent=0.0), alpha=0.0)
    trace = run_policy(method, q, k, v, chunks=[50])
    sizes = [len(row) for row in trace.held[0][0]]
    assert sizes[0] != sizes[1]
    held = [sorted(row) for row in trace.held[0][0]]
    for h in range(2):
        logits = (q[0, 2 * h : 2 * h + 2].double() @ k[0, h].double().mT) * 8**-0.5
        mask = torch.ones(60, 60, dtype=torch.bool).tril()
        score = logits[:, :50].masked_fill(~mask[:50], -torch.inf).softmax(-1).sum((0, 1))
        row = [*held[h], 50]
        score[row] += logits[:, 50, row].softmax(-1).sum(0)
        now = trace.held[1][0][h]
        gone = set(row) - set(now)
        assert not gone or max(score[list(gone)]) <= min(score[now])


def test_truncated_forgetting_is_close() -> None:
    q, k, v = random_qkv(1, 2, 1, 400)
    exact = run_policy(A2SF(500, gamma=0.9, truncate=0.0), q, k, v, chunks=[400]).state["score"]
    cut = run_policy(A2SF(500, gamma=0.9, truncate=1e-3), q, k, v, chunks=[400]).state["score"]
    loss = (exact - cut)[..., :400]
    assert 0 < loss.max() <= 2e-3 + 1e-6  # of two query heads


def test_softcap_and_scale() -> None:
    """All that score by attention see the model's logits."""
    q, k, v = random_qkv(1, 4, 2, 40)
    for name in ("h2o", "a2sf", "snapkv", "tova", "rkv", "critic", "ems"):
        plain, capped = [run(name, q, k, v, chunks=[36], softcap=cap) for cap in (None, 0.5)]
        assert plain.held != capped.held
        own = run(name, q, k, v, chunks=[36], softcap=0.5, give=False)
        assert own.held == capped.held
        scaled = run(name, 2 * q, k, v, chunks=[36], scale=8**-0.5)
        assert scaled.held == run(name, q, k, v, chunks=[36], scale=2 * 8**-0.5).held


def test_garbage_beyond_a_row_is_not_read() -> None:
    """Keys of 1e3 lie beyond every row of the reference; other garbage changes nothing."""
    q, k, v = random_qkv(1, 2, 1, 30)
    shown: list[KVView] = []

    class Watch(H2O):
        def evict(self, view: KVView) -> Any:
            shown.append(view)
            return super().evict(view)

    run_policy(Watch(10), q, k, v, chunks=[20])
    assert shown[0].keys().shape[2] > shown[0].size
    assert (shown[0].keys()[:, :, 20:] == 1e3).all()


def test_draws_look_random() -> None:
    view = view_of([[5000] * 4])
    draws = eviction.draws(view, 3)
    assert ((draws >= 0) & (draws < 1)).all()
    assert abs(float(draws.mean()) - 0.5) < 0.01
    bits = torch.histc(draws, 16, 0, 1) / 20000
    assert (bits - 1 / 16).abs().max() < 0.01
    near = torch.corrcoef(torch.stack([draws[0, 0, 1:], draws[0, 0, :-1], draws[0, 1, 1:]]))
    assert (near - torch.eye(3)).abs().max() < 0.06
