"""Sparse methods by themselves: the worked examples of their papers, what they remember, bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparse_methods import SPARSE_METHODS, slots, view
from tokencomp import methods
from tokencomp.methods import (
    DuoAttention,
    InfLLM,
    Quest,
    SparseMethod,
    TidalDecode,
    TokenSelect,
    Twilight,
    sparse_select,
)
from torch import Tensor

VOTES = torch.tensor([[2.0, 0, 1, 0, 0], [0, 3, 0, 1, 0]])  # two heads, five candidates


def voting(q: Tensor = VOTES, newest: int = 1, **options: Any) -> Any:
    """Heads whose products with the keys are ``q``, and ``newest`` keys behind that are 0."""
    keys = torch.cat([torch.eye(q.shape[1]), torch.zeros(newest, q.shape[1])])
    return view(q[None, :, None], keys[None, None], **options)


@pytest.mark.parametrize(("k", "chosen"), [(2, [0, 1]), (3, [0, 1, 2])])
def test_token_select_votes_by_probabilities(k: int, chosen: list[int]) -> None:
    """Sums of the products would tie tokens 2 and 3."""
    method = TokenSelect(k=k, sinks=0, recent=1)
    assert slots(method.choose(voting())) == [[[*chosen, 5]]]


def test_token_select_pairs_heads_as_asked() -> None:
    """Kv head 1 has its token elsewhere: query head 1 votes with it only under ``mod``."""
    q = torch.zeros(1, 4, 1, 2)
    q[0, 1, 0, 0] = 9.0
    k = torch.zeros(1, 2, 8, 2)
    k[0, 0, 1, 0] = k[0, 1, 4, 0] = 1.0
    for kv_map, slot in (("div", 1), ("mod", 4)):
        method = TokenSelect(k=1, sinks=0, recent=1, kv_map=kv_map)  # type: ignore[arg-type]
        assert slots(method.choose(view(q, k))) == [[[slot, 7]] * 2]


@pytest.mark.parametrize(("width", "chosen"), [(1, [2]), (2, [1]), (3, [1]), (4, [0])])
def test_token_select_pools_votes(width: int, chosen: list[int]) -> None:
    """Ties go to the earlier token; pools of even width reach further to the right."""
    q = torch.tensor([[0.0, 0, 4, 0, 0, 0]])
    method = TokenSelect(k=1, sinks=0, recent=1, pool=width)
    assert slots(method.choose(voting(q))) == [[[*chosen, 6]]]


@pytest.mark.parametrize(("theta", "reused"), [(0.9, True), (0.95358, True), (0.954, False), (None, False)])
def test_token_select_reuses_by_cosine(theta: float | None, reused: bool) -> None:
    """The cosine of (1, 0) and (0.95, 0.3) is 0.95358; the newest tokens go on with the step."""
    method, scratch = TokenSelect(k=1, sinks=1, recent=2, theta=theta), {}
    k = torch.zeros(1, 1, 9, 2)
    k[0, 0, 2, 0] = k[0, 0, 3, 1] = 1.0
    k[0, 0, 3, 1] = 9.0
    first = method.choose(view(torch.tensor([1.0, 0]).view(1, 1, 1, 2), k[:, :, :8], scratch=scratch))
    assert slots(first) == [[[0, 2, 6, 7]]]
    again = method.choose(
        view(torch.tensor([0.95, 0.3]).view(1, 1, 1, 2), k, scratch=scratch, fresh=1, step=2)
    )
    assert again is not None
    assert again.reused == reused
    assert slots(again) == [[[0, 2 if reused else 3, 7, 8]]]


def test_token_select_forgets_a_selection_when_slots_moved() -> None:
    method, scratch = TokenSelect(k=1, sinks=0, recent=1), {}
    for fresh, reused in ((6, False), (1, True), (6, False)):
        found = method.choose(voting(scratch=scratch, fresh=fresh))
        assert found is not None
        assert found.reused == reused


def test_token_select_sequences_choose_for_themselves() -> None:
    """One of two sequences turns its query; the other keeps its selection although it would now vote anew."""
    method, scratch = TokenSelect(k=1, sinks=0, recent=1), {}
    k = torch.eye(4).repeat(2, 1, 1)[:, None]
    q = torch.tensor([[4.0, 0, 0, 0], [4.0, 0, 0, 0]])[:, None, None]
    assert slots(method.choose(view(q, k, scratch=scratch))) == [[[0, 3]], [[0, 3]]]
    turned = torch.tensor([[4.0, 0, 1, 0], [0, 4.0, 0, 0]])[:, None, None]
    found = method.choose(view(turned, k, scratch=scratch, fresh=0))
    assert found is not None
    assert not found.reused
    assert slots(found) == [[[0, 3]], [[1, 3]]]


@pytest.mark.parametrize(("force", "tokens"), [(False, [1, 3]), (True, [1, 4])])
def test_tidal_takes_the_largest_logits(force: bool, tokens: list[int]) -> None:
    method, shared = TidalDecode(k=2, first=2, again=13, force=force), {}
    choosing = view(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 5, 2), shared=shared)
    assert method.choose(choosing) is None
    assert method.wants_logits(choosing)
    logits = torch.tensor([0.1, 2.0, -1.0, 0.3, 0.2]).view(1, 1, 1, 5)
    method.observe(choosing, logits, logits.logsumexp(-1))
    for layer in (3, 12, 14):
        found = method.choose(view(choosing.q, choosing.keys(), shared=shared, layer=layer))
        assert found is not None
        assert found.reused
        assert slots(found) == [[tokens]]
    for layer in (0, 1, 13):
        assert method.choose(view(choosing.q, choosing.keys(), shared=shared, layer=layer)) is None


@pytest.mark.parametrize(
    ("share", "vote", "lists"),
    [("kv", "max", [[0, 3]]), ("kv", "softmax_sum", [[1, 3]]), ("q", "max", [[0, 3], [1, 3]])],
)
def test_tidal_reduces_heads_as_asked(share: Any, vote: Any, lists: list[list[int]]) -> None:
    """Head 0 is sure of nothing with large logits, head 1 is sure of token 1."""
    method, shared = TidalDecode(k=2, first=0, again=2, share=share, vote=vote), {}
    choosing = view(torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 4, 2), shared=shared, layer=0)
    logits = torch.tensor([[9.0, 8.9, 8.9, 8.9], [0, 5, 0, 0]]).view(1, 2, 1, 4)
    method.observe(choosing, logits, logits.logsumexp(-1))
    assert slots(method.choose(view(choosing.q, choosing.keys(), shared=shared, layer=1))) == [lists]


def test_tidal_names_tokens_where_layers_hold_different_ones() -> None:
    method, shared = TidalDecode(k=3, first=0, again=2), {}
    k = torch.zeros(1, 1, 4, 2)
    choosing = view(torch.zeros(1, 1, 1, 2), k, shared=shared, layer=0, whole=False)
    choosing.position = lambda: torch.tensor([[[2, 5, 7, 9]]], dtype=torch.int32)
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).view(1, 1, 1, 4)
    method.observe(choosing, logits, logits.logsumexp(-1))  # tokens 2, 5 and 9
    other = view(choosing.q, k, shared=shared, layer=1, whole=False)
    other.position = lambda: torch.tensor([[[0, 2, 8, 9]]], dtype=torch.int32)
    assert slots(method.choose(other)) == [[[1, 3]]]


def test_quest_bounds() -> None:
    """Bounds 2 and 4 of keys whose products are 1, 0 and 2, 3: the second page is read with the newest."""
    q = torch.tensor([1.0, -2.0]).view(1, 1, 1, 2)
    pages = [[(1.0, 0.0), (2.0, 1.0)], [(0.0, -1.0), (-1.0, -2.0)], *[[(0.0, 9.0)] * 2] * 3]
    k = torch.tensor(pages).view(1, 1, 10, 2)
    shown = view(q, k)
    assert slots(Quest(k=2, chunk=2).choose(shown)) == [[[0, 1, 2, 3, 8, 9]]]  # never fewer than 3 pages
    high, low = shown.scratch["high"][0, 0], shown.scratch["low"][0, 0]
    assert high[:2].tolist() == [[2, 1], [0, -1]]
    assert low[:2].tolist() == [[1, 0], [-1, -2]]
    bound = (q.flatten().clamp(min=0) * high + q.flatten().clamp(max=0) * low).sum(-1)
    assert bound[:2].tolist() == [2, 4]


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_quest_metadata_follow_the_newest_slots(chunk: int) -> None:
    """Slots come in ones and threes, some are taken back: always as if made from all keys."""
    method = Quest(k=3 * chunk, chunk=chunk)
    k, scratch = torch.randn(2, 2, 200, 8), {}
    known = 0
    for size in (70, 71, 72, 75, 73, 76, 77, 150, 151):
        lengths = [size, size - 9]
        shown = view(torch.randn(2, 4, 1, 8), k[:, :, :size], lengths, scratch=scratch, fresh=size - known)
        known = size - (2 if size == 75 else 0)
        again = view(shown.q, k[:, :, :size], lengths)
        assert slots(method.choose(shown)) == slots(method.choose(again))
        for name in ("high", "low"):
            for b, length in enumerate(lengths):
                pages = -(-length // chunk)
                assert torch.equal(scratch[name][b, :, :pages], again.scratch[name][b, :, :pages])


def test_twilight_takes_a_share() -> None:
    """Weights .5, .25, .125, .0625, .0625; the newest token counts."""
    q = torch.tensor([[0.5, 0.25, 0.125, 0.0625]]).log()
    k = torch.cat([torch.eye(4), torch.zeros(1, 4)])
    k[4, 3] = 1.0
    shown = view(q[None, :, None], k[None, None], scale=1.0)
    for p, tokens in ((0.3, [0, 4]), (0.6, [0, 1, 4]), (0.9, [0, 1, 2, 4]), (1.0, [0, 1, 2, 3, 4])):
        assert slots(Twilight(p=p).choose(shown)) == [[tokens]]
    assert slots(Twilight(p=0.3, least=3).choose(shown)) == [[[0, 1, 4]]]
    assert Twilight(p=0.3).choose(view(shown.q, shown.keys(), layer=1)) is None


def test_twilight_among_what_a_base_reads() -> None:
    base = TokenSelect(k=2, sinks=0, recent=1)
    shown = voting(scale=1.0)  # candidates 0, 1 and 5: probabilities of the heads (.87, .12, .12 ...)
    assert slots(Twilight(base, p=1.0).choose(shown)) == [[[0, 1, 5]]]
    exact = torch.softmax(VOTES[:, [0, 1]].double(), 1)
    assert exact.sum() == 2
    z = torch.cat([VOTES[:, :2], torch.zeros(2, 1)], 1)
    mass = torch.softmax(z, 1).mean(0)
    assert mass[[0, 2]].sum() < 0.5 < mass[[1, 2]].sum()
    assert slots(Twilight(base, p=0.5).choose(voting(scale=1.0))) == [[[1, 5]]]


def test_duo_lists() -> None:
    k = torch.zeros(1, 2, 12, 2)
    gates = ((0.9, 0.5), (1.0, 1.0))
    method = DuoAttention(gates=gates, sinks=2, recent=3)

    def shown(layer: int) -> Any:
        found = view(torch.zeros(1, 2, 1, 2), k, layer=layer)
        found.layers = 2
        return found

    assert slots(method.choose(shown(0))) == [[list(range(12)), [0, 1, 9, 10, 11]]]
    assert method.choose(shown(1)) is None
    assert DuoAttention(sinks=8, recent=4).choose(shown(0)) is None
    with pytest.raises(ValueError, match=r"DuoAttention: gates must be of 32 layers with 2 kv heads, got"):
        method.choose(view(torch.zeros(1, 2, 1, 2), k))


def test_infllm_reads_the_blocks_of_best_representatives() -> None:
    """The last query of a prompt adores a token of block 2, the step's query resembles it."""
    k = torch.zeros(1, 1, 40, 2)
    k[0, 0, 18] = torch.tensor([9.0, 0.0])
    k[0, 0, 25] = torch.tensor([0.0, 9.0])
    q = torch.zeros(1, 1, 40, 2)
    q[0, 0, -1] = torch.tensor([3.0, 3.0])
    method, scratch = InfLLM(blocks=1, block=8, representatives=1, sinks=8, recent=4, window=40), {}
    prompt = view(q, k, scratch=scratch, step=0)
    assert method.choose_prompt(prompt) is None
    step = view(torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.cat([k, k[:, :, :1]], 2), scratch=scratch)
    near = [*range(8)], [*range(37, 41)]
    assert slots(method.choose(step)) == [[[*near[0], *range(16, 24), *near[1]]]]
    step.q, step.fresh = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), 1
    assert slots(method.choose(step)) == [[[*near[0], *range(24, 32), *near[1]]]]


