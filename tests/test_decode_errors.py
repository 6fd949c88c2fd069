"""Every bad input of the decode operators: the error names operator, argument, got and expected."""

import re
from typing import Any

import pytest
import torch
from backends import Backend
from emulator import settings

NAN = float("nan")
Q, K = torch.randn(2, 4, 1, 8), torch.randn(6, 1, 16, 8)
TABLE, LENGTHS = torch.arange(4, dtype=torch.int32).view(2, 2, 1), torch.full((2, 2), 9, dtype=torch.int32)
INDEX = torch.zeros(2, 2, 3, dtype=torch.int32)
GOOD: dict[str, Any] = {"q": Q, "k_pages": K, "v_pages": K, "block_table": TABLE, "lengths": LENGTHS}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"q": Q[0]}, "q must have shape [B, Hq, T, D], got [4, 1, 8]"),
    ({"q": Q.double()}, "q must be float32, float16 or bfloat16, got Double"),
    ({"q": torch.randn(2, 4, 9, 8)}, "query rows T must be in [0, 8], got 9"),
    ({"q": torch.randn(2, 4, 1, 257)}, "head dimension D must be in [1, 256], got 257"),
    ({"q": Q[:, :3]}, "Hq must be a multiple of Hkv=2, got 3"),
    (
        {"q": torch.randn(2, 4, 8, 8).transpose(2, 3)},
        "q must be contiguous in its last dimension, got stride 8",
    ),
    ({"k_pages": K[0]}, "k_pages must have shape [N, Hx, P, D], got [1, 16, 8]"),
    ({"k_pages": K.half()}, "k_pages must have the dtype of q, Float, got Half"),
    ({"k_pages": K[..., :4]}, "k_pages must have shape [N, Hx, P, D=8], got [6, 1, 16, 4]"),
    (
        {"k_pages": torch.randn(6, 1, 8, 16).transpose(2, 3)},
        "k_pages must be contiguous in its last dimension",
    ),
    (
        {"v_pages": K[:5]},
        "v_pages must have as many pages, heads and slots as k_pages, [6, 1, 16, 8], got [5, ",
    ),
    ({"v_pages": torch.randn(6, 1, 16, 300)}, "head dimension Dv must be in [1, 256], got 300"),
    ({"k_pages": K[:, :, :9], "v_pages": K[:, :, :9]}, "page size P must be 16, 32 or 64, got 9"),
    (
        {"k_pages": K.view(2, 3, 16, 8), "v_pages": K.view(2, 3, 16, 8)},
        "heads of a page Hx must be 1 or Hkv=2, got 3",
    ),
    ({"block_table": TABLE[:1]}, "block_table must have shape [B=2, Hkv=2, max_pages], got [1, 2, 1]"),
    ({"block_table": TABLE.long()}, "block_table must be Int, got Long"),
    ({"lengths": LENGTHS[0]}, "lengths must have shape [B, Hkv], got [2]"),
    ({"lengths": LENGTHS[:1]}, "lengths must have shape [2, 2], got [1, 2]"),
    ({"lengths": LENGTHS.float()}, "lengths must be Int, got Float"),
    ({"scale": 0.0}, "scale must be finite and > 0, got 0"),
    ({"scale": NAN}, "scale must be finite and > 0, got nan"),
    ({"softcap": -1.0}, "softcap must be finite and > 0, got -1"),
    ({"window": 0}, "window must be in [1, "),
    ({"index": INDEX[0]}, "index must have shape [B, Hkv, K], got [2, 3]"),
    ({"index": INDEX[:1]}, "index must have shape [2, 2, 3], got [1, 2, 3]"),
    ({"index": INDEX.float()}, "index must be Int, got Float"),
    ({"index_count": LENGTHS}, "index_count must be None unless index is given, got a tensor"),
    ({"index": INDEX, "index_count": LENGTHS[:1]}, "index_count must have shape [2, 2], got [1, 2]"),
    ({"key_bias": torch.zeros(2, 3, 16)}, "key_bias must have shape [B=2, Hkv=2 or 1, S], got [2, 3, 16]"),
    ({"key_bias": torch.zeros(2, 2, 16).bool()}, "key_bias must be Float, got Bool"),
    ({"position": torch.zeros(2, 2, 16)}, "position must be Int, got Float"),
    ({"q_position": torch.zeros(2, 2).int()}, "q_position must have shape [2, 1], got [2, 2]"),
    ({"sinks": torch.zeros(3)}, "sinks must have shape [4], got [3]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda p: p[:60] if isinstance(p, str) else "")
def test_refused(cpu_backend: Backend, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"paged_decode: {message}")):
        cpu_backend.run("paged_decode", **(GOOD | change))


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"lengths": LENGTHS + 8}, "lengths must be in [0, S=16], got 17 at [0, 0]"),
    ({"lengths": -LENGTHS}, "lengths must be in [0, S=16], got -9 at [0, 0]"),
    ({"key_bias": torch.zeros(2, 2, 8)}, "lengths must be in [0, S=8], got 9 at [0, 0]"),
    ({"block_table": TABLE + 3}, "block_table must be in [-1, N=6), got 6 at [1, 1, 0]"),
    ({"block_table": TABLE | 1 << 28}, "block_table must be in [-1, N=6), got 268435456 at [0, 0, 0]"),
    ({"index": INDEX - 2}, "index must be in [-1, S=16), got -2 at [0, 0, 0]"),
    ({"index": INDEX + 16}, "index must be in [-1, S=16), got 16 at [0, 0, 0]"),
    ({"index": INDEX, "index_count": LENGTHS}, "index_count must be in [0, K=3], got 9 at [0, 0]"),
    ({"key_bias": torch.full((2, 16), NAN)}, "key_bias must be finite or -inf, got nan at [0, 0, 0]"),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD_VALUES, ids=lambda p: p[:60] if isinstance(p, str) else ""
)
def test_values_are_checked_when_asked(cpu_backend: Backend, change: dict[str, Any], message: str) -> None:
    with settings(TOKENCOMP_CHECKED="1"):
        cpu_backend.run("paged_decode", **GOOD)
        with pytest.raises(ValueError, match=re.escape(f"paged_decode: {message}")):
            cpu_backend.run("paged_decode", **(GOOD | change))


@pytest.mark.parametrize("change", [change for change, _ in BAD_VALUES[:8]], ids=lambda p: "-".join(p))
def test_unchecked_values_hide_slots(cpu_backend: Backend, change: dict[str, Any]) -> None:
    """And never reach beyond a tensor: the race build would report it."""
    out, lse, _ = cpu_backend.run("paged_decode", **(GOOD | change))
    assert out.isfinite().all()
    assert not lse.isnan().any()


@pytest.mark.parametrize(
    ("out", "lse", "message"),
    [
        (torch.zeros(3), torch.zeros(3), "out must have shape [S, ..., Dv], got [3]"),
        (torch.zeros(3, 4).int(), torch.zeros(3), "out must be float32, float16 or bfloat16, got Int"),
        (torch.zeros(4, 3).t(), torch.zeros(3), "out must be contiguous, got strides that are not"),
        (torch.zeros(3, 4), torch.zeros(3).double(), "lse must be Float, got Double"),
        (
            torch.zeros(3, 4),
            torch.zeros(4),
            "lse must be contiguous and have the shape of out without its last",
        ),
        (torch.zeros(3, 2, 4), torch.zeros(2, 3).t(), "lse must be contiguous and have the shape of out"),
    ],
)
def test_states_refused(cpu_backend: Backend, out: torch.Tensor, lse: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"merge_states: {message}")):
        cpu_backend.run("merge_states", out, lse)
