"""Every bad input of flash_prefill: the error names operator, argument, got and expected."""

import re
from typing import Any

import pytest
import torch
from backends import Backend
from cases_prefill import lists_of

NAN, INF = float("nan"), float("inf")
Q, K = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 200, 8)
V = torch.randn(2, 2, 200, 5)
BLOCKS = torch.zeros(2, 4, 2, 4, dtype=torch.bool)
BLOCKS[..., 1:3] = True
INDPTR, INDICES = lists_of(BLOCKS)
COLUMN_PTR, COLUMNS = lists_of((torch.arange(200) % 60 == 5).expand(2, 1, 2, 200) & (torch.arange(200) < 64))
LISTS = {"indptr": INDPTR, "indices": INDICES}
BOTH = LISTS | {"column_ptr": COLUMN_PTR, "columns": COLUMNS}


def changed(t: torch.Tensor, at: int, value: int) -> torch.Tensor:
    t = t.clone()
    t[at] = value
    return t


RUN, VAL = RuntimeError, ValueError
TENSORS: list[tuple[Any, type[Exception], str]] = [
    ((Q[0], K, V), RUN, "q must have shape [B, Hq, T, D], got [4, 70, 8]"),
    ((Q, K[0], V), RUN, "k must have shape [B, Hkv, S, D], got [2, 200, 8]"),
    ((Q, K, V[0]), RUN, "v must have shape [B, Hkv, S, Dv], got [2, 200, 5]"),
    ((Q, K, V[:, :, :9]), RUN, "v must have shape [B=2, Hkv=2, S=200, Dv], got [2, 2, 9, 5]"),
    ((Q, K, V[..., :0]), RUN, "value dimension Dv must be in [1, 256], got 0"),
    ((Q, K, torch.randn(2, 2, 200, 300)), RUN, "value dimension Dv must be in [1, 256], got 300"),
    ((Q, K, V.half()), RUN, "v must have the dtype of q, Float, got Half"),
    ((Q, K, V[..., ::2]), RUN, "v must be contiguous in its last dimension, got stride 2"),
    ((Q.double(), K, V), RUN, "q must be float32, float16 or bfloat16, got Double"),
    ((Q[:, :3], K, V), RUN, "Hq must be a multiple of Hkv=2, got 3"),
    ((torch.randn(2, 2, 3, 300), torch.randn(2, 2, 200, 300), V), RUN, "D must be in [1, 256], got 300"),
]
OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scale": 0.0}, RUN, "scale must be finite and > 0, got 0"),
    ({"softcap": -1.0}, RUN, "softcap must be finite and > 0, got -1"),
    ({"window": -3}, RUN, "window must be in [1, "),
    ({"window": 3, "causal": False}, RUN, "window must be None unless causal, got 3"),
    ({"key_bias": torch.zeros(2, 4)}, RUN, "key_bias must have shape [2, 1, 200], got [2, 1, 4]"),
    ({"key_bias": torch.full((2, 200), NAN)}, VAL, "key_bias must be finite or -inf, got nan"),
    ({"q_position": torch.zeros(4).int()}, RUN, "q_position must have shape [1, 70], got [1, 4]"),
    ({"lengths": torch.tensor([5, 201])}, VAL, "lengths must be in [0, S=200], got 201"),
    ({"starts": torch.tensor([-1, 0])}, VAL, "starts must be in [0, S=200], got -1"),
    ({"sinks": torch.zeros(3)}, RUN, "sinks must have shape [4], got [3]"),
    ({"sinks": torch.tensor([0, 0, INF, 0])}, VAL, "sinks must be finite, got inf"),
    ({"block_q": 32}, RUN, "block_q must be 64 or 128, got 32"),
    ({"block_k": 0}, RUN, "block_k must be 64 or 128, got 0"),
    ({"indptr": INDPTR}, RUN, "indptr and indices must be given together, got one of them"),
    ({"indices": INDICES}, RUN, "indptr and indices must be given together, got one of them"),
    (LISTS | {"columns": COLUMNS}, RUN, "column_ptr and columns must be given together, got one of them"),
    (
        {"column_ptr": COLUMN_PTR, "columns": COLUMNS},
        RUN,
        "column_ptr must be None unless indptr is given, got a tensor",
    ),
    (LISTS | {"indptr": INDPTR[:-1]}, RUN, "indptr must have B * H * blocks + 1 = 2 * H * 2 + 1 elements"),
    (LISTS | {"indptr": INDPTR.float()}, RUN, "indptr must be Int, got Float"),
    (LISTS | {"indices": INDICES.float()}, RUN, "indices must be Int, got Float"),
    (
        LISTS | {"indices": INDICES[None]},
        RUN,
        "indptr and indices must be one-dimensional, got [17] and [",
    ),
    (LISTS | {"indptr": INDPTR + 1}, VAL, "indptr must start at 0, not fall, and end at most at the"),
    (LISTS | {"indptr": changed(INDPTR, 3, 9)}, VAL, "indptr must start at 0, not fall, and end at most at"),
    (
        LISTS | {"indptr": changed(INDPTR, -1, 99)},
        VAL,
        "indptr must start at 0, not fall, and end at most at",
    ),
    (
        LISTS | {"indices": changed(INDICES, 2, 4)},
        VAL,
        "indices must be in [0, blocks of keys=4), got 4 at [2]",
    ),
    (
        LISTS | {"indices": changed(INDICES, 3, 1)},
        VAL,
        "indices must ascend in each list, got 1 after 1 in list 1",
    ),
    (
        LISTS | {"indices": changed(INDICES, 3, 0)},
        VAL,
        "indices must ascend in each list, got 0 after 1 in list 1",
    ),
    (BOTH | {"columns": changed(COLUMNS, 1, 200)}, VAL, "columns must be in [0, S=200), got 200 at [1]"),
    (BOTH | {"columns": changed(COLUMNS, 1, -1)}, VAL, "columns must be in [0, S=200), got -1 at [1]"),
    (
        BOTH | {"columns": changed(COLUMNS, 1, 70)},
        VAL,
        "columns must not lie in a listed block, got 70 in list 1",
    ),
]
REFUSED = [(t, {}, *rest) for t, *rest in TENSORS] + [((Q, K, V), *rest) for rest in OPTIONS]