def test_infllm_sums_follow_the_attention() -> None:
    """Received attention is that of the tokens' own stretch and of the next one."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 24, 8), torch.randn(1, 2, 24, 8)
    method, scratch = InfLLM(window=8), {}
    method.choose_prompt(view(q, k, scratch=scratch, step=0))
    z = (q.double() @ k.double().repeat_interleave(2, 1).mT) * 8**-0.5
    row, column = torch.arange(24)[:, None], torch.arange(24)
    z = z.masked_fill((column > row) | (column // 8 < row // 8 - 1), -torch.inf)
    expected = torch.softmax(z, -1).sum(2).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(scratch["received"].double(), expected, atol=1e-5, rtol=1e-4)


def test_slots_by_position() -> None:
    shown = view(torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 5, 2), [4], whole=False)
    shown.position = lambda: torch.tensor([[[1, 4, 6, 8, 0]]], dtype=torch.int32)
    asked = torch.tensor([[[0, 4, 8, -1, 9]]], dtype=torch.int32)
    assert sparse_select.by_position(shown, asked).tolist() == [[[-1, 1, 3, -1, -1]]]


@pytest.mark.parametrize("name", SPARSE_METHODS)
def test_methods_follow_the_protocol(name: str) -> None:
    method = SPARSE_METHODS[name]
    assert isinstance(method, SparseMethod)
    assert (
        methods.get(next(e.name for e in methods.all_methods() if e.cls is type(method))).stage == "attention"
    )


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: TokenSelect(k=0), r"TokenSelect: k must be >= 1, got 0"),
    (lambda: TokenSelect(theta=1.5), r"TokenSelect: theta must be in \[-1, 1\] or None, got 1.5"),
    (lambda: TokenSelect(vote_scale=0), r"TokenSelect: vote_scale must be > 0, got 0"),
    (lambda: TokenSelect(kv_map="x"), r"TokenSelect: kv_map must be 'div' or 'mod', got 'x'"),  # type: ignore[arg-type]
    (lambda: TokenSelect(chunk=100), r"TokenSelect: chunk must be a multiple of 64, got 100"),
    (lambda: TokenSelect(pool=0), r"TokenSelect: pool must be >= 1, got 0"),
    (lambda: TidalDecode(k=0), r"TidalDecode: k must be >= 1, got 0"),
    (lambda: TidalDecode(first=5, again=5), r"TidalDecode: again must be > first=5, got 5"),
    (lambda: TidalDecode(share="all"), r"TidalDecode: share must be 'kv' or 'q', got 'all'"),  # type: ignore[arg-type]
    (lambda: TidalDecode(vote="sum"), r"TidalDecode: vote must be"),  # type: ignore[arg-type]
    (lambda: Quest(k=8), r"Quest: k must be >= chunk=16, got 8"),
    (lambda: Quest(k=64, sinks=4), r"Quest: sinks must be in \[0, pages=4\), got 4"),
    (lambda: InfLLM(representatives=200), r"InfLLM: representatives must be in \[1, block=128\], got 200"),
    (lambda: InfLLM(blocks=0), r"InfLLM: blocks must be >= 1, got 0"),
    (lambda: Twilight(p=0.0), r"Twilight: p must be in \(0, 1\], got 0.0"),
    (lambda: Twilight(method=3), r"Twilight: method must be a sparse method or None, got 3"),  # type: ignore[arg-type]
    (lambda: Twilight(TidalDecode(share="q")), r"Twilight: method must be one with a list a kv head, got"),
    (lambda: DuoAttention(gates=((2.0,),)), r"DuoAttention: gates must be in \[0, 1\], got"),
    (lambda: DuoAttention(recent=0), r"DuoAttention: recent must be >= 1, got 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_knobs(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
