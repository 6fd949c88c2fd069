"""Every bad input of the score operators: the error names operator, argument, got and expected."""

import re
from typing import Any

import pytest
import torch
from backends import Backend

NAN, INF = float("nan"), float("inf")
Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
LSE = torch.zeros(2, 4, 3)
S = torch.zeros(2, 4, 5)
STATE = torch.zeros(2, 2, 5)
INT = torch.zeros(2, 2, 5, dtype=torch.int32)

Bad = tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]


def _attention() -> list[Bad]:
    """What every operator with queries and keys refuses, by the example of column_score."""
    op, run, val = "column_score", RuntimeError, ValueError
    wide = torch.randn(2, 4, 3, 300)
    tensors: list[Bad] = [
        (op, (Q[0], K, LSE), {}, run, "q must have shape [B, Hq, T, D], got [4, 3, 8]"),
        (op, (Q, K[0], LSE), {}, run, "k must have shape [B, Hkv, S, D], got [2, 5, 8]"),
        (op, (Q.double(), K.double(), LSE), {}, run, "q must be float32, float16 or bfloat16, got Double"),
        (op, (Q, K.half(), LSE), {}, run, "k must have the dtype of q, Float, got Half"),
        (op, (Q, K[:1], LSE), {}, run, "k must have shape [B=2, Hkv, S, D=8], got [1, 2, 5, 8]"),
        (op, (Q, K[..., :4], LSE), {}, run, "k must have shape [B=2, Hkv, S, D=8], got [2, 2, 5, 4]"),
        (op, (Q[:, :3], K, LSE[:, :3]), {}, run, "Hq must be a multiple of Hkv=2, got 3"),
        (op, (Q[:, :1], K, LSE[:, :1]), {}, run, "Hq must be a multiple of Hkv=2, got 1"),
        (op, (wide, wide, LSE), {}, run, "head dimension D must be in [1, 256], got 300"),
        (op, (Q[..., :0], K[..., :0], LSE), {}, run, "head dimension D must be in [1, 256], got 0"),
        (
            op,
            (Q[..., ::2], K[..., ::2], LSE),
            {},
            run,
            "q must be contiguous in its last dimension, got stride 2",
        ),
        (op, (Q, K, LSE[:, :2]), {}, run, "lse must have shape [2, 4, 3], got [2, 2, 3]"),
        (op, (Q, K, LSE[..., :2]), {}, run, "lse must have shape [2, 4, 3], got [2, 4, 2]"),
        (op, (Q, K, LSE.int()), {}, run, "lse must be Float, got Int"),
    ]
    options: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"scale": 0.0}, run, "scale must be finite and > 0, got 0"),
        ({"scale": NAN}, run, "scale must be finite and > 0, got nan"),
        ({"softcap": -1.0}, run, "softcap must be finite and > 0, got -1"),
        ({"window": 0}, run, "window must be in [1, "),
        ({"window": 3, "causal": False}, run, "window must be None unless causal, got 3"),
        ({"power": 3}, run, "power must be 1 or 2, got 3"),
        ({"rows": "mean"}, run, "rows must be one of 'sum', 'max', got 'mean'"),
        (
            {"heads": "sum"},
            run,
            "heads must be one of 'none', 'kv_sum', 'kv_mean', 'kv_max', 'mean', 'rms', got",
        ),
        ({"row_weight": torch.ones(4)}, run, "row_weight must have shape [1, 1, 3], got [1, 1, 4]"),
        ({"row_weight": torch.ones(2, 2, 3)}, run, "row_weight must have shape [2, 4, 3], got [2, 2, 3]"),
        ({"row_weight": -torch.ones(3)}, val, "row_weight must be finite and >= 0, got -1.0"),
        ({"row_weight": torch.full((3,), NAN)}, val, "row_weight must be finite and >= 0, got nan"),
        ({"row_weight": torch.ones(3).bool()}, run, "row_weight must be Float, got Bool"),
        ({"key_bias": torch.zeros(2, 4)}, run, "key_bias must have shape [2, 1, 5], got [2, 1, 4]"),
        ({"key_bias": torch.zeros(2, 4, 5)}, run, "key_bias must have shape [2, 2, 5], got [2, 4, 5]"),
        ({"key_bias": torch.full((2, 5), NAN)}, val, "key_bias must be finite or -inf, got nan"),
        ({"key_bias": torch.full((2, 5), INF)}, val, "key_bias must be finite or -inf, got inf"),
        ({"q_position": torch.zeros(4).int()}, run, "q_position must have shape [1, 3], got [1, 4]"),
        ({"q_position": torch.zeros(3)}, run, "q_position must be Int, got Float"),
        ({"lengths": torch.tensor([5, 6])}, val, "lengths must be in [0, S=5], got 6"),
        ({"lengths": torch.tensor([5])}, run, "lengths must have shape [2], got [1]"),
        ({"starts": torch.tensor([-1, 0])}, val, "starts must be in [0, S=5], got -1"),
    ]
    return tensors + [(op, (Q, K, LSE), o, error, message) for o, error, message in options]


