"""Methods on the KV cache: the worked examples of the papers and their code."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backends import Backend
from kv_methods import KV_METHODS, Given, kept, random_qkv, view_of
from recipe_attention import close, sides_of
from tokencomp import methods
from tokencomp.methods import (
    A2SF,
    CRITIC,
    H2O,
    RKV,
    TOVA,
    AdaKV,
    KVCompress,
    KVCrush,
    LazyEviction,
    PagedEviction,
    PrefixKV,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from tokencomp.reference.kv_policy import Trace, run_policy
from torch import Tensor

A2SF_ROWS = [[1], [0.7, 0.3], [0.5, 0.1, 0.4], [0.1, 0.1, 0.5, 0.3], [0.05, 0.05, 0.3, 0.4, 0.2]]
NONE = 1e-30  # attention of 0, which has no finite logit


def run_rows(method: Any, rows: list[list[float]], chunks: list[int], **options: Any) -> Trace:
    """One head whose attention is the triangle ``rows``."""
    q, k = sides_of(rows)
    return run_policy(method, q, k, torch.ones(1, 1, len(rows), 2), chunks=chunks, scale=1, **options)


def test_every_method_is_tested() -> None:
    listed = {m.cls for m in methods.all_methods() if m.stage == "kv"}
    assert {type(m) for m in KV_METHODS.values()} == listed
    assert all(isinstance(m, methods.KVMethod) for m in KV_METHODS.values())


# --- accumulated attention --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "want", "stays"),
    [
        (H2O(3, recent=1), [2.35, 0.55, 1.2, 0.7, 0.2], [0, 2, 4]),
        (A2SF(3, recent=1, gamma=1.0), [2.35, 0.55, 1.2, 0.7, 0.2], [0, 2, 4]),
        (A2SF(3, recent=1, gamma=0.5), [0.375, 0.1625, 0.65, 0.55, 0.2], [2, 3, 4]),
        (H2O(3, recent=1, corrected=True), [2.35, 0.55, 1.2, 0.7, 0.2], [0, 2, 4]),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunks", [[5], [4, 1], [2, 2, 1]])
@pytest.mark.parametrize("give", [True, False])
def test_accumulated_attention(
    cpu_backend: Backend, method: Any, want: list[float], stays: list[int], chunks: list[int], give: bool
) -> None:
    """In one prompt and in chunks; all in decode as far as nothing is evicted."""
    with cpu_backend.active():
        assert run_rows(method, A2SF_ROWS, chunks, hold=True, give=give).held[-1] == [[stays]]
        roomy = type(method)(**vars(method) | {"budget": 9, "every": 1})
        for split in (chunks, [4], [1]):
            got = run_rows(roomy, A2SF_ROWS, split, give=give).state
            close(got["score"][0, 0, :5], want)
    if isinstance(method, H2O) and method.corrected:
        assert got["count"][0, 0, :5].tolist() == [5, 4, 3, 2, 1]


def test_h2o_in_decode_is_the_plain_loop() -> None:
    """One eviction a step: survivors carry their score, attention renormalises over what is held."""
    q, k, v = (t.double() for t in random_qkv(1, 2, 1, 60))
    q, k, v = q.float(), k.float(), v.float()
    trace = run_policy(H2O(12, recent=4, every=1), q, k, v, chunks=[12])
    held, score = list(range(12)), torch.zeros(60, dtype=torch.float64)
    logits = (q.double() @ k.double().mT * 8**-0.5)[0]
    for t in range(12):
        score[: t + 1] += logits[:, t, : t + 1].softmax(-1).sum(0)
    for t in range(12, 60):
        held.append(t)
        score[held] += logits[:, t, held].softmax(-1).sum(0)
        worst = min(held[:-4], key=lambda j: (float(score[j]), -j))
        held.remove(worst)
        assert trace.held[t - 11] == [[held]]


# --- the last queries -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "stays"), [("avg", [2, 4, 6, 7]), ("max", [2, 3, 6, 7])])
def test_snapkv(cpu_backend: Backend, pool: Any, stays: list[int]) -> None:
    k = torch.tensor([2, 0.3, 1, 3, 0.2, 1.4, 0.5, 0]).view(1, 1, 8, 1)
    q = torch.tensor([0, 0, 0, 0, 0, 0, 1, 0.5]).view(1, 1, 8, 1)
    with cpu_backend.active():
        method = SnapKV(4, window=2, kernel=3, pool=pool)
        assert run_policy(method, q, k, k, chunks=[8]).held == [[[stays]]]
        for chunks in ([7, 1], [1] * 8):
            assert run_policy(method, q, k, k, chunks=chunks, hold=True).held[-1] == [[stays]]


def test_tova(cpu_backend: Backend) -> None:
    """One set for both kv heads; the current token is evicted, unless it is protected."""
    rows = torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.25], [0.3, 0.1, 0.1, 0.4, 0.1]])
    q = torch.zeros(1, 2, 5, 5)
    q[0, :, 4] = rows.log()
    k = torch.eye(5).expand(1, 2, 5, 5).contiguous()
    with cpu_backend.active():
        assert run_policy(TOVA(3), q, k, k, chunks=[5], scale=1).held == [[[[0, 1, 3]] * 2]]
        for every in (1, 5):
            method = TOVA(4, every=every)
            assert run_policy(method, q, k, k, chunks=[], scale=1).held[-1] == [[[0, 1, 3, 4]] * 2]
        assert run_policy(TOVA(3, recent=1), q, k, k, chunks=[5], scale=1).held == [[[[1, 3, 4]] * 2]]


def test_streaming_llm() -> None:
    q, k, v = random_qkv(1, 1, 1, 30)
    trace = run_policy(StreamingLLM(8, sinks=2, every=1), q, k, v, chunks=[20])
    assert trace.held[0] == [[[0, 1, *range(14, 20)]]]
    assert trace.held[-1] == [[[0, 1, *range(24, 30)]]]


def test_streaming_llm_rotates_again() -> None:
    """With positions in the cache: as if the sequence had only ever held what is kept."""
    q, k, v = random_qkv(1, 2, 1, 21)
    inv_freq = 10000.0 ** (-torch.arange(4) / 4)
    method = StreamingLLM(8, sinks=2, every=1, rerotate=True)
    trace = run_policy(method, q, k, v, chunks=[20], inv_freq=inv_freq)
    rows = [0, 1, *range(14, 20), 20]
    short = run_policy(
        StreamingLLM(9), q[:, :, rows], k[:, :, rows], v[:, :, rows], chunks=[9], inv_freq=inv_freq
    )
    close(trace.output[:, :, 20].float(), short.output[:, :, 8].flatten())
    plain = run_policy(StreamingLLM(8, sinks=2, every=1), q, k, v, chunks=[20], inv_freq=inv_freq)
    assert (plain.output[:, :, 20] - trace.output[:, :, 20]).abs().max() > 0.01


@pytest.mark.parametrize(("trade_off", "stays"), [(0.1, [0, 2, 4, 5]), (0.5, [0, 3, 4, 5])])
def test_rkv(cpu_backend: Backend, trade_off: float, stays: list[int]) -> None:
    k = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [0.96, 0.28], [0.6, 0.8], [0, 1]])[None, None]
    q = torch.zeros(1, 1, 6, 2)
    q[0, 0, 4:] = torch.tensor([[1.0, 0], [0.5, 0.5]])
    method = RKV(4, window=2, trade_off=trade_off, kernel=1, every=2)
    with cpu_backend.active():
        assert run_policy(method, q, k, k, chunks=[6]).held == [[[stays]]]
        later = run_policy(RKV(**vars(method) | {"prompts": False}), q, k, k, chunks=[4])
        assert [len(h[0][0]) for h in later.held] == [4, 5, 4]
        assert later.held[-1] == [[stays]]


# --- budgets of layers and heads --------------------------------------------------------------------------


def test_pyramidkv() -> None:
    method = PyramidKV(SnapKV(128, window=8))
    each = method.resolve(4000, 32)
    assert each[:3] == (242, 235, 228)
    assert each[-1] == 17 + 8
    assert sum(each) / 32 == 125.5 + 8
    assert method.resolve(200, 32) == (128,) * 32  # shorter than twice the budget
    assert method.resolve(100, 32) == (128,) * 32
    q, k, v = random_qkv(1, 2, 1, 300)
    for layer in (0, 1, 2):
        trace = run_policy(PyramidKV(SnapKV(20, window=4)), q, k, v, chunks=[300], layer=layer, layers=3)
        assert len(trace.held[0][0][0]) == (36, 20, 4)[layer]


ADA = [[0.4, 0.3, 0.1, 0.05, 0.05], [0.3, 0.02, 0.02, 0.01, 0.01]]


@pytest.mark.parametrize(
    ("alpha", "form", "counts"),
    [(0.0, "code", [3, 1]), (0.2, "code", [2, 1]), (0.5, "code", [2, 2]), (0.0, "exact", [3, 1])],
)
@pytest.mark.parametrize("protected", [0, 2])
def test_adakv(cpu_backend: Backend, alpha: float, form: Any, counts: list[int], protected: int) -> None:
    """Real ragged heads; sinks and a window of any score do not compete."""
    edge = torch.full((1, 2, protected), -1.0)
    scores = torch.cat([edge, torch.tensor([ADA]), edge + 9], 2)
    given = Given(2 + 2 * protected, scores=scores, sinks=protected, recent=protected)
    size = scores.shape[2]
    with cpu_backend.active():
        keep = AdaKV(given, alpha=alpha, form=form).evict(view_of([[size, size]]))
    sides = [*range(protected)], [*range(size - protected, size)]
    want = [sides[0] + [protected + i for i in range(n)] + sides[1] for n in counts]
    assert kept(keep) == [want]
    assert keep is not None
    assert keep.ragged


def test_adakv_keeps_short_rows_whole() -> None:
    """Also where the official rounding would take from them."""
    scores = torch.tensor([[[0.1] * 9, [0.9] * 9]])
    keep = AdaKV(Given(5, scores=scores), form="code").evict(view_of([[4, 9]]))
    assert kept(keep)[0][0] == [0, 1, 2, 3]


# --- clocks -----------------------------------------------------------------------------------------------


def test_lazy_eviction() -> None:
    decode = [[0.5, 0, 0.5], [0, 0.3, 0.3, 0.4], [0.4, 0, 0, 0.3, 0.3], [0, 0, 0, 0.5, 0.2, 0.3]]
    rows = [[1], [0.5, 0.5], *[[max(p, NONE) for p in row] for row in decode]]
    method = LazyEviction(4, every=2, alpha=0.1)
    trace = run_rows(method, rows, [2])
    assert [len(h[0][0]) for h in trace.held] == [2, 3, 4, 5, 4]
    assert trace.held[-1] == [[[2, 3, 4, 5]]]
    roomy = run_rows(LazyEviction(9, every=2, alpha=0.1), rows, [2]).state
    assert roomy["last"][0, 0, :6].tolist() == [3, 2, 2, 4, 4, 4]
    assert roomy["interval"][0, 0, :6].tolist() == [2, 2, 1, 1, 1, 1]


def test_lazy_eviction_never_active_tokens_go_lowest_last() -> None:
    """All have importance exactly 0: the lower slots stay. A prompt is not cut before the first trigger."""
    rows = [[1 / (t + 1)] * (t + 1) for t in range(13)]
    trace = run_rows(LazyEviction(6, every=4, alpha=0.9), rows, [9])
    assert [len(h[0][0]) for h in trace.held] == [9, 10, 11, 12, 6]
    assert trace.held[-1] == [[[0, 1, 9, 10, 11, 12]]]


# --- pages ------------------------------------------------------------------------------------------------

CRUSH = [0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.05, 0.6, 0.02, 0.03, 0.5, 0.04, 0.45, 0.01, 0.4, 0.35]


@pytest.mark.parametrize(
    ("share", "anchor", "pages"),
    [
        (1 / 3, "alternating", [0, 1, 2]),
        (1 / 3, "mean", [0, 1, 2]),
        (2 / 3, "alternating", [0, 1, 2]),
        (2 / 3, "mean", [0, 2, 3]),
        (2 / 3, "zeros", [0, 1, 2]),
        (0.0, "zeros", [0, 1, 3]),
    ],
)
@pytest.mark.parametrize("edge", [0, 4])
def test_kvcrush(cpu_backend: Backend, share: float, anchor: Any, pages: list[int], edge: int) -> None:
    """Representatives are part of the budget; sinks and a recent, partly filled page stay besides."""
    recent = edge and edge + 3
    scores = torch.tensor([[[0.0] * edge + CRUSH + [0.0] * recent]])
    method = KVCrush(
        Given(12 + edge + recent, scores=scores),
        share=share,
        anchor=anchor,
        page=4,
        sinks=edge,
        recent=max(recent - 3, 0),
    )
    with cpu_backend.active():
        keep = method.evict(view_of([[16 + edge + recent]], page=4))
    inner = [edge + 4 * p + i for p in pages for i in range(4)]
    assert kept(keep) == [[[*range(edge), *inner, *range(16 + edge, 16 + edge + recent)]]]
    assert keep is not None
    assert keep.whole_pages


def test_paged_eviction(cpu_backend: Backend) -> None:
    """The newest page has filled up: the older one of lowest |v| / |k| goes whole."""
    mean = torch.tensor([0.9, 0.4, 0.7]).repeat_interleave(2)
    v = torch.stack([mean, 0 * mean], -1)[None, None]
    k = torch.ones(1, 1, 6, 2) * 2**-0.5
    with cpu_backend.active():
        trace = run_policy(PagedEviction(4, page=2), torch.zeros(1, 1, 6, 2), k, v, chunks=[4])
        assert trace.held == [[[[0, 1, 2, 3]]], [[[0, 1, 2, 3, 4]]], [[[0, 1, 4, 5]]]]
        prompt = run_policy(PagedEviction(3, page=2), torch.zeros(1, 1, 6, 2), k, v, chunks=[6])
        assert prompt.held == [[[[0, 1, 4]]]]  # tokens, not pages; ties: the lower


def freed_greedily(lengths: list[int], worth: list[list[float]], page: int, pages: int) -> list[int]:
    """Slots each head gives up, page after page, until there are no more than ``pages``."""
    gone = [0] * len(lengths)
    while sum(-(-(n - e) // page) for n, e in zip(lengths, gone, strict=True)) > pages:
        need = [e + page if e else (n - 1) % page + 1 for n, e in zip(lengths, gone, strict=True)]
        able = [h for h in range(len(lengths)) if need[h] <= len(worth[h])]
        best = min(able, key=lambda h: (worth[h][need[h] - 1], h))
        gone[best] = need[best]
    return gone


def test_kv_compress_is_greedy(cpu_backend: Backend) -> None:
    """Against taking one page after another where the slot that completes it is worth least."""
    g = torch.Generator().manual_seed(0)
    for trial in range(20):
        lengths = torch.randint(8, 30, (1, 3), generator=g).tolist()
        scores = torch.randint(0, 50, (1, 3, max(lengths[0])), generator=g).float()
        page, slots, sinks, recent = 4, 9, trial % 3, 3
        with cpu_backend.active():
            method = KVCompress(slots, sinks=sinks, recent=recent, page=page)
            keep = method.select(view_of(lengths), scores, [slots])
        worth = [sorted(scores[0, h, sinks : n - recent].tolist()) for h, n in enumerate(lengths[0])]
        gone = freed_greedily(lengths[0], worth, page, 3 * slots // page)
        assert keep.count[0].tolist() == [n - e for n, e in zip(lengths[0], gone, strict=True)]
        for h, n in enumerate(lengths[0]):
            inner = sorted(range(sinks, n - recent), key=lambda j: (-float(scores[0, h, j]), j))
            stay = [*inner[: len(inner) - gone[h]], *range(sinks), *range(n - recent, n)]
            assert kept(keep)[0][h] == sorted(stay)


# --- prefixes and joint scores ----------------------------------------------------------------------------


def test_prefixkv_calibration() -> None:
    score = torch.stack([torch.softmax(-a * torch.arange(40.0), 0) for a in (0.5, 0.1, 0.02)])
    forget = PrefixKV.calibrate([score, score], 0.5, protect=5)
    assert forget == (31 / 40, 20 / 40, 7 / 40)
    method = PrefixKV(0.5, forget=forget, sinks=1, every=1)
    assert method.resolve(40, 3) == (9, 20, 33)
    q, k, v = random_qkv(1, 2, 1, 46)
    for layer, slots in enumerate((9, 20, 33)):
        trace = run_policy(method, q, k, v, chunks=[40], layer=layer, layers=3)
        first = trace.held[0][0][0]
        assert len(first) == slots
        assert (first[0], first[-1]) == (0, 39)
        # decode: the slots at a fixed place go, without a look; 25 from the end or in the middle
        assert [len(h[0][0]) for h in trace.held[1:]] == [
            slots + t - max(0, int(slots + t - (40 + t) * (1 - forget[layer]))) for t in range(1, 7)
        ]
        cut = slots - 25 if slots > 25 else slots // 2
        gone = [p for p in [*first, *range(40, 46)] if p not in trace.held[-1][0][0]]
        assert gone == first[cut : cut + len(gone)]


def test_critic(cpu_backend: Backend) -> None:
    rows = [[1], [0.5, 0.5], [0.2, 0.3, 0.5], [0.1, 0.2, 0.3, 0.4]]
    joint = [0.5, 0.485077, 0.545111, 0.5]
    with cpu_backend.active():
        for chunks in ([4], [2], [1]):
            method = CRITIC(9, recent=0, weights=(0.5, 0.5, 0.0), every=1)
            state = run_rows(method, rows, chunks).state
            close(state["entropy"][0, 0, :4], [0, 0.693147, 1.029653, 1.279854])
            close(state["score"][0, 0, :4], [1.8, 1, 0.8, 0.4])
        assert run_rows(CRITIC(1, recent=0, weights=(0.5, 0.5, 0.0)), rows, [4]).held == [[[[2]]]]
    assert max(joint) == joint[2]


def test_critic_gradient_is_autograd() -> None:
    """The last two queries of a prompt: the change of the layer's output by each key and value."""
    q, k, v = random_qkv(1, 2, 1, 12)
    scores: list[Tensor] = []

    @dataclass(frozen=True)
    class Spy(CRITIC):
        def score(self, view: Any) -> Tensor:
            scores.append(super().score(view))
            return scores[-1]

    run_policy(Spy(6, recent=1, weights=(0.0, 0.0, 1.0)), q, k, v, chunks=[12])
    total = torch.zeros(12, dtype=torch.float64)
    for h in range(2):
        kd, vd = k[0, 0].double().requires_grad_(), v[0, 0].double().requires_grad_()
        row = q[0, h].double()
        before = (row[10] @ kd[:11].mT * 8**-0.5).softmax(-1) @ vd[:11]
        now = (row[11] @ kd.mT * 8**-0.5).softmax(-1) @ vd
        ((now - before.detach()) ** 2).mean().backward()  # type: ignore[no-untyped-call]
        total += sum(t.grad.abs().sum(-1) for t in (kd, vd))  # type: ignore[union-attr]
    close(scores[0][0, 0], (total - total.min()) / (total.max() - total.min()), 1e-4)
