"""LexRank, PruMerge, ToP-ViM, MTR and the packing of kept tokens: examples, definitions, traps."""

from typing import Any

import numpy
import pytest
import torch
from tokencomp import ragged
from tokencomp.methods import MTR, LexRank, PruMerge, ToPViM, prumerge, topvim
from torch import Tensor

# --- packing ---------------------------------------------------------------------------------------------


def test_compact_rows() -> None:
    keep = torch.tensor([[True, False, True, True], [False] * 4, [False, False, False, True]])
    index, mask, lengths = ragged.compact_rows(keep)
    assert index.tolist() == [[0, 2, 3, -1], [-1] * 4, [3, -1, -1, -1]]
    assert torch.equal(mask, index >= 0)
    assert lengths.tolist() == [3, 0, 1]
    assert index.dtype == lengths.dtype == torch.int32
    index, mask, lengths = ragged.compact_rows(keep, 2)
    assert index.tolist() == [[0, 2], [-1, -1], [3, -1]]
    assert lengths.tolist() == [2, 0, 1]
    assert ragged.compact_rows(keep, 0)[0].shape == (3, 0)
    assert ragged.compact_rows(keep[:, :0])[0].shape == (3, 0)
    assert ragged.compact_rows(keep, 6)[0].tolist()[0] == [0, 2, 3, -1, -1, -1]


def test_compact_rows_checks() -> None:
    with pytest.raises(ValueError, match=r"compact_rows: keep must be bool \[B, N\], got torch.int64 \[2\]"):
        ragged.compact_rows(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="compact_rows: width must not be negative, got -1"):
        ragged.compact_rows(torch.ones(1, 2, dtype=torch.bool), -1)


def test_maps_and_rows_undo_each_other() -> None:
    keep = torch.rand(4, 23) < 0.4
    index, mask, _ = ragged.compact_rows(keep)
    assert torch.equal(ragged.kept_mask(index, 23), keep)
    x = torch.randn(4, 23, 2, 3)
    rows = ragged.gather_rows(x, index)
    assert rows.shape == (4, 23, 2, 3)
    assert (rows[~mask] == 0).all()
    back = ragged.gather_rows(rows, ragged.position_map(index, 23))
    assert torch.equal(back, x * keep[..., None, None])
    shuffled = torch.tensor([[3, -1, 0]], dtype=torch.int32)
    assert ragged.position_map(shuffled, 5).tolist() == [[2, -1, -1, 0, -1]]


# --- LexRank ---------------------------------------------------------------------------------------------


