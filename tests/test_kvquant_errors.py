"""Every bad input of the kvquant operators: the error names operator, argument, got and expected."""

import re
from typing import Any

import pytest
import torch
from backends import Backend
from tokencomp import ops
from tokencomp.ops.kvquant_pages import PageFormat

X = torch.randn(2, 2, 32, 64)
CODES = torch.zeros(2, 2, 32, 32, dtype=torch.uint8)
PARAMS = torch.zeros(2, 2, 32, 1, 2, dtype=torch.float16)
MAP = torch.ones(2, 2, 64)

Bad = tuple[str, tuple[Any, ...], dict[str, Any], str]

QUANTIZE: list[Bad] = [
    ("kv_quantize", arguments, {"group": 64, **options}, message)
    for arguments, options, message in (
        ((X[0], 4), {}, "x must have shape [B, H, S, D], got [2, 32, 64]"),
        ((X.double(), 4), {}, "x must be float32, float16 or bfloat16, got Double"),
        ((X.mT, 4), {}, "x must be contiguous in its last dimension, got stride 64"),
        ((torch.randn(1, 1, 2, 300), 4), {"group": -1}, "head dimension D must be in [1, 256], got 300"),
        ((X, 5), {}, "bits must be 2, 3, 4 or 8, got 5"),
        ((X, 1), {}, "bits must be 2, 3, 4 or 8, got 1"),
        (
            (X, 4),
            {"group": 48},
            "group must be -1 (all) or divide the channels D=64 along axis 'token', got 48",
        ),
        (
            (X, 4),
            {"group": 0},
            "group must be -1 (all) or divide the channels D=64 along axis 'token', got 0",
        ),
        (
            (X, 4),
            {"axis": "channel", "group": 12},
            "group must be -1 (all) or divide the tokens S=32 along axis 'channel', got 12",
        ),
        ((X, 4), {"axis": "both"}, "axis must be one of 'token', 'channel', got 'both'"),
        ((X, 4), {"layout": "mma16"}, "layout must be one of 'linear', 'mma16_k', 'mma16_v', got 'mma16'"),
        ((X, 4), {"rounding": "up"}, "rounding must be one of 'even', 'away', got 'up'"),
        ((X, 4), {"kind": "e5m2"}, "kind must be one of 'int', 'fp8', got 'e5m2'"),
        ((X, 4), {"kind": "fp8"}, "bits must be 8 for kind 'fp8', got 4"),
        ((X, 8), {"kind": "fp8", "rounding": "away"}, "rounding must be 'even' for kind 'fp8', got 'away'"),
        ((X[..., :3], 4), {"group": -1}, "head dimension D must be a multiple of 2 for 4 bits, got 3"),
        ((X[..., :12], 3), {"group": -1}, "head dimension D must be a multiple of 8 for 3 bits, got 12"),
        (
            (X[..., :32], 4),
            {"group": 32, "layout": "mma16_k"},
            "head dimension D must be 64, 128 or 256 for the mma16 layouts",
        ),
        (
            (X[:, :, :20], 4),
            {"layout": "mma16_v"},
            "S must be a multiple of 16 for the mma16 layouts, got 20",
        ),
        (
            (X, 4),
            {"layout": "mma16_v", "axis": "channel", "group": 8},
            "group must be a multiple of 16 along axis 'channel' for the mma16 layouts, got 8",
        ),
        ((X, 4), {"pre_scale": MAP[:1]}, "pre_scale must have shape [2, 2, 64], got [1, 2, 64]"),
        ((X, 4), {"pre_bias": MAP[..., :8]}, "pre_bias must have shape [2, 2, 64], got [2, 2, 8]"),
    )
]
DEQUANTIZE: list[Bad] = [
    ("kv_dequantize", arguments, {"group": 64, **options}, message)
    for arguments, options, message in (
        ((CODES.int(), PARAMS, 4), {}, "codes must be uint8, got Int"),
        (
            (CODES[0], PARAMS, 4),
            {},
            "codes must be contiguous of shape [B, H, S, D * bits / 8], got [2, 32, 32]",
        ),
        ((CODES[:, :, ::2], PARAMS, 4), {}, "codes must be contiguous of shape"),
        (
            (CODES[..., :7].contiguous(), PARAMS, 3),
            {},
            "codes must have rows of D * bits / 8 bytes with D in",
        ),
        ((CODES, PARAMS.float(), 4), {}, "params must be Half, got Float"),
        ((CODES, PARAMS[:, :, :8], 4), {}, "params must have shape [2, 2, 32, 1, 2], got [2, 2, 8, 1, 2]"),
        ((CODES, PARAMS, 4), {"group": 32}, "params must have shape [2, 2, 32, 2, 2], got [2, 2, 32, 1, 2]"),
        ((CODES, PARAMS, 6), {}, "bits must be 2, 3, 4 or 8, got 6"),
        ((CODES, PARAMS, 4), {"dtype": torch.int32}, "dtype must be float32, float16 or bfloat16, got Int"),
    )
]
OTHERS: list[Bad] = [
    ("kv_repack", (CODES, 5, "linear", "mma16_k"), {}, "bits must be 2, 3, 4, 8 or 16, got 5"),
    ("kv_repack", (CODES, 4, "linear", "mma"), {}, "target must be one of 'linear', 'mma16_k', 'mma16_v'"),
    ("kv_repack", (CODES, 4, "rows", "linear"), {}, "source must be one of 'linear', 'mma16_k', 'mma16_v'"),
    ("kv_repack", (CODES[:, :, :8].contiguous(), 4, "linear", "mma16_k"), {}, "S must be a multiple of 16"),
    (
        "hadamard",
        (torch.randn(1, 1, 2, 24),),
        {},
        "head dimension D must be a power of two up to 256, got 24",
    ),
    ("hadamard", (X, torch.ones(32)), {}, "signs must have shape [64], got [32]"),
    ("hadamard", (X.int(),), {}, "x must be float32, float16 or bfloat16, got Int"),
    ("channel_stats", (X[0],), {}, "x must have shape [B, H, S, D], got [2, 32, 64]"),
    ("channel_stats", (X,), {"lengths": torch.ones(3)}, "lengths must be Int, got Float"),
    ("channel_stats", (X,), {"starts": torch.ones(3).int()}, "starts must have shape [2], got [3]"),
]


