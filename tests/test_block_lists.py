"""Lists of key blocks: against plain loops, worked examples, and attention under the mask that they mean."""

from itertools import pairwise

import pytest
import torch
from backends import Backend
from cases_prefill import lists_of
from hypothesis import given
from hypothesis import strategies as st
from tokencomp import block_lists, reference
from torch import Tensor


def rows_of(indptr: Tensor, indices: Tensor) -> list[list[int]]:
    bounds, members = indptr.tolist(), indices.tolist()
    return [members[a:b] for a, b in pairwise(bounds)]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 4, 64), (2, 1, 0, 3), (2, 1, 3, 0), (0, 1, 2, 2)]
)
def test_block_mask_to_csr(shape: tuple[int, ...]) -> None:
    for share in (0.0, 0.4, 1.0):
        mask = torch.rand(shape) < share
        indptr, indices = block_lists.block_mask_to_csr(mask)
        assert (indptr.dtype, indices.dtype) == (torch.int32, torch.int32)
        assert indices.shape == (mask.numel(),)
        assert rows_of(indptr, indices) == [
            [j for j, m in enumerate(row) if m] for row in mask.flatten(0, 2).tolist()
        ]
        assert (indices[int(indptr[-1]) :] == 0).all()


def test_worked_example_of_a_mask() -> None:
    mask = torch.tensor([[[[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]]]]).bool()
    indptr, indices = block_lists.block_mask_to_csr(mask)
    assert indptr.tolist() == [0, 1, 3, 3, 5]
    assert indices[:5].tolist() == [0, 0, 1, 0, 2]


def test_masks_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be bool \[B, H, M, N\], got torch.float32 \[2, 2\]"):
        block_lists.block_mask_to_csr(torch.zeros(2, 2))


def test_causal_and_diagonal_blocks() -> None:
    """Seventy rows at the end of 150 keys: positions 80 ... 143 and 144 ... 149."""
    device = torch.device("cpu")
    causal = block_lists.causal_blocks(70, 150, 64, 64, device)
    diagonal = block_lists.diagonal_blocks(70, 150, 64, 64, device)
    assert causal.tolist() == [[True, True, True], [True, True, True]]
    assert diagonal.tolist() == [[False, True, True], [False, False, True]]
    assert block_lists.causal_blocks(128, 128, 64, 64, device).tolist() == [[True, False], [True, True]]


# --- vertical-slash ---------------------------------------------------------------------------------------


