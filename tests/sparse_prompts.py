"""Prompts for tests of sparse attention: views of a layer, the methods, and attention by what they choose."""

from dataclasses import replace
from typing import Any

import torch
from backends import Backend
from tokencomp import methods, ops, reference
from tokencomp.block_lists import BlockLists
from tokencomp.methods.sparse import SparseView, Subset
from torch import Tensor

GATES = [[0.1, 0.9]] * 2
PATTERNS = [[["vertical_slash", 20, 40], ["a_shape", 10, 50], ["block_sparse", 2, 0], ["a_shape", 64, 1]]] * 2
THRESHOLDS = [[0.3, 0.5, 0.7, 1.0]] * 2

# Every method on prompts, small enough for a few hundred tokens, two kv heads and four query heads.
PROMPT_METHODS: dict[str, Any] = {
    "minference": methods.MInference(vertical=16, slash=3, queries=16, sinks=4, recent=2),
    "minference-patterns": methods.MInference(patterns=PATTERNS, queries=16, sinks=4, recent=8),
    "flexprefill": methods.FlexPrefill(gamma=0.5, min_budget=0, block=64),
    "flexprefill-aware": methods.FlexPrefill(gamma=0.5, tau=1.0, min_budget=0, max_budget=128),
    "xattention": methods.XAttention(threshold=0.5, stride=8, block=64),
    "xattention-heads": methods.XAttention(threshold=THRESHOLDS, stride=16),
    "duo": methods.DuoAttention(GATES, sinks=8, recent=30),
    "duo-streaming": methods.DuoAttention(sinks=8, recent=30),
    "moba": methods.MoBA(chunk=64, top=2),
    "zipvl": methods.ZipVLPrompt(tau=0.5, recent=8, random=8),
}
LISTED = {name: method for name, method in PROMPT_METHODS.items() if name != "zipvl"}


def tensors(
    batch: int = 2, rows: int = 200, keys: int | None = None, dim: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q of four heads, k and v of two; keys with a direction of their own, so that attention is uneven."""
    g, keys = torch.Generator().manual_seed(seed), rows if keys is None else keys
    q = torch.randn(batch, 4, rows, dim, generator=g) * 2
    k, v = (torch.randn(batch, 2, keys, dim, generator=g) for _ in range(2))
    k = k + 2 * torch.randn(batch, 2, -(-keys // 16), dim, generator=g).repeat_interleave(16, 2)[:, :, :keys]
    return q, k, v


def view_of(q: Tensor, k: Tensor, v: Tensor, counts: list[int] | None = None, **options: Any) -> SparseView:
    """A prompt whose rows are the last of the keys; with ``counts`` the first of them are tokens."""
    batch, heads, size = k.shape[:3]
    lengths = torch.full((batch, heads), size, dtype=torch.int32, device=q.device)
    view = SparseView(
        layer=0, layers=2, q=q, scale=q.shape[3] ** -0.5, softcap=None, lengths=lengths, size=size, step=0,
        page=16, keys=lambda: k, values=lambda: v, scores=lambda *a, **b: (k, v), position=lambda: lengths,
    )  # fmt: skip
    if counts is not None:
        told = torch.tensor(counts, dtype=torch.int32, device=q.device)
        view = replace(view, counts=told, starts=torch.zeros_like(told))
        view.lengths = (size - q.shape[2] + told)[:, None].expand(batch, heads).contiguous()
    return replace(view, **options)


def attend(lists: BlockLists | None, view: SparseView) -> tuple[Tensor, Tensor]:
    """What the operator makes of the lists."""
    return ops.flash_prefill(
        view.q, view.keys(), view.values(), scale=view.scale, softcap=view.softcap,
        lengths=view.lengths[:, 0].contiguous(), **({} if lists is None else lists.arguments()),
    )  # fmt: skip


def mask_of(lists: BlockLists | None, view: SparseView) -> Tensor:
    """``[B, Hq, T, S]`` bool: who sees whom, by the lists and by position."""
    shape = (view.q.shape[0], view.q.shape[1], view.q.shape[2], view.size)
    seen = reference.visible(shape[0], shape[2], shape[3], lengths=view.lengths[:, 0])[:, None].expand(shape)
    if lists is None:
        return seen
    given = lists.arguments()
    blocks = {name: given.pop(name) for name in ("block_q", "block_k")}
    return seen & reference.listed(*shape, **given, **blocks)


def dense(view: SparseView, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention under a mask in float64, and the share of the dense attention of each row that it keeps."""
    group = view.q.shape[1] // view.keys().shape[1]
    k, v = (x().double().cpu().repeat_interleave(group, 1) for x in (view.keys, view.values))
    z = view.q.double().cpu() @ k.mT * view.scale
    whole = z.masked_fill(~mask_of(None, view), -torch.inf)
    lse = torch.logsumexp(z.masked_fill(~seen, -torch.inf), -1)
    p = torch.where(seen, (z - lse.nan_to_num(0, 0, 0)[..., None]).exp(), 0.0)
    return p @ v, (lse - torch.logsumexp(whole, -1)).exp()


def choose(method: Any, view: SparseView, backend: Backend) -> Any:
    """The choice of a method on a back end, on the CPU."""
    moved = replace(
        view, q=view.q.to(backend.device), lengths=view.lengths.to(backend.device),
        keys=lambda: view.keys().to(backend.device), values=lambda: view.values().to(backend.device),
        counts=None if view.counts is None else view.counts.to(backend.device),
        starts=None if view.starts is None else view.starts.to(backend.device),
    )  # fmt: skip
    with backend.active():
        choice = method.choose_prompt(moved)
    if isinstance(choice, Subset):
        return Subset(choice.tokens.cpu(), choice.count.cpu())
    return None if choice is None else BlockLists(*(x.cpu() if isinstance(x, Tensor) else x for x in choice))