@pytest.mark.parametrize(("op", "arguments", "options", "message"), QUANTIZE + DEQUANTIZE + OTHERS)
def test_message(backend: Backend, op: str, arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}")):
        backend.run(op, *arguments, **options)


def test_values_of_ranges() -> None:
    for name, value in (("lengths", 33), ("starts", -1)):
        with pytest.raises(ValueError, match=rf"channel_stats: {name} must be in \[0, S=32\], got {value}"):
            ops.channel_stats(X, **{name: torch.tensor([value, 5])})


PAGE = PageFormat("int4", "int4", 16, 64)
POOL = torch.zeros(4, PAGE.page_bytes, dtype=torch.uint8)
INDEX = torch.arange(16, dtype=torch.int32).expand(2, 16).contiguous()
TWO = torch.tensor([0, 1], dtype=torch.int32)


def write(backend: Backend, **changed: Any) -> None:
    call = {"pool": POOL.clone(), "k": X, "v": X, "sequence": TWO, "index": INDEX, "pages": TWO, "page": PAGE}
    call = {key: v.to(backend.device) if hasattr(v, "to") else v for key, v in (call | changed).items()}
    with backend.active():
        ops.kv_page_write_(**call)


PAGE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"pool": POOL[:, :-16].contiguous()}, "pool must have pages of 1344 bytes for this page type, got 1328"),
    ({"pool": POOL.int()}, "pool must be contiguous uint8 of shape [pages, page bytes], got Int"),
    (
        {"pool": torch.zeros(4 * 1344 + 8, dtype=torch.uint8)[8:].view(4, 1344)},
        "pool must start on a 16-byte boundary, got one 8 bytes behind it",
    ),
    ({"k": X[0]}, "k must have shape [B, H, S, D], got [2, 32, 64]"),
    ({"v": X[:, :, :8]}, "v must have the shape of k, [2, 2, 32, 64], got [2, 2, 8, 64]"),
    ({"v": X.half()}, "v must have the dtype and device of k, got another"),
    ({"sequence": TWO[:1]}, "sequence must have shape [2], got [1]"),
    ({"index": INDEX[:1]}, "index must have shape [2, 16], got [1, 16]"),
    ({"k_scale": MAP[..., :3]}, "k_scale must have shape [2, 2, 64], got [2, 2, 3]"),
    (
        {"page": PageFormat("int4", "int5", 16, 64)},
        "tier_v must be one of 'fp8', 'int8', 'int4', 'int3', 'int2', got",
    ),  # type: ignore[arg-type]
    (
        {"page": PageFormat("working", "int4", 16, 64)},
        "tier_k must be a quantized tier: pages in the working dtype",
    ),  # type: ignore[arg-type]
    (
        {"page": PageFormat("int4", "int4", 16, 64, group_k=24)},
        "group must be -1 (all) or divide the tokens S=16",
    ),
    (
        {"page": PageFormat("int4", "int4", 48, 64), "index": torch.zeros(2, 48, dtype=torch.int32)},
        "tokens of a page must be 16, 32 or 64, got 48",
    ),
]


