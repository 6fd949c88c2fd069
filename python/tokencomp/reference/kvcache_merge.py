"""Oracle of eviction with merging: nearest kept slots and weighted means, one row after the other."""

from typing import Literal

import torch
from torch import Tensor

from tokencomp.reference.kvcache import read_row, rows_of, slots

INF = float("inf")


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay, rows that are not finite become NaN."""
    norm = x.norm(dim=-1, keepdim=True)
    scaled = torch.where(norm > 0, x / norm.clamp(min=torch.finfo(x.dtype).tiny), torch.zeros_like(x))
    return torch.where(norm.isfinite(), scaled, torch.full_like(x, float("nan")))


def evict_similarity(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    keep_index: Tensor,
    keep_count: Tensor,
    member_index: Tensor,
    *,
    similarity: Literal["k", "kv"] = "k",
    clamp: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``[B, Hkv, M, K]``: every member with every kept slot, -inf where there is none."""
    out = torch.full((*member_index.shape, keep_index.shape[2]), -INF, dtype=dtype)
    for b, h in rows_of(lengths):
        kept = keep_index[b, h, : int(keep_count[b, h])].long()
        there = (member_index[b, h] >= 0).nonzero()[:, 0]
        members = member_index[b, h, there].long()
        product = torch.ones(len(members), len(kept), dtype=dtype)
        for pages in (k_pages, v_pages)[: len(similarity)]:
            x = unit(read_row(pages, block_table, lengths, b, h).to(dtype))
            cosine = x[members] @ x[kept].mT
            product = product * (cosine.clamp(min=0) if clamp else cosine)
        out[b, h, there[:, None], torch.arange(len(kept))] = product.nan_to_num(-INF, INF, -INF)
    return out


def evict_assign(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    keep_index: Tensor,
    keep_count: Tensor,
    member_index: Tensor,
    *,
    similarity: Literal["k", "kv"] = "k",
    clamp: bool = True,
    min_similarity: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The most similar kept slot of every member, the lower rank of several; -1 below ``min_similarity``."""
    matrix = evict_similarity(
        k_pages, v_pages, block_table, lengths, keep_index, keep_count, member_index,
        similarity=similarity, clamp=clamp, dtype=dtype,
    )  # fmt: skip
    if matrix.shape[3] == 0:
        return torch.full_like(member_index, -1), torch.full(member_index.shape, -INF)
    best = matrix.amax(-1)
    rank = (matrix == best[..., None]).int().argmax(-1).int()
    none = (best == -INF) | (best < (-INF if min_similarity is None else min_similarity))
    return torch.where(none, -1, rank), best


def evict_merge_(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    keep_index: Tensor,
    keep_count: Tensor,
    member_index: Tensor,
    target: Tensor,
    weight: Tensor,
    center: Tensor,
    *,
    values: Literal["mean", "sum"] = "mean",
    keys: Literal["keep", "mean", "direction"] = "keep",
    by_norm: bool = False,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Members mixed into the kept slots they go to, in place."""
    for b, h in rows_of(lengths):
        k, v = (read_row(pages, block_table, lengths, b, h).to(dtype) for pages in (k_pages, v_pages))
        member, goes = member_index[b, h].long(), target[b, h]
        for rank in range(int(keep_count[b, h])):
            here = (goes == rank) & (member >= 0)
            if not bool(here.any()):
                continue
            c, i = int(keep_index[b, h, rank]), member[here]
            w, a = weight[b, h, here].to(dtype), center[b, h, rank].to(dtype)
            if by_norm:
                w = w * _share(v[i].norm(dim=1), v[c].norm())
            if values == "sum" or float(a + w.sum()) > 0:
                value = v[c] + w @ v[i] if values == "sum" else _mean(a, v[c], w, v[i])
                _put(v_pages, block_table, b, h, c, value)
            if keys != "keep" and float(a + w.sum()) > 0:
                key = _mean(a, k[c], w, k[i])
                if keys == "direction":
                    length = _mean(a, k[c].norm(), w, k[i].norm(dim=1))
                    key = _mean(a, unit(k[c]), w, unit(k[i])) * length
                _put(k_pages, block_table, b, h, c, key)


def _share(member: Tensor, center: Tensor) -> Tensor:
    return torch.where(member + center > 0, member / (member + center), torch.zeros_like(member))


def _mean(a: Tensor, center: Tensor, w: Tensor, members: Tensor) -> Tensor:
    return (a * center + w @ members) / (a + w.sum())


def _put(pages: Tensor, block_table: Tensor, b: int, h: int, slot: int, x: Tensor) -> None:
    page, head, place = (t[slot] for t in slots(pages, block_table, b, h, slot + 1))
    pages[page, head, place] = x.to(pages.dtype)
