"""LLaVA-PruMerge: outliers of the CLS attention stay, and gather what is like them (arXiv 2403.15388)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp.methods import base, matching, pruning
from tokencomp.methods.visual import VisualKeep, VisualView


@base.register(
    "prumerge", paper="2403.15388", stage="visual tokens, between vision encoder and projector; merges"
)
@dataclass(frozen=True)
class PruMerge:
    """Keeps as many tokens as CLS attends to unusually much; each takes in its most similar tokens.

    With a the CLS token's attention to the n image tokens (``cls_score``), the number kept is that of
    outliers, ``a > Q3 + 1.5 (Q3 - Q1)`` with linearly interpolated quartiles, but at least 1 (where the
    paper's code fails). Kept are the largest. ``plus`` adds every s-th token ``0, s, 2 s, .. < n - 1`` that
    is not among them, ``s = max(1, floor(floor(n / count) / 3))``: few outliers give a coarse grid, many
    give all tokens.

    Merging: every kept token i becomes ``x_i + sum_j a_j x_j`` over the ``neighbours`` other tokens, kept or
    not, of most similar key; one token ``sum_j a_j x_j`` over all dropped j is appended. Nothing is
    normalised.

    Counts are those of each item (the code pools the quartiles of a batch, but runs on one image).
    """

    plus: bool = field(default=False, metadata={"help": "PruMerge+: also keep tokens at regular distances"})
    neighbours: int = field(default=32, metadata={"help": "similar tokens that each kept one takes in"})

    def __post_init__(self) -> None:
        if not 0 <= self.neighbours <= 32:
            raise ValueError(f"PruMerge: neighbours must be in [0, 32], got {self.neighbours!r}")

    def picks(self, score: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """The kept tokens, outliers by descending score, then those of the grid: ``[B, K]`` int32, -1 behind.

        K is the most there can be, so that nothing waits for the device: ``ceil((N - 1) / 4)`` of the N
        tokens, all of them for ``plus``.

        Args:
            score: ``[B, N]``, the CLS token's attention to the image tokens, see ``cls_score``.
            lengths: ``[B]`` integers, the valid tokens of each item.
        """
        batch, n = score.shape
        mask = _valid(score, lengths)
        length = mask.sum(1, keepdim=True)
        count = outlier_count(score, mask).clamp(min=1)[:, None]
        token = torch.arange(n, device=score.device).expand(batch, n)
        ranked = pruning.order(score.float(), mask=mask)
        outlier = (token < count) & (token < length)  # by rank
        if not self.plus:
            width = max(min(n, 1), -(-(n - 1) // 4))
            return ranked.masked_fill(~outlier, -1)[:, :width].to(torch.int32)
        step = (length // count // 3).clamp(min=1)
        grid = (token % step == 0) & (token < length - 1)
        grid &= ~torch.zeros_like(outlier).scatter(1, ranked, outlier)
        place, _, _ = ragged.compact_rows(torch.cat([outlier, grid], dim=1), n)
        chosen = ragged.gather_rows(torch.cat([ranked, token], dim=1), place)
        return chosen.masked_fill(place < 0, -1).to(torch.int32)

    def select(self, score: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Like ``picks``, in ascending order of token."""
        return base.ascending(self.picks(score, lengths=lengths))

    def looks_at(self, layers: int) -> tuple[int, ...]:
        """See ``VisualMethod``: the last layer."""
        return (layers - 1,)

    def choose(self, view: VisualView) -> VisualKeep:
        """See ``VisualMethod``: each crop by itself, merged behind the projector (the paper: before it). The
        token of all dropped ones takes the place of the last of them.
        """
        key = view.encoder.keys(view.encoder.layers - 1)
        query, own = view.encoder.cls_query(view.encoder.layers - 1)
        flat = [t.transpose(1, 2).flatten(2) for t in (query[:, :, None], torch.cat([own, key], 2))]
        logits = (flat[0].float() @ flat[1].float().mT)[:, 0] * flat[0].shape[2] ** -0.5
        score = logits.softmax(1)[:, own.shape[2] :]
        kept = self.select(score)
        y, count = self.merge(view.x, flat[1][:, own.shape[2] :], score, kept)
        token = torch.arange(score.shape[1], device=score.device)
        stays = ragged.kept_mask(kept, score.shape[1])
        last = torch.where(stays, -1, token).amax(1, keepdim=True)
        wide = torch.cat([kept, kept.new_full((len(kept), 1), -1)], 1)
        wide = wide.scatter(1, (count[:, None] - 1).long(), last.to(kept.dtype))
        order = torch.where(wide < 0, score.shape[1], wide).argsort(dim=1, stable=True)
        return VisualKeep(wide.gather(1, order), ragged.gather_rows(y, order.to(torch.int32)))

    def merge(
        self, x: Tensor, key: Tensor, score: Tensor, kept: Tensor, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The kept tokens with what they took in, then the token of all dropped ones.

        Holds ``[B, K, N]`` weights.

        Args:
            x: ``[B, N, C]`` features of the image tokens.
            key: ``[B, N, D]`` their keys; norms do not matter.
            score: ``[B, N]`` as for ``picks``; NaN weighs nothing.
            kept: ``[B, K]`` int32 from ``picks`` (the paper's order) or ``select``.
            lengths: ``[B]`` integers, the valid tokens of each item.

        Returns:
            ``y`` ``[B, K + 1, C]`` in the dtype of x, zeros behind the last token, and ``[B]`` int32, the
            number of tokens.
        """
        mask = _valid(score, lengths)
        share = score.float().masked_fill(~mask | score.isnan(), 0)
        features = x.float().masked_fill(~mask[..., None], 0)
        there = kept >= 0
        weight = self._nearest(key, kept, mask) * share[:, None] * there[..., None]
        own = ragged.gather_rows(features, kept) + weight @ features
        dropped = share.masked_fill(ragged.kept_mask(kept, x.shape[1]), 0)
        extra = dropped[:, None] @ features
        count = there.sum(1)
        y = torch.cat([own, torch.zeros_like(extra)], dim=1)
        y = y.scatter(1, count[:, None, None].expand(extra.shape), extra)
        return y.to(x.dtype), (count + 1).to(torch.int32)

    def _nearest(self, key: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        """``[B, K, N]`` float32, 1 where the token is among the nearest of the kept one, itself not among
        them.
        """
        (batch, rows), tokens = kept.shape, key.shape[1]
        out = key.new_zeros(batch, rows, tokens + 1, dtype=torch.float32)  # one column takes what is missing
        if self.neighbours > 0:
            key = matching.dense(key)
            _, nearest = ops.cosine_match(
                key, key, a_index=kept, mask_b=mask, top=self.neighbours, exclude_self=True
            )
            nearest = nearest.view(batch, rows, self.neighbours).long()
            out = out.scatter(2, torch.where(nearest < 0, tokens, nearest), 1.0)
        return out[..., :tokens]


def cls_score(q: Tensor, k: Tensor) -> Tensor:
    """``[B, N]`` float32: ``softmax(q_0 k^T / sqrt(C))`` without its first entry, heads not split.

    ``q`` and ``k`` ``[B, 1 + N, C]`` are the projections of a layer, all heads side by side, CLS first (the
    paper: the last layer of CLIP, whose output the language model never sees).
    """
    logits = (q[:, :1].float() @ k.float().mT)[:, 0] * q.shape[-1] ** -0.5
    share: Tensor = logits.softmax(dim=-1)
    return share[:, 1:]


def outlier_count(score: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B]`` int64: how many of the ``score`` ``[B, N]`` lie above ``Q3 + 1.5 (Q3 - Q1)``; at most a
    quarter.

    Quartiles are interpolated linearly between order statistics (NumPy's default), of the tokens that
    ``mask`` ``[B, N]`` says True of. NaN counts as -inf.
    """
    if score.shape[1] == 0:
        return torch.zeros(score.shape[0], dtype=torch.long, device=score.device)
    known = torch.where(score.isnan(), float("-inf"), score).double()
    mask = torch.ones_like(known, dtype=torch.bool) if mask is None else mask
    ordered = known.masked_fill(~mask, float("inf")).sort(dim=1).values
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    first, third = (_quantile(ordered, last, share) for share in (0.25, 0.75))
    return ((known > third + 1.5 * (third - first)) & mask).sum(1)


def _quantile(ordered: Tensor, last: Tensor, share: float) -> Tensor:
    place = share * last
    low = place.floor().long()
    below, above = ordered.gather(1, low), ordered.gather(1, torch.minimum(low + 1, last))
    fraction = place - low
    return torch.where(fraction == 0, below, below + fraction * (above - below))


def _valid(score: Tensor, lengths: Tensor | None) -> Tensor:
    token = torch.arange(score.shape[1], device=score.device).expand(score.shape)
    return token >= 0 if lengths is None else token < lengths.to(score.device)[:, None]
