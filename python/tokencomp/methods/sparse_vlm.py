"""SparseVLM: words that matter to the image rate its tokens; pruned ones are recycled (arXiv 2410.04417)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base, decoder
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning
from tokencomp.methods.density import density_peaks


@base.register("sparse_vlm", paper="2410.04417", stage="between decoder layers")
@dataclass(frozen=True)
class SparseVLM(Pruning):
    """Keeps what raters, the words that match the image, attend to; the best of the rest go on in clusters.

    Raters are the tokens behind the first image whose mean over visual tokens v of ``softmax_t(<v, t>)``, of
    the embeddings that enter the first layer, is above the mean of all. Behind each of ``layers`` a visual
    token scores the attention that raters pay it, a mean over raters and heads. With ``rate`` each stage
    deletes ``floor(rate (n - rank P))`` of its n visual tokens, P the raters' rows of the head-mean attention
    (the paper's rule); without it ``keep`` says how many stay (the authors' code). Then the
    ``floor(recycle m) + 1`` best of m deleted ones form ``floor(/10) + 1`` clusters around peaks of density
    (``density_peaks``); their means go on at the places of their centers.

    Departures: clusters stand at their centers, not behind all visual tokens, and positions are kept where
    the code's first version numbers anew; ties of density go to the lower token instead of to noise. The
    second version's bias and choice of heads are left out.
    """

    keep: tuple[float, ...] = field(
        default=(300 / 576, 200 / 576, 110 / 576),
        metadata={"help": "ratios or counts of visual tokens, stage by stage"},
    )
    layers: tuple[int, ...] = field(default=(2, 6, 15), metadata={"help": "layers of the stages, from 0"})
    rate: float | None = field(
        default=None, metadata={"help": "share of what exceeds the rank that goes; None: as keep says"}
    )
    recycle: float = field(default=0.3, metadata={"help": "share of deleted tokens that go into clusters"})

    def __post_init__(self) -> None:
        if self.rate is None:
            decoder.check_stages("SparseVLM", self.keep, self.layers)
        for name, share in (("rate", self.rate), ("recycle", self.recycle)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"SparseVLM: {name} must be in [0, 1], got {share!r}")

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """See ``DecoderMethod``. Raises ValueError for layers out of range."""
        decoder.check_layers("SparseVLM", "layers", self.layers, 0, layers - 2)
        return self.layers

    def prune(self, view: DecoderView) -> DecoderKeep:
        """See ``DecoderMethod``."""
        if "raters" not in view.scratch:
            view.scratch["raters"] = view.by_column(raters(view.embeds, view))
        rating = view.by_row(view.scratch["raters"])
        score = decoder.mean_over(rating, view.own.received(rating)[:, 0])
        keep = decoder.best(view, score, self.counts(view, rating))
        return self.recycled(view, score, keep) if self.recycle else DecoderKeep(keep)

    def counts(self, view: DecoderView, rating: Tensor) -> list[int]:
        """Visual tokens that each sequence keeps, clusters not counted."""
        if self.rate is None:
            return decoder.budgets(view, self.keep[self.layers.index(view.layer)])
        attention, there = view.own.rows(rating)
        left = []
        for rows, real, visual in zip(attention, there, view.visual, strict=True):
            n = int(visual.sum())
            rank = int(torch.linalg.matrix_rank(rows[real][:, visual])) if n and bool(real.any()) else n
            left.append(max(1, n - int(self.rate * (n - rank))) if n else 0)
        return left

    def recycled(self, view: DecoderView, score: Tensor, keep: Tensor) -> DecoderKeep:
        """``keep`` ``[B, W]``, and clusters of the others."""
        gone = view.visual & ~keep
        taken = [min(m, int(self.recycle * m) + 1) for m in gone.sum(1).tolist()]
        chosen = decoder.best(view, score.masked_fill(~gone, -torch.inf), taken, always=gone) & gone
        x, keep = view.x.clone(), keep.clone()
        for row, mine in enumerate(chosen):
            token = mine.nonzero()[:, 0]
            if len(token):
                features = view.x[row, token]
                center, target = density_peaks(features, len(token) // 10 + 1)
                mean, _ = ops.merge_tokens(features[None], target[None], len(center))
                x[row, token[center]] = mean[0]
                keep[row, token[center]] = True
        return DecoderKeep(keep, x)


def raters(embeds: Tensor, view: DecoderView) -> Tensor:
    """``[B, W]`` bool: of a prompt's text the tokens that match its image more than average; its last token
    where it has no text behind the image.
    """
    found = torch.zeros_like(view.text)
    for row in range(len(embeds)):
        x = embeds[row, view.column[row].clamp(min=0)].float()
        visual, text = view.visual[row], view.text[row]
        if not bool(text.any()):
            found[row] = view.last[row]
        elif bool(visual.any()):
            match = (x[visual] @ x[text].mT).softmax(1).mean(0)
            token = text.nonzero()[:, 0]
            found[row, token[match > match.mean()]] = True
            if not bool(found[row].any()):  # all match alike
                found[row] = text
    return found