def dense_lexrank(method: LexRank, x: Tensor) -> Tensor:
    """The stationary vector by float64 power iteration on the matrix of the definition."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    cosine = unit @ unit.mT
    kernels = {
        "linear": (1 + cosine) / 2,
        "relu": cosine.clamp(min=0),
        "threshold": (cosine >= method.threshold).double(),
    }
    k = kernels[method.kernel]
    n = x.shape[1]
    degree = k.sum(2, keepdim=True)
    m = torch.where(degree > 0, k / degree, 1 / n)  # row u: whom u votes for
    p = torch.full(x.shape[:2], 1 / n, dtype=torch.float64)
    for _ in range(method.iterations):
        p = method.damping / n + (1 - method.damping) * (p[:, None] @ m)[:, 0]
    return p


@pytest.mark.parametrize("kernel", ["linear", "relu", "threshold"])
@pytest.mark.parametrize("damping", [0.0, 0.15, 1.0])
def test_lexrank_is_that_of_the_matrix(kernel: str, damping: float) -> None:
    x = torch.randn(3, 50, 4)
    x[1, 7] = 0  # no edge under relu and threshold
    method = LexRank(kernel=kernel, damping=damping, iterations=30)
    p = method.score(x)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.double(), dense_lexrank(method, x), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    assert (p >= 0).all()


def test_linear_kernel_never_forms_the_matrix() -> None:
    """A million tokens: the matrix would take 4 TB."""
    p = LexRank(iterations=2).score(torch.randn(1, 1_000_000, 2))
    torch.testing.assert_close(p.sum(), torch.tensor(1.0), rtol=1e-3, atol=0)


def test_degree_counts_the_tokens_above_the_threshold() -> None:
    angle = torch.tensor([0.0, 10, 25, 90, 130, 200]) * torch.pi / 180
    x = torch.stack([angle.cos(), angle.sin()], -1)[None] * torch.tensor([1, 2, 1, 3, 1, 0.5])[:, None]
    counts = ((angle[:, None] - angle).cos() >= 0.5).sum(1).tolist()
    assert LexRank(kernel="threshold", threshold=0.5).degree(x)[0].tolist() == counts == [3, 3, 3, 2, 2, 1]
    assert LexRank(keep=3, kernel="threshold", threshold=0.5).select(x).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("kernel", ["linear", "relu", "threshold"])
def test_lexrank_of_padded_items_is_that_of_the_items(kernel: str) -> None:
    x, lengths = torch.randn(4, 30, 5), [30, 11, 1, 0]
    method = LexRank(keep=0.3, kernel=kernel)
    mask = torch.arange(30) < torch.tensor(lengths)[:, None]
    score, index = method.score(x, mask=mask), method.select(x, lengths=torch.tensor(lengths))
    for b, n in enumerate(lengths):
        assert (score[b, n:] == 0).all()
        if n:
            own = x[b : b + 1, :n]
            torch.testing.assert_close(score[b, :n], method.score(own)[0], rtol=1e-4, atol=1e-7)
            kept = method.select(own).tolist()[0]
            assert index[b].tolist() == kept + [-1] * (9 - len(kept))
    assert index[3].tolist() == [-1] * 9


@pytest.mark.parametrize("kernel", ["linear", "relu", "threshold"])
def test_a_token_that_is_not_finite_harms_no_other(kernel: str) -> None:
    x = torch.randn(1, 9, 4)
    x[0, 4, 1] = float("nan")
    score = LexRank(kernel=kernel).score(x)
    others = [t for t in range(9) if t != 4]
    assert score[0, 4] == 0
    torch.testing.assert_close(score[:, others], LexRank(kernel=kernel).score(x[:, others]))


# --- PruMerge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 97, 576])
def test_outliers_are_numpys(n: int) -> None:
    score = torch.randn(40, n).exp() ** 2
    q1, q3 = numpy.percentile(score.double().numpy(), [25, 75], axis=1)
    expected = (score.double().numpy() > (q3 + 1.5 * (q3 - q1))[:, None]).sum(1)
    assert prumerge.outlier_count(score).tolist() == expected.tolist()
    assert max(expected) <= -(-(n - 1) // 4)
    picks = PruMerge().picks(score)
    assert (picks >= 0).sum(1).tolist() == [max(1, c) for c in expected]
    for row, values in zip(picks.tolist(), score, strict=True):
        kept = [t for t in row if t >= 0]
        assert kept == values.argsort(descending=True, stable=True)[: len(kept)].tolist()


def test_a_quarter_of_outliers_fits() -> None:
    """The most there can be: all above a constant rest."""
    for n in range(2, 40):
        most = max(1, max(c for c in range(n) if c == 0 or outliers_of(c, n) == c))
        assert PruMerge().picks(torch.zeros(1, n)).shape[1] >= most


def outliers_of(spikes: int, n: int) -> int:
    score = torch.ones(1, n)
    score[:, :spikes] = 5
    return int(prumerge.outlier_count(score))


def test_outliers_of_ragged_items_and_of_nan() -> None:
    score = torch.rand(3, 64) ** 8
    lengths = torch.tensor([64, 23, 0])
    picks = PruMerge().picks(score, lengths=lengths)
    own = [t for t in PruMerge().picks(score[1:2, :23])[0].tolist() if t >= 0]
    assert [t for t in picks[1].tolist() if t >= 0] == own
    assert (picks[2] == -1).all()
    wild = torch.tensor([[float("nan"), 1, 1, 1, 1, 9, 1, 1, 1, 1]])
    assert PruMerge().picks(wild)[0].tolist() == [5, -1, -1]
    assert PruMerge().picks(torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("count", [1, 7, 40, 100])
def test_plus_adds_the_published_grid(count: int) -> None:
    """arange(0, 575, int(int(1 / ratio) / 3)) of 576 tokens, without those there already."""
    score = torch.rand(1, 576) * 0.1
    spikes = torch.randperm(576)[:count]
    score[0, spikes] += 1 + torch.rand(count)
    assert int(prumerge.outlier_count(score)) == count
    step = max(1, int(int(1 / (count / 576)) / 3))
    grid = [t for t in range(0, 575, step) if t not in spikes.tolist()]
    picks = [t for t in PruMerge(plus=True).picks(score)[0].tolist() if t >= 0]
    assert picks[:count] == score[0].argsort(descending=True)[:count].tolist()
    assert picks[count:] == grid


@pytest.mark.parametrize("neighbours", [0, 1, 3, 32])
@pytest.mark.parametrize("plus", [False, True])
def test_merge_by_its_definition(neighbours: int, plus: bool) -> None:
    x, key, score = torch.randn(3, 60, 7), torch.randn(3, 60, 5), torch.rand(3, 60) ** 6
    key[0, 8] = key[0, 4]  # a duplicate of a kept token must not push it into its own list
    score[0, 4] = 3.0
    lengths = torch.tensor([60, 60, 33])
    method = PruMerge(plus=plus, neighbours=neighbours)
    kept = method.picks(score, lengths=lengths)
    y, count = method.merge(x, key, score, kept, lengths=lengths)
    assert y.shape == (3, kept.shape[1] + 1, 7)
    for b, n in enumerate(lengths.tolist()):
        rows = [t for t in kept[b].tolist() if t >= 0]
        unit = torch.nn.functional.normalize(key[b, :n].double(), dim=-1)
        a, z = score[b, :n].double(), x[b, :n].double()
        expected = []
        for t in rows:
            others = [j for j in (unit @ unit[t]).argsort(descending=True, stable=True).tolist() if j != t]
            near = others[:neighbours]
            expected.append(z[t] + (a[near, None] * z[near]).sum(0))
        left = [t for t in range(n) if t not in rows]
        expected.append((a[left, None] * z[left]).sum(0))
        assert count[b] == len(rows) + 1
        torch.testing.assert_close(y[b, : count[b]].double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert (y[b, count[b] :] == 0).all()


def test_merge_survives_nan() -> None:
    """A NaN score weighs nothing, a NaN key is nobody's neighbour."""
    x, key, score = torch.randn(1, 20, 3), torch.randn(1, 20, 5), torch.rand(1, 20)
    score[0, 3], score[0, 6], key[0, 9, 2] = 5.0, float("nan"), float("nan")
    y, count = PruMerge(neighbours=19).merge(x, key, score, PruMerge().picks(score))
    assert y.isfinite().all()
    near = [t for t in range(20) if t not in (3, 6, 9)]
    torch.testing.assert_close(y[0, 0], x[0, 3] + (score[0, near, None] * x[0, near]).sum(0))
    assert count.tolist() == [2]