def _decode() -> list[Bad]:
    run, val = RuntimeError, ValueError
    q1 = Q[:, :, 0]
    cases: list[Bad] = [
        ("qk_scores", (Q, K), {}, run, "q must have shape [B, Hq, D], got [2, 4, 3, 8]"),
        (
            "qk_scores",
            (q1, K),
            {"k_min": K[:, :, :4]},
            run,
            "k_min must have the shape of k, [2, 2, 5, 8], got",
        ),
        ("qk_scores", (q1, K), {"k_min": K.half()}, run, "k_min must have the device and dtype of k"),
        ("attention_lse", (Q[:, :3], K), {}, run, "Hq must be a multiple of Hkv=2, got 3"),
        ("diagonal_score", (Q, K, LSE[:1]), {}, run, "lse must have shape [2, 4, 3], got [1, 4, 3]"),
        ("head_vote", (S[0],), {"mode": "sum"}, run, "scores must have shape [B, Hq, S], got [4, 5]"),
        ("head_vote", (S,), {}, run, "lse must be given for mode 'softmax_sum', got None"),
        ("head_vote", (S, LSE[..., 0]), {"groups": 3}, run, "groups must divide Hq=4, got 3"),
        (
            "head_vote",
            (S,),
            {"mode": "vote"},
            run,
            "mode must be one of 'softmax_sum', 'sum', 'max', 'mean', got",
        ),
        ("head_vote", (S, LSE), {}, run, "lse must have shape [2, 4], got [2, 4, 3]"),
    ]
    states: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"gamma": 0.0}, run, "gamma must be in (0, 1], got 0"),
        ({"gamma": 1.1}, run, "gamma must be in (0, 1], got 1.1"),
        ({"gamma": NAN}, run, "gamma must be in (0, 1], got nan"),
        ({"alpha": -0.5}, run, "alpha must be >= 0, got -0.5"),
        ({"step": -1}, run, "step must be in [0, "),
        ({"power": 0}, run, "power must be 1 or 2, got 0"),
        ({"heads": "none"}, run, "H must fit heads='none' with Hq=4, got 2"),
        ({"heads": "mean"}, run, "H must fit heads='mean' with Hq=4, got 2"),
        ({"interval": INT}, run, "interval must be None unless last is given, got a tensor"),
        ({"count": STATE}, run, "count must be Int, got Float"),
        ({"last": INT[:1]}, run, "last must have shape [2, 2, 5], got [1, 2, 5]"),
        ({"lengths": torch.tensor([6, 0])}, val, "lengths must be in [0, S=5], got 6"),
    ]
    cases += [("decay_score_", (STATE, S, LSE[..., 0]), o, error, m) for o, error, m in states]
    cases += [("decay_score_", (STATE[..., :4], S), {}, run, "score must be contiguous")]
    cases += [
        ("decay_score_", (STATE[..., :4].contiguous(), S), {}, run, "logits must have shape [2, 4, 4], got")
    ]
    return cases


REFUSED = _attention() + _decode()


@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: f"{bad[0]}-{bad[4][:50]}")
def test_refused(cpu_backend: Backend, bad: Bad) -> None:
    op, arguments, options, error, message = bad
    with pytest.raises(error, match=re.escape(message)) as caught:
        cpu_backend.run(op, *arguments, **options)
    assert f"{op}: " in str(caught.value)
    cpu_backend.run("column_score", Q, K, LSE)  # an error does not poison the next call


def test_pages_of_wide_heads_are_refused_on_cuda_only() -> None:
    from backends import make_backend

    q, k = torch.randn(1, 2, 200), torch.randn(1, 2, 5, 200)
    make_backend("cpu").run("qk_scores", q, k, k_min=k)
    with pytest.raises(
        RuntimeError, match="head dimension D must be at most 128 with k_min on CUDA, got 200"
    ):
        make_backend("emu").run("qk_scores", q, k, k_min=k)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rows_of_unknown_lse_count_as_nothing(cpu_backend: Backend, value: float) -> None:
    lse = torch.full((2, 4, 3), 2.0)
    want = cpu_backend.run("column_score", Q[:, :, 1:], K, lse[:, :, 1:])
    lse[:, :, 0] = value
    got = cpu_backend.run("column_score", Q, K, lse)
    assert torch.equal(got, want)


def test_kernel_clamps_what_the_wrapper_would_refuse(cpu_backend: Backend) -> None:
    """Lengths and positions out of range never reach past the keys."""
    op = getattr(torch.ops, cpu_backend.namespace).column_score
    wild = torch.tensor([1000, -7], dtype=torch.int32)
    position = torch.tensor([[10**6, -(10**6), 2]], dtype=torch.int32)
    got = op(Q, K, LSE, scale=0.3, lengths=wild, starts=-wild, q_position=position)
    want = cpu_backend.run(
        "column_score", Q[:1, :, 2:], K[:1], LSE[:1, :, 2:], scale=0.3, q_position=position[0, 2:]
    )
    assert torch.equal(got[:1], want)
    assert (got[1] == 0).all()