@pytest.mark.parametrize(("changed", "message"), PAGE_ERRORS)
def test_page_message(cpu_backend: Backend, changed: dict[str, Any], message: str) -> None:
    if "tier" in message or "int5" in str(changed):
        from tokencomp.ops import kvquant_pages

        names = {**kvquant_pages.TIER_BITS, "int5": 5, "working": 16}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kvquant_pages, "TIER_BITS", names)
            with pytest.raises(RuntimeError, match=re.escape(f"kv_page_write_: {message}")):
                write(cpu_backend, **changed)
        return
    with pytest.raises(RuntimeError, match=re.escape(f"kv_page_write_: {message}")):
        write(cpu_backend, **changed)


def test_page_values(cpu_backend: Backend) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sequence": TWO + 3}, "sequence must be in [0, B * H=4), got 4"),
        ({"index": INDEX + 20}, "index must be in [-1, S=32), got 32"),
        ({"pages": TWO - 1}, "pages must be in [0, number of pages=4), got -1"),
        ({"pages": TWO * 0}, "pages must be distinct, got 0 twice"),
        ({"index": INDEX[:, :8]}, "index must have shape [n, P=16], got [2, 8]"),
    ]
    for changed, message in refused:
        with pytest.raises(ValueError, match=re.escape(f"kv_page_write_: {message}")):
            write(cpu_backend, **changed)
    with pytest.raises(ValueError, match=r"kv_page_read: pages must be in \[0, number of pages=4\), got 8"):
        ops.kv_page_read(POOL, TWO + 8, PAGE)
    with pytest.raises(RuntimeError, match="kv_page_read: sequence must be given with per-channel maps"):
        ops.kv_page_read(POOL, TWO, PAGE, k_scale=MAP)


def test_unchecked_pages_out_of_range_are_skipped(cpu_backend: Backend) -> None:
    pool, pages = POOL.clone(), torch.tensor([7, -2], dtype=torch.int32)
    cpu_backend.run_kernel("kv_page_write_", pool, X, X, TWO + 50, INDEX, pages, **PAGE.options())
    assert torch.equal(pool, POOL)
    k, v = cpu_backend.run_kernel("kv_page_read", pool, pages, 16, 64, **PAGE.options(), dtype=torch.float32)
    assert k.isnan().all()
    assert v.isnan().all()