def loop_vertical_slash(
    columns: list[int], slashes: list[int], rows: int, keys: int, block_q: int, block_k: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Blocks and columns of each query block, by the definition."""
    blocks, singles = [], []
    for first in range(0, rows, block_q):
        positions = [t + keys - rows for t in range(first, first + block_q) if t + keys - rows < keys]
        crossed = {(p - o) // block_k for p in positions for o in slashes if o >= 0 and p - o >= 0}
        blocks.append(sorted(crossed))
        wanted = {c for c in columns if 0 <= c <= positions[-1] and c // block_k not in crossed}
        singles.append(sorted(wanted))
    return blocks, singles


@given(st.data())
def test_vertical_slash_index(data: st.DataObject) -> None:
    keys = data.draw(st.integers(1, 400))
    rows = data.draw(st.integers(1, keys))
    sizes = [data.draw(st.sampled_from((64, 128))) for _ in range(2)]
    lists = [
        [[data.draw(st.integers(-1, keys - 1)) for _ in range(n)] for _ in range(2)]
        for n in (data.draw(st.integers(0, 6)), data.draw(st.integers(0, 4)))
    ]
    columns, slashes = (torch.tensor(x, dtype=torch.int64).view(1, 2, -1) for x in lists)
    got = block_lists.vertical_slash_index(columns, slashes, rows, keys, block_q=sizes[0], block_k=sizes[1])
    assert got.column_ptr is not None and got.columns is not None  # noqa: PT018
    want = [loop_vertical_slash(lists[0][h], lists[1][h], rows, keys, *sizes) for h in range(2)]
    assert rows_of(got.indptr, got.indices) == want[0][0] + want[1][0]
    assert rows_of(got.column_ptr, got.columns) == want[0][1] + want[1][1]


def test_vertical_slash_attention(backend: Backend) -> None:
    """The lists drive the operator to the attention of the mask they mean."""
    q, k, v = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)
    columns = torch.tensor([[[0, 3, 70, 199], [5, -1, -1, -1]]])
    slashes = torch.tensor([[[0, 1], [0, 130]]])
    lists = block_lists.vertical_slash_index(columns, slashes, 200, 200).arguments()
    out, lse = backend.run("flash_prefill", q, k, v, **lists)
    seen = reference.listed(
        1, 4, 200, 200, *(lists[n] for n in ("indptr", "indices", "column_ptr", "columns"))
    )
    seen &= torch.ones(200, 200, dtype=torch.bool).tril()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)
    assert lse.isfinite().all()
    assert seen[0, :2, 199, 70].all()
    assert not seen[0, :2, 60, 70].any()


# --- scores of blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "min", "max"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_block_pool(mode: str, tokens: int) -> None:
    x = torch.randn(2, 3, tokens, 8).bfloat16()
    got = block_lists.block_pool(x, 64, mode)
    parts = [
        getattr(part.float(), {"mean": "mean", "min": "amin", "max": "amax"}[mode])(2)
        for part in x.split(64, 2)
    ]
    torch.testing.assert_close(got, torch.stack(parts, 2))


def test_block_pool_refuses() -> None:
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="mode must be one of 'mean', 'min', 'max', got 'sum'"):
        block_lists.block_pool(x, 2, "sum")
    with pytest.raises(ValueError, match="block must be >= 1, got 0"):
        block_lists.block_pool(x, 0)
    with pytest.raises(ValueError, match=r"x must have shape \[B, H, N, D\], got \[4, 2\]"):
        block_lists.block_pool(x[0, 0], 2)


def test_worked_example_of_topp() -> None:
    """Shares .5, .3, .15, .05: up to .7 takes two; the forced last first, then one more."""
    scores = torch.tensor([[[[0.5, 0.3, 0.15, 0.05]]]])
    assert block_lists.topp_blocks(scores, 0.7)[0, 0, 0].tolist() == [True, True, False, False]
    last = torch.tensor([[False, False, False, True]])
    assert block_lists.topp_blocks(scores, 0.5, forced=last)[0, 0, 0].tolist() == [True, False, False, True]
    early = torch.tensor([[False, True, True, True]])
    assert block_lists.topp_blocks(scores, 1.0, visible=early)[0, 0, 0].tolist() == [False, True, True, True]
    assert block_lists.topp_blocks(scores, 0.55, visible=early, forced=~last)[0, 0, 0].tolist() == [
        False, True, True, False
    ]  # fmt: skip
    even = torch.ones(1, 1, 1, 4)
    assert block_lists.topp_blocks(even, 0.5)[0, 0, 0].tolist() == [
        True,
        True,
        False,
        False,
    ]  # ties: lower first
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\], got 0"):
        block_lists.topp_blocks(scores, 0)


@given(st.data())
def test_topp_blocks(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 9))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=blocks, max_size=blocks))).float()
    flags = st.lists(st.booleans(), min_size=blocks, max_size=blocks)
    visible, forced = data.draw(flags), data.draw(flags)
    p = data.draw(st.sampled_from((0.1, 0.5, 0.75, 1.0)))
    got = block_lists.topp_blocks(
        scores[None, None, None], p, visible=torch.tensor([visible]), forced=torch.tensor([forced])
    )
    allowed = [j for j in range(blocks) if visible[j]]
    taken = [j for j in allowed if forced[j]]
    whole, mass = sum(float(scores[j]) for j in allowed), sum(float(scores[j]) for j in taken)
    for j in sorted(set(allowed) - set(taken), key=lambda j: (-float(scores[j]), j)):
        if mass < p * whole and scores[j] > 0:
            taken.append(j)
            mass += float(scores[j])
    assert got[0, 0, 0].nonzero().flatten().tolist() == sorted(taken)


def test_topk_blocks() -> None:
    scores = torch.tensor([[[[3.0, 9, 5, 7], [3, 3, 3, 9], [1, 2, 3, 4]]]])
    visible = torch.tensor([[True, False, False, False], [True, True, True, False], [True] * 4])
    forced = torch.tensor(
        [[True, False, False, False], [False, False, True, False], [True, False, False, True]]
    )
    got = block_lists.topk_blocks(scores, 2, visible=visible)
    assert got[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    got = block_lists.topk_blocks(scores, 2, visible=visible, forced=forced)
    assert got[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


def loop_antidiagonal(q: Tensor, k: Tensor, stride: int, block: int, causal: bool) -> Tensor:
    """Antidiagonals summed one by one."""
    rows, keys = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).double()
    products = q.double() @ k.mT * q.shape[3] ** -0.5 / stride
    out = torch.zeros(*q.shape[:2], -(-rows // block), -(-keys // block), dtype=torch.float64)
    for i in range(0, rows, stride):
        z = torch.full((*q.shape[:2], -(-keys // stride)), -torch.inf, dtype=torch.float64)
        last = min(i + stride, rows) - 1 + keys - rows
        for n, j in enumerate(range(0, keys, stride)):
            if causal and j > last:
                continue
            pairs = [(i + a, j + stride - 1 - a) for a in range(stride)]
            pairs = [(t, s) for t, s in pairs if t < rows and s < keys]
            z[..., n] = sum(
                (products[:, :, t, s] for t, s in pairs), torch.zeros(q.shape[:2], dtype=torch.float64)
            )
        for n, weight in enumerate(z.softmax(-1).unbind(-1)):
            out[:, :, i // block, n * stride // block] += weight
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (40, 90), (33, 128), (1, 1), (700, 700)])
def test_antidiagonal_scores(shape: tuple[int, int], causal: bool) -> None:
    rows, keys = shape
    block, stride = (32, 8) if rows < 700 else (64, 16)
    q, k = torch.randn(1, 2, rows, 4), torch.randn(1, 1, keys, 4)
    got = block_lists.antidiagonal_scores(q, k, stride=stride, block=block, causal=causal)
    want = loop_antidiagonal(q, k, stride, block, causal)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_worked_example_of_antidiagonals() -> None:
    """Two groups of two rows, one channel: the antidiagonal of group 1 with group 0 is q2 k1 + q3 k0."""
    q, k = (
        torch.tensor([1.0, 2, 3, 4])[None, None, :, None],
        torch.tensor([1.0, 0, 2, 1])[None, None, :, None],
    )
    got = block_lists.antidiagonal_scores(q, k, stride=2, block=2, scale=2.0)
    first, second = 3.0 * 0 + 4.0 * 1, 3.0 * 1 + 4.0 * 2
    want = torch.tensor([first, second]).softmax(0)
    torch.testing.assert_close(got[0, 0], torch.stack([torch.tensor([1.0, 0]), want]))


def test_antidiagonals_refuse() -> None:
    q = torch.randn(1, 2, 9, 4)
    with pytest.raises(ValueError, match="stride must divide block=128, got 7"):
        block_lists.antidiagonal_scores(q, q, stride=7)
    with pytest.raises(ValueError, match="T must be at most S=4 under causal, got 9"):
        block_lists.antidiagonal_scores(q, q[:, :, :4])


def test_a_sparse_prefill_from_scores(backend: Backend) -> None:
    """Scores, choice, lists, attention: a planted key block is found, and little is lost without the rest."""
    q, k, v = torch.randn(1, 2, 512, 16), torch.randn(1, 2, 512, 16) * 0.1, torch.randn(1, 2, 512, 16)
    k[:, :, 128:192] += 3 * q.mean(2, keepdim=True) / q.mean(2, keepdim=True).norm()
    q += 2 * q.mean(2, keepdim=True) / q.mean(2, keepdim=True).norm()
    causal, diagonal = (
        f(512, 512, 64, 64, q.device) for f in (block_lists.causal_blocks, block_lists.diagonal_blocks)
    )
    scores = block_lists.antidiagonal_scores(q, k, block=64)
    chosen = block_lists.topp_blocks(scores, 0.5, visible=causal, forced=diagonal)
    assert chosen[:, :, 3:, 2].float().mean() > 0.9
    indptr, indices = block_lists.block_mask_to_csr(chosen)
    want_lists = lists_of(chosen)
    assert torch.equal(indptr, want_lists[0])
    out, _ = backend.run("flash_prefill", q, k, v, indptr=indptr, indices=indices)
    seen = (
        chosen.repeat_interleave(64, 2).repeat_interleave(64, 3)
        & torch.ones(512, 512, dtype=torch.bool).tril()
    )
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    torch.testing.assert_close(out, want, rtol=0, atol=3e-6)
    assert 0.1 < chosen.float().mean() < 0.5


def test_lists_compile_without_graph_breaks() -> None:
    def build(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scores = block_lists.antidiagonal_scores(q, k, block=64)
        return block_lists.block_mask_to_csr(block_lists.topp_blocks(scores, 0.8))

    q, k = torch.randn(1, 2, 256, 8), torch.randn(1, 2, 256, 8)
    got = torch.compile(build, fullgraph=True, backend="aot_eager")(q, k)
    assert all(torch.equal(a, b) for a, b in zip(got, build(q, k), strict=True))


# --- sequences of their own length --------------------------------------------------------------------------


def test_ragged_sequences_have_the_blocks_that_they_have_alone() -> None:
    """200 rows behind 28 keys; of the second sequence 100 are tokens, of the third none."""
    device, keys = torch.device("cpu"), 228
    first, lengths = torch.full((3,), 28), torch.tensor([228, 128, 28])
    for whole in (block_lists.causal_blocks, block_lists.diagonal_blocks):
        found = whole(200, keys, 64, 64, device, first, lengths)
        assert found.shape == (3, 1, 4, 4)
        assert torch.equal(found[0, 0], whole(200, keys, 64, 64, device))
        assert torch.equal(found[1, 0, :2, :2], whole(100, 128, 64, 64, device))
        assert not found[1, 0, 2:].any()
        assert not found[2].any()
    low, high = block_lists.block_positions(200, keys, 64, device, first, lengths)
    assert low[:, 0].tolist() == [[28, 92, 156, 220]] * 3
    assert high[:, 0].tolist() == [[91, 155, 219, 227], [91, 127, 127, 127], [27] * 4]


def test_local_blocks_of_heads() -> None:
    low, high = block_lists.block_positions(256, 256, 64, torch.device("cpu"))
    window, sinks = torch.tensor([[1, 65]]), torch.tensor([[0, 65]])
    found = block_lists.local_blocks(low, high, 256, 64, window, sinks).int().tolist()
    assert found[0][0] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert found[0][1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    starts = torch.tensor([70])
    late = block_lists.local_blocks(low, high, 256, 64, 1, 65, starts).int().tolist()
    assert late[0][0] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_shares_and_counts_of_heads() -> None:
    scores = torch.rand(2, 3, 4, 5)
    share = torch.tensor([[0.2, 0.5, 1.0], [0.9, 0.1, 0.6]])
    counts = torch.tensor([[1, 2, 9], [0, 3, 5]])
    everything = torch.ones(4, 5, dtype=torch.bool)
    taken = block_lists.topp_blocks(scores, share)
    best = block_lists.topk_blocks(scores, counts, visible=everything)
    for b in range(2):
        for h in range(3):
            own = scores[b : b + 1, h : h + 1]
            assert torch.equal(taken[b : b + 1, h : h + 1], block_lists.topp_blocks(own, float(share[b, h])))
            assert best[b, h].sum(1).tolist() == [min(int(counts[b, h]), 5)] * 4
    assert (taken[0, 2] == (scores[0, 2] > 0)).all()


def test_padding_is_not_pooled() -> None:
    x = torch.randn(2, 1, 150, 4)
    x[0, :, 100:], x[1, :, :70] = torch.nan, torch.nan
    for mode in ("mean", "min", "max"):
        got = block_lists.block_pool(x, 64, mode, torch.tensor([100, 150]), torch.tensor([0, 70]))
        torch.testing.assert_close(got[0, :, :2], block_lists.block_pool(x[:1, :, :100], 64, mode)[0])
        torch.testing.assert_close(got[1, :, 2], block_lists.block_pool(x[1:, :, 128:], 64, mode)[0, :, 0])
    assert (block_lists.block_pool(x, 64, lengths=torch.tensor([0, 150]))[0] == 0).all()


def test_antidiagonal_scores_of_ragged_sequences() -> None:
    q, k = torch.randn(3, 4, 200, 8), torch.randn(3, 2, 264, 8)
    first, lengths = torch.full((3,), 64), torch.tensor([264, 144, 64])
    q[1, :, 80:], k[1, :, 144:], k[2, :, 64:] = 9.0, torch.nan, torch.nan
    got = block_lists.antidiagonal_scores(q, k, stride=8, block=64, first=first, lengths=lengths)
    assert torch.equal(got[0], block_lists.antidiagonal_scores(q[:1], k[:1], stride=8, block=64)[0])
    own = block_lists.antidiagonal_scores(q[1:2, :, :80], k[1:2, :, :144], stride=8, block=64)
    torch.testing.assert_close(got[1, :, :2, :3], own[0])
    assert not got[1, :, 2:].any()
    assert not got[2].any()


def test_density() -> None:
    """Of 10 visible blocks head 0 lists 4 and a column in one query block, head 1 all."""
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[0, 0] = torch.eye(4).bool()
    mask[0, 1] = torch.ones(4, 4).tril().bool()
    columns = torch.tensor([[[130, -1], [-1, 5]]])
    last = torch.tensor([63, 127, 191, 255])
    lists = block_lists.lists_of(mask, 64, 64, columns=columns, last=last, keys=256)
    visible = block_lists.causal_blocks(256, 256, 64, 64, torch.device("cpu"))
    torch.testing.assert_close(block_lists.density(lists, visible), torch.tensor([[(4 + 1 / 64) / 10, 1.0]]))
