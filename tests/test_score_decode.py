"""Votes and decayed scores on every back end, and the row weights and PageRanks of ``tokencomp.scores``."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from backends import Backend
from cases_score import HEADS, ScoreCase
from tokencomp import reference, scores
from torch import Tensor
from yardstick import assert_scores

INF = float("inf")


def logits_and_lse(heads: int = 6, keys: int = 83, batch: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(batch, heads, keys, generator=g)
    logits[:, :, -5:] = -INF
    logits[0, 1, 3] = float("nan")
    lse = logits.nan_to_num(nan=-INF).logsumexp(-1)
    lse[-1, 2] = -INF
    return logits, lse


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("mode", ["softmax_sum", "sum", "max", "mean"])
def test_head_vote(backend: Backend, mode: str, groups: int) -> None:
    logits, lse = logits_and_lse()
    got = backend.run("head_vote", logits, lse, mode=mode, groups=groups)
    want = [
        reference.head_vote(logits, lse, mode=mode, groups=groups, dtype=d)
        for d in (torch.float64, torch.float32)
    ]
    assert_scores(got, *want)
    assert (got[:, :, -5:] == -INF).all()


def test_worked_example_of_the_soft_vote(backend: Backend) -> None:
    s = torch.tensor([[[2.0, 0, 1, 0, 0], [0, 3, 0, 1, 0]]])
    got = backend.run("head_vote", s, s.logsumexp(-1))
    want = torch.tensor([[[0.6025, 0.8547, 0.2461, 0.1816, 0.1150]]])
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5)
    assert backend.run("head_vote", s, mode="sum").tolist() == [[[2.0, 3, 1, 1, 0]]]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("clocks", [(), ("count",), ("last",), ("count", "last", "interval")], ids=str)
def test_decay_score(cpu_backend: Backend, heads: str, power: int, clocks: tuple[str, ...]) -> None:
    logits, lse = logits_and_lse()
    rows = {"none": 6, "mean": 1, "rms": 1}.get(heads, 2)
    start = torch.rand(2, rows, 83, generator=torch.Generator().manual_seed(1))
    score, exact, torch32 = start.clone(), start.double(), start.clone()
    ours, theirs = ({c: torch.ones(2, rows, 83, dtype=torch.int32) for c in clocks} for _ in range(2))
    lengths = torch.tensor([80, 40])
    options = {"gamma": 0.9, "heads": heads, "power": power, "alpha": 0.03, "lengths": lengths}
    for step in (4, 9):
        backend_options = {**options, "step": step, **ours}
        cpu_backend.run("decay_score_", score, logits, lse, **backend_options)
        reference.decay_score_(exact, logits, lse, **options, step=step, **theirs)
        reference.decay_score_(torch32, logits, lse, **options, step=step)
    assert_scores(score, exact, torch32)
    for name in clocks:
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(score[1, :, 40:], start[1, :, 40:])


def test_worked_example_of_lazy_eviction(cpu_backend: Backend) -> None:
    rows = [[0.5, 0, 0.5], [0, 0.3, 0.3, 0.4], [0.4, 0, 0, 0.3, 0.3], [0, 0, 0, 0.5, 0.2, 0.3]]
    last, interval = torch.zeros(1, 1, 6, dtype=torch.int32), torch.zeros(1, 1, 6, dtype=torch.int32)
    score = torch.zeros(1, 1, 6)
    for step, row in enumerate(rows, 1):
        last[0, 0, len(row) - 1] = step - 1
        p = torch.tensor(row + [0.0] * (6 - len(row)))[None, None]
        cpu_backend.run(
            "decay_score_", score, p, last=last, interval=interval, step=step, alpha=0.1,
            lengths=torch.tensor([len(row)]),
        )  # fmt: skip
    assert last[0, 0].tolist() == [3, 2, 2, 4, 4, 4]
    assert interval[0, 0].tolist() == [2, 2, 1, 1, 1, 1]
    torch.testing.assert_close(score[0, 0], torch.tensor([0.9, 0.3, 0.8, 1.2, 0.5, 0.3]))


# --- row weights ------------------------------------------------------------------------------------------


def test_forgetting_weights() -> None:
    weight = scores.forgetting_weights(1000, 0.98)
    exact = torch.tensor([0.98 ** (999 - t) for t in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(weight.double(), exact, rtol=1e-7, atol=0)
    assert torch.equal(scores.forgetting_weights(7, 1.0), torch.ones(7))


@pytest.mark.parametrize(
    ("gamma", "rows"), [(0.9, 153), (0.95, 328), (0.98, 878), (0.99, 1833), (0.999, 20713)]
)
def test_truncation_keeps_its_bound(gamma: float, rows: int) -> None:
    assert scores.forgetting_horizon(gamma) == rows
    assert gamma**rows / (1 - gamma) <= 1e-6 < gamma ** (rows - 1) / (1 - gamma)
    full = scores.forgetting_weights(rows + 500, gamma).double()
    cut = scores.forgetting_weights(rows + 500, gamma, truncate=1e-6).double()
    assert int((cut == 0).sum()) == 500
    assert float((full - cut).sum()) <= 1e-6


def test_windows_ramps_and_probes() -> None:
    assert scores.window_weights(5, 2).tolist() == [0, 0, 0, 1, 1]
    assert scores.ramp_weights(6, 3).tolist() == [0, 0, 0, 0, 0.5, 1]
    probes = scores.probe_weights(200, seed=4)
    assert probes.sum() == 20
    assert (probes[190:] == 1).all()
    assert torch.equal(probes, scores.probe_weights(200, seed=4))
    assert not torch.equal(probes, scores.probe_weights(200, seed=5))
    assert scores.probe_weights(3).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.forgetting_weights(5, 0.0), "gamma must be in (0, 1], got 0.0"),
        (lambda: scores.forgetting_weights(5, 1.5), "gamma must be in (0, 1], got 1.5"),
        (lambda: scores.forgetting_weights(5, math.nan), "gamma must be in (0, 1], got nan"),
        (lambda: scores.forgetting_horizon(1.0), "gamma must be in (0, 1), got 1.0"),
        (lambda: scores.forgetting_horizon(0.9, 0.0), "error must be > 0, got 0.0"),
        (lambda: scores.window_weights(5, 6), "window must be in [0, T=5], got 6"),
        (lambda: scores.ramp_weights(5, -1), "window must be in [0, T=5], got -1"),
        (lambda: scores.probe_weights(5, recent=2), "recent must be in [0, 1], got 2"),
        (lambda: scores.probe_weights(-5), "rows must be >= 0, got -5"),
    ],
)
def test_bad_numbers(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("position", ["", "shared", "batch"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_count_correction(position: str, causal: bool, ragged: bool) -> None:
    case = ScoreCase(3, 1, 1, 20, 37, 4, position=position, causal=causal, weight="sparse")
    if ragged:
        case = ScoreCase(
            3, 1, 1, 20, 37, 4, position=position, causal=causal, weight="sparse",
            lengths=(37, 30, 0), starts=(5, 0, 0),
        )  # fmt: skip
    c = case.call()
    sight = {key: v for key, v in c.sight.items() if key in ("q_position", "lengths", "starts", "causal")}
    seen = reference.visible(3, 20, 37, **sight).double()
    counts = scores.count_correction(37, 20, **sight)
    torch.testing.assert_close(counts.expand(3, 37), seen.sum(1).float())
    weight = c.rows["row_weight"]
    got = scores.count_correction(37, 20, row_weight=weight, **sight)
    torch.testing.assert_close(got, (seen * weight.double()[..., None]).sum(1).float(), rtol=1e-6, atol=1e-6)


# --- PageRank ---------------------------------------------------------------------------------------------


def test_worked_example_of_zero_tprune(cpu_backend: Backend) -> None:
    a = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1], [0.3, 0.3, 0.3, 0.1]])
    q, k = a.log()[None, None], torch.eye(4)[None, None]
    with cpu_backend.active():
        for steps, want in (
            (1, (0.25, 0.425, 0.225, 0.1)),
            (2, (0.2175, 0.4725, 0.21, 0.1)),
            (50, (0.2014, 0.4886, 0.21, 0.1)),
        ):
            got = scores.attention_pagerank(q, k, iterations=steps, scale=1.0)
            torch.testing.assert_close(got[0, 0], torch.tensor(want), rtol=0, atol=5e-5)
        cls = torch.tensor([0.4, 0.2, 0.2, 0.2])
        got = scores.attention_pagerank(q, k, iterations=1, scale=1.0, start=cls)
    torch.testing.assert_close(got[0, 0], torch.tensor([0.28, 0.40, 0.22, 0.10]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_pagerank_against_the_dense_graph(cpu_backend: Backend, causal: bool) -> None:
    g = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 4, 30, 16, generator=g), torch.randn(2, 2, 30, 16, generator=g)
    lengths = torch.tensor([30, 11])
    position = torch.arange(30)
    options = {"causal": causal, "lengths": lengths, "q_position": position}
    z = reference.attention_logits(q, k, scale=16**-0.5 / 0.1, **options)
    a = torch.softmax(z, -1).nan_to_num(0)
    p = (position < lengths[:, None]).double()
    even = (p / p.sum(1, keepdim=True))[:, None]
    p = even.expand(2, 4, 30)
    for _ in range(5):
        p = 0.9 * (a * p[..., None]).sum(2) + 0.1 * even
    with cpu_backend.active():
        got = scores.attention_pagerank(
            q, k, iterations=5, temperature=0.1, damping=0.1, causal=causal, lengths=lengths
        )
    torch.testing.assert_close(got.double(), p, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 4), rtol=1e-5, atol=0)


def test_worked_example_of_lexrank() -> None:
    x = torch.tensor([[[1.0, 0], [0.8, 0.6], [0, 1]]])
    got = scores.similarity_pagerank(3 * x)
    torch.testing.assert_close(got[0], torch.tensor([0.310155, 0.401270, 0.288576]), rtol=0, atol=2e-6)
    padded = torch.cat([x, torch.full((1, 2, 2), 9.0)], dim=1)
    ragged = scores.similarity_pagerank(padded, lengths=torch.tensor([3]))
    torch.testing.assert_close(ragged[0, :3], got[0])
    assert (ragged[0, 3:] == 0).all()


def test_worked_example_of_the_head_filter() -> None:
    s = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.26, 0.24, 0.25, 0.25]]])
    rms = scores.head_filter(s, low=0.0, high=1.0)
    torch.testing.assert_close(rms[0], torch.tensor([0.3373, 0.2717, 0.2264, 0.1904]), rtol=0, atol=5e-5)
    torch.testing.assert_close(scores.head_filter(s), s[:, 0])  # variances .2000 and .0008
    torch.testing.assert_close(scores.head_filter(s, low=0.9, high=1.0), rms)  # none qualifies: all
