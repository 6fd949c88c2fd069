"""Methods on the KV cache for the tests: one small instance of each, given scores, and views to show them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokencomp.methods import (
    A2SF,
    CRITIC,
    D2O,
    EMS,
    H2O,
    RKV,
    TOVA,
    AdaKV,
    CaM,
    KeyDiff,
    KNorm,
    KVCompress,
    KVCrush,
    KVView,
    LagKV,
    LazyEviction,
    PagedEviction,
    PrefixKV,
    PyramidKV,
    RandomKV,
    SnapKV,
    StreamingLLM,
    StrideKV,
    eviction,
)
from torch import Tensor

PAGE = 4

# Every method, small enough for 64 prompt tokens and a few decode steps.
KV_METHODS: dict[str, Any] = {
    "streaming": StreamingLLM(0.25, every=4),
    "h2o": H2O(0.25, every=4),
    "h2o-each-step": H2O(16, every=1, recent=4),
    "h2o-corrected": H2O(0.25, every=4, corrected=True),
    "a2sf": A2SF(0.25, every=4, recent=4),
    "a2sf-exact": A2SF(0.25, every=4, recent=4, gamma=0.8, truncate=0.0),
    "tova": TOVA(0.25, every=4),
    "tova-each-step": TOVA(0.25, every=1, recent=1),
    "snapkv": SnapKV(0.25, window=4),
    "snapkv-decode": SnapKV(0.25, window=4, every=4, kernel=3, pool="avg", sinks=2),
    "pyramidkv": PyramidKV(SnapKV(16, window=4)),
    "adakv": AdaKV(SnapKV(0.25, window=4)),
    "adakv-decode": AdaKV(SnapKV(0.25, window=4, every=4), normalize=True),
    "adakv-pyramid": AdaKV(PyramidKV(SnapKV(16, window=4)), form="code"),
    "adakv-h2o": AdaKV(H2O(0.25, every=4)),
    "rkv": RKV(0.25, every=8, window=4),
    "lazy": LazyEviction(0.25, every=4, alpha=0.05),
    "kvcrush": KVCrush(budget=0.375, every=4, page=PAGE, recent=4),
    "kvcrush-shared": KVCrush(H2O(0.375, recent=0), page=PAGE, recent=4, shared=True, anchor="mean"),
    "prefixkv": PrefixKV(0.25, every=4),
    "critic": CRITIC(0.25, every=4, recent=4),
    "ems": EMS(0.25, every=4, window=4),
    "ems-keys": EMS(0.25, every=4, window=4, tau=0.0, merge_keys=True),
    "cam": CaM(H2O(0.25, every=4), targets=3),
    "cam-mean": CaM(H2O(0.25, every=4), against="mean", prompts=True),
    "d2o": D2O(H2O(0.25, every=4)),
    "d2o-adakv": D2O(AdaKV(SnapKV(0.25, window=4)), merge_keys=True),
    "kv-compress": KVCompress(0.25, every=4, recent=4, page=PAGE),
    "kv-compress-all": KVCompress(0.25, every=4, recent=4, page=PAGE, scored=0, squared=False),
    "paged-eviction": PagedEviction(0.25, page=PAGE),
    "paged-eviction-heads": PagedEviction(0.25, page=PAGE, shared=False),
    "random": RandomKV(0.25, every=4, recent=0.25),
    "stride": StrideKV(0.25, every=4),
    "knorm": KNorm(0.25, every=4, sinks=2),
    "keydiff": KeyDiff(0.25, every=4),
    "lagkv": LagKV(0.25, every=4, lag=8),
}

DRAWN = {"random", "cam", "cam-mean"}  # what they do depends on the row of the batch


@dataclass(frozen=True)
class Given(eviction.Eviction):
    """Scores as they are given, ``[B, H, S]``."""

    scores: Any = field(default=None, metadata={"help": "the scores"})
    sinks: int = field(default=0, metadata={"help": "sinks"})
    recent: int | float = field(default=0, metadata={"help": "recent"})

    def score(self, view: KVView) -> Tensor:
        return torch.as_tensor(self.scores, device=view.lengths.device)


def view_of(
    lengths: Sequence[Sequence[int]],
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    device: str = "cpu",
    **options: Any,
) -> KVView:
    """A view of rows of such lengths at the end of a prompt, without queries."""
    held = torch.tensor(lengths, dtype=torch.int32, device=device)
    size = int(held.max())
    keys = torch.ones(*held.shape, size, 2) if keys is None else keys
    values = keys if values is None else values
    fields: dict[str, Any] = {
        "layer": 0,
        "layers": 1,
        "lengths": held,
        "size": size,
        "position": torch.arange(size, dtype=torch.int32, device=device).expand(*held.shape, -1),
        "seen": held.amax(1).tolist(),
        "step": 0,
        "q": torch.zeros(held.shape[0], held.shape[1], 0, keys.shape[-1], device=device),
        "scale": 1.0,
        "keys": lambda: keys.to(device),
        "values": lambda: values.to(device),
    }
    return KVView(**(fields | options))


def kept(keep: Any) -> list[list[list[int]]]:
    """The slots of a ``Keep``, by sequence and head, holes left out."""
    return [
        [row[: int(n)].tolist() for row, n in zip(rows, counts, strict=True)]
        for rows, counts in zip(keep.index.cpu(), keep.count.cpu(), strict=True)
    ]


def random_qkv(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, tokens: int = 80, dim: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """``q``, ``k``, ``v`` of a sequence, with peaks worth telling apart."""
    g = torch.Generator().manual_seed(seed)
    q = 1.5 * torch.randn(batch, heads, tokens, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads, tokens, dim, generator=g) for _ in range(2))
    return q, k, v