def test_cls_score_does_not_split_heads() -> None:
    q, k = torch.randn(2, 10, 16), torch.randn(2, 10, 16)
    exact = (q.double() @ k.double().mT / 4).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(prumerge.cls_score(q, k).double(), exact, rtol=1e-5, atol=1e-6)


# --- ToP-ViM ---------------------------------------------------------------------------------------------


def test_clipped_sum_and_the_backward_branch() -> None:
    """Negative channels count nothing; a backward branch is turned back before its scores are used."""
    y = torch.tensor([[[1.0, -9], [2, 2], [-1, -1], [0.5, 3]]])
    assert ToPViM().score(y).tolist() == [[1.0, 4.0, 0.0, 3.5]]
    assert ToPViM().score(y.flip(1), reverse=True).tolist() == [[1.0, 4.0, 0.0, 3.5]]
    assert (
        ToPViM(keep=2).select(y).tolist()
        == ToPViM(keep=2).select(y.flip(1), reverse=True).tolist()
        == [[1, 3]]
    )
    assert ToPViM(keep=2).select(y.flip(1)).tolist() == [[0, 2]]


def test_counts_of_vim() -> None:
    """ceil(0.8 (N - 1)), made odd; no extra token from a product like 0.55 * 100 = 55.00000000000001."""
    assert [ToPViM().count(n) for n in (196, 5, 1)] == [157, 4, 1]
    assert [ToPViM(odd=True).count(n) for n in (196, 157, 127, 2)] == [157, 127, 103, 2]
    assert ToPViM(keep=0.55).count(100) == 55
    assert ToPViM(keep=7).count(4) == 4


def test_protected_tokens_stay_in_the_middle_of_every_item() -> None:
    """The published code protects CLS in the first item only."""
    y = torch.randn(5, 21, 8)
    y[:, 10] = -1
    kept = ToPViM(keep=0.5).select(y, protect=[10])
    assert kept.shape == (5, 11)
    assert (kept == 10).any(1).all()
    assert (kept.diff(dim=1) > 0).all()
    with pytest.raises(ValueError, match=r"ToPViM: protect must be in \[0, N=21\), got \[21\]"):
        ToPViM().select(y, protect=[21])


