"""Every bad input of the decode operators: the error names operator, argument, got and expected."""

import re
from typing import Any

import pytest
import torch
from backends import Backend
from emulator import settings
from tokencomp import ops
from tokencomp.ops.kvquant_pages import PageFormat
from tokencomp.ops.page_pools import PagePools

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
    ({"k_pages": K[..., :4]}, "k_pages must have D=8 channels, as q, got 4"),
    (
        {"k_pages": torch.randn(6, 1, 8, 16).transpose(2, 3)},
        "k_pages must be contiguous in its last dimension",
    ),
    (
        {"v_pages": K[:5]},
        "v_pages must have the shape of k_pages but for its channels, [6, 1, 16, 8], got [5, ",
    ),
    ({"v_pages": torch.randn(6, 1, 16, 300)}, "head dimension Dv must be in [1, 256], got 300"),
    (
        {"k_pages": K[:, :, :9], "v_pages": K[:, :, :9]},
        "k_pages must have pages of 16, 32 or 64 slots, got 9",
    ),
    (
        {"k_pages": K.view(2, 3, 16, 8), "v_pages": K.view(2, 3, 16, 8)},
        "k_pages must hold 1 or Hkv=2 heads a page, got 3",
    ),
    ({"block_table": TABLE[:1]}, "block_table must have shape [B=2, Hkv=2, places], got [1, 2, 1]"),
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


POOL_FORMAT = PageFormat("int4", "int2", 16, 8, "channel", "token", -1, 4)
POOL = torch.zeros(3, POOL_FORMAT.page_bytes, dtype=torch.uint8)
NUMBERS = [3, 1, -1, 5, 0, 4, 0]
MAP = torch.ones(2, 2, 8)

# The layout is that of the CPU: the same checks run before every back end.
POOLS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pools": [POOL.int()]}, "pools must be contiguous uint8 of shape [pages, page bytes], got Int [3, "),
    ({"pools": [POOL[0]]}, "pools must be contiguous uint8 of shape [pages, page bytes], got Byte ["),
    ({"pools": [POOL[:, ::2]]}, "pools must be contiguous uint8"),
    ({"pools": [POOL.flatten()[1:-15].view(2, -1)]}, "pools must start on a 16-byte boundary, got 1 bytes"),
    ({"pools": [POOL[:, :-16].contiguous()]}, "pools must have pages of"),
    ({"pools": [POOL] * 8, "formats": NUMBERS * 8}, "pools must be at most 7, got 8"),
    ({"formats": NUMBERS[:6]}, "formats must have 7 numbers a pool, got 6 for 1 pools"),
    ({"formats": NUMBERS * 2}, "formats must have 7 numbers a pool, got 14 for 1 pools"),
    ({"formats": [0, *NUMBERS[1:]]}, "tier_k of formats must be 1 (fp8) to 5 (int2), got 0"),
    ({"formats": [*NUMBERS[:3], 6, *NUMBERS[4:]]}, "tier_v of formats must be 1 (fp8) to 5 (int2), got 6"),
    ({"formats": [3, 2, *NUMBERS[2:]]}, "axis of formats must be 0 (token) or 1 (channel), got 2"),
    ({"formats": [3, 1, 5, *NUMBERS[3:]]}, "group must be -1 (all) or divide the tokens S=16"),
    ({"formats": [*NUMBERS[:5], 3, 0]}, "group must be -1 (all) or divide the channels D=8"),
    ({"formats": [*NUMBERS[:6], 1]}, "layout of pools must be 'linear' on CPU, got 'mma16'"),
    ({"pools": None, "formats": None, "k_scale": MAP}, "k_scale must be None without pools, got a tensor"),
    ({"pools": [], "formats": [], "v_bias": MAP}, "v_bias must be None without pools, got a tensor"),
    ({"k_bias": MAP[:1]}, "k_bias must have shape [2, 2, 8], got [1, 2, 8]"),
    ({"v_scale": MAP.half()}, "v_scale must be Float, got Half"),
    ({"v_pages": torch.randn(6, 1, 16, 4)}, "v_pages must have D=8 channels beside quantized pools, got 4"),
    ({"block_table": None, "k_pages": torch.randn(2, 2, 16, 8), "v_pages": torch.randn(2, 2, 16, 8)},
     "pools must be None without block_table, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"), POOLS_REFUSED, ids=lambda p: p[:60] if isinstance(p, str) else ""
)
def test_pools_refused(change: dict[str, Any], message: str) -> None:
    good = GOOD | {"pools": [POOL], "formats": NUMBERS, "scale": 1.0}
    torch.ops.tokencomp.paged_decode(**good)
    with pytest.raises(RuntimeError, match=re.escape(f"paged_decode: {message}")):
        torch.ops.tokencomp.paged_decode(**(good | change))


def test_head_dimension_of_a_format() -> None:
    odd = {name: torch.randn(6, 1, 16, 9) for name in ("k_pages", "v_pages")}
    with pytest.raises(
        RuntimeError, match=r"paged_decode: head dimension D must be a multiple of 2 for 4 bits"
    ):
        torch.ops.tokencomp.paged_decode(
            **(GOOD | odd | {"q": torch.randn(2, 4, 1, 9)}), pools=[POOL], formats=NUMBERS, scale=1.0
        )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (2 << 28, "block_table must name pages of a type in [0, 2), got type 2 at [0, 1, 0]"),
        (1 << 28 | 3, "block_table must name pages in [0, N=3) of type 1, got 3 at [0, 1, 0]"),
        (6, "block_table must name pages in [0, N=6) of type 0, got 6 at [0, 1, 0]"),
        (-2, "block_table must name pages of a type in [0, 2), got type 15 at [0, 1, 0]"),
    ],
)
def test_entries_are_checked_when_asked(entry: int, message: str) -> None:
    table = TABLE.clone()
    table[0, 0], table[0, 1] = 1 << 28 | 2, -1
    quantized = PagePools((POOL,), (POOL_FORMAT,))
    with settings(TOKENCOMP_CHECKED="1"):
        ops.paged_decode(**(GOOD | {"block_table": table}), quantized=quantized)
        table[0, 1] = entry
        with pytest.raises(ValueError, match=re.escape(f"paged_decode: {message}")):
            ops.paged_decode(**(GOOD | {"block_table": table}), quantized=quantized)


DENSE = torch.randn(2, 2, 16, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_pages": DENSE[0]}, "k_pages must have shape [B, Hkv, S, D], got [2, 16, 8]"),
        (
            {"k_pages": DENSE[:1], "v_pages": DENSE[:1]},
            "k_pages must have shape [B=2, Hkv=2, S, D=8] without block_table, got [1, 2, 16, 8]",
        ),
        ({"v_pages": DENSE[:, :, :4]}, "v_pages must have the shape of k_pages but for its channels"),
    ],
)
def test_dense_refused(cpu_backend: Backend, change: dict[str, Any], message: str) -> None:
    good = GOOD | {"k_pages": DENSE, "v_pages": DENSE, "block_table": None}
    cpu_backend.run("paged_decode", **good)
    with pytest.raises(RuntimeError, match=re.escape(f"paged_decode: {message}")):
        cpu_backend.run("paged_decode", **(good | change))
