"""How the benches call packages that only a GPU runs, with stand-ins of the same signatures."""

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import ROOT
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

sys.path.insert(0, str(ROOT / "bench"))

import engines


def tensors(rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, rows, 8, generator=g)
    k, v = (torch.randn(2, 2, keys, 8, generator=g) for _ in range(2))
    return q, k, v


def gathered(pool: Tensor, table: Tensor) -> Tensor:
    """``[B, Hkv, S, D]`` of pages."""
    batch = table.shape[0]
    return pool[table.long()].view(batch, -1, *pool.shape[2:]).transpose(1, 2)


def with_kvcache(q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor, block_table: Tensor) -> Tensor:
    """flash_attn.flash_attn_with_kvcache."""
    k, v = gathered(k, block_table), gathered(v, block_table)
    assert cache_seqlens.tolist() == [k.shape[2]] * len(k)
    return sdpa(q.transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)


class Wrapper:
    """flashinfer.BatchDecodeWithPagedKVCacheWrapper."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert workspace.dtype == torch.uint8
        assert layout == "NHD"

    def plan(
        self, indptr: Tensor, indices: Tensor, last: Tensor, heads: int, groups: int, dim: int, page: int,
        *, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert (heads, groups, dim, page) == (4, 2, 8, engines.PAGE)
        assert q_data_type == kv_data_type == torch.float32
        assert last.tolist() == [page] * (len(indptr) - 1)
        self.table = torch.stack([indices[a:b] for a, b in pairwise(indptr)])

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        k, v = (gathered(pool, self.table) for pool in kv)
        return sdpa(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=with_kvcache))
    monkeypatch.setitem(
        sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    )


def test_pages_in_disorder_hold_the_keys() -> None:
    _, k, v = tensors(1, 2 * engines.PAGE)
    keys, values, table = engines.pages(k, v)
    assert sorted(table.flatten().tolist()) == [0, 1, 2, 3]
    assert torch.equal(gathered(keys, table), k)
    assert torch.equal(gathered(values, table), v)


@pytest.mark.usefixtures("stand_ins")
def test_decode_gives_what_attention_gives() -> None:
    q, k, v = tensors(1, 2 * engines.PAGE)
    want = sdpa(q, k, v, enable_gqa=True)
    for call in (engines.flash_attn_decode(q, k, v), engines.flashinfer_decode(q, k, v)):
        torch.testing.assert_close(call(0).view(want.shape), want)


def test_no_gpu_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = lambda name: object()  # noqa: E731
    monkeypatch.setattr(engines, "find_spec", found)
    q, k, v = tensors(1, engines.PAGE)
    assert engines.decode(q, k, v) == engines.prefill(q, k, v) == {}