@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: str(bad[3])[:60])
def test_refused(cpu_backend: Backend, bad: tuple[Any, ...]) -> None:
    arguments, options, error, message = bad
    with pytest.raises(error, match=re.escape(message)) as caught:
        cpu_backend.run("flash_prefill", *arguments, **options)
    assert "flash_prefill: " in str(caught.value)
    cpu_backend.run("flash_prefill", Q, K, V, **BOTH)  # an error does not poison the next call


def test_kernel_survives_what_the_wrapper_would_refuse(cpu_backend: Backend) -> None:
    """Lists that point anywhere never reach past the keys: what is out of range is skipped."""
    kernel = cpu_backend.run_kernel
    wild = {
        "indptr": torch.tensor([-5, 3, 2, 99], dtype=torch.int32),
        "indices": torch.tensor([0, 1 << 30, 7, 1 << 20, -1, 3, 77], dtype=torch.int32),
        "column_ptr": torch.tensor([0, 4, 4, 4], dtype=torch.int32),
        "columns": torch.tensor([-9, 70, 200, 1 << 30], dtype=torch.int32),
    }
    q, k, v = torch.randn(1, 2, 130, 8), torch.randn(1, 1, 200, 8), torch.randn(1, 1, 200, 8)
    got = kernel("flash_prefill", q, k, v, scale=0.3, **wild)
    tame = {
        "indptr": torch.tensor([0, 1, 1, 2]),
        "indices": torch.tensor([0, 3]),
        "column_ptr": torch.tensor([0, 1, 1, 1]),
        "columns": torch.tensor([70]),
    }
    want = cpu_backend.run("flash_prefill", q, k, v, scale=0.3, **tame)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-6)