def test_padding_goes_first() -> None:
    y, mask = torch.rand(2, 12, 3) + 5, torch.arange(12).expand(2, 12) % 3 != 0
    y[~mask] += 100
    assert not ToPViM(keep=8).select(y, mask=mask).remainder(3).eq(0).any()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_of_survivors_is_the_scan_that_carries(reverse: bool) -> None:
    """h <- a h + b x over the kept tokens in order; dropped tokens hold the state of the last one passed."""
    x, a = torch.randn(2, 15), torch.rand(2, 15)
    kept = ToPViM(keep=6).select(torch.randn(2, 15, 4))

    def scan(x: Tensor, a: Tensor, moves: Tensor) -> Tensor:
        out, h = torch.zeros_like(x), torch.zeros(len(x))
        steps = range(x.shape[1])
        for t in reversed(steps) if reverse else steps:
            h = torch.where(moves[:, t], a[:, t] * h + x[:, t], h)
            out[:, t] = h
        return out

    full = scan(x, a, ragged.kept_mask(kept, 15))
    rows = [ragged.gather_rows(t, kept) for t in (x, a)]
    packed = scan(*rows, torch.ones(2, 6, dtype=torch.bool))
    assert torch.equal(ragged.gather_rows(packed, topvim.carried(kept, 15, reverse=reverse)), full)


# --- MTR -------------------------------------------------------------------------------------------------


def test_step_sizes_become_scores() -> None:
    delta = torch.rand(2, 3, 7, 5)
    torch.testing.assert_close(MTR().score(delta), delta.sum(1).mean(-1))
    torch.testing.assert_close(MTR().score(delta[:, 0]), delta[:, 0].mean(-1))


@pytest.mark.parametrize("protect", [[], [7]])
@pytest.mark.parametrize("keep", [1, 0.5, 0.8, 1.0])
def test_groups_merge_and_order_is_restored(keep: float, protect: list[int]) -> None:
    x, score = torch.randn(3, 15, 6), torch.rand(3, 15)
    score[:, 7] = -1  # the least important, were it not protected
    method = MTR(keep=keep, targets=0.5)
    y, token_map = method.reduce_tokens(x, score, protect=protect)
    free = 15 - len(protect)
    left = max(1, round(keep * free)) if isinstance(keep, float) else keep
    targets = max(1, round(0.5 * left))
    for b in range(3):
        ranked = sorted((t for t in range(15) if t not in protect), key=lambda t: -float(score[b, t]))
        target, source = ranked[left - targets : left], ranked[left:]
        survivors = sorted({*range(15)} - {*source})
        unit = torch.nn.functional.normalize(x[b].double(), dim=-1)
        goes = {s: max(target, key=lambda t: float(unit[s] @ unit[t])) for s in source}
        assert token_map[b].tolist() == [survivors.index(goes.get(t, t)) for t in range(15)]
        for row, t in enumerate(survivors):
            members = [t, *(s for s in source if goes[s] == t)]
            torch.testing.assert_close(y[b, row], x[b, members].mean(0), rtol=1e-5, atol=1e-6)


def test_mtr_drops_padding_first() -> None:
    x, score, mask = torch.randn(2, 12, 4), torch.rand(2, 12), torch.arange(12).expand(2, 12) < 9
    y, token_map = MTR(keep=9).reduce_tokens(x, score + 5 * ~mask, mask=mask)
    assert torch.equal(y, x[:, :9])
    assert (token_map[:, 9:] == -1).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: MTR(targets=0.0), r"MTR: targets must be in \(0, 1\], got 0.0"),
        (lambda: MTR().plan(torch.rand(1, 4, 2), torch.rand(1, 4), protect=[-1]), "MTR: protect must be in"),
        (lambda: LexRank(kernel="rbf"), "LexRank: kernel must be one of"),
        (lambda: LexRank(damping=2), r"LexRank: damping must be in \[0, 1\], got 2"),
        (lambda: LexRank(iterations=-1), r"LexRank: iterations must be in \[0, 10000\], got -1"),
        (lambda: PruMerge(neighbours=-1), r"PruMerge: neighbours must be in \[0, 32\], got -1"),
        (lambda: ToPViM(keep=0.0), "ToPViM: keep must be a ratio"),
    ],
)
def test_bad_knobs(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
